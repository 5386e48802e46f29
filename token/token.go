package token

import (
	"context"
	"encoding/hex"
	"errors"
	"fmt"
	"log/slog"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"

	"p11-agent/token/bounds"
	"p11-agent/token/card"
	"p11-agent/token/login"
	"p11-agent/token/objects"
	"p11-agent/token/pairs"
	"p11-agent/token/pcsc"
	"p11-agent/token/pin"
	"p11-agent/token/pkcs11uri"
	"p11-agent/token/process"
	"p11-agent/token/retention"
	"p11-agent/token/usage"
	"p11-agent/token/wire"
)

// Token is one token as one module shows it. The Token stays while the token is away, and is the
// same after the token comes back.
type Token struct {
	ID     wire.TokenID
	module *moduleState
	use    usage.Usage
	visits card.Visits
	pins   *pin.State
	check  loginCheck

	mu sync.Mutex

	// Where the token is, and through which module the agent uses it.
	slot    wire.Slot // at the last look
	card    card.Stay // at the last look
	shadow  string    // the module that shows the token in place of this one
	belongs string    // the module that the token belongs to while this one shows it

	// Its objects.
	objects          *objects.Set // as the last look found them; nil: there was no look
	keys             []*Key       // in the order of objects.Pairs
	began, held      uint64       // numbers of looks: the last that began, and that of objects
	refusesMechanism map[uint64]bool

	// Its login.
	logins   login.State
	deadline retention.Deadline[*process.Process]
}

// newToken makes a Token. The caller holds the module's mu if other goroutines may use the module.
func newToken(m *moduleState, id wire.TokenID) *Token {
	t := &Token{ID: id, module: m, pins: m.store.devices.Open(id, m.identity), check: newLoginCheck(), refusesMechanism: make(map[uint64]bool)}
	t.visits.Restore(m.insertions, time.Time{})
	return t
}

// removable reports whether the slot of the token is removable, as for a card.
func (t *Token) removable() bool {
	t.mu.Lock()
	defer t.mu.Unlock()
	return t.slot.Flags&wire.CKFRemovableDevice != 0
}

// lookAgain reads the objects of a token in its slot.
func (t *Token) lookAgain(ctx context.Context, p *process.Process) error {
	_, err := t.look(ctx, p, nil, t.module.present(), t.module.readers.List(ctx))
	return err
}

// look reads the objects of the token. slot is where the token is, or nil for its last slot. others
// are tokens of the module that share the room for keys. readers is the list of pcscd from just
// before. look returns the size of the objects in bytes.
func (t *Token) look(ctx context.Context, p *process.Process, slot *wire.Slot, others []*Token, readers []pcsc.Reader) (int, error) {
	t.endStale(ctx, p)
	t.mu.Lock()
	mark := t.logins.Mark()
	t.began++
	number := t.began
	t.mu.Unlock()
	request := wire.Objects{Token: t.ID, Named: objects.SearchNames(t.wanted())}
	if slot != nil {
		request.Slot, request.Placed = slot.ID, true
	}
	reply, err := p.Objects(ctx, &request)
	if err != nil {
		return 0, err
	}
	if slot != nil {
		t.mu.Lock()
		t.slot = *slot
		t.mu.Unlock()
	}
	t.see(ctx, p, reply, readers)
	set := t.read(reply, others)
	t.mu.Lock()
	defer t.mu.Unlock()
	t.logins.Look(mark, p, reply.Info.LoggedIn)
	// Looks run side by side. The objects of an older look do not replace those of a newer one: a
	// login between the two may have shown what the older look did not see.
	if number > t.held {
		t.held = number
		t.slot.Info = reply.Info
		t.holdLocked(set)
	}
	return reply.Size, nil
}

