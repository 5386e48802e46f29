package sshagent

import (
	"context"
	"errors"
	"net"
	"path/filepath"
	"testing"
	"time"

	"p11-agent/agent/door/doortest"
)

func TestPing(t *testing.T) {
	r := serve(t, &Door{Keyring: newKeyring(), limit: 1})
	for range 3 {
		// The server may close a connection that comes too soon after the last. Ping
		// counts that as alive.
		if err := Ping(t.Context(), r.socket); err != nil {
			t.Fatal(err)
		}
	}
	one := r.dial()
	for { // until the server serves this connection
		send(t, one, message(11))
		if answer, err := readAnswer(one); err == nil && answer[0] == 12 {
			break
		}
		one = r.dial()
	}
	if err := Ping(t.Context(), r.socket); err != nil {
		t.Errorf("an agent that has too many connections: %v", err)
	}
	r.stop()
	<-r.stopped
	if err := Ping(t.Context(), r.socket); err == nil {
		t.Error("an agent that has ended answers")
	}
}

// Ping succeeds while a keyring hangs. It fails for a server that accepts no connection.
func TestPingFindsHungAgent(t *testing.T) {
	k, begun, _ := waiting()
	r := serve(t, &Door{Keyring: k})
	send(t, r.dial(), signRequest)
	<-begun
	if err := Ping(t.Context(), r.socket); err != nil {
		t.Errorf("while a prompt is open: %v", err)
	}

	path := filepath.Join(doortest.Dir(t), "s")
	l, err := net.Listen("unix", path)
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	ctx, cancel := context.WithTimeout(t.Context(), 50*time.Millisecond)
	defer cancel()
	if err := Ping(ctx, path); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("no agent accepts: %v", err)
	}
}
