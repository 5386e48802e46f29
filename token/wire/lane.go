package wire

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"syscall"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"
)

// A lane is an additional socket pair between the agent and a module process. It carries
// the operations of one token, one at a time. The goroutine that asks for an operation
// reads the answer, and a thread of the module process serves only this lane. So neither
// end wakes another thread to hand a message over. Such a wake-up takes as long as a fast
// token needs for a signature. One packet is one frame. No PIN crosses on a lane.

const (
	// LanesFD is the file descriptor number of the socket that opens lanes.
	LanesFD = 4
	// MaxLanes is the most lanes of one token. So it is the most operations that the
	// agent asks a token for at once.
	MaxLanes = 64
	// MaxLaneFrame bounds the bytes of a frame on a lane. A longer frame takes the Conn.
	MaxLaneFrame = 16 << 10
	// lanePatience is how long a module process may take to accept a lane.
	lanePatience = 5 * time.Second
)

// ErrTooLong is the error for a request that does not fit into a lane. Send has sent
// nothing of the request.
var ErrTooLong = errors.New("the request is too long for a lane")

// Lanes opens lanes to a module process. Any goroutine may call its methods.
type Lanes struct{ c *net.UnixConn }

// NewLanes returns the agent's end on the socket c (SOCK_SEQPACKET). The Lanes owns c.
// The other end is LanesFD in the module process.
func NewLanes(c *net.UnixConn) *Lanes { return &Lanes{c} }

// Open opens a lane for the operations of a token.
func (l *Lanes) Open(token TokenID) (*Lane, error) {
	fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_SEQPACKET|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return nil, fmt.Errorf("connect a module process: %w", err)
	}
	ours, theirs := os.NewFile(uintptr(fds[0]), "lane"), os.NewFile(uintptr(fds[1]), "module's lane")
	defer theirs.Close()
	c, err := net.FileConn(ours)
	_ = ours.Close()
	if err != nil {
		return nil, fmt.Errorf("connect a module process: %w", err)
	}
	lane, err := newLane(c.(*net.UnixConn))
	if err != nil {
		return nil, errors.Join(err, c.Close())
	}
	body, _ := marshal(nil, &Token{Token: token})
	if err := l.c.SetWriteDeadline(time.Now().Add(lanePatience)); err != nil {
		return nil, errors.Join(err, c.Close())
	}
	if _, _, err := l.c.WriteMsgUnix(body, unix.UnixRights(int(theirs.Fd())), nil); err != nil {
		return nil, errors.Join(fmt.Errorf("connect a module process: %w", err), c.Close())
	}
	return lane, nil
}

// Close ends the opening of lanes. Open lanes stay open.
func (l *Lanes) Close() error { return l.c.Close() }

// A Lane is the agent's end of a lane. One goroutine at a time may use it. Any goroutine
// may call Interrupt and Close at any time.
type Lane struct {
	c   *net.UnixConn
	raw syscall.RawConn
	buf []byte
	id  uint32 // of the request under way

	// These fields pass values to and from the functions below. The functions are made
	// once: a new function for each call would take new memory.
	out      []byte
	n        int
	errno    syscall.Errno
	patience unix.Timespec
	ready    bool

	write, read func(fd uintptr) (done bool)
	poll        func(fd uintptr)
}

// newLane makes a lane from a socket. Its system calls do not block, so newLane uses raw
// system calls that the scheduler does not see. For a system call that it sees, the
// scheduler would wake a thread each time to look after blocked calls. ppoll may wait,
// for patience at most, and keeps its thread meanwhile.
func newLane(c *net.UnixConn) (*Lane, error) {
	raw, err := c.SyscallConn()
	if err != nil {
		return nil, err
	}
	l := &Lane{c: c, raw: raw, buf: make([]byte, MaxLaneFrame)}
	l.write = func(fd uintptr) bool {
		l.n, l.errno = call(unix.SYS_WRITE, fd, l.out)
		return l.errno != unix.EAGAIN
	}
	l.read = func(fd uintptr) bool {
		l.n, l.errno = call(unix.SYS_READ, fd, l.buf)
		return l.errno != unix.EAGAIN
	}
	l.poll = func(fd uintptr) {
		fds := unix.PollFd{Fd: int32(fd), Events: unix.POLLIN}
		n, _, errno := unix.RawSyscall6(unix.SYS_PPOLL, uintptr(unsafe.Pointer(&fds)), 1, uintptr(unsafe.Pointer(&l.patience)), 0, 0, 0)
		l.ready = errno == 0 && n > 0
	}
	return l, nil
}

