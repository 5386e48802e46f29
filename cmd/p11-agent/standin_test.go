package main

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"p11-agent/agent/peer/terminaltest"
	"p11-agent/token/tokentest"
)

// A standIn is a directory in which p11-agent has the name of ssh-agent, or another name.
type standIn struct {
	t       *testing.T
	dir     string // HOME, and the current directory
	program string // the agent, with that name
	env     []string
}

func newStandIn(t *testing.T, name string) *standIn {
	t.Helper()
	dir := tokentest.TempDir(t)
	s := &standIn{t: t, dir: dir, program: filepath.Join(dir, "bin", name)}
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	if name == "p11-agent" {
		if self, err = exec.LookPath(name); err != nil {
			t.Fatal(err)
		}
	}
	config := filepath.Join(dir, "config.toml")
	for _, err := range []error{
		os.Mkdir(filepath.Dir(s.program), 0o700), os.Symlink(self, s.program), os.Mkdir(s.path("run"), 0o700), os.Mkdir(s.path("tmp"), 0o700),
		os.MkdirAll(s.path(".config/p11-agent"), 0o700), os.WriteFile(config, []byte("keys = []\n"), 0o600),
		os.Symlink(config, s.path(".config/p11-agent/config.toml")),
	} {
		if err != nil {
			t.Fatal(err)
		}
	}
	s.env = []string{
		"HOME=" + dir, "XDG_RUNTIME_DIR=" + s.path("run"), "XDG_CONFIG_HOME=" + s.path(".config"), "TMPDIR=" + s.path("tmp"),
		"PATH=" + os.Getenv("PATH"), "SHELL=/bin/sh", "GORACE=atexit_sleep_ms=0",
	}
	return s
}

func (s *standIn) path(name string) string { return filepath.Join(s.dir, name) }

// command returns a command that starts the agent.
func (s *standIn) command(args ...string) *exec.Cmd {
	if filepath.Base(s.program) == "p11-agent" {
		args = append([]string{"agent"}, args...)
	}
	cmd := exec.Command(s.program, args...)
	cmd.Env, cmd.Dir = s.env, s.dir
	return cmd
}

// A standing is a running agent that has printed its address.
type standing struct {
	socket   string
	pid      int
	process  *process
	warnings string
	ended    sync.Once
}

// end ends the agent. Further calls do nothing.
func (a *standing) end(t *testing.T) {
	t.Helper()
	a.ended.Do(func() {
		if err := a.process.end(); err != nil {
			t.Errorf("end the agent: %v", err)
		}
	})
}

// background starts an agent in the background. The agent ends with the test.
func (s *standIn) background(args ...string) *standing {
	s.t.Helper()
	cmd := s.command(append([]string{"-s"}, args...)...)
	var out, warnings bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &warnings
	if err := cmd.Run(); err != nil {
		s.t.Fatalf("%v: %s", err, &warnings)
	}
	return s.adopt(out.String(), warnings.String())
}

func (s *standIn) adopt(out, warnings string) *standing {
	s.t.Helper()
	socket, pid := socketLine.FindStringSubmatch(out), pidLine.FindStringSubmatch(out)
	if socket == nil || pid == nil {
		s.t.Fatalf("this does not tell where an agent is: %q", out)
	}
	a := &standing{socket: socket[1], warnings: warnings}
	var err error
	if a.pid, err = strconv.Atoi(pid[1]); err == nil {
		a.process, err = openProcess(a.pid)
	}
	if err != nil {
		s.t.Fatal(err)
	}
	s.t.Cleanup(func() { a.end(s.t) })
	return a
}

// keys returns the number of keys of an agent.
func (s *standIn) keys(a *standing) int {
	s.t.Helper()
	r := &rig{t: s.t, socket: a.socket}
	r.connect()
	keys, err := r.client.List()
	if err != nil {
		s.t.Fatal(err)
	}
	return len(keys)
}

