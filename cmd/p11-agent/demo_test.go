package main

import (
	"bufio"
	"bytes"
	"fmt"
	"io"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"syscall"
	"testing"

	"p11-agent/token/tokentest"
)

// The token of the demo, and the address in its commits.
const (
	demoToken = "p11-agent-demo"
	demoEmail = "demo@example.org"
)

// demoPrograms are the programs that the demo needs.
var demoPrograms = []string{"softhsm2-util", "pkcs11-tool", "ssh", "ssh-add", "ssh-keygen", "sshd", "git"}

// needPrograms skips a test if one of the programs is missing. In CI, it fails the test.
func needPrograms(t *testing.T, names ...string) {
	t.Helper()
	for _, name := range names {
		if _, err := lookPath(name); err != nil {
			if os.Getenv("CI") == "true" {
				t.Fatalf("%s is not installed", name)
			}
			t.Skipf("%s is not installed", name)
		}
	}
}

// A demoWorld is the environment of a demo.
type demoWorld struct {
	home, tmp string
	path      string // PATH
}

func newDemoWorld(t *testing.T) *demoWorld {
	t.Helper()
	dir := tokentest.TempDir(t) // short, because sockets are in it
	w := &demoWorld{home: filepath.Join(dir, "h"), tmp: filepath.Join(dir, "t"), path: os.Getenv("PATH")}
	if err := os.Mkdir(w.tmp, 0o700); err != nil {
		t.Fatal(err)
	}
	for _, name := range strings.Fields(demoHome) {
		file := filepath.Join(w.home, name)
		if err := os.MkdirAll(filepath.Dir(file), 0o700); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(file, []byte(notRead), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	return w
}

// The files of a home directory, in the order of their names. No program accepts their text.
const (
	demoHome = ".config/p11-agent/config.toml .gitconfig .ssh/config .ssh/known_hosts p11-agent/config.toml"
	notRead  = "[not to be read\n"
)

// only makes PATH a directory with only these programs. For a program in replace, the directory
// has a script.
func (w *demoWorld) only(t *testing.T, replace map[string]string, names ...string) {
	t.Helper()
	bin := filepath.Join(filepath.Dir(w.tmp), "bin")
	if err := os.Mkdir(bin, 0o700); err != nil {
		t.Fatal(err)
	}
	for _, name := range names {
		path, err := lookPath(name)
		if err == nil {
			err = os.Symlink(path, filepath.Join(bin, name))
		}
		if err != nil {
			t.Fatal(err)
		}
	}
	for name, script := range replace {
		if err := os.WriteFile(filepath.Join(bin, name), []byte("#!/bin/sh\n"+script+"\n"), 0o700); err != nil {
			t.Fatal(err)
		}
	}
	w.path = bin
}

// command returns the command of a demo.
func (w *demoWorld) command(t *testing.T, args ...string) *exec.Cmd {
	t.Helper()
	program, err := exec.LookPath("p11-agent") // the program of testscript
	if err != nil {
		t.Fatal(err)
	}
	cmd := exec.CommandContext(t.Context(), program, append([]string{"demo"}, args...)...)
	cmd.Args[0] = "p11-agent"
	// An agent, a terminal and git variables of the user must not matter.
	cmd.Env = []string{
		"HOME=" + w.home, "TMPDIR=" + w.tmp, "PATH=" + w.path, "SSH_AUTH_SOCK=" + filepath.Join(w.home, "agent.sock"),
		"GPG_TTY=/dev/null", "GIT_DIR=" + filepath.Join(w.home, "repo"), "XDG_CONFIG_HOME=" + w.home,
	}
	return cmd
}

// start starts a demo, and returns the ends of its output.
func (w *demoWorld) start(t *testing.T) (cmd *exec.Cmd, stdout io.ReadCloser, stderr *bytes.Buffer) {
	t.Helper()
	cmd, stderr = w.command(t), new(bytes.Buffer)
	cmd.Stderr = stderr
	stdout, err := cmd.StdoutPipe()
	if err == nil {
		err = cmd.Start()
	}
	if err != nil {
		t.Fatal(err)
	}
	return cmd, stdout, stderr
}

// run runs a demo to its end.
func (w *demoWorld) run(t *testing.T, args ...string) (stdout, stderr string, status int) {
	t.Helper()
	cmd := w.command(t, args...)
	var out, errs bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &errs
	if err := cmd.Run(); cmd.ProcessState == nil {
		t.Fatal(err)
	}
	return out.String(), errs.String(), cmd.ProcessState.ExitCode()
}

// untouched fails the test if HOME has changed.
func (w *demoWorld) untouched(t *testing.T) {
	t.Helper()
	var names []string
	err := filepath.WalkDir(w.home, func(path string, e fs.DirEntry, err error) error {
		if err != nil || e.IsDir() {
			return err
		}
		names = append(names, strings.TrimPrefix(path, w.home+"/"))
		if b, err := os.ReadFile(path); err != nil || string(b) != notRead {
			t.Errorf("%s was changed (%v)", path, err)
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	if got := strings.Join(names, " "); got != demoHome {
		t.Errorf("the home directory holds %s, want %s", got, demoHome)
	}
}

// removed fails the test if a file of the demo is left.
func (w *demoWorld) removed(t *testing.T) {
	t.Helper()
	left, err := os.ReadDir(w.tmp)
	if err != nil {
		t.Fatal(err)
	}
	for _, e := range left {
		t.Errorf("%s is left", e)
	}
	w.ended(t)
}

// ended fails the test if processes of the demo do not end. Their arguments or their environment
// name the directory. The terminal server ends a moment after its request to end.
func (w *demoWorld) ended(t *testing.T) {
	t.Helper()
	if err := eventually(func() error {
		processes, err := filepath.Glob("/proc/[0-9]*")
		if err != nil {
			return err
		}
		for _, p := range processes {
			for _, name := range []string{"cmdline", "environ"} {
				// A process may have ended, or belong to another user.
				b, _ := os.ReadFile(filepath.Join(p, name))
				if bytes.Contains(b, []byte(w.tmp)) {
					return fmt.Errorf("process %s is left: %q", p, b)
				}
			}
		}
		return nil
	}); err != nil {
		t.Error(err)
	}
}

var demoSummary = regexp.MustCompile(`\n(\d+) passed, (\d+) failed\n$`)

// summary returns the numbers of the last line.
func summary(t *testing.T, out string) (passed, failed string) {
	t.Helper()
	m := demoSummary.FindStringSubmatch(out)
	if m == nil {
		t.Fatalf("the demo does not end with its summary:\n%s", out)
	}
	return m[1], m[2]
}

// TestDemo runs the whole demo, with a real prompt. The demo leaves nothing.
func TestDemo(t *testing.T) {
	t.Parallel()
	needPrograms(t, append(demoPrograms, "tmux", "pinentry-curses")...)
	w := newDemoWorld(t)
	out, stderr, status := w.run(t)
	if _, failed := summary(t, out); failed != "0" || status != 0 || stderr != "" {
		t.Errorf("%s failed, exit status %d, on stderr: %q\n%s", failed, status, stderr, out)
	}
	for _, part := range []string{`Enter the PIN of token "` + demoToken + `"`, "Token: " + demoToken, " at demo (host verified)"} {
		if strings.Count(out, part) != 1 {
			t.Errorf("the prompt is to show %q, once:\n%s", part, out)
		}
	}
	if n := strings.Count(out, "\n    logged in\n"); n != 4 {
		t.Errorf("%d logins of 4 have worked", n)
	}
	if n := strings.Count(out, `Good "git" signature for `+demoEmail); n != 4 {
		t.Errorf("%d commits of 4 were verified", n)
	}
	w.untouched(t)
	w.removed(t)
}

// TestDemoKeep runs a demo with --keep and without a terminal. Then it uses the kept files as the
// demo describes.
func TestDemoKeep(t *testing.T) {
	t.Parallel()
	needPrograms(t, demoPrograms...)
	w := newDemoWorld(t)
	w.only(t, nil, append(demoPrograms, "sh", "cat", "mkdir")...)
	out, stderr, status := w.run(t, "--keep")
	if _, failed := summary(t, out); failed != "0" || status != 0 || stderr != "" {
		t.Errorf("%s failed, exit status %d, on stderr: %q\n%s", failed, status, stderr, out)
	}
	if strings.Contains(out, "The terminal shows:") || !strings.Contains(out, "SSH_ASKPASS") {
		t.Errorf("the demo does not say that it shows no prompt:\n%s", out)
	}
	w.untouched(t)
	w.ended(t)

	m := regexp.MustCompile(`(?m)^    (\. .*/env\.sh\n    p11-agent list)$`).FindStringSubmatch(out)
	if m == nil {
		t.Fatalf("the demo does not say how to go on:\n%s", out)
	}
	cmd := exec.CommandContext(t.Context(), "/bin/sh", "-c", m[1])
	cmd.Env = []string{"PATH=" + w.path}
	listed, err := cmd.CombinedOutput()
	if n := bytes.Count(listed, []byte("can sign\n")); err != nil || n != 2 {
		t.Errorf("%s: %v\n%s", m[1], err, listed)
	}
}

// TestDemoFailure runs a demo in which git fails. The demo reports that, continues without git, and
// ends with status 1.
func TestDemoFailure(t *testing.T) {
	t.Parallel()
	needPrograms(t, demoPrograms...)
	w := newDemoWorld(t)
	w.only(t, map[string]string{"git": `case "$*" in *commit*) echo broken >&2; exit 3;; esac; exit 0`},
		"softhsm2-util", "pkcs11-tool", "ssh", "ssh-add", "ssh-keygen", "sshd", "sh", "cat", "mkdir")
	out, stderr, status := w.run(t)
	if _, failed := summary(t, out); failed != "4" || status != 1 || stderr != "" {
		t.Errorf("%s failed, exit status %d, on stderr: %q\n%s", failed, status, stderr, out)
	}
	for part, want := range map[string]int{
		"\n    broken\nFAILED: exit status 3\n": 4, "\n    logged in\n": 4, "\nThe end of agent.log:\n": 1, "\nThe end of sshd.log:\n": 1,
	} {
		if n := strings.Count(out, part); n != want {
			t.Errorf("%q comes %d times, want %d:\n%s", part, n, want, out)
		}
	}
	w.removed(t)
}

// TestDemoInterrupted interrupts demos at places where different programs run.
func TestDemoInterrupted(t *testing.T) {
	for name, place := range map[string]string{
		"while a key is made": "$ pkcs11-tool ",
		"while tmux starts":   "$ tmux ",
		"while ssh waits":     "The terminal shows:",
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			needPrograms(t, append(demoPrograms, "tmux", "pinentry-curses")...)
			w := newDemoWorld(t)
			cmd, stdout, stderr := w.start(t)
			seen, interrupted := "", false
			lines := bufio.NewScanner(stdout)
			for lines.Scan() {
				seen += lines.Text() + "\n"
				if !interrupted && strings.HasPrefix(lines.Text(), place) {
					interrupted = true
					if err := cmd.Process.Signal(syscall.SIGINT); err != nil {
						t.Error(err)
					}
				}
			}
			_ = cmd.Wait() // its status is looked at
			if status := cmd.ProcessState.ExitCode(); !interrupted || status != 1 || stderr.String() != "p11-agent: error: the demo was interrupted\n" {
				t.Errorf("interrupted %t, exit status %d, on stderr: %q\n%s", interrupted, status, stderr, seen)
			}
			if strings.Contains(seen, "FAILED") || strings.Contains(seen, " passed, ") {
				t.Errorf("an interruption is no failure:\n%s", seen)
			}
			w.removed(t)
		})
	}
}

// TestDemoUnread runs a demo whose reader ends early, as with "| head".
func TestDemoUnread(t *testing.T) {
	t.Parallel()
	needPrograms(t, append(demoPrograms, "tmux", "pinentry-curses")...)
	w := newDemoWorld(t)
	cmd, stdout, stderr := w.start(t)
	for lines := bufio.NewScanner(stdout); lines.Scan() && !strings.HasPrefix(lines.Text(), "$ tmux "); {
	}
	if err := stdout.Close(); err != nil {
		t.Error(err)
	}
	_ = cmd.Wait() // its status is looked at
	if status := cmd.ProcessState.ExitCode(); status != 1 || stderr.String() != "p11-agent: error: the demo was interrupted\n" {
		t.Errorf("exit status %d, on stderr: %q", status, stderr)
	}
	w.removed(t)
}

// TestDemoMissing runs a demo without programs. The demo reports that at once.
func TestDemoMissing(t *testing.T) {
	t.Parallel()
	w := newDemoWorld(t)
	w.only(t, nil)
	out, stderr, status := w.run(t)
	if status != 1 || out != "" || !strings.Contains(stderr, `run "make deps-demo"`) {
		t.Errorf("exit status %d, on stdout: %q, on stderr: %q", status, out, stderr)
	}
	for _, name := range demoPrograms {
		if name != "sshd" && !strings.Contains(stderr, name) { // the demo looks for sshd in other places too
			t.Errorf("%s is not named: %s", name, stderr)
		}
	}
	w.removed(t)
}
