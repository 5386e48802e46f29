package peer

import (
	"bufio"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"p11-agent/agent/peer/terminaltest"
	"p11-agent/pinentry/procstat"

	"golang.org/x/sys/unix"
)

// onTerminal makes the terminal the controlling terminal of the command, and the command
// the job in its foreground.
func onTerminal(cmd *exec.Cmd, tty *os.File) {
	cmd.ExtraFiles = []*os.File{tty}
	cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true, Setctty: true, Ctty: 3}
}

func sameTerminal(t *testing.T, a, b *os.File) bool {
	t.Helper()
	var sa, sb unix.Stat_t
	if err := errors.Join(unix.Fstat(int(a.Fd()), &sa), unix.Fstat(int(b.Fd()), &sb)); err != nil {
		t.Fatal(err)
	}
	return sa.Dev == sb.Dev && sa.Ino == sb.Ino
}

func TestDeskTerminal(t *testing.T) {
	for name, test := range map[string]struct {
		role    string
		stdout  bool // is the terminal
		session bool // has the terminal
		want    string
	}{
		"in the foreground":           {"connect", true, true, ""},
		"without a file of it":        {"connect", false, true, ""},
		"by another name":             {"alias", true, true, ""},
		"in the background":           {"behind", true, true, "is in the background of its terminal"},
		"in a session of its own":     {"apart", true, true, ""},
		"apart, without a file of it": {"apart", false, true, "has no terminal"},
		"a terminal of another user":  {"connect", true, false, "has left the job in the foreground"},
		"no terminal":                 {"connect", false, false, "has no terminal"},
	} {
		t.Run(name, func(t *testing.T) {
			l, path := listen(t)
			_, tty := terminaltest.New(t)
			cmd := command(t, program(t, "client"), test.role+" "+path)
			if test.stdout {
				cmd.Stdout = tty
			}
			if test.session {
				onTerminal(cmd, tty)
			} else {
				cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true}
			}
			start(t, cmd)
			d := Of(accept(t, l)).Desk()
			defer d.Close()
			if test.want != "" {
				if d.Terminal != nil || d.TerminalErr == nil || !strings.Contains(d.TerminalErr.Error(), test.want) {
					t.Errorf("the terminal is %v (%v), want %q", d.Terminal, d.TerminalErr, test.want)
				}
				return
			}
			if d.TerminalErr != nil {
				t.Fatal(d.TerminalErr)
			}
			if !sameTerminal(t, d.Terminal.File, tty) {
				t.Errorf("the terminal is another one")
			}
			if err := d.Terminal.Check(); err != nil {
				t.Errorf("right afterwards: %v", err)
			}
			cmd.Process.Kill()
			cmd.Wait()
			if test.role != "connect" {
				return // the child hears of it by its standard input
			}
			if err := d.Terminal.Check(); err == nil || !strings.Contains(err.Error(), "has ended") {
				t.Errorf("when the client has ended: %v", err)
			}
		})
	}
}

// playTurn connects from a child in the foreground, and takes the terminal back
// when it gets SIGUSR1.
func playTurn(path string) error {
	const tty = 3 // see onTerminal
	back := make(chan os.Signal, 1)
	signal.Notify(back, unix.SIGUSR1)
	signal.Ignore(unix.SIGTTOU) // a process in the background gets it
	cmd := exec.Command(os.Args[0])
	cmd.Env = append(os.Environ(), roleVariable+"=connect "+path)
	cmd.Stdin = os.Stdin
	cmd.SysProcAttr = &syscall.SysProcAttr{Foreground: true, Ctty: tty}
	if err := cmd.Start(); err != nil {
		return err
	}
	<-back
	if err := unix.IoctlSetPointerInt(tty, unix.TIOCSPGRP, unix.Getpgrp()); err != nil {
		return err
	}
	fmt.Println("in the foreground")
	return cmd.Wait()
}

// Another job comes to the foreground.
func TestTerminalChangesHands(t *testing.T) {
	l, path := listen(t)
	_, tty := terminaltest.New(t)
	cmd := command(t, program(t, "client"), "turn "+path)
	onTerminal(cmd, tty)
	pipe, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	start(t, cmd)
	d := Of(accept(t, l)).Desk()
	defer d.Close()
	if d.TerminalErr != nil {
		t.Fatal(d.TerminalErr)
	}
	if err := d.Terminal.Check(); err != nil {
		t.Error(err)
	}
	if err := cmd.Process.Signal(unix.SIGUSR1); err != nil {
		t.Fatal(err)
	}
	if line, err := bufio.NewReader(pipe).ReadString('\n'); err != nil {
		t.Fatal(line, err)
	}
	if err := d.Terminal.Check(); err == nil || !strings.Contains(err.Error(), "is in the background") {
		t.Errorf("another job is in the foreground: %v", err)
	}
}

