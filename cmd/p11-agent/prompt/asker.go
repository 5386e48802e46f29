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
	"p11-agent/agent/approval"
	"p11-agent/agent/peer"
	"p11-agent/cmd/p11-agent/config"
	"p11-agent/pinentry"
	"p11-agent/systemd/environment"
	"p11-agent/token/pin"
	"p11-agent/token/wire"
	"strings"
	"sync"
	"sync/atomic"
	"time"
)

// An Asker asks persons where they are. Where that is, is found out when there
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
type Asker struct {
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
	// notify tells the person at the desktop something; nil: there is no desktop to tell.
	notify func(key string, lines []string)

	mu   sync.Mutex
	open map[*pinDialogue]struct{}
}

// PromptAt tells where a person is being asked about a token; empty: nowhere. It may be
// called from any goroutine.
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

// Configure takes over what the configuration says, for the prompts from now on.
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

var (
	_ pin.Asker    = terminalAsker{}
	_ pin.Dialogue = (*terminalDialogue)(nil)
)

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

// promptTurn is asker.turn when the configuration does not say otherwise.
const promptTurn = time.Minute

// tellAfter is how long a client waits for a prompt elsewhere before it is told.
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
