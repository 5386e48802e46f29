package peer

import (
	"errors"
	"fmt"
	"net"
	"path/filepath"
	"strconv"
	"strings"
	"sync"

	"golang.org/x/sys/unix"

	"p11-agent/pinentry/plain"
	"p11-agent/pinentry/procstat"
)

const (
	// maxChain bounds the links of a chain: a person reads no more.
	maxChain = 16
	// maxName bounds the bytes of a link's name.
	maxName = 64

	arrow = " ← "
)

// Of returns the process that opened conn. It makes some 20 short system calls and never waits for
// the peer. Any goroutine may call Of.
//
// The results are:
//
//   - Known, with a Chain: the process that opened the connection is alive.
//   - Known, without a Chain: the process has ended, or cannot be looked at.
//   - not Known: the kernel tells nothing (conn is closed).
func Of(conn *net.UnixConn) Peer {
	p := recorded(conn)
	if p.PID <= 0 {
		return p
	}
	pidfd, err := option(conn, func(fd int) (int, error) {
		return unix.GetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_PEERPIDFD)
	})
	if errors.Is(err, unix.ENOPROTOOPT) {
		pidfd, err = openProcess(p.PID, p.UID)
	}
	if err != nil {
		return p
	}
	defer unix.Close(pidfd)
	program := programOf(p.PID)
	// If there is a chain, the process lived all the while.
	if p.Chain, p.id = chain(p.PID, pidfd); p.Chain != nil {
		p.Program = program
	}
	p.text = p.String()
	return p
}

// Later is Of in two steps, for callers that may not need the second. p is what the kernel recorded
// when the connection was made, without the process. look looks at the process once, and returns
// the same from then on. It looks at the very process that made the connection, which may run
// another program by then, or at none. conn has to be open. Any goroutine may call look.
func Later(conn *net.UnixConn) (p Peer, look func() Peer) {
	if !keepsProcess() {
		// Later, another process may have its number.
		all := Of(conn)
		return Peer{Known: all.Known, PID: all.PID, UID: all.UID, GID: all.GID}, func() Peer { return all }
	}
	p = recorded(conn)
	return p, sync.OnceValue(func() Peer {
		if all := Of(conn); all.Known {
			return all
		}
		return p
	})
}

// keepsProcess tells whether the kernel hands out the process at the other end of a socket, as
// since Linux 6.5. Older kernels tell the number only. Tests replace it.
var keepsProcess = sync.OnceValue(func() bool {
	fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return false
	}
	defer unix.Close(fds[0])
	defer unix.Close(fds[1])
	pidfd, err := unix.GetsockoptInt(fds[0], unix.SOL_SOCKET, unix.SO_PEERPIDFD)
	if err != nil {
		return false
	}
	_ = unix.Close(pidfd)
	return true
})

// recorded returns what the kernel recorded when the connection was made.
func recorded(conn *net.UnixConn) Peer {
	cred, err := option(conn, func(fd int) (*unix.Ucred, error) {
		return unix.GetsockoptUcred(fd, unix.SOL_SOCKET, unix.SO_PEERCRED)
	})
	// A socket without a peer has PID 0 and the ids -1 (socket(7)).
	if err != nil || cred.Uid == ^uint32(0) {
		return Peer{}
	}
	return Peer{Known: true, PID: int(cred.Pid), UID: int(cred.Uid), GID: int(cred.Gid)}
}

// option returns an option of a connection's socket.
func option[T any](conn *net.UnixConn, get func(fd int) (T, error)) (value T, err error) {
	raw, err := conn.SyscallConn()
	if err != nil {
		return value, err
	}
	if closed := raw.Control(func(fd uintptr) { value, err = get(int(fd)) }); closed != nil {
		return value, closed
	}
	return value, err
}

// scratch has buffers for links and files of /proc.
var scratch = sync.Pool{New: func() any { return new([unix.PathMax]byte) }}

// programOf returns the file that a process runs, or nothing.
func programOf(pid int) Program {
	path, ok := programPath(pid)
	var st unix.Stat_t
	// The link in /proc leads to the file that runs, even if its name is gone.
	if !ok || unix.Stat(procFile(pid, "exe"), &st) != nil {
		return Program{}
	}
	return Program{Path: path, Dev: uint64(st.Dev), Ino: st.Ino}
}

