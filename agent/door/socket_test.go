package door

import (
	"bufio"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"testing"

	"golang.org/x/sys/unix"

	"p11-agent/agent/door/doortest"
	"p11-agent/agent/peer/proctest"
)

func TestListen(t *testing.T) {
	proctest.NoLeaks(t, proctest.Methods[Server]())
	// Any umask will do.
	defer unix.Umask(unix.Umask(0))
	path := filepath.Join(doortest.Dir(t), "dir", "agent.sock")
	s, err := Listen(path)
	if err != nil {
		t.Fatal(err)
	}
	for name, mode := range map[string]os.FileMode{path: os.ModeSocket | 0o600, filepath.Dir(path): os.ModeDir | 0o700} {
		if info, err := os.Lstat(name); err != nil || info.Mode() != mode {
			t.Errorf("%s: %v, %v, want %v", name, info.Mode(), err, mode)
		}
	}
	if s.Path() != path {
		t.Errorf("path %s", s.Path())
	}
	if _, err := Listen(path); !errors.Is(err, ErrInUse) {
		t.Errorf("a second agent: %v, want %v", err, ErrInUse)
	}
	var group sync.WaitGroup
	for range 2 {
		group.Go(func() {
			if err := s.Close(); err != nil {
				t.Error(err)
			}
		})
	}
	group.Wait()
	if entries, err := os.ReadDir(filepath.Dir(path)); len(entries) > 0 || err != nil {
		t.Errorf("left behind: %v, %v", entries, err)
	}
	if s, err = Listen(path); err != nil {
		t.Fatal(err)
	}
	if err := s.Close(); err != nil {
		t.Error(err)
	}
}

func TestListenRefuses(t *testing.T) {
	dir := doortest.Dir(t)
	mkdir := func(name string, mode os.FileMode) string {
		path := filepath.Join(dir, name)
		if err := errors.Join(os.Mkdir(path, 0o700), os.Chmod(path, mode)); err != nil {
			t.Fatal(err)
		}
		return path
	}
	mine := mkdir("mine", 0o700)
	file := filepath.Join(mine, "file")
	if err := os.WriteFile(file, []byte("precious"), 0o600); err != nil {
		t.Fatal(err)
	}
	link := filepath.Join(dir, "link")
	toSocket := filepath.Join(mine, "to-socket")
	if err := errors.Join(os.Symlink(mine, link), os.Symlink("/nowhere/socket", toSocket)); err != nil {
		t.Fatal(err)
	}
	long := filepath.Join(mine, strings.Repeat("x", 108-len(mine)-1))
	strange := filepath.Join(mine, "datagram")
	datagram, err := net.ListenUnixgram("unixgram", &net.UnixAddr{Name: strange, Net: "unixgram"})
	if err != nil {
		t.Fatal(err)
	}
	defer datagram.Close()

	tests := []struct{ name, path, want string }{
		{"relative", "agent.sock", "must be absolute"},
		{"abstract", "@agent", "must be absolute"},
		{"NUL", mine + "/a\x00b", "must be absolute"},
		{"roundabout", mine + "/../mine/s", ". or a .."},
		{"too long", long, "108 bytes, and a socket's can have 107"},
		{"group can write", filepath.Join(mkdir("group", 0o770), "s"), "others can write"},
		{"all can write", filepath.Join(mkdir("all", 0o777), "s"), "others can write"},
		{"symbolic link", filepath.Join(link, "s"), "symbolic link"},
		{"file for a directory", filepath.Join(file, "s"), "no directory"},
		{"no parent", filepath.Join(mine, "a", "b", "s"), "no such file"},
		{"file", file, "not a socket"},
		{"symbolic link for a socket", toSocket, "not a socket"},
		{"socket of another kind", strange, "may be in use"},
	}
	if os.Getuid() == 0 {
		theirs := mkdir("theirs", 0o700)
		if err := os.Chown(theirs, 65534, 65534); err != nil {
			t.Fatal(err)
		}
		tests = append(tests, struct{ name, path, want string }{"directory of another user", filepath.Join(theirs, "s"), "another user (uid 65534)"})
	}
	for _, test := range tests {
		t.Run(test.name, func(t *testing.T) {
			fds := proctest.Files(t, os.Getpid())
			s, err := Listen(test.path)
			if err == nil {
				s.Close()
			}
			if err == nil || !strings.Contains(err.Error(), test.want) {
				t.Errorf("%v, want %q", err, test.want)
			}
			if n := proctest.Files(t, os.Getpid()); n != fds {
				t.Errorf("%d file descriptors, %d before", n, fds)
			}
		})
	}
	if b, err := os.ReadFile(file); string(b) != "precious" || err != nil {
		t.Errorf("the file holds %q, %v", b, err)
	}
	if _, err := os.Lstat(strange); err != nil {
		t.Error(err)
	}
}