func TestDeskEnvironment(t *testing.T) {
	l, path := listen(t)
	cmd := command(t, program(t, "client"), "connect "+path)
	cmd.Env = append(cmd.Env, "DISPLAY=:7", "XAUTHORITY=/x", "DBUS_SESSION_BUS_ADDRESS=unixexec:path=/bin/evil", "LC_ALL=", "LANG=de_DE.UTF-8",
		"LC_MESSAGES=/tmp/evil", "P11_SECRET=secret", "WAYLAND_DISPLAY=wayland-1", "XDG_RUNTIME_DIR=relative", "TERM=xterm")
	start(t, cmd)
	d := Of(accept(t, l)).Desk()
	defer d.Close()
	if d.EnvErr != nil {
		t.Fatal(d.EnvErr)
	}
	want := Environment{Display: ":7", XAuthority: "/x", Locale: "de_DE.UTF-8", WaylandDisplay: "wayland-1", TTYType: "xterm"}
	if d.Environment != want {
		t.Errorf("%+v, want %+v", d.Environment, want)
	}
	if want := fmt.Sprintf("client (%d)", cmd.Process.Pid); d.Who != want {
		t.Errorf("it is %q, want %q", d.Who, want)
	}
}

// environSeeds are contents of /proc/PID/environ.
var environSeeds = []string{
	"DISPLAY=:0\x00XAUTHORITY=/home/me/.Xauthority\x00TERM=xterm-256color\x00LANG=C.UTF-8\x00",
	"DISPLAY=:0\x00DISPLAY=:1\x00",
	"DISPLAY=\x00DISPLAY=:1\x00",
	"DISPLAY=-evil\x00LC_ALL=../x\x00XAUTHORITY=relative\x00TERM=a b\x00GPG_TTY=tty",
	"DBUS_SESSION_BUS_ADDRESS=unix:path=/bus,guid=1;unix:abstract=x\x00",
	"DBUS_SESSION_BUS_ADDRESS=unix:path=/bus;unixexec:path=/bin/sh\x00",
	"DISPLAY=:0\x1b[2J\x00WAYLAND_DISPLAY=\xff\x00",
	"LC_CTYPE=en_US.UTF-8\x00GPG_TTY=/dev/pts/3",
	"DISPLAY=" + strings.Repeat("x", maxVariable+1) + "\x00XDG_RUNTIME_DIR=/" + strings.Repeat("x", maxVariable-1),
	"=\x00DISPLAY\x00\x00\x00",
	"",
}

func TestParseEnvironment(t *testing.T) {
	for i, want := range []Environment{
		{Display: ":0", XAuthority: "/home/me/.Xauthority", TTYType: "xterm-256color", Locale: "C.UTF-8"},
		{Display: ":0"},
		{},
		{},
		{DBusAddress: "unix:path=/bus,guid=1;unix:abstract=x"},
		{},
		{},
		{Locale: "en_US.UTF-8", GPGTTY: "/dev/pts/3"},
		{RuntimeDir: "/" + strings.Repeat("x", maxVariable-1)},
		{},
		{},
	} {
		if got := ParseEnvironment([]byte(environSeeds[i])); got != want {
			t.Errorf("%q: %+v, want %+v", environSeeds[i], got, want)
		}
	}
}

func FuzzEnvironment(f *testing.F) {
	if len(environSeeds) == 0 {
		f.Fatal("no seeds")
	}
	for _, s := range environSeeds {
		f.Add([]byte(s))
	}
	f.Fuzz(func(t *testing.T, b []byte) {
		e := ParseEnvironment(b)
		for what, s := range map[string]string{
			"DISPLAY": e.Display, "WAYLAND_DISPLAY": e.WaylandDisplay, "XAUTHORITY": e.XAuthority, "GPG_TTY": e.GPGTTY,
			"DBUS_SESSION_BUS_ADDRESS": e.DBusAddress, "XDG_RUNTIME_DIR": e.RuntimeDir, "TERM": e.TTYType,
		} {
			if s == "" {
				continue
			}
			if !strings.Contains("\x00"+string(b)+"\x00", "\x00"+what+"="+s+"\x00") {
				t.Errorf("%s is %q, which is not there", what, s)
			}
			if len(s) > maxVariable || strings.ContainsAny(s, "\n\r\x00\x1b") {
				t.Errorf("%s is %q", what, s)
			}
		}
		if strings.Contains(e.Locale+e.TTYType, "/") || strings.Contains(";"+e.DBusAddress, ";unixexec:") {
			t.Errorf("%+v leads to a file or program", e)
		}
	})
}

