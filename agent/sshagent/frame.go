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

	"p11-agent/pinentry/secret"
)

const (
	// maxFrame bounds the body of a message, as ssh-agent does.
	maxFrame = 256 << 10
	// bufferSize holds every usual request, with room for some that were sent
	// without waiting for answers.
	bufferSize = 4 << 10
	// patience is how long a client may take to send the rest of a message that
	// it has begun, and to take an answer in. Between messages it has for ever.
	patience = 30 * time.Second
)

// buffers holds buffers of bufferSize bytes, which hold no secret any more.
var buffers = sync.Pool{New: func() any { return new([bufferSize]byte) }}

// frames takes the byte stream of one client apart into messages (RFC 9987
// section 3): uint32 length, then as many bytes, of which the first is the type.
//
// It reads only when it has no whole message left, and then as much as has
// arrived, so that a message usually costs one system call. Its memory grows
// with the bytes that have arrived, not with the length that was announced, and
// shrinks again; a client that sends nothing keeps none. No byte of a message that
// may hold a secret is left behind anywhere once the message is done.
type frames struct {
	nc         net.Conn
	keep       func(n int) error // counts the bytes beyond those of small; nil: nobody does
	kept       int               // of buf
	small      *[bufferSize]byte // buf lies in it, unless it had to grow; nil: there is no buf
	buf        []byte
	start, end int // what has been read and is not done yet
	current    int // length of the message at start, its header included

	raw     syscall.RawConn // nil: nc is no socket
	attempt func(uintptr) bool
	send    func(uintptr) bool
	out     []byte // what send is to send
	n       int    // what attempt has read, or send written
	err     error
}

func newFrames(nc net.Conn) frames {
	f := frames{nc: nc}
	if c, ok := nc.(syscall.Conn); ok {
		f.raw, _ = c.SyscallConn() // of one that is closed there is none, and nothing to read
	}
	return f
}

// next returns the body of the next message, of at least one byte. It is valid
// until done. The error is io.EOF when the client hung up between messages.
func (f *frames) next() ([]byte, error) {
	var deadline bool
	for {
		have, need := f.end-f.start, 4
		if have >= 4 {
			n := binary.BigEndian.Uint32(f.buf[f.start:])
			switch {
			case n == 0:
				return nil, errors.New("message of no length")
			case n > maxFrame:
				return nil, fmt.Errorf("message of %d bytes: the limit is %d", n, maxFrame)
			}
			need += int(n)
			if have >= need {
				if deadline {
					if err := f.nc.SetReadDeadline(time.Time{}); err != nil {
						return nil, err
					}
				}
				f.current = need
				return f.buf[f.start+4 : f.start+need], nil
			}
		}
		if have > 0 && !deadline {
			deadline = true
			if err := f.nc.SetReadDeadline(time.Now().Add(patience)); err != nil {
				return nil, err
			}
		}
		n, err := f.read(need)
		f.end += n
		if n == 0 && err != nil {
			if errors.Is(err, io.EOF) && f.end > f.start {
				return nil, io.ErrUnexpectedEOF
			}
			return nil, err
		}
	}
}

// read reads more of a message of need bytes. For the first of them it waits
// without a buffer, if nc is a socket.
func (f *frames) read(need int) (int, error) {
	if f.end > f.start || f.raw == nil {
		f.take()
		if err := f.makeRoom(need); err != nil {
			return 0, err
		}
		return f.nc.Read(f.buf[f.end:])
	}
	if f.attempt == nil {
		f.attempt = func(fd uintptr) bool {
			f.take()
			if f.n, f.err = transfer(syscall.SYS_READ, fd, f.buf); f.err != syscall.EAGAIN {
				return true
			}
			f.give()
			return false
		}
	}
	if err := f.raw.Read(f.attempt); err != nil {
		return 0, err
	}
	switch {
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
	size := len(b) // for as long as any of it is to be sent
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
		if err := f.keep(size); err != nil {
			return err
		}
		defer func() { _ = f.keep(-size) }()
	}
	_, err := f.nc.Write(b)
	return err
}

// count counts the bytes of a buffer of this size in place of those of buf.
func (f *frames) count(size int) error {
	if f.keep == nil || size == f.kept {
		return nil
	}
	err := f.keep(size - f.kept)
	if err == nil {
		f.kept = size
	}
	return err
}

// take makes sure that there is a buffer.
func (f *frames) take() {
	if f.small == nil {
		f.small = buffers.Get().(*[bufferSize]byte)
		f.buf = f.small[:]
	}
}

// give gives the buffer back, in which nothing is left to be done.
func (f *frames) give() {
	if f.small != nil {
		buffers.Put(f.small)
		f.small, f.buf = nil, nil
	}
}

// done ends the use of the current message and overwrites it when it may hold a
// secret.
func (f *frames) done(wipe bool) {
	if wipe {
		secret.Wipe(f.buf[f.start : f.start+f.current])
	}
	f.start += f.current
	f.current = 0
	if f.start == f.end {
		f.start, f.end = 0, 0
		if len(f.buf) > bufferSize {
			secret.Wipe(f.buf)
			f.buf = f.small[:]
			_ = f.count(0) // fewer are never refused
		}
	}
}

// makeRoom makes sure that there is room to read more of a message of need
// bytes. The error says why the bytes cannot be kept.
func (f *frames) makeRoom(need int) error {
	if f.start+need <= len(f.buf) || f.end < len(f.buf) && need > len(f.buf) {
		return nil
	}
	old, begun := f.buf, f.buf[f.start:f.end]
	if need > len(f.buf) {
		size := min(2*len(f.buf), 4+maxFrame)
		if err := f.count(size); err != nil {
			return err
		}
		f.buf = make([]byte, size)
	}
	n := copy(f.buf, begun)
	if len(f.buf) != len(old) {
		secret.Wipe(old)
	} else {
		secret.Wipe(f.buf[n:f.end])
	}
	f.start, f.end = 0, n
	return nil
}

// close overwrites what is left and gives the memory back. No method may be
// called afterwards.
func (f *frames) close() {
	secret.Wipe(f.buf)
	if f.small != nil {
		secret.Wipe(f.small[:])
	}
	f.give()
}
