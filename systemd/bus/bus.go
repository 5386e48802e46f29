// Package bus connects to a D-Bus message bus that is there.
//
// It promises that it starts no bus, and waits no longer than a context lasts. No program on
// the bus can hand this process open files, which would stay open, except on a connection for
// files. Callers decide what to say on the bus. Any program may send names, texts and signals:
// check the sender.
package bus

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"github.com/godbus/dbus/v5"
)

// ErrNone says that there is no bus.
var ErrNone = errors.New("there is no bus")

// maxAddress is the most addresses of one text that are tried.
const maxAddress = 8

// Session returns the address of the user's session bus: DBUS_SESSION_BUS_ADDRESS, or the socket in
// XDG_RUNTIME_DIR if there is one. The error is ErrNone.
func Session() (string, error) {
	if address := os.Getenv("DBUS_SESSION_BUS_ADDRESS"); address != "" {
		return address, nil
	}
	dir := os.Getenv("XDG_RUNTIME_DIR")
	if !filepath.IsAbs(dir) {
		return "", ErrNone
	}
	path := filepath.Join(dir, "bus")
	if st, err := os.Stat(path); err != nil || st.Mode().Type() != os.ModeSocket {
		return "", ErrNone
	}
	return "unix:path=" + dbus.EscapeBusAddressValue(path), nil
}

// System returns the address of the machine's bus: DBUS_SYSTEM_BUS_ADDRESS, or the usual one.
func System() string {
	if address := os.Getenv("DBUS_SYSTEM_BUS_ADDRESS"); address != "" {
		return address
	}
	return "unix:path=/run/dbus/system_bus_socket"
}

// A Conn is a connection to a bus. It ends with Close, with the context of Connect, or when the bus
// goes. Its own Context shows that.
type Conn struct {
	*dbus.Conn
	raw  net.Conn
	stop func() bool
}

// greetTimeout is how long a bus may take to greet.
const greetTimeout = 3 * time.Second

// Connect connects to the bus at an address and greets it. The connection ends with ctx.
func Connect(ctx context.Context, address string) (*Conn, error) {
	return connect(ctx, address, func(raw net.Conn, o ...dbus.ConnOption) (*dbus.Conn, error) {
		return dbus.NewConn(raw, o...) // a transport without files
	})
}

// ConnectForFiles does the same as Connect, for calls whose answers have open files. Close the
// connection soon: other programs can send files, too.
func ConnectForFiles(ctx context.Context, address string) (*Conn, error) {
	return connect(ctx, address, func(raw net.Conn, o ...dbus.ConnOption) (*dbus.Conn, error) {
		return dbus.DialUnix(raw.(*net.UnixConn), o...) //nolint:forcetypeassert // dial makes no other
	})
}

func connect(ctx context.Context, address string, on func(net.Conn, ...dbus.ConnOption) (*dbus.Conn, error)) (*Conn, error) {
	greet, cancel := context.WithTimeout(ctx, greetTimeout)
	defer cancel()
	raw, err := dial(greet, address)
	if err != nil {
		return nil, err
	}
	// Closing the socket ends every call that waits for it. Some calls of godbus
	// would wait without end.
	hangUp := func() { _ = raw.Close() }
	c := &Conn{raw: raw, stop: context.AfterFunc(ctx, hangUp)}
	late := context.AfterFunc(greet, hangUp)
	c.Conn, err = on(raw, dbus.WithContext(ctx), dbus.WithSignalHandler(dbus.NewSequentialSignalHandler()))
	if err == nil {
		if err = c.Auth([]dbus.Auth{dbus.AuthExternal(strconv.Itoa(os.Geteuid()))}); err == nil {
			err = c.Hello()
		}
	}
	if !late() {
		err = greet.Err()
	}
	if err != nil {
		c.Close()
		return nil, fmt.Errorf("greet the bus: %w", err)
	}
	return c, nil
}

// Close closes the connection. It does not wait.
func (c *Conn) Close() {
	c.stop()
	_ = c.raw.Close()
	if c.Conn != nil {
		_ = c.Conn.Close()
	}
}

// dial connects to the first of the addresses that takes a connection (D-Bus specification, "Server
// Addresses"). It tries Unix sockets only: other transports run programs or use a network.
func dial(ctx context.Context, address string) (net.Conn, error) {
	err := fmt.Errorf("%w at %q", ErrNone, address)
	for i, one := range strings.Split(address, ";") {
		keys, ok := strings.CutPrefix(one, "unix:")
		if !ok || i >= maxAddress {
			continue
		}
		name := ""
		for kv := range strings.SplitSeq(keys, ",") {
			key, value, _ := strings.Cut(kv, "=")
			value, bad := dbus.UnescapeBusAddressValue(value)
			switch {
			case bad != nil || value == "":
			case key == "path":
				name = value
			case key == "abstract":
				name = "@" + value
			}
		}
		if name == "" {
			continue
		}
		var c net.Conn
		if c, err = new(net.Dialer).DialContext(ctx, "unix", name); err == nil {
			return c, nil
		}
	}
	return nil, err
}
