package main

import (
	"bytes"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"p11-agent/token/tokentest"
)

// buildAgent builds the program like "make build", without the race detector. So the tests under
// systemd run the program that users run.
func buildAgent(t *testing.T) string {
	t.Helper()
	program := filepath.Join(t.TempDir(), "p11-agent")
	out, err := exec.Command("make", "-s", "-C", "../..", "build", "PROGRAM="+program).CombinedOutput()
	if err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	return program
}

// needPrivileges skips a test if it does not run as root, if it cannot make namespaces and cgroups,
// or if one of the programs is missing. In CI, it fails the test.
func needPrivileges(t *testing.T, programs ...string) {
	t.Helper()
	missing := ""
	if os.Geteuid() != 0 {
		missing = "only root can start a service manager for another user"
	} else if out, err := exec.Command("unshare", "--mount", "--pid", "--cgroup", "--fork", "sh", "-c", "mount -t cgroup2 cgroup2 /mnt && mount -t tmpfs tmpfs /run").CombinedOutput(); err != nil {
		missing = "namespaces with mounts of their own cannot be made here: " + strings.TrimSpace(string(out))
	}
	skipWithout(t, missing, programs)
}

// userManager runs a shell script of testdata/systemd as an ordinary user, under a real
// "systemd --user" with a journal. These start in less than a second. userManager returns the
// output of the script, and fails the test if the script fails. The home of the user is a new
// directory. It has the agent at "my bin 100%/p11-agent", and common.sh beside the script. The user
// has its own PIDs, mounts and cgroups. So no process and no change of the script outlives it.
func userManager(t *testing.T, script string, args ...string) string {
	t.Helper()
	return userManagerWith(t, "", script, args...)
}

// userManagerWith is userManager with more files in the home, from the directory files; empty: no
// more files.
func userManagerWith(t *testing.T, files, script string, args ...string) string {
	t.Helper()
	needPrivileges(t, "/lib/systemd/systemd", "/lib/systemd/systemd-journald", "systemctl", "unshare", "setpriv", "ip", "sshd", "ssh-keygen")
	home := tokentest.TempDir(t)
	copyFile(t, buildAgent(t), filepath.Join(home, "my bin 100%", "p11-agent"), 0o711)
	for _, name := range []string{"common.sh", "sshd_config", script} {
		copyFile(t, filepath.Join("testdata", "systemd", name), filepath.Join(home, name), 0o644)
	}
	if files != "" {
		if err := os.CopyFS(home, os.DirFS(files)); err != nil {
			t.Fatal(err)
		}
	}
	harness := filepath.Join("testdata", "systemd", "usermanager.sh")
	return runHarness(t, exec.Command("bash", append([]string{harness, home, "/home/person/" + script}, args...)...))
}

// runHarness runs a script that isolates itself from the machine. It returns the output.
func runHarness(t *testing.T, cmd *exec.Cmd) string {
	t.Helper()
	var out bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &out
	if err := cmd.Run(); err != nil {
		t.Fatalf("%v\n%s", err, &out)
	}
	t.Logf("%s", &out)
	return out.String()
}

func copyFile(t *testing.T, from, to string, mode os.FileMode) {
	t.Helper()
	b, err := os.ReadFile(from)
	if err == nil {
		err = os.MkdirAll(filepath.Dir(to), 0o755)
	}
	if err == nil {
		err = os.WriteFile(to, b, mode)
	}
	if err != nil {
		t.Fatal(err)
	}
}

// systemd runs the agent for a user, with the units that p11-agent install writes.
func TestUserManager(t *testing.T) {
	needPrivileges(t, "softhsm2-util", "pkcs11-tool", "ssh-add", "ssh-keygen", "systemd-analyze", "pgrep")
	if out := userManager(t, "user.sh", storyPIN); !strings.HasSuffix(out, "== all is well\n") {
		t.Errorf("the script did not get to its end:\n%s", out)
	}
}

// An agent that systemd has started asks each person at their own place.
func TestDesk(t *testing.T) {
	needPrivileges(t, "softhsm2-util", "pkcs11-tool", "ssh", "sshd", "ssh-add", "ssh-keygen", "tmux", "pinentry-curses", "pinentry-gtk-2",
		"Xvfb", "xdotool", "less", "pgrep", "ps", "systemd-run", "python3")
	if out := userManager(t, "desk.sh", storyPIN, "aladdin-0815"); !strings.HasSuffix(out, "== all is well\n") {
		t.Errorf("the script did not get to its end:\n%s", out)
	}
}

// A machine boots twice, with systemd as its first process. It has the agent of the system, and the
// agent of a user with lingering (loginctl enable-linger).
func TestBoot(t *testing.T) {
	needPrivileges(t, "systemd-nspawn", "softhsm2-util", "pkcs11-tool", "ssh", "sshd", "ssh-add", "ssh-keygen", "useradd", "runuser", "loginctl")
	files := t.TempDir()
	copyFile(t, buildAgent(t), filepath.Join(files, "p11-agent"), 0o711)
	for _, script := range []string{"common.sh", "first-boot.sh", "second-boot.sh"} {
		copyFile(t, filepath.Join("testdata", "systemd", script), filepath.Join(files, script), 0o644)
	}
	writeRecipe(t, "Host keys of sshd", filepath.Join(files, "host-keys"))
	out := runHarness(t, exec.Command("bash", filepath.Join("testdata", "systemd", "boot.sh"), files, "first-boot.sh", "second-boot.sh"))
	if n := strings.Count(out, "== all is well\n"); n != 2 {
		t.Errorf("%d scripts got to their end:\n%s", n, out)
	}
}
