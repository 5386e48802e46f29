// Package token finds keys on tokens and signs with them: it runs the PKCS#11
// modules, each in a process of its own, knows which tokens and keys are there,
// logs in when a signature needs it, and puts right what broke since the last
// use.
//
// It promises that the PIN of one token is never tried on another, that no PIN
// is tried twice by itself, that listing keys waits for nobody, and that a
// module that crashes, hangs or lies costs its own keys only.
//
// It leaves to others who may use a key (package agent), how a person is asked
// (the PINAsker) and where modules come from (package token/registry).
package token

import (
	"context"
	"fmt"
	"log/slog"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"p11-agent/agent/joined"
	"p11-agent/pinentry/secret"
	"p11-agent/token/known"
	"p11-agent/token/pin"
	"p11-agent/token/pkcs11uri"
	"p11-agent/token/wire"
)

// A ModuleSpec says which PKCS#11 module to run and how.
type ModuleSpec struct {
	Name     string // in the registry or the configuration; unique
	Path     string // absolute
	InitArgs string // for C_Initialize, usually empty
	// Cause tells why the module may have failed that has just failed, where somebody
	// else knows more of that than the module says. It may wait for a few seconds. nil,
	// or empty: nobody does.
	Cause func(context.Context) string
	// Empty tells at once why the module may show no token, likewise.
	Empty func(context.Context) string
	Env   []string
	// Timeout is how long the module may take for any one request before its
	// process is killed; 0 stands for a time by kind of request, two minutes at
	// most. To make a key it always has a quarter of an hour.
	Timeout time.Duration
	// Release is how long a module may leave cards unused before it lets go of
	// them, which ends its logins; 0: not while somebody is logged in. Idle is the
	// same for when nobody is logged in; 0: ReleaseIdle, ReleaseNever: not at
	// all. It is for modules that use pcscd.
	Release, Idle time.Duration
	// Poll has the module's slots be looked at again and again instead of waiting
	// for its events. It is for modules that do one thing at a time; those that
	// nobody knows of are found out.
	Poll bool
	// Unconfined has the module run without a sandbox: it may write every file that
	// its user may, and make every system call. Otherwise Write are files and
	// directories, absolute, that it may write besides those that such a module is
	// known to.
	Unconfined bool
	Write      []string
}

// Options make a Store.
type Options struct {
	// Modules are started at once. A token that several show is used through the one
	// that it belongs to, or else through the earliest.
	Modules []ModuleSpec
	// Command is the program and its arguments that become a module process; the
	// module's name is added, for whoever looks at the process list.
	Command []string
	// PINs asks a person. nil: nobody can be asked.
	PINs pin.Asker
	// Sources are URIs of the configuration that carry a pin-source or a
	// pin-value. The first that matches the key gives the PIN.
	Sources []*pkcs11uri.URI
	// Homes are URIs of the configuration. Those that name a token and a module say
	// which module the token belongs to. Those that name an object by its id or label have
	// the object found on a token that has more objects than are listed.
	Homes []*pkcs11uri.URI
	// PublicKeys stand in for public halves that tokens do not show.
	PublicKeys []PublicKey
	// Policy says how the PIN of a key's token is used; nil: the zero Policy for
	// every key.
	Policy func(*Key) Policy
	// Working is told when a token begins to work on a signature; the function
	// that it returns is called when that is over, whatever came of it. What a
	// person takes to give a PIN is no part of it. ctx carries the values of the
	// request's context. Neither function may wait. nil: nobody is told.
	Working func(ctx context.Context, k *Key) (done func())
	// Generating is what Working is, for a token that begins to make a key.
	Generating func(wire.TokenID) (done func())
	// StateDir keeps which PIN files have been refused, and which token each configured
	// PIN is for, so that a restart does not try them again, nor on another token;
	// empty: that is only remembered in memory.
	StateDir string
	// Known is what to do with the list of keys in StateDir.
	Known KnownKeys
	Log   *slog.Logger
}

