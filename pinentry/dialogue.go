package pinentry

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"strings"
	"sync"
	"time"

	"p11-agent/pinentry/plain"
	"p11-agent/pinentry/secret"
)

// A Dialogue asks at one place, as often as needed. Several questions share one pinentry process.
// After a wrong answer, ask again with Error set.
//
// One call runs at a time, and others wait for its end. Close may be called at any time. When the
// context of a call ends, its program ends. The next call starts another program.
type Dialogue struct {
	p     *Pinentry
	place Place

	ctx    context.Context // ends with Close
	cancel context.CancelCauseFunc

	turn chan struct{} // holds one element while the fields below are in use
	way  way           // the means of asking
	by   prompter      // the program that runs for it, or nil
	used bool          // by has been asked before
	// tried has the errors of the ways before this one.
	tried []error
}

// A prompter is a running program, or a program that runs once for each question. When the context
// of a method ends, the method and the program end. The error is the error of the context, an
// answer such as ErrCancelled, or a *cannotAskError.
type prompter interface {
	pin(context.Context, Prompt) (*secret.Secret, error)
	// confirm returns ErrCancelled for no, and errOther for the third button.
	confirm(context.Context, Prompt) error
	message(context.Context, Prompt) error
	// again makes ready for another question.
	again(context.Context) error
	// close ends the program, and returns when it has.
	close()
}

// cannotAskError says that a program was not able to ask. The person has given no answer, so
// another program may ask.
type cannotAskError struct{ err error }

func (e *cannotAskError) Error() string { return e.err.Error() }
func (e *cannotAskError) Unwrap() error { return e.err }

// noPromptError lists the programs that could not ask. It is ErrNoPrompt.
type noPromptError struct{ tried []error }

func (e *noPromptError) Error() string {
	var all []string
	for _, err := range e.tried {
		all = append(all, err.Error())
	}
	return strings.Join(all, "; ")
}

func (e *noPromptError) Unwrap() []error { return append([]error{ErrNoPrompt}, e.tried...) }

// way is a means of asking.
type way int

const (
	// wayPlace is the program with the whole Place.
	wayPlace way = iota
	// wayLines is pinentry-tty, for a terminal that is too small for curses, or on which
	// curses cannot draw. Without pinentry-tty, LinePrompt asks on terminals on which
	// nothing can be drawn.
	wayLines
	// wayAskpass is the SSH_ASKPASS program.
	wayAskpass
	// wayNone says that no way is left.
	wayNone
)

// after returns the next way to try once w has failed with err.
func (d *Dialogue) after(w way, err error) way {
	perr, isERR := errors.AsType[*pinentryError](err)
	small := isERR && perr.code() == codeWindowTooSmall
	if w == wayPlace && d.place.TTY != nil && (small || errors.Is(err, errCannotDraw)) {
		return wayLines
	}
	return wayNone
}

// first returns the first way to try.
func (d *Dialogue) first() way {
	if d.place.Askpass {
		return wayAskpass
	}
	return wayPlace
}

// start starts the program of the present way.
func (d *Dialogue) start(ctx context.Context) (prompter, error) {
	p := d.p
	program, called := cmp.Or(p.settings().program, "pinentry"), "pinentry"
	switch d.way {
	case wayLines:
		program, called = "pinentry-tty", "pinentry-tty"
	case wayAskpass:
		program, called = p.Askpass, "SSH_ASKPASS"
		if program == "" {
			return nil, &cannotAskError{errors.New("SSH_ASKPASS is not set")}
		}
	}
	file, err := p.find(program)
	if kind, ok := lookUpTerminal(d.place.TTYType); err != nil && d.way == wayLines && len(p.LinePrompt) > 0 && !(ok && kind.cursor) {
		return dial(ctx, p, "the line prompt", "/proc/self/exe", p.LinePrompt, d.place)
	}
	if err != nil {
		return nil, &cannotAskError{fmt.Errorf("%s: %w", called, err)}
	}
	if d.way == wayAskpass {
		return &askpass{file: file, env: p.environment(d.place)}, nil
	}
	by, err := dial(ctx, p, called, file, nil, d.place)
	if err != nil || d.way != wayPlace || d.place.TTY == nil || canDraw(d.place.TTYType) {
		return by, err
	}
	// Curses draws on any terminal.
	if c, ok := by.(*conn); ok {
		if err = c.learnFlavor(ctx); err == nil && c.asksWith() == "curses" {
			err = &cannotAskError{fmt.Errorf("%s: %w (TERM=%s)", called, errCannotDraw, plain.Line(d.place.TTYType))}
		}
	}
	if err != nil {
		by.close()
		return nil, err
	}
	return by, nil
}

