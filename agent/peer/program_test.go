package peer

import (
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"testing"
)

// RunsSystemProgram knows the ssh-add of the system by its file. It refuses a file of that
// name in another place, and a program in a sandbox.
func TestRunsSystemProgram(t *testing.T) {
	path, err := exec.LookPath("ssh-add")
	if err != nil || os.Getenv("PATH") == "" {
		missing(t, "ssh-add")
	}
	if path, err = filepath.EvalSymlinks(path); err != nil {
		t.Fatal(err)
	}
	b, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	copied := filepath.Join(shortDir(t), "ssh-add")
	if err := os.WriteFile(copied, b, 0o755); err != nil {
		t.Fatal(err)
	}
	unshare := []string{"unshare", "--user", "--map-root-user"}
	for name, test := range map[string]struct {
		command []string
		asked   string // name of the program
		is      bool
	}{
		"the program":            {[]string{path}, "ssh-add", true},
		"a copy of it":           {[]string{copied}, "ssh-add", false},
		"another program":        {[]string{path}, "ssh-keygen", false},
		"in a user namespace":    {append(unshare, path), "ssh-add", false},
		"in a mount namespace":   {append(unshare, "--mount", path), "ssh-add", false},
		"in a process namespace": {append(unshare, "--pid", "--fork", path), "ssh-add", false},
	} {
		t.Run(name, func(t *testing.T) {
			socket := filepath.Join(shortDir(t), "s")
			l, err := net.ListenUnix("unix", &net.UnixAddr{Name: socket, Net: "unix"})
			if err != nil {
				t.Fatal(err)
			}
			defer l.Close()
			cmd := exec.Command(test.command[0], append(test.command[1:], "-l")...)
			cmd.Env = []string{"SSH_AUTH_SOCK=" + socket}
			if test.command[0] == "unshare" && exec.Command(unshare[0], append(unshare[1:], "true")...).Run() != nil {
				missing(t, "user namespaces, which root can make")
			}
			if err := cmd.Start(); err != nil {
				t.Fatal(err)
			}
			conn, err := l.AcceptUnix()
			if err != nil {
				t.Fatal(err)
			}
			who := Of(conn)
			err = who.RunsSystemProgram(test.asked)
			conn.Close()
			_ = cmd.Wait() // it has got no answer
			if (err == nil) != test.is {
				t.Error(err)
			}
			if who.RunsSystemProgram(test.asked) == nil {
				t.Error("it counts after its end")
			}
		})
	}
	if err := (Peer{Known: true, PID: os.Getpid()}).RunsSystemProgram("ssh-add"); err == nil {
		t.Error("a program that cannot be seen counts")
	}
}
