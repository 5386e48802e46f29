package paths

import (
	"os"
	"path/filepath"
	"testing"
)

func TestPaths(t *testing.T) {
	for _, name := range []string{"XDG_CONFIG_HOME", "XDG_STATE_HOME", "XDG_RUNTIME_DIR"} {
		t.Setenv(name, "")
	}
	t.Setenv("HOME", "/home/ann")
	if got, want := ConfigFile(), "/home/ann/.config/p11-agent/config.toml"; got != want {
		t.Errorf("configuration file %q, want %q", got, want)
	}
	if got, want := StateSocket(), "/home/ann/.local/state/p11-agent/agent.sock"; got != want {
		t.Errorf("socket in the state directory %q, want %q", got, want)
	}
	if got := RuntimeSocket(AgentName); got != "" {
		t.Errorf("socket in the runtime directory %q, want none", got)
	}
	t.Setenv("HOME", "ann")
	if got := ConfigFile() + StateDir() + StateSocket(); got != "" {
		t.Errorf("a relative home directory counts: %q", got)
	}
	t.Setenv("XDG_RUNTIME_DIR", "/run/ann")
	if got, want := RuntimeSocket("ci"), "/run/ann/p11-agent/ci.sock"; got != want {
		t.Errorf("socket in the runtime directory %q, want %q", got, want)
	}
}

func TestPrivateSocket(t *testing.T) {
	dir := t.TempDir()
	t.Setenv("XDG_RUNTIME_DIR", dir)
	noWarning := func(err error) { t.Error(err) }
	if got, err := AgentSocket("", false, noWarning); err != nil || got != RuntimeSocket(AgentName) {
		t.Errorf("got %q, %v", got, err)
	}
	socket, err := AgentSocket("", true, noWarning)
	if err != nil {
		t.Fatal(err)
	}
	if got := PrivateDir(socket); got != filepath.Dir(socket) || filepath.Dir(got) != dir {
		t.Errorf("%s: private directory %q", socket, got)
	}
	RemovePrivateDir(socket)
	if _, err := os.Stat(filepath.Dir(socket)); err == nil {
		t.Error("the private directory stays")
	}
	if got := PrivateDir(RuntimeSocket(AgentName)); got != "" {
		t.Errorf("%q counts as private", got)
	}
}
