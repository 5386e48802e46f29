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

// Of tells who opened conn. It makes some 20 short system calls and never waits
// for the peer. Safe for concurrent use.
//
// The results are:
//
//   - Known, with a Chain: the process that opened the connection is alive.
//   - Known, without: it has ended, or cannot be looked at.
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
	// It has been there all the while if there is a chain.
	if p.Chain, p.id = chain(p.PID, pidfd); p.Chain != nil {
		p.Program = program
	}
	p.text = p.String()
	return p
}

// Later is Of in two steps, for those who may never want the second: p is what the
// kernel recorded when the connection was made, without the process, and look looks
// at that when it is called first, and returns the same from then on. It looks at the
// very process that made the connection, which may run another program by then, or at
// none; conn has to be open. look may be called from any goroutine.
func Later(conn *net.UnixConn) (p Peer, look func() Peer) {
	if !keepsProcess() {
		// Later, its number may be another's.
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

// keepsProcess tells whether the kernel hands out the process at the other end of a
// socket, and not only its number, as since Linux 6.5. Tests replace it.
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

// scratch is where files of /proc are read.
var scratch = sync.Pool{New: func() any { return new([unix.PathMax]byte) }}

// programOf tells which file a process runs, or nothing.
func programOf(pid int) Program {
	path, ok := programPath(pid)
	var st unix.Stat_t
	// Through the link in /proc, it is the file that runs even if its name is gone.
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
	// A program that was replaced by an upgrade while it runs.
	return strings.TrimSuffix(string(buf[:n]), " (deleted)"), true
}

// openProcess returns a pidfd for the process with that number. It cannot tell
// whether the number has been used again since the connection was made; it
// refuses at least a process of somebody else.
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

// chain reads the process and its ancestors. The pidfd is that of the process
// itself, so that it can be asked at the end whether it has been there all the
// while. id is the process's own.
//
// An ancestor has no pidfd. The one with the number that its child named is believed
// when it was started before that child: whoever has the number of a parent that has
// ended was started after the child said so. Within one tick of the clock that cannot
// be told, and the child is looked at again: a process gets another parent only when
// its parent ends. Its name is read first, so that it is the same one's.
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

// An identity tells a process from all others that have its number after it.
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

// alive tells whether the process of a pidfd has not ended: a pidfd becomes
// readable when it does (pidfd_open(2)).
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

// name prefers the program's file, which stays what it is, to the name that a
// process gives itself; the file of another user's process, or of one that
// keeps its memory to itself, cannot be read.
func name(path string, named bool, s procstat.Stat) string {
	if !named {
		return plain.Program(s.Name, maxName)
	}
	return plain.Program(filepath.Base(path), maxName)
}

func procFile(pid int, file string) string {
	return "/proc/" + strconv.Itoa(pid) + "/" + file
}
