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

	"p11-agent/pinentry/plain"
	"p11-agent/token/pace"
	"p11-agent/token/pcsc"
	"p11-agent/token/process"
	"p11-agent/token/registry"
	"p11-agent/token/wire"
)

const (
	// restartMin and restartMax bound the pause before a module process that
	// ended is started again; it doubles each time.
	restartMin = 100 * time.Millisecond
	restartMax = 30 * time.Second
	// A process that lived this long, or has made a signature, starts anew with the
	// shortest pause.
	healthyAfter = time.Minute
	// A request waits for the next start when it is this near, and fails with
	// the reason otherwise.
	startPatience = 2 * time.Second
	// pokeInterval is how long a look at a module stays fresh.
	pokeInterval = 2 * time.Second
)

// module runs one PKCS#11 module. The goroutine in run owns the process: it
// starts it, looks at its tokens when told to, and starts it again with a pause
// when it has ended. Everybody else reads the state under mu and asks through
// wanted.
//
//	starting ─▶ looking ─▶ ready ─▶ (event, rescan) looking
//	  ▲   ▲        │          │ │
//	  │   └ pause ◀┴──────────┘ │ process ended
//	  └──── let go ◀────────────┘ not used (release.go)
type module struct {
	store *Store
	spec  ModuleSpec
	// identity is what PINs and homes know the module by: the name in the configuration, or
	// the file that a client has named. Otherwise a client could have a module take the name
	// of another one whose file is called the same.
	identity string
	byClient bool
	file     string // spec.Path with all links followed, as far as there is such a file
	log      *slog.Logger
	lines    *folding      // behind log
	looks    pace.Limit    // of those for events; run's
	looked   chan struct{} // closed after the first look, or the first failure
	wanted   chan *lookup  // looks asked for
	poked    chan struct{} // one element: somebody looks at the keys
	needed   chan struct{} // one element: somebody needs the process that was let go
	moved    chan struct{} // one element: cards have come or gone, as pcscd tells

	mu         sync.Mutex
	state      chan struct{}    // closed and replaced at every change below
	proc       *process.Process // nil while there is none
	info       wire.HelloReply
	err        error     // why there is none
	retry      time.Time // when it is started again; zero: when somebody wants it
	starts     int
	lastLook   time.Time               // or when it failed last
	plug       bool                    // it has slots that tokens are plugged into
	complain   string                  // why it could not be used, as logged last
	leftOut    []string                // at the last look
	tokens     map[wire.TokenID]*Token // the tokens that were ever there, within bounds
	insertions uint64                  // the most insertions of those that were forgotten
	order      []*Token                // the present ones, in the order of slots
	last       []*Token                // likewise at the last look, whatever came after
	pid        int                     // of the process, from before proc is set; 0: there is none
	current    *process.Process        // likewise, from before the module is loaded
	watch      cardWatch
	pcsc       bool          // it sees smart cards by pcscd
	empty      string        // why it shows no token, if somebody knows
	cards      []pcsc.Reader // the readers just before the last look
	held       []string      // those that others kept to themselves then
	users      int           // requests that need the process
	lastUse    time.Time
	released   bool // the process was ended as nobody needed it
}

// lookup is a look that somebody waits for.
type lookup struct {
	done chan error // one element
}

