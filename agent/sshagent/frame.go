package sshagent

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"sync"
	"syscall"
	"time"

	"p11-agent/agent/door"
	"p11-agent/pinentry/secret"
)

const (
	// maxFrame bounds the body of a message, as ssh-agent does.
	maxFrame = 256 << 10
	// bufferSize holds every usual request.
	bufferSize = 4 << 10
	// patience is how long a client may take to send the rest of a message that
	// it has begun, and to take an answer in. Between messages it has for ever.
	patience = 30 * time.Second
)

// buffers holds buffers of bufferSize bytes. No secret was ever in one of them.
var buffers = sync.Pool{New: func() any { return new([bufferSize]byte) }}

// frames takes the byte stream of one client apart into messages (RFC 9987
// section 3): uint32 length, then as many bytes, of which the first is the type.
//
// It reads length and type first, and then no byte beyond the message. So it knows
// whether the rest may hold a secret before it reads that. What may is read into a
// Secret, and is wiped as soon as the message is done.
//
// Its memory grows with the bytes that have arrived, not with the length that was
// announced. A client that sends nothing keeps no buffer.
type frames struct {
	nc    net.Conn
	holds func(head []byte) (secret bool, more int) // see mayHoldSecret; nil: no message holds a secret

	head  [4 + maxHead]byte
	begun bool // the message has: it must be there whole before patience ends
	timed bool // that is watched

	// buf has what is read of the body, and lies in one of these or in memory of its own.
	buf    []byte
	small  *[bufferSize]byte
	hidden *secret.Secret

	keep func(r door.Resource, n int) error // counts n more bytes, or fewer; nil: nobody does
	kept door.Usage                         // of buf

	raw     syscall.RawConn // nil: nc is no socket
	attempt func(uintptr) bool
	send    func(uintptr) bool
	in      []byte // what attempt is to fill
	waits   bool   // attempt is to wait for something to read
	out     []byte // what send is to send
	n       int    // what attempt has read, or send written
	err     error
}

// newFrames makes a frames that reads from nc. holds is mayHoldSecret, or nil where no
// message holds a secret.
func newFrames(nc net.Conn, holds func(head []byte) (bool, int)) frames {
	f := frames{nc: nc, holds: holds}
	if c, ok := nc.(syscall.Conn); ok {
		f.raw, _ = c.SyscallConn() // of one that is closed there is none, and nothing to read
	}
	return f
}

// next returns the body of the next message, of at least one byte. It is valid
// until done. The error is io.EOF when the client hung up between messages.
func (f *frames) next() ([]byte, error) {
	got, err := f.fill(f.head[:4+1], 4)
	if err != nil {
		return nil, err
	}
	n := binary.BigEndian.Uint32(f.head[:])
	switch {
	case n == 0:
		return nil, errors.New("message of no length")
	case n > maxFrame:
		return nil, fmt.Errorf("message of %d bytes: the limit is %d", n, maxFrame)
	}
	if _, err := f.fill(f.head[got:4+1], 4+1-got); err != nil {
		return nil, err
	}
	have, hides, err := f.look(int(n))
	if err == nil {
		err = f.body(have, int(n), hides)
	}
	if err != nil {
		return nil, err
	}
	f.begun = false
	if f.timed {
		f.timed = false
		if err := f.nc.SetReadDeadline(time.Time{}); err != nil {
			return nil, err
		}
	}
	return f.buf, nil
}

// look reads as much of a message of n bytes as it takes to tell whether the rest may
// hold a secret. The first have bytes of the body are in f.head.
func (f *frames) look(n int) (have int, hides bool, err error) {
	have = 1
	if f.holds == nil {
		return have, false, nil
	}
	for {
		hides, more := f.holds(f.head[4 : 4+have])
		if more = min(more, n-have, maxHead-have); more <= 0 {
			return have, hides, nil
		}
		if _, err := f.fill(f.head[4+have:4+have+more], more); err != nil {
			return have, false, err
		}
		have += more
	}
}

// body reads the rest of a message of n bytes, of which f.head has the first.
func (f *frames) body(have, n int, hides bool) error {
	if err := f.grow(min(n, bufferSize), hides); err != nil {
		return err
	}
	have = copy(f.buf, f.head[4:4+have])
	for {
		if _, err := f.fill(f.buf[have:], len(f.buf)-have); err != nil {
			return err
		}
		if have = len(f.buf); have == n {
			return nil
		}
		if err := f.grow(min(2*have, n), hides); err != nil {
			return err
		}
	}
}

