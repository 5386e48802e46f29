package wire

import (
	"cmp"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"reflect"
	"sync"
	"syscall"

	"golang.org/x/sys/unix"

	"p11-agent/pinentry/secret"
)

const (
	lengthSize = 4
	headerSize = lengthSize + 1 + 4 // plus type and id

	// keepBuffer is the largest buffer that a writer keeps between messages, in bytes.
	keepBuffer = 64 << 10
	// readBuffer has room for nearly every frame. A longer body, such as one with a long
	// list of objects, goes straight into its own memory.
	readBuffer = 16 << 10
)

// A Frame is an answer or an event from the module process.
type Frame struct {
	Type Type   // TypeReply, TypeError, TypeEvent or TypeLost
	ID   uint32 // of the request that this answers; 0 for a message without a request
	Body []byte // the receiver may keep it
}

// Decode reads the answer, or a part of it, into reply. reply must be of the kind that
// belongs to the request. If the request failed, Decode returns the *Error in the frame.
// Decode wipes the frame of an OperateReply.
func (f Frame) Decode(reply Message) error {
	switch f.Type {
	case TypeReply, TypePart:
		if _, ok := reply.(*OperateReply); ok {
			defer f.Wipe()
		}
		return Unmarshal(f.Body, reply)
	case TypeError, TypeLost:
		e := new(Error)
		if err := Unmarshal(f.Body, e); err != nil {
			return err
		}
		return e
	default:
		return fmt.Errorf("frame of type %d is no answer", f.Type)
	}
}

// Wipe overwrites the body, which may hold a secret.
func (f Frame) Wipe() { clear(f.Body) }

// A Conn is the agent's end of the connection with a module process. One goroutine reads;
// any number of goroutines write. After an error of reading or writing, close the
// connection: it is unusable. Only a request that WriteRequest refuses to send leaves it
// usable.
type Conn struct {
	c net.Conn
	r reader
	w writer
}

// NewConn returns the agent's end on c. The Conn owns c.
func NewConn(c net.Conn) *Conn {
	return &Conn{c: c, r: reader{c: c, buf: make([]byte, readBuffer)}, w: writer{c: c}}
}

// WriteRequest sends a request in one system call. The kernel takes a PIN from the PIN's
// own memory. The caller keeps the PIN, and must not wipe it before WriteRequest returns.
// If the module process does not read, WriteRequest blocks until Close.
//
// WriteRequest returns an error and sends nothing if the request is longer than
// MaxRequest, has id 0 or has the wrong type.
func (c *Conn) WriteRequest(id uint32, t Type, msg Message) error {
	if id == 0 {
		return errors.New("request 0: the number is for events")
	}
	empty, ok := requests[t]
	if !ok || reflect.TypeOf(empty()) != reflect.TypeOf(msg) {
		return fmt.Errorf("%T is no request of type %d", msg, t)
	}
	return c.w.write(id, t, msg, MaxRequest)
}

// ReadFrame reads the next answer or event. It returns io.EOF when the module process has
// gone, at any point of a frame. It returns another error when a message is malformed.
func (c *Conn) ReadFrame() (Frame, error) {
	var h [headerSize]byte
	if err := c.r.fill(h[:]); err != nil {
		return Frame{}, gone(err)
	}
	t, id, n, err := parseHeader(h[:], MaxReply)
	if err != nil {
		return Frame{}, err
	}
	switch t {
	case TypeReply, TypeError, TypePart:
		if id == 0 {
			return Frame{}, errors.New("answer to no request")
		}
	case TypeEvent:
		if id != 0 {
			return Frame{}, errors.New("event with a number")
		}
	case TypeLost:
		if id != 0 {
			return Frame{}, errors.New("end of use with a number")
		}
	default:
		return Frame{}, fmt.Errorf("unknown type %d of answer", t)
	}
	f := Frame{Type: t, ID: id, Body: make([]byte, n)}
	if err := c.r.fill(f.Body); err != nil {
		return Frame{}, gone(err)
	}
	if t == TypeEvent {
		if _, err := f.Event(); err != nil {
			return Frame{}, err
		}
	}
	return f, nil
}

// A reader reads from the module process through a buffer. It overwrites in the buffer what it
// has passed on: an answer may hold a secret.
type reader struct {
	c        net.Conn
	buf      []byte
	from, to int // buf[from:to] is not passed on yet
}

