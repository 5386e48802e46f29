package systemd

import (
	"bufio"
	"encoding/json"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"
	"unicode/utf8"

	"p11-agent/agent/door/doortest"
	"p11-agent/agent/peer/terminaltest"
)

// The test program also plays the service, and a child of the service.
const roleVariable = "P11_SYSTEMD_TEST_ROLE"

// noRaceSleep spares the second that a program built with -race sleeps when it
// ends.
const noRaceSleep = "GORACE=atexit_sleep_ms=0"

func TestMain(m *testing.M) {
	switch role := os.Getenv(roleVariable); role {
	case "":
		os.Exit(terminaltest.Without(m).Run())
	case "service":
		serve()
	case "child":
		fmt.Println(strings.Join(append(inherited(), sockets()...), " "))
	default:
		panic("unknown role " + role)
	}
}

// A report is what the service found, in one line of JSON on its stdout.
type report struct {
	Listeners []string // addresses
	Error     string
	Sockets   []string // the open sockets
	Again     []string // the result of the second call
	Child     string   // the sockets and variables that a child inherits
}

// serve takes the sockets and answers one connection on each with its address.
func serve() {
	listeners, err := Listeners()
	var r report
	for _, l := range listeners {
		r.Listeners = append(r.Listeners, l.Addr().String())
	}
	if err != nil {
		r.Error = err.Error()
	}
	r.Sockets = sockets()
	again, err := Listeners()
	for _, l := range again {
		r.Again = append(r.Again, l.Addr().String())
	}
	if err != nil {
		r.Again = append(r.Again, err.Error())
	}

	child := exec.Command("/proc/self/exe")
	child.Env = append(os.Environ(), roleVariable+"=child")
	out, err := child.Output()
	if err != nil {
		out = []byte(err.Error())
	}
	r.Child = strings.TrimSpace(string(out))
	if err := json.NewEncoder(os.Stdout).Encode(r); err != nil {
		panic(err)
	}

	for _, l := range listeners {
		c, err := l.Accept()
		if err != nil {
			panic(err)
		}
		fmt.Fprint(c, l.Addr())
		c.Close()
		l.Close()
	}
}

// inherited returns the variables of socket activation.
func inherited() (found []string) {
	for _, v := range os.Environ() {
		if strings.HasPrefix(v, "LISTEN_") {
			found = append(found, v)
		}
	}
	return found
}

// sockets returns the sockets among the open files.
func sockets() (found []string) {
	entries, err := os.ReadDir("/proc/self/fd")
	if err != nil {
		panic(err)
	}
	for _, e := range entries {
		if to, _ := os.Readlink("/proc/self/fd/" + e.Name()); strings.HasPrefix(to, "socket:") {
			found = append(found, e.Name()+"="+to)
		}
	}
	return found
}

// A service is a process in the role of that name, or a program that starts one when a
// client uses the socket.
type service struct {
	t      *testing.T
	cmd    *exec.Cmd
	stdout *bufio.Reader
}

func start(t *testing.T, cmd *exec.Cmd) *service {
	t.Helper()
	stdout, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		_ = cmd.Process.Kill() // it has ended by itself unless the test failed
		_ = cmd.Wait()
	})
	return &service{t: t, cmd: cmd, stdout: bufio.NewReader(stdout)}
}

// report returns the report of the service. It checks the parts that never differ.
func (s *service) report() report {
	s.t.Helper()
	line, err := s.stdout.ReadBytes('\n')
	if err != nil {
		s.t.Fatalf("the service ended without a report: %v", err)
	}
	var r report
	if err := json.Unmarshal(line, &r); err != nil {
		s.t.Fatalf("%v: %s", err, line)
	}
	if r.Child != "" {
		s.t.Errorf("a child of the service inherits %s", r.Child)
	}
	if len(r.Sockets) != len(r.Listeners) {
		s.t.Errorf("the service has %d listeners and keeps %q open", len(r.Listeners), r.Sockets)
	}
	if len(r.Again) > 0 {
		s.t.Errorf("the second call returned %q", r.Again)
	}
	return r
}

