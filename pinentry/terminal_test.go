package pinentry

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"p11-agent/agent/door/doortest"
	"p11-agent/agent/peer/proctest"
)

// pane is a terminal of tmux from which no other program reads.
type pane struct {
	t    *testing.T
	dir  string
	name string
	tty  string
}

// need returns the path of a program. If the program is missing, the test is skipped. In CI,
// the test fails.
func need(t *testing.T, program string) string {
	t.Helper()
	path, err := exec.LookPath(program)
	if err != nil {
		if os.Getenv("CI") == "true" {
			t.Fatalf("%s is not installed", program)
		}
		t.Skipf("%s is not installed", program)
	}
	return path
}

func newPane(t *testing.T, width, height int) *pane {
	t.Helper()
	need(t, "tmux")
	p := &pane{t: t, dir: doortest.Dir(t), name: "p11-" + strconv.Itoa(os.Getpid())}
	p.tmux("new-session", "-d", "-x", strconv.Itoa(width), "-y", strconv.Itoa(height), "exec tail -f /dev/null")
	t.Cleanup(func() {
		// If the window is closed, the server has gone.
		_ = p.command("kill-server").Run()
	})
	// Until then tmux may not have set the terminal's modes.
	proctest.Until(t, "the pane's program", func() bool {
		return strings.TrimSpace(p.tmux("display-message", "-p", "#{pane_current_command}")) == "tail"
	})
	p.tty = strings.TrimSpace(p.tmux("display-message", "-p", "#{pane_tty}"))
	if !strings.HasPrefix(p.tty, "/dev/pts/") {
		t.Fatalf("the pane is on %q", p.tty)
	}
	proctest.Until(t, "tmux to set the pane's modes", func() bool { return p.modes().Iflag&unix.IUTF8 != 0 })
	return p
}

func (p *pane) command(args ...string) *exec.Cmd {
	cmd := exec.Command("tmux", append([]string{"-u", "-f", "/dev/null", "-L", p.name}, args...)...)
	cmd.Env = []string{"PATH=" + os.Getenv("PATH"), "TMUX_TMPDIR=" + p.dir, "LC_ALL=C.UTF-8", "TERM=xterm", "HOME=" + p.dir}
	return cmd
}

func (p *pane) tmux(args ...string) string {
	p.t.Helper()
	out, err := p.command(args...).CombinedOutput()
	if err != nil {
		p.t.Fatalf("tmux %q: %v: %s", args, err, out)
	}
	return string(out)
}

func (p *pane) screen() string { p.t.Helper(); return p.tmux("capture-pane", "-p") }

// see waits until text is on the screen.
func (p *pane) see(text string) {
	p.t.Helper()
	proctest.Until(p.t, fmt.Sprintf("%q on the screen", text), func() bool { return strings.Contains(p.screen(), text) })
}

func (p *pane) typeText(text string) { p.t.Helper(); p.tmux("send-keys", "-l", text) }
func (p *pane) press(key string)     { p.t.Helper(); p.tmux("send-keys", key) }

func (p *pane) modes() unix.Termios {
	p.t.Helper()
	f, err := os.OpenFile(p.tty, os.O_RDWR|unix.O_NOCTTY, 0)
	if err != nil {
		p.t.Fatal(err)
	}
	defer f.Close()
	modes, err := unix.IoctlGetTermios(int(f.Fd()), unix.TCGETS)
	if err != nil {
		p.t.Fatal(err)
	}
	return *modes
}

func (p *pane) place() Place {
	p.t.Helper()
	return Place{TTY: openFile(p.t, p.tty), TTYType: "xterm", Locale: "en_US.UTF-8"} // not installed here, nor needed
}

func openFile(t *testing.T, name string) *os.File {
	t.Helper()
	f, err := os.OpenFile(name, os.O_RDWR|unix.O_NOCTTY, 0)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = f.Close() })
	return f
}

type answer struct {
	pin string
	err error
}

// askPIN asks in the background. The PIN of a test may be a string.
func askPIN(ctx context.Context, d *Dialogue, prompt Prompt) <-chan answer {
	done := make(chan answer, 1)
	go func() {
		pin, err := d.PIN(ctx, prompt)
		done <- answer{string(pin.Bytes()), err}
		pin.Wipe()
	}()
	return done
}

// realPinentries are the programs that need only a terminal.
var realPinentries = []string{"pinentry-curses", "pinentry-tty"}

func forEachPinentry(t *testing.T, test func(t *testing.T, name string, p *Pinentry)) {
	for _, name := range realPinentries {
		t.Run(name, func(t *testing.T) {
			noLeaks(t)
			test(t, name, &Pinentry{Program: need(t, name), Path: "/usr/bin:/bin"})
		})
	}
}

