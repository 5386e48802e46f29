// Package pcsc asks the PC/SC service (pcscd of pcsc-lite) about its readers: whether a
// card is in a reader, whether a program uses the card, and which programs are connected.
//
// The package never touches a card. pcscd answers from its own records, and the kernel
// lists the processes that are connected to pcscd. Every question has a time limit. If a
// process belongs to another user or the service refuses, the package reports the answer
// as unknown. It never guesses.
//
// It leaves to others what is on a card, and how to react to another program's use of it.
package pcsc

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"strings"
	"time"
	"unicode/utf8"

	"golang.org/x/sys/unix"
)

// DefaultSocket is where pcscd listens by default.
const DefaultSocket = "/run/pcscd/pcscd.comm"

// Socket returns where a process with this environment looks for pcscd. libpcsclite uses
// the same rule.
func Socket(environ []string) string {
	socket := DefaultSocket
	for _, kv := range environ { // of several settings the last counts
		if v, ok := strings.CutPrefix(kv, "PCSCLITE_CSOCK_NAME="); ok && v != "" {
			socket = v
		}
	}
	return socket
}

// askTimeout is how long one question may take.
const askTimeout = 2 * time.Second

// NoticeTime is how long pcscd needs at most to notice that a card has left.
const NoticeTime = 500 * time.Millisecond

// The protocol of pcscd is in winscard_msg.h of pcsc-lite. Numbers have the machine's
// byte order and width. These commands are the same since version 1.8.24. Later versions
// of the protocol (4:5, 4:6) add others.
const (
	protocolMajor = 4
	protocolMinor = 4

	cmdVersion      = 0x11
	cmdReadersState = 0x12
	cmdWaitChange   = 0x13 // answered with the readers' state, and once more by a wait_reader_state_change

	maxReaders   = 16    // PCSCLITE_MAX_READERS_CONTEXTS of 4:4
	nameSize     = 128   // MAX_READERNAME
	atrSize      = 33    // MAX_ATR_SIZE, before padding
	changeSize   = 2 * 4 // struct wait_reader_state_change: timeOut and rv
	stateSize    = nameSize + 3*4 + atrSize + 3 + 2*4
	statePresent = 0x0004 // SCARD_PRESENT
)

// A Reader is a reader as pcscd sees it. If a reader has several slots, a Reader is one
// slot.
type Reader struct {
	Name string
	Card bool // a card is in
	// Users is the number of connections with the card, or Exclusive.
	Users int
	// Events changes each time a card is put in or taken out.
	Events uint32
}

var (
	// ErrRefused says that pcscd hung up before it sent an answer. pcscd does this if
	// polkit does not allow the user (action org.debian.pcsc-lite.access_pcsc).
	ErrRefused = errors.New("it hung up, as it does on users that it is not for")
	// ErrLanguage says that pcscd and this program have no protocol version in common.
	ErrLanguage = errors.New("pcscd and this program do not agree on a language")
)

// Exclusive is the value of Reader.Users when one program uses the card exclusively.
const Exclusive = -1

// A Service is a connection with pcscd. Only one goroutine may use it.
type Service struct{ conn net.Conn }

// Dial connects to pcscd. It fails if no pcscd runs, or if pcscd refuses this user.
func Dial(ctx context.Context, socket string) (*Service, error) {
	ctx, cancel := context.WithTimeout(ctx, askTimeout)
	defer cancel()
	conn, err := new(net.Dialer).DialContext(ctx, "unix", socket)
	if err != nil {
		return nil, fmt.Errorf("connect to pcscd: %w", err)
	}
	s := &Service{conn}
	if err := s.greet(ctx); err != nil {
		return nil, errors.Join(err, s.Close())
	}
	return s, nil
}

// Close ends the connection.
func (s *Service) Close() error { return s.conn.Close() }

// greet agrees with pcscd on a version. It offers version 4:4, which later services
// understand. Otherwise it offers the version that the service names.
func (s *Service) greet(ctx context.Context) error {
	minor := uint32(protocolMinor)
	for range 2 {
		var body [12]byte
		binary.NativeEndian.PutUint32(body[0:], protocolMajor)
		binary.NativeEndian.PutUint32(body[4:], minor)
		answer, err := s.ask(ctx, cmdVersion, body[:], len(body))
		if err != nil {
			return err
		}
		if binary.NativeEndian.Uint32(answer[8:]) == 0 {
			return nil
		}
		if major := binary.NativeEndian.Uint32(answer); major != protocolMajor {
			return fmt.Errorf("%w: it speaks version %d, and 4 is known here", ErrLanguage, major)
		}
		minor = binary.NativeEndian.Uint32(answer[4:])
	}
	return ErrLanguage
}