// Users may share a sticky directory that belongs to root or to one of them. The agent
// leaves the files of others alone. A lock of another user does not stop it.
func TestSharedDirectory(t *testing.T) {
	dir := doortest.Dir(t)
	if err := os.Chmod(dir, 0o777|os.ModeSticky); err != nil {
		t.Fatal(err)
	}
	holder, err := os.Open(dir)
	if err == nil {
		err = unix.Flock(int(holder.Fd()), unix.LOCK_EX)
	}
	if err != nil {
		t.Fatal(err)
	}
	defer holder.Close()
	path := filepath.Join(dir, "s")
	s, err := Listen(path)
	if err != nil {
		t.Fatal(err)
	}
	if info, err := os.Lstat(path); err != nil || info.Mode() != os.ModeSocket|0o600 || !s.Shared() {
		t.Errorf("%v, %v, shared: %v", info, err, s.Shared())
	}
	if _, err := Listen(path); !errors.Is(err, ErrInUse) {
		t.Errorf("a second agent: %v, want %v", err, ErrInUse)
	}
	if err := s.Close(); err != nil {
		t.Error(err)
	}
	if _, err := os.Lstat(path); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("the socket is left: %v", err)
	}
	if os.Getuid() != 0 {
		return
	}
	// One of another user is not to be used, be it in use or not.
	l, err := net.ListenUnix("unix", &net.UnixAddr{Name: path, Net: "unix"})
	if err != nil {
		t.Fatal(err)
	}
	l.SetUnlinkOnClose(false)
	if err := os.Chown(path, 65534, 65534); err != nil {
		t.Fatal(err)
	}
	for range 2 {
		if _, err := Listen(path); err == nil || errors.Is(err, ErrInUse) || !strings.Contains(err.Error(), "belongs to another user (uid 65534)") {
			t.Errorf("a socket of another user: %v", err)
		}
		_ = l.Close()
	}
	if _, err := os.Lstat(path); err != nil {
		t.Error(err)
	}
	// The owner of a directory can remove what is in it.
	if err := os.Chown(dir, 65534, 65534); err != nil {
		t.Fatal(err)
	}
	if _, err := Listen(filepath.Join(dir, "t")); err == nil || !strings.Contains(err.Error(), "another user") {
		t.Errorf("a sticky directory of another user: %v", err)
	}
}

func TestLongestPath(t *testing.T) {
	dir := doortest.Dir(t)
	s, err := Listen(filepath.Join(dir, strings.Repeat("x", 107-len(dir)-1)))
	if err != nil {
		t.Fatal(err)
	}
	conn, err := net.Dial("unix", s.Path())
	if err != nil {
		t.Error(err)
	} else {
		conn.Close()
	}
	if err := s.Close(); err != nil {
		t.Error(err)
	}
}

func TestRuntimeDirectory(t *testing.T) {
	dir := doortest.Dir(t)
	path := filepath.Join(dir, "p11-agent", "ssh", "s")
	if s, err := Listen(path); err == nil {
		s.Close()
		t.Error("two directories were made outside XDG_RUNTIME_DIR")
	}
	t.Setenv("XDG_RUNTIME_DIR", dir+"/")
	s, err := Listen(path)
	if err != nil {
		t.Fatal(err)
	}
	defer s.Close()
	if info, err := os.Stat(filepath.Join(dir, "p11-agent")); err != nil || info.Mode() != os.ModeDir|0o700 {
		t.Errorf("%v, %v", info.Mode(), err)
	}
}

// A killed agent leaves a socket on which no process listens.
func TestStaleSocket(t *testing.T) {
	path := filepath.Join(doortest.Dir(t), "s")
	l, err := net.ListenUnix("unix", &net.UnixAddr{Name: path, Net: "unix"})
	if err != nil {
		t.Fatal(err)
	}
	l.SetUnlinkOnClose(false)
	if err := l.Close(); err != nil {
		t.Fatal(err)
	}
	s, err := Listen(path)
	if err != nil {
		t.Fatal(err)
	}
	if err := s.Close(); err != nil {
		t.Error(err)
	}
}

