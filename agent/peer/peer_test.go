package peer

import (
	"bufio"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"unicode"
	"unicode/utf8"

	"golang.org/x/sys/unix"

	"p11-agent/agent/door/doortest"
	"p11-agent/agent/peer/terminaltest"
	"p11-agent/pinentry/procstat"
)

// The test binary plays the clients: P11_PEER_ROLE says which.
const roleVariable = "P11_PEER_ROLE"

func TestMain(m *testing.M) {
	role, ok := os.LookupEnv(roleVariable)
	if !ok {
		os.Exit(terminaltest.Without(m).Run())
	}
	if err := play(strings.Fields(role)); err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
}

// play does what the role says, and ends when standard input does.
//
//	connect SOCKET       connect
//	nest N SOCKET        connect from N processes further down
//	bequeath SOCKET      connect, leave the connection to a child and exit
//	hold                 keep what is inherited
//	secretive SOCKET     connect, and keep the memory to itself
//	behind SOCKET        connect from a child in the background of the terminal
//	apart SOCKET         connect from a child in a session of its own
//	turn SOCKET          connect from a child in the foreground, and then take its place
//	alias SOCKET         connect, with /dev/tty in place of the terminal
//	look SOCKET          take a connection, and print what is known of its desk
//	own                  print what is known of the terminal of this process
//	hidden SOCKET        connect as a process that keeps its memory to itself
//	judge ROLE SOCKET    listen, have a child play the role, and say what SameProgram says of it
func play(role []string) error {
	switch role[0] {
	case "connect":
		conn, err := net.Dial("unix", role[1])
		if err != nil {
			return err
		}
		defer conn.Close()
	case "nest":
		n, err := strconv.Atoi(role[1])
		if err != nil {
			return err
		}
		next := fmt.Sprintf("nest %d %s", n-1, role[2])
		if n == 1 {
			next = "connect " + role[2]
		}
		cmd := exec.Command(os.Args[0])
		cmd.Env = append(os.Environ(), roleVariable+"="+next)
		cmd.Stdin, cmd.Stderr = os.Stdin, os.Stderr
		return cmd.Run()
	case "bequeath":
		conn, err := net.Dial("unix", role[1])
		if err != nil {
			return err
		}
		file, err := conn.(*net.UnixConn).File()
		if err != nil {
			return err
		}
		cmd := exec.Command(os.Args[0])
		cmd.Env = append(os.Environ(), roleVariable+"=hold")
		cmd.Stdin, cmd.Stderr = os.Stdin, os.Stderr
		cmd.ExtraFiles = []*os.File{file}
		if err := cmd.Start(); err != nil {
			return err
		}
		fmt.Println("bequeathed to", cmd.Process.Pid)
		return nil
	case "hold":
	case "secretive":
		if err := unix.Prctl(unix.PR_SET_DUMPABLE, 0, 0, 0, 0); err != nil {
			return err
		}
		return play([]string{"connect", role[1]})
	case "behind", "apart":
		cmd := exec.Command(os.Args[0])
		cmd.Env = append(os.Environ(), roleVariable+"=connect "+role[1])
		cmd.Stdin, cmd.Stdout, cmd.Stderr = os.Stdin, os.Stdout, os.Stderr
		cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: role[0] == "behind", Setsid: role[0] == "apart"}
		return cmd.Run()
	case "alias":
		tty, err := os.OpenFile("/dev/tty", os.O_RDWR, 0)
		if err != nil {
			return err
		}
		if err := unix.Dup2(int(tty.Fd()), 1); err != nil {
			return err
		}
		return play([]string{"connect", role[1]})
	case "turn":
		return playTurn(role[1])
	case "look":
		return playLook(role[1])
	case "own":
		t, err := Own()
		defer t.Close()
		fmt.Println(err)
	case "hidden":
		if err := unix.Prctl(unix.PR_SET_DUMPABLE, 0, 0, 0, 0); err != nil {
			return err
		}
		conn, err := net.Dial("unix", role[1])
		if err != nil {
			return err
		}
		defer conn.Close()
	case "judge":
		l, err := net.ListenUnix("unix", &net.UnixAddr{Name: role[2]})
		if err != nil {
			return err
		}
		defer l.Close()
		cmd := exec.Command(os.Args[0])
		cmd.Env = append(os.Environ(), roleVariable+"="+role[1]+" "+role[2])
		cmd.Stdin, cmd.Stderr = os.Stdin, os.Stderr
		if err := cmd.Start(); err != nil {
			return err
		}
		conn, err := l.AcceptUnix()
		if err != nil {
			return err
		}
		defer conn.Close()
		fmt.Println(Of(conn).SameProgram())
	default:
		return fmt.Errorf("no such role: %q", role)
	}
	_, err := io.Copy(io.Discard, os.Stdin)
	return err
}