// grow gives buf a size. What was in it stays.
func (f *frames) grow(size int, hides bool) error {
	var kept door.Usage
	switch {
	case hides:
		kept[door.Locked] = door.LockedSize(size)
	case size > bufferSize:
		kept[door.Memory] = size
	}
	if err := f.count(kept); err != nil {
		return err
	}
	old, hidden := f.buf, f.hidden
	switch {
	case hides:
		s, err := secret.New(size)
		if err != nil {
			return err
		}
		f.hidden, f.buf = s, s.Buffer()
	case size <= bufferSize:
		f.small = buffers.Get().(*[bufferSize]byte)
		f.buf = f.small[:size]
	default:
		f.buf = make([]byte, size)
	}
	copy(f.buf, old)
	hidden.Wipe()
	return nil
}

// fill reads into b until at least so many bytes are there, and tells how many are.
func (f *frames) fill(b []byte, least int) (have int, err error) {
	for have < least {
		n, err := f.read(b[have:])
		switch {
		case n > 0:
			f.begun = true
			have += n
		case err == syscall.EAGAIN: // the rest of the message is not there yet
			f.timed = true
			if err := f.nc.SetReadDeadline(time.Now().Add(patience)); err != nil {
				return have, err
			}
		case errors.Is(err, io.EOF) && f.begun:
			return have, io.ErrUnexpectedEOF
		case err != nil:
			return have, err
		}
	}
	return have, nil
}

// read reads what there is, at least one byte. It waits for the first byte of a
// message, and for the others when that is timed; otherwise it fails with EAGAIN.
func (f *frames) read(b []byte) (int, error) {
	f.waits = !f.begun || f.timed
	if f.raw == nil {
		if !f.waits {
			return 0, syscall.EAGAIN
		}
		return f.nc.Read(b)
	}
	if f.attempt == nil {
		f.attempt = func(fd uintptr) bool {
			f.n, f.err = transfer(syscall.SYS_READ, fd, f.in)
			return f.err != syscall.EAGAIN || !f.waits
		}
	}
	f.in = b
	err := f.raw.Read(f.attempt)
	f.in = nil
	switch {
	case err != nil:
		return 0, err
	case f.err != nil:
		return 0, f.err
	case f.n == 0:
		return 0, io.EOF
	}
	return f.n, nil
}

// write sends b, in one system call if the client has room for it, or waits until it
// has taken it, for so long.
func (f *frames) write(b []byte, patience time.Duration) error {
	size := len(b) // which stay until the client has taken the last one
	if f.raw != nil {
		if f.send == nil {
			f.send = func(fd uintptr) bool {
				f.n, f.err = transfer(syscall.SYS_WRITE, fd, f.out)
				return true
			}
		}
		f.out = b
		err := f.raw.Write(f.send)
		f.out = nil
		switch {
		case err != nil:
			return err
		case f.err != nil && f.err != syscall.EAGAIN:
			return f.err
		}
		if b = b[f.n:]; len(b) == 0 {
			return nil
		}
	}
	if err := f.nc.SetWriteDeadline(time.Now().Add(patience)); err != nil {
		return err
	}
	if f.keep != nil && size > bufferSize {
		if err := f.keep(door.Memory, size); err != nil {
			return err
		}
		defer func() { _ = f.keep(door.Memory, -size) }()
	}
	_, err := f.nc.Write(b)
	return err
}

// count counts these bytes for buf, in place of those before.
func (f *frames) count(now door.Usage) error {
	if f.keep == nil {
		return nil
	}
	for r := range now {
		if n := now[r] - f.kept[r]; n != 0 {
			if err := f.keep(door.Resource(r), n); err != nil {
				return err
			}
			f.kept[r] = now[r]
		}
	}
	return nil
}

// done ends the use of the current message: its memory is given back, wiped if it may
// hold a secret.
func (f *frames) done() {
	f.hidden.Wipe()
	if f.small != nil {
		buffers.Put(f.small)
	}
	_ = f.count(door.Usage{}) // fewer are never refused
	f.buf, f.hidden, f.small = nil, nil, nil
}

// close gives back the memory of a message that has begun. No method may be called
// afterwards.
func (f *frames) close() { f.done() }
