package install

import (
	"bytes"
	"context"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
)

// doubleSystemctl puts a program named systemctl before all others. It writes its arguments into a
// file, and fails for the commands in failing. doubleSystemctl returns a function that reads and
// empties that file.
func doubleSystemctl(t *testing.T, failing ...string) (calls func() []string) {
	t.Helper()
	dir := t.TempDir()
	script := "#!/bin/sh\n[ \"$1\" = --user ] && shift\necho \"$@\" >>" + filepath.Join(dir, "calls") + "\n" +
		"case $1 in (" + strings.Join(append(failing, "never"), "|") + ") echo \"no $1\" >&2; exit 1;; esac\n"
	if err := os.WriteFile(filepath.Join(dir, "systemctl"), []byte(script), 0o700); err != nil {
		t.Fatal(err)
	}
	t.Setenv("PATH", dir+":"+os.Getenv("PATH"))
	return func() []string {
		text, err := os.ReadFile(filepath.Join(dir, "calls"))
		if err != nil {
			t.Fatal(err)
		}
		if err := os.Remove(filepath.Join(dir, "calls")); err != nil {
			t.Fatal(err)
		}
		return strings.Split(strings.TrimSpace(string(text)), "\n")
	}
}

func open(t *testing.T, home string, out, stderr *bytes.Buffer) *Installation {
	t.Helper()
	in, err := New(t.Context(), Target{
		ConfigHome: home, Socket: filepath.Join(home, "agent.sock"), Answers: func(context.Context, string) bool { return false },
	}, out, stderr)
	if err != nil {
		t.Fatal(err)
	}
	return in
}

// An upgrade replaces the units. The agent that runs restarts, even when a step of systemctl
// fails.
func TestUpgrade(t *testing.T) {
	all := []string{"is-active --quiet p11-agent.socket", "daemon-reload", "try-restart p11-agent.service", "enable --now p11-agent.socket"}
	for _, tt := range []struct {
		name    string
		failing []string
		calls   []string
		failed  []string // what the error names
	}{
		{"all is well", nil, all, nil},
		{"the units cannot be enabled", []string{"enable"}, all, []string{"systemctl --user enable --now p11-agent.socket: "}},
		{"the agent does not restart", []string{"try-restart"}, all, []string{"systemctl --user try-restart p11-agent.service: "}},
		{"neither", []string{"enable", "try-restart"}, all, []string{"try-restart p11-agent.service: ", "enable --now p11-agent.socket: "}},
		{"systemd does not read the units", []string{"daemon-reload"}, all[:2], []string{"systemctl --user daemon-reload: "}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			calls := doubleSystemctl(t, tt.failing...)
			var out, stderr bytes.Buffer
			err := open(t, t.TempDir(), &out, &stderr).Install(t.Context(), Options{Start: true})
			if got := calls(); !slices.Equal(got, tt.calls) {
				t.Errorf("systemctl gets %q, want %q", got, tt.calls)
			}
			if (err == nil) != (tt.failed == nil) {
				t.Fatalf("got error %v", err)
			}
			for _, text := range tt.failed {
				if !strings.Contains(err.Error(), text) {
					t.Errorf("%q does not name %q", err, text)
				}
			}
			if enabled := strings.Contains(out.String(), "p11-agent.socket is enabled and listens\n"); enabled != (err == nil) {
				t.Errorf("after %v it says:\n%s", err, &out)
			}
		})
	}
}

// Install changes nothing the second time, so the agent that runs stays.
func TestInstallTwice(t *testing.T) {
	calls, home := doubleSystemctl(t), t.TempDir()
	for _, restarts := range []bool{true, false} {
		var out, stderr bytes.Buffer
		if err := open(t, home, &out, &stderr).Install(t.Context(), Options{Start: true}); err != nil {
			t.Fatal(err)
		}
		if got := calls(); slices.Contains(got, "try-restart p11-agent.service") != restarts {
			t.Errorf("restart wanted: %v; systemctl gets %q", restarts, got)
		}
	}
}

// Files of the user stay as they are, and then install writes no file at all.
func TestForeignFile(t *testing.T) {
	home := t.TempDir()
	theirs := filepath.Join(home, "p11-agent", "ssh_config")
	if err := os.MkdirAll(filepath.Dir(theirs), 0o700); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(theirs, []byte("Host *\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	var out, stderr bytes.Buffer
	err := open(t, home, &out, &stderr).Install(t.Context(), Options{})
	if err == nil || !strings.Contains(err.Error(), theirs+" exists, and install has not written it") {
		t.Errorf("got error %v", err)
	}
	if _, err := os.Stat(filepath.Join(home, "systemd")); !os.IsNotExist(err) {
		t.Errorf("units are written: %v", err)
	}
	if err := open(t, home, &out, &stderr).Install(t.Context(), Options{Force: true}); err != nil {
		t.Fatal(err)
	}
	doubleSystemctl(t)
	if err := open(t, home, &out, &stderr).Remove(); err != nil {
		t.Fatal(err)
	}
	for _, name := range []string{theirs, filepath.Join(home, "systemd", "user", SocketUnit), filepath.Join(home, "systemd", "user", ServiceUnit)} {
		if _, err := os.Stat(name); !os.IsNotExist(err) {
			t.Errorf("%s is still there: %v", name, err)
		}
	}
}

func TestValidName(t *testing.T) {
	for name, want := range map[string]bool{"hostkeys": true, "a.b_1": true, "": false, ".a": false, "a/b": false, "a-b": false, "a@b": false, strings.Repeat("a", 65): false} {
		if ValidName(name) != want {
			t.Errorf("%q: want %v", name, want)
		}
	}
}

func TestInclude(t *testing.T) {
	t.Setenv("HOME", "/home/me/")
	for file, want := range map[string]string{
		"/home/me/.config/p11-agent/ssh_config": "Include ~/.config/p11-agent/ssh_config",
		"/home/me2/ssh_config":                  "Include /home/me2/ssh_config",
		"/home/me/my config":                    `Include "~/my config"`,
	} {
		if got := Include(file); got != want {
			t.Errorf("got %q, want %q", got, want)
		}
	}
}
