package peer

import (
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"p11-agent/agent/peer/terminaltest"
)

// tmuxRuns starts a new tmux that runs a line of a shell, on a terminal of its own.
func tmuxRuns(t *testing.T, line string) {
	t.Helper()
	tmux, err := exec.LookPath("tmux")
	if err != nil {
		missing(t, "tmux")
	}
	socket := filepath.Join(shortDir(t), "t")
	run := func(args ...string) {
		cmd := exec.Command(tmux, append([]string{"-S", socket, "-f", "/dev/null"}, args...)...)
		cmd.Env = append(os.Environ(), "TERM=xterm", "SHELL=/bin/sh")
		if out, err := cmd.CombinedOutput(); err != nil {
			t.Errorf("tmux: %v: %s", err, out)
		}
	}
	t.Cleanup(func() { run("kill-server") })
	run("new-session", "-d", line)
}

// A terminal is the person's if an older process leads the session there, and a program for
// terminals has started that process.
func TestEstablished(t *testing.T) {
	role := func(role string) string { return "env '" + roleVariable + "=" + role + "' " }
	for name, test := range map[string]struct {
		start func(t *testing.T, client, path string)
		want  string // empty: it is
	}{
		"the client leads it": {func(t *testing.T, client, path string) {
			_, tty := terminaltest.New(t)
			cmd := command(t, client, "connect "+path)
			onTerminal(cmd, tty)
			start(t, cmd)
		}, "leads the session on its terminal itself"},
		"a parent of the client has made it": {func(t *testing.T, client, path string) {
			_, tty := terminaltest.New(t)
			cmd := command(t, client, "nest 1 "+path)
			onTerminal(cmd, tty)
			start(t, cmd)
		}, "which is not a known terminal program"},
		"its maker has ended": {func(t *testing.T, client, path string) {
			far, tty := terminaltest.New(t)
			// The shell between starts the leader, and ends at once.
			cmd := command(t, "/bin/sh", "")
			cmd.Args = []string{"sh", "-c", role("nest 1 "+path) + "setsid --ctty " + client + " <&3 & exit"}
			cmd.ExtraFiles = []*os.File{tty}
			if err := cmd.Run(); err != nil {
				t.Fatal(err)
			}
			t.Cleanup(func() { far.Close() }) // hangs up the rest of the processes
		}, "which is not a known terminal program|has ended, or cannot be seen"},
		"in tmux": {func(t *testing.T, client, path string) {
			tmuxRuns(t, role("connect "+path)+client+"; true")
		}, ""},
		"in tmux, further down": {func(t *testing.T, client, path string) {
			tmuxRuns(t, role("nest 2 "+path)+client+"; true")
		}, ""},
		"in tmux, in a session of its own": {func(t *testing.T, client, path string) {
			tmuxRuns(t, role("apart "+path)+client+"; true")
		}, ""},
		"tmux starts the client": {func(t *testing.T, client, path string) {
			tmuxRuns(t, "exec "+role("connect "+path)+client)
		}, "leads the session on its terminal itself"},
	} {
		t.Run(name, func(t *testing.T) {
			l, path := listen(t)
			test.start(t, program(t, "client"), path)
			d := Of(accept(t, l)).Desk()
			defer d.Close()
			if d.TerminalErr != nil {
				t.Fatal(d.TerminalErr)
			}
			err := d.Terminal.Established()
			switch {
			case test.want == "" && err != nil:
				t.Error(err)
			case test.want != "" && (err == nil || !matches(test.want, err.Error())):
				t.Errorf("%v, want %q", err, test.want)
			}
		})
	}
}

func TestParseIDs(t *testing.T) {
	const usual = "Name:\ttmux: server\nUmask:\t0022\nUid:\t1000\t1000\t1000\t1000\nGid:\t100\t43\t43\t43\nFDSize:\t64\n"
	got, ok := parseIDs([]byte(usual))
	if want := (ids{[4]uint32{1000, 1000, 1000, 1000}, [4]uint32{100, 43, 43, 43}}); !ok || got != want {
		t.Errorf("%+v %v, want %+v", got, ok, want)
	}
	for _, bad := range []string{
		"", "Uid:\t0\t0\t0\t0\n", strings.Replace(usual, "1000\t", "", 1), strings.Replace(usual, "1000", "-1", 1),
		strings.Replace(usual, "1000", "4294967296", 1), usual + "Uid:\t0\t0\t0\t0\n",
	} {
		if got, ok := parseIDs([]byte(bad)); ok {
			t.Errorf("%q: %+v", bad, got)
		}
	}
	own, err := readIDs(os.Getpid())
	if err != nil || own.uid[1] != uint32(os.Geteuid()) || own.gid[1] != uint32(os.Getegid()) {
		t.Errorf("this process: %+v, %v", own, err)
	}
}

func FuzzIDs(f *testing.F) {
	f.Add([]byte("Uid:\t1000\t1000\t1000\t1000\nGid:\t100\t100\t100\t100\n"))
	f.Add([]byte("Uid:\nGid:"))
	f.Fuzz(func(_ *testing.T, b []byte) { parseIDs(b) })
}
