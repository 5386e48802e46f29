// Package login1 hears from systemd-logind that the machine goes to sleep, and that the
// screen of the user is locked.
//
// It promises to believe only logind: it ignores what other programs say on the bus. The
// machine waits with sleep until Options.Sleep returns, for 3 s at most. If the bus or
// logind is missing, the package waits for it, and logs that at level debug only.
package login1

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"sync"
	"time"

	"github.com/godbus/dbus/v5"

	"p11-agent/systemd/bus"
)

// The service, org.freedesktop.login1(5).
const (
	service      = "org.freedesktop.login1"
	servicePath  = "/org/freedesktop/login1"
	manager      = service + ".Manager"
	session      = service + ".Session"
	sessionsPath = servicePath + "/session"
	properties   = "org.freedesktop.DBus.Properties"
)

const (
	// sleepBound is how long sleep waits for the agent. logind waits for 5 s unless its
	// configuration says otherwise (InhibitDelayMaxSec= in logind.conf(5)).
	sleepBound = 3 * time.Second
	// callTimeout is how long logind may take for an answer.
	callTimeout = 3 * time.Second
	// retryMin and retryMax bound the pause before the bus is tried again; it
	// doubles each time.
	retryMin = 100 * time.Millisecond
	retryMax = 5 * time.Minute
)

// Options make a Watch. The Watch calls the functions in goroutines of their own, and Run waits for
// these. The contexts of the functions end with the context of Run.
type Options struct {
	// Bus is the address of the system's bus.
	Bus string
	// UID is the user whose sessions count.
	UID int
	// Sleep is called before the machine goes to sleep, which waits for it for as
	// long as its context lasts.
	Sleep func(ctx context.Context)
	// Wake is called when the machine has woken up.
	Wake func(ctx context.Context)
	// Lock is called when the screen of one of the user's sessions is locked.
	Lock func(ctx context.Context)
	Log  *slog.Logger
}

// A Watch listens to logind.
type Watch struct {
	opts   Options
	change chan struct{} // one element: delay has changed
	wg     sync.WaitGroup

	mu    sync.Mutex
	delay bool
}

// New returns a Watch. It does nothing until Run.
func New(o Options) *Watch { return &Watch{opts: o, change: make(chan struct{}, 1)} }

// Delay sets whether sleep waits for Options.Sleep. Any goroutine may call it at any time.
func (w *Watch) Delay(yes bool) {
	w.mu.Lock()
	w.delay = yes
	w.mu.Unlock()
	select {
	case w.change <- struct{}{}:
	default:
	}
}

func (w *Watch) delays() bool {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.delay
}

// Run listens until ctx ends. When Run returns, no goroutine of it is left.
func (w *Watch) Run(ctx context.Context) {
	defer w.wg.Wait()
	said := ""
	for pause := retryMin; ; pause = min(2*pause, retryMax) {
		listened, err := w.listen(ctx)
		if ctx.Err() != nil {
			return
		}
		if listened {
			pause, said = retryMin, ""
		}
		if err != nil && err.Error() != said {
			said = err.Error()
			w.opts.Log.Debug("sleep and screen lock are not heard of", "reason", err)
		}
		select {
		case <-ctx.Done():
			return
		case <-time.After(pause):
		}
	}
}

// listener is a connection to the bus and its state. One goroutine uses it.
type listener struct {
	*Watch
	conn  *bus.Conn
	owner string   // logind's unique name; empty: it is not there
	hold  *os.File // sleep waits until it is closed; nil: sleep does not wait
	fails int      // how often in a row logind refused to hold sleep
	retry <-chan time.Time
	dozes bool // true from the signal that sleep begins until the signal that it ends
}

