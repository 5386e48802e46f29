package main

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"slices"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"p11-agent/agent"
	"p11-agent/agent/peer"
	"p11-agent/pinentry"
	"p11-agent/pinentry/waiting"
	"p11-agent/systemd/environment"
)

// An asker asks persons where they are. Where that is, is found out when there
// is something to ask. These are tried in turn:
//
//   - the display of the client that asks, and then its terminal,
//   - the display that the user's service manager knows now,
//   - the display that the agent was started with, or none: there are pinentry
//     programs that need neither display nor terminal,
//   - the terminal that GPG_TTY named when the agent was started, and the one that
//     the agent itself is in the foreground of,
//   - SSH_ASKPASS of the agent.
//
// A place that cannot be asked at is followed by the next. What a person answers,
// no among it, is the answer. The programs are those of the agent's configuration
// and environment, whoever asks.
type asker struct {
	pinentry *pinentry.Pinentry
	own      peer.Environment // the agent's
	userData string           // PINENTRY_USER_DATA
	gpgTTY   fixedTerminal
	// manager reads the environment of the user's service manager.
	manager func(context.Context) ([]string, error)
	log     *slog.Logger
	// patience is how long a confirmation stays without an answer.
	patience time.Duration
}

// newAsker makes the asker of an agent with this environment.
func newAsker(c *config, getenv func(string) string, environ []string, log *slog.Logger) *asker {
	own := environmentOf(environ)
	return &asker{
		pinentry: &pinentry.Pinentry{
			Program: c.Pinentry.Program,
			Askpass: getenv("SSH_ASKPASS"),
			Path:    getenv("PATH"),
			Home:    getenv("HOME"),
			NoGrab:  c.Pinentry.Grab != nil && !*c.Pinentry.Grab,
			Log:     log,
		},
		own:      own,
		userData: getenv("PINENTRY_USER_DATA"),
		gpgTTY:   fixTerminal(own.GPGTTY),
		manager: func(ctx context.Context) ([]string, error) {
			return environment.Read(ctx, own.RuntimeDir)
		},
		log:      log,
		patience: cmp.Or(c.ConfirmTimeout.Duration, confirmTimeout),
	}
}

func environmentOf(environ []string) peer.Environment {
	return peer.ParseEnvironment([]byte(strings.Join(environ, "\x00")))
}

// place is somewhere to ask, or would be.
type place struct {
	pinentry.Place
	name string // for people
	// key is the same for places that are.
	key   any
	close func()
}

// finder looks for a place. Its error says why there is none, and names what was
// looked for; nil and nil is one that another finder has spoken of.
type finder func(context.Context) (*place, error)

// conversation asks one thing after the other at the first place that can. It is
// for one goroutine at a time.
type conversation struct {
	*asker
	hint string // what to do when nobody can be asked

	started bool
	caller  *agent.Caller // whose person is asked
	desk    *peer.Desk    // the caller's; nil when it was not looked at
	display *place        // the first that was found
	finders []finder      // that are left
	seen    []any         // keys of places that were tried
	tried   []error       // why each was of no use
	at      *place        // where it is
	d       *pinentry.Dialogue
}

// ask has a question asked. Of several who wait for the answer it is the one who
// has waited longest that is asked; with that one it moves.
func (c *conversation) ask(ctx context.Context, question func(context.Context, *pinentry.Dialogue) error) error {
	return waiting.Ask(ctx, func(ctx context.Context) error {
		if caller := agent.CallerFromContext(ctx); !c.started || caller != c.caller {
			c.begin(caller)
		}
		for {
			if err := c.open(ctx); err != nil {
				return err
			}
			err := question(ctx, c.d)
			if !errors.Is(err, pinentry.ErrNoPrompt) {
				return err
			}
			c.giveUp(c.at.name, err)
			c.leave()
		}
	})
}

// begin starts anew, with somebody else.
func (c *conversation) begin(caller *agent.Caller) {
	if c.started {
		c.log.Debug("the prompt moves: the client that it was shown to has gone")
	}
	c.close()
	*c = conversation{asker: c.asker, hint: c.hint, started: true, caller: caller}
	c.finders = []finder{
		c.clientDisplay, c.clientTerminal, c.managerDisplay, c.ownDisplay, c.ownGPGTTY, c.ownTerminal, c.askpass,
	}
}

