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

// A Dialogue asks at one place, as often as needed: several questions share one
// pinentry process, and a wrong answer is asked again with Error set.
//
// Calls are made one at a time; one that comes while another is under way waits
// for its end. Close may be called at any time. A call that ends with its
// context takes the program with it; the next call starts another.
type Dialogue struct {
	p     *Pinentry
	place Place

	ctx    context.Context // ends with Close
	cancel context.CancelCauseFunc

	turn chan struct{} // holds one element while the fields below are in use
	way  way           // what asks
	by   prompter      // the program that runs for it, or nil
	used bool          // by has been asked before
	// tried says why the ways before this one failed.
	tried []error
}

// A prompter is a running program, or one that is run for each question. Each
// method ends with its context, and then the program has ended too; the error
// is that of the context, an answer (ErrCancelled and its kin), or a
// *cannotAskError.
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

// cannotAskError says that a program was not able to ask. No answer was given,
// so another program may ask instead.
type cannotAskError struct{ err error }

func (e *cannotAskError) Error() string { return e.err.Error() }
func (e *cannotAskError) Unwrap() error { return e.err }

// noPromptError lists what was tried in vain. It is ErrNoPrompt.
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
	// wayPlace is the program with all that is known of the place.
	wayPlace way = iota
	// wayLines is pinentry-tty, for when the terminal is too small or of a kind that
	// curses does not know, or cannot draw on. Of these kinds, LinePrompt asks in its place
	// where it is not installed.
	wayLines
	// wayAskpass is the SSH_ASKPASS program.
	wayAskpass
	// wayNone: there is nothing else.
	wayNone
)

// after returns what is worth trying next once w has failed with err.
func (d *Dialogue) after(w way, err error) way {
	perr, isERR := errors.AsType[*pinentryError](err)
	small := isERR && perr.code() == codeWindowTooSmall
	if w == wayPlace && d.place.TTY != nil && (small || errors.Is(err, errCannotDraw)) {
		return wayLines
	}
	return wayNone
}

// first is the way to begin with.
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
	// Curses would draw all the same.
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

// errCannotDraw says that a program would draw on a terminal that cannot be drawn on.
var errCannotDraw = errors.New("nothing can be drawn on this terminal")

// open makes sure that a program runs. Where one cannot be started, the next
// way is taken.
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

// giveUp turns to the next way if err says that the present one cannot ask, and
// returns err otherwise.
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

// ask has question answered by the first way that can.
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
		// Pinentry keeps the time itself and says when it is over, or a little
		// later. This is for programs that do not.
		var stop context.CancelFunc
		ctx, stop = context.WithTimeoutCause(ctx, time.Duration(seconds(timeout))*time.Second+grace(), ErrTimeout)
		defer stop()
	}
	if d.place.TTY != nil {
		// It is this dialogue's turn: what there is to be seen at the terminal now is
		// not another one of ours.
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
				// It died of boredom, or cannot be asked twice: another of its
				// kind can.
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

// checkEvery is how often it is looked whether a terminal may still be asked on:
// after Ctrl-Z the shell reads from it, and nobody types that soon.
const checkEvery = 50 * time.Millisecond

func (d *Dialogue) check() error {
	if d.place.Check == nil {
		return nil
	}
	return d.place.Check()
}

// watch returns a context that ends also when the terminal may not be asked on
// any more, until stop.
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

// isAnswer tells whether err is what the person did: the program is as good as
// before.
func isAnswer(err error) bool {
	return errors.Is(err, ErrCancelled) || errors.Is(err, ErrTimeout) || errors.Is(err, ErrEmpty) || errors.Is(err, errOther)
}

// maxSeconds is twelve days, which in milliseconds still fits in a C int.
const maxSeconds = 1 << 20

// seconds rounds up.
func seconds(d time.Duration) int64 {
	if d <= 0 {
		return 0
	}
	return min(int64((d-1)/time.Second)+1, maxSeconds)
}

// PIN asks for a PIN of 1 to MaxPIN bytes. Who gets the Secret wipes it. The
// error is one of the package's (ErrCancelled, ErrTimeout, ErrEmpty,
// ErrNoPrompt, ErrClosed), that of ctx, or says what was wrong with the answer;
// none of them may lead to a PIN being tried.
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

// Confirm asks for yes or no. It returns true and nil for yes alone; no, and a
// dialogue that was closed, are false and nil; the errors are those of PIN.
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

// The Choices. The zero value is that of who says nothing.
const (
	ChoiceCancel Choice = iota // or the dialogue was closed
	ChoiceOK
	ChoiceOther
)

// errOther is the third button.
var errOther = errors.New("the other button was pressed")

// Choose asks as Confirm does, with a third button. Where a program is not known to
// have one it is not shown: then the choice is one of the other two.
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

// Message shows something that needs no answer, such as "type the PIN on the
// reader", until the person takes note (nil), closes it (ErrCancelled), or ctx
// ends. Meanwhile nothing else can be asked at the same terminal or display.
func (d *Dialogue) Message(ctx context.Context, prompt Prompt) error {
	return d.ask(ctx, prompt.Timeout, func(ctx context.Context, by prompter) error {
		return by.message(ctx, prompt)
	})
}

// Close ends the program and any call under way, and returns when both are
// gone. It may be called more than once and never fails.
func (d *Dialogue) Close() error {
	d.cancel(ErrClosed)
	d.turn <- struct{}{}
	defer func() { <-d.turn }()
	d.drop()
	return nil
}
