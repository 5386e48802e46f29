// Package pcsctest stands in for pcscd in tests: it reports the readers that a test sets. It has no card.
package pcsctest

import (
	"encoding/binary"
	"io"
	"net"
	"path/filepath"
	"sync"
	"testing"

	"p11-agent/token/pcsc"
)

// The protocol of pcscd (winscard_msg.h of pcsc-lite), as far as package pcsc speaks it.
const (
	cmdReadersState = 0x12
	cmdWaitChange   = 0x13
	maxReaders      = 16
	nameSize        = 128
	stateSize       = 184
	present         = 0x0004
)

// A Service is a pcscd. Its methods may be called from any goroutine.
type Service struct {
	tb     testing.TB
	socket string

	mu       sync.Mutex
	listener net.Listener // nil: it has gone
	readers  []pcsc.Reader
	conns    map[net.Conn]bool // true: it waits for a change
	serving  sync.WaitGroup
}

// Start starts a Service with some readers. It ends with the test.
func Start(tb testing.TB, readers ...pcsc.Reader) *Service {
	tb.Helper()
	s := &Service{tb: tb, socket: filepath.Join(tb.TempDir(), "pcscd"), readers: readers, conns: make(map[net.Conn]bool)}
	s.Begin()
	tb.Cleanup(s.End)
	return s
}

// Env returns the environment of a module that uses the Service.
func (s *Service) Env() []string { return []string{"PCSCLITE_CSOCK_NAME=" + s.socket} }

// Begin starts a Service that has ended.
func (s *Service) Begin() {
	s.tb.Helper()
	l, err := net.Listen("unix", s.socket)
	if err != nil {
		s.tb.Fatal(err)
	}
	s.mu.Lock()
	s.listener = l
	s.mu.Unlock()
	s.serving.Go(func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			s.mu.Lock()
			s.conns[c] = false
			gone := s.listener != l
			s.mu.Unlock()
			if gone {
				_ = c.Close()
			}
			s.serving.Go(func() { s.serve(c) })
		}
	})
}

// End ends the Service with its connections.
func (s *Service) End() {
	s.mu.Lock()
	if s.listener != nil {
		_ = s.listener.Close()
	}
	s.listener = nil
	for c := range s.conns {
		_ = c.Close()
	}
	s.mu.Unlock()
	s.serving.Wait()
}

// Set changes the readers.
func (s *Service) Set(readers ...pcsc.Reader) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.readers = readers
	for c, waits := range s.conns {
		if waits {
			s.conns[c] = false
			_, _ = c.Write(make([]byte, 8)) // struct wait_reader_state_change; fails if the client has gone
		}
	}
}

func (s *Service) serve(c net.Conn) {
	defer func() {
		s.mu.Lock()
		delete(s.conns, c)
		s.mu.Unlock()
		_ = c.Close()
	}()
	for {
		var header [8]byte
		if _, err := io.ReadFull(c, header[:]); err != nil {
			return
		}
		body := make([]byte, binary.NativeEndian.Uint32(header[:]))
		if _, err := io.ReadFull(c, body); err != nil {
			return
		}
		command := binary.NativeEndian.Uint32(header[4:])
		s.mu.Lock()
		switch command {
		case cmdReadersState, cmdWaitChange:
			body = encode(s.readers)
			s.conns[c] = command == cmdWaitChange
		} // otherwise it is the version, which is fine
		_, err := c.Write(body)
		s.mu.Unlock()
		if err != nil {
			return
		}
	}
}

// encode returns the array of READER_STATE.
func encode(readers []pcsc.Reader) []byte {
	all := make([]byte, maxReaders*stateSize)
	for i, r := range readers {
		b := all[i*stateSize:]
		copy(b[:nameSize], r.Name)
		binary.NativeEndian.PutUint32(b[nameSize:], r.Events)
		if r.Card {
			binary.NativeEndian.PutUint32(b[nameSize+4:], present)
		}
		binary.NativeEndian.PutUint32(b[nameSize+8:], uint32(int32(r.Users)))
	}
	return all
}