// open makes sure that there is a dialogue.
func (c *conversation) open(ctx context.Context) error {
	for c.d == nil {
		if len(c.finders) == 0 {
			return &noPlaceError{c.tried, c.hint}
		}
		find := c.finders[0]
		c.finders = c.finders[1:]
		at, err := find(ctx)
		if ctx.Err() != nil {
			return ctx.Err()
		}
		if err != nil {
			c.log.Debug("this is no place to ask", "reason", err)
			c.tried = append(c.tried, err)
			continue
		}
		if at == nil {
			continue
		}
		c.at = at
		if slices.Contains(c.seen, at.key) {
			c.leave()
			continue
		}
		c.seen = append(c.seen, at.key)
		c.log.Debug("asking", "place", at.name)
		d, err := c.pinentry.Open(ctx, at.Place)
		if errors.Is(err, pinentry.ErrNoPrompt) {
			c.giveUp(at.name, err)
			c.leave()
			continue
		}
		if err != nil {
			c.leave()
			return err
		}
		c.d = d
	}
	return nil
}

func (c *conversation) giveUp(name string, err error) {
	c.log.Info("cannot ask here, trying the next place", "place", name, "reason", err)
	c.tried = append(c.tried, fmt.Errorf("%s: %w", name, err))
}

// leave ends the dialogue.
func (c *conversation) leave() {
	if c.d != nil {
		_ = c.d.Close() // never fails
		c.d = nil
	}
	if c.at != nil && c.at.close != nil {
		c.at.close()
	}
	c.at = nil
}

func (c *conversation) close() {
	c.leave()
	if c.desk != nil {
		c.desk.Close()
		c.desk = nil
	}
}

// client looks where the client is, once.
func (c *conversation) client() *peer.Desk {
	if c.desk == nil {
		var p peer.Peer // unknown
		if c.caller != nil {
			p = c.caller.Who()
		}
		c.desk = p.Desk()
	}
	return c.desk
}

func (c *conversation) clientDisplay(context.Context) (*place, error) {
	d := c.client()
	if d.EnvErr != nil {
		return nil, fmt.Errorf("the client's display: %w", d.EnvErr)
	}
	return c.onDisplay(d.Environment, d.Who)
}

func (c *conversation) clientTerminal(context.Context) (*place, error) {
	d := c.client()
	switch {
	case c.caller == nil || c.caller.Forwarded:
		// ssh reads from its terminal at the same time, in the foreground.
		return nil, errors.New("the client's terminal: the request was forwarded, and what is typed there goes to the other host")
	case d.TerminalErr != nil && d.TerminalErr == d.EnvErr: //nolint:errorlint // the very same
		return nil, nil //nolint:nilnil // see finder
	case d.TerminalErr != nil:
		return nil, fmt.Errorf("the client's terminal: %w", d.TerminalErr)
	}
	return c.onTerminal(d.Terminal.File, d.Terminal.Check, nil, d.Environment, "the terminal of "+d.Who)
}

func (c *conversation) managerDisplay(ctx context.Context) (*place, error) {
	const who = "the user's service manager"
	vars, err := c.manager(ctx)
	if err != nil {
		return nil, fmt.Errorf("the display of %s: %w", who, err)
	}
	return c.onDisplay(environmentOf(vars), who)
}

func (c *conversation) ownDisplay(context.Context) (*place, error) {
	at, err := c.onDisplay(c.own, "the agent")
	if err != nil {
		at = &place{Place: c.place(c.own), name: "the agent without a display"}
		at.key = at.Place.RuntimeDir + "\x00" + at.Place.DBusAddress
	}
	return at, nil
}

func (c *conversation) ownGPGTTY(context.Context) (*place, error) {
	const name = "GPG_TTY of the agent"
	if c.own.GPGTTY == "" {
		return nil, errors.New(name + " is not set")
	}
	if err := c.unforwarded(name); err != nil {
		return nil, err
	}
	tty, err := c.gpgTTY.open()
	if err != nil {
		return nil, fmt.Errorf("%s: %w", name, err)
	}
	return c.onTerminal(tty, nil, func() { _ = tty.Close() }, c.own, name+", "+c.own.GPGTTY)
}

func (c *conversation) ownTerminal(context.Context) (*place, error) {
	const name = "the agent's terminal"
	if err := c.unforwarded(name); err != nil {
		return nil, err
	}
	t, err := peer.Own()
	if err != nil {
		return nil, fmt.Errorf("%s: %w", name, err)
	}
	return c.onTerminal(t.File, t.Check, t.Close, c.own, name)
}

// unforwarded refuses terminals to requests that were forwarded: an ssh that
// reads from any of them may be behind the request.
func (c *conversation) unforwarded(name string) error {
	if c.caller == nil || c.caller.Forwarded {
		return fmt.Errorf("%s: the request was forwarded", name)
	}
	return nil
}

func (c *conversation) askpass(context.Context) (*place, error) {
	if c.pinentry.Askpass == "" {
		return nil, errors.New("SSH_ASKPASS is not set for the agent")
	}
	at := &place{Place: c.place(c.own)}
	if c.display != nil {
		at.Place = c.display.Place
	}
	at.Place.Askpass, at.name, at.key = true, "SSH_ASKPASS", "SSH_ASKPASS"
	return at, nil
}