// listen listens on one connection. listened tells whether the connection worked.
func (w *Watch) listen(ctx context.Context) (listened bool, err error) {
	conn, err := bus.Connect(ctx, w.opts.Bus)
	if err != nil {
		return false, err
	}
	l := &listener{Watch: w, conn: conn}
	defer l.release()
	defer conn.Close()
	signals := make(chan *dbus.Signal)
	conn.Signal(signals)
	if err := l.subscribe(ctx); err != nil {
		return false, err
	}
	var owner string
	if err := l.call(ctx, conn.BusObject(), "org.freedesktop.DBus.GetNameOwner", service).Store(&owner); err != nil {
		if e, ok := errors.AsType[dbus.Error](err); !ok || e.Name != "org.freedesktop.DBus.Error.NameHasNoOwner" {
			return false, err
		}
	}
	l.meet(ctx, owner)
	for {
		select {
		case s, ok := <-signals:
			if !ok {
				return true, errors.New("the bus has gone")
			}
			l.hear(ctx, s)
		case <-w.change:
			l.prepare(ctx)
		case <-l.retry:
			l.prepare(ctx)
		case <-ctx.Done():
			return true, ctx.Err()
		}
	}
}

func (l *listener) call(ctx context.Context, o dbus.BusObject, method string, args ...any) *dbus.Call {
	ctx, cancel := context.WithTimeout(ctx, callTimeout)
	defer cancel()
	return o.CallWithContext(ctx, method, dbus.FlagNoAutoStart, args...)
}

// subscribe asks the bus for the signals of logind.
func (l *listener) subscribe(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, callTimeout)
	defer cancel()
	from := dbus.WithMatchSender(service)
	for _, rule := range [][]dbus.MatchOption{
		{dbus.WithMatchSender("org.freedesktop.DBus"), dbus.WithMatchMember("NameOwnerChanged"), dbus.WithMatchArg(0, service)},
		{from, dbus.WithMatchInterface(manager), dbus.WithMatchMember("PrepareForSleep")},
		{from, dbus.WithMatchInterface(session), dbus.WithMatchMember("Lock"), dbus.WithMatchPathNamespace(sessionsPath)},
		{from, dbus.WithMatchInterface(properties), dbus.WithMatchArg(0, session), dbus.WithMatchPathNamespace(sessionsPath)},
	} {
		if err := l.conn.AddMatchSignalContext(ctx, rule...); err != nil {
			return err
		}
	}
	return nil
}

// meet starts anew with a logind that has come. owner is empty when logind has gone.
func (l *listener) meet(ctx context.Context, owner string) {
	l.owner, l.dozes, l.fails = owner, false, 0
	if owner == "" {
		l.opts.Log.Debug("logind is not there: sleep and screen lock are not heard of")
		return
	}
	l.opts.Log.Debug("listening to logind")
	l.release() // the file of another logind
	l.prepare(ctx)
	// The screen may have been locked while the agent did not listen.
	var sessions []struct {
		ID   string
		UID  uint32
		User string
		Seat string
		Path dbus.ObjectPath
	}
	if err := l.call(ctx, l.conn.Object(l.owner, servicePath), manager+".ListSessions").Store(&sessions); err != nil {
		l.opts.Log.Debug("sessions cannot be listed", "reason", err)
		return
	}
	for _, s := range sessions {
		var locked bool
		if int(s.UID) == l.opts.UID && l.property(ctx, s.Path, "LockedHint", &locked) == nil && locked {
			l.run(ctx, l.opts.Lock)
			return
		}
	}
}

func (l *listener) property(ctx context.Context, path dbus.ObjectPath, name string, value any) error {
	var v dbus.Variant
	if err := l.call(ctx, l.conn.Object(l.owner, path), properties+".Get", session, name).Store(&v); err != nil {
		return err
	}
	return v.Store(value)
}

func (l *listener) run(ctx context.Context, f func(context.Context)) {
	l.wg.Go(func() { f(ctx) })
}