// A Store knows the tokens and keys of all modules. All methods may be called
// at any time from any goroutine.
type Store struct {
	// lock order: the lock of a pin.State, then mu, then module.mu, then Token.mu. None is held
	// while a person, a process or a file other than the Store's own is waited
	// for.

	opts   Options
	log    *slog.Logger
	ctx    context.Context
	cancel context.CancelFunc
	wg     sync.WaitGroup

	devices *pin.Devices

	keys     atomic.Pointer[snapshot]
	settled  chan struct{} // closed when every module was looked at once
	refusals *pin.Refusals
	bindings *pin.Bindings
	known    *known.List   // as it was at the start
	dirty    chan struct{} // one element: the list of known keys is to be written
	stirred  chan struct{} // one element: see StatusChanged

	mu         sync.Mutex
	closed     bool
	modules    []*module
	configured []*pkcs11uri.URI // where PINs come from
	added      []addedSource    // likewise, after those
	preferred  []*pkcs11uri.URI // those that say which module a token belongs to
	// Objects that these URIs name are found on tokens that have more than is listed:
	// those of the configuration and of clients, and both together.
	configuredNames, asked, wanted []*pkcs11uri.URI
	homes                          map[wire.TokenID]home
	strangers                      []known.Token // of the list of known keys, whose modules are not there
	public                         []PublicKey
	policy                         func(*Key) Policy
	changed                        chan struct{} // closed and replaced when keys change
}

// Open starts the modules and returns at once; Settled tells when they have
// been looked at. Close ends what it starts.
func Open(opts Options) *Store {
	ctx, cancel := context.WithCancel(context.Background())
	s := &Store{
		opts:       opts,
		devices:    pin.NewDevices(),
		log:        opts.Log,
		ctx:        ctx,
		cancel:     cancel,
		settled:    make(chan struct{}),
		known:      new(known.List),
		dirty:      make(chan struct{}, 1),
		stirred:    make(chan struct{}, 1),
		refusals:   pin.LoadRefusals(opts.StateDir, opts.Log),
		bindings:   pin.LoadBindings(opts.StateDir, opts.Log),
		configured: slices.Clone(opts.Sources),
		preferred:  homeURIs(opts.Homes),
		homes:      make(map[wire.TokenID]home),
		public:     slices.Clone(opts.PublicKeys),
		policy:     opts.Policy,
		changed:    make(chan struct{}),
	}
	s.configuredNames = wantedURIs(opts.Homes)
	s.setWantedLocked()
	s.keys.Store(new(snapshot))
	if opts.Known != KnownIgnored {
		s.known = loadKnown(opts.StateDir, opts.Log)
		s.homes = homesOf(s.known)
		s.strangers = s.known.Tokens
	}
	if opts.Known == KnownKept && opts.StateDir != "" {
		s.wg.Go(s.keepKnown)
	}
	s.mu.Lock()
	for _, spec := range opts.Modules {
		s.startLocked(spec, "")
	}
	first := slices.Clone(s.modules)
	s.mu.Unlock()
	s.publish() // what is known from before
	s.wg.Go(func() {
		defer close(s.settled)
		for _, m := range first {
			select {
			case <-m.looked:
			case <-ctx.Done():
				return
			}
		}
	})
	return s
}

// startLocked adds a module and runs it. The Store is open. file is the module's file when
// a client has named it, and empty otherwise.
func (s *Store) startLocked(spec ModuleSpec, file string) *module {
	m := newModule(s, spec)
	if file != "" {
		m.identity, m.byClient = file, true
	}
	m.restore(s.known)
	s.strangers = slices.DeleteFunc(slices.Clone(s.strangers), func(t known.Token) bool { return t.Module == m.identity })
	s.modules = append(s.modules, m)
	s.wg.Go(func() { m.run(s.ctx) })
	return m
}

// Close ends every module process and waits for them. Requests under way fail.
func (s *Store) Close() error {
	s.mu.Lock()
	s.closed = true
	s.mu.Unlock()
	s.cancel()
	s.wg.Wait()
	for _, m := range s.modulesNow() {
		for _, t := range m.known() {
			t.pins.Wipe()
		}
	}
	s.devices.Wipe()
	return nil
}

// Settled is closed when every configured module has been looked at for the
// first time, or has failed to start.
func (s *Store) Settled() <-chan struct{} { return s.settled }

// Changed returns a channel that is closed when the keys change next.
func (s *Store) Changed() <-chan struct{} {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.changed
}

// Keys returns the keys of the tokens that are present, each key once for every
// token it is on, in the order of modules, slots and objects. It is a snapshot:
// it never waits, and is not to be changed.
func (s *Store) Keys() []*Key { return s.keys.Load().keys }

// Away returns the keys of tokens that are known and not present, as Keys does:
// each once for every token.
func (s *Store) Away() []*Key { return s.keys.Load().away }

// Generation changes whenever Keys or Away does.
func (s *Store) Generation() uint64 { return s.keys.Load().generation }

// snapshot is the keys at one time, in the order of modules, slots, objects.
type snapshot struct {
	generation uint64
	keys, away []*Key
}