func TestRealPIN(t *testing.T) {
	forEachPinentry(t, func(t *testing.T, name string, p *Pinentry) {
		pane := newPane(t, 100, 30)
		before := pane.modes()
		d, err := p.Open(t.Context(), pane.place())
		if err != nil {
			t.Fatal(err)
		}
		defer d.Close()
		for i, want := range []string{"123456", "12%34%25", " a b ", "grüße€"} {
			prompt := Prompt{Title: "p11-agent", Description: fmt.Sprintf("Schlüssel %d\n100%% \x1b[2J", i), Label: "PIN:"}
			if i > 0 {
				prompt.Error = fmt.Sprintf("wrong PIN %d", i)
			}
			got := askPIN(t.Context(), d, prompt)
			pane.see(fmt.Sprintf("Schlüssel %d", i))
			pane.see(`100% \x1b[2J`)
			pane.see("PIN:")
			if i > 0 {
				pane.see(prompt.Error)
			}
			pane.typeText(want)
			if name == "pinentry-curses" { // it shows an asterisk for each character
				pane.see("PIN: " + strings.Repeat("*", len([]rune(want))))
			}
			noSecret(t, "the screen", pane.screen())
			noSecret(t, "what others can see of the process", processes(t))
			pane.press("Enter")
			if a := <-got; a.err != nil || a.pin != want {
				t.Errorf("%q, %v; want %q", a.pin, a.err, want)
			}
			pane.tmux("clear-history")
		}
		if n := len(children(t)); n != 1 {
			t.Errorf("%d processes were started for one dialogue", n)
		}
		_ = d.Close()
		if pane.modes() != before {
			t.Error("the terminal is not as it was")
		}
	})
}

// processes returns the arguments and environments of all children.
func processes(t *testing.T) string {
	t.Helper()
	var all strings.Builder
	for _, stat := range children(t) {
		pid, _, _ := strings.Cut(stat, " ")
		for _, file := range []string{"cmdline", "environ"} {
			b, err := os.ReadFile(filepath.Join("/proc", pid, file))
			if err != nil {
				t.Fatal(err)
			}
			all.WriteString(strings.ReplaceAll(string(b), "\x00", " "))
		}
	}
	if !strings.Contains(all.String(), "pinentry") || !strings.Contains(all.String(), "GPG_TTY=") {
		t.Errorf("nothing was seen: %q", all.String())
	}
	return all.String()
}

func TestRealConfirmAndCancelButton(t *testing.T) {
	noLeaks(t)
	p := &Pinentry{Program: need(t, "pinentry-curses"), Path: "/usr/bin:/bin"}
	pane := newPane(t, 100, 30)
	d, err := p.Open(t.Context(), pane.place())
	if err != nil {
		t.Fatal(err)
	}
	defer d.Close()
	for _, c := range []struct {
		keys []string
		want bool
	}{{[]string{"Enter"}, true}, {[]string{"Tab", "Enter"}, false}, {[]string{"Enter"}, true}} {
		got := make(chan answer, 1)
		go func() {
			yes, err := d.Confirm(t.Context(), Prompt{Description: "Sign in?", OK: "Allow", Cancel: "Deny"})
			got <- answer{strconv.FormatBool(yes), err}
		}()
		pane.see("<Allow>")
		pane.see("<Deny>")
		for _, key := range c.keys {
			pane.press(key)
		}
		if a := <-got; a.err != nil || a.pin != strconv.FormatBool(c.want) {
			t.Errorf("%v, %v; want %t", a.pin, a.err, c.want)
		}
	}
	got := askPIN(t.Context(), d, Prompt{Description: "PIN of the card", Cancel: "Never"})
	pane.see("PIN of the card")
	pane.see("<Never>")
	pane.press("Tab")
	pane.press("Tab")
	pane.press("Enter")
	if a := <-got; !errors.Is(a.err, ErrCancelled) {
		t.Errorf("%v", a.err)
	}
	got = askPIN(t.Context(), d, Prompt{Description: "Nothing typed"})
	pane.see("Nothing typed")
	pane.press("Enter")
	if a := <-got; !errors.Is(a.err, ErrEmpty) {
		t.Errorf("%v", a.err)
	}
}

