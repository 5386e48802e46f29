package main

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"slices"
	"strings"
	"sync/atomic"

	"p11-agent/agent"
	"p11-agent/agent/peer"
	"p11-agent/pinentry"
	"p11-agent/pinentry/secret"
	"p11-agent/token"
	"p11-agent/token/registry"
	"p11-agent/token/wire"
)

// moduleCommand is the hidden subcommand that becomes a module process.
const moduleCommand = "module-process"

// modules returns the modules to run: those of the configuration first, then
// those of p11-kit's registry in its order.
func modules(c *config, log *slog.Logger) (specs []token.ModuleSpec, bridges []*registry.Bridge, skipped, broken []registry.Module) {
	reg := registry.Load(registry.Options{
		Dirs: registry.DefaultDirs(os.LookupEnv, os.Geteuid()), Program: registry.Program, Log: log,
	})
	for _, w := range reg.Warnings {
		log.Warn("module configuration", "problem", w.String())
	}
	if reg.NoUser != "" {
		// Where it is a mistake there was a warning.
		log.Debug("the user's own module configuration is not used", "reason", reg.NoUser)
	}
	settings := make(map[string]moduleConfig)
	for _, m := range c.Modules {
		settings[m.name()] = m
		if m.Path != "" && (m.Enabled == nil || *m.Enabled) {
			spec := token.ModuleSpec{Name: m.name(), Path: m.Path, Env: m.environ(), Timeout: m.Timeout.Duration}
			m.Release.apply(&spec)
			m.confine(&spec)
			specs = append(specs, spec)
		}
	}
	for _, m := range reg.Modules {
		set, named := settings[m.Name]
		delete(settings, m.Name)
		switch {
		case named && set.Path != "":
			continue // the configuration's own module of this name
		case named && set.Enabled != nil && !*set.Enabled:
			m.Skip = "it is switched off in " + c.file
		}
		if m.Skip != "" {
			log.Debug("module is not started", "module", m.Name, "reason", m.Skip)
			skipped = append(skipped, m)
			continue
		}
		spec := token.ModuleSpec{
			Name: m.Name, Path: m.Path, InitArgs: m.InitArgs, Env: set.environ(), Timeout: set.Timeout.Duration,
		}
		set.Release.apply(&spec)
		set.confine(&spec)
		// p11-kit's remoting serves one call after the other.
		spec.Poll = m.Remote.Address != "" || len(m.Remote.Command) > 0
		switch {
		case m.Remote.Address != "":
			spec.Env = append(spec.Env, "P11_KIT_SERVER_ADDRESS="+m.Remote.Address)
		case len(m.Remote.Command) > 0:
			b, err := registry.NewBridge(registry.BridgeOptions{
				Command: m.Remote.Command,
				Env:     registry.Environment(os.Environ(), set.environ()),
				Log:     log.With("module", m.Name),
			})
			if err != nil {
				// As with every module, the others are none the worse for it. It
				// is not started: without an address it would connect to whatever
				// server this user has.
				log.Warn("remote module cannot be used", "module", m.Name, "reason", err)
				m.Skip = err.Error()
				broken = append(broken, m)
				continue
			}
			bridges = append(bridges, b)
			spec.Env = append(spec.Env, "P11_KIT_SERVER_ADDRESS="+b.Address())
		}
		specs = append(specs, spec)
	}
	for name, set := range settings {
		if set.Path == "" {
			log.Warn("the configuration changes a module that is not registered", "module", name)
		}
	}
	return specs, bridges, skipped, broken
}

// backend is what stands behind the keyring: the tokens and what they need.
type backend struct {
	store   *token.Store
	skipped []registry.Module // on purpose
	broken  []registry.Module // could not be started
	stop    func()
}

