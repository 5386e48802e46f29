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
	"p11-agent/token/bounds"
	"p11-agent/token/process"
	"p11-agent/token/readers"
	"p11-agent/token/registry"
	"p11-agent/token/supervise"
	"p11-agent/token/wire"
)

const (
	// ReleaseIdle is how long the agent keeps an unused module without a login.
	ReleaseIdle = supervise.ReleaseIdle
	// ReleaseNever is a ModuleSpec.Idle that keeps the cards for ever.
	ReleaseNever = supervise.ReleaseNever
)

// A moduleState is a PKCS#11 module with its tokens, as the Store knows them. Its supervisor runs the process, and calls Look.
type moduleState struct {
	store *Store
	spec  ModuleSpec
	// identity is the name of the module for PINs and homes: the name in the configuration, or the
	// file that a client has named. A client cannot take the name of another module by a file of
	// the same name.
	identity   string
	byClient   bool
	file       string // spec.Path without symbolic links, if the file exists
	log        *slog.Logger
	lines      *logfold.Handler // behind log
	readers    *readers.Readers
	supervisor *supervise.Supervisor

	mu         sync.Mutex
	tokens     map[wire.TokenID]*Token // those that the agent remembers, within bounds
	insertions uint64                  // the most insertions of a forgotten token
	order      []*Token                // the present tokens, in the order of slots
	last       []*Token                // order as the last look found it
	leftOut    []string                // by the last look
	empty      string                  // the reason why the module shows no token, if known
}

var (
	_ supervise.Host   = (*moduleState)(nil)
	_ readers.Follower = (*moduleState)(nil)
)

func newModule(s *Store, spec ModuleSpec) *moduleState {
	file, err := filepath.EvalSymlinks(spec.Path)
	if err != nil {
		file = spec.Path // the start fails with the reason
	}
	m := &moduleState{store: s, spec: spec, identity: spec.Name, file: file, tokens: make(map[wire.TokenID]*Token)}
	m.lines = logfold.ForModule(s.log.Handler())
	m.log = slog.New(m.lines).With("module", spec.Name)
	env := registry.Environment(os.Environ(), spec.Env)
	m.readers = readers.New(env, s.pids, m.log)
	m.supervisor = supervise.New(m, supervise.Options{
		Process: process.Options{
			Name: spec.Name, Command: s.opts.Command, Env: env,
			Hello: wire.Hello{
				Path: spec.Path, InitArgs: spec.InitArgs, Poll: spec.Poll, Unconfined: spec.Unconfined, Write: spec.Write,
			},
			Timeout: spec.Timeout, Log: m.log,
		},
		Cause: spec.Cause, Release: spec.Release, Idle: spec.Idle, Readers: m.readers, Log: m.log,
	})
	return m
}

// run keeps the module running until ctx ends.
func (m *moduleState) run(ctx context.Context) {
	defer m.lines.Close()
	m.supervisor.Run(ctx)
}

// Ready implements supervise.Host.
func (m *moduleState) Ready() { m.store.stir() }

// Stopped implements supervise.Host.
func (m *moduleState) Stopped(drop bool, commit func()) {
	var gone []*Token
	m.mu.Lock()
	commit()
	if drop {
		m.order, gone = nil, m.order
	}
	m.mu.Unlock()
	for _, t := range gone {
		t.visits.Leave()
	}
	m.store.publish()
}

// LoggedIn implements supervise.Host.
func (m *moduleState) LoggedIn(p *process.Process) bool {
	return slices.ContainsFunc(m.known(), func(t *Token) bool { return t.loggedIn(p) })
}

// LogOut implements supervise.Host. A card may stay verified after the process has ended. The agent
// keeps the PINs.
func (m *moduleState) LogOut(ctx context.Context, p *process.Process) {
	for _, t := range m.known() {
		t.endWith(ctx, p)
	}
}