// A prompt has a third button. Each button gives its own Choice.
func TestRealChoose(t *testing.T) {
	forEachPinentry(t, func(t *testing.T, name string, p *Pinentry) {
		pane := newPane(t, 100, 30)
		before := pane.modes()
		d, err := p.Open(t.Context(), pane.place())
		if err != nil {
			t.Fatal(err)
		}
		defer d.Close()
		for i, c := range []struct {
			curses []string
			tty    string
			want   Choice
		}{
			{[]string{"Enter"}, "o", ChoiceOK},
			{[]string{"Tab", "Enter"}, "l", ChoiceOther},
			{[]string{"Tab", "Tab", "Enter"}, "d", ChoiceCancel},
			{[]string{"Down", "Enter"}, "L", ChoiceOther},
			{[]string{"Down", "Down", "Enter"}, "D", ChoiceCancel},
			{[]string{"Down", "Up", "Enter"}, "O", ChoiceOK},
		} {
			got := make(chan error, 1)
			prompt := Prompt{Description: fmt.Sprintf("Sign in %d?", i), OK: "Allow _once", Other: "Allow _longer...", Cancel: "_Deny"}
			go func() {
				choice, err := d.Choose(t.Context(), prompt)
				if err == nil && choice != c.want {
					err = fmt.Errorf("choice %d, want %d", choice, c.want)
				}
				got <- err
			}()
			pane.see(prompt.Description)
			for _, button := range []string{"Allow once", "Allow longer...", "Deny"} {
				pane.see(button)
			}
			keys := []string{c.tty}
			if name == "pinentry-curses" {
				keys = c.curses
			} else {
				pane.see("]?")
			}
			for _, key := range keys {
				pane.press(key)
			}
			if err := <-got; err != nil {
				t.Errorf("question %d: %v", i, err)
			}
			pane.tmux("send-keys", "-R")
			pane.tmux("clear-history")
		}
		_ = d.Close()
		if pane.modes() != before {
			t.Error("the terminal is not as it was")
		}
	})
}

func TestRealMessageIsTakenAway(t *testing.T) {
	forEachPinentry(t, func(t *testing.T, _ string, p *Pinentry) {
		pane := newPane(t, 100, 30)
		before := pane.modes()
		d, err := p.Open(t.Context(), pane.place())
		if err != nil {
			t.Fatal(err)
		}
		defer d.Close()
		ctx, cancel := context.WithCancel(t.Context())
		done := make(chan error)
		go func() { done <- d.Message(ctx, Prompt{Description: "Type the PIN on the reader"}) }()
		pane.see("Type the PIN on the reader")
		cancel()
		if err := <-done; !errors.Is(err, context.Canceled) {
			t.Errorf("%v", err)
		}
		if pane.modes() != before || len(children(t)) > 0 {
			t.Errorf("the terminal is not as it was (%+v, then %+v), or something is left: %v", before, pane.modes(), children(t))
		}
	})
}

func TestRealCancelRestoresTheTerminal(t *testing.T) {
	forEachPinentry(t, func(t *testing.T, _ string, p *Pinentry) {
		pane := newPane(t, 100, 30)
		before := pane.modes()
		d, err := p.Open(t.Context(), pane.place())
		if err != nil {
			t.Fatal(err)
		}
		defer d.Close()
		for range 2 {
			ctx, cancel := context.WithCancel(t.Context())
			got := askPIN(ctx, d, Prompt{Description: "PIN of the card"})
			pane.see("PIN of the card")
			proctest.Until(t, "a terminal without echo", func() bool { return pane.modes().Lflag&unix.ECHO == 0 })
			pane.typeText("123")
			cancel()
			if a := <-got; !errors.Is(a.err, context.Canceled) || a.pin != "" {
				t.Errorf("%q, %v", a.pin, a.err)
			}
			if now := pane.modes(); now != before {
				t.Errorf("the terminal is not as it was: %+v, then %+v", before, now)
			}
			if left := children(t); len(left) > 0 {
				t.Errorf("left: %v", left)
			}
			pane.tmux("send-keys", "-R")
			pane.tmux("clear-history")
		}
	})
}

func TestRealKillRestoresTheTerminal(t *testing.T) {
	forEachPinentry(t, func(t *testing.T, _ string, p *Pinentry) {
		quick(t)
		pane := newPane(t, 100, 30)
		before := pane.modes()
		d, err := p.Open(t.Context(), pane.place())
		if err != nil {
			t.Fatal(err)
		}
		defer d.Close()
		ctx, cancel := context.WithCancel(t.Context())
		defer cancel()
		got := askPIN(ctx, d, Prompt{Description: "PIN of the card"})
		pane.see("PIN of the card")
		proctest.Until(t, "a terminal without echo", func() bool { return pane.modes().Lflag&unix.ECHO == 0 })
		// A stopped program does not notice SIGTERM.
		pid, _, _ := strings.Cut(children(t)[0], " ")
		n, _ := strconv.Atoi(pid)
		if err := syscall.Kill(n, syscall.SIGSTOP); err != nil {
			t.Fatal(err)
		}
		cancel()
		<-got
		if now := pane.modes(); now != before {
			t.Errorf("the terminal is not as it was: %+v, then %+v", before, now)
		}
	})
}

