package pcsc

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"

	"p11-agent/pinentry/plain"
	"p11-agent/pinentry/procstat"
)

// A Client is a process that is connected to pcscd. Only pcscd knows whether the process
// uses a reader, and which reader.
type Client struct {
	PID  int
	Name string // the name that the process gives itself
}

// String returns the name and the process ID.
func (c Client) String() string { return fmt.Sprintf("%s (%d)", c.Name, c.PID) }

// Connections tells which processes are connected to pcscd.
type Connections struct {
	// Clients are the processes that this process can see.
	Clients []Client
	// Hidden is the number of connections whose process is unknown. Such a process
	// belongs to another user, or does not let this process look into it.
	Hidden int
	// Suspects are processes that may have the hidden connections, judged by their names.
	Suspects []Client
}

// secretive holds the names of programs that use cards and do not let processes of the
// same user look into them. scdaemon (GnuPG 2.2) calls prctl(PR_SET_DUMPABLE), so even
// its open files are hidden.
var secretive = []string{"scdaemon"}

// Clients returns the processes that are connected to pcscd, as far as this process may
// see them.
//
// The kernel lists the sockets that are connected to pcscd's socket (sock_diag(7)). Every
// user may ask for that list. /proc tells which process has each socket.
func Clients(ctx context.Context, socket string) (Connections, error) {
	ctx, cancel := context.WithTimeout(ctx, askTimeout)
	defer cancel()
	var st unix.Stat_t
	if err := unix.Stat(socket, &st); err != nil {
		return Connections{}, fmt.Errorf("find pcscd's socket: %w", err)
	}
	peers, err := peersOf(ctx, vfs{dev: st.Dev, ino: st.Ino})
	if err != nil || len(peers) == 0 {
		return Connections{}, err
	}
	holders, closed, err := holdersOf(ctx, peers)
	if err != nil {
		return Connections{}, err
	}
	var c Connections
	seen := make(map[uint32]bool)
	for pid, inodes := range holders {
		for _, ino := range inodes {
			seen[ino] = true
		}
		if !inherited(pid, holders) {
			c.Clients = append(c.Clients, Client{PID: pid, Name: programName(pid)})
		}
	}
	slices.SortFunc(c.Clients, func(a, b Client) int { return a.PID - b.PID })
	if c.Hidden = len(peers) - len(seen); c.Hidden > 0 {
		for _, pid := range closed {
			if name := programName(pid); slices.Contains(secretive, name) {
				c.Suspects = append(c.Suspects, Client{PID: pid, Name: name})
			}
		}
	}
	return c, nil
}

// vfs identifies a socket's file. The path does not identify it, because pcscd may see
// another /run than this process.
type vfs struct{ dev, ino uint64 }

// Numbers of linux/unix_diag.h.
const (
	diagShowVFS  = 0x2 // UDIAG_SHOW_VFS
	diagShowPeer = 0x4 // UDIAG_SHOW_PEER

	diagVFS  = 1 // UNIX_DIAG_VFS
	diagPeer = 2 // UNIX_DIAG_PEER

	diagRequestSize = 24 // struct unix_diag_req
	diagMessageSize = 16 // struct unix_diag_msg, before the attributes
	diagInode       = 4  // where udiag_ino is in it
	tcpEstablished  = 1

	maxDiag = 16 << 20 // bytes of sockets listed
)

// peersOf returns the inodes of the clients' sockets: the other ends of the connections
// that were accepted on the file's socket.
func peersOf(ctx context.Context, file vfs) (map[uint32]bool, error) {
	fd, err := unix.Socket(unix.AF_NETLINK, unix.SOCK_RAW|unix.SOCK_CLOEXEC, unix.NETLINK_SOCK_DIAG)
	if err != nil {
		return nil, fmt.Errorf("ask for sockets: %w", err)
	}
	defer unix.Close(fd)
	limit := unix.NsecToTimeval(askTimeout.Nanoseconds())
	if err := unix.SetsockoptTimeval(fd, unix.SOL_SOCKET, unix.SO_RCVTIMEO, &limit); err != nil {
		return nil, fmt.Errorf("ask for sockets: %w", err)
	}
	req := make([]byte, unix.SizeofNlMsghdr+diagRequestSize)
	binary.NativeEndian.PutUint32(req[0:], uint32(len(req)))
	binary.NativeEndian.PutUint16(req[4:], unix.SOCK_DIAG_BY_FAMILY)
	binary.NativeEndian.PutUint16(req[6:], unix.NLM_F_REQUEST|unix.NLM_F_DUMP)
	body := req[unix.SizeofNlMsghdr:]
	body[0] = unix.AF_UNIX
	binary.NativeEndian.PutUint32(body[4:], 1<<tcpEstablished) // udiag_states
	binary.NativeEndian.PutUint32(body[12:], diagShowVFS|diagShowPeer)
	if err := unix.Sendto(fd, req, 0, &unix.SockaddrNetlink{Family: unix.AF_NETLINK}); err != nil {
		return nil, fmt.Errorf("ask for sockets: %w", err)
	}
	peers := make(map[uint32]bool)
	buf := make([]byte, 64<<10)
	for total := 0; total < maxDiag; {
		if err := ctx.Err(); err != nil {
			return nil, err
		}
		n, _, err := unix.Recvfrom(fd, buf, 0)
		if errors.Is(err, unix.EINTR) {
			continue
		}
		if err != nil {
			return nil, fmt.Errorf("ask for sockets: %w", err)
		}
		total += n
		done, err := parseDiag(buf[:n], file, peers)
		if err != nil || done {
			return peers, err
		}
	}
	return nil, errors.New("ask for sockets: there are too many")
}

