// Package pcsc asks the PC/SC service, pcscd of pcsc-lite, what becomes of its
// readers: whether a card is in, whether somebody uses it, and who that may be.
//
// It never touches a card: pcscd answers from what it knows, and of the
// processes that are connected to it the kernel tells. Every question has an end
// of its own. What cannot be known, because a process belongs to somebody else or
// the service refuses, is said to be unknown, never guessed.
//
// It leaves to others what is on a card, and what to do about who uses it.
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

// DefaultSocket is where pcscd listens when nobody says otherwise.
const DefaultSocket = "/run/pcscd/pcscd.comm"

// Socket returns where a process with this environment looks for pcscd, as
// libpcsclite does.
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

// The language of pcscd, winscard_msg.h of pcsc-lite: numbers are of the
// machine's own byte order and width. It has stayed the same for these commands
// from 1.8.24 on; later versions of it (4:5, 4:6) add others.
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

// A Reader is a reader (a slot of one, where it has several) as pcscd sees it.
type Reader struct {
	Name string
	Card bool // a card is in
	// Users is how many connections with the card there are, or Exclusive.
	Users int
	// Events changes whenever a card is put in or taken out.
	Events uint32
}

var (
	// ErrRefused says that pcscd hung up on us before it said a word, as it does
	// on users that it is not for (polkit, action org.debian.pcsc-lite.access_pcsc).
	ErrRefused = errors.New("it hung up, as it does on users that it is not for")
	// ErrLanguage says that pcscd and we do not understand each other.
	ErrLanguage = errors.New("pcscd and this program do not agree on a language")
)

// Exclusive is the number of users of a reader that one program keeps to itself.
const Exclusive = -1

// A Service is a connection with pcscd. It is used by one goroutine.
type Service struct{ conn net.Conn }

// Dial connects to pcscd. It fails where none runs, or where it does not let
// this user in.
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

// greet agrees on a version: ours, which later ones understand, or else the one
// that the service names.
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

// ask sends a command and reads an answer of n bytes, which have to come soon.
func (s *Service) ask(ctx context.Context, command uint32, body []byte, n int) ([]byte, error) {
	ctx, cancel := context.WithTimeout(ctx, askTimeout)
	defer cancel()
	return s.exchange(ctx, command, body, n)
}

// exchange is ask for as long as ctx lasts.
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

// Readers returns the readers.
func (s *Service) Readers(ctx context.Context) ([]Reader, error) {
	b, err := s.ask(ctx, cmdReadersState, nil, maxReaders*stateSize)
	if err != nil {
		return nil, err
	}
	return parseReaders(b)
}

// Watch returns the readers, and has pcscd tell when something about one of them changes.
// Changed waits for that. Nothing else may be asked in between. Watch waits for as long as
// ctx lasts: pcscd may be busy with a card.
func (s *Service) Watch(ctx context.Context) ([]Reader, error) {
	b, err := s.exchange(ctx, cmdWaitChange, nil, maxReaders*stateSize)
	if err != nil {
		return nil, err
	}
	return parseReaders(b)
}

// Changed returns nil when something has changed since Watch, which is to be called
// again then. It waits without a limit. After an error, such as that ctx has ended, the
// connection is of no use any more.
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

// parseReaders reads the array of READER_STATE, eventhandler.h of pcsc-lite. Of
// unused places the name is empty.
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

// Readers asks for the readers once.
func Readers(ctx context.Context, socket string) ([]Reader, error) {
	s, err := Dial(ctx, socket)
	if err != nil {
		return nil, err
	}
	defer s.Close()
	return s.Readers(ctx)
}
