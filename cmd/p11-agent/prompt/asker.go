// Package prompt asks a person: for a PIN, for a yes, for a token. It finds the place where
// the person is when there is something to ask, and it has the words of every prompt. A PIN
// prompt appears where the client runs. A question for consent appears where the client has
// no say. The program that shows a prompt comes from the configuration and the environment
// of the agent, never from a client. A prompt ends when its client hangs up.
package prompt

import (
	"cmp"
	"context"
	"log/slog"
	"os"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"p11-agent/agent/approval"
	"p11-agent/agent/peer"
	"p11-agent/cmd/p11-agent/config"
	"p11-agent/pinentry"
	"p11-agent/systemd/environment"
	"p11-agent/token/pin"
	"p11-agent/token/wire"
)

// An Asker asks persons. It looks for the place of a person when it has a question. There are
// two policies.
//
// A client cannot invent a PIN. So the Asker asks for a PIN where the client runs. It tries
// these places in turn:
//
//   - the display of the client, and then the terminal of the client,
//   - the display that the user's service manager knows now,
//   - the display of the agent's environment, or no display: some pinentry programs need
//     neither display nor terminal,
//   - the terminal that GPG_TTY names in the agent's environment, and the terminal of the agent
//     while the agent is in its foreground,
//   - SSH_ASKPASS of the agent.
//
// A client can invent a yes. So the Asker asks for consent where the client has no say: on the
// displays of the service manager and of the agent. After these it tries the client's terminal,
// if that is older than the client (peer.Terminal.Established), and the rest of the list.
//
// A client in other namespaces has no display and no terminal (peer.Desk).
//
// When a place cannot show the question, the Asker tries the next place. Every answer of a
// person ends the search, a no as well. The programs come from the configuration and the
// environment of the agent. Any goroutine may call the methods.
type Asker struct {
	log      *slog.Logger
	pinentry *pinentry.Pinentry
	notify   func(key string, lines []string) // see Options

	// Where the agent itself can ask.
	own      peer.Environment
	userData string // PINENTRY_USER_DATA
	gpgTTY   fixedTerminal
	// manager reads the environment of the user's service manager.
	manager func(context.Context) ([]string, error)

	// What Configure sets.
	patience    duration    // how long a question for consent waits for an answer
	turn        duration    // how long a prompt stays with a client while another client waits
	displayOnly atomic.Bool // no question for consent on a terminal

	mu   sync.Mutex
	open map[*pinDialogue]struct{}
}

// PromptAt returns the name of the place where a prompt about a token is open now, or "".
func (a *Asker) PromptAt(t wire.TokenID) string {
	a.mu.Lock()
	defer a.mu.Unlock()
	for d := range a.open {
		for _, c := range []*prompter{d.pins, d.consent} {
			if at := c.shown.Load(); at != nil && d.about.Token == t {
				return at.name
			}
		}
	}
	return ""
}

// Configure sets what the configuration says. It counts for the next prompts.
func (a *Asker) Configure(c *config.File) {
	a.displayOnly.Store(c.ConfirmPlace == config.PlaceDisplay)
	a.pinentry.Configure(c.Pinentry.Program, c.Pinentry.Grab != nil && !*c.Pinentry.Grab)
	a.patience.set(cmp.Or(c.ConfirmTimeout.Duration, config.DefaultConfirmTimeout))
	a.turn.set(cmp.Or(c.Pinentry.MoveAfter.Duration, promptTurn))
}

// Probe tells which pinentry program the agent would use at a place, and whether the program
// starts there. It shows nothing.
func (a *Asker) Probe(ctx context.Context, at pinentry.Place) (pinentry.Probed, error) {
	return a.pinentry.Probe(ctx, at)
}

// Here returns the place of this process: its display, and the terminal when tty is not nil.
func (a *Asker) Here(tty *os.File) pinentry.Place {
	at := a.displayAt(a.own)
	if tty != nil {
		at.TTY, at.TTYType = tty, a.own.TTYType
	}
	return at
}

// displayAt returns the display of an environment as a place, or a place without a display.
func (a *Asker) displayAt(e peer.Environment) pinentry.Place {
	return pinentry.Place{
		Display: e.Display, WaylandDisplay: e.WaylandDisplay, XAuthority: e.XAuthority,
		DBusAddress: e.DBusAddress, RuntimeDir: e.RuntimeDir,
		Locale: cmp.Or(e.Locale, a.own.Locale), UserData: a.userData,
	}
}

// Options are what an Asker needs besides the configuration.
type Options struct {
	Log *slog.Logger
	// Notify shows the lines to the person at the desktop. A notification replaces the
	// former one with the same key. Nil: there is no desktop to tell.
	Notify func(key string, lines []string)
}

// New returns an Asker for the environment of this process.
func New(c *config.File, o Options) *Asker {
	own := environmentOf(os.Environ())
	a := &Asker{
		pinentry: &pinentry.Pinentry{
			Askpass:    os.Getenv("SSH_ASKPASS"),
			Path:       os.Getenv("PATH"),
			Home:       os.Getenv("HOME"),
			LinePrompt: []string{"p11-agent", LinePromptCommand},
			Log:        o.Log,
		},
		own:      own,
		userData: os.Getenv("PINENTRY_USER_DATA"),
		gpgTTY:   fixTerminal(own.GPGTTY),
		manager: func(ctx context.Context) ([]string, error) {
			return environment.Read(ctx, own.RuntimeDir)
		},
		log:    o.Log,
		notify: o.Notify,
		open:   make(map[*pinDialogue]struct{}),
	}
	a.Configure(c)
	return a
}

// A duration may be read and set by any goroutine.
type duration struct{ nanoseconds atomic.Int64 }

func (d *duration) set(to time.Duration) { d.nanoseconds.Store(int64(to)) }

func (d *duration) get() time.Duration { return time.Duration(d.nanoseconds.Load()) }

// LinePromptCommand is the hidden subcommand that asks in lines on a terminal.
const LinePromptCommand = "plain-prompt"

// promptTurn is the default of Asker.turn.
const promptTurn = time.Minute

// tellAfter is how long a client waits for a prompt elsewhere before the Asker tells it.
const tellAfter = 2 * time.Second

func environmentOf(environ []string) peer.Environment {
	return peer.ParseEnvironment([]byte(strings.Join(environ, "\x00")))
}

var (
	_ pin.Asker          = (*Asker)(nil)
	_ pin.Dialogue       = (*pinDialogue)(nil)
	_ approval.Confirmer = (*Asker)(nil)
	_ approval.Inserter  = (*Asker)(nil)
)
