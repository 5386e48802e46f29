package bus_test

import (
	"context"
	"errors"
	"net"
	"os"
	"path/filepath"
	"testing"
	"time"

	"github.com/godbus/dbus/v5"

	"p11-agent/agent/door/doortest"
	"p11-agent/systemd/bus"
	"p11-agent/systemd/bus/bustest"
)

func TestSession(t *testing.T) {
	dir := doortest.Dir(t)
	session := func(env, runtime string) string {
		t.Helper()
		t.Setenv("DBUS_SESSION_BUS_ADDRESS", env)
		t.Setenv("XDG_RUNTIME_DIR", runtime)
		address, err := bus.Session()
		if err != nil {
			if !errors.Is(err, bus.ErrNone) {
				t.Errorf("it fails with %v", err)
			}
			return "none"
		}
		return address
	}
	want := func(when, got, want string) {
		t.Helper()
		if got != want {
			t.Errorf("%s: %q, want %q", when, got, want)
		}
	}
	want("nothing is set", session("", ""), "none")
	want("there is no socket", session("", dir), "none")
	file := filepath.Join(dir, "bus")
	if err := os.WriteFile(file, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	want("there is another file", session("", dir), "none")
	want("the variable", session("unix:path=/x", dir), "unix:path=/x")
	if err := os.Remove(file); err != nil {
		t.Fatal(err)
	}
	l, err := net.Listen("unix", file)
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	want("there is a socket", session("", dir), "unix:path="+dbus.EscapeBusAddressValue(file))
	want("a directory that depends", session("", "."), "none")
}

func TestConnect(t *testing.T) {
	bustest.NoLeaks(t)
	b := bustest.Start(t)
	for name, address := range map[string]string{
		"plain":            b.Address(),
		"with a GUID":      b.Address() + ",guid=00",
		"escaped":          "unix:path=" + b.Dir() + "%2fbus",
		"after a dead one": "unix:path=/nowhere;" + b.Address(),
		"after others":     "unixexec:path=/bin/true;autolaunch:;tcp:host=localhost,port=1;;" + b.Address(),
	} {
		t.Run(name, func(t *testing.T) {
			c, err := bus.Connect(t.Context(), address)
			if err != nil {
				t.Fatal(err)
			}
			defer c.Close()
			var id string
			if err := c.BusObject().CallWithContext(t.Context(), "org.freedesktop.DBus.GetId", 0).Store(&id); err != nil || id == "" {
				t.Errorf("it has no connection: %v", err)
			}
		})
	}
	for name, address := range map[string]string{
		"nothing": "", "a program": "unixexec:path=/bin/true", "a search": "autolaunch:", "a network": "tcp:host=localhost,port=1",
		"no name": "unix:", "nonsense": "unix:path=%zz", "a directory": "unix:dir=/tmp",
	} {
		t.Run("not "+name, func(t *testing.T) {
			if c, err := bus.Connect(t.Context(), address); !errors.Is(err, bus.ErrNone) {
				t.Errorf("%v, %v", c, err)
			}
		})
	}
	t.Run("nobody there", func(t *testing.T) {
		if c, err := bus.Connect(t.Context(), "unix:path="+b.Dir()+"/none"); !errors.Is(err, os.ErrNotExist) {
			t.Errorf("%v, %v", c, err)
		}
	})
}

// Only a connection of ConnectForFiles takes files.
func TestFiles(t *testing.T) {
	bustest.NoLeaks(t)
	b := bustest.Start(t)
	l := b.Login1()
	inhibit := func(c *bus.Conn) (dbus.UnixFD, error) {
		var fd dbus.UnixFD
		err := c.Object("org.freedesktop.login1", "/org/freedesktop/login1").CallWithContext(t.Context(),
			"org.freedesktop.login1.Manager.Inhibit", 0, "sleep", "test", "test", "delay").Store(&fd)
		return fd, err
	}
	plain, err := bus.Connect(t.Context(), b.Address())
	if err != nil {
		t.Fatal(err)
	}
	defer plain.Close()
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	call := plain.Object("org.freedesktop.login1", "/org/freedesktop/login1").GoWithContext(ctx,
		"org.freedesktop.login1.Manager.Inhibit", 0, nil, "sleep", "test", "test", "delay")
	// The bus does not hand it on: the file is gone when that is found out.
	for l.Held() == 0 && len(l.Asked()) == 0 || l.Held() > 0 {
		time.Sleep(time.Millisecond)
		if ctx.Err() != nil {
			t.Fatal("the file is still there")
		}
	}
	cancel()
	if <-call.Done; call.Err == nil {
		t.Errorf("it was answered: %v", call.Body)
	}
	c, err := bus.ConnectForFiles(t.Context(), b.Address())
	if err != nil {
		t.Fatal(err)
	}
	fd, err := inhibit(c)
	c.Close()
	if err != nil {
		t.Fatal(err)
	}
	if l.Held() != 1 {
		t.Errorf("%d files are held without their connection", l.Held())
	}
	if err := os.NewFile(uintptr(fd), "inhibitor").Close(); err != nil {
		t.Error(err)
	}
}

// If a bus does not answer, a call ends with its context.
func TestHang(t *testing.T) {
	bustest.NoLeaks(t)
	dir := t.TempDir()
	l, err := net.Listen("unix", filepath.Join(dir, "bus"))
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	t.Run("at the greeting", func(t *testing.T) {
		ctx, cancel := context.WithCancel(t.Context())
		go func() {
			c, err := l.Accept()
			if err != nil {
				return
			}
			defer c.Close()
			_, _ = c.Read(make([]byte, 1))
			cancel()
			_, _ = c.Read(make([]byte, 100)) // the rest of the messages
			_, _ = c.Read(make([]byte, 1))   // its end
		}()
		if c, err := bus.Connect(ctx, "unix:path="+dir+"/bus"); !errors.Is(err, context.Canceled) {
			t.Errorf("%v, %v", c, err)
		}
	})
	b := bustest.Start(t)
	c, err := bus.Connect(t.Context(), b.Address())
	if err != nil {
		t.Fatal(err)
	}
	b.Hang()
	ctx, cancel := context.WithCancel(t.Context())
	call := c.BusObject().GoWithContext(ctx, "org.freedesktop.DBus.GetId", 0, nil)
	cancel()
	if <-call.Done; !errors.Is(call.Err, context.Canceled) {
		t.Error(call.Err)
	}
	c.Close()
	b.Resume()
}

// A connection ends with its context and with its bus, and says so.
func TestEnd(t *testing.T) {
	bustest.NoLeaks(t)
	b := bustest.Start(t)
	ctx, cancel := context.WithCancel(t.Context())
	one, err := bus.Connect(ctx, b.Address())
	if err != nil {
		t.Fatal(err)
	}
	two, err := bus.Connect(t.Context(), b.Address())
	if err != nil {
		t.Fatal(err)
	}
	three, err := bus.Connect(context.Background(), b.Address()) // only Close ends it
	if err != nil {
		t.Fatal(err)
	}
	three.Close()
	<-three.Context().Done()
	cancel()
	<-one.Context().Done()
	if two.Context().Err() != nil {
		t.Error("the other one has ended, too")
	}
	b.Kill()
	<-two.Context().Done()
	two.Close()
	one.Close()
	one.Close()
}