// programPath returns the path of the file that a process runs.
func programPath(pid int) (string, bool) {
	buf := scratch.Get().(*[unix.PathMax]byte)
	defer scratch.Put(buf)
	n, err := unix.Readlink(procFile(pid, "exe"), buf[:])
	if err != nil || n == 0 {
		return "", false
	}
	// An upgrade has replaced the program while it runs.
	return strings.TrimSuffix(string(buf[:n]), " (deleted)"), true
}

// openProcess returns a pidfd for the process with that number. It cannot tell whether the number
// was used again since the connection was made. It refuses a process of another user.
func openProcess(pid, uid int) (int, error) {
	fd, err := unix.PidfdOpen(pid, 0)
	if err != nil {
		return -1, fmt.Errorf("open process %d: %w", pid, err)
	}
	// The owner of the directory is the process's effective user, or root when
	// the process is not dumpable (proc(5)).
	var st unix.Stat_t
	if err := unix.Stat(procFile(pid, ""), &st); err != nil || (int(st.Uid) != uid && st.Uid != 0) {
		_ = unix.Close(fd)
		return -1, fmt.Errorf("process %d is not the one that connected", pid)
	}
	return fd, nil
}

// chain reads the process and its ancestors. pidfd is the pidfd of the process, which shows at the
// end whether the process lived all the while. id belongs to the process.
//
// An ancestor has no pidfd. The child names the number of its parent. chain believes the number if
// its process started before the child: a process that got the number of an ended parent started
// later. Within one tick of the clock the times do not tell. Then chain looks at the child again,
// as a process gets another parent only when its parent ends. chain reads the name of a program
// before its times, so that both belong to one process.
func chain(pid, pidfd int) (links []Process, id identity) {
	stat, ok := procstat.Of(pid)
	if !ok {
		return nil, identity{}
	}
	id = identity{stat.Start, inode(pidfd)}
	path, named := programPath(pid)
	links = append(make([]Process, 0, 8), Process{PID: pid, Name: name(path, named, stat)})
	for len(links) < maxChain && stat.Parent > 1 {
		path, named := programPath(stat.Parent)
		parent, ok := procstat.Of(stat.Parent)
		if !ok {
			break
		}
		if parent.Start >= stat.Start {
			if again, ok := procstat.Of(pid); !ok || again.Start != stat.Start || again.Parent != stat.Parent {
				break
			}
		}
		links = append(links, Process{PID: stat.Parent, Name: name(path, named, parent)})
		pid, stat = stat.Parent, parent
	}
	if !alive(pidfd) {
		return nil, identity{}
	}
	return links, id
}

// An identity tells a process from all later ones that have its number.
type identity struct {
	start uint64 // clock ticks after boot; two of one tick have the same
	inode uint64 // of a pidfd: unique since Linux 6.9, the same for all before
}

func inode(pidfd int) uint64 {
	var st unix.Stat_t
	if err := unix.Fstat(pidfd, &st); err != nil {
		return 0
	}
	return st.Ino
}

// alive tells whether the process of a pidfd lives. A pidfd becomes readable when the process ends
// (pidfd_open(2)).
func alive(pidfd int) bool {
	fds := []unix.PollFd{{Fd: int32(pidfd), Events: unix.POLLIN}}
	for {
		n, err := unix.Poll(fds, 0)
		if errors.Is(err, unix.EINTR) {
			continue
		}
		return err == nil && n == 0
	}
}

// name returns the name of the program's file, if it can be read. Otherwise it returns the name
// that the process gives itself, which may change. The file cannot be read for another user's
// process, and for a process that hides its memory.
func name(path string, named bool, s procstat.Stat) string {
	if !named {
		return plain.Program(s.Name, maxName)
	}
	return plain.Program(filepath.Base(path), maxName)
}

func procFile(pid int, file string) string {
	return "/proc/" + strconv.Itoa(pid) + "/" + file
}
