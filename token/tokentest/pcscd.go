package tokentest

import (
	"context"
	"fmt"
	"math/rand/v2"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"

	"p11-agent/agent/peer/proctest"
	"p11-agent/token/tokentest/pivcard"
)

// pcscdDir is where pcscd has its socket and the file with its process id. That
// is compiled in; only clients can be told of another place (PCSCLITE_CSOCK_NAME).
const pcscdDir = "/run/pcscd"

// A PCSCD is a daemon of the test's own for smart cards, with virtual readers.
// It is not the machine's: where the test may have a mount namespace, the daemon
// sees a directory of the test as /run, and any number of them run at once.
// Where it may not (a container with few rights), the daemon takes the machine's
// place, and one test after the other has it: a lock file sees to that. Readers
// of hardware are left alone in both cases.
type PCSCD struct {
	// Slots are those of the readers, two each. They are empty at first.
	Slots []*pivcard.Slot

	t       testing.TB
	dir     string // of configuration and log
	run     string // where the socket is
	private bool
	daemon  *daemon
}

// StartPCSCD starts a PCSCD with readers of the given names, or one that is
// called "Virtual PCD" when none is given; a PC/SC client sees "Virtual PCD 00
// 00" and "Virtual PCD 00 01". libykcs11 wants a name that begins with "Yubico".
// All ends with the test, which is skipped, or fails in CI, where pcscd or vpcd
// is not installed.
func StartPCSCD(t testing.TB, readers ...string) *PCSCD {
	t.Helper()
	return startPCSCD(t, mayMount(t), readers)
}

func startPCSCD(t testing.TB, private bool, readers []string) *PCSCD {
	t.Helper()
	pcscdPath(t)
	driver := vpcdDriver(t)
	if len(readers) == 0 {
		readers = []string{"Virtual PCD"}
	}
	p := &PCSCD{t: t, dir: TempDir(t), run: pcscdDir, private: private}
	for _, d := range []string{"conf", "away", "usb", "run"} {
		if err := os.Mkdir(filepath.Join(p.dir, d), 0o700); err != nil {
			t.Fatal(err)
		}
	}
	if private {
		p.run = filepath.Join(p.dir, "run", "pcscd")
	} else {
		p.lock()
	}
	t.Cleanup(func() {
		for _, s := range p.Slots {
			s.Close()
		}
		if p.daemon != nil {
			p.daemon.endWithTest()
		}
	})
	// The ports are chosen, and then bound by pcscd: should another program be
	// faster, others are chosen.
	for range 10 {
		p.configure(driver, readers)
		p.Start()
		if !strings.Contains(p.daemon.output(), "Could not initialize connection") {
			return p
		}
		p.Stop()
	}
	t.Fatalf("no ports for virtual readers:\n%s", p.daemon.output())
	return nil
}

func pcscdPath(t testing.TB) string {
	t.Helper()
	const usual = "/usr/sbin/pcscd" // which others than root may not have in PATH
	if _, err := os.Stat(usual); err == nil {
		return usual
	}
	return program(t, "pcscd")
}

func vpcdDriver(t testing.TB) string {
	t.Helper()
	for _, pattern := range []string{"/usr/lib*/pcsc/drivers/serial/libifdvpcd.so*", "/usr/lib/*/pcsc/drivers/serial/libifdvpcd.so*"} {
		if found, _ := filepath.Glob(pattern); len(found) > 0 {
			return found[0]
		}
	}
	missing(t, "libifdvpcd.so (package vsmartcard-vpcd)")
	return ""
}

// inOwnRun runs a program that sees the directory $1 as /run.
var inOwnRun = []string{"/bin/sh", "-c", `mount --bind "$1" /run && shift && exec "$@"`, "sh"}

func unshareArgs(dir string) []string {
	args := []string{"unshare", "--mount"}
	if os.Geteuid() != 0 {
		args = append(args, "--map-root-user")
	}
	return append(append(args, inOwnRun...), dir)
}

func mayMount(t testing.TB) bool {
	t.Helper()
	args := append(unshareArgs(TempDir(t)), "true")
	return exec.Command(args[0], args[1:]...).Run() == nil
}

