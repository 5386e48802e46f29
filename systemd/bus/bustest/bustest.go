// Package bustest has D-Bus message buses for tests. Each bus is a dbus-daemon of its test.
// Tests put services on the bus that stand in for a desktop, systemd and logind.
package bustest

import (
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"syscall"
	"testing"

	"github.com/godbus/dbus/v5"

	"p11-agent/agent/peer/proctest"
)

const patience = proctest.Patience

// A Bus is a message bus. Every client may do everything on it.
type Bus struct {
	t    testing.TB
	dir  string
	cmd  *exec.Cmd
	done chan struct{} // closed when the process has ended
}

// Start starts a Bus, which ends with the test. If dbus-daemon is not installed, Start skips
// the test. In CI, the test fails.
func Start(t testing.TB) *Bus {
	t.Helper()
	if _, err := exec.LookPath("dbus-daemon"); err != nil {
		if os.Getenv("CI") == "true" {
			t.Fatal("dbus-daemon is not installed")
		}
		t.Skip("dbus-daemon is not installed")
	}
	dir, err := os.MkdirTemp("", "bus-") // short: it will hold a socket
	if err != nil {
		t.Fatal(err)
	}
	b := &Bus{t: t, dir: dir}
	t.Cleanup(func() {
		b.Kill()
		if err := os.RemoveAll(dir); err != nil {
			t.Error(err)
		}
	})
	config := fmt.Sprintf(`<busconfig>
		<type>session</type>
		<listen>unix:path=%s</listen>
		<auth>EXTERNAL</auth>
		<policy context="default">
			<allow send_destination="*" eavesdrop="true"/>
			<allow eavesdrop="true"/>
			<allow own="*"/>
		</policy>
	</busconfig>`, b.Socket())
	if err := os.WriteFile(filepath.Join(dir, "config"), []byte(config), 0o600); err != nil {
		t.Fatal(err)
	}
	b.Restart()
	return b
}

// Dir returns the directory of the Bus's socket. Like a runtime directory, it has the
// socket as "bus".
func (b *Bus) Dir() string { return b.dir }

// Socket returns the path of the socket.
func (b *Bus) Socket() string { return filepath.Join(b.dir, "bus") }

// Address returns the address of the Bus, for DBUS_SESSION_BUS_ADDRESS.
func (b *Bus) Address() string { return "unix:path=" + b.Socket() }

// Restart starts the Bus again after Kill.
func (b *Bus) Restart() {
	b.t.Helper()
	cmd := exec.Command("dbus-daemon", "--nofork", "--nopidfile", "--config-file="+filepath.Join(b.dir, "config"))
	cmd.Stderr = b.t.Output()
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	started, done := make(chan error), make(chan struct{})
	go func() {
		defer close(done)
		// When the thread that has started the child ends, the kernel kills the child. The thread
		// goes on afterwards: it may have started other processes before.
		runtime.LockOSThread()
		defer runtime.UnlockOSThread()
		err := cmd.Start()
		started <- err
		if err == nil {
			_ = cmd.Wait() // a signal ends the process
		}
	}()
	if err := <-started; err != nil {
		b.t.Fatal(err)
	}
	b.cmd, b.done = cmd, done
	proctest.Until(b.t, "the bus answers", func() bool {
		c, err := net.Dial("unix", b.Socket())
		if err != nil {
			return false
		}
		_ = c.Close()
		return true
	})
}

// Kill ends the Bus, as a crash would. The Bus may have ended before.
func (b *Bus) Kill() {
	b.t.Helper()
	if b.cmd == nil {
		return
	}
	_ = b.cmd.Process.Kill()
	<-b.done
	b.cmd = nil
	if err := os.Remove(b.Socket()); err != nil && !errors.Is(err, os.ErrNotExist) {
		b.t.Error(err)
	}
}

// Hang stops the Bus until Resume.
func (b *Bus) Hang() { b.signal(syscall.SIGSTOP) }

// Resume lets the Bus go on after Hang.
func (b *Bus) Resume() { b.signal(syscall.SIGCONT) }

func (b *Bus) signal(s syscall.Signal) {
	b.t.Helper()
	if err := b.cmd.Process.Signal(s); err != nil {
		b.t.Fatal(err)
	}
}

// Connect connects to the Bus, for as long as the test lasts.
func (b *Bus) Connect() *dbus.Conn {
	b.t.Helper()
	c, err := dbus.Connect(b.Address())
	if err != nil {
		b.t.Fatal(err)
	}
	b.t.Cleanup(func() { _ = c.Close() })
	return c
}

// SendTo sends a signal to a connection by its name. The connection needs no match for it.
func SendTo(c *dbus.Conn, to, path, name string, body []any) {
	i := strings.LastIndexByte(name, '.')
	m := &dbus.Message{
		Type: dbus.TypeSignal, Flags: dbus.FlagNoReplyExpected, Body: body,
		Headers: map[dbus.HeaderField]dbus.Variant{
			dbus.FieldDestination: dbus.MakeVariant(to),
			dbus.FieldPath:        dbus.MakeVariant(dbus.ObjectPath(path)),
			dbus.FieldInterface:   dbus.MakeVariant(name[:i]),
			dbus.FieldMember:      dbus.MakeVariant(name[i+1:]),
		},
	}
	if len(body) > 0 {
		m.Headers[dbus.FieldSignature] = dbus.MakeVariant(dbus.SignatureOf(body...))
	}
	c.Send(m, nil)
}

// own takes a name on the Bus.
func (b *Bus) own(c *dbus.Conn, name string) {
	b.t.Helper()
	if got, err := c.RequestName(name, dbus.NameFlagDoNotQueue); err != nil || got != dbus.RequestNameReplyPrimaryOwner {
		b.t.Fatalf("take the name %s: %v, %v", name, got, err)
	}
}

// NoLeaks fails the test if the test leaves an open file, or a goroutine that works for a
// bus. code names the code of the test's own package: see [proctest.NoLeaks].
func NoLeaks(t testing.TB, code ...string) {
	t.Helper()
	proctest.NoLeaks(t, append(code, proctest.Methods[dbus.Conn](), proctest.Methods[Bus]())...)
}
