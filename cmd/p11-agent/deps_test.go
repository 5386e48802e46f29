package main

import (
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"
)

// A depsWorld is a PATH for tools/deps.sh, with scripts in place of apt-get, sudo and id. deps.sh
// also reads files of the machine of the tests, and changes none.
type depsWorld struct {
	bin string // the first directory of PATH
	log string // the calls, one on a line
}

func newDepsWorld(t *testing.T) *depsWorld {
	t.Helper()
	dir := t.TempDir()
	w := &depsWorld{filepath.Join(dir, "bin"), filepath.Join(dir, "log")}
	if err := os.Mkdir(w.bin, 0o700); err != nil {
		t.Fatal(err)
	}
	for _, name := range []string{"cat", "chmod", "dirname", "env", "sed", "sort"} {
		path, err := exec.LookPath(name)
		if err == nil {
			err = os.Symlink(path, filepath.Join(w.bin, name))
		}
		if err != nil {
			t.Fatal(err)
		}
	}
	w.script(t, "go", "")
	w.script(t, "id", "echo 1000")
	// An installation makes a program with the name of each package.
	w.script(t, "apt-get", `echo "apt-get $*" >>`+w.log+`
case "$*" in *install*)
	for package; do
		case $package in [a-z]*) echo >`+w.bin+`/$package; chmod 755 `+w.bin+`/$package; esac
	done
esac`)
	return w
}

func (w *depsWorld) script(t *testing.T, name, text string) {
	t.Helper()
	if err := os.WriteFile(filepath.Join(w.bin, name), []byte("#!/bin/sh\n"+text+"\n"), 0o700); err != nil {
		t.Fatal(err)
	}
}

// run runs deps.sh. It returns the output, the status and the calls.
func (w *depsWorld) run(t *testing.T, args ...string) (out string, status int, calls string) {
	t.Helper()
	cmd := exec.Command(filepath.Join("..", "..", "tools", "deps.sh"), args...)
	cmd.Env = []string{"PATH=" + w.bin}
	b, err := cmd.CombinedOutput()
	if cmd.ProcessState == nil {
		t.Fatal(err)
	}
	log, err := os.ReadFile(w.log)
	if err != nil && !os.IsNotExist(err) {
		t.Fatal(err)
	}
	return string(b), cmd.ProcessState.ExitCode(), string(log)
}

// pasted returns the packages of the line that a user is to paste.
func pasted(t *testing.T, out, prefix, suffix string) []string {
	t.Helper()
	m := regexp.MustCompile(`(?m)^    ` + prefix + `apt-get install --no-install-recommends ([a-z0-9 .+-]+)` + suffix + `$`).FindStringSubmatch(out)
	if m == nil {
		t.Fatalf("there is no line to paste:\n%s", out)
	}
	return strings.Fields(m[1])
}

// Without root, deps.sh prints the line that installs the missing packages, and changes nothing.
// Each list has the packages of its target, and no packages of later targets.
func TestDepsLists(t *testing.T) {
	for list, test := range map[string]struct{ with, without []string }{
		"build": {[]string{"gcc", "scdoc"}, []string{"git", "opensc", "softhsm2", "tmux", "xvfb", "gdb-minimal", "rpm", "debootstrap", "sudo"}},
		"demo":  {[]string{"gcc", "git", "opensc", "softhsm2", "tmux", "pinentry-curses"}, []string{"xvfb", "pinentry-qt", "gdb-minimal", "rpm", "debootstrap", "sudo"}},
		"check": {[]string{"gcc", "git", "tmux", "xvfb", "pinentry-qt", "gdb-minimal", "rpm"}, []string{"sudo"}},
		"ci":    {[]string{"gcc", "sudo"}, nil},
	} {
		t.Run(list, func(t *testing.T) {
			w := newDepsWorld(t)
			out, status, calls := w.run(t, list)
			packages := pasted(t, out, "su -c '", "'")
			for _, name := range test.with {
				if !slices.Contains(packages, name) {
					t.Errorf("%s is not on the list: %v", name, packages)
				}
			}
			for _, name := range test.without {
				if slices.Contains(packages, name) {
					t.Errorf("%s is on the list: %v", name, packages)
				}
			}
			if status != 1 || calls != "" {
				t.Errorf("status %d, called: %s", status, calls)
			}
		})
	}
	w := newDepsWorld(t)
	if out, status, _ := w.run(t, "everything"); status != 1 || !strings.Contains(out, `there is no list "everything"`) {
		t.Errorf("status %d: %s", status, out)
	}
}

// If sudo refuses, deps.sh works as without root.
func TestDepsRefused(t *testing.T) {
	w := newDepsWorld(t)
	w.script(t, "sudo", "exit 1")
	out, status, calls := w.run(t)
	if packages := pasted(t, out, "sudo ", ""); !slices.Contains(packages, "gcc") || status != 1 || calls != "" {
		t.Errorf("status %d, called: %s\n%s", status, calls, out)
	}
}

// With sudo, deps.sh installs the missing packages. If no package is missing, it installs nothing.
func TestDepsInstalls(t *testing.T) {
	w := newDepsWorld(t)
	// The file that forbids services belongs to the machine, and must not change.
	w.script(t, "sudo", `while case $1 in -*) true;; *) false;; esac; do shift; done
case $1 in env) exec "$@";; esac`)
	out, status, calls := w.run(t)
	if status != 0 || !strings.HasPrefix(out, "deps: missing: ") || !strings.Contains(out, "\ndeps: installing") {
		t.Errorf("status %d:\n%s", status, out)
	}
	lines := strings.Split(strings.TrimSpace(calls), "\n")
	if len(lines) != 2 || !strings.HasSuffix(lines[0], " update") || !strings.Contains(lines[1], " install --no-install-recommends ") || !strings.Contains(lines[1], " gcc ") {
		t.Errorf("called: %q", lines)
	}
	if strings.Contains(out, "switched off") {
		t.Errorf("it switches off what it has not brought:\n%s", out)
	}
	if err := os.Remove(w.log); err != nil {
		t.Fatal(err)
	}
	if out, status, calls := w.run(t); status != 0 || out != "" || calls != "" {
		t.Errorf("nothing is missing, and it ends with %d, says %q and calls %q", status, out, calls)
	}
}