// publish makes a new snapshot of what the modules found last, unless that is
// what the one before shows.
func (s *Store) publish() {
	defer s.stir()
	s.mu.Lock()
	defer s.mu.Unlock()
	next := &snapshot{generation: s.keys.Load().generation + 1}
	used := make(map[wire.TokenID]*Token)
	there := s.tokensLocked((*module).present)
	for id, claims := range byID(there) {
		t := s.claimLocked(id, claims)
		used[id] = t
		belongs := s.homeLocked(id)
		runs := slices.ContainsFunc(s.modules, func(m *module) bool { return m.identity == belongs && m.failure() == nil })
		t.setUsed("", belongs, runs)
		for _, o := range claims {
			if o != t {
				o.setUsed(t.module.spec.Name, "", true)
			}
		}
	}
	for _, t := range there {
		if used[t.ID] == t {
			next.keys = append(next.keys, t.keyList()...)
		}
	}
	known := s.tokensLocked((*module).known)
	for id, claims := range byID(known) {
		if used[id] == nil {
			belongs := s.homeLocked(id)
			i := slices.IndexFunc(claims, func(t *Token) bool { return t.module.identity == belongs })
			used[id] = claims[max(i, 0)]
		}
	}
	for _, t := range known {
		if used[t.ID] == t && !slices.Contains(there, t) {
			next.away = append(next.away, t.keyList()...)
		}
	}
	if was := s.keys.Load(); slices.Equal(next.keys, was.keys) && slices.Equal(next.away, was.away) {
		return
	}
	s.keys.Store(next)
	close(s.changed)
	s.changed = make(chan struct{})
	s.rewrite()
}

// rewrite has the list of known keys written. It never waits.
func (s *Store) rewrite() {
	select {
	case s.dirty <- struct{}{}:
	default:
	}
}

// tokensLocked returns tokens of all modules, in the order of modules.
func (s *Store) tokensLocked(of func(*module) []*Token) (all []*Token) {
	for _, m := range s.modules {
		all = append(all, of(m)...)
	}
	return all
}

// byID finds the Tokens that claim to be the same one.
func byID(all []*Token) map[wire.TokenID][]*Token {
	claims := make(map[wire.TokenID][]*Token)
	for _, t := range all {
		claims[t.ID] = append(claims[t.ID], t)
	}
	return claims
}

// modulesNow returns the modules as they are now.
func (s *Store) modulesNow() []*module {
	s.mu.Lock()
	defer s.mu.Unlock()
	return slices.Clone(s.modules)
}

// Rescan looks at every module again and returns when that is done. Modules
// that failed are started again at once. What fails is logged and shows in
// Modules.
//
// Some modules (SoftHSM, TPMs) notice tokens that another program creates only
// when they are initialised anew, which would end their logins: while somebody
// is logged in to one of a module's tokens, such new tokens stay unseen. After
// LogoutAll they are found.
func (s *Store) Rescan(ctx context.Context) error {
	var wg sync.WaitGroup
	for _, m := range s.modulesNow() {
		wg.Go(func() { _ = m.rescan(ctx) })
	}
	wg.Wait()
	return ctx.Err()
}

// Poke says that somebody looks at the keys: modules that cannot tell of new
// tokens by themselves are looked at again in the background, if that was not
// done a moment ago. It never waits.
func (s *Store) Poke() {
	for _, m := range s.modulesNow() {
		m.poke()
	}
}

// A ModuleStatus tells how a module fares.
type ModuleStatus struct {
	Name     string
	Path     string
	Running  bool
	Released bool // there is no process because nobody needs one now
	PID      int
	Err      error // what went wrong last; nil when it is well
	Restarts int
	Waits    bool   // it tells of changes by itself; its slots are looked at again and again where it does not
	Library  string // what the module says it is
	Sandbox  string // what its process may not do, and what of that is not in force; empty while it does not run
	Tokens   []TokenStatus
	Away     []TokenStatus // known, with keys, and not present
	LeftOut  []string      // what was left out at the last look because of a bound, and why
	// Empty says why the module shows no token, where somebody else than the module
	// knows: see ModuleSpec.
	Empty string
}

