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
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"

	"p11-agent/agent/peer"
	"p11-agent/agent/request"
	"p11-agent/cmd/p11-agent/config"
	"p11-agent/pinentry"
	"p11-agent/pinentry/waiting"
	"p11-agent/systemd/environment"
	"p11-agent/token/pin"
)

// An asker asks persons where they are. Where that is, is found out when there
// is something to ask. There are two policies.
//
// A PIN cannot be invented, so it is asked for where the person is who uses the
// client. These places are tried in turn:
//
//   - the display of the client that asks, and then its terminal,
//   - the display that the user's service manager knows now,
//   - the display that the agent was started with, or none: there are pinentry
//     programs that need neither display nor terminal,
//   - the terminal that GPG_TTY named when the agent was started, and the one that
//     the agent itself is in the foreground of,
//   - SSH_ASKPASS of the agent.
//
// A yes can be invented, so consent is asked for where the client has no say: on
// the displays of the service manager and of the agent; and where they cannot show
// anything on the client's terminal, if that was there before the client
// (peer.Terminal.Established), and then at what is left of the list.
//
// A client in other namespaces has no display and no terminal at all (peer.Desk).
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
	patience duration
	// turn is how long a prompt stays with a client while another one waits.
	turn duration
	// displayOnly says that consent is asked for on no terminal.
	displayOnly atomic.Bool
	// notify tells the person at the desktop something; nil: nobody is told.
	notify func(key string, lines []string)

	mu   sync.Mutex
	open map[*dialogue]struct{}
}

// linePromptCommand is the hidden subcommand that asks in lines on a terminal.
const linePromptCommand = "plain-prompt"

// promptTurn is asker.turn when the configuration does not say otherwise.
const promptTurn = time.Minute

// tellAfter is how long a client waits for a prompt elsewhere before it is told.
const tellAfter = 2 * time.Second

// newAsker makes the asker of an agent with this environment.
func newAsker(c *config.File, getenv func(string) string, environ []string, log *slog.Logger) *asker {
	own := environmentOf(environ)
	a := &asker{
		pinentry: &pinentry.Pinentry{
			Askpass:    getenv("SSH_ASKPASS"),
			Path:       getenv("PATH"),
			Home:       getenv("HOME"),
			LinePrompt: []string{"p11-agent", linePromptCommand},
			Log:        log,
		},
		own:      own,
		userData: getenv("PINENTRY_USER_DATA"),
		gpgTTY:   fixTerminal(own.GPGTTY),
		manager: func(ctx context.Context) ([]string, error) {
			return environment.Read(ctx, own.RuntimeDir)
		},
		log:  log,
		open: make(map[*dialogue]struct{}),
	}
	a.configure(c)
	return a
}

// configure takes over what the configuration says, for the prompts from now on.
func (a *asker) configure(c *config.File) {
	a.displayOnly.Store(c.ConfirmPlace == config.PlaceDisplay)
	a.pinentry.Configure(c.Pinentry.Program, c.Pinentry.Grab != nil && !*c.Pinentry.Grab)
	a.patience.set(cmp.Or(c.ConfirmTimeout.Duration, config.DefaultConfirmTimeout))
	a.turn.set(cmp.Or(c.Pinentry.MoveAfter.Duration, promptTurn))
}

// A duration may be read and set by any goroutine.
type duration struct{ nanoseconds atomic.Int64 }

func (d *duration) set(to time.Duration) { d.nanoseconds.Store(int64(to)) }
func (d *duration) get() time.Duration   { return time.Duration(d.nanoseconds.Load()) }

func environmentOf(environ []string) peer.Environment {
	return peer.ParseEnvironment([]byte(strings.Join(environ, "\x00")))
}

// place is somewhere to ask, or would be.
type place struct {
	pinentry.Place
	name string // for people
	// key is the same for places that are.
	key any
	// spot is the same for places that a person cannot look at apart; nil for one
	// that is at no display or terminal.
	spot  any
	close func()
}

// finder looks for a place. Its error says why there is none, and names what was
// looked for; nil and nil is one that another finder has spoken of.
type finder func(context.Context) (*place, error)

// conversation asks one thing after the other at the first place that can. It is
// for one goroutine at a time.
type conversation struct {
	*asker
	what    string // is asked, for clients that wait: "the PIN of the token work"
	consent bool   // a yes is wanted: the client has no say where
	hint    string // what to do when nobody can be asked

	shown atomic.Pointer[place]      // while a question is open; read by any goroutine
	told  map[*request.Caller]*place // the client was told of; for the goroutine of waiting.Ask
	seat
}

// seat is what is known of the client whose person is asked.
type seat struct {
	started bool
	caller  *request.Caller
	desk    *peer.Desk // the caller's; nil when it was not looked at
	display *place     // the first that was found
	finders []finder   // that are left
	seen    []any      // keys of places that were tried
	tried   []error    // why each was of no use
	at      *place     // where it is
	d       *pinentry.Dialogue
}