// fill reads until b is full.
func (r *reader) fill(b []byte) error {
	for {
		ready := r.buf[r.from:r.to]
		n := copy(b, ready)
		clear(ready[:n])
		r.from += n
		if b = b[n:]; len(b) == 0 {
			return nil
		}
		if len(b) >= len(r.buf) { // a long body goes straight into its own memory
			_, err := io.ReadFull(r.c, b)
			return err
		}
		n, err := r.c.Read(r.buf)
		if r.from, r.to = 0, n; n == 0 {
			return cmp.Or(err, io.ErrNoProgress)
		}
	}
}

// Event decodes a frame of TypeEvent.
func (f Frame) Event() (e Event, err error) {
	if len(f.Body) > 0 {
		err = Unmarshal(f.Body, &e)
	}
	return e, err
}

// Close closes the connection. Reads and writes under way return an error. Any goroutine
// may call Close at any time and more than once.
func (c *Conn) Close() error { return c.c.Close() }

// A Request is a request that the module process has received.
type Request struct {
	ID      uint32
	Type    Type
	Message Message // the receiver wipes a PIN in it
}

// A ModuleConn is the module process's end of the connection. One goroutine reads; any
// number of goroutines write.
type ModuleConn struct {
	c net.Conn
	w writer

	// Any frame may hold a PIN. So the ModuleConn reads frames into a Secret, and
	// overwrites each frame as soon as it is decoded. buf.Buffer()[from:to] is not
	// decoded yet; the rest is zero. buf is nil while there is nothing to decode: see
	// package secret.
	buf      *secret.Secret
	from, to int
}

// NewModuleConn returns the module process's end on c. The ModuleConn owns c.
func NewModuleConn(c net.Conn) *ModuleConn {
	return &ModuleConn{c: c, w: writer{c: c}}
}

// ReadRequest reads the next request. It returns io.EOF when the agent has gone, at any
// point of a frame. It returns another error when a message is malformed. After an error
// the connection is unusable.
func (c *ModuleConn) ReadRequest() (Request, error) {
	h, err := c.fill(headerSize)
	if err != nil {
		return Request{}, err
	}
	t, id, n, err := parseHeader(h, MaxRequest)
	if err != nil {
		return Request{}, err
	}
	empty, ok := requests[t]
	if !ok {
		return Request{}, fmt.Errorf("unknown type %d of request", t)
	}
	if id == 0 {
		return Request{}, errors.New("request without a number")
	}
	c.skip(headerSize)
	r := Request{ID: id, Type: t, Message: empty()}
	if n > readBuffer {
		return r, c.readLarge(n, r.Message)
	}
	body, err := c.fill(n)
	if err != nil {
		return Request{}, err
	}
	defer c.skip(n)
	return r, Unmarshal(body, r.Message)
}

// readLarge reads a body that does not fit into the buffer.
func (c *ModuleConn) readLarge(n int, msg Message) error {
	s, err := secret.New(n)
	if err != nil {
		return err
	}
	defer s.Wipe()
	body := s.Buffer()
	have := copy(body, c.buf.Buffer()[c.from:c.to])
	c.skip(have)
	if _, err := io.ReadFull(c.c, body[have:]); err != nil {
		return gone(err)
	}
	return Unmarshal(body, msg)
}

// fill returns the next n bytes. They stay valid until skip. n is at most readBuffer.
func (c *ModuleConn) fill(n int) ([]byte, error) {
	if n == 0 {
		return nil, nil // no further byte may come
	}
	if c.buf == nil {
		if err := c.wait(); err != nil {
			return nil, gone(err)
		}
		var err error
		if c.buf, err = secret.New(readBuffer); err != nil {
			return nil, err
		}
	}
	b := c.buf.Buffer()
	if c.from+n > len(b) {
		end := copy(b, b[c.from:c.to])
		secret.Wipe(b[end:c.to])
		c.from, c.to = 0, end
	}
	if c.to-c.from < n {
		m, err := io.ReadAtLeast(c.c, b[c.to:], n-(c.to-c.from))
		c.to += m
		if err != nil {
			return nil, gone(err)
		}
	}
	return b[c.from : c.from+n], nil
}

// skip overwrites the next n bytes after their use.
func (c *ModuleConn) skip(n int) {
	secret.Wipe(c.buf.Buffer()[c.from : c.from+n])
	c.from += n
	if c.from == c.to {
		c.drop()
	}
}

// drop gives the buffer back.
func (c *ModuleConn) drop() {
	c.buf.Wipe()
	c.buf, c.from, c.to = nil, 0, 0
}

