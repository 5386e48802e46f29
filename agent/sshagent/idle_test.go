package sshagent

import (
	"net"
	"runtime"
	"testing"
)

// A client that stays connected and asks for nothing costs one goroutine, and less
// than a buffer: ssh keeps a connection for as long as it forwards the agent.
func TestIdleConnections(t *testing.T) {
	const clients = 200
	r := serve(t, &Door{Keyring: newKeyring()})
	connect := func() *net.UnixConn {
		conn := r.dial()
		ask(t, conn, message(99)) // an unknown message, which the agent answers
		return conn
	}
	measure := func() (bytes uint64, goroutines int) {
		runtime.GC()
		runtime.GC() // the second run empties each sync.Pool
		var m runtime.MemStats
		runtime.ReadMemStats(&m)
		return m.HeapAlloc, runtime.NumGoroutine()
	}
	connect() // makes the things that all connections share
	before, had := measure()
	conns := make([]*net.UnixConn, clients)
	for i := range conns {
		conns[i] = connect()
	}
	after, have := measure()
	if n := have - had; n != clients {
		t.Errorf("%d goroutines for %d clients", n, clients)
	}
	// The client's end, too, is in this process.
	if each := int64(after-before) / clients; each >= bufferSize {
		t.Errorf("a client that asks for nothing costs %d bytes, and a buffer has %d", each, bufferSize)
	} else {
		t.Logf("%d bytes for each client", each)
	}
	for _, conn := range conns { // all connections still work
		ask(t, conn, message(99))
	}
}