func TestRealTimeout(t *testing.T) {
	noLeaks(t)
	pane := newPane(t, 100, 30)
	p := &Pinentry{Program: need(t, "pinentry-curses"), Path: "/usr/bin:/bin"}
	d, err := p.Open(t.Context(), pane.place())
	if err != nil {
		t.Fatal(err)
	}
	defer d.Close()
	if _, err := d.PIN(t.Context(), Prompt{Timeout: time.Nanosecond}); !errors.Is(err, ErrTimeout) {
		t.Errorf("%v", err)
	}
	if len(children(t)) != 1 {
		t.Error("pinentry kept the time, and is gone all the same")
	}
	got := askPIN(t.Context(), d, Prompt{Description: "no limit now"})
	pane.see("no limit now")
	pane.typeText("4711")
	pane.press("Enter")
	if a := <-got; a.pin != "4711" {
		t.Errorf("%v", a.err)
	}
}

func TestRealPinentryWithoutATerminal(t *testing.T) {
	noLeaks(t)
	p := &Pinentry{Program: need(t, "pinentry-curses"), Path: "/usr/bin:/bin"}
	for name, place := range map[string]Place{
		"no terminal":    {},
		"not a terminal": {TTY: openFile(t, "/dev/null"), TTYType: "xterm"},
	} {
		d, err := p.Open(t.Context(), place)
		if err != nil {
			t.Fatalf("%s: %v", name, err)
		}
		if _, err := d.PIN(t.Context(), Prompt{Description: "ü"}); !errors.Is(err, ErrNoPrompt) {
			t.Errorf("%s: %v", name, err)
		} else {
			t.Log(err)
		}
		_ = d.Close()
	}
}

// Without a display, programs with windows ask on the terminal. They find it by the file
// that they inherit, also if a script runs them.
func TestRealGraphicalPinentryOnATerminal(t *testing.T) {
	for _, name := range []string{"pinentry-gtk-2", "pinentry-qt"} {
		t.Run(name, func(t *testing.T) {
			noLeaks(t)
			script := filepath.Join(doortest.Dir(t), "pinentry")
			if err := os.WriteFile(script, []byte("#!/bin/sh\n"+need(t, name)+" \"$@\"\nexit $?\n"), 0o755); err != nil {
				t.Fatal(err)
			}
			pane := newPane(t, 100, 30)
			before := pane.modes()
			d, err := (&Pinentry{Program: script, Path: "/usr/bin:/bin"}).Open(t.Context(), pane.place())
			if err != nil {
				t.Fatal(err)
			}
			defer d.Close()
			got := askPIN(t.Context(), d, Prompt{Description: "PIN of the card", Label: "PIN:"})
			pane.see("PIN of the card")
			pane.typeText("4711")
			pane.press("Enter")
			if a := <-got; a.pin != "4711" {
				t.Errorf("%q, %v", a.pin, a.err)
			}
			if pane.modes() != before {
				t.Error("the terminal is not as it was")
			}
		})
	}
}

func TestRealSmallOrUnknownTerminal(t *testing.T) {
	for name, c := range map[string]struct {
		width, height int
		ttytype       string
	}{"small": {30, 6, "xterm"}, "unknown": {100, 30, "no-such-terminal"}} {
		t.Run(name, func(t *testing.T) {
			noLeaks(t)
			need(t, "pinentry-tty")
			pane := newPane(t, c.width, c.height)
			place := pane.place()
			place.TTYType = c.ttytype
			p := &Pinentry{Program: need(t, "pinentry-curses"), Path: "/usr/bin:/bin"}
			d, err := p.Open(t.Context(), place)
			if err != nil {
				t.Fatal(err)
			}
			defer d.Close()
			got := askPIN(t.Context(), d, Prompt{Description: "a description of more than one line in a small window", Label: "PIN:"})
			pane.see("PIN:")
			proctest.Until(t, "a terminal without echo", func() bool { return pane.modes().Lflag&unix.ECHO == 0 })
			pane.typeText("4711")
			pane.press("Enter")
			if a := <-got; a.err != nil || a.pin != "4711" {
				t.Errorf("%q, %v", a.pin, a.err)
			}
		})
	}
}

// When the window closes, the dialogue ends. Without that, pinentry-curses would go on for
// ever without a terminal.
func TestRealTerminalIsClosed(t *testing.T) {
	forEachPinentry(t, func(t *testing.T, _ string, p *Pinentry) {
		pane := newPane(t, 100, 30)
		d, err := p.Open(t.Context(), pane.place())
		if err != nil {
			t.Fatal(err)
		}
		defer d.Close()
		got := askPIN(t.Context(), d, Prompt{Description: "PIN of the card"})
		pane.see("PIN of the card")
		pane.tmux("kill-session")
		if a := <-got; a.err == nil {
			t.Errorf("a PIN of %d bytes came from a window that was closed", len(a.pin))
		}
	})
}