// program puts the test binary under this name into a directory that every user may read.
func program(t *testing.T, name string) string {
	t.Helper()
	dir := shortDir(t)
	path := filepath.Join(dir, name)
	self, err := os.Open("/proc/self/exe")
	if err != nil {
		t.Fatal(err)
	}
	defer self.Close()
	file, err := os.OpenFile(path, os.O_CREATE|os.O_WRONLY, 0o755)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := io.Copy(file, self); err != nil {
		t.Fatal(err)
	}
	if err := file.Close(); err != nil {
		t.Fatal(err)
	}
	return path
}

// shortDir makes a directory whose files can be sockets and are within reach of
// other users.
func shortDir(t *testing.T) string {
	t.Helper()
	dir := doortest.Dir(t)
	if err := os.Chmod(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	return dir
}

func listen(t *testing.T) (*net.UnixListener, string) {
	t.Helper()
	path := filepath.Join(shortDir(t), "s")
	l, err := net.Listen("unix", path)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { l.Close() })
	if err := os.Chmod(path, 0o666); err != nil {
		t.Fatal(err)
	}
	return l.(*net.UnixListener), path
}

func accept(t *testing.T, l *net.UnixListener) *net.UnixConn {
	t.Helper()
	conn, err := l.AcceptUnix()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { conn.Close() })
	return conn
}

// command prepares a process that ends when the test does.
func command(t *testing.T, path, role string) *exec.Cmd {
	t.Helper()
	cmd := exec.Command(path)
	// A race detector waits a second before it exits.
	cmd.Env = append(os.Environ(), roleVariable+"="+role, "GORACE=atexit_sleep_ms=0")
	cmd.Stderr = os.Stderr
	stdin, err := cmd.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { stdin.Close() })
	return cmd
}

func start(t *testing.T, cmd *exec.Cmd) {
	t.Helper()
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if cmd.ProcessState == nil {
			cmd.Process.Kill()
			cmd.Wait()
		}
	})
}

func TestChildProcess(t *testing.T) {
	l, path := listen(t)
	cmd := command(t, program(t, "git-remote-ssh"), "connect "+path)
	start(t, cmd)

	p := Of(accept(t, l))
	if !p.Known || p.PID != cmd.Process.Pid || p.UID != os.Getuid() || p.GID != os.Getgid() {
		t.Errorf("peer %+v, want process %d of %d:%d", p, cmd.Process.Pid, os.Getuid(), os.Getgid())
	}
	if len(p.Chain) < 2 || p.Chain[0] != (Process{cmd.Process.Pid, "git-remote-ssh"}) || p.Chain[1].PID != os.Getpid() {
		t.Fatalf("chain %v, want git-remote-ssh (%d) and then this process (%d)", p.Chain, cmd.Process.Pid, os.Getpid())
	}
	if got, want := p.String(), fmt.Sprintf("git-remote-ssh (%d) ← %s (%d)", p.PID, p.Chain[1].Name, os.Getpid()); !strings.HasPrefix(got, want) {
		t.Errorf("shown as %q, want it to start with %q", got, want)
	}
	for _, link := range p.Chain {
		if link.PID <= 1 {
			t.Errorf("chain %v goes up to process %d", p.Chain, link.PID)
		}
	}
}

func TestLongChainIsCut(t *testing.T) {
	l, path := listen(t)
	start(t, command(t, program(t, "deep"), fmt.Sprintf("nest %d %s", maxChain+2, path)))
	p := Of(accept(t, l))
	if len(p.Chain) != maxChain {
		t.Fatalf("%d links, want %d: %v", len(p.Chain), maxChain, p)
	}
	seen := make(map[int]bool)
	for _, link := range p.Chain {
		if link.Name != "deep" || seen[link.PID] {
			t.Errorf("link %v in %v", link, p)
		}
		seen[link.PID] = true
	}
}

