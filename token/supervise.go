package token

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"sync"
	"time"

	"p11-agent/agent/logfold"
	"p11-agent/pinentry/plain"
	"p11-agent/token/bounds"
	"p11-agent/token/pace"
	"p11-agent/token/pcsc"
	"p11-agent/token/process"
	"p11-agent/token/registry"
	"p11-agent/token/wire"
)

const (
	// restartMin and restartMax bound the pause before the agent starts a module process again. The
	// pause doubles each time.
	restartMin = 100 * time.Millisecond
	restartMax = 30 * time.Second
	// After a process that lived this long, or has made a signature, the pause is the shortest.
	healthyAfter = time.Minute
	// A request waits for the next start if the start is this near. Otherwise the request fails
	// with the reason.
	startPatience = 2 * time.Second
	// pokeInterval is how long a look at a module stays fresh.
	pokeInterval = 2 * time.Second
)

// A module runs one PKCS#11 module. The goroutine in run owns the process: it starts the process,
// looks at the tokens, and starts the process again after a pause. Other goroutines read the state
// under mu, and ask for a look through wanted.
//
//	starting ─▶ looking ─▶ ready ─▶ (event, rescan) looking
//	  ▲   ▲        │          │ │
//	  │   └ pause ◀┴──────────┘ │ process ended
//	  └──── released ◀──────────┘ not used (release.go)
type module struct {
	store *Store
	spec  ModuleSpec
	// identity is the name of the module for PINs and homes: the name in the configuration, or the
	// file that a client has named. A client cannot take the name of another module by a file of
	// the same name.
	identity string
	byClient bool
	file     string // spec.Path without symbolic links, if the file exists
	log      *slog.Logger
	lines    *logfold.Handler // behind log
	looks    pace.Limit       // of the looks for events; run uses it
	looked   chan struct{}    // closed after the first look, or the first failure
	wanted   chan *lookup     // requests for a look
	poked    chan struct{}    // one element: a client lists the keys
	needed   chan struct{}    // one element: a request needs the released process
	moved    chan struct{}    // one element: pcscd reports that cards have come or gone

	mu    sync.Mutex
	state chan struct{} // closed and replaced at every change below

	// The process.
	proc     *process.Process // nil while there is none
	current  *process.Process // proc, from before the module is loaded
	pid      int              // of the process, from before proc is set; 0: there is none
	info     wire.HelloReply
	starts   int
	err      error     // the reason why there is no process
	retry    time.Time // the next start; zero: when a client wants it
	reason   string    // the last logged reason why the module could not be used
	released bool      // the agent ended the process because no request needed it
	users    int       // the requests that need the process
	lastUse  time.Time

	// The tokens.
	tokens     map[wire.TokenID]*Token // those that the agent remembers, within bounds
	insertions uint64                  // the most insertions of a forgotten token
	order      []*Token                // the present tokens, in the order of slots
	last       []*Token                // order as the last look found it
	lastLook   time.Time               // the last look, or its failure
	removable  bool                    // the module has removable slots
	leftOut    []string                // by the last look
	empty      string                  // the reason why the module shows no token, if known

	// The readers.
	pcsc  bool // the module sees smart cards through pcscd
	watch cardWatch
	cards []pcsc.Reader // the readers just before the last look
	held  []string      // the readers that other programs used alone at that time
}

// A lookup is a request for a look.
type lookup struct {
	done chan error // one element
}

func newModule(s *Store, spec ModuleSpec) *module {
	file, err := filepath.EvalSymlinks(spec.Path)
	if err != nil {
		file = spec.Path // the start fails with the reason
	}
	lines := logfold.ForModule(s.log.Handler())
	return &module{
		store:    s,
		spec:     spec,
		identity: spec.Name,
		file:     file,
		log:      slog.New(lines).With("module", spec.Name),
		lines:    lines,
		looks:    pace.Limit{Burst: lookBurst, Every: lookEvery},
		looked:   make(chan struct{}),
		wanted:   make(chan *lookup),
		poked:    make(chan struct{}, 1),
		needed:   make(chan struct{}, 1),
		moved:    make(chan struct{}, 1),
		state:    make(chan struct{}),
		tokens:   make(map[wire.TokenID]*Token),
	}
}

