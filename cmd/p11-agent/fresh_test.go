package main

import (
	"bytes"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"testing"

	"p11-agent/token/tokentest"
)

// freshSystem is a terminal of a new user on a fresh system: see testdata/fresh.
type freshSystem struct {
	t        *testing.T
	dir      string
	home     string
	commands int    // the number of typed commands
	host     string // the password of the user there
}

// startFresh opens the terminal. The home directory has the content of files.
func startFresh(t *testing.T, files fs.FS) *freshSystem {
	t.Helper()
	needFresh(t, "unshare", "ip", "tmux", "sshd", "ssh", "ssh-keygen", "ssh-copy-id", "ssh-add", "git", "openssl", "softhsm2-util", "make", "scdoc")
	f := &freshSystem{t: t, dir: tokentest.TempDir(t), host: "swordfish-7"}
	f.home = filepath.Join(f.dir, "home")
	if err := errors.Join(os.Mkdir(f.home, 0o700), os.CopyFS(f.home, files)); err != nil {
		t.Fatal(err)
	}
	for name, text := range map[string]string{
		"password": f.host + "\n", "rc": `PS1='ready \# after $?> '` + "\n",
	} {
		if err := os.WriteFile(filepath.Join(f.dir, name), []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	cmd := exec.Command("bash", filepath.Join("testdata", "fresh", "fresh.sh"), f.dir)
	cmd.Env = os.Environ()
	for _, name := range []string{"GOROOT", "GOCACHE", "GOMODCACHE"} {
		out, err := exec.Command("go", "env", name).Output()
		if err != nil {
			t.Fatal(err)
		}
		cmd.Env = append(cmd.Env, name+"="+strings.TrimSpace(string(out)))
	}
	var said bytes.Buffer
	cmd.Stdout, cmd.Stderr = &said, &said
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		_ = cmd.Process.Kill() // and with it all processes in its namespaces
		_ = cmd.Wait()
		if t.Failed() {
			log, _ := os.ReadFile(filepath.Join(f.dir, "host", "log"))
			agent, _ := os.ReadFile(filepath.Join(f.home, ".local/state/p11-agent/agent.log"))
			t.Logf("the system says: %s\nsshd says: %s\nthe agent says: %s", &said, log, agent)
		}
	})
	f.see(`^ready 1 after 0> $`)
	return f
}

// needFresh skips a test if the machine cannot make namespaces, or lacks a program. In CI, it fails
// the test.
func needFresh(t *testing.T, programs ...string) {
	t.Helper()
	missing := ""
	if out, err := exec.Command("unshare", "--user", "--map-root-user", "--mount", "--net", "--pid", "--fork", "--mount-proc",
		"unshare", "--user", "--map-user=1000", "--map-group=1000", "true").CombinedOutput(); err != nil {
		missing = "namespaces cannot be made here: " + strings.TrimSpace(string(out))
	}
	skipWithout(t, missing, programs)
}

// skipWithout skips a test if something is missing on the machine, or if it lacks a program. In CI,
// it fails the test.
func skipWithout(t *testing.T, missing string, programs []string) {
	t.Helper()
	for _, program := range programs {
		if _, err := lookPath(program); err != nil {
			missing = program + " is not installed"
		}
	}
	if missing == "" {
		return
	}
	if os.Getenv("CI") == "true" {
		t.Fatal(missing)
	}
	t.Skip(missing)
}

func (f *freshSystem) tmux(args ...string) ([]byte, error) {
	return exec.Command("tmux", append([]string{"-S", filepath.Join(f.dir, "tmux")}, args...)...).CombinedOutput()
}

// screen returns the whole text of the terminal, and joins wrapped lines.
func (f *freshSystem) screen() string {
	out, _ := f.tmux("capture-pane", "-p", "-J", "-S", "-") // the session may not exist yet
	text := strings.TrimRight(string(out), "\n")
	// Blanks at the end of a line are padding, except in the last line.
	return regexp.MustCompile(`(?m) +\n`).ReplaceAllString(text+"\n", "\n")
}

// see waits until the text of the terminal matches, and returns the text.
func (f *freshSystem) see(pattern string) string {
	f.t.Helper()
	want := regexp.MustCompile("(?m)" + strings.TrimSuffix(strings.ReplaceAll(pattern, "> $", ">$"), " $"))
	text := ""
	if err := eventually(func() error {
		if text = f.screen(); !want.MatchString(text) {
			return errors.New("it is not there")
		}
		return nil
	}); err != nil {
		f.t.Fatalf("the terminal never shows %q:\n%s", pattern, text)
	}
	return text
}

// begin types a command, and does not wait for its end.
func (f *freshSystem) begin(line string) {
	f.t.Helper()
	f.commands++
	f.keys(line)
}

