package sshagent

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"sync"
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
// shrinks again. No byte of a message that may hold a secret is left behind
// anywhere once the message is done.
type frames struct {
	nc         net.Conn
	small      *[bufferSize]byte // buf lies in it, unless it had to grow
	buf        []byte
	start, end int // what has been read and is not done yet
	current    int // length of the message at start, its header included
}

func newFrames(nc net.Conn) frames {
	small := buffers.Get().(*[bufferSize]byte)
	return frames{nc: nc, small: small, buf: small[:]}
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
		f.makeRoom(need)
		n, err := f.nc.Read(f.buf[f.end:])
		f.end += n
		if n == 0 && err != nil {
			if errors.Is(err, io.EOF) && f.end > f.start {
				return nil, io.ErrUnexpectedEOF
			}
			return nil, err
		}
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
		}
	}
}

// makeRoom makes sure that there is room to read more of a message of need
// bytes.
func (f *frames) makeRoom(need int) {
	if f.start+need <= len(f.buf) || f.end < len(f.buf) && need > len(f.buf) {
		return
	}
	old, begun := f.buf, f.buf[f.start:f.end]
	if need > len(f.buf) {
		f.buf = make([]byte, min(2*len(f.buf), 4+maxFrame))
	}
	n := copy(f.buf, begun)
	if len(f.buf) != len(old) {
		secret.Wipe(old)
	} else {
		secret.Wipe(f.buf[n:f.end])
	}
	f.start, f.end = 0, n
}

// close overwrites what is left and gives the memory back. No method may be
// called afterwards.
func (f *frames) close() {
	secret.Wipe(f.buf)
	secret.Wipe(f.small[:])
	buffers.Put(f.small)
	f.small, f.buf = nil, nil
}
