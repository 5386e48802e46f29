// Package token finds keys on tokens and signs with them. It runs each PKCS#11 module in a
// process of its own, and knows the present tokens and their keys. It logs in when a signature
// needs a login, and repairs what broke since the last use.
//
// The PIN of one token is never tried on another token, and no PIN is tried twice without a
// person (package token/pin). Listing keys never waits. A module that crashes, hangs or lies
// costs its own keys only.
//
// Package agent decides which request may use a key. The pin.Asker shows prompts. Package
// token/registry lists the modules.
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
	"p11-agent/token/homes"
	"p11-agent/token/known"
	"p11-agent/token/objects"
	"p11-agent/token/pin"
	"p11-agent/token/pinsource"
	"p11-agent/token/pkcs11uri"
	"p11-agent/token/selection"
	"p11-agent/token/wire"
)

// A ModuleSpec says which PKCS#11 module to run and how.
type ModuleSpec struct {
	Name     string // in the registry or the configuration; unique
	Path     string // absolute
	InitArgs string // for C_Initialize, usually empty
	// Cause returns why the module may have just failed, when the caller knows more than the
	// module says. It may wait for a few seconds. nil, or an empty answer: the caller does not
	// know more.
	Cause func(context.Context) string
	// Empty returns why the module may show no token. It is like Cause, and must not wait.
	Empty func(context.Context) string
	Env   []string
	// Timeout is how long the module may take for one request before its process is killed. 0
	// stands for a time by kind of request, at most two minutes. To make a key, the module
	// always has at least a quarter of an hour.
	Timeout time.Duration
	// Release is how long cards may be unused before the module releases them, which ends its
	// logins; 0: the module keeps its cards while a login lasts. Idle is the same while no login
	// lasts; 0: ReleaseIdle; ReleaseNever: the module keeps its cards. Both are for modules that
	// use pcscd.
	Release, Idle time.Duration
	// Poll makes the module process look at the slots again and again. Otherwise the process waits
	// for events. Poll is for modules that do one thing at a time. The agent also detects such a
	// module by itself.
	Poll bool
	// Unconfined runs the module without a sandbox. The module may then write each file of its
	// user, and make each system call. Otherwise Write adds absolute paths of files and directories
	// to those that a module of this kind may write.
	Unconfined bool
	Write      []string
}

// Options make a Store.
type Options struct {
	// Modules are the modules that Open starts at once. If several modules show a token, the agent
	// uses it through its home, or otherwise through the first of them.
	Modules []ModuleSpec
	// Command is the program, with its arguments, that becomes a module process. The agent adds the
	// name of the module as the last argument, so that the process list shows the name.
	Command []string
	// PINs asks a person. nil: the agent cannot ask.
	PINs pin.Asker
	// Sources are URIs of the configuration that carry a pin-source or a
	// pin-value. The first that matches the key gives the PIN.
	Sources []*pkcs11uri.URI
	// Homes are URIs of the configuration. A URI that names a token and a module makes the module
	// the token's home. If a URI names an object by id or label, the agent finds the object even on
	// a token with more objects than the agent lists.
	Homes []*pkcs11uri.URI
	// PublicKeys stand in for public halves that tokens do not show.
	PublicKeys []objects.PublicKey
	// Policy returns how the agent uses the PIN of a key's token; nil: the zero Policy for each key.
	Policy func(*Key) Policy
	// The Store calls Working when a token begins to work on a signature. The Store calls done when
	// the work ends, with success or without. The time for a PIN is not part of the work. ctx
	// carries the values of the request's context. Neither function may wait. Working may be nil.
	Working func(ctx context.Context, k *Key) (done func())
	// Generating is like Working, for a token that begins to make a key.
	Generating func(wire.TokenID) (done func())
	// StateDir is the directory of the files that outlast a restart: the refused PIN files, the
	// token that each configured PIN is for, and the known keys. Empty: the agent remembers them
	// in memory only.
	StateDir string
	// Known says what the Store does with the list of known keys in StateDir.
	Known KnownKeys
	Log   *slog.Logger
}

// A Store knows the tokens and keys of all modules. Methods may be called at any time from any
// goroutine.
type Store struct {
	// lock order: the lock of a pin.State, then mu, then module.mu, then Token.mu, then the locks
	// of a Supervisor and of its Readers. None of them is taken under the lock of sources. No
	// goroutine holds one of them while it waits for a person, for a process, or for a file that is
	// not the Store's own.

	opts   Options
	log    *slog.Logger
	ctx    context.Context
	cancel context.CancelFunc
	wg     sync.WaitGroup

	// PINs.
	devices  *pin.Devices
	refusals *pin.Refusals
	sources  *pinsource.List

	// The state that clients see.
	keys    atomic.Pointer[snapshot]
	settled chan struct{} // closed after the first look at every module
	stirred chan struct{} // one element: see StatusChanged
	dirty   chan struct{} // one element: the list of known keys needs to be written

	// mu guards the following.
	mu      sync.Mutex
	closed  bool
	modules []*moduleState
	public  []objects.PublicKey
	policy  func(*Key) Policy
	changed chan struct{} // closed and replaced when keys change

	homes *homes.Homes
	known *known.List // as it was at the start, without the tokens of the modules that were started

	wanted objects.Wanted // the objects that the configuration and clients name
}