// read makes a Set of what a look has read.
func (t *Token) read(reply *process.Listing, others []*Token) *objects.Set {
	log := t.module.log.With("token", t.ID.Label)
	wanted := t.wanted()
	look := objects.Look{
		Objects: reply.Objects, Cut: reply.Cut, Long: reply.Long, Token: t.ID,
		Hidden:     reply.Info.Flags&wire.CKFLoginRequired != 0 && !reply.Info.LoggedIn,
		Configured: t.configured(),
		Named: func(p *pairs.Pair) bool {
			return slices.ContainsFunc(wanted, func(u *pkcs11uri.URI) bool { return objects.Names(u, p) })
		},
		Skip: func(o wire.Object, reason error) {
			log.Debug("object is not used", "label", o.Label, "id", hex.EncodeToString(o.ID), "reason", reason)
		},
	}
	for _, o := range others {
		if o != t {
			look.Used = look.Used.Plus(o.holds())
		}
	}
	t.mu.Lock()
	look.Before = t.objects
	t.mu.Unlock()
	set := objects.Read(look)
	if n := set.Unused(); n > 0 {
		log.Warn("module shows more keys than are used", "shown", n+len(set.Pairs()), "used", len(set.Pairs()))
	}
	return set
}

// holdLocked takes the objects of a look in place of the old ones. The same key stays the same
// object, for callers that compare.
func (t *Token) holdLocked(set *objects.Set) {
	keys := make([]*Key, 0, len(set.Pairs()))
	for _, p := range set.Pairs() {
		k := newKey(t, p, set)
		if old := t.objects.Find(p); old >= 0 {
			k.use = t.keys[old].use
			if t.keys[old].same(k) {
				k = t.keys[old]
			}
		}
		keys = append(keys, k)
	}
	t.objects, t.keys = set, keys
}

// holds returns how much the agent keeps of the token.
func (t *Token) holds() bounds.Size {
	t.mu.Lock()
	defer t.mu.Unlock()
	return t.objects.Size()
}

// setUsed notes the module that the agent uses the token through, "" for this one, and the module
// that the token belongs to. It logs a change if another module is involved. It warns if that
// module does not run: a module that runs may see a token later than another module.
func (t *Token) setUsed(through, belongs string, runs bool) {
	if belongs == t.module.identity {
		belongs = ""
	}
	t.mu.Lock()
	was, wasGuest := t.shadow, t.belongs
	t.shadow, t.belongs = through, belongs
	t.mu.Unlock()
	log := t.module.log.With("token", t.ID.Label, "serial", t.ID.Serial)
	if through != "" && was != through {
		log.Warn("token is seen through two modules", "used through", through)
	}
	if belongs != "" && wasGuest != belongs {
		level := slog.LevelWarn
		if runs {
			level = slog.LevelDebug
		}
		log.Log(context.Background(), level, "token is seen through another module than so far", "so far", belongs)
	}
}

func (t *Token) keyList() []*Key {
	t.mu.Lock()
	defer t.mu.Unlock()
	return t.keys
}

// current returns a key as the last look read it. A login may have shown more of the key.
func (t *Token) current(k *Key) *Key {
	t.mu.Lock()
	defer t.mu.Unlock()
	if i := t.objects.Find(k.pair); i >= 0 {
		return t.keys[i]
	}
	return k
}

// name returns a name of the token for a person, who may have several tokens with one label.
func (t *Token) name() string {
	var more []string
	if t.ID.Serial != "" {
		more = append(more, "serial "+t.ID.Serial)
	}
	if reader := t.reader(); reader != "" {
		more = append(more, "in reader "+strconv.Quote(reader))
	}
	if len(more) == 0 {
		return strconv.Quote(t.ID.Label)
	}
	return fmt.Sprintf("%q (%s)", t.ID.Label, strings.Join(more, ", "))
}

// present reports whether the token was present at the last look.
func (t *Token) present() bool { return slices.Contains(t.module.present(), t) }

// info returns what the token said of itself at the last look.
func (t *Token) info() wire.TokenInfo {
	t.mu.Lock()
	defer t.mu.Unlock()
	return t.slot.Info
}

// loggedIn reports whether this process is logged in, as far as the agent knows.
func (t *Token) loggedIn(p *process.Process) bool {
	t.mu.Lock()
	defer t.mu.Unlock()
	return t.logins.Process() == p
}

