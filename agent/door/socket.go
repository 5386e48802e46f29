package door

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// maxPath is the longest path that a Unix socket can have (unix(7)): sun_path
// has 108 bytes, and the last is NUL.
const maxPath = 107

// ErrInUse says that another process listens on the socket.
var ErrInUse = errors.New("an agent is already listening there")

// A Socket is a listening socket that Listen made, with its file.
type Socket struct {
	l      *net.UnixListener
	dir    *os.File // the directory of the file, also after a rename
	shared bool     // others may write to dir, and it is sticky
	path   string
	name   string // in dir
	id     fileID

	once sync.Once
	err  error
}

type fileID struct{ dev, ino uint64 }

// Listen makes a socket that only this process's user can connect to, at an absolute path of at
// most 107 bytes.
//
// The directory must belong to the user, and only the user may write to it. It may also be sticky,
// as /tmp is (Shared). Listen makes a missing directory, and its parent if that is directly in
// XDG_RUNTIME_DIR. Listen replaces a socket that no process listens on. It leaves alone a socket in
// use, a socket of another user, and a file that is not a socket. The error is ErrInUse, or says
// what is there. If several agents start at once, one gets the socket and the others get ErrInUse.
func Listen(path string) (*Socket, error) {
	s, err := listen(path)
	if err != nil {
		return nil, fmt.Errorf("listen on %s: %w", path, err)
	}
	return s, nil
}

func listen(path string) (*Socket, error) {
	switch {
	case !filepath.IsAbs(path) || strings.ContainsRune(path, 0):
		return nil, errors.New("the path of a socket must be absolute")
	case len(path) > maxPath:
		return nil, fmt.Errorf("the path has %d bytes, and a socket's can have %d", len(path), maxPath)
	case filepath.Clean(path) != path:
		return nil, errors.New("the path has an empty part, a . or a .. in it")
	}
	dir, err := openDirectory(filepath.Dir(path))
	if err != nil {
		return nil, err
	}
	s := &Socket{dir: dir, path: path, name: filepath.Base(path)}
	s.shared, err = checkDirectory(dir)
	if err == nil {
		err = s.bind()
	}
	if err != nil {
		return nil, errors.Join(err, dir.Close())
	}
	return s, nil
}

// openDirectory opens the directory for the socket. It makes the directory if Listen says so.
func openDirectory(path string) (*os.File, error) {
	if parent := filepath.Dir(path); filepath.Dir(parent) == filepath.Clean(os.Getenv("XDG_RUNTIME_DIR")) {
		if err := os.Mkdir(parent, 0o700); err != nil && !errors.Is(err, fs.ErrExist) {
			return nil, err
		}
	}
	if err := os.Mkdir(path, 0o700); err != nil && !errors.Is(err, fs.ErrExist) {
		return nil, err
	}
	dir, err := os.OpenFile(path, os.O_RDONLY|unix.O_DIRECTORY|unix.O_NOFOLLOW, 0)
	switch {
	case errors.Is(err, unix.ENOTDIR), errors.Is(err, unix.ELOOP):
		// With O_DIRECTORY a symbolic link is ENOTDIR as well.
		return nil, fmt.Errorf("%s is a symbolic link or no directory: name the directory itself", path)
	case err != nil:
		return nil, err
	}
	return dir, nil
}

// checkDirectory returns an error if a directory is not fit for a socket. shared tells whether
// users share the directory: in a sticky directory, only its owner and the owner of a file can
// remove the file.
func checkDirectory(dir *os.File) (shared bool, err error) {
	var st unix.Stat_t
	if err := unix.Fstat(int(dir.Fd()), &st); err != nil {
		return false, fmt.Errorf("look at %s: %w", dir.Name(), err)
	}
	own, writable := int(st.Uid) == os.Geteuid(), st.Mode&0o022 != 0
	switch {
	case writable && st.Mode&unix.S_ISVTX != 0 && (own || st.Uid == 0):
		return true, nil
	case !own:
		return false, fmt.Errorf("the directory %s belongs to another user (uid %d)", dir.Name(), st.Uid)
	case writable:
		return false, fmt.Errorf("others can write to the directory %s: take the permission away (chmod go-w)", dir.Name())
	}
	return false, nil
}

