package sshagent

import (
	"encoding/binary"
	"errors"
	"fmt"
	"net"
	"sync"

	"p11-agent/agent/door"
	"p11-agent/pinentry/secret"
)

const (
	// maxFrame bounds the body of a message, as ssh-agent does.
	maxFrame = 256 << 10
	// bufferSize holds every usual request.
	bufferSize = 4 << 10
)

// buffers holds buffers of bufferSize bytes. None of them ever held a secret.
var buffers = sync.Pool{New: func() any { return new([bufferSize]byte) }}

// frames takes the byte stream of one client apart into messages (RFC 9987 section 3): a uint32
// length, and then as many bytes. The first of these bytes is the type.
//
// frames reads length and type first, and never a byte beyond the message. So it knows whether the
// rest may hold a secret before it reads the rest. It reads a message that may hold a secret into a
// Secret, and wipes the Secret at the end of the message.
//
// Memory grows with the bytes that have arrived, not with the announced length. A client that sends
// nothing keeps no buffer.
type frames struct {
	stream door.Stream
	holds  func(head []byte) (secret bool, more int) // see mayHoldSecret; nil: no message holds a secret

	head [4 + maxHead]byte

	// buf is what was read of the body. It is in small, in hidden, or in memory of its own.
	buf    []byte
	small  *[bufferSize]byte
	hidden *secret.Secret

	keep func(r door.Resource, n int) error // counts n more bytes, or fewer; nil: nothing is counted
	kept door.Usage                         // of buf
}

// newFrames returns frames that reads from nc. holds is mayHoldSecret, or nil if no message holds a
// secret.
func newFrames(nc net.Conn, holds func(head []byte) (bool, int)) frames {
	return frames{stream: door.NewStream(nc), holds: holds}
}

// next returns the body of the next message, of at least one byte. It is valid
// until done. The error is io.EOF when the client hung up between messages.
func (f *frames) next() ([]byte, error) {
	got, err := f.stream.Fill(f.head[:4+1], 4)
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
	if _, err := f.stream.Fill(f.head[got:4+1], 4+1-got); err != nil {
		return nil, err
	}
	have, hides, err := f.look(int(n))
	if err == nil {
		err = f.body(have, int(n), hides)
	}
	if err != nil {
		return nil, err
	}
	if err := f.stream.Whole(); err != nil {
		return nil, err
	}
	return f.buf, nil
}

// look reads as much of a message of n bytes as f.holds needs. f.head has the first bytes of the
// body; have counts them.
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
		if _, err := f.stream.Fill(f.head[4+have:4+have+more], more); err != nil {
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
		if _, err := f.stream.Fill(f.buf[have:], len(f.buf)-have); err != nil {
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

// grow gives buf another size, and keeps what was in it.
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

// count counts now as the memory of buf, in place of the memory before.
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

// done gives the memory of the current message back. It wipes memory that may hold a secret.
func (f *frames) done() {
	f.hidden.Wipe()
	if f.small != nil {
		buffers.Put(f.small)
	}
	_ = f.count(door.Usage{}) // fewer are never refused
	f.buf, f.hidden, f.small = nil, nil, nil
}

// close gives the memory of a message back that has begun. No method may be called afterwards.
func (f *frames) close() { f.done() }
