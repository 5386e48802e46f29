package door

import (
	"errors"
	"fmt"
	"os"
	"sync"
	"syscall"

	"golang.org/x/sys/unix"
)

// A watcher notices clients that hang up while no goroutine reads from their connection, because a
// request waits for a person or a card.
//
// One epoll set has every connection, and asks for no event. The kernel reports EPOLLHUP and
// EPOLLERR all the same, when the client has closed its end or has ended. A client that has only
// shut down its sending side causes neither, so it still gets its answer. Go's poller watches the
// set like any file, so that no thread waits.
//
// Events name a connection by its number. The kernel uses file descriptors again, and an event may
// be on its way while its connection is closed. Numbers of connections are not used again, so a
// late event finds no connection.
type watcher struct {
	set *os.File
	raw syscall.RawConn

	mu    sync.Mutex
	conns map[uint64]*Conn
	ended bool // hangUp was called: add refuses connections
}

func newWatcher() (*watcher, error) {
	fd, err := unix.EpollCreate1(unix.EPOLL_CLOEXEC)
	if err != nil {
		return nil, fmt.Errorf("watch for clients that hang up: %w", err)
	}
	// The poller takes non-blocking files only.
	if err := unix.SetNonblock(fd, true); err != nil {
		_ = unix.Close(fd)
		return nil, fmt.Errorf("watch for clients that hang up: %w", err)
	}
	set := os.NewFile(uintptr(fd), "epoll")
	raw, err := set.SyscallConn()
	if err != nil {
		_ = set.Close()
		return nil, fmt.Errorf("watch for clients that hang up: %w", err)
	}
	return &watcher{set: set, raw: raw, conns: make(map[uint64]*Conn)}, nil
}

// add cancels a connection when its client hangs up, and has hangUp end the connection, until
// remove.
func (w *watcher) add(c *Conn) error {
	w.mu.Lock()
	if w.ended {
		w.mu.Unlock()
		return errStopping
	}
	w.conns[c.number] = c
	w.mu.Unlock()

	if err := w.register(c); err != nil {
		w.remove(c)
		return fmt.Errorf("watch for the client to hang up: %w", err)
	}
	return nil
}

func (w *watcher) register(c *Conn) error {
	nc, ok := c.net.(syscall.Conn)
	if !ok {
		return errors.New("the connection is not a socket")
	}
	conn, err := nc.SyscallConn()
	if err != nil {
		return err
	}
	// The event's data has 64 bits. x/sys calls the halves Fd and Pad.
	event := unix.EpollEvent{Events: unix.EPOLLONESHOT, Fd: int32(c.number), Pad: int32(c.number >> 32)}
	var ctlErr error
	err = w.raw.Control(func(set uintptr) {
		err := conn.Control(func(fd uintptr) {
			ctlErr = unix.EpollCtl(int(set), unix.EPOLL_CTL_ADD, int(fd), &event)
		})
		ctlErr = errors.Join(ctlErr, err)
	})
	return errors.Join(err, ctlErr)
}

// remove forgets a connection. The epoll set forgets it when the connection closes.
func (w *watcher) remove(c *Conn) {
	w.mu.Lock()
	defer w.mu.Unlock()
	delete(w.conns, c.number)
}

// run cancels connections whose clients hang up, until close.
func (w *watcher) run() error {
	var events [64]unix.EpollEvent
	for {
		var n int
		var waitErr error
		err := w.raw.Read(func(set uintptr) (done bool) {
			n, waitErr = unix.EpollWait(int(set), events[:], 0)
			return n != 0 // 0: wait for an event
		})
		switch {
		case errors.Is(err, os.ErrClosed):
			return nil
		case errors.Is(waitErr, unix.EINTR):
			continue
		case err != nil || waitErr != nil:
			return fmt.Errorf("watch for clients that hang up: %w", errors.Join(err, waitErr))
		}
		w.mu.Lock()
		for _, e := range events[:n] {
			if c, ok := w.conns[uint64(uint32(e.Fd))|uint64(uint32(e.Pad))<<32]; ok {
				c.cancel(ErrHungUp)
			}
		}
		w.mu.Unlock()
	}
}

// hangUp ends every connection, and has add refuse further ones. The goroutines that serve the
// connections notice and remove them. The context of the connections has ended before.
func (w *watcher) hangUp() {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.ended = true
	for _, c := range w.conns {
		c.hangUp()
	}
}

// close ends run.
func (w *watcher) close() {
	_ = w.set.Close()
}