// activate runs systemd-socket-activate with args until it listens.
func activate(t *testing.T, args ...string) *service {
	t.Helper()
	program, err := exec.LookPath("systemd-socket-activate")
	if err != nil {
		if os.Getenv("CI") == "true" {
			t.Fatal("systemd-socket-activate is not installed")
		}
		t.Skip("systemd-socket-activate is not installed")
	}
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	args = append(args, "-E", noRaceSleep, "-E", roleVariable+"=service", self)
	cmd := exec.Command(program, args...)
	// Log to stderr, also where that is the journal.
	cmd.Env = append(os.Environ(), "SYSTEMD_LOG_TARGET=console", "SYSTEMD_LOG_LEVEL=info", "SYSTEMD_LOG_COLOR=0")
	stderr, err := cmd.StderrPipe()
	if err != nil {
		t.Fatal(err)
	}
	s := start(t, cmd)
	lines := bufio.NewScanner(stderr)
	for want := strings.Count(strings.Join(args, " "), "-l "); want > 0; want-- {
		if !lines.Scan() || !strings.Contains(lines.Text(), "Listening on ") {
			t.Fatalf("systemd-socket-activate says %q, %v", lines.Text(), lines.Err())
		}
	}
	go func() { _, _ = io.Copy(io.Discard, stderr) }() // ends with the process
	return s
}

func dial(t *testing.T, network, path string) net.Conn {
	t.Helper()
	c, err := net.Dial(network, path)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Close() })
	return c
}

func TestSocketActivation(t *testing.T) {
	dir := doortest.Dir(t)
	a, b := filepath.Join(dir, "a"), filepath.Join(dir, "b")
	s := activate(t, "-l", a, "-l", b, "--fdname=one:two")

	// The connection that starts the service is answered like later ones.
	first := dial(t, "unix", a)
	r := s.report()
	if r.Error != "" || !slices.Equal(r.Listeners, []string{a, b}) {
		t.Fatalf("got %q, error %q, want %q", r.Listeners, r.Error, []string{a, b})
	}
	for path, c := range map[string]net.Conn{a: first, b: dial(t, "unix", b)} {
		if got, err := io.ReadAll(c); err != nil || string(got) != path {
			t.Errorf("a client of %s reads %q, %v", path, got, err)
		}
	}
	if err := s.cmd.Wait(); err != nil {
		t.Error(err)
	}
	if _, err := os.Stat(a); err != nil {
		t.Errorf("closing the listener removed the socket unit's file: %v", err)
	}
}

func TestSocketActivationRefused(t *testing.T) {
	for _, test := range []struct {
		name, option, network string
		want                  string
	}{
		{"datagram", "--datagram", "unixgram", `"agent" .*datagram socket`},
		{"sequenced packets", "--seqpacket", "unixpacket", `"agent" .*socket of type 5`},
		{"one process a connection", "--accept", "unix", `"LISTEN_FD_3" .*Accept=no`},
	} {
		t.Run(test.name, func(t *testing.T) {
			path := filepath.Join(doortest.Dir(t), "s")
			args := []string{"-l", path, test.option}
			if test.option != "--accept" { // that option passes no names
				args = append(args, "--fdname=agent")
			}
			s := activate(t, args...)
			c := dial(t, test.network, path)
			if _, err := c.Write([]byte("hello")); err != nil {
				t.Fatal(err)
			}
			r := s.report()
			if !regexp.MustCompile(test.want).MatchString(r.Error) || len(r.Listeners) > 0 {
				t.Errorf("got %q, error %q, want error %q", r.Listeners, r.Error, test.want)
			}
		})
	}
}

