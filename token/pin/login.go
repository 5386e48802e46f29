package pin

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"slices"
	"strings"

	"p11-agent/pinentry/secret"
	"p11-agent/pinentry/waiting"
	"p11-agent/token/wire"
)

// maxAttempts is how often one dialogue asks for a PIN.
const maxAttempts = 10

// A Login is one login, or one signature with a key that wants its PIN each time.
type Login struct {
	Token    wire.TokenID
	Info     wire.TokenInfo // as the token has told it just now
	Supplied Supplied
	Source   Source    // nil: the configuration and clients name no source
	Refusals *Refusals // of sources
	Asker    Asker     // nil: the agent cannot ask a person
	// Waiting has the requests that wait for the login.
	Waiting *waiting.List

	EachUse bool // the key wants the PIN for each signature
	Pad     bool // the person types the PIN on the reader
	// ClientTells says that the client itself tells the person to use the reader.
	ClientTells bool
	UseKept     bool // the kept PIN may log in
	Keep        bool // a PIN that was right is kept

	Target Target
	Log    *slog.Logger
}

// Supplied is a PIN that a person gave for a token in advance. The zero value has no PIN.
// The PIN stays the caller's.
type Supplied struct {
	PIN   *secret.Secret
	Typed bool // the person typed it at a prompt for this token and this module
}

// A Target has a token try PINs through one module.
type Target interface {
	// Try has the token try a PIN. It fails with an *Error when the token refused the PIN, and
	// with a *LoginError when the login failed for another reason.
	Try(ctx context.Context, t Trial) error
	// Proved hears that the token took a PIN. byPerson tells that a person gave the PIN at a
	// prompt.
	Proved(byPerson bool)
	// CheckSupplied fails when a PIN that was supplied in advance must not go to the module.
	CheckSupplied() error
	// LostToOthers tells whether Try failed because its module process ended for another card
	// or another request: the token may have got the PIN or not.
	LostToOthers(err error) bool
	// Request describes the token and the key to a person.
	Request() Request
}

// A Trial is one try of a PIN.
type Trial struct {
	PIN     *secret.Secret // stays the caller's; nil when Pad is set
	LastTry bool           // a person has consented to use the last try
	Pad     bool           // the person types the PIN on the reader
	Kept    bool           // the PIN was kept
}

// Login gets a PIN and has the target try it. The PIN comes from the first of these that has
// one: the PIN supplied in advance, the source, the kept PIN, a person. Only a person is asked
// again after a wrong PIN, and only that person decides whether to use the last try. The
// caller has the turn: see InTurn.
func (s *State) Login(ctx context.Context, l *Login) error {
	tries := TriesOf(l.Info.Flags)
	if tries == TriesNone {
		return l.refused(tries, errors.New("the PIN is locked"))
	}
	supplied := l.Supplied.PIN.Len() > 0
	if !l.Pad && !supplied && l.Source != nil {
		return l.fromSource(ctx, tries)
	}
	if supplied && !l.Supplied.Typed {
		if err := l.Target.CheckSupplied(); err != nil {
			return l.refused(tries, err)
		}
	}
	if supplied && !l.Pad {
		switch {
		case s.wasRefused(l.Supplied.PIN, tries):
			return l.refused(tries, errors.New(refusedBefore))
		case tries != TriesLast:
			return s.try(ctx, l, Trial{PIN: l.Supplied.PIN}, false)
		}
	}
	p := &prompt{Login: l, state: s, tries: tries}
	if !supplied && !l.Pad && tries != TriesLast && l.UseKept {
		kept, err := s.copyKept(tries)
		if err != nil {
			return err
		}
		if kept != nil {
			err := s.tryKept(ctx, l, kept)
			e, refused := errors.AsType[*Error](err)
			if !refused || e.Tries == TriesNone {
				return err
			}
			p.tries, p.problem, p.refusal = e.Tries, "The token refused the kept PIN.", e
		}
	}
	return p.ask(ctx)
}

// refused returns the error of a PIN that is not tried.
func (l *Login) refused(tries Tries, why error) error {
	return &Error{Token: l.Token.Label, Tries: tries, Err: why}
}

// refusedBefore says why a PIN is not tried a second time.
const refusedBefore = "this PIN was refused a moment ago"

// try has the token try a PIN, and remembers what became of it.
func (s *State) try(ctx context.Context, l *Login, t Trial, byPerson bool) error {
	removals := s.Removals()
	err := l.Target.Try(ctx, t)
	if err == nil {
		l.Target.Proved(byPerson)
	}
	if !t.Pad {
		s.note(l, t.PIN, removals, err)
	}
	if err == nil && byPerson {
		asked := l.Waiting.Asked()
		if asked == nil {
			asked = ctx
		}
		waiting.Accepted(asked)
	}
	return err
}

// note remembers what became of a PIN. removals is State.Removals before the token got it.
func (s *State) note(l *Login, pin *secret.Secret, removals uint64, err error) {
	if err == nil {
		s.forgetRefusals()
		if !l.Keep {
			return
		}
		if err := s.keep(pin, removals); err != nil {
			l.Log.Warn("cannot keep the PIN", "token", l.Token.Label, "reason", err)
		}
		return
	}
	if e, ok := errors.AsType[*Error](err); ok && e.Tried {
		s.refuse(pin, e.Tries)
	}
}

// tryKept tries the kept PIN, and wipes this copy of it.
func (s *State) tryKept(ctx context.Context, l *Login, kept *secret.Secret) error {
	err := s.try(ctx, l, Trial{PIN: kept, Kept: true}, false)
	kept.Wipe()
	switch {
	case l.Target.LostToOthers(err) && s.retry():
		return &LoginError{Token: l.Token.Label, Err: err} // Attempted is not set: the caller may try again
	case mayBeTried(err):
		// The PIN may be wrong: the next login asks a person.
		s.ForgetKept()
	}
	return err
}

