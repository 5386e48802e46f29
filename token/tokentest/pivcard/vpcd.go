package pivcard

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"sync"
	"time"

	"golang.org/x/sys/unix"
)

// vpcd's control messages, which are one byte long.
const (
	controlOff   = 0
	controlOn    = 1
	controlReset = 2
	controlATR   = 4
)

// redial is how long is waited before pcscd is called again that does not run.
const redial = 20 * time.Millisecond

var (
	errDropped = errors.New("the contact is lost")
	errEjected = errors.New("the card is taken out")
)

// Serve is the card's side of a connection with vpcd, until that ends or ctx.
// Each message has its length before it, in two bytes. What is one byte long
// controls the contacts; only the question for the ATR is answered. Everything
// else is a command.
//
// A connection is a card in the reader: vpcd asks for the ATR each time pcscd
// looks whether the card is there.
func (c *Card) Serve(ctx context.Context, conn net.Conn) error {
	return c.serve(ctx, conn, func() bool { return false })
}

// serve is Serve until the ATR is asked for and leaves says that the card is gone.
func (c *Card) serve(ctx context.Context, conn net.Conn, leaves func() bool) error {
	defer c.PowerOff()
	in := make([]byte, 2+maxMessage)
	for {
		quickAck(conn)
		if _, err := io.ReadFull(conn, in[:2]); err != nil {
			return err
		}
		quickAck(conn)
		message := in[2 : 2+int(binary.BigEndian.Uint16(in))]
		if _, err := io.ReadFull(conn, message); err != nil {
			return err
		}
		var answer []byte
		switch {
		case len(message) == 0:
			continue // vpcd sends none
		case len(message) > 1:
			if answer = c.Transmit(ctx, message); answer == nil {
				return errDropped
			}
		case message[0] == controlATR:
			if leaves() {
				return errEjected
			}
			answer = c.ATR()
		case message[0] == controlOn:
			c.PowerOn()
		case message[0] == controlOff:
			c.PowerOff()
		case message[0] == controlReset:
			c.Reset()
		default:
			return fmt.Errorf("control message %#02x is unknown", message[0])
		}
		if ctx.Err() != nil {
			return ctx.Err() // pulled: not one byte more
		}
		if len(answer) > 0 {
			b := append(binary.BigEndian.AppendUint16(nil, uint16(len(answer))), answer...)
			if _, err := conn.Write(b); err != nil {
				return err
			}
		}
	}
}

// quickAck has the kernel acknowledge at once. vpcd 3.3 sends length and message
// apart, the message not before the length is acknowledged (Nagle's algorithm),
// and that may take 40 ms. The kernel forgets the wish after a while.
func quickAck(conn net.Conn) {
	tcp, ok := conn.(*net.TCPConn)
	if !ok {
		return
	}
	raw, err := tcp.SyscallConn()
	if err != nil {
		return
	}
	_ = raw.Control(func(fd uintptr) { // slower without
		_ = unix.SetsockoptInt(int(fd), unix.IPPROTO_TCP, unix.TCP_QUICKACK, 1)
	})
}

// A Slot is a slot of a virtual reader. Insert and Remove return at once; pcscd
// looks each 0.4 s. It notices each removal, even when a card follows at once.
// A card that is in stays in when pcscd is restarted.
type Slot struct {
	addr string

	mu   sync.Mutex
	card *Card
	pull context.CancelFunc // takes the card out
	conn net.Conn           // the card's
	done chan struct{}      // closed when the last goroutine has ended
	used bool               // a connection was made
	out  bool               // the card goes when vpcd asks for it next
}

// NewSlot returns the slot at an address where vpcd listens, or will.
func NewSlot(addr string) *Slot {
	done := make(chan struct{})
	close(done)
	return &Slot{addr: addr, done: done}
}

// Addr returns the address that NewSlot was given.
func (s *Slot) Addr() string { return s.addr }

// Insert puts a card in. A card that is in is taken out before.
func (s *Slot) Insert(c *Card) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.removeLocked()
	ctx, cancel := context.WithCancel(context.Background())
	before, done := s.done, make(chan struct{})
	s.card, s.pull, s.done, s.out = c, cancel, done, false
	go func() {
		defer close(done)
		<-before
		for ctx.Err() == nil {
			s.connect(ctx, c)
		}
	}()
}

// Remove takes the card out, also in the middle of a command: nothing is
// answered after it.
func (s *Slot) Remove() {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.removeLocked()
}

