package door

import (
	"errors"
	"io"
	"net"
	"syscall"
	"time"
)

// Patience is how long a client may take to send the rest of a message that it has begun, and to
// take an answer. Between messages the client has for ever.
const Patience = 30 * time.Second

// uncounted is the most bytes of an answer that wait for the client without being counted.
const uncounted = 4 << 10

// A Stream reads messages from a client and writes answers. It makes one system call for each
// part of a message that is there, and for each answer that the client has room for. One
// goroutine uses it.
type Stream struct {
	// Keep counts n more bytes of answers that wait for the client, or fewer. nil counts
	// nothing. See Conn.Keep.
	Keep func(r Resource, n int) error

	net   net.Conn
	begun bool // a message has: it must be there whole before Patience ends
	timed bool // the connection has a deadline for that

	raw     syscall.RawConn // nil: net is no socket
	attempt func(uintptr) bool
	send    func(uintptr) bool
	in      []byte // what attempt is to fill
	waits   bool   // attempt is to wait for something to read
	out     []byte // what send is to send
	n       int    // what attempt has read, or send written
	err     error
}

// NewStream returns a Stream of a connection.
func NewStream(nc net.Conn) Stream {
	s := Stream{net: nc}
	if c, ok := nc.(syscall.Conn); ok {
		s.raw, _ = c.SyscallConn() // a closed connection has none, and nothing to read
	}
	return s
}

// Fill reads into b until at least so many bytes are there, and returns how many are. Before the
// first byte of a message, Fill waits for ever. The error is io.EOF when the client hung up
// between messages, and io.ErrUnexpectedEOF within a message. It is os.ErrDeadlineExceeded when
// the message takes longer than Patience.
func (s *Stream) Fill(b []byte, least int) (have int, err error) {
	for have < least {
		n, err := s.read(b[have:])
		switch {
		case n > 0:
			s.begun = true
			have += n
		case err == syscall.EAGAIN: // the rest of the message is not there yet
			s.timed = true
			if err := s.net.SetReadDeadline(time.Now().Add(Patience)); err != nil {
				return have, err
			}
		case errors.Is(err, io.EOF) && s.begun:
			return have, io.ErrUnexpectedEOF
		case err != nil:
			return have, err
		}
	}
	return have, nil
}

// Whole says that the message is there whole. What comes next begins another one.
func (s *Stream) Whole() error {
	s.begun = false
	if !s.timed {
		return nil
	}
	s.timed = false
	return s.net.SetReadDeadline(time.Time{})
}

// read reads what there is, at least one byte. It waits for the first byte of a
// message, and for the others when that is timed; otherwise it fails with EAGAIN.
func (s *Stream) read(b []byte) (int, error) {
	s.waits = !s.begun || s.timed
	if s.raw == nil {
		if !s.waits {
			return 0, syscall.EAGAIN
		}
		return s.net.Read(b)
	}
	if s.attempt == nil {
		s.attempt = func(fd uintptr) bool {
			s.n, s.err = transfer(syscall.SYS_READ, fd, s.in)
			return s.err != syscall.EAGAIN || !s.waits
		}
	}
	s.in = b
	err := s.raw.Read(s.attempt)
	s.in = nil
	switch {
	case err != nil:
		return 0, err
	case s.err != nil:
		return 0, s.err
	case s.n == 0:
		return 0, io.EOF
	}
	return s.n, nil
}

// Write sends b in one system call if the client has room for it. Otherwise Write waits until the
// client has taken b, for as long as patience.
func (s *Stream) Write(b []byte, patience time.Duration) error {
	size := len(b) // all of b stays until the client has taken the last byte
	if s.raw != nil {
		if s.send == nil {
			s.send = func(fd uintptr) bool {
				s.n, s.err = transfer(syscall.SYS_WRITE, fd, s.out)
				return true
			}
		}
		s.out = b
		err := s.raw.Write(s.send)
		s.out = nil
		switch {
		case err != nil:
			return err
		case s.err != nil && s.err != syscall.EAGAIN:
			return s.err
		}
		if b = b[s.n:]; len(b) == 0 {
			return nil
		}
	}
	if err := s.net.SetWriteDeadline(time.Now().Add(patience)); err != nil {
		return err
	}
	if s.Keep != nil && size > uncounted {
		if err := s.Keep(Memory, size); err != nil {
			return err
		}
		defer func() { _ = s.Keep(Memory, -size) }()
	}
	_, err := s.net.Write(b)
	return err
}