// The process that connected has ended, and another process uses the connection. A third
// process may have the number by now.
func TestInheritedConnection(t *testing.T) {
	for _, test := range []struct {
		name   string
		reaped bool
	}{
		{"the process is gone", true},
		{"the process is a zombie", false},
	} {
		t.Run(test.name, func(t *testing.T) {
			l, path := listen(t)
			cmd := command(t, program(t, "ephemeral"), "bequeath "+path)
			out, err := cmd.StdoutPipe()
			if err != nil {
				t.Fatal(err)
			}
			start(t, cmd)
			if _, err := bufio.NewReader(out).ReadString('\n'); err != nil {
				t.Fatal(err)
			}
			// WNOWAIT leaves it a zombie.
			if err := unix.Waitid(unix.P_PID, cmd.Process.Pid, nil, unix.WEXITED|unix.WNOWAIT, nil); err != nil {
				t.Fatal(err)
			}
			if test.reaped {
				if err := cmd.Wait(); err != nil {
					t.Fatal(err)
				}
			}
			p := Of(accept(t, l))
			if !p.Known || p.PID != cmd.Process.Pid || p.UID != os.Getuid() {
				t.Errorf("peer %+v, want the credentials of process %d", p, cmd.Process.Pid)
			}
			if len(p.Chain) > 0 {
				t.Errorf("chain %v of a process that has ended", p.Chain)
			}
			if got, want := p.String(), fmt.Sprintf("process %d", cmd.Process.Pid); got != want {
				t.Errorf("shown as %q, want %q", got, want)
			}
		})
	}
}

// A later look sees the same process, or none.
func TestLater(t *testing.T) {
	for name, keeps := range map[string]bool{"the kernel keeps the process": true, "the kernel has its number": false} {
		t.Run(name, func(t *testing.T) {
			was := keepsProcess
			defer func() { keepsProcess = was }()
			if keeps = keeps && was(); !keeps {
				keepsProcess = func() bool { return false }
			}
			l, path := listen(t)
			connect := func() (*exec.Cmd, *net.UnixConn) {
				cmd := command(t, program(t, "client"), "connect "+path)
				start(t, cmd)
				return cmd, accept(t, l)
			}
			end := func(cmd *exec.Cmd) {
				t.Helper()
				if err := cmd.Process.Kill(); err != nil {
					t.Fatal(err)
				}
				_ = cmd.Wait() // the error says that a signal ended it
			}
			check := func(what string, p Peer, cmd *exec.Cmd, alive bool) {
				t.Helper()
				if !p.Known || p.PID != cmd.Process.Pid || p.UID != os.Getuid() || p.GID != os.Getgid() {
					t.Errorf("%s: %+v, want process %d", what, p, cmd.Process.Pid)
				}
				if alive != (len(p.Chain) > 1) || alive != (p.Program != Program{}) || strings.HasPrefix(p.String(), "client (") != alive {
					t.Errorf("%s: %v with the program %+v", what, p, p.Program)
				}
			}

			cmd, conn := connect()
			p, look := Later(conn)
			check("at once", p, cmd, false)
			check("later", look(), cmd, true)
			end(cmd)
			conn.Close()
			check("when it was looked at and has ended", look(), cmd, true)

			cmd, conn = connect()
			_, look = Later(conn)
			end(cmd)
			check("when it has ended", look(), cmd, !keeps)

			cmd, conn = connect()
			_, look = Later(conn)
			conn.Close()
			check("when the connection is closed", look(), cmd, !keeps)

			if p, look = Later(conn); p.Known || look().Known {
				t.Errorf("%v is known of a closed connection", look())
			}
		})
	}
}