// ask has a question asked. Of several who wait for the answer it is the one who
// has waited longest that is asked; it moves to the next when that one leaves, has
// no place, or does not answer in its turn.
func (c *conversation) ask(ctx context.Context, question func(context.Context, *pinentry.Dialogue) error) error {
	return c.askFor(ctx, c.turn.get(), question)
}

// askFor is ask with another turn; 0: the question stays until it is answered.
func (c *conversation) askFor(ctx context.Context, turn time.Duration, question func(context.Context, *pinentry.Dialogue) error) error {
	return waiting.Ask(ctx, waiting.Question{
		Ask: func(ctx context.Context) error {
			if caller := request.CallerFrom(ctx); !c.started || caller != c.caller {
				c.begin(caller)
			}
			for {
				if err := c.find(ctx); err != nil {
					return err
				}
				c.shown.Store(c.at)
				err := question(ctx, c.d)
				c.shown.Store(nil)
				if !errors.Is(err, pinentry.ErrNoPrompt) {
					return err
				}
				c.giveUp(c.at.name, err)
				c.leave()
			}
		},
		Pass: func(err error) bool { return errors.Is(err, pinentry.ErrNoPrompt) },
		Turn: turn, Takes: c.takes,
		Patience: tellAfter, Tell: c.tell,
	})
}

// begin starts anew, with somebody else.
func (c *conversation) begin(caller *request.Caller) {
	if c.started {
		c.log.Info("the prompt moves to the next client that waits for it", "prompt", c.what)
	}
	c.close()
	c.seat = seat{started: true, caller: caller}
	switch {
	case !c.consent:
		c.finders = []finder{
			c.clientDisplay, c.clientTerminal, c.managerDisplay, c.ownDisplay, c.ownGPGTTY, c.ownTerminal, c.askpass,
		}
	case c.displayOnly.Load():
		c.finders = []finder{c.managerDisplay, c.ownDisplay, c.askpass}
	default:
		c.finders = []finder{c.managerDisplay, c.ownDisplay, c.clientTerminal, c.ownGPGTTY, c.ownTerminal, c.askpass}
	}
}

// other returns where another client that waits would be asked first; nil: nowhere
// that a person could look at. done gives the place back.
func (c *conversation) other(ctx context.Context) (at *place, done func()) {
	o := &conversation{asker: c.asker, consent: c.consent}
	o.begin(request.CallerFrom(ctx))
	for _, find := range o.finders {
		at, err := find(ctx)
		if err != nil || at == nil {
			continue
		}
		o.at = at
		if at.spot != nil && ctx.Err() == nil {
			return at, o.close
		}
		o.leave()
	}
	o.close()
	return nil, func() {}
}

// takes tells whether the prompt can go to another client that waits: it would be asked
// at a place of its own, or need not be asked.
func (c *conversation) takes(ctx context.Context) bool {
	now := c.shown.Load()
	if now == nil {
		return false // it is on its way from one place to the next
	}
	if pin.HasPIN(ctx) {
		return true
	}
	at, done := c.other(ctx)
	defer done()
	return at != nil && at.spot != now.spot
}

// tell tells another client that waits where the prompt is: in its terminal if it has
// one, or else at the desktop.
func (c *conversation) tell(ctx context.Context) {
	now, caller := c.shown.Load(), request.CallerFrom(ctx)
	if now == nil || caller == nil || c.told[caller] == now {
		return
	}
	at, done := c.other(ctx)
	defer done()
	if at == nil && now.spot == nil || at != nil && at.spot == now.spot {
		return // it would be asked there, too
	}
	if c.told == nil {
		c.told = make(map[*request.Caller]*place)
	}
	c.told[caller] = now
	c.log.Info("a client waits for a prompt that is elsewhere", "prompt", c.what, "place", now.name, "client", caller.Who().String())
	if at != nil && at.TTY != nil {
		then := "it comes here"
		if pin.HasPIN(ctx) {
			then = "this goes on"
		}
		text := fmt.Sprintf("p11-agent: this waits for %s, which is asked for elsewhere: %s. Without an answer there, %s.", c.what, now.name, then)
		if err := at.Say(text); err != nil {
			c.log.Debug("the client cannot be told in its terminal", "reason", err)
		}
		return
	}
	if c.notify != nil {
		c.notify(c.what+now.name, []string{"It waits for " + c.what + ", which is asked for elsewhere: " + now.name, requester(caller.Who())})
	}
}

// find makes sure that there is a dialogue.
func (c *conversation) find(ctx context.Context) error {
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
	case !c.consent && d.TerminalErr != nil && d.TerminalErr == d.EnvErr: //nolint:errorlint // the very same
		return nil, nil //nolint:nilnil // see finder
	case d.TerminalErr != nil:
		return nil, fmt.Errorf("the client's terminal: %w", d.TerminalErr)
	}
	if c.consent {
		if err := d.Terminal.Established(); err != nil {
			return nil, fmt.Errorf("the client's terminal, which must have been there before the client: %w", err)
		}
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
		key:  [5]string{e.Display, e.WaylandDisplay, e.XAuthority, e.DBusAddress, e.RuntimeDir},
		spot: [2]string{e.Display, e.WaylandDisplay},
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
		name: name, key: key.terminal, spot: key.terminal, close: closeTTY,
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