func newModule(s *Store, spec ModuleSpec) *module {
	file, err := filepath.EvalSymlinks(spec.Path)
	if err != nil {
		file = spec.Path // starting it will say what is wrong
	}
	lines := newFolding(s.log.Handler())
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

// change makes a change of the state under mu and wakes those who wait for it.
func (m *module) change(f func()) {
	m.mu.Lock()
	defer m.mu.Unlock()
	f()
	close(m.state)
	m.state = make(chan struct{})
}

// run keeps the module running until ctx ends.
func (m *module) run(ctx context.Context) {
	defer m.lines.close()
	first := sync.OnceFunc(func() { close(m.looked) })
	defer first()
	var due []*lookup // asked for while there was no process
	defer func() { answer(due, ErrClosed) }()
	spec, poll := m.spec, m.spec.Poll
	renewed := false // the next process is no sign of trouble
	var again backoff
	renewals := pace.Limit{Burst: renewBurst, Every: renewEvery}
	for ctx.Err() == nil {
		began, moves := time.Now(), m.moves()
		p, err := m.start(ctx, spec)
		if err == nil {
			info := p.Info()
			trimHello(&info)
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
				first() // else when it is noted what happened to it
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
			first() // whoever waits for all modules does not wait for one that wants this at once
			renewals.Wait(ctx)
			continue
		}
		if pulled(err) || process.IsOneAtATime(err) && m.moves() != moves {
			// The card is to blame, and there may be others.
			m.log.Info("module is started anew", "reason", err)
			first()
			renewals.Wait(ctx)
			continue
		}
		if process.IsOneAtATime(err) && !poll {
			// Found out before somebody had to wait for it.
			m.log.Info("module does one thing at a time: its slots are looked at again and again")
			renewed, poll, spec.Poll = p != nil, true, true
			continue
		}
		if spec.Cause != nil {
			if cause := spec.Cause(ctx); cause != "" {
				err = fmt.Errorf("%w; %s", err, cause)
			}
		}
		if p != nil && p.HasSigned() || m.moves() != moves {
			again = backoff{} // it was of use, or had a card pulled
		}
		// A wait for events may be what it hung for.
		_, hung := errors.AsType[*process.HungError](err)
		spec.Poll = poll || hung
		wait := again.next(time.Since(began))
		if wire.IsReason(err, wire.ReasonLoad) || wait >= restartMax && !m.everRan() {
			// The file will not get better by itself, and nor will what a module is
			// for that is not there, such as a TPM.
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
		Starting:  func(p *process.Process) { m.change(func() { m.current, m.watch.doubt = p, false }) },
	})
	if err != nil && !spec.Unconfined && !fitsSandbox(spec.Path) && maybeSandbox(err) {
		err = fmt.Errorf("%w; %s", err, sandboxHint)
	}
	return p, err
}

// tellSandbox logs once what a module is not kept from although it should be.
func (m *module) tellSandbox(s wire.Sandbox) {
	m.mu.Lock()
	first := m.starts == 0
	m.mu.Unlock()
	if first && !s.Off && !s.Whole() {
		m.log.Warn("module is not in a whole sandbox", "sandbox", plain.Output(s.String()))
	}
}

// everRan tells whether the module has ever started.
func (m *module) everRan() bool {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.starts > 0
}

// backoff is how long to wait before a process is started again.
type backoff struct{ last time.Duration }

// next returns that for a process that has lived so long.
func (b *backoff) next(lived time.Duration) time.Duration {
	if lived > healthyAfter {
		b.last = 0
	}
	b.last = min(max(2*b.last, restartMin), restartMax)
	return b.last
}

// answer tells everybody who waited for a look.
func answer(due []*lookup, err error) {
	for _, l := range due {
		l.done <- err
	}
}

// stopped notes that there is no process, and until when. Its keys are gone
// from the list until it is back: the process of a module that ended once is
// back before anybody looks.
func (m *module) stopped(err error, wait time.Duration) {
	old := false
	var gone []*Token
	m.change(func() {
		m.proc, m.err, m.retry, m.pid, m.released = nil, err, time.Time{}, 0, false
		m.lastLook = time.Now()
		old, m.complain = m.complain == process.WithoutOutput(err), process.WithoutOutput(err)
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
		reason = process.WithoutOutput(err) // its words are in the log already
	}
	switch {
	case wait > 0:
		m.log.Warn("module stopped", "reason", reason, "starts again in", wait)
	case !old: // not each time that somebody looks at the keys
		m.log.Warn("module cannot be used", "reason", reason)
	}
}

// pause waits for wait, or, when it is 0, until somebody wants the module. Who
// explicitly asks for a look ends the pause in any case.
func (m *module) pause(ctx context.Context, wait time.Duration) (due []*lookup) {
	var timer <-chan time.Time
	var poked <-chan struct{}
	if wait > 0 {
		t := time.NewTimer(wait)
		defer t.Stop()
		timer = t.C
	} else {
		select {
		case <-m.poked: // before this failure
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

// attend serves a running process until it ends. It returns a watch of the
// readers when it was ended because nobody needed it, and the looks that the
// process is replaced for.
func (m *module) attend(ctx context.Context, p *process.Process) (*readerWatch, []*lookup) {
	idle := time.NewTimer(0)
	defer idle.Stop()
	var later <-chan time.Time // a look that is put off
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
		if err != nil && ctx.Err() == nil && p.Err() == nil { // else run says it
			m.log.Warn("module cannot be looked at", "reason", err)
		}
	}
}

// mute tells whether the module has no slot that a token could be plugged into:
// then new tokens come from other programs, and it may not notice.
func (m *module) mute() bool {
	m.mu.Lock()
	defer m.mu.Unlock()
	return !m.plug && !m.info.Waits
}

// look asks the module for its tokens and keys and publishes them. A token that
// fails keeps what was known of it.
func (m *module) look(ctx context.Context, p *process.Process, again bool) error {
	before, moves := m.readers(ctx), m.moves()
	var slots wire.SlotsReply
	// A process is not replaced while a person types a PIN for it.
	again = again && !(p.Info().Waits && m.asking())
	err := p.Call(ctx, process.ListTimeout, wire.TypeSlots, &wire.Slots{Reinitialize: again}, &slots)
	if p.Err() == nil {
		m.answeredSince(p, moves)
	}
	if err != nil {
		if wire.IsRV(err, wire.CKRGeneralError, wire.CKRDeviceError, wire.CKRCryptokiNotInitialized) {
			// Some modules never recover from the loss of their reader service;
			// a new process does.
			p.Kill(fmt.Errorf("its tokens cannot be listed: %w", err))
		}
		return m.wrap(err)
	}
	m.mu.Lock()
	m.pcsc = slots.PCSC
	m.mu.Unlock()
	now := m.readers(ctx)
	var order []*Token
	plug, read := false, 0
	names := m.numbering(slots.Slots)
	var left tokensLeftOut
	for _, slot := range slots.Slots {
		plug = plug || slot.Flags&wire.CKFRemovableDevice != 0
		if !slot.HasToken {
			continue
		}
		if !believable(slot.Token) {
			m.log.Warn("token has a longer name than PKCS#11 allows, and is not used", "slot", slot.ID)
			continue
		}
		if len(order) == maxTokens {
			if left.tokens++; left.tokens == 1 {
				m.log.Warn("module shows more tokens than are used", "slots", len(slots.Slots), "used", maxTokens)
			}
			continue
		}
		slot = trim(slot)
		slot.Token = names.name(ctx, p, slot)
		t := m.token(slot)
		if read > maxLook {
			m.log.Warn("module shows more objects than are read", "token", slot.Token.Label, "serial", slot.Token.Serial)
			left.unread++
		} else if size, err := t.look(ctx, p, &slot, order, now); err != nil {
			if ctx.Err() != nil || p.Err() != nil {
				return m.wrap(err)
			}
			m.log.Warn("token cannot be read", "token", slot.Token.Label, "serial", slot.Token.Serial, "reason", err)
		} else {
			read += size
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
		m.plug, m.complain, m.leftOut = plug, "", left.reasons()
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

// asking tells whether somebody is asked for the PIN of one of the tokens.
func (m *module) asking() bool {
	return slices.ContainsFunc(m.known(), func(t *Token) bool { return t.pins.Trying() })
}

// token returns what is kept of the token in a slot.
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

// present returns the tokens that are there.
func (m *module) present() []*Token {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.order
}

// known returns every token that was ever there.
func (m *module) known() []*Token {
	m.mu.Lock()
	defer m.mu.Unlock()
	return slices.SortedFunc(maps.Values(m.tokens), func(a, b *Token) int { return compareIDs(a.ID, b.ID) })
}

// running returns the process, waiting for it while it starts.
func (m *module) running(ctx context.Context) (*process.Process, error) {
	for {
		m.mu.Lock()
		p, state, doubt := m.proc, m.state, m.watch.doubt
		soon := m.err == nil || !m.retry.IsZero() && time.Until(m.retry) < startPatience
		failure := m.failureLocked() // of this moment: the next may have a process
		if m.released {
			select {
			case m.needed <- struct{}{}:
			default:
			}
		}
		m.mu.Unlock()
		switch {
		case p != nil && p.Err() == nil && !doubt:
			return p, nil
		case p == nil && !soon:
			return nil, failure
		}
		// Also when the process has just ended: run is about to say so.
		select {
		case <-state:
		case <-ctx.Done():
			return nil, ctx.Err()
		}
	}
}

// failure says why there is no process.
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

// rescan has the module looked at again and waits for it.
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

// poke has the module looked at in the background unless that was done just
// now. One that cannot be loaded is tried less often.
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

// status tells how the module fares, and of its tokens.
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

// statusNow is the status without what pin.States tell, and the tokens that its lists are of.
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
	for _, t := range slices.SortedFunc(maps.Values(m.tokens), func(a, b *Token) int { return compareIDs(a.ID, b.ID) }) {
		if !slices.Contains(m.order, t) && len(t.keyList()) > 0 {
			st.Away, away = append(st.Away, t.status(false)), append(away, t)
		}
	}
	return st, there, away
}