// SIGUSR1 makes the agent remove all keys, also while the agent is locked.
func TestKeyDrop(t *testing.T) {
	s := newStandIn(t, "ssh-agent")
	a := s.background()
	k := newBehaviourPairs(t)
	for _, locked := range []bool{false, true} {
		r := &rig{t: t, socket: a.socket}
		r.connect()
		if err := r.client.Add(k.ed.added("a key")); err != nil {
			t.Fatal(err)
		}
		if locked {
			if err := r.client.Lock([]byte("a")); err != nil {
				t.Fatal(err)
			}
		}
		if err := unix.Kill(a.pid, unix.SIGUSR1); err != nil {
			t.Fatal(err)
		}
		if err := eventually(func() error {
			if locked {
				if b, err := os.ReadFile(s.path(".local/state/p11-agent/agent.log")); err != nil || bytes.Count(b, []byte("SIGUSR1")) < 2 {
					return errors.New("the log does not have it")
				}
				return nil
			}
			if n := s.keys(a); n > 0 {
				return fmt.Errorf("it has %d keys", n)
			}
			return nil
		}); err != nil {
			t.Fatal(err)
		}
		if locked {
			if err := r.client.Unlock([]byte("a")); err != nil {
				t.Errorf("it is not locked any more: %v", err)
			}
			if n := s.keys(a); n != 0 {
				t.Errorf("it has %d keys", n)
			}
		}
	}
}

// The agent keeps no open file of its starter. Its process has the name of the program.
func TestInheritsNothing(t *testing.T) {
	for _, name := range []string{"ssh-agent", "p11-agent"} {
		for _, args := range [][]string{{"-s"}, {"-D"}} {
			t.Run(name+" "+args[0], func(t *testing.T) {
				s := newStandIn(t, name)
				cmd := s.command(args...)
				end, theirs, err := os.Pipe()
				if err != nil {
					t.Fatal(err)
				}
				defer end.Close()
				for range 8 { // descriptors 3 to 10
					cmd.ExtraFiles = append(cmd.ExtraFiles, theirs)
				}
				out, err := cmd.StdoutPipe()
				if err != nil {
					t.Fatal(err)
				}
				if err := cmd.Start(); err != nil {
					t.Fatal(err)
				}
				_ = theirs.Close()
				said := make([]byte, 1<<10)
				n := 0
				for err == nil && !strings.Contains(string(said[:n]), "Agent pid") {
					var more int
					more, err = out.Read(said[n:])
					n += more
				}
				a := s.adopt(string(said[:n]), "")
				if args[0] == "-s" {
					if err := cmd.Wait(); err != nil {
						t.Error(err)
					}
				} else {
					defer func() {
						a.end(t)
						_ = cmd.Wait() // a signal ends the agent
					}()
				}
				// A read meets the end of the file when no process holds the other end open.
				if err := end.SetReadDeadline(time.Now().Add(patience)); err != nil {
					t.Fatal(err)
				}
				if _, err := end.Read(make([]byte, 1)); !errors.Is(err, io.EOF) {
					t.Errorf("a pipe of the starter is open: %v", err)
				}
				comm, err := os.ReadFile(fmt.Sprintf("/proc/%d/comm", a.pid))
				if err != nil || string(comm) != name+"\n" {
					t.Errorf("the process is called %q, %v", comm, err)
				}
				line, err := os.ReadFile(fmt.Sprintf("/proc/%d/cmdline", a.pid))
				if first, _, _ := strings.Cut(string(line), "\x00"); err != nil || filepath.Base(first) != name {
					t.Errorf("it was called by %q, %v", first, err)
				}
				s.keys(a)
			})
		}
	}
}

