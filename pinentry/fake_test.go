package pinentry

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"p11-agent/agent/door/doortest"
	"p11-agent/agent/peer/proctest"
	"p11-agent/agent/peer/terminaltest"
	"p11-agent/pinentry/procstat"
)

// The fake pinentry (and askpass) is this test program, run with
//
//	PINENTRY_USER_DATA="p11-fake SCENARIO DIR"
//
// It writes what it hears to DIR, one file for each process.
const fakeMark = "p11-fake"

func TestMain(m *testing.M) {
	if len(os.Args) == 2 && os.Args[1] == linePromptTest {
		exit(LinePrompt())
	}
	if words := strings.Fields(os.Getenv("PINENTRY_USER_DATA")); len(words) == 3 && words[0] == fakeMark {
		runFake(words[1], words[2])
		exit(0)
	}
	if name := filepath.Base(os.Args[0]); strings.HasPrefix(name, "pinentry") && !strings.Contains(name, ".test") || name == "askpass" {
		// This fake has no environment. If it ran the tests, it would start more
		// fakes, without end.
		fmt.Println("ERR 1 a fake without a scenario")
		exit(1)
	}
	os.Exit(terminaltest.Without(m).Run())
}

// fake is the state of a fake pinentry, for its scenario.
type fake struct {
	in   *bufio.Reader
	log  *os.File
	dir  string
	asks int  // the number of questions, with the present one
	one  bool // the question has one button
}

func (f *fake) say(format string, args ...any) { fmt.Printf(format, args...) }

// note makes a file that the test can see.
func (f *fake) note(name, text string) {
	tmp := filepath.Join(f.dir, "."+name)
	if err := errors.Join(os.WriteFile(tmp, []byte(text), 0o600), os.Rename(tmp, filepath.Join(f.dir, name))); err != nil {
		panic(err)
	}
}

// hang waits until a signal ends this process, or until the test ends.
func (f *fake) hang() {
	f.note("hanging-"+strconv.Itoa(os.Getpid()), "")
	var b [1]byte
	for parent := os.Getppid(); os.Getppid() == parent; {
		if _, err := os.Stdin.Read(b[:]); err != nil {
			time.Sleep(10 * time.Millisecond)
		}
	}
}

// exit leaves at once: os.Exit takes a second under the race detector.
func exit(status int) { _, _, _ = syscall.RawSyscall(syscall.SYS_EXIT_GROUP, uintptr(status), 0, 0) }

func (f *fake) ignoreTERM() { signal.Ignore(syscall.SIGTERM) }

func (f *fake) die(complaint string) {
	fmt.Fprint(os.Stderr, complaint)
	exit(1)
}

func runFake(name, dir string) {
	pid := strconv.Itoa(os.Getpid())
	log, err := os.OpenFile(filepath.Join(dir, "log-"+pid), os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o600)
	if err != nil {
		panic(err)
	}
	f := &fake{in: bufio.NewReader(os.Stdin), log: log, dir: dir}
	f.note("env-"+pid, strings.Join(os.Environ(), "\n"))
	f.note("args-"+pid, strings.Join(os.Args[1:], "\x00"))
	s, ok := scenarios[name]
	if !ok {
		panic("no scenario " + name)
	}
	if filepath.Base(os.Args[0]) == "askpass" {
		s.askpass(f)
		return
	}
	if s.start != nil {
		s.start(f)
	}
	f.say("OK Pleased to meet you\n")
	for {
		line, err := f.in.ReadString('\n')
		if err != nil {
			return
		}
		if _, err := log.WriteString(line); err != nil {
			panic(err)
		}
		word, rest, _ := strings.Cut(strings.TrimSuffix(line, "\n"), " ")
		switch word {
		case "BYE":
			f.say("OK closing connection\n")
			return
		case "GETPIN", "CONFIRM", "MESSAGE":
			f.asks++
			f.one = rest == "--one-button"
			if s.ask != nil {
				s.ask(f)
			} else {
				f.say("OK\n")
			}
		default:
			if s.other == nil || !s.other(f, word, rest) {
				f.say("OK\n")
			}
		}
	}
}

// A scenario is the behaviour of a fake. If a function is nil, the fake answers OK.
type scenario struct {
	start   func(*fake)                           // before the greeting
	ask     func(*fake)                           // to GETPIN, CONFIRM and MESSAGE
	other   func(f *fake, word, rest string) bool // to anything else; true when answered
	askpass func(*fake)
}

// says returns a scenario that answers questions with these lines.
func says(lines string) scenario {
	return scenario{ask: func(f *fake) { f.say("%s", lines) }}
}

// prints returns the behaviour of an askpass program: it prints out, and exits.
func prints(out string, status int) func(*fake) {
	return func(f *fake) {
		f.say("%s", out)
		exit(status)
	}
}

// stage has the fake of a test and its directory.
type stage struct {
	*Pinentry
	t     *testing.T
	place Place
	dir   string
}

// withAskpass sets the askpass program for the scenarios that need one.
func (s *stage) withAskpass(scenario string) {
	if strings.HasPrefix(scenario, "askpass-") {
		s.Askpass, s.place.Askpass = "askpass", true
	}
}