// lock waits until no other test has a pcscd. It fails where the machine has one.
func (p *PCSCD) lock() {
	p.t.Helper()
	f, err := os.OpenFile(filepath.Join(os.TempDir(), "p11-agent-test-pcscd.lock"), os.O_RDWR|os.O_CREATE, 0o600)
	if err != nil {
		p.t.Fatal(err)
	}
	p.t.Cleanup(func() { _ = f.Close() }) // unlocks
	if err := unix.Flock(int(f.Fd()), unix.LOCK_EX); err != nil {
		p.t.Fatal(err)
	}
	if p.answers() {
		missing(p.t, "the machine has a pcscd of its own, so that for the tests")
	}
	p.removeFiles()
}

func (p *PCSCD) configure(driver string, readers []string) {
	p.t.Helper()
	p.Slots = nil
	var conf strings.Builder
	for n, name := range readers {
		port := freePorts(p.t)
		if n > 0 {
			driver = p.copyDriver(driver, n)
		}
		fmt.Fprintf(&conf, "FRIENDLYNAME \"%s\"\nDEVICENAME /dev/null:%d\nLIBPATH %s\nCHANNELID %d\n\n", name, port, driver, port)
		for i := range 2 { // vpcd's second slot has the next port
			p.Slots = append(p.Slots, pivcard.NewSlot(fmt.Sprintf("127.0.0.1:%d", port+i)))
		}
	}
	if err := os.WriteFile(filepath.Join(p.dir, "conf", "vpcd"), []byte(conf.String()), 0o600); err != nil {
		p.t.Fatal(err)
	}
}

// copyDriver makes a copy of the driver for a further reader: vpcd has room for
// the two slots of one, in variables that each copy has of its own.
func (p *PCSCD) copyDriver(driver string, n int) string {
	p.t.Helper()
	path := filepath.Join(p.dir, fmt.Sprintf("libifdvpcd-%d.so", n))
	b, err := os.ReadFile(driver)
	if err == nil {
		err = os.WriteFile(path, b, 0o600)
	}
	if err != nil {
		p.t.Fatal(err)
	}
	return path
}

// freePorts returns the first of two neighbouring ports on which no program listens. They
// are below those that Linux gives to outgoing connections.
func freePorts(t testing.TB) int {
	t.Helper()
	for range 1000 {
		port := 20000 + 2*rand.IntN(6000)
		a, err := net.Listen("tcp4", fmt.Sprintf(":%d", port))
		if err != nil {
			continue
		}
		b, err := net.Listen("tcp4", fmt.Sprintf(":%d", port+1))
		_ = a.Close()
		if err == nil {
			_ = b.Close()
			return port
		}
	}
	t.Fatal("there are no free ports")
	return 0
}

// Env returns the variables that a client needs to find this daemon, to be added
// to those it has.
func (p *PCSCD) Env() []string { return []string{"PCSCLITE_CSOCK_NAME=" + p.socket()} }

func (p *PCSCD) socket() string { return filepath.Join(p.run, "pcscd.comm") }

func (p *PCSCD) answers() bool {
	c, err := net.Dial("unix", p.socket())
	if err != nil {
		return false
	}
	_ = c.Close()
	return true
}

// Insert puts a card into a slot and waits until pcscd has given it power. From
// then on its clients can see it.
func (p *PCSCD) Insert(slot int, c *pivcard.Card) {
	p.t.Helper()
	before := c.Counts().PowerUps
	p.Slots[slot].Insert(c)
	Until(p.t, "pcscd gives power to the card", func() bool { return c.Counts().PowerUps > before })
}

// Remove takes the card out of a slot and waits until pcscd has noticed. It does
// so at the moment when pcscd looks for the card, as a reader tells at once.
func (p *PCSCD) Remove(slot int) { p.remove(slot, (*pivcard.Slot).Eject) }

// Pull is Remove for a reader that does not tell: until pcscd looks, which is less
// than half a second, the card is there for its clients and does not answer.
//
// A program that uses the card by OpenSC 0.23 in between may wait forever: the library
// locks itself out (OpenSC issue 2707, mended in 0.24).
func (p *PCSCD) Pull(slot int) {
	p.remove(slot, func(s *pivcard.Slot, _ context.Context) { s.Remove() })
}

func (p *PCSCD) remove(slot int, remove func(*pivcard.Slot, context.Context)) {
	p.t.Helper()
	ctx, cancel := context.WithTimeout(p.t.Context(), patience)
	defer cancel()
	remove(p.Slots[slot], ctx)
	if err := p.Slots[slot].WaitEmpty(ctx); err != nil {
		p.t.Fatalf("pcscd does not notice that the card is gone: %v", err)
	}
}