// With the name of ssh-agent, each start makes a new agent, also if several start at once. Each
// agent removes its directory at its end.
func TestSecondAgent(t *testing.T) {
	s := newStandIn(t, "ssh-agent")
	const n = 3
	sockets := make(map[string]bool)
	outs := make(chan string, n)
	for range n {
		go func() {
			out, err := s.command("-s").Output()
			if err != nil {
				t.Error(err)
			}
			outs <- string(out)
		}()
	}
	var all []*standing
	for range n {
		a := s.adopt(<-outs, "")
		if info, err := os.Stat(a.socket); err != nil || info.Mode() != os.ModeSocket|0o600 {
			t.Errorf("%s: %v", a.socket, err)
		}
		sockets[a.socket] = true
		s.keys(a)
		all = append(all, a)
	}
	if !sockets[s.path("run/p11-agent/agent.sock")] || len(sockets) != n {
		t.Errorf("the sockets are %v", sockets)
	}
	for _, a := range all {
		a.end(t)
	}
	if left, err := filepath.Glob(s.path("run/p11-agent-*")); err != nil || len(left) > 0 {
		t.Errorf("left over: %q, %v", left, err)
	}
	// With its own name, p11-agent reports the agent that is in the way.
	s.background()
	cmd := newStandIn(t, "p11-agent").command("-s")
	cmd.Env = s.env
	if out, err := cmd.CombinedOutput(); err == nil || !strings.Contains(string(out), "already listening") {
		t.Errorf("%v, %s", err, out)
	}
}

// If the agent cannot use a directory of the environment, it prints a warning.
func TestNoPlace(t *testing.T) {
	foreign := "/"
	if os.Geteuid() == 0 {
		foreign = tokentest.TempDir(t)
		if err := os.Chown(foreign, 65534, 65534); err != nil {
			t.Fatal(err)
		}
	}
	const nowhere = "/proc/nowhere"
	for _, test := range []struct {
		name, home, run string
		in              string // the socket is below this directory
		warnings        []string
	}{
		{"no home", nowhere, "run", "run", []string{nowhere, "open the log"}},
		{"no runtime directory", "", nowhere, ".local/state", []string{nowhere, "XDG_RUNTIME_DIR"}},
		{"another user's runtime directory", "", foreign, ".local/state", []string{"not a directory of this user"}},
		{"relative runtime directory", "", "./run", ".local/state", []string{"not a directory of this user"}},
		{"neither", nowhere, foreign, "tmp", []string{"not a directory of this user", "a module could", "open the log"}},
		{"no home, and none wanted", nowhere, "", "tmp", []string{"a module could", "open the log"}},
		{"all is well", "", "run", "run", nil},
	} {
		for _, name := range []string{"ssh-agent", "p11-agent"} {
			for _, command := range [][]string{nil, {"-D"}, {"sh", "-c", "echo SSH_AUTH_SOCK=$SSH_AUTH_SOCK\\;; echo echo Agent pid $SSH_AGENT_PID\\;; read _"}} {
				if name == "p11-agent" && command != nil {
					continue // one case is enough for p11-agent
				}
				t.Run(test.name+", "+name+" "+strings.Join(command, " ")[:min(2, len(strings.Join(command, " ")))], func(t *testing.T) {
					t.Parallel()
					s := newStandIn(t, name)
					home, run := test.home, test.run
					if home == "" {
						home = s.dir
					}
					if run != "" && !strings.ContainsAny(run, "./") {
						run = s.path(run)
					}
					s.env = append(s.env, "HOME="+home, "XDG_RUNTIME_DIR="+run)
					var a *standing
					if command == nil {
						a = s.background()
					} else {
						a = s.follow(command)
					}
					if !strings.HasPrefix(a.socket, s.path(test.in)+"/") {
						t.Errorf("the socket is %s", a.socket)
					}
					s.keys(a)
					if command != nil && command[0] == "-D" {
						return // the log goes to the same stream
					}
					for _, want := range test.warnings {
						if !strings.Contains(a.warnings, want) {
							t.Errorf("no warning has %q: %s", want, a.warnings)
						}
					}
					if n := strings.Count(a.warnings, "p11-agent: warning:"); n != strings.Count(a.warnings, "\n") || (n > 0) != (len(test.warnings) > 0) {
						t.Errorf("warnings: %s", a.warnings)
					}
					a.end(t)
					if _, err := os.Lstat(a.socket); !errors.Is(err, os.ErrNotExist) {
						t.Errorf("the socket is left: %v", err)
					}
					if left, err := filepath.Glob(s.path("tmp/*")); err != nil || len(left) > 0 {
						t.Errorf("left over: %q, %v", left, err)
					}
				})
			}
		}
	}
}