// openBackend starts the modules. It is ended by stop. What goes wrong with one
// module costs that module only. more changes the options of the Store.
func openBackend(c *config, asker token.PINAsker, working func(context.Context, *token.Key) func(), state string, known token.KnownKeys, log *slog.Logger, more ...func(*token.Options)) *backend {
	specs, bridges, skipped, broken := modules(c, log)
	ctx, cancel := context.WithCancel(context.Background())
	served := make(chan struct{}, len(bridges))
	for _, b := range bridges {
		go func() {
			if err := b.Serve(ctx); err != nil {
				log.Error("remote module", "reason", err)
			}
			served <- struct{}{}
		}()
	}
	opts := token.Options{
		Modules:    specs,
		Command:    []string{"/proc/self/exe", moduleCommand},
		PINs:       asker,
		Sources:    c.sources(),
		PublicKeys: c.publicKeys,
		Policy:     c.policy(),
		Working:    working,
		StateDir:   state,
		Known:      c.knownKeys(known),
		Log:        log,
	}
	for _, change := range more {
		change(&opts)
	}
	store := token.Open(opts)
	return &backend{store: store, skipped: skipped, broken: broken, stop: func() {
		_ = store.Close() // never fails
		cancel()
		for range bridges {
			<-served
		}
	}}
}

// tokens shows a token.Store to the keyring, which knows nothing of PKCS#11.
type tokens struct {
	store *token.Store
	allow token.AllowList
	seen  atomic.Pointer[keyList]
}

// keyList is the keys of one generation.
type keyList struct {
	generation uint64
	keys, away []agent.Key
}

var _ agent.Tokens = (*tokens)(nil)

func (t *tokens) list() *keyList {
	generation := t.store.Generation()
	if l := t.seen.Load(); l != nil && l.generation == generation {
		return l
	}
	l := &keyList{generation: generation, keys: agentKeys(t.store.Keys()), away: agentKeys(t.store.Away())}
	t.seen.Store(l)
	return l
}

func agentKeys(keys []*token.Key) []agent.Key {
	all := make([]agent.Key, len(keys))
	for i, k := range keys {
		all[i] = k
	}
	return all
}

func (t *tokens) Keys() []agent.Key                   { return t.list().keys }
func (t *tokens) Away() []agent.Key                   { return t.list().away }
func (t *tokens) Generation() uint64                  { return t.store.Generation() }
func (t *tokens) Changed() <-chan struct{}            { return t.store.Changed() }
func (t *tokens) Settled() <-chan struct{}            { return t.store.Settled() }
func (t *tokens) Poke()                               { t.store.Poke() }
func (t *tokens) Rescan(ctx context.Context) error    { return t.store.Rescan(ctx) }
func (t *tokens) LogoutAll(ctx context.Context) error { return t.store.LogoutAll(ctx) }

// selection is a token.Selector as the keyring sees it.
type selection struct{ *token.Selector }

func (s selection) Match(k agent.Key) bool {
	key, ok := k.(*token.Key)
	return ok && s.Selector.Match(key)
}

func (t *tokens) Parse(provider []byte) (agent.Selection, error) {
	s, err := token.ParseProvider(provider, t.allow)
	if err != nil {
		return nil, err
	}
	return selection{s}, nil
}

func (t *tokens) Select(ctx context.Context, s agent.Selection, pin *secret.Secret) ([]agent.Key, error) {
	sel := s.(selection) //nolint:forcetypeassert // Parse makes no other
	keys, err := t.store.Select(ctx, sel.Selector)
	if err != nil {
		return nil, err
	}
	if u := sel.URI(); u != nil {
		if err := t.store.AddSource(u); err != nil {
			return nil, err
		}
	}
	if err := t.store.Login(ctx, keys, pin); err != nil {
		return nil, err
	}
	return agentKeys(keys), nil
}

// typed is in the context of a login whose person has said all that there is to
// say, and looks at the terminal where they did.
type typed struct{ lastTry bool }

type typedKey struct{}

var errOnlyURI = errors.New("a token is named by its URI here")

func (t *tokens) Login(ctx context.Context, s agent.Selection, pin *secret.Secret, lastTry bool) (answer agent.LoginAnswer, err error) {
	sel, ok := s.(selection)
	if !ok || sel.URI() == nil {
		return answer, errOnlyURI
	}
	// Those that are used, of tokens that are seen through several modules.
	keys := slices.DeleteFunc(slices.Clone(t.store.Keys()), func(k *token.Key) bool { return !sel.Selector.Match(k) })
	if len(keys) == 0 {
		if keys, err = t.store.Select(ctx, sel.Selector); err != nil {
			return answer, err
		}
	}
	for _, k := range keys[1:] {
		if k.Token() != keys[0].Token() {
			return answer, fmt.Errorf("a PIN is for one token, and %s and %s are meant: name one of them by its URI", keys[0].TokenName(), k.TokenName())
		}
	}
	st, _ := t.status(keys[0])
	if st.LoggedIn || st.Flags&wire.CKFLoginRequired == 0 {
		answer.Already, answer.Tries = true, pinState(st.Tries)
		return answer, nil
	}
	ctx = context.WithValue(ctx, typedKey{}, typed{lastTry})
	switch {
	case pin.Len() == 0:
		err = t.store.LoginAsk(ctx, keys[:1])
	case lastTry:
		err = t.store.LoginLastTry(ctx, keys[:1], pin)
	default:
		err = t.store.Login(ctx, keys[:1], pin)
	}
	st, _ = t.status(keys[0])
	answer.Tries = pinState(st.Tries)
	if e, ok := errors.AsType[*token.PINError](err); ok {
		answer.Tries = pinState(e.Tries)
		answer.LastTry = e.Tries == token.TriesLast && !e.Tried && !lastTry
	}
	return answer, err
}