// Eject takes the card out when vpcd asks next whether it is there, and waits for
// that: so no command meets a card that has gone and is not known to. When ctx
// ends first, it is taken out all the same.
func (s *Slot) Eject(ctx context.Context) {
	s.mu.Lock()
	s.out = true
	done := s.done
	s.mu.Unlock()
	select {
	case <-done:
	case <-ctx.Done():
	}
	s.Remove()
}

// leaves tells whether the card goes now. Then it does not come back by itself.
func (s *Slot) leaves() bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.out && s.pull != nil {
		s.pull()
	}
	return s.out
}

func (s *Slot) removeLocked() {
	if s.pull == nil {
		return
	}
	s.pull()
	if s.conn != nil {
		_ = s.conn.Close()
	}
	s.card, s.pull, s.conn = nil, nil, nil
}

// Card returns the card that is in, or nil.
func (s *Slot) Card() *Card {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.card
}

// Close takes the card out and waits until nothing is left running.
func (s *Slot) Close() {
	s.Remove()
	s.mu.Lock()
	done := s.done
	s.mu.Unlock()
	<-done
}

// connect makes a connection and serves it until it ends.
//
// vpcd tells pcscd that the card is gone only when it looks and finds no
// connection that lives. Should the old one end by a command and the new one
// wait already, pcscd would never know. So after each connection comes one that
// is a card that does not answer: pcscd looks, and the reader is empty.
func (s *Slot) connect(ctx context.Context, c *Card) {
	s.mu.Lock()
	used := s.used
	s.mu.Unlock()
	if used && !s.seenEmpty(ctx) {
		return
	}
	conn, err := s.dial(ctx)
	if err != nil {
		return
	}
	_ = c.serve(ctx, conn, s.leaves) // it ends in many ways, and each is a card that is gone
	_ = conn.Close()
}

// seenEmpty shows the empty slot until pcscd has looked twice, with more than the time
// between two looks in between. One look may be that of a client: then pcscd itself has
// not noticed, and takes the next card for the one before.
func (s *Slot) seenEmpty(ctx context.Context) bool {
	const betweenLooks = 450 * time.Millisecond // pcscd looks each 0.4 s
	var first time.Time
	for {
		err := s.showEmpty(ctx)
		switch {
		case ctx.Err() != nil:
			return false
		case err != nil:
		case first.IsZero():
			first = time.Now()
		case time.Since(first) >= betweenLooks:
			return true
		}
	}
}

// errNotLooked is why an empty slot was shown in vain.
var errNotLooked = errors.New("pcscd has not looked whether there is a card")

// showEmpty is a card that does not answer, once. It fails when pcscd has asked for
// something else than the ATR: then a client of pcscd has met the empty slot, and pcscd
// itself has not noticed. pcscd 1.9.9 takes a card whose reset fails for gone, and does
// not see it again before it has looked at the empty slot.
func (s *Slot) showEmpty(ctx context.Context) error {
	conn, err := s.dial(ctx)
	if err != nil {
		return err
	}
	defer conn.Close()
	if err := conn.(*net.TCPConn).CloseWrite(); err != nil {
		return err
	}
	asked, err := io.ReadAll(io.LimitReader(conn, maxMessage)) // until vpcd hangs up
	switch {
	case err != nil:
		return err
	case !bytes.HasPrefix(asked, []byte{0, 1, controlATR}):
		return errNotLooked
	}
	return ctx.Err()
}

// WaitEmpty waits, after Remove, until pcscd has looked and found no card, or
// until ctx ends.
func (s *Slot) WaitEmpty(ctx context.Context) error {
	s.mu.Lock()
	done := s.done
	s.mu.Unlock()
	select {
	case <-done:
	case <-ctx.Done():
	}
	for {
		err := s.showEmpty(ctx)
		if err == nil || ctx.Err() != nil {
			return err
		}
	}
}

// dial calls vpcd, and leaves the connection where Remove finds it.
func (s *Slot) dial(ctx context.Context) (net.Conn, error) {
	var d net.Dialer
	conn, err := d.DialContext(ctx, "tcp", s.addr)
	if err != nil {
		timer := time.NewTimer(redial)
		defer timer.Stop()
		select {
		case <-timer.C:
		case <-ctx.Done():
		}
		return nil, err
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if ctx.Err() != nil {
		_ = conn.Close()
		return nil, ctx.Err()
	}
	s.conn, s.used = conn, true
	return conn, nil
}