// call reads into b or writes b. b is not empty.
func call(trap, fd uintptr, b []byte) (int, syscall.Errno) {
	for {
		n, _, errno := unix.RawSyscall(trap, fd, uintptr(unsafe.Pointer(&b[0])), uintptr(len(b)))
		if errno != unix.EINTR {
			return int(n), errno
		}
	}
}

// Send asks for an operation, in one system call. After an error other than ErrTooLong,
// the lane is unusable.
func (l *Lane) Send(id uint32, m *Operate) error {
	if m.PIN.Len() > 0 {
		return errors.New("no PIN crosses on a lane")
	}
	b, _ := marshal(appendHeader(l.buf[:0], TypeOperate, id), m)
	if len(b) > MaxLaneFrame {
		return ErrTooLong
	}
	binary.BigEndian.PutUint32(b, uint32(len(b)-lengthSize))
	l.id, l.out = id, b
	return l.done("write", l.raw.Write(l.write))
}

// done returns err, or else the error of the system call.
func (l *Lane) done(what string, err error) error {
	if err == nil && l.errno != 0 {
		err = &net.OpError{Op: what, Net: "lane", Err: l.errno}
	}
	return err
}

// Ready waits for the answer and occupies the calling thread. It returns true if the
// answer is there, or if Receive will fail at once. To put a goroutine to sleep and wake
// it again takes as long as a fast token needs for a signature. Keep patience short: no
// other goroutine can use the thread.
func (l *Lane) Ready(patience time.Duration) bool {
	l.patience = unix.NsecToTimespec(int64(patience))
	return l.raw.Control(l.poll) != nil || l.ready
}

// Receive waits for the answer. The body is valid until the next use of the lane, and
// Decode wipes it. After
// Interrupt, Receive returns os.ErrDeadlineExceeded, and the lane stays usable. After any
// other error the lane is unusable.
func (l *Lane) Receive() (Frame, error) {
	switch err := l.done("read", l.raw.Read(l.read)); {
	case errors.Is(err, os.ErrDeadlineExceeded):
		return Frame{}, os.ErrDeadlineExceeded
	case err != nil:
		return Frame{}, gone(err)
	case l.n == 0:
		return Frame{}, io.EOF
	}
	t, id, body, err := parsePacket(l.buf[:l.n])
	switch {
	case err != nil:
		return Frame{}, err
	case id != l.id:
		return Frame{}, errors.New("answer to no request")
	case t != TypeReply && t != TypeError:
		return Frame{}, fmt.Errorf("unknown type %d of answer", t)
	}
	return Frame{Type: t, ID: id, Body: body}, nil
}

// Interrupt makes the current Receive return, and each later Receive until Resume.
func (l *Lane) Interrupt() { _ = l.c.SetReadDeadline(time.Unix(1, 0)) }

// Resume ends an interruption.
func (l *Lane) Resume() { _ = l.c.SetReadDeadline(time.Time{}) }

// Close closes the lane. Send and Receive then fail.
func (l *Lane) Close() error { return l.c.Close() }

// ModuleLanes accepts the lanes of a module process. Only one goroutine may use it.
type ModuleLanes struct {
	c   *net.UnixConn
	buf []byte
	oob []byte
}

// NewModuleLanes returns the module process's end on c. The ModuleLanes owns c.
func NewModuleLanes(c *net.UnixConn) *ModuleLanes {
	return &ModuleLanes{c: c, buf: make([]byte, MaxLaneFrame), oob: make([]byte, unix.CmsgSpace(4*maxPassed))}
}

// maxPassed is the room for files in a message that should bring one file.
const maxPassed = 4

// Accept waits for the next lane and returns it with its token. It returns io.EOF when
// the agent has gone. It returns another error when the agent breaks the protocol.
func (l *ModuleLanes) Accept() (*ModuleLane, TokenID, error) {
	n, oobn, flags, _, err := l.c.ReadMsgUnix(l.buf, l.oob)
	if err != nil {
		return nil, TokenID{}, gone(err)
	}
	if n == 0 && oobn == 0 {
		return nil, TokenID{}, io.EOF
	}
	fds, err := passed(l.oob[:oobn])
	if err == nil && (len(fds) != 1 || flags&(unix.MSG_TRUNC|unix.MSG_CTRUNC) != 0) {
		err = fmt.Errorf("lane with %d files", len(fds))
	}
	var about Token
	if err == nil {
		err = Unmarshal(l.buf[:n], &about)
	}
	if err == nil {
		err = unix.SetNonblock(fds[0], false)
	}
	if err != nil {
		for _, fd := range fds {
			_ = unix.Close(fd)
		}
		return nil, TokenID{}, err
	}
	return &ModuleLane{fd: fds[0], in: make([]byte, MaxLaneFrame), out: make([]byte, 0, 1<<10)}, about.Token, nil
}