// errCannotDraw says that a program would draw on a terminal on which nothing can be drawn.
var errCannotDraw = errors.New("nothing can be drawn on this terminal")

// open makes sure that a program runs. If a program cannot start, open takes the next way.
func (d *Dialogue) open(ctx context.Context) error {
	for d.by == nil {
		if d.way == wayNone {
			err := &noPromptError{d.tried}
			d.way, d.tried = d.first(), nil
			return err
		}
		by, err := d.start(ctx)
		if err != nil {
			if err := d.giveUp(err); err != nil {
				return err
			}
			continue
		}
		d.by, d.used = by, false
	}
	return nil
}

// giveUp turns to the next way if err says that the present way cannot ask. Otherwise it returns
// err.
func (d *Dialogue) giveUp(err error) error {
	if _, ok := errors.AsType[*cannotAskError](err); !ok {
		return err
	}
	d.tried = append(d.tried, err)
	d.way = d.after(d.way, err)
	if d.p.Log != nil && d.way != wayNone {
		d.p.Log.Info("a program cannot ask, trying the next", "err", err)
	}
	return nil
}

// drop ends the program.
func (d *Dialogue) drop() {
	if d.by != nil {
		d.by.close()
		d.by = nil
	}
}

// ask has the first way that can ask the question.
func (d *Dialogue) ask(ctx context.Context, timeout time.Duration, question func(context.Context, prompter) error) error {
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	defer context.AfterFunc(d.ctx, func() { cancel(ErrClosed) })()

	select {
	case d.turn <- struct{}{}:
		defer func() { <-d.turn }()
	case <-ctx.Done():
		return ended(ctx)
	}
	if d.ctx.Err() != nil {
		return ErrClosed
	}
	release, err := d.p.turns.wait(ctx, d.place.spots())
	if err != nil {
		return err
	}
	defer release()

	if timeout > 0 {
		// Pinentry keeps the time by itself. This timeout comes a little later, for
		// programs that do not.
		var stop context.CancelFunc
		ctx, stop = context.WithTimeoutCause(ctx, time.Duration(seconds(timeout))*time.Second+grace(), ErrTimeout)
		defer stop()
	}
	if d.place.TTY != nil {
		// It is this dialogue's turn: no other dialogue of the agent is on the terminal
		// now.
		err := d.check()
		if err == nil {
			err = inLineMode(d.place.TTY)
		}
		if err != nil {
			return &noPromptError{[]error{err}}
		}
		var stop func()
		ctx, stop = d.watch(ctx)
		defer stop()
	}
	for {
		var first error
		if d.by != nil && d.used {
			if first = d.by.again(ctx); first != nil {
				// The program has ended meanwhile, or cannot ask twice. Another process of
				// it can.
				d.drop()
				if ctx.Err() != nil {
					return ended(ctx)
				}
			}
		}
		if err := d.open(ctx); err != nil {
			if none, ok := errors.AsType[*noPromptError](err); ok && first != nil {
				none.tried = append([]error{first}, none.tried...)
			}
			return err
		}
		d.used = true
		err := question(ctx, d.by)
		if err == nil || isAnswer(err) {
			return err
		}
		d.drop()
		if err := d.giveUp(err); err != nil {
			return err
		}
	}
}

// checkEvery is how often a Dialogue checks the terminal. After Ctrl-Z the shell reads from it, and
// no person types that soon.
const checkEvery = 50 * time.Millisecond

func (d *Dialogue) check() error {
	if d.place.Check == nil {
		return nil
	}
	return d.place.Check()
}