// TestInherited passes variables and files that systemd-socket-activate never passes.
func TestInherited(t *testing.T) {
	dir := doortest.Dir(t)
	unix, err := net.Listen("unix", filepath.Join(dir, "s"))
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Close()
	tcp, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer tcp.Close()
	null, err := os.Open(os.DevNull)
	if err != nil {
		t.Fatal(err)
	}
	defer null.Close()
	netlink, err := syscall.Socket(syscall.AF_NETLINK, syscall.SOCK_DGRAM|syscall.SOCK_CLOEXEC, syscall.NETLINK_ROUTE)
	if err != nil {
		t.Fatal(err)
	}
	netlinkFile := os.NewFile(uintptr(netlink), "netlink")
	defer netlinkFile.Close()

	file := func(l net.Listener) *os.File {
		f, err := l.(interface{ File() (*os.File, error) }).File()
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { f.Close() })
		return f
	}
	const own = "LISTEN_PID=$$ "
	for _, test := range []struct {
		name      string
		variables string // as a shell assigns them
		files     []*os.File
		listeners int
		want      string // of the error
	}{
		{"nothing", "", nil, 0, ""},
		{"a socket", own + "LISTEN_FDS=1", []*os.File{file(unix)}, 1, ""},
		{"for another process", "LISTEN_PID=$PPID LISTEN_FDS=1 LISTEN_FDNAMES=x", nil, 0, ""},
		{"process in words", "LISTEN_PID=me LISTEN_FDS=1", nil, 0, `LISTEN_PID is "me"`},
		{"no number", own, nil, 0, `LISTEN_FDS is ""`},
		{"number in words", own + "LISTEN_FDS=one", nil, 0, `LISTEN_FDS is "one"`},
		{"number below zero", own + "LISTEN_FDS=-1", nil, 0, `LISTEN_FDS is "-1"`},
		{"network", own + "LISTEN_FDS=1 LISTEN_FDNAMES=web", []*os.File{file(tcp)}, 0, `"web" .*network socket`},
		{"network behind a good one", own + "LISTEN_FDS=2 LISTEN_FDNAMES=good:web", []*os.File{file(unix), file(tcp)}, 0, `"web" .*network socket`},
		{"no socket", own + "LISTEN_FDS=1", []*os.File{null}, 0, `"LISTEN_FD_3" .*not a socket`},
		{"other family", own + "LISTEN_FDS=1", []*os.File{netlinkFile}, 0, `address family 16`},
	} {
		t.Run(test.name, func(t *testing.T) {
			cmd := exec.Command("/bin/sh", "-c", test.variables+` exec "$0"`, "/proc/"+strconv.Itoa(os.Getpid())+"/exe")
			cmd.Env = append(os.Environ(), noRaceSleep, roleVariable+"=service")
			cmd.ExtraFiles = test.files
			r := start(t, cmd).report()
			if len(r.Listeners) != test.listeners {
				t.Errorf("got the listeners %q, want %d", r.Listeners, test.listeners)
			}
			if (r.Error == "") != (test.want == "") || !regexp.MustCompile(test.want).MatchString(r.Error) {
				t.Errorf("got error %q, want %q", r.Error, test.want)
			}
		})
	}
}

// manager stands in for the service manager's end of NOTIFY_SOCKET.
func manager(t *testing.T) (read func() string) {
	t.Helper()
	path := filepath.Join(doortest.Dir(t), "notify")
	c, err := net.ListenUnixgram("unixgram", &net.UnixAddr{Name: path, Net: "unixgram"})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Close() })
	t.Setenv("NOTIFY_SOCKET", path)
	return func() string {
		t.Helper()
		// A sent message is there already. The deadline is for a missing message.
		if err := c.SetReadDeadline(time.Now().Add(3 * time.Minute)); err != nil {
			t.Fatal(err)
		}
		b := make([]byte, 8192)
		n, err := c.Read(b)
		if err != nil {
			t.Fatal(err)
		}
		return string(b[:n])
	}
}

