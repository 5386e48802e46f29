package main

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	ll "github.com/landlock-lsm/go-landlock/landlock/syscall"

	"p11-agent/token/tokentest"
)

// Without XDG_RUNTIME_DIR, the agent chooses another place for its socket. A module tries to
// replace the socket there with its own. That fails: a module may not write to the place.
func TestAttack16Socket(t *testing.T) {
	if _, err := ll.LandlockGetABIVersion(); err != nil {
		if os.Getenv("CI") == "true" {
			t.Fatalf("this kernel has no Landlock: %v", err)
		}
		t.Skipf("this kernel has no Landlock: %v", err)
	}
	if _, err := exec.LookPath("gcc"); err != nil {
		t.Skip("the module is made by gcc")
	}
	module := tokentest.BuildBadModule(t)
	home, tmp := tokentest.HomeDir(t), tokentest.TempDir(t)
	calls := filepath.Join(tmp, "calls")
	config := filepath.Join(home, "config.toml")
	evict := fmt.Sprintf("evict={%s/p11-agent-*,%s/.local/state/p11-agent/*}/agent.*", tmp, home)
	text := fmt.Sprintf("[[module]]\nname = \"bad\"\npath = %q\nenv = { BADMODULE = %q, BADMODULE_LOG = %q }\n", module, evict, calls)
	if err := os.WriteFile(config, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command("/proc/self/exe", "agent", "-D", "--config", config)
	cmd.Args[0] = "p11-agent"
	cmd.Env = []string{"HOME=" + home, "TMPDIR=" + tmp, "PATH=" + os.Getenv("PATH"), "GORACE=atexit_sleep_ms=0"}
	var log bytes.Buffer
	cmd.Stderr = &log
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	defer func() {
		_ = cmd.Process.Signal(os.Interrupt)
		if err := cmd.Wait(); err != nil || t.Failed() {
			t.Logf("the agent: %v\n%s", err, &log)
		}
	}()
	said := make([]byte, 1<<10)
	n, err := io.ReadAtLeast(out, said, 1)
	if err != nil {
		t.Fatal(err)
	}
	_, path, _ := strings.Cut(string(said[:n]), "SSH_AUTH_SOCK=")
	path, _, _ = strings.Cut(path, ";")
	// The module attacks at its start. The attack is over when the agent lists the slots.
	if err := eventually(func() error {
		b, err := os.ReadFile(calls)
		if err == nil && !bytes.Contains(b, []byte("C_GetSlotList")) {
			err = errors.New("it has not been asked")
		}
		return err
	}); err != nil {
		t.Fatalf("the module: %v", err)
	}
	c, err := net.Dial("unix", path)
	if err != nil {
		t.Fatalf("the socket is gone: %v", err)
	}
	_ = c.Close()
}