// passed returns the files in the control data of a message.
func passed(oob []byte) (fds []int, err error) {
	list, err := unix.ParseSocketControlMessage(oob)
	for i := range list {
		more, parseErr := unix.ParseUnixRights(&list[i])
		fds, err = append(fds, more...), errors.Join(err, parseErr)
	}
	return fds, err
}

// A ModuleLane is the module process's end of a lane. Only one goroutine may use it.
type ModuleLane struct {
	fd      int
	in, out []byte
}

// ReadRequest waits for the next request, on a thread that does nothing else. m is valid
// until the next call. Pass the same m each time: a value that equals the last value
// takes no new memory. ReadRequest returns io.EOF when the agent has closed the lane. It
// returns another error when the agent breaks the protocol.
//
// For the duration awake, the thread does not go to sleep. It yields its processor to
// other threads that want it.
func (l *ModuleLane) ReadRequest(m *Operate, awake time.Duration) (id uint32, err error) {
	n, errno := l.lookFor(awake)
	if errno == unix.EAGAIN {
		n, err = unix.Read(l.fd, l.in)
		for err == unix.EINTR {
			n, err = unix.Read(l.fd, l.in)
		}
	} else if errno != 0 {
		err = errno
	}
	if err != nil {
		return 0, gone(err)
	}
	if n == 0 {
		return 0, io.EOF
	}
	return parseLaneRequest(l.in[:n], m)
}

// lookFor reads a request if a request comes within the duration awake. Otherwise it
// returns EAGAIN.
func (l *ModuleLane) lookFor(awake time.Duration) (int, syscall.Errno) {
	if awake <= 0 {
		return 0, unix.EAGAIN
	}
	for start := time.Now(); ; {
		n, _, errno := unix.RawSyscall6(unix.SYS_RECVFROM, uintptr(l.fd), uintptr(unsafe.Pointer(&l.in[0])), uintptr(len(l.in)), unix.MSG_DONTWAIT, 0, 0)
		if errno != unix.EAGAIN && errno != unix.EINTR {
			return int(n), errno
		}
		if time.Since(start) >= awake {
			return 0, unix.EAGAIN
		}
		_, _, _ = unix.RawSyscall(unix.SYS_SCHED_YIELD, 0, 0, 0)
	}
}

// parseLaneRequest parses a packet with a request.
func parseLaneRequest(packet []byte, m *Operate) (id uint32, err error) {
	t, id, body, err := parsePacket(packet)
	switch {
	case err != nil:
		return 0, err
	case t != TypeOperate:
		return 0, fmt.Errorf("unknown type %d of request", t)
	case id == 0:
		return 0, errors.New("request without a number")
	}
	c := codec{reading: true, reuse: true, b: body}
	m.fields(&c)
	if c.err == nil && len(c.b) > 0 {
		c.err = errTrailing
	}
	return id, c.err
}

// WriteReply answers a request in one system call.
func (l *ModuleLane) WriteReply(id uint32, reply Message) error {
	b, _ := marshal(appendHeader(l.out[:0], TypeReply, id), reply)
	defer clear(b) // the result may be a secret
	return l.write(b)
}

// WriteError tells the agent that a request has failed.
func (l *ModuleLane) WriteError(id uint32, e *Error) error {
	b, _ := marshal(appendHeader(l.out[:0], TypeError, id), e)
	return l.write(b)
}

func (l *ModuleLane) write(b []byte) error {
	if len(b) > MaxLaneFrame {
		return fmt.Errorf("answer of %d bytes: the limit is %d", len(b), MaxLaneFrame)
	}
	l.out = b
	binary.BigEndian.PutUint32(b, uint32(len(b)-lengthSize))
	_, err := unix.Write(l.fd, b)
	for err == unix.EINTR {
		_, err = unix.Write(l.fd, b)
	}
	return err
}

// Close closes the lane.
func (l *ModuleLane) Close() error { return unix.Close(l.fd) }

// appendHeader appends a frame's header. The caller sets the length later.
func appendHeader(b []byte, t Type, id uint32) []byte {
	return binary.BigEndian.AppendUint32(append(b, 0, 0, 0, 0, byte(t)), id)
}

// parsePacket splits a frame that fills a packet.
func parsePacket(b []byte) (t Type, id uint32, body []byte, err error) {
	if len(b) < headerSize {
		return 0, 0, nil, errShort
	}
	t, id, n, err := parseHeader(b, MaxLaneFrame)
	switch {
	case err != nil:
		return 0, 0, nil, err
	case n > len(b)-headerSize:
		return 0, 0, nil, errShort
	case n < len(b)-headerSize:
		return 0, 0, nil, errTrailing
	}
	return t, id, b[headerSize:], nil
}