// Open starts the modules and returns at once. Settled tells when the agent has looked at
// them. Close ends what Open starts.
func Open(opts Options) *Store {
	ctx, cancel := context.WithCancel(context.Background())
	s := &Store{
		opts:     opts,
		devices:  pin.NewDevices(),
		log:      opts.Log,
		ctx:      ctx,
		cancel:   cancel,
		settled:  make(chan struct{}),
		known:    new(known.List),
		dirty:    make(chan struct{}, 1),
		stirred:  make(chan struct{}, 1),
		refusals: pin.LoadRefusals(opts.StateDir, opts.Log),
		sources:  pinsource.New(opts.Sources, opts.StateDir, opts.Log),
		public:   slices.Clone(opts.PublicKeys),
		policy:   opts.Policy,
		changed:  make(chan struct{}),
	}
	s.wanted.Configure(opts.Homes)
	s.keys.Store(new(snapshot))
	if opts.Known != KnownIgnored {
		s.known = known.Load(opts.StateDir, opts.Log)
	}
	s.homes = homes.New(s.known.Homes())
	s.homes.Prefer(opts.Homes)
	if opts.Known == KnownKept && opts.StateDir != "" {
		s.wg.Go(func() { known.Keep(s.ctx, opts.StateDir, s.dirty, s.knownNow, s.log) })
	}
	s.mu.Lock()
	for _, spec := range opts.Modules {
		s.startLocked(spec, "")
	}
	first := slices.Clone(s.modules)
	s.mu.Unlock()
	s.publish() // the known keys
	s.wg.Go(func() {
		defer close(s.settled)
		for _, m := range first {
			select {
			case <-m.supervisor.Tried():
			case <-ctx.Done():
				return
			}
		}
	})
	return s
}