// place is a pinentry.Place with a display, if there is one.
func (c *conversation) place(e peer.Environment) pinentry.Place {
	return pinentry.Place{
		Display: e.Display, WaylandDisplay: e.WaylandDisplay, XAuthority: e.XAuthority,
		DBusAddress: e.DBusAddress, RuntimeDir: e.RuntimeDir,
		Locale: cmp.Or(e.Locale, c.own.Locale), UserData: c.userData,
	}
}

// onDisplay makes a place of a display. It has no terminal: a pinentry without
// the display would take it in its stead, unchecked.
func (c *conversation) onDisplay(e peer.Environment, who string) (*place, error) {
	name := cmp.Or(e.WaylandDisplay, e.Display)
	if name == "" {
		return nil, fmt.Errorf("%s has no display", who)
	}
	at := &place{
		Place: c.place(e), name: fmt.Sprintf("display %s of %s", name, who),
		key: [5]string{e.Display, e.WaylandDisplay, e.XAuthority, e.DBusAddress, e.RuntimeDir},
	}
	if c.display == nil {
		c.display = at
	}
	return at, nil
}

// onTerminal makes a place of a terminal, and nothing but that.
func (c *conversation) onTerminal(tty *os.File, check func() error, closeTTY func(), e peer.Environment, name string) (*place, error) {
	key, err := statTerminal(tty)
	if err != nil {
		if closeTTY != nil {
			closeTTY()
		}
		return nil, fmt.Errorf("%s: %w", name, err)
	}
	return &place{
		Place: pinentry.Place{
			TTY: tty, Check: check, TTYType: e.TTYType,
			Locale: cmp.Or(e.Locale, c.own.Locale), UserData: c.userData,
		},
		name: name, key: key.terminal, close: closeTTY,
	}, nil
}

// terminalID tells a terminal from another.
type terminalID struct{ dev, rdev uint64 }

// terminalState is a terminal at a time: when it is gone and another one has its
// number, the change is another.
type terminalState struct {
	terminal terminalID
	change   unix.Timespec
}

func statTerminal(tty *os.File) (terminalState, error) {
	var st unix.Stat_t
	if err := unix.Fstat(int(tty.Fd()), &st); err != nil {
		return terminalState{}, err
	}
	return terminalState{terminalID{st.Dev, st.Rdev}, st.Ctim}, nil
}

// fixedTerminal is a terminal that is known by its name, and by what was there
// when the agent started.
type fixedTerminal struct {
	name  string
	state terminalState
	err   error
}

func fixTerminal(name string) fixedTerminal {
	f := fixedTerminal{name: name}
	if name == "" {
		return f
	}
	tty, err := openTerminal(name)
	if err == nil {
		defer tty.Close()
		f.state, err = statTerminal(tty)
	}
	f.err = err
	return f
}

// open opens the terminal if it is still the same.
func (f *fixedTerminal) open() (*os.File, error) {
	if f.err != nil {
		return nil, f.err
	}
	tty, err := openTerminal(f.name)
	if err != nil {
		return nil, err
	}
	state, err := statTerminal(tty)
	if err == nil && state != f.state {
		err = fmt.Errorf("%s is not the terminal any more that it was when the agent started", f.name)
	}
	if err != nil {
		_ = tty.Close()
		return nil, err
	}
	return tty, nil
}

// openTerminal opens a terminal without waiting for anything, such as a serial
// line's carrier.
func openTerminal(name string) (*os.File, error) {
	fd, err := unix.Open(name, unix.O_RDWR|unix.O_NOCTTY|unix.O_NONBLOCK|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, fmt.Errorf("open %s: %w", name, err)
	}
	if _, err := unix.IoctlGetTermios(fd, unix.TCGETS); err != nil {
		_ = unix.Close(fd)
		return nil, fmt.Errorf("%s is not a terminal", name)
	}
	_ = unix.SetNonblock(fd, false) // the poller has no use for it
	return os.NewFile(uintptr(fd), name), nil
}

// noPlaceError lists what was tried in vain.
type noPlaceError struct {
	tried []error
	hint  string
}

func (e *noPlaceError) Error() string {
	var all []string
	for _, err := range e.tried {
		all = append(all, err.Error())
	}
	// What to do comes before the details: a notification shows little more.
	return fmt.Sprintf("%v. %s. Tried: %s", pinentry.ErrNoPrompt, e.hint, strings.Join(all, "; "))
}

func (e *noPlaceError) Unwrap() error { return pinentry.ErrNoPrompt }