// change changes the state under mu, and wakes the goroutines that wait for a change.
func (m *module) change(f func()) {
	m.mu.Lock()
	defer m.mu.Unlock()
	f()
	close(m.state)
	m.state = make(chan struct{})
}

// run keeps the module running until ctx ends.
func (m *module) run(ctx context.Context) {
	defer m.lines.Close()
	first := sync.OnceFunc(func() { close(m.looked) })
	defer first()
	var due []*lookup // the requests for a look while there was no process
	defer func() { answer(due, ErrClosed) }()
	spec, poll := m.spec, m.spec.Poll
	renewed := false // the next process does not count as a restart
	var again backoff
	renewals := pace.Limit{Burst: renewBurst, Every: renewEvery}
	for ctx.Err() == nil {
		began, moves := time.Now(), m.moves()
		p, err := m.start(ctx, spec)
		if err == nil {
			info := p.Info()
			bounds.TrimHello(&info)
			m.tellSandbox(info.Sandbox)
			m.change(func() {
				m.info, m.pid = info, p.PID()
				if !m.released && !renewed {
					m.starts++
				}
			})
			err = m.look(ctx, p, false)
			answer(due, err)
			due = nil
			if p.Err() == nil {
				m.change(func() { m.proc, m.err, m.retry, m.released, m.lastUse = p, nil, time.Time{}, false, time.Now() })
				m.store.stir()
				first() // otherwise stopped comes before
				var watch *readerWatch
				if watch, due = m.attend(ctx, p); watch != nil {
					<-p.Done()
					m.change(func() { m.pid = 0 })
					due, renewed, again = m.rest(ctx, watch), false, backoff{}
					continue
				}
			}
			<-p.Done()
			err = p.Err()
		}
		if ctx.Err() != nil {
			break
		}
		if renewed = errors.Is(err, process.ErrRenewed); renewed {
			first() // the start of the agent does not wait for modules that do this at once
			renewals.Wait(ctx)
			continue
		}
		if pulled(err) || process.IsOneAtATime(err) && m.moves() != moves {
			// The card is the cause. Other cards may work.
			m.log.Info("starting the module again", "reason", err)
			first()
			renewals.Wait(ctx)
			continue
		}
		if process.IsOneAtATime(err) && !poll {
			// The agent has noticed this before a request had to wait.
			m.log.Info("module does one thing at a time: its slots are looked at again and again")
			renewed, poll, spec.Poll = p != nil, true, true
			continue
		}
		if spec.Cause != nil {
			if cause := spec.Cause(ctx); cause != "" {
				err = fmt.Errorf("%w; %s", err, cause)
			}
		}
		if p != nil && p.WasUsed() || m.moves() != moves {
			again = backoff{} // the process was of use, or lost a card
		}
		// A module may hang while it waits for events. Polling avoids that.
		_, hung := errors.AsType[*process.HungError](err)
		spec.Poll = poll || hung
		wait := again.next(time.Since(began))
		if wire.IsReason(err, wire.ReasonLoad) || wait >= restartMax && !m.everRan() {
			// A restart repairs neither the file nor a missing device, such as a TPM.
			wait = 0
		}
		m.stopped(err, wait)
		first()
		answer(due, m.failure())
		due = m.pause(ctx, wait)
	}
	m.change(func() { m.proc, m.err, m.retry = nil, ErrClosed, time.Time{} })
}

// start starts a process of the module.
func (m *module) start(ctx context.Context, spec ModuleSpec) (*process.Process, error) {
	p, err := process.Start(ctx, process.Options{
		Name: spec.Name, Command: m.store.opts.Command, Env: registry.Environment(os.Environ(), spec.Env),
		Hello: wire.Hello{
			Path: spec.Path, InitArgs: spec.InitArgs, Poll: spec.Poll, Unconfined: spec.Unconfined, Write: spec.Write,
		},
		Timeout: spec.Timeout, Log: m.log,
		SlotsLeft: m.slotsLeft,
		Starting:  func(p *process.Process) { m.change(func() { m.current, m.watch.silent = p, false }) },
	})
	if err != nil && !spec.Unconfined && !fitsSandbox(spec.Path) && maybeSandbox(err) {
		err = fmt.Errorf("%w; %s", err, sandboxHint)
	}
	return p, err
}