func TestNotify(t *testing.T) {
	for _, test := range []struct {
		name string
		call func() error
		want string
	}{
		{"ready", func() error { return Ready("serving") }, `READY=1\nSTATUS=serving`},
		{"status", func() error { return Status("waits for the card") }, `STATUS=waits for the card`},
		{"reloading", Reloading, `RELOADING=1\nMONOTONIC_USEC=[1-9][0-9]*\n`},
		{"stopping", Stopping, `STOPPING=1`},
		{"alive", Alive, `WATCHDOG=1`},
	} {
		t.Run(test.name, func(t *testing.T) {
			read := manager(t)
			for range 2 { // the socket must survive the first message
				if err := test.call(); err != nil {
					t.Fatal(err)
				}
				if got := read(); !regexp.MustCompile(`\A` + test.want + `\z`).MatchString(got) {
					t.Errorf("sent %q, want %q", got, test.want)
				}
			}
		})
	}

	t.Run("without a manager", func(t *testing.T) {
		t.Setenv("NOTIFY_SOCKET", "")
		if err := Ready("serving"); err != nil {
			t.Error(err)
		}
	})
	t.Run("manager gone", func(t *testing.T) {
		t.Setenv("NOTIFY_SOCKET", filepath.Join(doortest.Dir(t), "gone"))
		if err := Stopping(); err == nil {
			t.Error("no error")
		}
	})
}

func TestWatchdog(t *testing.T) {
	own := strconv.Itoa(os.Getpid())
	for name, test := range map[string]struct {
		usec, pid string
		want      time.Duration
		fails     bool
	}{
		"none":                {"", "", 0, false},
		"for this process":    {"60000000", own, time.Minute, false},
		"for whoever reads":   {"1500", "", 1500 * time.Microsecond, false},
		"for another process": {"60000000", "1", 0, false},
		"in words":            {"soon", own, 0, true},
		"never":               {"0", own, 0, true},
	} {
		t.Run(name, func(t *testing.T) {
			t.Setenv("WATCHDOG_USEC", test.usec)
			t.Setenv("WATCHDOG_PID", test.pid)
			got, err := Watchdog()
			if got != test.want || (err != nil) != test.fails {
				t.Errorf("got %v, %v, want %v", got, err, test.want)
			}
			if os.Getenv("WATCHDOG_USEC") != "" || os.Getenv("WATCHDOG_PID") != "" {
				t.Error("children still see the variables")
			}
		})
	}
}

func TestStatusIsOneLine(t *testing.T) {
	for name, test := range map[string]struct{ text, want string }{
		"plain":           {"serving 2 tokens", "serving 2 tokens"},
		"not ASCII":       {"Köln ✓", "Köln ✓"},
		"empty":           {"", ""},
		"line break":      {"card\nMAINPID=1", "card MAINPID=1"},
		"other controls":  {"a\r\x00\x1b[1m\u0085b", `a\x0d\x00\x1b[1m\x85b`},
		"not UTF-8":       {"a\xffb", "a\uFFFDb"},
		"as long as goes": {strings.Repeat("x", maxStatus), strings.Repeat("x", maxStatus)},
		"too long":        {strings.Repeat("x", maxStatus+1), strings.Repeat("x", maxStatus-3) + "…"},
		"cut in a letter": {strings.Repeat("é", maxStatus), strings.Repeat("é", (maxStatus-3)/2) + "…"},
	} {
		t.Run(name, func(t *testing.T) {
			read := manager(t)
			if err := Status(test.text); err != nil {
				t.Fatal(err)
			}
			got := read()
			if got != "STATUS="+test.want {
				t.Errorf("sent %q, want %q", got, test.want)
			}
			if !utf8.ValidString(got) {
				t.Errorf("%q is not UTF-8", got)
			}
		})
	}
}

func TestStderrIsJournal(t *testing.T) {
	info, err := os.Stderr.Stat()
	if err != nil {
		t.Fatal(err)
	}
	stat := info.Sys().(*syscall.Stat_t)
	for name, test := range map[string]struct {
		variable string
		want     bool
	}{
		"not said":        {"", false},
		"this file":       {fmt.Sprintf("%d:%d", stat.Dev, stat.Ino), true},
		"another file":    {fmt.Sprintf("%d:%d", stat.Dev, stat.Ino+1), false},
		"another device":  {fmt.Sprintf("%d:%d", stat.Dev+1, stat.Ino), false},
		"not two numbers": {"journal", false},
	} {
		t.Run(name, func(t *testing.T) {
			t.Setenv("JOURNAL_STREAM", test.variable)
			if got := StderrIsJournal(); got != test.want {
				t.Errorf("got %t with JOURNAL_STREAM=%s", got, test.variable)
			}
		})
	}
}