// status returns that of the token of a key.
func (t *tokens) status(k *token.Key) (token.TokenStatus, bool) {
	for _, m := range t.store.Modules() {
		for _, st := range slices.Concat(m.Tokens, m.Away) {
			if m.Name == k.Module() && st.ID == k.Token() {
				return st, true
			}
		}
	}
	return token.TokenStatus{}, false
}

func (t *tokens) Logout(ctx context.Context, s agent.Selection) error {
	sel, ok := s.(selection)
	if !ok || sel.URI() == nil {
		return errOnlyURI
	}
	return t.store.Logout(ctx, sel.Selector)
}

func (t *tokens) Drop(s agent.Selection) {
	if sel, ok := s.(selection); ok && sel.URI() != nil {
		t.store.RemoveSource(sel.URI())
	}
}

// automatic returns what the configuration offers without being asked: nil for
// every key.
func automatic(c *config) []agent.Selection { return selections(c.Keys) }

// selections returns what a list of URIs selects; nil stays nil.
func selections(list *[]uriValue) []agent.Selection {
	if list == nil {
		return nil
	}
	all := []agent.Selection{}
	for _, u := range *list {
		all = append(all, selection{token.NewSelector(u.URI)})
	}
	return all
}

// names returns the function that tells the configured name of a key.
func names(c *config) func(agent.Key) string {
	return func(k agent.Key) string {
		key, ok := k.(*token.Key)
		if !ok {
			return ""
		}
		for _, table := range c.KeyTables {
			if table.Name != "" && key.Matches(table.URI.URI) {
				return table.Name
			}
		}
		return ""
	}
}

// asker asks persons with pinentry.
type asker struct {
	pinentry *pinentry.Pinentry
	place    pinentry.Place
}

var (
	_ token.PINAsker = (*asker)(nil)

	_ token.PINDialogue = typed{}
	_ agent.Confirmer   = (*asker)(nil)
	_ agent.Inserter    = (*asker)(nil)
)

// newAsker makes the asker of an agent with this environment. tty is the
// terminal it was started from, used where GPG_TTY names none.
func newAsker(c *config, getenv func(string) string, tty string, log *slog.Logger) *asker {
	return &asker{
		pinentry: &pinentry.Pinentry{
			Program: c.Pinentry.Program,
			Askpass: getenv("SSH_ASKPASS"),
			Path:    getenv("PATH"),
			Home:    getenv("HOME"),
			NoGrab:  c.Pinentry.Grab != nil && !*c.Pinentry.Grab,
			Log:     log,
		},
		place: pinentry.Place{
			Display:        getenv("DISPLAY"),
			WaylandDisplay: getenv("WAYLAND_DISPLAY"),
			XAuthority:     getenv("XAUTHORITY"),
			DBusAddress:    getenv("DBUS_SESSION_BUS_ADDRESS"),
			RuntimeDir:     getenv("XDG_RUNTIME_DIR"),
			TTYName:        cmp.Or(getenv("GPG_TTY"), tty),
			TTYType:        getenv("TERM"),
			Locale:         cmp.Or(getenv("LC_ALL"), getenv("LC_MESSAGES"), getenv("LANG")),
			UserData:       getenv("PINENTRY_USER_DATA"),
		},
	}
}

// Ask opens a dialogue about one token.
func (a *asker) Ask(ctx context.Context, about token.PINRequest) (token.PINDialogue, error) {
	if said, ok := ctx.Value(typedKey{}).(typed); ok {
		return said, nil
	}
	d, err := a.pinentry.Open(ctx, a.place)
	if err != nil {
		return nil, err
	}
	return &dialogue{d: d, about: about, client: peer.FromContext(ctx)}, nil
}