// Start starts the daemon after Stop or Kill, and waits until it answers and has
// given power to the cards that are in its readers.
func (p *PCSCD) Start() {
	p.t.Helper()
	before := make(map[*pivcard.Card]int)
	for _, s := range p.Slots {
		if c := s.Card(); c != nil {
			before[c] = c.Counts().PowerUps
		}
	}
	p.start()
	for c, n := range before {
		Until(p.t, "pcscd gives power to the card", func() bool { return c.Counts().PowerUps > n })
	}
}

func (p *PCSCD) start() {
	p.t.Helper()
	var args []string
	if p.private {
		args = unshareArgs(filepath.Join(p.dir, "run"))
	}
	pcscd := pcscdPath(p.t)
	args = append(args, pcscd, "--foreground", "--config", filepath.Join(p.dir, "conf"))
	const everybody = "--disable-polkit" // an option only where pcscd has polkit
	if help, err := exec.Command(pcscd, "--help").CombinedOutput(); err == nil && strings.Contains(string(help), everybody) {
		args = append(args, everybody)
	}
	// Without drivers for USB the machine's own readers stay with its own daemon.
	env := []string{"PCSCLITE_HP_DROPDIR=" + filepath.Join(p.dir, "usb")}
	p.daemon = launchDaemon(p.t, "pcscd", p.dir, env, args)
	p.daemon.untilItAnswers(p.answers)
}

// Stop has the daemon end, and waits for it.
func (p *PCSCD) Stop() { p.daemon.end(syscall.SIGTERM) }

// Kill kills the daemon, as a crash would. What it leaves behind is removed: a
// service manager does that, too.
func (p *PCSCD) Kill() {
	p.daemon.end(syscall.SIGKILL)
	p.removeFiles()
}

// Restart is Stop and Start.
func (p *PCSCD) Restart() {
	p.t.Helper()
	p.Stop()
	p.Start()
}

// ResetCard resets the card in a slot, as another program does. It waits for the end of
// transactions.
func (p *PCSCD) ResetCard(slot int) {
	p.t.Helper()
	cmd := exec.Command(program(p.t, "opensc-tool"), "--reset", "--reader", strconv.Itoa(slot)) // each slot is a reader to PC/SC
	cmd.Env = append(os.Environ(), p.Env()...)
	if out, err := cmd.CombinedOutput(); err != nil {
		p.t.Errorf("reset the card in slot %d: %v\n%s", slot, err, out)
	}
}

// Unplug takes the readers away, with the cards in them. vpcd's are no devices
// that come and go while the daemon runs: it is started anew without them.
func (p *PCSCD) Unplug() {
	p.move("conf", "away")
	p.start()
}

// Plug brings the readers back after Unplug.
func (p *PCSCD) Plug() {
	p.move("away", "conf")
	p.Start()
}

func (p *PCSCD) move(from, to string) {
	p.t.Helper()
	p.Stop()
	if err := os.Rename(filepath.Join(p.dir, from, "vpcd"), filepath.Join(p.dir, to, "vpcd")); err != nil {
		p.t.Fatal(err)
	}
}

// Freeze stops the daemon where it is, as the sleep of the machine does; Thaw
// has it go on.
func (p *PCSCD) Freeze() { p.signal(unix.SIGSTOP) }

// Thaw is described at Freeze.
func (p *PCSCD) Thaw() { p.signal(unix.SIGCONT) }

func (p *PCSCD) signal(signal syscall.Signal) {
	p.t.Helper()
	if err := p.daemon.cmd.Process.Signal(signal); err != nil {
		p.t.Fatal(err)
	}
}

// Sockets returns how many sockets the daemon has open. With the same cards in
// its readers there is one more for each client.
func (p *PCSCD) Sockets() int {
	p.t.Helper()
	return proctest.Files(p.t, p.daemon.cmd.Process.Pid, "socket:")
}

func (p *PCSCD) removeFiles() {
	for _, name := range []string{"pcscd.comm", "pcscd.pid"} {
		_ = os.Remove(filepath.Join(p.run, name)) // there may be none
	}
}

// NewCard makes a card, or fails the test. Without a name it is called "PIV
// card"; what it is asked and answers shows with the test.
func NewCard(t testing.TB, o pivcard.Options) *pivcard.Card {
	t.Helper()
	if o.Trace == nil {
		o.Trace = func(line string) { _, _ = fmt.Fprintln(t.Output(), line) }
	}
	c, err := pivcard.New(o)
	if err != nil {
		t.Fatal(err)
	}
	return c
}