// startLocked adds a module and runs it. The Store is open. file is the module's file when a
// client has named it, and empty otherwise.
func (s *Store) startLocked(spec ModuleSpec, file string) *moduleState {
	m := newModule(s, spec)
	if file != "" {
		m.identity, m.byClient = file, true
	}
	m.restore(s.known.Take(m.identity))
	s.modules = append(s.modules, m)
	s.homes.AddModule(m.named())
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

// Settled returns a channel that is closed when the agent has looked once at every configured
// module, or the module has failed to start.
func (s *Store) Settled() <-chan struct{} { return s.settled }

// Changed returns a channel that is closed when the keys change next.
func (s *Store) Changed() <-chan struct{} {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.changed
}

// Keys returns the keys of the present tokens, in the order of modules, slots and objects. A key
// that is on two tokens appears twice. Keys returns a snapshot: it never waits, and the caller
// must not change the slice.
func (s *Store) Keys() []*Key { return s.keys.Load().keys }

// Away is like Keys, for known tokens that are not present.
func (s *Store) Away() []*Key { return s.keys.Load().away }

// Generation returns a number that changes whenever Keys or Away changes.
func (s *Store) Generation() uint64 { return s.keys.Load().generation }

// snapshot is the keys at one time, in the order of modules, slots, objects.
type snapshot struct {
	generation uint64
	keys, away []*Key
}

// publish makes a new snapshot of the keys that the modules found last, when the keys have
// changed.
func (s *Store) publish() {
	defer s.stir()
	s.mu.Lock()
	defer s.mu.Unlock()
	next := &snapshot{generation: s.keys.Load().generation + 1}
	used := make(map[wire.TokenID]*Token)
	there := s.tokensLocked((*moduleState).present)
	for id, claims := range byID(there) {
		t := s.claimLocked(id, claims)
		used[id] = t
		belongs := s.homes.Of(id)
		runs := slices.ContainsFunc(s.modules, func(m *moduleState) bool { return m.identity == belongs && m.supervisor.Failure() == nil })
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
	known := s.tokensLocked((*moduleState).known)
	for id, claims := range byID(known) {
		if used[id] == nil {
			belongs := s.homes.Of(id)
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

// rewrite makes known.Keep write the list of known keys. It never waits.
func (s *Store) rewrite() {
	select {
	case s.dirty <- struct{}{}:
	default:
	}
}

// tokensLocked returns tokens of all modules, in the order of modules.
func (s *Store) tokensLocked(of func(*moduleState) []*Token) (all []*Token) {
	for _, m := range s.modules {
		all = append(all, of(m)...)
	}
	return all
}

// byID groups the Tokens that claim to be the same token.
func byID(all []*Token) map[wire.TokenID][]*Token {
	claims := make(map[wire.TokenID][]*Token)
	for _, t := range all {
		claims[t.ID] = append(claims[t.ID], t)
	}
	return claims
}

// modulesNow returns the modules as they are now.
func (s *Store) modulesNow() []*moduleState {
	s.mu.Lock()
	defer s.mu.Unlock()
	return slices.Clone(s.modules)
}

// Rescan looks at every module again and returns when it has done so. It starts failed modules
// again at once. The log and Modules tell which modules fail. The error is that of ctx.
//
// Some modules (SoftHSM, TPMs) notice tokens of another program only after a new C_Initialize,
// which ends their logins. So Rescan finds such tokens only while no login to a token of the
// module lasts, for example after LogoutAll.
func (s *Store) Rescan(ctx context.Context) error {
	var wg sync.WaitGroup
	for _, m := range s.modulesNow() {
		wg.Go(func() { _ = m.supervisor.Rescan(ctx) })
	}
	wg.Wait()
	return ctx.Err()
}

// Poke tells the Store that a client lists the keys. In the background, the Store looks again at
// modules that do not report new tokens by themselves, unless it did so a moment ago. Poke never
// waits.
func (s *Store) Poke() {
	for _, m := range s.modulesNow() {
		m.supervisor.Poke()
	}
}

// A ModuleStatus is the state of a module.
type ModuleStatus struct {
	Name     string
	Path     string
	Running  bool
	Released bool // the module has no process because no request needs one now
	PID      int
	Err      error // the last failure; nil when the module works
	Restarts int
	Waits    bool   // the module reports changes itself; otherwise the agent polls its slots
	Library  string // the description that the module gives
	Sandbox  string // the limits of its process, and those that are not in force; empty: no process
	Tokens   []TokenStatus
	Away     []TokenStatus // known, with keys, and not present
	LeftOut  []string      // what the last look left out, and the bound that is the reason
	// Empty says why the module shows no token: see ModuleSpec.Empty.
	Empty string
}

// A TokenStatus is the state of a token.
type TokenStatus struct {
	ID       wire.TokenID
	URI      string // canonical
	Module   string // the module's name
	Tries    pin.Tries
	LoggedIn bool
	Shadowed string // the module that this token is used through instead
	Home     string // the home of the token, when the token is used through this module instead
	Keys     []*Key
	Flags    uint64
	Library  string    // of the module
	Slot     string    // description
	Reader   string    // Slot, when another token of the same name is present; empty otherwise
	Seen     time.Time // when the token was present last
	LeftOut  []string  // what the last look left out because of a bound, and why

	// The login, as far as the agent knows it without asking the token.
	LoggedInSince time.Time // zero: no login lasts
	LoginEnds     time.Time // by the Policy of the keys that were used; zero: the login does not end by itself
	PINKept       bool      // the PIN lies in locked memory, to log in again
	LoginUnderWay bool      // the agent gets a PIN, or the token tries it
	PromptOpen    bool      // a prompt is open

	// The signatures since the start.
	LastUse    time.Time // zero: there was none
	Signatures uint64
}

// Modules returns the state of every module, in order. It never waits.
func (s *Store) Modules() []ModuleStatus {
	var all []ModuleStatus
	for _, m := range s.modulesNow() {
		all = append(all, m.status())
	}
	return all
}

// StatusChanged returns a channel for one receiver. It has an element when the tokens, logins or
// failures that Modules returns may have changed since the receiver took the last element.
func (s *Store) StatusChanged() <-chan struct{} { return s.stirred }

// stir puts an element into StatusChanged. It never waits and takes no lock.
func (s *Store) stir() {
	select {
	case s.stirred <- struct{}{}:
	default:
	}
}

// LogoutAll logs out of every token whose module answers, and forgets the kept PINs. So the next
// signature asks for the PIN. A module that hangs does not delay another.
func (s *Store) LogoutAll(ctx context.Context) error {
	return s.logoutOf(ctx, func(*Token) bool { return true })
}

// LogoutOf is LogoutAll for the tokens that chosen selects by their keys.
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

// Logout is LogoutAll for the tokens that sel selects, by their own names or by a key. It fails
// with ErrNoMatch when sel selects no known token.
func (s *Store) Logout(ctx context.Context, sel *selection.Selector) error {
	var all []error
	found := false
	for _, m := range s.modulesNow() {
		for _, t := range m.known() {
			if t.selectedBy(sel) {
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
// a login lasts already, Login logs out first, so that the token tries the PIN. taken means that
// the token took this PIN: a token that needs no login tries none.
func (s *Store) Login(ctx context.Context, sel *selection.Selector, keys []*Key, given *secret.Secret) (taken bool, err error) {
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

// LoginTold logs in to the token of a key for a client that itself tells the person to type a
// PIN on the reader. It logs in as Login does, and as LoginAsk with an empty PIN.
func (s *Store) LoginTold(ctx context.Context, sel *selection.Selector, k *Key, given *secret.Secret) error {
	with := supplied{clientTells: true}
	if given.Len() > 0 {
		with.PIN, with.selector = given, sel
	}
	return k.logIn(ctx, with)
}

// LoginAsk logs in to the tokens of the keys, one after the other, and gets each PIN as a
// signature would. It skips tokens with a login, and tokens that need none.
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
