// Package environment reads the present environment of the user's service manager. Desktops put
// variables into it that the services of a session need, such as the display, and often do so
// after the services have started.
//
// It promises to start nothing, and to wait no longer than a context lasts. Any program of the
// user may set the values.
package environment

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"time"

	"github.com/godbus/dbus/v5"

	"p11-agent/systemd/bus"
)

// timeout is how long the manager may take to answer.
const timeout = 2 * time.Second

// The manager, org.freedesktop.systemd1(5).
const (
	service = "org.freedesktop.systemd1"
	manager = "/org/freedesktop/systemd1"
)

// Read returns the environment as NAME=VALUE. It asks the manager on the user's bus, which is the
// socket "bus" in runtimeDir (XDG_RUNTIME_DIR). The error is bus.ErrNone when there is no such bus.
func Read(ctx context.Context, runtimeDir string) ([]string, error) {
	path := filepath.Join(runtimeDir, "bus")
	if !filepath.IsAbs(runtimeDir) {
		return nil, fmt.Errorf("%w: XDG_RUNTIME_DIR is not set", bus.ErrNone)
	}
	if st, err := os.Stat(path); err != nil || st.Mode().Type() != os.ModeSocket {
		return nil, fmt.Errorf("%w at %s", bus.ErrNone, path)
	}
	ctx, cancel := context.WithTimeout(ctx, timeout)
	defer cancel()
	c, err := bus.Connect(ctx, "unix:path="+dbus.EscapeBusAddressValue(path))
	if err != nil {
		return nil, err
	}
	defer c.Close()
	var v dbus.Variant
	// The call starts no manager: a manager that the bus starts would not have the
	// services of the session.
	call := c.Object(service, manager).CallWithContext(ctx, "org.freedesktop.DBus.Properties.Get", dbus.FlagNoAutoStart,
		service+".Manager", "Environment")
	if err := call.Store(&v); err != nil {
		return nil, fmt.Errorf("ask the user's service manager: %w", err)
	}
	env, ok := v.Value().([]string)
	if !ok {
		return nil, errors.New("the user's service manager answers with another type than a list of variables")
	}
	return env, nil
}