// newStage sets up a fake. At the end of the test, it checks for leaks.
func newStage(t *testing.T, scenario string) *stage {
	t.Helper()
	noLeaks(t)
	dir := doortest.Dir(t)
	exe, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	for _, name := range []string{"pinentry", "pinentry-tty", "askpass"} {
		if err := os.Symlink(exe, filepath.Join(dir, name)); err != nil {
			t.Fatal(err)
		}
	}
	return &stage{
		Pinentry: &Pinentry{Program: filepath.Join(dir, "pinentry"), Path: dir, Home: "/nonexistent"},
		t:        t,
		place:    Place{UserData: fakeMark + " " + scenario + " " + dir},
		dir:      dir,
	}
}

// logs makes the stage's log and returns what was written to it.
func (s *stage) logs() func() string {
	var b strings.Builder
	s.Log = slog.New(slog.NewTextHandler(&b, &slog.HandlerOptions{Level: slog.LevelDebug}))
	return b.String
}

func (s *stage) open(ctx context.Context) *Dialogue {
	s.t.Helper()
	d, err := s.Open(ctx, s.place)
	if err != nil {
		s.t.Fatalf("open: %v", err)
	}
	s.t.Cleanup(func() { _ = d.Close() })
	return d
}

// files returns the contents of the files whose names start with prefix, oldest
// process first as a rule.
func (s *stage) files(prefix string) []string {
	s.t.Helper()
	names, err := filepath.Glob(filepath.Join(s.dir, prefix+"*"))
	if err != nil {
		s.t.Fatal(err)
	}
	var all []string
	for _, name := range names {
		b, err := os.ReadFile(name)
		if err != nil {
			s.t.Fatal(err)
		}
		all = append(all, string(b))
	}
	return all
}

// heard returns the lines that the only fake has heard.
func (s *stage) heard() []string {
	s.t.Helper()
	all := s.files("log-")
	if len(all) != 1 {
		s.t.Fatalf("%d fakes were started, not one", len(all))
	}
	return strings.Split(strings.TrimSuffix(all[0], "\n"), "\n")
}

// hanging waits until n fakes hang and returns their process numbers.
func (s *stage) hanging(n int) []int {
	s.t.Helper()
	var pids []int
	proctest.Until(s.t, "a fake that hangs", func() bool {
		names, _ := filepath.Glob(filepath.Join(s.dir, "hanging-*"))
		pids = nil
		for _, name := range names {
			pid, _ := strconv.Atoi(strings.TrimPrefix(filepath.Base(name), "hanging-"))
			pids = append(pids, pid)
		}
		return len(pids) >= n
	})
	return pids
}

// noLeaks fails the test if it leaves a goroutine, a process, a file descriptor or a secret
// that is not wiped.
func noLeaks(t *testing.T) {
	t.Helper()
	// Descriptors that the runtime opens once do not count.
	_ = exec.Command("/nonexistent").Run()
	r, w, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	_ = errors.Join(r.SetDeadline(time.Time{}), r.Close(), w.Close())
	goroutines, fds, locked := runtime.NumGoroutine(), countFDs(t), lockedMemory(t)
	t.Cleanup(func() {
		if left := children(t); len(left) > 0 {
			t.Errorf("processes are left: %v", left)
		}
		// A goroutine that is done may need a moment to end.
		proctest.Until(t, "the end of every goroutine", func() bool {
			if runtime.NumGoroutine() <= goroutines {
				return true
			}
			runtime.Gosched()
			return false
		})
		if now := countFDs(t); now > fds {
			t.Errorf("%d file descriptors are left open", now-fds)
		}
		if now := lockedMemory(t); now != locked {
			t.Errorf("locked memory went from %q to %q: a secret is left", locked, now)
		}
	})
}

// lockedMemory returns the size of locked memory that the kernel reports. Every secret has
// its share.
func lockedMemory(t *testing.T) string {
	t.Helper()
	status, err := os.ReadFile("/proc/self/status")
	if err != nil {
		t.Fatal(err)
	}
	_, rest, _ := strings.Cut(string(status), "VmLck:")
	line, _, _ := strings.Cut(rest, "\n")
	return strings.TrimSpace(line)
}

func countFDs(t *testing.T) int {
	t.Helper()
	fds, err := os.ReadDir("/proc/self/fd")
	if err != nil {
		t.Fatal(err)
	}
	return len(fds)
}

// children lists the child processes of this one, zombies too.
func children(t *testing.T) []string {
	t.Helper()
	var found []string
	processes, _ := filepath.Glob("/proc/[0-9]*")
	for _, dir := range processes {
		pid, err := strconv.Atoi(filepath.Base(dir))
		if err != nil {
			t.Fatal(err)
		}
		if s, ok := procstat.Of(pid); ok && s.Parent == os.Getpid() {
			found = append(found, fmt.Sprintf("%d (%s) %c", pid, s.Name, s.State))
		}
	}
	return found
}

// gone tells whether a process has ended. A zombie has ended, too: its new parent may not
// have reaped it yet.
func gone(pid int) bool {
	s, ok := procstat.Of(pid)
	return !ok || s.State == 'Z'
}

// quick shortens the time that a program gets for leaving.
func quick(t *testing.T) {
	t.Helper()
	testOnlyGrace = 50 * time.Millisecond
	t.Cleanup(func() { testOnlyGrace = 0 })
}

func containsLine(lines []string, line string) bool { return slices.Contains(lines, line) }