// look asks the module for its tokens and keys, and publishes them. If a token fails, it keeps its
// old keys.
//
// Look implements supervise.Host.
func (m *moduleState) Look(ctx context.Context, p *process.Process, again bool) error {
	before, moves := m.readers.List(ctx), m.readers.Moves()
	var slots wire.SlotsReply
	// The agent does not replace a process while a user types a PIN for it.
	again = again && !(p.Info().Waits && m.asking())
	err := p.Call(ctx, process.ListTimeout, wire.TypeSlots, &wire.Slots{Reinitialize: again}, &slots)
	if p.Err() == nil {
		m.supervisor.Answered(p, moves)
	}
	if err != nil {
		if wire.IsRV(err, wire.CKRGeneralError, wire.CKRDeviceError, wire.CKRCryptokiNotInitialized) {
			// Some modules never recover from the loss of their reader service. A new process does.
			p.Kill(fmt.Errorf("its tokens cannot be listed: %w", err))
		}
		return m.supervisor.Wrap(err)
	}
	m.readers.SetUsed(slots.PCSC)
	now := m.readers.List(ctx)
	var order []*Token
	removable, asked := false, make(map[*Token]time.Time)
	names := m.numbering(ctx, p, slots.Slots)
	bound := bounds.NewLook(len(slots.Slots), m.log)
	for _, slot := range slots.Slots {
		removable = removable || slot.Flags&wire.CKFRemovableDevice != 0
		if !slot.HasToken || !bound.Admit(&slot) {
			continue
		}
		slot.Token = names.Name(slot)
		t := m.token(slot)
		asked[t] = time.Now()
		if !bound.MayRead(slot.Token) {
			// It keeps its old objects.
		} else if size, err := t.look(ctx, p, &slot, order, now); err != nil {
			if ctx.Err() != nil || p.Err() != nil {
				return m.supervisor.Wrap(err)
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
	m.readers.Follow(m.store.ctx, m, func(work func()) { _ = m.store.start(work) })
	held := m.readers.Looked(ctx, before)
	m.mu.Lock()
	// A token may have left since the agent asked it. Another look follows then.
	order = slices.DeleteFunc(order, func(t *Token) bool { return t.visits.Left().After(asked[t]) })
	order = m.withHeldLocked(order, held)
	for _, t := range order {
		if !slices.Contains(m.last, t) {
			t.visits.Come()
		}
	}
	gone = slices.DeleteFunc(slices.Clone(m.last), func(t *Token) bool { return slices.Contains(order, t) })
	m.order, m.last, m.leftOut, m.empty = order, order, bound.LeftOut(), empty
	m.supervisor.Looked(removable)
	m.mu.Unlock()
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
func (m *moduleState) asking() bool {
	return slices.ContainsFunc(m.known(), func(t *Token) bool { return t.pins.Trying() })
}

// token returns the Token in a slot, and makes one if the slot is new.
func (m *moduleState) token(slot wire.Slot) *Token {
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
func (m *moduleState) present() []*Token {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.order
}

// known returns every token that the agent remembers.
func (m *moduleState) known() []*Token {
	m.mu.Lock()
	defer m.mu.Unlock()
	return slices.SortedFunc(maps.Values(m.tokens), func(a, b *Token) int { return a.ID.Compare(b.ID) })
}

// status returns the state of the module and of its tokens.
func (m *moduleState) status() ModuleStatus {
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
func (m *moduleState) statusNow() (st ModuleStatus, there, away []*Token) {
	m.mu.Lock()
	defer m.mu.Unlock()
	run := m.supervisor.Status()
	st = ModuleStatus{
		Name:     m.spec.Name,
		Path:     m.spec.Path,
		Running:  run.Running,
		Released: run.Released,
		PID:      run.PID,
		Err:      run.Err,
		Restarts: run.Restarts,
		Waits:    run.Waits,
		Library:  run.Library,
		Sandbox:  run.Sandbox,
		LeftOut:  m.leftOut,
		Empty:    m.empty,
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