// prepare asks logind to delay sleep for the agent, or ends the delay, as Watch.Delay says.
// When logind refuses, prepare tries again: a logind that has just started, or a busy
// machine, refuses once. The second refusal causes a warning.
func (l *listener) prepare(ctx context.Context) {
	l.retry = nil
	switch want := l.delays(); {
	case !want:
		l.release()
	case l.hold == nil && l.owner != "" && !l.dozes:
		hold, err := inhibit(ctx, l.opts.Bus)
		if err != nil {
			level := slog.LevelDebug
			if l.fails == 1 {
				level = slog.LevelWarn
			}
			l.opts.Log.Log(ctx, level, "sleep cannot be made to wait until tokens are logged out", "reason", err)
			l.retry = time.After(min(retryMin<<min(l.fails, 20), retryMax))
			l.fails++
			return
		}
		l.hold, l.fails = hold, 0
		l.opts.Log.Debug("sleep waits until tokens are logged out")
	}
}

func (l *listener) release() {
	if l.hold != nil {
		_ = l.hold.Close()
		l.hold = nil
	}
}

// inhibit returns a file that sleep waits for until it is closed. inhibit uses a connection of its
// own: only that takes files. The other connection stays open for long, and any program can send to
// it.
func inhibit(ctx context.Context, address string) (*os.File, error) {
	ctx, cancel := context.WithTimeout(ctx, callTimeout)
	defer cancel()
	conn, err := bus.ConnectForFiles(ctx, address)
	if err != nil {
		return nil, err
	}
	defer conn.Close()
	// A call with a context would drop an answer that comes late, and leave the file
	// in it open. This call ends when the connection does.
	call := conn.Object(service, servicePath).Go(manager+".Inhibit", dbus.FlagNoAutoStart, make(chan *dbus.Call, 1),
		"sleep", "p11-agent", "log out of tokens", "delay")
	select {
	case <-call.Done:
	case <-ctx.Done():
		conn.Close()
		<-call.Done
	}
	var fd dbus.UnixFD
	if err := call.Store(&fd); err != nil {
		return nil, fmt.Errorf("inhibit sleep: %w", err)
	}
	return os.NewFile(uintptr(fd), "inhibitor"), nil
}

// hear acts on a signal. Any program may send one, so hear checks the sender.
func (l *listener) hear(ctx context.Context, s *dbus.Signal) {
	switch {
	case s.Sender == "org.freedesktop.DBus" && s.Name == "org.freedesktop.DBus.NameOwnerChanged":
		var name, old, owner string
		if dbus.Store(s.Body, &name, &old, &owner) == nil && name == service && owner != l.owner {
			l.meet(ctx, owner)
		}
	case l.owner == "" || s.Sender != l.owner:
	case s.Name == manager+".PrepareForSleep" && s.Path == servicePath:
		var begins bool
		if dbus.Store(s.Body, &begins) != nil {
			return
		}
		l.dozes = begins
		if begins {
			l.sleep(ctx)
		} else {
			l.prepare(ctx)
			l.run(ctx, l.opts.Wake)
		}
	case s.Name == session+".Lock":
		l.lock(ctx, s.Path)
	case s.Name == properties+".PropertiesChanged":
		var of string
		var changed map[string]dbus.Variant
		var invalid []string
		if dbus.Store(s.Body, &of, &changed, &invalid) != nil || of != session {
			return
		}
		if locked, ok := changed["LockedHint"].Value().(bool); ok && locked {
			l.lock(ctx, s.Path)
		}
	}
}

func (l *listener) sleep(ctx context.Context) {
	hold := l.hold
	l.hold = nil
	l.wg.Go(func() {
		ctx, cancel := context.WithTimeout(ctx, sleepBound)
		defer cancel()
		if hold != nil {
			// Sleep must not wait longer, even if the function ignores its context.
			defer context.AfterFunc(ctx, func() { _ = hold.Close() })()
			defer hold.Close() // it may be closed by now
		}
		l.opts.Sleep(ctx)
	})
}

// lock acts on a locked session, unless the session is known to belong to another user.
func (l *listener) lock(ctx context.Context, path dbus.ObjectPath) {
	var user struct {
		UID  uint32
		Path dbus.ObjectPath
	}
	if err := l.property(ctx, path, "User", &user); err == nil && int(user.UID) != l.opts.UID {
		return
	}
	l.run(ctx, l.opts.Lock)
}
