package prompt

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"os"
	"strings"

	"p11-agent/agent/peer"
	"p11-agent/pinentry"
)

// A location is a place where a prompt may appear.
type location struct {
	pinentry.Place
	name string // for people
	key  any    // equal keys: the same place
	// spot is equal for places on one screen or terminal. It is nil for a place on neither.
	spot  any
	close func() // nil: nothing to release
}

// A finder looks for a place. Its error names the place, and says why it is missing. Nil and
// nil: the error of another finder says so already.
type finder func(context.Context) (*location, error)

func (c *prompter) clientDisplay(context.Context) (*location, error) {
	d := c.client()
	if d.EnvErr != nil {
		return nil, fmt.Errorf("the client's display: %w", d.EnvErr)
	}
	return c.onDisplay(d.Environment, d.Who)
}

func (c *prompter) clientTerminal(context.Context) (*location, error) {
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

func (c *prompter) managerDisplay(ctx context.Context) (*location, error) {
	const who = "the user's service manager"
	vars, err := c.manager(ctx)
	if err != nil {
		return nil, fmt.Errorf("the display of %s: %w", who, err)
	}
	return c.onDisplay(environmentOf(vars), who)
}

func (c *prompter) ownDisplay(context.Context) (*location, error) {
	at, err := c.onDisplay(c.own, "the agent")
	if err != nil {
		at = &location{Place: c.displayAt(c.own), name: "the agent without a display"}
		at.key = at.Place.RuntimeDir + "\x00" + at.Place.DBusAddress
	}
	return at, nil
}

func (c *prompter) ownGPGTTY(context.Context) (*location, error) {
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

func (c *prompter) ownTerminal(context.Context) (*location, error) {
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

// unforwarded refuses a terminal for a forwarded request: the ssh that forwards it may read
// from that terminal.
func (c *prompter) unforwarded(name string) error {
	if c.caller == nil || c.caller.Forwarded {
		return fmt.Errorf("%s: the request was forwarded", name)
	}
	return nil
}

func (c *prompter) askpass(context.Context) (*location, error) {
	if c.pinentry.Askpass == "" {
		return nil, errors.New("SSH_ASKPASS is not set for the agent")
	}
	at := &location{Place: c.displayAt(c.own)}
	if c.display != nil {
		at.Place = c.display.Place
	}
	at.Place.Askpass, at.name, at.key = true, "SSH_ASKPASS", "SSH_ASKPASS"
	return at, nil
}

// onDisplay returns a display as a place. The place has no terminal: a pinentry that cannot use
// the display would use the terminal, which is not checked.
func (c *prompter) onDisplay(e peer.Environment, who string) (*location, error) {
	name := cmp.Or(e.WaylandDisplay, e.Display)
	if name == "" {
		return nil, fmt.Errorf("%s has no display", who)
	}
	at := &location{
		Place: c.displayAt(e), name: fmt.Sprintf("display %s of %s", name, who),
		key:  [5]string{e.Display, e.WaylandDisplay, e.XAuthority, e.DBusAddress, e.RuntimeDir},
		spot: [2]string{e.Display, e.WaylandDisplay},
	}
	if c.display == nil {
		c.display = at
	}
	return at, nil
}

// onTerminal returns a terminal as a place, without a display.
func (c *prompter) onTerminal(tty *os.File, check func() error, closeTTY func(), e peer.Environment, name string) (*location, error) {
	key, err := statTerminal(tty)
	if err != nil {
		if closeTTY != nil {
			closeTTY()
		}
		return nil, fmt.Errorf("%s: %w", name, err)
	}
	return &location{
		Place: pinentry.Place{
			TTY: tty, Check: check, TTYType: e.TTYType,
			Locale: cmp.Or(e.Locale, c.own.Locale), UserData: c.userData,
		},
		name: name, key: key.terminal, spot: key.terminal, close: closeTTY,
	}, nil
}

// A noPlaceError lists the places that cannot show the question.
type noPlaceError struct {
	tried []error
	hint  string
}

func (e *noPlaceError) Error() string {
	var all []string
	for _, err := range e.tried {
		all = append(all, err.Error())
	}
	// The next step comes before the details: a notification cuts the rest.
	return fmt.Sprintf("%v. %s. Tried: %s", pinentry.ErrNoPrompt, e.hint, strings.Join(all, "; "))
}

func (e *noPlaceError) Unwrap() error { return pinentry.ErrNoPrompt }