// tellSandbox warns once if parts of the sandbox are missing.
func (m *module) tellSandbox(s wire.Sandbox) {
	m.mu.Lock()
	first := m.starts == 0
	m.mu.Unlock()
	if first && !s.Off && !s.Whole() {
		m.log.Warn("module is not in a whole sandbox", "sandbox", plain.Output(s.String()))
	}
}

// everRan reports whether the module has ever started.
func (m *module) everRan() bool {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.starts > 0
}

// backoff computes the pause before the next start of a process.
type backoff struct{ last time.Duration }

// next returns the pause after a process that has lived for some time.
func (b *backoff) next(lived time.Duration) time.Duration {
	if lived > healthyAfter {
		b.last = 0
	}
	b.last = min(max(2*b.last, restartMin), restartMax)
	return b.last
}

// answer sends the outcome of a look to all that wait for it.
func answer(due []*lookup, err error) {
	for _, l := range due {
		l.done <- err
	}
}

// stopped notes that there is no process, and until when. The list loses the keys of the module,
// except after a first failure: that process is back before a client lists the keys.
func (m *module) stopped(err error, wait time.Duration) {
	old := false
	var gone []*Token
	m.change(func() {
		m.proc, m.err, m.retry, m.pid, m.released = nil, err, time.Time{}, 0, false
		m.lastLook = time.Now()
		old, m.reason = m.reason == process.WithoutOutput(err), process.WithoutOutput(err)
		if wait > 0 {
			m.retry = time.Now().Add(wait)
		}
		if m.starts == 0 || wait == 0 || wait > restartMin {
			m.order, gone = nil, m.order
		}
	})
	for _, t := range gone {
		t.left()
	}
	m.store.publish()
	reason := err.Error()
	if old {
		reason = process.WithoutOutput(err) // the log has the output already
	}
	switch {
	case wait > 0:
		m.log.Warn("module stopped", "reason", reason, "starts again in", wait)
	case !old: // once, not for each list of the keys
		m.log.Warn("module cannot be used", "reason", reason)
	}
}

// pause waits for wait, or until a client wants the module if wait is 0. An explicit request for a
// look ends the pause in any case.
func (m *module) pause(ctx context.Context, wait time.Duration) (due []*lookup) {
	var timer <-chan time.Time
	var poked <-chan struct{}
	if wait > 0 {
		t := time.NewTimer(wait)
		defer t.Stop()
		timer = t.C
	} else {
		select {
		case <-m.poked: // from before this failure
		default:
		}
		poked = m.poked
	}
	select {
	case <-ctx.Done():
	case <-timer:
	case <-poked:
	case l := <-m.wanted:
		due = append(due, l)
	}
	return due
}

// attend serves a running process until it ends. If the agent releases the process, attend returns
// a watch of the readers. If a new process replaces it, attend returns the requests for a look that
// the new process must answer.
func (m *module) attend(ctx context.Context, p *process.Process) (*readerWatch, []*lookup) {
	idle := time.NewTimer(0)
	defer idle.Stop()
	var later <-chan time.Time // a look that the pace delays
	for {
		var err error
		var due []*lookup
		events := p.Events()
		if later != nil {
			events = nil
		}
		select {
		case <-ctx.Done():
			p.Kill(ErrClosed)
			return nil, nil
		case <-p.Done():
			return nil, nil
		case <-idle.C:
			watch, again := m.release(ctx, p)
			if watch != nil {
				return watch, nil
			}
			idle.Reset(again)
		case <-events:
			if wait := m.looks.Take(time.Now()); wait > 0 {
				later = time.After(wait)
				continue
			}
			err = m.look(ctx, p, false)
		case <-later:
			later = nil
			err = m.look(ctx, p, false)
		case <-m.moved:
			err = m.look(ctx, p, false)
		case <-m.poked:
			if m.mute() {
				err = m.look(ctx, p, true)
			}
		case l := <-m.wanted:
			err = m.look(ctx, p, true)
			due = append(due, l)
		}
		if errors.Is(err, process.ErrRenewed) || pulled(err) {
			return nil, due
		}
		answer(due, err)
		if err != nil && ctx.Err() == nil && p.Err() == nil { // otherwise run logs the reason
			m.log.Warn("module cannot be looked at", "reason", err)
		}
	}
}