// wait returns when there are bytes to read, or at the end of the stream. It reads
// nothing.
func (c *ModuleConn) wait() error {
	s, ok := c.c.(syscall.Conn)
	if !ok {
		return nil // a read waits as well
	}
	raw, err := s.SyscallConn()
	if err != nil {
		return err
	}
	var first [1]byte // of the length of a frame
	return raw.Read(func(fd uintptr) bool {
		_, _, err := unix.Recvfrom(int(fd), first[:], unix.MSG_PEEK|unix.MSG_DONTWAIT)
		return err != unix.EAGAIN
	})
}

// WriteReply answers a request in one system call. If the reply is longer than MaxReply,
// WriteReply returns an error and sends nothing.
func (c *ModuleConn) WriteReply(id uint32, reply Message) error {
	return c.w.write(id, TypeReply, reply, MaxReply)
}

// WritePart sends a part of the answer to a request. If the part is longer than MaxReply,
// WritePart returns an error and sends nothing.
func (c *ModuleConn) WritePart(id uint32, part *ObjectsPart) error {
	return c.w.write(id, TypePart, part, MaxReply)
}

// WriteError tells the agent that a request has failed.
func (c *ModuleConn) WriteError(id uint32, e *Error) error {
	return c.w.write(id, TypeError, e, MaxReply)
}

// WriteEvent tells the agent that slots or tokens have changed, and which slots have lost
// their token.
func (c *ModuleConn) WriteEvent(gone ...SlotID) error {
	if len(gone) == 0 {
		return c.w.write(0, TypeEvent, nil, 0)
	}
	return c.w.write(0, TypeEvent, &Event{Gone: gone}, MaxReply)
}

// WriteLost tells the agent that the module is of no further use, and why.
func (c *ModuleConn) WriteLost(e *Error) error {
	return c.w.write(0, TypeLost, e, MaxReply)
}

// Close closes the connection and overwrites the bytes that are not decoded yet. Only the
// goroutine that reads may call it.
func (c *ModuleConn) Close() error {
	c.drop()
	return c.c.Close()
}

// A writer sends whole frames.
type writer struct {
	c net.Conn

	mu  sync.Mutex
	buf []byte
	err error // the first error: the writer may have sent half a frame
}

func (w *writer) write(id uint32, t Type, msg Message, limit int) error {
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.err != nil {
		return w.err
	}
	b := append(w.buf[:0], make([]byte, headerSize)...)
	var pin *secret.Secret
	if msg != nil {
		b, pin = marshal(b, msg)
	}
	if cap(b) <= keepBuffer {
		w.buf = b
	}
	n := len(b) - headerSize + pin.Len()
	if n > limit {
		return fmt.Errorf("%T of %d bytes: the limit is %d", msg, n, limit)
	}
	if pin.Len() > MaxPIN {
		return fmt.Errorf("PIN of %d bytes: the limit is %d", pin.Len(), MaxPIN)
	}
	binary.BigEndian.PutUint32(b, uint32(n+headerSize-lengthSize))
	b[lengthSize] = byte(t)
	binary.BigEndian.PutUint32(b[lengthSize+1:], id)
	if pin.Len() == 0 {
		_, w.err = w.c.Write(b)
	} else {
		// This is one writev. The kernel takes the PIN from its own memory.
		_, w.err = (&net.Buffers{b, pin.Bytes()}).WriteTo(w.c)
	}
	if _, ok := msg.(*OperateReply); ok {
		clear(b) // the result may be a secret
	}
	return w.err
}

// parseHeader returns the type, the id and the length of the body.
func parseHeader(h []byte, limit int) (t Type, id uint32, n int, err error) {
	const least = headerSize - lengthSize
	length := binary.BigEndian.Uint32(h)
	if length < least || length > uint32(limit+least) {
		return 0, 0, 0, fmt.Errorf("frame of %d bytes: the limits are %d and %d", length, least, limit+least)
	}
	return Type(h[lengthSize]), binary.BigEndian.Uint32(h[lengthSize+1:]), int(length - least), nil
}

// gone returns io.EOF for each error that shows the end of the other side. It does not
// matter at which byte the other side ended, or whether it left bytes unread.
func gone(err error) error {
	if errors.Is(err, io.EOF) || errors.Is(err, io.ErrUnexpectedEOF) || errors.Is(err, syscall.ECONNRESET) {
		return io.EOF
	}
	return err
}