// parseDiag reads one datagram of netlink messages. It adds the peers of the file's
// sockets to peers, and tells whether the list has ended.
func parseDiag(b []byte, file vfs, peers map[uint32]bool) (done bool, err error) {
	for len(b) >= unix.SizeofNlMsghdr {
		size, kind := binary.NativeEndian.Uint32(b), binary.NativeEndian.Uint16(b[4:])
		if size < unix.SizeofNlMsghdr || uint64(size) > uint64(len(b)) {
			return false, errors.New("ask for sockets: the answer makes no sense")
		}
		body := b[unix.SizeofNlMsghdr:size]
		b = b[min(len(b), align(int(size))):]
		switch kind {
		case unix.NLMSG_DONE:
			return true, nil
		case unix.NLMSG_ERROR:
			if len(body) >= 4 {
				return false, fmt.Errorf("ask for sockets: %w", unix.Errno(-int32(binary.NativeEndian.Uint32(body))))
			}
			return false, errors.New("ask for sockets: refused")
		case unix.SOCK_DIAG_BY_FAMILY:
			if peer, ok := parseSocket(body, file); ok {
				peers[peer] = true
			}
		}
	}
	return false, nil
}

// parseSocket reads struct unix_diag_msg and its attributes. It returns the peer if the
// socket belongs to the file.
func parseSocket(b []byte, file vfs) (peer uint32, ok bool) {
	if len(b) < diagMessageSize {
		return 0, false
	}
	ours := false
	for b = b[diagMessageSize:]; len(b) >= unix.SizeofNlAttr; {
		size, kind := int(binary.NativeEndian.Uint16(b)), binary.NativeEndian.Uint16(b[2:])
		if size < unix.SizeofNlAttr || size > len(b) {
			return 0, false
		}
		value := b[unix.SizeofNlAttr:size]
		b = b[min(len(b), align(size)):]
		switch {
		case kind == diagVFS && len(value) >= 8:
			// The value holds the low half of the inode, and the device as the kernel
			// stores it: 12 and 20 bits (MKDEV of linux/kdev_t.h).
			ino, dev := binary.NativeEndian.Uint32(value), binary.NativeEndian.Uint32(value[4:])
			ours = ino == uint32(file.ino) && unix.Mkdev(dev>>20, dev&(1<<20-1)) == file.dev
		case kind == diagPeer && len(value) >= 4:
			peer = binary.NativeEndian.Uint32(value)
		}
	}
	return peer, ours && peer != 0
}

// align is NLMSG_ALIGN and NLA_ALIGN.
func align(n int) int { return (n + 3) &^ 3 }

// holdersOf returns which processes hold which of the sockets. closed holds the processes
// of this user that this process may not look into.
func holdersOf(ctx context.Context, sockets map[uint32]bool) (holders map[int][]uint32, closed []int, err error) {
	proc, err := os.ReadDir("/proc")
	if err != nil {
		return nil, nil, fmt.Errorf("look at processes: %w", err)
	}
	holders = make(map[int][]uint32)
	for _, p := range proc {
		pid, err := strconv.Atoi(p.Name())
		if err != nil {
			continue
		}
		if err := ctx.Err(); err != nil {
			return nil, nil, err
		}
		dir := filepath.Join("/proc", p.Name(), "fd")
		files, err := os.ReadDir(dir)
		if err != nil { // gone, or not to be looked into
			var st unix.Stat_t
			if unix.Stat(filepath.Dir(dir), &st) == nil && int(st.Uid) == os.Geteuid() {
				closed = append(closed, pid)
			}
			continue
		}
		for _, f := range files {
			link, err := os.Readlink(filepath.Join(dir, f.Name()))
			if err != nil {
				continue
			}
			if ino, ok := socketInode(link); ok && sockets[ino] {
				holders[pid] = append(holders[pid], ino)
			}
		}
	}
	return holders, closed, nil
}

// inherited tells whether a process has its connections from its parent. A process that starts
// another has such a child for a moment, until the child runs its own program. A process that has
// ended since has no connections either.
func inherited(pid int, holders map[int][]uint32) bool {
	stat, ok := procstat.Of(pid)
	if !ok {
		return true
	}
	parents := holders[stat.Parent]
	return !slices.ContainsFunc(holders[pid], func(ino uint32) bool { return !slices.Contains(parents, ino) })
}

// socketInode reads a link such as "socket:[4711]".
func socketInode(link string) (uint32, bool) {
	s, ok := strings.CutPrefix(link, "socket:[")
	if !ok {
		return 0, false
	}
	n, err := strconv.ParseUint(strings.TrimSuffix(s, "]"), 10, 32)
	return uint32(n), err == nil
}

// programName returns the name that a process gives itself, made safe for a log.
func programName(pid int) string {
	b, err := os.ReadFile(filepath.Join("/proc", strconv.Itoa(pid), "comm"))
	b = bytes.TrimSuffix(b, []byte{'\n'})
	if err != nil || len(b) == 0 {
		return "a process"
	}
	return plain.Output(b)
}

// Loaded tells whether this process has the client library of PC/SC. A process with the
// library sees smart cards through pcscd. A connection is no better sign: libykcs11 2.2
// has no connection while another program uses the reader exclusively.
func Loaded() bool {
	maps, err := os.ReadFile("/proc/self/maps")
	return err == nil && bytes.Contains(maps, []byte("/libpcsclite"))
}