// follow starts an agent that stays in the foreground, or the agent of a command.
func (s *standIn) follow(args []string) *standing {
	s.t.Helper()
	cmd := s.command(args...)
	stay, err := cmd.StdinPipe()
	if err != nil {
		s.t.Fatal(err)
	}
	out, err := cmd.StdoutPipe()
	if err != nil {
		s.t.Fatal(err)
	}
	warnings, err := os.Create(s.path("warnings"))
	if err != nil {
		s.t.Fatal(err)
	}
	defer warnings.Close()
	cmd.Stderr = warnings
	if err := cmd.Start(); err != nil {
		s.t.Fatal(err)
	}
	s.t.Cleanup(func() {
		_ = stay.Close()
		_ = cmd.Wait() // the status of the command does not matter
	})
	var said []byte
	for !strings.Contains(string(said), "Agent pid") && err == nil {
		b := make([]byte, 1<<10)
		var n int
		n, err = out.Read(b)
		said = append(said, b[:n]...)
	}
	text, err := os.ReadFile(warnings.Name())
	if err != nil {
		s.t.Fatal(err)
	}
	return s.adopt(string(said), string(text))
}

// A person may name a socket in a sticky directory of root, such as /tmp.
func TestStickyDirectory(t *testing.T) {
	s := newStandIn(t, "ssh-agent")
	dir, err := os.MkdirTemp("/tmp", "p11")
	if err != nil {
		t.Fatal(err)
	}
	socket := dir + ".sock" // in /tmp itself
	defer os.RemoveAll(dir)
	a := s.background("-a", socket)
	if a.socket != socket || !strings.Contains(a.warnings, "others may write to") {
		t.Errorf("%+v", a)
	}
	if info, err := os.Stat(socket); err != nil || info.Mode() != os.ModeSocket|0o600 {
		t.Errorf("%v, %v", info, err)
	}
	s.keys(a)
	// A second agent does not take the place of the first.
	if out, err := s.command("-a", socket).CombinedOutput(); err == nil || !strings.Contains(string(out), "already listening") {
		t.Errorf("%v, %s", err, out)
	}
	a.end(t)
	if _, err := os.Lstat(socket); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("the socket is left: %v", err)
	}
}

// The flags of ssh-agent refuse wrong values.
func TestRefusedFlags(t *testing.T) {
	s := newStandIn(t, "ssh-agent")
	for _, args := range [][]string{
		{"-P", "/a", "-P", "/b"}, {"-P", "", "-P", ""}, {"-t", ""}, {"-t", "10s5"}, {"-t", "5s5s"}, {"-t", "1h-1"}, {"-t", "x"}, {"-t", "1.5h"}, {"-O", "x"},
	} {
		if out, err := s.command(append(args, "true")...).CombinedOutput(); err == nil {
			t.Errorf("%q is taken: %s", args, out)
		}
	}
	for _, args := range [][]string{{"-P", ""}, {"-t", "0"}, {"-t", "1h5"}, {"-t", "1w2D3h4M5S"}, {"-O", "websafe-allow=x"}, {"-O", "no-restrict-websafe"}} {
		if out, err := s.command(append(args, "true")...).CombinedOutput(); err != nil {
			t.Errorf("%q is refused: %v, %s", args, err, out)
		}
	}
	// An empty list allows nothing.
	module := tokentest.Module(t, "libsofthsm2.so")
	if module == "" {
		return
	}
	a := s.background("-P", "")
	r := &rig{t: t, socket: a.socket}
	r.connect()
	r.ask("add", 20, module, "")
	if r.said.String() != "add: answer 5\n" {
		t.Errorf("%s", &r.said)
	}
	if b, err := os.ReadFile(s.path(".local/state/p11-agent/agent.log")); err != nil || !bytes.Contains(b, []byte("not allowed")) && !bytes.Contains(b, []byte("allow")) {
		t.Errorf("the log has %s, %v", b, err)
	}
}