// An agent that is too busy to accept is not dead.
func TestBusySocket(t *testing.T) {
	path := filepath.Join(doortest.Dir(t), "s")
	fd, err := unix.Socket(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Close(fd)
	if err := errors.Join(unix.Bind(fd, &unix.SockaddrUnix{Name: path}), unix.Listen(fd, 0)); err != nil {
		t.Fatal(err)
	}
	first, err := net.Dial("unix", path) // the backlog is full now
	if err != nil {
		t.Fatal(err)
	}
	defer first.Close()
	if s, err := Listen(path); err == nil {
		s.Close()
		t.Error("the socket was taken from a living agent")
	}
	if _, err := os.Lstat(path); err != nil {
		t.Error(err)
	}
}

// What has taken the place of the socket is not removed with it.
func TestCloseRemovesOnlyItsOwn(t *testing.T) {
	path := filepath.Join(doortest.Dir(t), "s")
	mine, err := Listen(path)
	if err != nil {
		t.Fatal(err)
	}
	if err := os.Remove(path); err != nil {
		t.Fatal(err)
	}
	theirs, err := Listen(path)
	if err != nil {
		t.Fatal(err)
	}
	if err := mine.Close(); err != nil {
		t.Error(err)
	}
	if conn, err := net.Dial("unix", path); err != nil {
		t.Errorf("the other agent's socket: %v", err)
	} else {
		conn.Close()
	}
	if err := theirs.Close(); err != nil {
		t.Error(err)
	}
	if err := os.WriteFile(path, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if err := theirs.Close(); err != nil {
		t.Error(err)
	}
	if _, err := os.Lstat(path); err != nil {
		t.Error(err)
	}
}

func TestCloseWithoutFile(t *testing.T) {
	path := filepath.Join(doortest.Dir(t), "dir", "s")
	s, err := Listen(path)
	if err != nil {
		t.Fatal(err)
	}
	if err := os.RemoveAll(filepath.Dir(path)); err != nil {
		t.Fatal(err)
	}
	if err := s.Close(); err != nil {
		t.Error(err)
	}
}

const rivalVariable = "P11_RIVAL_AGENT"

// TestManyStartAtOnce has several processes listen on the same path at the same
// moment, with a dead agent's socket in the way.
func TestManyStartAtOnce(t *testing.T) {
	const rivals, rounds = 6, 5
	path := filepath.Join(doortest.Dir(t), "dir", "s")
	for range rounds {
		var starts []io.Closer
		var says []*bufio.Reader
		var cmds []*exec.Cmd
		for range rivals {
			cmd := exec.Command("/proc/self/exe", "-test.run=^TestRival$")
			cmd.Env = append(os.Environ(), rivalVariable+"="+path, "GORACE=atexit_sleep_ms=0")
			stdin, err := cmd.StdinPipe()
			if err != nil {
				t.Fatal(err)
			}
			stdout, err := cmd.StdoutPipe()
			if err != nil {
				t.Fatal(err)
			}
			if err := cmd.Start(); err != nil {
				t.Fatal(err)
			}
			defer cmd.Wait()
			defer cmd.Process.Kill()
			says = append(says, bufio.NewReader(stdout))
			starts, cmds = append(starts, stdin), append(cmds, cmd)
		}
		for _, r := range says {
			if line, err := r.ReadString('\n'); line != "ready\n" {
				t.Fatal(line, err)
			}
		}
		for _, s := range starts {
			s.Close()
		}
		won := 0
		for _, r := range says {
			switch line, err := r.ReadString('\n'); line {
			case "won\n":
				won++
			case "in use\n":
			default:
				t.Fatal(line, err)
			}
		}
		if won != 1 {
			t.Errorf("%d of %d agents got the socket", won, rivals)
		}
		// Killed, so that the next round finds a stale socket.
		for _, cmd := range cmds {
			cmd.Process.Kill()
			cmd.Wait()
		}
	}
}

func TestRival(t *testing.T) {
	path, ok := os.LookupEnv(rivalVariable)
	if !ok {
		return // it is only for TestManyStartAtOnce
	}
	fmt.Println("ready")
	io.Copy(io.Discard, os.Stdin)
	switch s, err := Listen(path); {
	case err == nil:
		fmt.Println("won")
		s.AcceptUnix() // keeps it until it is killed
		select {}
	case errors.Is(err, ErrInUse):
		fmt.Println("in use")
	default:
		fmt.Println(err)
	}
}