// A prompt is a dialogue with a person about the PIN of one Login.
type prompt struct {
	*Login
	state *State
	d     Dialogue

	tries   Tries
	problem string // what to say before the next PIN
	refusal error  // the error that problem is about; nil: none

	minPIN, maxPIN int              // 0: not known
	wrong          []*secret.Secret // PINs of this dialogue that were refused
}

// ask opens the dialogue and has the PIN tried.
func (p *prompt) ask(ctx context.Context) error {
	if p.Asker == nil {
		return p.refused(p.tries, errors.New("the agent has no way to ask a person"))
	}
	p.state.prompts.Add(1)
	defer p.state.prompts.Add(-1)
	supplied := p.Supplied.PIN.Len() > 0
	about := p.Target.Request()
	about.Token, about.EachUse, about.Pad, about.Tries, about.Supplied = p.Token, p.EachUse, p.Pad, p.tries, supplied
	about.ClientTells, about.Waiting = p.ClientTells, p.Waiting
	d, err := p.Asker.Ask(ctx, about)
	if err != nil {
		return p.afterRefusal(err)
	}
	defer d.Close() //nolint:errcheck // the dialogue has done its work
	p.d = d
	if p.tries == TriesLast && (p.Pad || supplied) {
		if err := p.lastTry(ctx, ""); err != nil {
			return err
		}
	}
	switch {
	case p.Pad:
		err := typedOnReader(ctx, p.Token.Label, d, func(ctx context.Context) error {
			return p.state.try(ctx, p.Login, Trial{LastTry: p.tries == TriesLast, Pad: true}, true)
		})
		if d, ok := d.(ReaderObserver); ok {
			d.TypedOnReader(err)
		}
		return err
	case supplied:
		return p.state.try(ctx, p.Login, Trial{PIN: p.Supplied.PIN, LastTry: true}, false)
	default:
		return p.typed(ctx)
	}
}

// typed has a person type PINs until one is right or the person declines. In one dialogue a
// refused PIN is tried once. A person stops by and by. A program that answers for a person
// would lock the token, so the dialogue ends after maxAttempts PINs.
func (p *prompt) typed(ctx context.Context) error {
	p.minPIN, p.maxPIN = bounds(p.Info)
	defer func() {
		for _, pin := range p.wrong {
			pin.Wipe()
		}
	}()
	wrong := p.refused(p.tries, errors.New("none of the typed PINs can be right"))
	for range maxAttempts {
		last := p.tries == TriesLast
		if last {
			if err := p.lastTry(ctx, p.problem); err != nil {
				return p.afterRefusal(err)
			}
			p.problem = strings.TrimSpace(p.problem + " This is the last try.")
		}
		pin, err := p.d.PIN(ctx, p.problem)
		if err != nil {
			pin.Wipe()
			return p.afterRefusal(err)
		}
		if p.problem = p.badLength(pin.Len()); p.problem != "" {
			pin.Wipe()
			continue
		}
		if slices.ContainsFunc(p.wrong, pin.Equal) {
			pin.Wipe()
			return wrong
		}
		if p.state.wasRefused(pin, p.tries) {
			p.wrong = append(p.wrong, pin)
			wrong = p.refused(p.tries, errors.New(refusedBefore))
			p.problem = "This PIN was refused a moment ago: it was not tried again."
			continue
		}
		err = p.state.try(ctx, p.Login, Trial{PIN: pin, LastTry: last}, true)
		e, ok := errors.AsType[*Error](err)
		if !ok || e.Tries == TriesNone {
			pin.Wipe()
			return err
		}
		wrong, p.tries, p.refusal = e, e.Tries, e
		if !e.Tried { // the flags have changed since they were read
			pin.Wipe()
			p.problem = "The PIN was not tried yet."
			continue
		}
		p.wrong = append(p.wrong, pin)
		p.problem = "Wrong PIN."
		if p.tries == TriesLow {
			p.problem = "Wrong PIN, and fewer tries left."
		}
	}
	return wrong
}

// lastTry asks whether to go on although one try is left.
func (p *prompt) lastTry(ctx context.Context, problem string) error {
	yes, err := p.d.LastTry(ctx, problem)
	if err == nil && !yes {
		err = p.refused(TriesLast, ErrCancelled)
	}
	return err
}

// afterRefusal adds the refusal that made the agent ask a person: the two often have one
// cause. An error of a person who cancels, or of a request that ends, needs no reason. The
// agent has dealt with the refusal, so only err is wrapped.
func (p *prompt) afterRefusal(err error) error {
	switch {
	case p.refusal == nil, errors.Is(err, ErrCancelled), errors.Is(err, context.Canceled), errors.Is(err, context.DeadlineExceeded):
		return err
	}
	return fmt.Errorf("%v; then: %w", p.refusal, err) //nolint:errorlint // see above
}

// badLength says what is wrong with the length of a PIN; empty: nothing.
func (p *prompt) badLength(n int) string {
	switch {
	case n == 0:
		return "The PIN is empty. It was not tried."
	case n < p.minPIN || p.maxPIN > 0 && n > p.maxPIN:
		return fmt.Sprintf("The PIN has %d to %d characters. This one was not tried.", max(1, p.minPIN), p.maxPIN)
	}
	return ""
}

// bounds returns the lengths of a PIN that the token accepts; 0: the token does not say, or
// what it says cannot be true.
func bounds(info wire.TokenInfo) (minPIN, maxPIN int) {
	if info.MaxPIN == 0 || info.MaxPIN > wire.MaxPIN || info.MinPIN > info.MaxPIN {
		return 0, 0
	}
	return int(info.MinPIN), int(info.MaxPIN)
}