func TestDeskOfUnknownPeer(t *testing.T) {
	l, path := listen(t)
	cmd := command(t, program(t, "client"), "connect "+path)
	start(t, cmd)
	p := Of(accept(t, l))
	another := p
	another.id.start--
	reused := another.Desk()
	cmd.Process.Kill()
	if err := unix.Waitid(unix.P_PID, cmd.Process.Pid, nil, unix.WEXITED|unix.WNOWAIT, nil); err != nil {
		t.Fatal(err)
	}
	zombie := p.Desk()
	cmd.Wait()
	for name, test := range map[string]struct {
		desk *Desk
		want string
	}{
		"unknown":                {Peer{}.Desk(), "the client is unknown"},
		"out of sight":           {Peer{Known: true, UID: os.Geteuid()}.Desk(), "PID namespace"},
		"was gone":               {Peer{Known: true, UID: os.Geteuid(), PID: 4711}.Desk(), "had ended"},
		"gone":                   {p.Desk(), "has ended"},
		"a zombie":               {zombie, "has ended"},
		"another, by its number": {reused, "has ended"},
		"another user":           {Peer{Known: true, UID: os.Geteuid() + 1, PID: 1, Chain: []Process{{1, "init"}}}.Desk(), "init (1) is of another user (uid"},
	} {
		for what, err := range map[string]error{"environment": test.desk.EnvErr, "terminal": test.desk.TerminalErr} {
			if err == nil || !strings.Contains(err.Error(), test.want) {
				t.Errorf("%s: %s: %v, want %q", name, what, err, test.want)
			}
		}
		if test.desk.Terminal != nil || test.desk.Environment != (Environment{}) {
			t.Errorf("%s: %+v", name, test.desk)
		}
	}
}

// Another process has got the number of the process that made the connection.
func TestDeskOfReusedNumber(t *testing.T) {
	const lastPID = "/proc/sys/kernel/ns_last_pid"
	// Any user may open the file, and only root may write to it.
	if err := os.WriteFile(lastPID, []byte(strconv.Itoa(os.Getpid())), 0); err != nil {
		missing(t, fmt.Sprintf("root, to choose the number of a process (%v)", err))
	}
	l, path := listen(t)
	client := program(t, "client")
	cmd := command(t, client, "connect "+path)
	start(t, cmd)
	p := Of(accept(t, l))
	cmd.Process.Kill()
	cmd.Wait()
	// Another process may take the number in the meantime. It is free again soon.
	for end := time.Now().Add(2 * time.Minute); ; {
		if time.Now().After(end) {
			t.Fatalf("no process gets number %d", p.PID)
		}
		if err := os.WriteFile(lastPID, []byte(strconv.Itoa(p.PID-1)), 0); err != nil {
			t.Fatal(err)
		}
		again := command(t, client, "hold")
		again.Env = append(again.Env, "DISPLAY=:66")
		start(t, again)
		fd, err := unix.PidfdOpen(again.Process.Pid, 0)
		if err != nil {
			t.Fatal(err)
		}
		s, _ := procstat.Of(again.Process.Pid)
		sameID := p.id == identity{s.Start, inode(fd)} // before Linux 6.9, in the same 10 ms
		unix.Close(fd)
		if again.Process.Pid != p.PID || sameID {
			again.Process.Kill()
			again.Wait()
			continue
		}
		d := p.Desk()
		defer d.Close()
		if d.EnvErr == nil || !strings.Contains(d.EnvErr.Error(), "has ended") || d.Display != "" || d.Terminal != nil {
			t.Errorf("the desk of another process: %+v", d)
		}
		return
	}
}

// playLook prints the Desk of the process that connects.
func playLook(path string) error {
	l, err := net.Listen("unix", path)
	if err != nil {
		return err
	}
	if err := os.Chmod(path, 0o666); err != nil {
		return err
	}
	fmt.Println("listening")
	conn, err := l.Accept()
	if err != nil {
		return err
	}
	d := Of(conn.(*net.UnixConn)).Desk()
	defer d.Close()
	fmt.Printf("environment: %v; terminal: %v\n", d.EnvErr, d.TerminalErr)
	return nil
}

