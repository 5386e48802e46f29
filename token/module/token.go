package module

import (
	"context"
	"errors"
	"slices"
	"sync"

	"github.com/miekg/pkcs11"

	"p11-agent/token/wire"
)

// maxSessions is the most sessions for work that are open on one token: one for each lane
// that the agent may open.
const maxSessions = wire.MaxLanes

// A token is a token that the agent has asked for. The token may be absent.
type token struct {
	id wire.TokenID

	// gate orders the calls on the token. Searches and signatures run side by side.
	// Logins, logouts and signatures with a PIN run alone. The login belongs to all
	// sessions of the process. A PIN between C_SignInit and C_Sign must not be taken for
	// the PIN of another signature.
	gate *gate

	// opening has room for one element. The goroutine that makes live puts it in
	// meanwhile.
	opening chan struct{}

	mu   sync.Mutex
	live *presence // nil if the process has not looked for the token, or the token has gone since
}

func newToken(id wire.TokenID) *token {
	return &token{id: id, gate: newGate(), opening: make(chan struct{}, 1)}
}

func (t *token) present() *presence {
	t.mu.Lock()
	defer t.mu.Unlock()
	return t.live
}

// A presence is one stay of a token in a slot. It lasts from the first session until the
// process finds out that the token has gone. The standard closes the sessions of a
// removed token. So a call that works on one of these sessions works on the token that
// was there when the session was opened.
type presence struct {
	lib  *library
	slot uint
	id   wire.TokenID
	stay uint64 // its number, in the agent's terms

	// anchor is the session that keeps the login, and that logs in and out. Searches and
	// signatures do not use it, unless the token has no other session.
	anchor pkcs11.SessionHandle

	// A session for work is in idle, or a goroutine uses it. permits has one element for
	// each session that may still be opened. Together there are limit of them.
	idle    chan pkcs11.SessionHandle
	permits chan struct{}

	ended chan struct{} // closed when gone is set

	mu    sync.Mutex
	limit int
	gone  bool
	keys  map[string]pkcs11.ObjectHandle // handles of private keys, until the login changes
	login uint64                         // counts the changes of the login
}

// open opens the first session on the token in a slot. It checks that the token is id.
func open(lib *library, slot uint, id wire.TokenID) (*presence, error) {
	p := &presence{
		lib:     lib,
		slot:    slot,
		id:      id,
		idle:    make(chan pkcs11.SessionHandle, maxSessions),
		permits: make(chan struct{}, maxSessions),
		ended:   make(chan struct{}),
		keys:    make(map[string]pkcs11.ObjectHandle),
	}
	s, info, err := p.openSession()
	if err != nil {
		return nil, err
	}
	p.anchor, p.limit = s, maxSessions
	if info.MaxSessions > 0 {
		p.limit = int(min(info.MaxSessions-1, maxSessions))
	}
	for range p.limit {
		p.permits <- struct{}{}
	}
	if p.limit == 0 {
		p.limit = 1
		p.idle <- p.anchor
	}
	return p, nil
}

// openSession opens a session, and then checks which token the session is with.
func (p *presence) openSession() (pkcs11.SessionHandle, wire.TokenInfo, error) {
	s, err := p.lib.openSession(p.slot)
	if err != nil {
		return 0, wire.TokenInfo{}, err
	}
	info, err := p.identify()
	if err != nil {
		// the session is useless, and an error of closing it does not matter
		_ = p.lib.closeSession(s)
		return 0, wire.TokenInfo{}, err
	}
	return s, info, nil
}

// identify reads the state of the token in the slot. It fails if another token is there
// now.
func (p *presence) identify() (wire.TokenInfo, error) {
	id, info, err := p.lib.tokenInfo(p.slot)
	if err != nil {
		return info, err
	}
	if id != p.id.Texts() {
		return wire.TokenInfo{}, &wire.Error{Reason: wire.ReasonOtherToken}
	}
	return info, nil
}

// info reads the state of the token, and whether the user is logged in.
func (p *presence) info() (wire.TokenInfo, error) {
	info, err := p.identify()
	if err != nil {
		return info, err
	}
	info.Stay = p.stay
	info.LoggedIn, err = p.loggedIn()
	return info, err
}

func (p *presence) loggedIn() (bool, error) {
	s, err := p.sessionInfo(p.anchor)
	if err != nil {
		return false, err
	}
	return s.State == pkcs11.CKS_RO_USER_FUNCTIONS || s.State == pkcs11.CKS_RW_USER_FUNCTIONS, nil
}

// sessionInfo reads the state of a session. It fails if the session now belongs to
// another slot. When a card leaves, its sessions end. A module may then give the handle
// of such a session to a new session, on any card. The PIN must not go there.
func (p *presence) sessionInfo(session pkcs11.SessionHandle) (pkcs11.SessionInfo, error) {
	s, err := p.lib.sessionInfo(session)
	if err == nil && s.SlotID != p.slot {
		err = &wire.Error{Function: "C_GetSessionInfo", RV: wire.CKRSessionHandleInvalid}
	}
	return s, err
}

