// Package notify tells the person at the desktop that a token works for longer than usual: the
// token may want to be touched. One notification names all tokens at work, and goes when they
// have finished. The package also tells once that something has failed, in a notification of
// its own.
//
// It promises that
//   - no caller that uses a token waits for the bus or its programs;
//   - it starts no bus, and does nothing without one;
//   - text of a token or another process is shown as text, within bounds.
//
// Callers choose the words.
package notify

import (
	"context"
	"fmt"
	"log/slog"
	"maps"
	"strings"
	"sync"
	"time"

	"p11-agent/pinentry/plain"
)

const (
	// maxLine is the most characters of a line, maxLines the most lines.
	maxLine  = 160
	maxLines = 6
)

// Options make a Notifier.
type Options struct {
	// Title is the first line, in the program's own words.
	Title string
	// After is how long a token works before a notification appears. 0 means never.
	After time.Duration
	// Bus returns the address of the bus. The Notifier calls it for each connection.
	Bus func() (string, error)
	Log *slog.Logger
}

// A Notifier shows notifications. Any goroutine may call its methods. Begin and its function never
// wait.
type Notifier struct {
	opts    Options
	connect func(ctx context.Context) (display, error)
	ctx     context.Context
	cancel  context.CancelFunc
	wg      sync.WaitGroup
	kick    chan struct{} // one element: what is due has changed
	ending  chan struct{} // closed by Close

	mu      sync.Mutex
	after   time.Duration
	closed  bool
	works   []*work // in the order in which they began
	timer   *time.Timer
	armed   bool // the timer is going to fire
	showing bool // there is a goroutine in show
	telling int  // the goroutines in tell
	told    map[string]time.Time
}

// work is one use of a token.
type work struct {
	device any
	about  func() []string
	lines  []string // the result of about; nil: about was not called
	after  time.Duration
	since  time.Time
	due    bool
}

// New returns a Notifier. Close ends it.
func New(o Options) *Notifier {
	n := &Notifier{opts: o, after: o.After, kick: make(chan struct{}, 1), ending: make(chan struct{})}
	n.ctx, n.cancel = context.WithCancel(context.Background())
	n.connect = n.connectBus
	return n
}

// SetAfter replaces Options.After, for later calls of Begin.
func (n *Notifier) SetAfter(d time.Duration) {
	n.mu.Lock()
	defer n.mu.Unlock()
	n.after = d
}

// Begin says that a device begins to work. Devices are compared with ==. The caller calls done
// once, when the work is over. about returns the lines to show, the important ones first. The
// Notifier calls about before done returns, if at all. So about may use the memory of the request.
// about must not wait.
//
// The clock of a device starts anew whenever the device finishes a use: many uses of a slow device
// are no reason to look at it.
func (n *Notifier) Begin(device any, about func() []string) (done func()) {
	n.mu.Lock()
	defer n.mu.Unlock()
	if n.after <= 0 || n.closed {
		return func() {}
	}
	w := &work{device: device, about: about, after: n.after, since: time.Now()}
	n.works = append(n.works, w)
	if !n.armed { // else it finds this one when it fires
		n.armLocked(n.after)
	}
	return func() { n.end(w) }
}

func (n *Notifier) end(w *work) {
	n.mu.Lock()
	defer n.mu.Unlock()
	now := time.Now()
	rest := n.works[:0]
	for _, o := range n.works {
		if o == w {
			continue
		}
		if o.device == w.device {
			o.since = now
		}
		rest = append(rest, o)
	}
	clear(n.works[len(rest):])
	n.works = rest
	if w.due {
		n.kickLocked()
	}
}

func (n *Notifier) armLocked(d time.Duration) {
	n.armed = true
	if n.timer == nil {
		n.timer = time.AfterFunc(d, n.fire)
	} else {
		n.timer.Reset(d)
	}
}

// fire shows the works that are due, and sets the timer for the rest.
func (n *Notifier) fire() {
	n.mu.Lock()
	defer n.mu.Unlock()
	n.armed = false
	now, next, due := time.Now(), time.Time{}, false
	for _, w := range n.works {
		switch at := w.since.Add(w.after); {
		case w.due:
		case !now.Before(at):
			w.due, due = true, true
		case next.IsZero() || at.Before(next):
			next = at
		}
	}
	if !next.IsZero() {
		n.armLocked(next.Sub(now))
	}
	switch {
	case !due:
	case n.showing:
		n.kickLocked()
	default:
		n.showing = true
		n.wg.Go(n.show)
	}
}

func (n *Notifier) kickLocked() {
	select {
	case n.kick <- struct{}{}:
	default:
	}
}

// wanted returns the lines to show now. Without lines, nothing is to be shown.
func (n *Notifier) wanted() []string {
	n.mu.Lock()
	defer n.mu.Unlock()
	var first *work
	count := 0
	for _, w := range n.works {
		if w.due {
			count++
			if first == nil {
				first = w
			}
		}
	}
	if first == nil {
		return nil
	}
	if first.lines == nil {
		first.lines = presentable(first.about())
	}
	lines := first.lines[:len(first.lines):len(first.lines)]
	if count > 1 {
		lines = append(lines, fmt.Sprintf("%d signatures are waiting.", count))
	}
	return lines
}