// lastLogin returns the number of the last login.
func (t *Token) lastLogin() uint64 {
	t.mu.Lock()
	defer t.mu.Unlock()
	return t.logins.Number()
}

func (t *Token) setLoggedIn(p *process.Process, in bool) {
	defer t.module.store.stir()
	t.mu.Lock()
	defer t.mu.Unlock()
	if in {
		t.logins.Begin(p)
	} else {
		t.logins.End(p)
	}
}

// forget ends the login, and forgets the PIN.
func (t *Token) forget(ctx context.Context) error {
	t.pins.ForgetKept()
	t.mu.Lock()
	t.deadline.Clear()
	t.mu.Unlock()
	return t.logout(ctx)
}

// logout logs out. A token without a login is no error.
func (t *Token) logout(ctx context.Context) error {
	defer t.module.store.stir()
	t.mu.Lock()
	p, done := t.logins.Logout()
	t.mu.Unlock()
	if p == nil || p.Err() != nil {
		return nil // the login went with the process
	}
	err := p.Call(ctx, process.LoginTimeout, wire.TypeLogout, &wire.Token{Token: t.ID}, new(wire.TokenReply))
	t.mu.Lock()
	done()
	t.mu.Unlock()
	if err != nil && !wire.IsRV(err, wire.CKRUserNotLoggedIn, wire.CKRDeviceRemoved, wire.CKRTokenNotPresent) &&
		!wire.IsReason(err, wire.ReasonNoToken) && !errors.Is(err, process.ErrGone) {
		return fmt.Errorf("log out of token %q: %w", t.ID.Label, t.module.supervisor.Wrap(err))
	}
	return nil
}

func (t *Token) status(present bool) TokenStatus {
	t.mu.Lock()
	defer t.mu.Unlock()
	seen := t.visits.Left()
	if present {
		seen = time.Now()
	}
	st := TokenStatus{
		ID:         t.ID,
		URI:        pkcs11uri.ForKey(t.ID, "", nil).String(),
		Module:     t.module.spec.Name,
		Tries:      pin.TriesOf(t.slot.Info.Flags),
		LoggedIn:   t.logins.Process() != nil,
		Shadowed:   t.shadow,
		Home:       t.belongs,
		Keys:       t.keys,
		Flags:      t.slot.Info.Flags,
		Library:    t.module.supervisor.Info().Description,
		Slot:       t.slot.Description,
		Seen:       seen,
		LastUse:    t.use.Last(),
		Signatures: t.use.Signatures(),
		LeftOut:    t.objects.LeftOut(),
	}
	if p := t.logins.Process(); p != nil {
		st.LoggedInSince, st.LoginEnds = t.logins.Since(), t.deadline.End(p)
	}
	return st
}

// addPINs adds to a status what is known of logins and PINs.
func (t *Token) addPINs(st *TokenStatus) {
	now := t.pins.Status()
	st.PINKept, st.LoginUnderWay, st.PromptOpen = now.Kept, now.UnderWay, now.Prompt
}

// matches reports whether a URI selects this token.
func (t *Token) matches(u *pkcs11uri.URI) bool {
	m := t.module
	t.mu.Lock()
	slot := t.slot
	t.mu.Unlock()
	info := m.supervisor.Info()
	return u.MatchModule(pkcs11uri.ModuleInfo{
		Manufacturer: info.Manufacturer, Description: info.Description,
		Version: pkcs11uri.Version{Major: uint8(info.Library >> 8), Minor: uint8(info.Library)},
	}) &&
		u.MatchSlot(pkcs11uri.SlotInfo{ID: slot.ID, Manufacturer: slot.Manufacturer, Description: slot.Description}) &&
		u.MatchToken(t.ID) && m.named().Matches(u)
}

// same reports whether two keys look the same.
func (k *Key) same(o *Key) bool {
	return k.token == o.token && k.text == o.text && k.pair.Same(o.pair)
}

// lastSeen returns when the token was present last.
func (t *Token) lastSeen() time.Time {
	if t.present() {
		return time.Now()
	}
	return t.visits.Left()
}