// session returns a session. The caller gives it back with release, or with failed.
func (p *presence) session(ctx context.Context) (pkcs11.SessionHandle, error) {
	for {
		if err := ctx.Err(); err != nil {
			return 0, err
		}
		select {
		case s := <-p.idle: // an idle session first, before a new one
			return s, nil
		default:
		}
		select {
		case s := <-p.idle:
			return s, nil
		case <-p.permits:
		case <-p.ended:
			return 0, &wire.Error{RV: wire.CKRDeviceRemoved}
		case <-ctx.Done():
			return 0, ctx.Err()
		}
		s, _, err := p.openSession()
		switch {
		case err == nil:
			return s, nil
		case code(err) != wire.CKRSessionCount:
			p.permits <- struct{}{}
			return 0, err
		}
		// The token has no more sessions. Use those that exist, or else the anchor.
		p.mu.Lock()
		last := p.limit == 1
		if !last {
			p.limit--
		}
		p.mu.Unlock()
		if last {
			return p.anchor, nil
		}
	}
}

// release gives back a session that has no operation under way.
func (p *presence) release(s pkcs11.SessionHandle) {
	p.mu.Lock()
	gone := p.gone
	if !gone {
		p.idle <- s // there is room for all
	}
	p.mu.Unlock()
	if gone {
		_ = p.lib.closeSession(s)
	}
}

// end closes the idle sessions. release closes the others.
func (p *presence) end() {
	p.mu.Lock()
	if p.gone {
		p.mu.Unlock()
		return
	}
	p.gone = true
	close(p.ended)
	sessions := []pkcs11.SessionHandle{p.anchor}
	for len(p.idle) > 0 {
		if s := <-p.idle; s != p.anchor {
			sessions = append(sessions, s)
		}
	}
	p.mu.Unlock()
	for _, s := range sessions {
		_ = p.lib.closeSession(s) // most have gone with the token
	}
}

// forgetKeys clears the handles of private keys after a change of the login. The handles
// end with the login, and other private keys become visible.
func (p *presence) forgetKeys() {
	p.mu.Lock()
	defer p.mu.Unlock()
	clear(p.keys)
}

// loginChanged notes a login or a logout, including one that has failed.
func (p *presence) loginChanged() {
	p.forgetKeys()
	p.mu.Lock()
	defer p.mu.Unlock()
	p.login++
}

// changes counts the calls of loginChanged.
func (p *presence) changes() uint64 {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.login
}

// retire forgets p, whose token has gone. The next request looks for the token again.
func (t *token) retire(p *presence) {
	t.mu.Lock()
	if t.live == p {
		t.live = nil
	}
	t.mu.Unlock()
	p.end()
}

// failed handles an error of the module. s is the session of p that the call used, or 0.
// failed closes the session, which ends the operation on it. It retires p if the token
// has gone.
func (t *token) failed(p *presence, s pkcs11.SessionHandle, err error) {
	switch {
	case s == p.anchor:
		t.retire(p)
		return
	case s != 0:
		_ = p.lib.closeSession(s)
		p.permits <- struct{}{}
	}
	e, ok := errors.AsType[*wire.Error](err)
	if !ok {
		return // cancelled
	}
	switch e.RV {
	case wire.CKRDeviceRemoved, wire.CKRTokenNotPresent, wire.CKRTokenNotRecognized,
		wire.CKRSlotIDInvalid, wire.CKRCryptokiNotInitialized:
		t.retire(p)
		return
	}
	if _, err := p.sessionInfo(p.anchor); err != nil || e.Reason == wire.ReasonOtherToken {
		t.retire(p)
	}
}

// place tells where to look for a token.
type place struct {
	slot  uint
	known bool   // the token is, or was, in slot
	only  bool   // look only in slot
	stay  uint64 // the number for the presence that find returns
}

// find looks for the token, unless its presence is known by now. It looks where the agent
// says that the token is, or else in all slots.
func (t *token) find(ctx context.Context, lib *library, where func() place) (*presence, error) {
	if err := take(ctx, t.opening); err != nil {
		return nil, err
	}
	defer func() { <-t.opening }()
	if p := t.present(); p != nil {
		return p, nil // an earlier caller has found it
	}
	slots, err := lib.slots(true)
	if err != nil {
		return nil, err
	}
	at := where()
	if i := slices.Index(slots, at.slot); at.known && i > 0 {
		slots[0], slots[i] = slots[i], slots[0]
	}
	if at.only {
		slots = slices.DeleteFunc(slots, func(slot uint) bool { return slot != at.slot })
	}
	var failure error
	for _, slot := range slots {
		id, info, err := lib.tokenInfo(slot)
		if err != nil {
			// The token may be in this slot. Then the error says why the token was not
			// found.
			failure = err
			continue
		}
		if id != t.id.Texts() || info.Flags&wire.CKFTokenInitialized == 0 {
			continue
		}
		p, err := open(lib, slot, t.id)
		if err != nil {
			return nil, err
		}
		p.stay = at.stay
		t.mu.Lock()
		t.live = p
		t.mu.Unlock()
		return p, nil
	}
	e := &wire.Error{Reason: wire.ReasonNoToken}
	if f, ok := errors.AsType[*wire.Error](failure); ok {
		e.Function, e.RV = f.Function, f.RV
	}
	return nil, e
}