func TestOtherUser(t *testing.T) {
	const nobody = 65534
	if os.Getuid() != 0 {
		missing(t, "root, to start a process of another user")
	}
	l, path := listen(t)
	cmd := command(t, program(t, "stranger"), "connect "+path)
	cmd.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: nobody, Gid: nobody}}
	start(t, cmd)
	p := Of(accept(t, l))
	if !p.Known || p.UID != nobody || p.GID != nobody || p.PID != cmd.Process.Pid {
		t.Errorf("peer %+v, want process %d of %d:%d", p, cmd.Process.Pid, nobody, nobody)
	}
	if len(p.Chain) == 0 || p.Chain[0].Name != "stranger" {
		t.Errorf("chain %v, want stranger first", p.Chain)
	}
	// If only the number is known, it may belong to another process.
	if fd, err := openProcess(cmd.Process.Pid, nobody-1); err == nil {
		unix.Close(fd)
		t.Error("opened a process of another user")
	}
}

// missing skips a test that cannot run here. In CI, which promises everything, the test
// fails.
func missing(t *testing.T, what string) {
	t.Helper()
	if os.Getenv("CI") == "true" {
		t.Fatalf("this needs %s, which CI has to provide", what)
	}
	t.Skipf("this needs %s", what)
}

// Kernels before 6.5 do not hand out the peer's pidfd.
func TestWithoutPeerPidfd(t *testing.T) {
	cmd := command(t, program(t, "old-kernel"), "hold")
	start(t, cmd)
	fd, err := openProcess(cmd.Process.Pid, os.Getuid())
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Close(fd)
	links, _ := chain(cmd.Process.Pid, fd)
	if len(links) < 2 || links[0].PID != cmd.Process.Pid || links[1].PID != os.Getpid() {
		t.Errorf("chain %v, want %d and then %d", links, cmd.Process.Pid, os.Getpid())
	}
	if err := cmd.Process.Kill(); err != nil {
		t.Fatal(err)
	}
	if err := unix.Waitid(unix.P_PID, cmd.Process.Pid, nil, unix.WEXITED|unix.WNOWAIT, nil); err != nil {
		t.Fatal(err)
	}
	if links, _ := chain(cmd.Process.Pid, fd); links != nil {
		t.Errorf("chain %v of a process that has ended", links)
	}
	cmd.Wait()
	if fd, err := openProcess(cmd.Process.Pid, os.Getuid()); err == nil {
		unix.Close(fd)
		t.Error("opened a process that is gone")
	}
}

func TestClosedConnection(t *testing.T) {
	l, path := listen(t)
	client, err := net.Dial("unix", path)
	if err != nil {
		t.Fatal(err)
	}
	defer client.Close()
	conn := accept(t, l)
	if p := Of(conn); !p.Known || p.PID != os.Getpid() {
		t.Errorf("peer %+v, want this process", p)
	}
	conn.Close()
	if p := Of(conn); p.Known || p.String() != "unknown process" {
		t.Errorf("peer %v of a closed connection", p)
	}
}

func TestNoDescriptorIsKept(t *testing.T) {
	l, path := listen(t)
	client, err := net.Dial("unix", path)
	if err != nil {
		t.Fatal(err)
	}
	defer client.Close()
	conn := accept(t, l)
	Of(conn)
	before := descriptors(t)
	for range 20 {
		Of(conn)
	}
	if after := descriptors(t); after != before {
		t.Errorf("%d file descriptors, %d before", after, before)
	}
}

func descriptors(t *testing.T) int {
	t.Helper()
	entries, err := os.ReadDir("/proc/self/fd")
	if err != nil {
		t.Fatal(err)
	}
	return len(entries)
}

func TestString(t *testing.T) {
	for _, test := range []struct {
		name string
		peer Peer
		want string
	}{
		{"nothing known", Peer{PID: 3}, "unknown process"},
		{"other namespace", Peer{Known: true}, "process out of sight"},
		{"no chain", Peer{Known: true, PID: 3}, "process 3"},
		{"chain", Peer{Known: true, PID: 3, Chain: []Process{{3, "ssh"}, {2, "git"}}}, "ssh (3) ← git (2)"},
	} {
		t.Run(test.name, func(t *testing.T) {
			if got := test.peer.String(); got != test.want {
				t.Errorf("%q, want %q", got, test.want)
			}
		})
	}
}