// A TokenStatus tells of a token.
type TokenStatus struct {
	ID       wire.TokenID
	URI      string // canonical
	Module   string // the module's name
	Tries    pin.Tries
	LoggedIn bool
	Shadowed string // the module that this token is used through instead
	Home     string // the module that it belongs to, when it is used through this one instead
	Keys     []*Key
	Flags    uint64
	Library  string    // of the module
	Slot     string    // description
	Reader   string    // Slot, when another token of the same name is there; empty otherwise
	Seen     time.Time // when it was there last
	LeftOut  []string  // what was left out at the last look because of a bound, and why

	// Of the login, as far as it is known without asking the token.
	LoggedInSince time.Time // zero: nobody is logged in
	LoginEnds     time.Time // by the Policy of the keys that were used; zero: it does not end by itself
	PINKept       bool      // the PIN lies in locked memory, to log in again
	LoginUnderWay bool      // a PIN is being asked for, or is being tried
	PromptOpen    bool      // a person is being asked

	// Of the signatures since the start.
	LastUse    time.Time // zero: there was none
	Signatures uint64
}

// Modules tells how every module fares, in order. It never waits.
func (s *Store) Modules() []ModuleStatus {
	var all []ModuleStatus
	for _, m := range s.modulesNow() {
		all = append(all, m.status())
	}
	return all
}

// StatusChanged returns a channel that has an element when what Modules tells of
// tokens, logins and failures may have changed since the last was taken out. It
// is for one receiver.
func (s *Store) StatusChanged() <-chan struct{} { return s.stirred }

// stir makes StatusChanged tell. It never waits, whatever locks are held.
func (s *Store) stir() {
	select {
	case s.stirred <- struct{}{}:
	default:
	}
}

// LogoutAll logs out of every token, as far as its module answers, and forgets
// the PINs that are kept, and so makes the next signature ask for the PIN. A
// module that hangs delays no other.
func (s *Store) LogoutAll(ctx context.Context) error {
	return s.logoutOf(ctx, func(*Token) bool { return true })
}

// LogoutOf is LogoutAll for the tokens that are chosen by their keys.
func (s *Store) LogoutOf(ctx context.Context, chosen func([]*Key) bool) error {
	return s.logoutOf(ctx, func(t *Token) bool { return chosen(t.keyList()) })
}

func (s *Store) logoutOf(ctx context.Context, chosen func(*Token) bool) error {
	var wg sync.WaitGroup
	var mu sync.Mutex
	var all []error
	for _, m := range s.modulesNow() {
		for _, t := range m.known() {
			if !chosen(t) {
				continue
			}
			wg.Go(func() {
				if err := t.forget(ctx); err != nil {
					mu.Lock()
					defer mu.Unlock()
					all = append(all, err)
				}
			})
		}
	}
	wg.Wait()
	return joined.Errors(all...)
}

// Logout logs out of the tokens that are selected, by themselves or by a key, as far
// as their modules answer, and forgets their PINs if they are kept: the next signature
// asks. It fails with ErrNoMatch when none is known.
func (s *Store) Logout(ctx context.Context, sel *Selector) error {
	var all []error
	found := false
	for _, m := range s.modulesNow() {
		for _, t := range m.known() {
			if sel.selects(t) {
				found = true
				all = append(all, t.forget(ctx))
			}
		}
	}
	if !found {
		return fmt.Errorf("%w: no such token is known", ErrNoMatch)
	}
	return joined.Errors(all...)
}

// Login logs in to the token of the keys with a PIN that a person gave for what sel selects. The
// keys have to be of one token, as a PIN is for one token. A module that is not the token's home
// gets the PIN only when sel names the module; sel may be nil. Login does nothing with an empty
// PIN: the first signature asks. When one try is left, a person is asked whether to go on. When
// a login lasts already, Login logs out first, so that the token tries the PIN. taken tells that
// the token took this PIN: a token that needs no login tries none.
func (s *Store) Login(ctx context.Context, sel *Selector, keys []*Key, given *secret.Secret) (taken bool, err error) {
	if given.Len() == 0 || len(keys) == 0 {
		return false, nil
	}
	for _, k := range keys[1:] {
		if k.token != keys[0].token {
			return false, fmt.Errorf("a PIN is for one token, but %q and %q are meant: name one of them by its URI, or give no PIN and be asked",
				keys[0].token.ID.Label, k.token.ID.Label)
		}
	}
	err = keys[0].logIn(ctx, supplied{Supplied: pin.Supplied{PIN: given}, selector: sel, taken: &taken})
	return taken, err
}

// LoginAsk logs in to the tokens of the keys, one after the other, and asks for each
// PIN as a signature would. It does nothing where somebody is logged in, or no login
// is needed.
func (s *Store) LoginAsk(ctx context.Context, keys []*Key) error {
	done := make(map[*Token]bool)
	for _, k := range keys {
		if done[k.token] {
			continue
		}
		done[k.token] = true
		if err := k.logIn(ctx, supplied{}); err != nil {
			return err
		}
	}
	return nil
}
