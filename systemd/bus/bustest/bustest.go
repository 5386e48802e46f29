// Package bustest has D-Bus message buses for tests, each a dbus-daemon of the
// test's own, and what tests put on them in place of a desktop and of logind.
package bustest

import (
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"runtime"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/godbus/dbus/v5"
)

// patience is how long is waited for what must happen.
const patience = 30 * time.Second

// A Bus is a message bus, on which everybody may do everything.
type Bus struct {
	t    testing.TB
	dir  string
	cmd  *exec.Cmd
	done chan struct{} // closed when the process has ended
}

// Start starts a Bus, which ends with the test. The test is skipped, or fails in
// CI, where dbus-daemon is not installed.
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

// Dir returns a directory that has the Bus's socket as "bus", as a runtime
// directory has.
func (b *Bus) Dir() string { return b.dir }

// Socket returns the path of the socket.
func (b *Bus) Socket() string { return filepath.Join(b.dir, "bus") }

// Address returns what DBUS_SESSION_BUS_ADDRESS has.
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
		// The kernel kills the child when the thread ends that has started it.
		runtime.LockOSThread()
		err := cmd.Start()
		started <- err
		if err == nil {
			_ = cmd.Wait() // it is ended by a signal
		}
	}()
	if err := <-started; err != nil {
		b.t.Fatal(err)
	}
	b.cmd, b.done = cmd, done
	until(b.t, "the bus answers", func() bool {
		c, err := net.Dial("unix", b.Socket())
		if err != nil {
			return false
		}
		_ = c.Close()
		return true
	})
}

// Kill ends the Bus, as a crash would. It may have ended.
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

// Hang has the Bus do nothing until Resume.
func (b *Bus) Hang() { b.signal(syscall.SIGSTOP) }

// Resume ends Hang.
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

// SendTo sends a signal to one connection, whether or not it wants it.
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

func until(t testing.TB, what string, condition func() bool) {
	t.Helper()
	for end := time.Now().Add(patience); !condition(); time.Sleep(time.Millisecond) {
		if time.Now().After(end) {
			t.Fatalf("it did not happen that %s", what)
		}
	}
}

// NoLeaks fails the test when it leaves a goroutine that has to do with a bus, or
// an open file. It comes before everything else in a test, so that it looks when
// everything else has ended.
func NoLeaks(t testing.TB) {
	t.Helper()
	files := openFiles(t)
	t.Cleanup(func() {
		until(t, "files that were opened are closed", func() bool { return openFiles(t) <= files })
		buf := make([]byte, 4<<20)
		left := ""
		defer func() {
			if left != "" {
				t.Log(left)
			}
		}()
		until(t, "every goroutine ends", func() bool {
			left = ""
			for g := range strings.SplitSeq(string(buf[:runtime.Stack(buf, true)]), "\n\n") {
				// TestMain is ours as well, and waits for all tests.
				if ours.MatchString(g) && !strings.Contains(g, "bustest.NoLeaks") && !strings.Contains(g, "testing.(*M).Run(") {
					left = g
				}
			}
			return left == ""
		})
	})
}

// ours is code that works for a bus.
var ours = regexp.MustCompile(`godbus|p11-agent/(systemd/bus|systemd/login1|systemd/bus/bustest|pinentry/notify)\.`)

func openFiles(t testing.TB) (n int) {
	t.Helper()
	list, err := os.ReadDir("/proc/self/fd")
	if err != nil {
		t.Fatal(err)
	}
	for _, e := range list {
		to, err := os.Readlink("/proc/self/fd/" + e.Name())
		if err == nil && (strings.HasPrefix(to, "pipe:") || strings.HasPrefix(to, "socket:")) {
			n++
		}
	}
	return n
}