// If Desk may not read the data of a process, the Desk has the reason. Root may read
// everything, so another user looks.
func TestDeskThatIsClosed(t *testing.T) {
	const nobody = 65534
	for name, test := range map[string]struct {
		role string
		root bool
		want string
	}{
		"keeps its memory to itself": {
			"secretive", false,
			`^environment: (the user namespace of client \(\d+\) cannot be read: permission denied); terminal: the user namespace of client \(\d+\) cannot be read: permission denied$`,
		},
		"root": {"connect", true, `^environment: (client \(\d+\)) is of another user \(uid 0\); terminal: client \(\d+\) is of another user \(uid 0\)$`},
	} {
		t.Run(name, func(t *testing.T) {
			as := &syscall.SysProcAttr{}
			if os.Getuid() == 0 {
				as.Credential = &syscall.Credential{Uid: nobody, Gid: nobody}
			} else if test.root {
				missing(t, "root, to be another user's client")
			}
			dir := shortDir(t)
			if err := os.Chmod(dir, 0o777); err != nil {
				t.Fatal(err)
			}
			client := program(t, "client")
			look := command(t, client, "look "+filepath.Join(dir, "s"))
			look.SysProcAttr = as
			pipe, err := look.StdoutPipe()
			if err != nil {
				t.Fatal(err)
			}
			start(t, look)
			lines := bufio.NewReader(pipe)
			if line, err := lines.ReadString('\n'); line != "listening\n" {
				t.Fatal(line, err)
			}
			cmd := command(t, client, test.role+" "+filepath.Join(dir, "s"))
			if !test.root {
				cmd.SysProcAttr = as
			}
			start(t, cmd)
			line, err := lines.ReadString('\n')
			if err != nil {
				t.Fatal(err)
			}
			if !matches(test.want, strings.TrimSpace(line)) {
				t.Errorf("%s", line)
			}
		})
	}
}

// Desk believes nothing of a process in another namespace, even if the process has the same
// terminal.
func TestDeskInAContainer(t *testing.T) {
	if os.Getuid() != 0 {
		missing(t, "root, to make a namespace")
	}
	for kind, flag := range map[string]uintptr{
		"user": unix.CLONE_NEWUSER, "mount": unix.CLONE_NEWNS, "PID": unix.CLONE_NEWPID, "network": unix.CLONE_NEWNET,
	} {
		t.Run(kind, func(t *testing.T) {
			l, path := listen(t)
			_, tty := terminaltest.New(t)
			cmd := command(t, program(t, "client"), "connect "+path)
			onTerminal(cmd, tty)
			cmd.SysProcAttr.Cloneflags = flag
			cmd.Env = append(cmd.Env, "DISPLAY=:7")
			if err := cmd.Start(); err != nil {
				missing(t, "the right to make a namespace")
			}
			t.Cleanup(func() {
				cmd.Process.Kill()
				cmd.Wait()
			})
			d := Of(accept(t, l)).Desk()
			defer d.Close()
			want := `^client \(\d+\) is in another ` + kind + ` namespace than the agent`
			if d.EnvErr == nil || !matches(want, d.EnvErr.Error()) || d.Display != "" {
				t.Errorf("display %q, %v", d.Display, d.EnvErr)
			}
			if d.Terminal != nil || d.TerminalErr == nil || !matches(want, d.TerminalErr.Error()) {
				t.Errorf("terminal %v, %v", d.Terminal, d.TerminalErr)
			}
		})
	}
}

func matches(pattern, text string) bool { return regexp.MustCompile(pattern).MatchString(text) }

func TestOwn(t *testing.T) {
	for name, test := range map[string]struct {
		session bool
		want    string
	}{
		"in the foreground": {true, `^<nil>$`},
		"no terminal":       {false, `^agent \(\d+\) has no terminal$`},
	} {
		_, tty := terminaltest.New(t)
		cmd := command(t, program(t, "agent"), "own")
		cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true}
		if test.session {
			onTerminal(cmd, tty)
		}
		pipe, err := cmd.StdoutPipe()
		if err != nil {
			t.Fatal(err)
		}
		start(t, cmd)
		line, err := bufio.NewReader(pipe).ReadString('\n')
		if err != nil || !matches(test.want, strings.TrimSpace(line)) {
			t.Errorf("%s: %q, %v", name, line, err)
		}
	}
}

func TestDeskKeepsNoDescriptor(t *testing.T) {
	l, path := listen(t)
	_, tty := terminaltest.New(t)
	cmd := command(t, program(t, "client"), "connect "+path)
	onTerminal(cmd, tty)
	start(t, cmd)
	p := Of(accept(t, l))
	reused := p
	reused.id.start++
	look := func() {
		p.Desk().Close()
		reused.Desk().Close()
	}
	look()
	before := descriptors(t)
	for range 20 {
		look()
	}
	if after := descriptors(t); after != before {
		t.Errorf("%d file descriptors, %d before", after, before)
	}
}