// An agent in the foreground ends with its terminal, as ssh-agent does.
func TestEndsWithTerminal(t *testing.T) {
	needPrograms(t, "bash", "nohup")
	for _, test := range []struct {
		name, script string
		reread, stay bool
	}{
		{name: "in front", script: `exec "$0" -D -a "$1" >"$2"`},
		{name: "in front, for debugging", script: `exec "$0" -d -a "$1" >"$2" 2>log`},
		{name: "child of a shell", script: `"$0" -D -a "$1" >"$2"; true`},
		{name: "job of a shell", script: `set -m; "$0" -D -a "$1" >"$2" 2>log </dev/null & trap 'kill -HUP $!; exit' HUP; while :; do wait; done`},
		{name: "after SIGHUP while the terminal was there", script: `exec "$0" -D -a "$1" >"$2" 2>log`, reread: true},
		{name: "with nohup", script: `exec nohup "$0" -D -a "$1" >"$2" 2>log`, stay: true},
	} {
		t.Run(test.name, func(t *testing.T) {
			t.Parallel()
			s := newStandIn(t, "ssh-agent")
			master, slave := terminaltest.New(t)
			socket, said := s.path("s"), s.path("said")
			cmd := exec.Command("bash", "-c", test.script, s.program, socket, said)
			cmd.Env, cmd.Dir = s.env, s.dir
			cmd.Stdin, cmd.Stdout, cmd.Stderr = slave, slave, slave
			cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true, Setctty: true}
			if err := cmd.Start(); err != nil {
				t.Fatal(err)
			}
			t.Cleanup(func() {
				_ = cmd.Process.Kill()
				_ = cmd.Wait() // the test has killed it
			})
			_ = slave.Close()
			var out []byte
			if err := eventually(func() (err error) {
				if out, err = os.ReadFile(said); err == nil && !bytes.Contains(out, []byte("Agent pid")) {
					err = errors.New("it does not say where it is")
				}
				return err
			}); err != nil {
				t.Fatal(err)
			}
			a := s.adopt(string(out), "")
			reread := func() {
				t.Helper()
				if err := unix.Kill(a.pid, unix.SIGHUP); err != nil {
					t.Fatal(err)
				}
				if err := eventually(func() error {
					if b, err := os.ReadFile(s.path("log")); err != nil || !bytes.Contains(b, []byte("read again")) {
						return errors.New("it has not read its configuration again")
					}
					return nil
				}); err != nil {
					t.Fatal(err)
				}
				s.keys(a)
			}
			if test.reread {
				reread()
			}
			_ = master.Close() // as if the person closed the window
			if test.stay {
				reread()
				return
			}
			if err := a.process.wait(patience); err != nil {
				t.Fatal(err)
			}
			if _, err := os.Lstat(socket); !errors.Is(err, os.ErrNotExist) {
				t.Errorf("its socket is left: %v", err)
			}
		})
	}
}

// If no process reads the log any more, the agent does not end.
func TestLogWithoutReader(t *testing.T) {
	s := newStandIn(t, "ssh-agent")
	cmd := s.command("-D", "-a", s.path("s"))
	reader, writer, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	cmd.Stderr = writer
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	_, _ = writer.Close(), reader.Close()
	t.Cleanup(func() { _ = cmd.Wait() })
	said := make([]byte, 1<<10)
	n, err := io.ReadAtLeast(out, said, len("SSH_AUTH_SOCK=; export SSH_AUTH_SOCK;\necho Agent pid 1;\n")+len(s.path("s")))
	if err != nil {
		t.Fatal(err)
	}
	a := s.adopt(string(said[:n]), "")
	r := &rig{t: t, socket: a.socket}
	r.connect()
	r.ask("nonsense", 240) // the agent logs this
	if n := s.keys(a); n != 0 || r.said.String() != "nonsense: answer 5\n" {
		t.Errorf("%d keys, %s", n, &r.said)
	}
}