// bind makes the socket. Meanwhile it holds a lock on the directory: of two agents, the second
// finds the first one listening. A lock file would stay behind.
func (s *Socket) bind() error {
	unlock, err := s.lock()
	if err != nil {
		return err
	}
	defer unlock()
	if err := s.clear(); err != nil {
		return err
	}
	config := net.ListenConfig{Control: func(_, _ string, raw syscall.RawConn) error {
		// A socket's file gets the mode of the socket, less the umask. So the file
		// never has another mode (unix_bind in Linux's net/unix/af_unix.c).
		var modeErr error
		err := raw.Control(func(fd uintptr) { modeErr = unix.Fchmod(int(fd), 0o600) })
		return errors.Join(err, modeErr)
	}}
	l, err := config.Listen(context.Background(), "unix", s.path)
	if err != nil {
		return err
	}
	s.l = l.(*net.UnixListener)
	s.l.SetUnlinkOnClose(false) // Close removes the file, if it is still ours
	st, err := s.stat()
	if err == nil && (st.Mode != unix.S_IFSOCK|0o600 || int(st.Uid) != os.Geteuid()) {
		err = fmt.Errorf("the new socket has mode %o and owner %d", st.Mode, st.Uid)
	}
	if err != nil {
		return errors.Join(err, s.l.Close())
	}
	s.id = fileID{uint64(st.Dev), st.Ino}
	return nil
}

// clear removes the socket of an agent that has ended.
func (s *Socket) clear() error {
	st, err := s.stat()
	switch {
	case errors.Is(err, unix.ENOENT):
		return nil
	case err != nil:
		return err
	case st.Mode&unix.S_IFMT != unix.S_IFSOCK:
		return errors.New("a file of that name is there and is not a socket: move the file away or use another path")
	case int(st.Uid) != os.Geteuid():
		return fmt.Errorf("the socket that is there belongs to another user (uid %d): use another path", st.Uid)
	}
	conn, err := net.Dial("unix", s.path)
	switch {
	case err == nil:
		_ = conn.Close()
		return ErrInUse
	case !errors.Is(err, unix.ECONNREFUSED):
		// A full queue (EAGAIN) belongs to a living agent. Other errors say nothing, so
		// the socket stays.
		return fmt.Errorf("the socket that is there may be in use: %w", err)
	}
	if err := unix.Unlinkat(int(s.dir.Fd()), s.name, 0); err != nil {
		return fmt.Errorf("remove the socket of an agent that has ended: %w", err)
	}
	return nil
}

func (s *Socket) stat() (st unix.Stat_t, err error) {
	if err := unix.Fstatat(int(s.dir.Fd()), s.name, &st, unix.AT_SYMLINK_NOFOLLOW); err != nil {
		return st, fmt.Errorf("look at the socket: %w", err)
	}
	return st, nil
}

// lock keeps other agents from making or removing a socket in the directory. Agents hold the lock
// for moments only. If it takes long, another program holds it. In a shared directory that may be
// another user's program: then lock goes on without the lock.
func (s *Socket) lock() (unlock func(), err error) {
	const pause = 10 * time.Millisecond
	tries := 500
	if s.shared {
		tries = 50
	}
	for range tries {
		err = unix.Flock(int(s.dir.Fd()), unix.LOCK_EX|unix.LOCK_NB)
		switch {
		case err == nil:
			return func() { _ = unix.Flock(int(s.dir.Fd()), unix.LOCK_UN) }, nil
		case !errors.Is(err, unix.EWOULDBLOCK) && !errors.Is(err, unix.EINTR):
			return nil, fmt.Errorf("lock the directory %s: %w", s.dir.Name(), err)
		}
		time.Sleep(pause)
	}
	if s.shared {
		return func() {}, nil
	}
	return nil, fmt.Errorf("another program keeps the directory %s locked", s.dir.Name())
}

// Shared tells whether the socket is in a sticky directory that other users may write to. There, a
// module process of the agent could remove the socket and make its own in that place.
func (s *Socket) Shared() bool { return s.shared }

// Path returns the path that clients connect to (SSH_AUTH_SOCK).
func (s *Socket) Path() string { return s.path }

// AcceptUnix waits for the next client. After Close, its error is net.ErrClosed.
func (s *Socket) AcceptUnix() (*net.UnixConn, error) { return s.l.AcceptUnix() }

// Close stops listening and removes the socket's file, unless another file has taken its place.
// Further calls do nothing and return the same. Any goroutine may call Close.
func (s *Socket) Close() error {
	s.once.Do(func() {
		// While the socket is open, its file keeps its inode number. So no later file
		// can have that number.
		s.err = errors.Join(s.remove(), s.l.Close(), s.dir.Close())
	})
	return s.err
}

func (s *Socket) remove() error {
	unlock, err := s.lock()
	if err != nil {
		return err
	}
	defer unlock()
	st, err := s.stat()
	switch {
	case errors.Is(err, unix.ENOENT), err == nil && (fileID{uint64(st.Dev), st.Ino}) != s.id:
		return nil
	case err != nil:
		return err
	}
	if err := unix.Unlinkat(int(s.dir.Fd()), s.name, 0); err != nil && !errors.Is(err, unix.ENOENT) {
		return fmt.Errorf("remove the socket %s: %w", s.path, err)
	}
	return nil
}