// ask sends a command and reads an answer of n bytes. It waits askTimeout at most.
func (s *Service) ask(ctx context.Context, command uint32, body []byte, n int) ([]byte, error) {
	ctx, cancel := context.WithTimeout(ctx, askTimeout)
	defer cancel()
	return s.exchange(ctx, command, body, n)
}

// exchange sends a command and reads an answer of n bytes. It waits until ctx ends.
func (s *Service) exchange(ctx context.Context, command uint32, body []byte, n int) ([]byte, error) {
	deadline, _ := ctx.Deadline() // zero: there is none
	if err := s.conn.SetDeadline(deadline); err != nil {
		return nil, fmt.Errorf("ask pcscd: %w", err)
	}
	defer context.AfterFunc(ctx, func() { _ = s.conn.SetDeadline(time.Unix(1, 0)) })()
	msg := binary.NativeEndian.AppendUint32(nil, uint32(len(body)))
	msg = append(binary.NativeEndian.AppendUint32(msg, command), body...)
	_, err := s.conn.Write(msg)
	answer := make([]byte, n)
	if err == nil {
		_, err = io.ReadFull(s.conn, answer)
	}
	switch {
	case errors.Is(err, io.EOF), errors.Is(err, unix.ECONNRESET), errors.Is(err, unix.EPIPE):
		return nil, fmt.Errorf("ask pcscd: %w: %w", ErrRefused, err)
	case err != nil:
		return nil, fmt.Errorf("ask pcscd: %w", err)
	}
	return answer, nil
}

// Readers returns the readers. It waits two seconds at most.
func (s *Service) Readers(ctx context.Context) ([]Reader, error) {
	b, err := s.ask(ctx, cmdReadersState, nil, maxReaders*stateSize)
	if err != nil {
		return nil, err
	}
	return parseReaders(b)
}

// Watch returns the readers. It also makes pcscd report the next change of a reader.
// Changed waits for that report. Ask nothing else between Watch and Changed. pcscd may be
// busy with a card, so Watch waits until ctx ends.
func (s *Service) Watch(ctx context.Context) ([]Reader, error) {
	b, err := s.exchange(ctx, cmdWaitChange, nil, maxReaders*stateSize)
	if err != nil {
		return nil, err
	}
	return parseReaders(b)
}

// Changed waits until a reader changes after Watch, and returns nil. Then call Watch
// again. Changed waits until ctx ends, without another limit. After any error, including
// the end of ctx, the connection is unusable.
func (s *Service) Changed(ctx context.Context) error {
	if err := s.conn.SetDeadline(time.Time{}); err != nil {
		return fmt.Errorf("wait for pcscd: %w", err)
	}
	defer context.AfterFunc(ctx, func() { _ = s.conn.SetDeadline(time.Unix(1, 0)) })()
	if _, err := io.ReadFull(s.conn, make([]byte, changeSize)); err != nil {
		return fmt.Errorf("wait for pcscd: %w", err)
	}
	return nil
}

// parseReaders reads the array of READER_STATE (eventhandler.h of pcsc-lite). An unused
// element has an empty name.
func parseReaders(b []byte) ([]Reader, error) {
	if len(b) != maxReaders*stateSize {
		return nil, fmt.Errorf("pcscd tells of its readers in %d bytes, %d are expected", len(b), maxReaders*stateSize)
	}
	var all []Reader
	for ; len(b) > 0; b = b[stateSize:] {
		name, _, ended := bytes.Cut(b[:nameSize], []byte{0})
		switch {
		case len(name) == 0:
			continue
		case !ended || !utf8.Valid(name):
			return nil, errors.New("pcscd tells of a reader whose name makes no sense")
		}
		number := func(i int) uint32 { return binary.NativeEndian.Uint32(b[nameSize+4*i:]) }
		r := Reader{
			Name: string(name), Events: number(0), Card: number(1)&statePresent != 0, Users: int(int32(number(2))),
		}
		if r.Users < Exclusive {
			return nil, errors.New("pcscd tells of a reader with a number of users that makes no sense")
		}
		all = append(all, r)
	}
	return all, nil
}

// Readers connects to pcscd and returns the readers.
func Readers(ctx context.Context, socket string) ([]Reader, error) {
	s, err := Dial(ctx, socket)
	if err != nil {
		return nil, err
	}
	defer s.Close()
	return s.Readers(ctx)
}