// mute reports whether the module has no removable slot. Then new tokens come from other programs,
// and the module may not notice them.
func (m *module) mute() bool {
	m.mu.Lock()
	defer m.mu.Unlock()
	return !m.removable && !m.info.Waits
}

// look asks the module for its tokens and keys, and publishes them. If a token fails, it keeps its
// old keys.
func (m *module) look(ctx context.Context, p *process.Process, again bool) error {
	before, moves := m.readers(ctx), m.moves()
	var slots wire.SlotsReply
	// The agent does not replace a process while a user types a PIN for it.
	again = again && !(p.Info().Waits && m.asking())
	err := p.Call(ctx, process.ListTimeout, wire.TypeSlots, &wire.Slots{Reinitialize: again}, &slots)
	if p.Err() == nil {
		m.answeredSince(p, moves)
	}
	if err != nil {
		if wire.IsRV(err, wire.CKRGeneralError, wire.CKRDeviceError, wire.CKRCryptokiNotInitialized) {
			// Some modules never recover from the loss of their reader service. A new process does.
			p.Kill(fmt.Errorf("its tokens cannot be listed: %w", err))
		}
		return m.wrap(err)
	}
	m.mu.Lock()
	m.pcsc = slots.PCSC
	m.mu.Unlock()
	now := m.readers(ctx)
	var order []*Token
	removable := false
	names := m.numbering(ctx, p, slots.Slots)
	bound := bounds.NewLook(len(slots.Slots), m.log)
	for _, slot := range slots.Slots {
		removable = removable || slot.Flags&wire.CKFRemovableDevice != 0
		if !slot.HasToken || !bound.Admit(&slot) {
			continue
		}
		slot.Token = names.Name(slot)
		t := m.token(slot)
		if !bound.MayRead(slot.Token) {
			// It keeps its old objects.
		} else if size, err := t.look(ctx, p, &slot, order, now); err != nil {
			if ctx.Err() != nil || p.Err() != nil {
				return m.wrap(err)
			}
			if e, ok := errors.AsType[*wire.Error](err); ok && e.Reason == wire.ReasonNoToken && e.RV == 0 {
				continue // the token has left since the module listed its slots: no other event may tell
			}
			m.log.Warn("token cannot be read", "token", slot.Token.Label, "serial", slot.Token.Serial, "reason", err)
		} else {
			bound.Read(size)
		}
		order = append(order, t)
	}
	var gone []*Token
	empty := ""
	if len(order) == 0 && m.spec.Empty != nil {
		empty = m.spec.Empty(ctx)
	}
	m.mu.Lock()
	m.cards, m.empty = before, empty
	m.mu.Unlock()
	m.watchCards()
	order = m.keepHeld(ctx, order, before)
	m.change(func() {
		for _, t := range order {
			if !slices.Contains(m.last, t) {
				t.inserted()
			}
		}
		gone = slices.DeleteFunc(slices.Clone(m.last), func(t *Token) bool { return slices.Contains(order, t) })
		m.order, m.last, m.lastLook = order, order, time.Now()
		m.removable, m.reason, m.leftOut = removable, "", bound.LeftOut()
	})
	if len(gone) > 0 {
		m.cardsLeft(gone, 0)
	}
	m.prune()
	p.ForgetQueues(func(id wire.TokenID) bool {
		return slices.ContainsFunc(order, func(t *Token) bool { return t.ID == id })
	})
	m.store.publish()
	return nil
}

// asking reports whether a prompt for the PIN of one of the tokens is open.
func (m *module) asking() bool {
	return slices.ContainsFunc(m.known(), func(t *Token) bool { return t.pins.Trying() })
}

// token returns the Token in a slot, and makes one if the slot is new.
func (m *module) token(slot wire.Slot) *Token {
	m.mu.Lock()
	defer m.mu.Unlock()
	t := m.tokens[slot.Token]
	if t == nil {
		t = newToken(m, slot.Token)
		m.tokens[slot.Token] = t
	}
	return t
}

// present returns the tokens that are present.
func (m *module) present() []*Token {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.order
}