// Confirm asks whether a key may be used.
func (a *asker) Confirm(ctx context.Context, comment, fingerprint string) (bool, error) {
	d, err := a.pinentry.Open(ctx, a.place)
	if err != nil {
		return false, err
	}
	defer d.Close() //nolint:errcheck // never fails
	return d.Confirm(ctx, pinentry.Prompt{
		Title:       "p11-agent",
		Description: fmt.Sprintf("Allow the use of this key?\n\n%s\n%s\n%s", comment, fingerprint, requester(peer.FromContext(ctx))),
		OK:          "_Allow",
		Cancel:      "_Deny",
	})
}

// Insert asks to insert a token.
func (a *asker) Insert(ctx context.Context, w agent.Wanted) (bool, error) {
	d, err := a.pinentry.Open(ctx, a.place)
	if err != nil {
		return false, err
	}
	defer d.Close() //nolint:errcheck // never fails
	return d.Confirm(ctx, pinentry.Prompt{
		Title: "p11-agent",
		Description: fmt.Sprintf("Please insert the token %s.\n\nKey: %s\n%s\n%s",
			strings.Join(w.Tokens, " or "), w.Comment, w.Fingerprint, requester(peer.FromContext(ctx))),
		OK:     "_It is in",
		Cancel: "_Cancel",
	})
}

// PIN has none but what came with the request.
func (typed) PIN(context.Context, string) (*secret.Secret, error) { return nil, token.ErrCancelled }

// LastTry tells what the person has said in advance.
func (t typed) LastTry(context.Context, string) (bool, error) { return t.lastTry, nil }

// Notice is shown by the command that asks for the login.
func (typed) Notice(ctx context.Context) error {
	<-ctx.Done()
	return nil
}

func (typed) Close() error { return nil }

func requester(p peer.Peer) string { return "Asked by (says it is): " + p.String() }

// dialogue is one conversation about the PIN of a token.
type dialogue struct {
	d      *pinentry.Dialogue
	about  token.PINRequest
	client peer.Peer
}

func tokenLine(t wire.TokenID) string {
	return fmt.Sprintf("Token: %s (serial %s)", cmp.Or(t.Label, "without label"), cmp.Or(t.Serial, "unknown"))
}

func (d *dialogue) description() string {
	lines := []string{tokenLine(d.about.Token)}
	key := "Key: " + d.about.Key
	if d.about.Label != "" {
		key = fmt.Sprintf("Key: %s, %s", d.about.Label, d.about.Key)
	}
	lines = append(lines, key)
	if d.about.EachUse {
		lines = append(lines, "This key asks for the PIN each time it is used.")
	}
	if d.about.Tries != token.TriesUnknown {
		lines = append(lines, "Note: "+d.about.Tries.String()+".")
	}
	return strings.Join(append(lines, requester(d.client)), "\n")
}

func (d *dialogue) PIN(ctx context.Context, problem string) (*secret.Secret, error) {
	pin, err := d.d.PIN(ctx, pinentry.Prompt{
		Title:       "p11-agent",
		Description: "Please enter the PIN to use a key on a token.\n" + d.description(),
		Label:       "PIN:",
		Error:       problem,
	})
	if errors.Is(err, pinentry.ErrCancelled) || errors.Is(err, pinentry.ErrEmpty) {
		err = token.ErrCancelled
	}
	return pin, err
}

func (d *dialogue) LastTry(ctx context.Context, problem string) (bool, error) {
	if problem != "" {
		problem += "\n"
	}
	return d.d.Confirm(ctx, pinentry.Prompt{
		Title:       "p11-agent",
		Description: problem + "One try is left: a wrong PIN now locks the token.\n" + d.description() + "\n\nTry all the same?",
		OK:          "_Try the PIN",
		Cancel:      "_Stop",
	})
}

func (d *dialogue) Notice(ctx context.Context) error {
	err := d.d.Message(ctx, pinentry.Prompt{
		Title:       "p11-agent",
		Description: "Please enter the PIN on the card reader.\n" + d.description(),
	})
	if errors.Is(err, pinentry.ErrCancelled) {
		err = token.ErrCancelled
	}
	return err
}

func (d *dialogue) Close() error { return d.d.Close() }
