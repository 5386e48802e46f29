package environment

import (
	"context"
	"errors"
	"net"
	"os"
	"path/filepath"
	"slices"
	"testing"

	"p11-agent/agent/door/doortest"
	"p11-agent/systemd/bus"
	"p11-agent/systemd/bus/bustest"
)

func TestRead(t *testing.T) {
	b := bustest.Start(t)
	if _, err := Read(t.Context(), b.Dir()); err == nil {
		t.Error("there is an environment without a manager")
	}
	for _, want := range [][]string{{"DISPLAY=:1", "EMPTY=", "TEXT=a=b c"}, {"DISPLAY=:2"}} {
		b.Systemd1(want...)
		got, err := Read(t.Context(), b.Dir())
		if err != nil || !slices.Equal(got, want) {
			t.Errorf("%q, %v; want %q", got, err, want)
		}
	}
}

func TestNoBus(t *testing.T) {
	dir := t.TempDir()
	if err := os.WriteFile(filepath.Join(dir, "bus"), nil, 0o600); err != nil {
		t.Fatal(err)
	}
	for _, d := range []string{"", "relative", "/nonexistent", dir} {
		if _, err := Read(t.Context(), d); !errors.Is(err, bus.ErrNone) {
			t.Errorf("%q: %v", d, err)
		}
	}
}

// If a bus does not answer, Read ends with its context.
func TestSilentBus(t *testing.T) {
	dir := doortest.Dir(t)
	l, err := net.Listen("unix", filepath.Join(dir, "bus"))
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error)
	go func() { _, err := Read(ctx, dir); done <- err }()
	c, err := l.Accept()
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	cancel()
	if err := <-done; err == nil {
		t.Error("a bus that says nothing gave an environment")
	}
}