// known returns every token that the agent remembers.
func (m *module) known() []*Token {
	m.mu.Lock()
	defer m.mu.Unlock()
	return slices.SortedFunc(maps.Values(m.tokens), func(a, b *Token) int { return a.ID.Compare(b.ID) })
}

// running returns the process, and waits while it starts.
func (m *module) running(ctx context.Context) (*process.Process, error) {
	for {
		m.mu.Lock()
		p, state, silent := m.proc, m.state, m.watch.silent
		soon := m.err == nil || !m.retry.IsZero() && time.Until(m.retry) < startPatience
		failure := m.failureLocked() // of this moment
		if m.released {
			select {
			case m.needed <- struct{}{}:
			default:
			}
		}
		m.mu.Unlock()
		switch {
		case p != nil && p.Err() == nil && !silent:
			return p, nil
		case p == nil && !soon:
			return nil, failure
		}
		// If the process has just ended, then run changes the state soon.
		select {
		case <-state:
		case <-ctx.Done():
			return nil, ctx.Err()
		}
	}
}

// failure returns the reason why there is no process.
func (m *module) failure() error {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.failureLocked()
}

func (m *module) failureLocked() error {
	if m.err == nil || errors.Is(m.err, ErrClosed) {
		return m.err
	}
	return &ModuleError{Module: m.spec.Name, Path: m.spec.Path, Err: m.err, Retry: m.retry}
}

func (m *module) wrap(err error) error {
	if err == nil || errors.Is(err, context.Canceled) || errors.Is(err, context.DeadlineExceeded) {
		return err
	}
	return &ModuleError{Module: m.spec.Name, Path: m.spec.Path, Err: err}
}

// rescan requests a look at the module, and waits for it.
func (m *module) rescan(ctx context.Context) error {
	l := &lookup{done: make(chan error, 1)}
	select {
	case m.wanted <- l:
	case <-ctx.Done():
		return ctx.Err()
	case <-m.store.ctx.Done():
		return ErrClosed
	}
	select {
	case err := <-l.done:
		return err
	case <-ctx.Done():
		return ctx.Err()
	}
}

// poke requests a look in the background, unless the last look is fresh. A module that cannot be
// loaded is looked at less often.
func (m *module) poke() {
	m.mu.Lock()
	interval := pokeInterval
	if m.proc == nil {
		interval = restartMax
	}
	fresh := time.Since(m.lastLook) < interval
	m.mu.Unlock()
	if fresh {
		return
	}
	select {
	case m.poked <- struct{}{}:
	default:
	}
}

// status returns the state of the module and of its tokens.
func (m *module) status() ModuleStatus {
	st, there, away := m.statusNow()
	for i, t := range there { // the locks of pin.States come before the module's
		t.addPINs(&st.Tokens[i])
		st.Tokens[i].Reader = t.reader()
	}
	for i, t := range away {
		t.addPINs(&st.Away[i])
	}
	return st
}

// statusNow returns the status without what pin.States adds, and the tokens in its lists.
func (m *module) statusNow() (st ModuleStatus, there, away []*Token) {
	m.mu.Lock()
	defer m.mu.Unlock()
	st = ModuleStatus{
		Name:     m.spec.Name,
		Path:     m.spec.Path,
		Running:  m.proc != nil,
		Released: m.released && m.pid == 0 && m.err == nil,
		Err:      m.err,
		Restarts: max(0, m.starts-1),
		Waits:    m.proc != nil && m.info.Waits,
		Library:  m.info.Description,
		LeftOut:  m.leftOut,
		Empty:    m.empty,
	}
	if m.proc != nil {
		st.PID = m.proc.PID()
		st.Sandbox = plain.Output(m.info.Sandbox.String())
	}
	for _, t := range m.order {
		st.Tokens, there = append(st.Tokens, t.status(true)), append(there, t)
	}
	for _, t := range slices.SortedFunc(maps.Values(m.tokens), func(a, b *Token) int { return a.ID.Compare(b.ID) }) {
		if !slices.Contains(m.order, t) && len(t.keyList()) > 0 {
			st.Away, away = append(st.Away, t.status(false)), append(away, t)
		}
	}
	return st, there, away
}
