package tokentest

import (
	"bufio"
	_ "embed"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
)

//go:embed testdata/pcscclient.c
var pcscClient []byte

// BuildPCSCClient compiles a program that uses a card by PC/SC, and returns its
// path; its source says what it does. The test is skipped, or fails in CI, where
// there is no C compiler.
func BuildPCSCClient(t testing.TB) string {
	t.Helper()
	cc := program(t, "gcc")
	dir := t.TempDir()
	c, exe := filepath.Join(dir, "pcscclient.c"), filepath.Join(dir, "pcscclient")
	if err := os.WriteFile(c, pcscClient, 0o600); err != nil {
		t.Fatal(err)
	}
	if out, err := exec.Command(cc, "-O1", "-Wall", "-o", exe, c, "-ldl").CombinedOutput(); err != nil || len(out) > 0 {
		t.Fatalf("compile %s: %v\n%s", c, err, out)
	}
	return exe
}

// FindSCDaemon returns the path of GnuPG's program for smart cards, or nothing.
func FindSCDaemon() string {
	for _, path := range []string{"/usr/lib/gnupg/scdaemon", "/usr/libexec/scdaemon", "/usr/lib/gnupg2/scdaemon", "/usr/bin/scdaemon"} {
		if _, err := os.Stat(path); err == nil {
			return path
		}
	}
	return ""
}

// A Neighbour is another program that uses this daemon's cards, and keeps them
// until Close.
type Neighbour struct {
	PID int

	t   testing.TB
	in  io.WriteCloser
	out *bufio.Reader
	cmd *exec.Cmd
}

// Neighbour starts a program that talks on its standard files. It ends with the
// test.
func (p *PCSCD) Neighbour(args ...string) *Neighbour {
	p.t.Helper()
	cmd := exec.Command(args[0], args[1:]...)
	cmd.Env = append(os.Environ(), p.Env()...)
	cmd.Stderr = p.t.Output()
	in, err := cmd.StdinPipe()
	if err != nil {
		p.t.Fatal(err)
	}
	out, err := cmd.StdoutPipe()
	if err != nil {
		p.t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		p.t.Fatal(err)
	}
	n := &Neighbour{PID: cmd.Process.Pid, t: p.t, in: in, out: bufio.NewReader(out), cmd: cmd}
	p.t.Cleanup(n.Close)
	return n
}

// SCDaemon starts scdaemon with these lines in its configuration and waits until
// it is ready for commands.
func (p *PCSCD) SCDaemon(conf ...string) *Neighbour {
	p.t.Helper()
	path := FindSCDaemon()
	if path == "" {
		missing(p.t, "scdaemon")
	}
	home := TempDir(p.t)
	file := filepath.Join(home, "scdaemon.conf")
	if err := os.WriteFile(file, []byte(strings.Join(append(conf, "disable-ccid"), "\n")+"\n"), 0o600); err != nil {
		p.t.Fatal(err)
	}
	n := p.Neighbour(path, "--server", "--homedir", home)
	if line := n.Line(); !strings.HasPrefix(line, "OK") {
		p.t.Fatalf("scdaemon says %q", line)
	}
	return n
}

// Line returns what the program says next, or nothing when it has ended.
func (n *Neighbour) Line() string {
	line, _ := n.out.ReadString('\n')
	return strings.TrimSuffix(line, "\n")
}

// Ask has scdaemon do something, and returns its last line: "OK", or "ERR" and
// why.
func (n *Neighbour) Ask(command string) string {
	_, _ = fmt.Fprintln(n.in, command) // what is wrong shows in the answer
	for {
		line := n.Line()
		if line == "" || strings.HasPrefix(line, "OK") || strings.HasPrefix(line, "ERR") {
			return line
		}
	}
}

// Close ends the program by the end of its input, and waits for it.
func (n *Neighbour) Close() {
	if n.cmd == nil {
		return
	}
	_ = n.in.Close()
	_, _ = io.Copy(io.Discard, n.out)
	_ = n.cmd.Wait() // how it ends is of no interest
	n.cmd = nil
}