// keys types a line.
func (f *freshSystem) keys(line string) {
	f.t.Helper()
	for _, args := range [][]string{{"send-keys", "-l", "--", line}, {"send-keys", "Enter"}} {
		if line == "" && args[1] == "-l" {
			continue
		}
		if out, err := f.tmux(args...); err != nil {
			f.t.Fatalf("type %q: %v: %s", line, err, out)
		}
	}
}

// end waits for the end of the last command, and returns the output and the status.
func (f *freshSystem) end() (string, int) {
	f.t.Helper()
	text := f.see(fmt.Sprintf(`^ready %d after [0-9]+>$`, f.commands+1))
	from := strings.LastIndex(text, fmt.Sprintf("\nready %d after ", f.commands))
	if from < 0 {
		from = 0
	}
	m := regexp.MustCompile(fmt.Sprintf(`(?m)^ready %d after ([0-9]+)>`, f.commands+1)).FindStringSubmatchIndex(text)
	status, err := strconv.Atoi(text[m[2]:m[3]])
	if err != nil {
		f.t.Fatal(err)
	}
	return text[from:m[0]], status
}

// run types a command, and returns its output. It has to succeed.
func (f *freshSystem) run(line string) string {
	f.t.Helper()
	f.begin(line)
	out, status := f.end()
	if status != 0 {
		f.t.Fatalf("%q ended with %d:\n%s", line, status, out)
	}
	return out
}

// answer waits for a question at the end of the screen, and answers it.
func (f *freshSystem) answer(question, line string) {
	f.t.Helper()
	f.see(question + `\n*\z`)
	f.keys(line)
}

// hidden is answer for a line that the terminal does not show. The terminal drops text that comes
// before it is ready, so hidden waits for that.
func (f *freshSystem) hidden(question, line string) {
	f.t.Helper()
	f.see(question + `\n*\z`)
	f.quiet()
	f.keys(line)
}

// quiet waits until the terminal does not show typed text.
func (f *freshSystem) quiet() {
	f.t.Helper()
	tty, err := f.tmux("display-message", "-p", "#{pane_tty}")
	if err != nil {
		f.t.Fatal(err)
	}
	if err := eventually(func() error {
		// The namespaces of the user do not hide the terminals of the machine.
		out, err := exec.Command("stty", "-a", "-F", strings.TrimSpace(string(tty))).Output()
		if err == nil && !strings.Contains(string(out), " -echo ") {
			err = errors.New("it echoes")
		}
		return err
	}); err != nil {
		f.t.Fatalf("the terminal shows what is typed: %v", err)
	}
}

// number returns the number of a choice, from the last list on the terminal.
func (f *freshSystem) number(choice string) string {
	f.t.Helper()
	all := regexp.MustCompile(`(?m)^ +([0-9]) +`+choice).FindAllStringSubmatch(f.see(`^ +[0-9] +`+choice), -1)
	return all[len(all)-1][1]
}

// logins returns the fingerprints of the keys that sshd has accepted.
func (f *freshSystem) logins() (all []string) {
	f.t.Helper()
	log, err := os.ReadFile(filepath.Join(f.dir, "host", "log"))
	if err != nil {
		f.t.Fatal(err)
	}
	for _, m := range regexp.MustCompile(`Accepted publickey for person from .* (SHA256:\S+)`).FindAllStringSubmatch(string(log), -1) {
		all = append(all, m[1])
	}
	return all
}

// notTold are the directories of the home directory that files leaves out: the sources, and
// directories that modules make.
var notTold = []string{"p11-agent", ".cache", ".tpm2_pkcs11"}

// files returns the files of the home directory, with their content.
func (f *freshSystem) files() map[string]string {
	f.t.Helper()
	all := make(map[string]string)
	err := filepath.WalkDir(f.home, func(path string, d fs.DirEntry, err error) error {
		name, _ := filepath.Rel(f.home, path)
		if err != nil {
			return err
		}
		if d.IsDir() && slices.Contains(notTold, name) {
			return fs.SkipDir
		}
		if !d.Type().IsRegular() {
			all[path] = d.Type().String()
			return nil
		}
		b, err := os.ReadFile(path)
		all[path] = string(b)
		return err
	})
	if err != nil {
		f.t.Fatal(err)
	}
	return all
}

// source returns a copy of the source tree, without the files of git and make.
func source(t *testing.T, at string) string {
	t.Helper()
	to := t.TempDir()
	root := filepath.Join("..", "..")
	entries, err := os.ReadDir(root)
	if err != nil {
		t.Fatal(err)
	}
	for _, e := range entries {
		if slices.Contains([]string{".git", "build"}, e.Name()) {
			continue
		}
		from, into := filepath.Join(root, e.Name()), filepath.Join(to, at, e.Name())
		if e.IsDir() {
			err = os.CopyFS(into, os.DirFS(from))
		} else {
			var b []byte
			if b, err = os.ReadFile(from); err == nil {
				err = errors.Join(os.MkdirAll(filepath.Dir(into), 0o755), os.WriteFile(into, b, 0o644))
			}
		}
		if err != nil {
			t.Fatal(err)
		}
	}
	return to
}