// watch returns a context that also ends when a prompt may not be on the terminal any more, until
// stop.
func (d *Dialogue) watch(ctx context.Context) (_ context.Context, stop func()) {
	ctx, cancel := context.WithCancelCause(ctx)
	var watcher sync.WaitGroup
	watcher.Go(func() {
		ticker := time.NewTicker(checkEvery)
		defer ticker.Stop()
		for {
			select {
			case <-ctx.Done():
				return
			case <-ticker.C:
				if err := d.check(); err != nil {
					cancel(&noPromptError{[]error{err}})
					return
				}
			}
		}
	})
	return ctx, func() {
		cancel(nil)
		watcher.Wait()
	}
}

// isAnswer tells whether err is an answer of the person. Then the program can go on.
func isAnswer(err error) bool {
	return errors.Is(err, ErrCancelled) || errors.Is(err, ErrTimeout) || errors.Is(err, ErrEmpty) || errors.Is(err, errOther)
}

// maxSeconds is twelve days. As milliseconds, it fits in a C int.
const maxSeconds = 1 << 20

// seconds rounds up.
func seconds(d time.Duration) int64 {
	if d <= 0 {
		return 0
	}
	return min(int64((d-1)/time.Second)+1, maxSeconds)
}

// PIN asks for a PIN of 1 to MaxPIN bytes. The caller wipes the Secret. The error is ErrCancelled,
// ErrTimeout, ErrEmpty, ErrNoPrompt, ErrClosed or the error of ctx, or says what was wrong with the
// answer. After an error, no PIN may be tried.
func (d *Dialogue) PIN(ctx context.Context, prompt Prompt) (*secret.Secret, error) {
	var pin *secret.Secret
	err := d.ask(ctx, prompt.Timeout, func(ctx context.Context, by prompter) (err error) {
		pin, err = by.pin(ctx, prompt)
		if err == nil && pin.Len() == 0 {
			err = ErrEmpty
		}
		return err
	})
	if err != nil {
		pin.Wipe()
		return nil, err
	}
	return pin, nil
}

// Confirm asks for yes or no. It returns true and nil for yes. It returns false and nil for no, and
// when the person closes the dialogue. The errors are those of PIN.
func (d *Dialogue) Confirm(ctx context.Context, prompt Prompt) (bool, error) {
	prompt.Other = ""
	err := d.ask(ctx, prompt.Timeout, func(ctx context.Context, by prompter) error {
		return by.confirm(ctx, prompt)
	})
	if errors.Is(err, ErrCancelled) {
		return false, nil
	}
	return err == nil, err
}

// A Choice is the button that was pressed.
type Choice int

// The Choices. The zero value allows nothing.
const (
	ChoiceCancel Choice = iota // or the person closed the dialogue
	ChoiceOK
	ChoiceOther
)

// errOther says that the person pressed the third button.
var errOther = errors.New("the other button was pressed")

// Choose asks as Confirm does, with a third button. If the program may not have one, Choose does
// not show it. Then the choice is one of the other two.
func (d *Dialogue) Choose(ctx context.Context, prompt Prompt) (Choice, error) {
	err := d.ask(ctx, prompt.Timeout, func(ctx context.Context, by prompter) error {
		return by.confirm(ctx, prompt)
	})
	switch {
	case errors.Is(err, errOther):
		return ChoiceOther, nil
	case errors.Is(err, ErrCancelled):
		return ChoiceCancel, nil
	case err != nil:
		return ChoiceCancel, err
	}
	return ChoiceOK, nil
}

// Message shows a text that needs no answer, such as "type the PIN on the reader". It returns nil
// when the person takes note, and ErrCancelled when the person closes it. It also ends with ctx.
// Meanwhile nothing else can be asked at the same terminal or display.
func (d *Dialogue) Message(ctx context.Context, prompt Prompt) error {
	return d.ask(ctx, prompt.Timeout, func(ctx context.Context, by prompter) error {
		return by.message(ctx, prompt)
	})
}

// Close ends the program and any call, and waits for both. It may be called more than once and
// never fails.
func (d *Dialogue) Close() error {
	d.cancel(ErrClosed)
	d.turn <- struct{}{}
	defer func() { <-d.turn }()
	d.drop()
	return nil
}