// finished tells whether there is nothing to show any more. Then the goroutine in show ends.
func (n *Notifier) finished() bool {
	n.mu.Lock()
	defer n.mu.Unlock()
	for _, w := range n.works {
		if w.due {
			return false
		}
	}
	n.showing = false
	return true
}

const (
	// tellAgain is how long Tell ignores a key again.
	tellAgain = 5 * time.Second
	// tellTime is how long the notification of Tell stays, unless the person closes it.
	tellTime = 10 * time.Second
	// maxTelling is how many notifications of Tell there are at a time. The log has the rest.
	maxTelling = 3
)

// Tell shows a notification once, for some seconds, and never waits. Within a few seconds, it shows
// a key once.
func (n *Notifier) Tell(key, title string, lines []string) {
	n.mu.Lock()
	defer n.mu.Unlock()
	now := time.Now()
	maps.DeleteFunc(n.told, func(_ string, at time.Time) bool { return now.Sub(at) >= tellAgain })
	if _, known := n.told[key]; known || n.closed || n.telling >= maxTelling {
		return
	}
	if n.told == nil {
		n.told = make(map[string]time.Time)
	}
	n.told[key] = now
	n.telling++
	n.wg.Go(func() {
		defer func() {
			n.mu.Lock()
			defer n.mu.Unlock()
			n.telling--
		}()
		n.tell(title, presentable(lines))
	})
}

// tell keeps its connection while the notification is shown: some desktops take notifications away
// when their sender has gone.
func (n *Notifier) tell(title string, lines []string) {
	var d display
	if err := n.display(&d, plain.LineWithinRunes(title, maxLine), lines); err != nil {
		n.opts.Log.Debug("no notification is shown", "reason", err)
	} else {
		over := time.NewTimer(tellTime)
		defer over.Stop()
		select {
		case <-over.C:
		case <-d.dismissed():
		case <-d.gone():
		case <-n.ending:
		}
		d.hide(n.ctx)
	}
	if d != nil {
		d.close()
	}
}

// presentable makes lines safe to show.
func presentable(lines []string) []string {
	shown := []string{}
	for _, line := range lines[:min(len(lines), maxLines)] {
		shown = append(shown, plain.LineWithinRunes(line, maxLine))
	}
	return shown
}

// closeGrace is how long Close waits for a notification to go.
const closeGrace = 500 * time.Millisecond

// Close takes the notification away and ends the Notifier. Works that go on are not shown any more.
func (n *Notifier) Close() {
	n.mu.Lock()
	if !n.closed {
		close(n.ending)
	}
	n.closed, n.works = true, nil
	if n.timer != nil {
		n.timer.Stop()
	}
	n.kickLocked()
	n.mu.Unlock()
	late := time.AfterFunc(closeGrace, n.cancel)
	n.wg.Wait()
	late.Stop()
	n.cancel()
}

// A display shows one notification at a time.
type display interface {
	// show shows a notification in place of the present one.
	show(ctx context.Context, title string, lines []string) error
	// hide takes the present notification away, if there is one.
	hide(ctx context.Context)
	// dismissed gets an element when the person has closed the notification.
	dismissed() <-chan struct{}
	// gone is closed when the display has ended.
	gone() <-chan struct{}
	close()
}

// show keeps the notification as wanted says, until nothing is wanted. It is the only goroutine
// that waits for the bus. When the person has closed the notification, or when it cannot be shown,
// show stays quiet until nothing is wanted.
func (n *Notifier) show() {
	var d display
	drop := func() {
		if d != nil {
			d.close()
			d = nil
		}
	}
	defer drop()
	quiet, shown := false, ""
	for {
		lines := n.wanted()
		text := n.opts.Title + "\n" + strings.Join(lines, "\n")
		switch {
		case lines == nil || n.ctx.Err() != nil:
			if d != nil {
				d.hide(n.ctx)
				drop()
			}
			if n.ctx.Err() != nil || n.finished() {
				return
			}
			quiet, shown = false, ""
			continue
		case !quiet && text != shown:
			shown = text
			if err := n.display(&d, n.opts.Title, lines); err != nil {
				n.opts.Log.Debug("no notification is shown", "reason", err)
				drop()
				quiet = true
			}
			continue // other lines may be wanted by now
		}
		var dismissed, gone <-chan struct{}
		if d != nil {
			dismissed, gone = d.dismissed(), d.gone()
		}
		select {
		case <-n.kick:
		case <-dismissed:
			n.opts.Log.Debug("a person has closed the notification")
			quiet = true
		case <-gone:
			drop()
		case <-n.ctx.Done():
		}
	}
}

// display shows the lines. An old display may have ended meanwhile. Then display tries once more,
// with a new one.
func (n *Notifier) display(d *display, title string, lines []string) (err error) {
	if *d != nil {
		if err = (*d).show(n.ctx, title, lines); err == nil {
			return nil
		}
		(*d).close()
		*d = nil
	}
	if *d, err = n.connect(n.ctx); err != nil {
		*d = nil // and no nil in an interface
		return err
	}
	return (*d).show(n.ctx, title, lines)
}