// FuzzNames shows names that processes give themselves.
func FuzzNames(f *testing.F) {
	for _, s := range []string{"ssh", "a) b (c) S", "\n", "", "←", "\xff"} {
		f.Add([]byte(s))
	}
	f.Fuzz(func(t *testing.T, b []byte) {
		name := name("", false, procstat.Stat{Name: b})
		if len(name) == 0 || len(name) > maxName || !utf8.ValidString(name) || strings.Contains(name, "←") {
			t.Errorf("name %q", name)
		}
		for _, r := range name {
			if !unicode.IsPrint(r) {
				t.Errorf("name %q holds %q", name, r)
			}
		}
	})
}

func BenchmarkOf(b *testing.B) {
	dir := doortest.Dir(b)
	l, err := net.Listen("unix", filepath.Join(dir, "s"))
	if err != nil {
		b.Fatal(err)
	}
	defer l.Close()
	client, err := net.Dial("unix", filepath.Join(dir, "s"))
	if err != nil {
		b.Fatal(err)
	}
	defer client.Close()
	conn, err := l.(*net.UnixListener).AcceptUnix()
	if err != nil {
		b.Fatal(err)
	}
	defer conn.Close()
	for b.Loop() {
		if p := Of(conn); len(p.Chain) == 0 {
			b.Fatal(p)
		}
	}
}

// SameProgram compares files: a program that forwards connections has another file.
func TestSameProgram(t *testing.T) {
	own, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	linked := filepath.Join(filepath.Dir(own), "linked-"+strconv.Itoa(os.Getpid()))
	if err := os.Link(own, linked); err != nil {
		t.Fatal(err)
	}
	defer os.Remove(linked)
	for name, test := range map[string]struct {
		path string
		want bool
	}{
		"the same file":                {own, true},
		"the same file, by a new name": {linked, true},
		"one that has taken its place": {program(t, filepath.Base(own)), true},
		"ssh":                          {program(t, "ssh"), false},
		"a name that begins alike":     {program(t, filepath.Base(own)+"-old"), false},
	} {
		t.Run(name, func(t *testing.T) {
			l, path := listen(t)
			start(t, command(t, test.path, "connect "+path))
			p := Of(accept(t, l))
			if err := p.SameProgram(); (err == nil) != test.want {
				t.Errorf("%v: %v", p, err)
			}
			if p.Program.Path != test.path && !os.SameFile(fileInfo(t, p.Program.Path), fileInfo(t, test.path)) {
				t.Errorf("the program is %q, want %q", p.Program.Path, test.path)
			}
		})
	}
	if err := (Peer{Known: true, PID: 1, Chain: []Process{{1, "p11-agent"}}}).SameProgram(); err == nil {
		t.Error("a process whose file cannot be seen may be any program")
	}
}

func fileInfo(t *testing.T, path string) os.FileInfo {
	t.Helper()
	st, err := os.Stat(path)
	if err != nil {
		t.Fatal(err)
	}
	return st
}

// A program that was replaced while it runs is still known.
func TestReplacedProgram(t *testing.T) {
	l, socket := listen(t)
	path := program(t, "upgraded")
	start(t, command(t, path, "connect "+socket))
	conn := accept(t, l)
	if err := os.Remove(path); err != nil {
		t.Fatal(err)
	}
	if p := Of(conn); p.Program.Path != path || p.Program.Ino == 0 {
		t.Errorf("the program is %+v, want %s", p.Program, path)
	}
}

// SameProgram refuses a process if the kernel does not show its program.
func TestHiddenProcess(t *testing.T) {
	const nobody = 65534
	for role, want := range map[string]string{
		"connect": "<nil>",
		"hidden":  "the program of the process that asks cannot be seen",
	} {
		t.Run(role, func(t *testing.T) {
			dir := shortDir(t)
			if err := os.Chmod(dir, 0o777); err != nil {
				t.Fatal(err)
			}
			cmd := command(t, program(t, "judge"), "judge "+role+" "+filepath.Join(dir, "s"))
			if os.Getuid() == 0 { // root would see everything
				cmd.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: nobody, Gid: nobody}}
			}
			out, err := cmd.StdoutPipe()
			if err != nil {
				t.Fatal(err)
			}
			start(t, cmd)
			line, err := bufio.NewReader(out).ReadString('\n')
			if err != nil || strings.TrimSpace(line) != want {
				t.Errorf("%q, %v", line, err)
			}
		})
	}
}
