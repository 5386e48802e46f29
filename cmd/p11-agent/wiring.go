package main

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync/atomic"
	"time"

	"p11-agent/agent"
	"p11-agent/agent/request"
	"p11-agent/cmd/p11-agent/config"
	"p11-agent/cmd/p11-agent/output"
	"p11-agent/cmd/p11-agent/status"
	"p11-agent/pinentry"
	"p11-agent/pinentry/plain"
	"p11-agent/pinentry/secret"
	"p11-agent/pinentry/waiting"
	"p11-agent/token"
	"p11-agent/token/registry"
	"p11-agent/token/wire"
)

// moduleCommand is the hidden subcommand that becomes a module process.
const moduleCommand = "module-process"

// modules returns the modules to run: those of the configuration first, then
// those of p11-kit's registry in its order.
func modules(c *config.File, log *slog.Logger) (specs []token.ModuleSpec, bridges []*registry.Bridge, skipped, broken []registry.Module) {
	reg := registry.Load(registry.Options{
		Dirs: registry.DefaultDirs(os.LookupEnv, os.Geteuid()), Program: registry.Program, Log: log,
		ServerAddresses: c.ServerAddresses(),
	})
	for _, w := range reg.Warnings {
		log.Warn("module configuration", "problem", w.String())
	}
	if reg.NoUser != "" {
		// Where it is a mistake there was a warning.
		log.Debug("the user's own module configuration is not used", "reason", reg.NoUser)
	}
	settings := make(map[string]config.ModuleTable)
	for _, m := range c.Modules {
		settings[m.ModuleName()] = m
		if m.Path != "" && (m.Enabled == nil || *m.Enabled) {
			spec := token.ModuleSpec{Name: m.ModuleName(), Path: m.Path}
			m.Configure(&spec)
			if address := cmp.Or(m.Env[registry.ServerVariable], os.Getenv(registry.ServerVariable)); strings.HasPrefix(filepath.Base(m.Path), "p11-kit-client") {
				spec.Cause = func(ctx context.Context) string { return registry.ServerCause(ctx, address) }
				spec.Empty = spec.Cause
			}
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
			m.Skip = "it is switched off in " + c.Path()
		}
		if m.Skip != "" {
			log.Debug("module is not started", "module", m.Name, "reason", m.Skip)
			skipped = append(skipped, m)
			continue
		}
		spec := token.ModuleSpec{Name: m.Name, Path: m.Path, InitArgs: m.InitArgs}
		set.Configure(&spec)
		// p11-kit's remoting serves one call after the other.
		spec.Poll = m.Remote.Address != "" || len(m.Remote.Command) > 0
		switch {
		case m.Remote.Address != "":
			address := m.Remote.Address
			spec.Env = append(spec.Env, registry.ServerVariable+"="+address)
			spec.Cause = func(ctx context.Context) string { return registry.ServerCause(ctx, address) }
			spec.Empty = spec.Cause // p11-kit-client.so says that it works, and shows nothing
		case len(m.Remote.Command) > 0:
			b, err := registry.NewBridge(registry.BridgeOptions{
				Command: m.Remote.Command,
				Env:     registry.Environment(os.Environ(), set.Environ()),
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
			spec.Env = append(spec.Env, registry.ServerVariable+"="+b.Address())
			spec.Cause = b.Cause
		}
		specs = append(specs, spec)
	}
	for _, m := range c.UnknownModules(reg) {
		log.Warn("the configuration changes a module that is not registered", "module", m.Name, "hint", m.Hint)
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
func openBackend(c *config.File, asker token.PINAsker, working func(context.Context, *token.Key) func(), state string, known token.KnownKeys, log *slog.Logger, more ...func(*token.Options)) *backend {
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
		Sources:    c.PINSources(),
		Homes:      c.URIs(),
		PublicKeys: c.PublicKeys(),
		Policy:     c.Policy(),
		Working:    working,
		StateDir:   state,
		Known:      c.KnownKeys(known),
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
	keys, away []request.Key
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

func agentKeys(keys []*token.Key) []request.Key {
	all := make([]request.Key, len(keys))
	for i, k := range keys {
		all[i] = k
	}
	return all
}

func (t *tokens) Keys() []request.Key                 { return t.list().keys }
func (t *tokens) Away() []request.Key                 { return t.list().away }
func (t *tokens) Generation() uint64                  { return t.store.Generation() }
func (t *tokens) Changed() <-chan struct{}            { return t.store.Changed() }
func (t *tokens) Settled() <-chan struct{}            { return t.store.Settled() }
func (t *tokens) Poke()                               { t.store.Poke() }
func (t *tokens) Rescan(ctx context.Context) error    { return t.store.Rescan(ctx) }
func (t *tokens) LogoutAll(ctx context.Context) error { return t.store.LogoutAll(ctx) }

func (t *tokens) LogoutOf(ctx context.Context, chosen func([]request.Key) bool) error {
	return t.store.LogoutOf(ctx, func(keys []*token.Key) bool { return chosen(agentKeys(keys)) })
}

func (t *tokens) Parse(provider []byte, remote bool) (request.Selection, error) {
	parse := func() (*token.Selector, error) { return token.ParseProvider(provider, t.allow) }
	if remote {
		parse = func() (*token.Selector, error) { return token.ParseRemoteProvider(provider) }
	}
	s, err := parse()
	if err != nil {
		return nil, err
	}
	return config.KeySelection{Selector: s}, nil
}

func (t *tokens) Select(ctx context.Context, s request.Selection, reached func(request.Key) bool, pin *secret.Secret) (all []request.Key, taken bool, err error) {
	sel := s.(config.KeySelection) //nolint:forcetypeassert // Parse makes no other
	keys, err := t.store.SelectOf(ctx, sel.Selector, func(k *token.Key) bool { return reached(k) })
	if err != nil {
		return nil, false, err
	}
	if u := sel.URI(); u != nil {
		if err := t.store.AddSource(u, keys); err != nil {
			return nil, false, err
		}
	}
	if taken, err = t.store.Login(ctx, sel.Selector, keys, pin); err != nil {
		return nil, false, err
	}
	if slices.ContainsFunc(keys, (*token.Key).Hidden) {
		// The login may have shown that some of them are not meant.
		if keys, err = t.store.SelectOf(ctx, sel.Selector, func(k *token.Key) bool { return reached(k) }); err != nil {
			return nil, false, err
		}
	}
	return agentKeys(keys), taken, nil
}

// tellsItself is in the context of a login whose client tells the person by itself to
// type the PIN on the reader.
type tellsItself struct{}

var errOnlyURI = errors.New("a token is named by its URI here")

func (t *tokens) Login(ctx context.Context, s request.Selection, pin *secret.Secret) (answer request.LoginAnswer, err error) {
	sel, ok := s.(config.KeySelection)
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
		answer.Already, answer.Tries = true, string(status.PINOf(st.Tries))
		return answer, nil
	}
	// A PIN that comes along is for a module that the person was not told of.
	if err := token.CheckHome(sel.Selector, keys[0]); err != nil {
		return answer, err
	}
	ctx = context.WithValue(ctx, tellsItself{}, true)
	if pin.Len() == 0 {
		err = t.store.LoginAsk(ctx, keys[:1])
	} else {
		_, err = t.store.Login(ctx, sel.Selector, keys[:1], pin)
	}
	st, _ = t.status(keys[0])
	answer.Tries = string(status.PINOf(st.Tries))
	if e, ok := errors.AsType[*token.PINError](err); ok {
		answer.Tries = string(status.PINOf(e.Tries))
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

func (t *tokens) Logout(ctx context.Context, s request.Selection) error {
	sel, ok := s.(config.KeySelection)
	if !ok || sel.URI() == nil {
		return errOnlyURI
	}
	return t.store.Logout(ctx, sel.Selector)
}

func (t *tokens) Drop(s request.Selection) {
	if sel, ok := s.(config.KeySelection); ok && sel.URI() != nil {
		t.store.RemoveSource(sel.URI())
	}
}

// listedAs returns the comment that ssh-add -l shows for a key without a configured name:
// its URI, which has no blanks, and the label after it.
func listedAs(k request.Key) string {
	key, ok := k.(*token.Key)
	if !ok || key.PublicLabel() == "" {
		return k.URI()
	}
	return key.URI() + " " + listedLabel(key.PublicLabel())
}

// listedLabel shows the label of a key in the comment of an identity. A label that could
// pass for another URI is quoted.
func listedLabel(label string) string {
	shown := plain.Name(label, maxNamed)
	if strings.Contains(strings.ToLower(shown), "pkcs11:") && shown[0] != '"' {
		return strconv.Quote(shown)
	}
	return shown
}

var (
	_ token.PINAsker = (*asker)(nil)

	_ token.PINDialogue = (*dialogue)(nil)
	_ agent.Confirmer   = (*asker)(nil)
	_ agent.Inserter    = (*asker)(nil)
)

// Ask opens a dialogue about one token.
func (a *asker) Ask(ctx context.Context, about token.PINRequest) (token.PINDialogue, error) {
	of := "the token " + cmp.Or(plain.Name(about.Token.Label, maxNamed), "without label")
	d := &dialogue{
		pins:    &conversation{asker: a, what: "the PIN of " + of, hint: "To give the PIN in a terminal, run: p11-agent login " + output.ShellWord(about.Key)},
		consent: &conversation{asker: a, what: "the last try of " + of, consent: true, hint: a.consentHint()},
		about:   about,
		quiet:   ctx.Value(tellsItself{}) != nil,
	}
	a.note(d, true)
	first := d.pins
	if about.Tries == token.TriesLast {
		first = d.consent
	}
	var err error
	if first == d.pins && about.Pad && d.quiet {
		// The reader asks, but not for a client in a pause.
		err = waiting.Ask(ctx, waiting.Question{Ask: func(context.Context) error { return nil }})
	} else {
		// Without a place there is nothing to begin with.
		err = first.ask(ctx, func(context.Context, *pinentry.Dialogue) error { return nil })
	}
	if err != nil {
		_ = d.Close() // never fails
		return nil, err
	}
	return d, nil
}

// note keeps the list of the dialogues that are open.
func (a *asker) note(d *dialogue, open bool) {
	a.mu.Lock()
	defer a.mu.Unlock()
	if open {
		a.open[d] = struct{}{}
	} else {
		delete(a.open, d)
	}
}

// promptAt tells where a person is being asked about a token; empty: nowhere. It may be
// called from any goroutine.
func (a *asker) promptAt(t wire.TokenID) string {
	a.mu.Lock()
	defer a.mu.Unlock()
	for d := range a.open {
		for _, c := range []*conversation{d.pins, d.consent} {
			if at := c.shown.Load(); at != nil && d.about.Token == t {
				return at.name
			}
		}
	}
	return ""
}

// consentHint says what to do where there is no place for consent.
func (a *asker) consentHint() string {
	hint := "To be asked, give the service manager a display (systemctl --user import-environment DISPLAY WAYLAND_DISPLAY)"
	if !a.displayOnly.Load() {
		hint += ", or run the client in the foreground of a login shell or of tmux"
	}
	return hint
}

// Confirm asks whether a key may be used, and for how long when that is a question.
func (a *asker) Confirm(ctx context.Context, r agent.Question) (agent.Answer, error) {
	c := &conversation{asker: a, what: "the use of a key", consent: true, hint: a.consentHint()}
	defer c.close()
	var answer agent.Answer
	err := c.ask(ctx, func(ctx context.Context, d *pinentry.Dialogue) (err error) {
		if use := request.UseFrom(ctx); use != nil {
			r.Use = use // of the one who is asked
		}
		answer, err = confirm(ctx, d, r, a.patience.get())
		return err
	})
	if err != nil {
		return agent.Answer{}, err
	}
	return answer, nil
}

// confirm asks on one dialogue.
func confirm(ctx context.Context, d *pinentry.Dialogue, r agent.Question, patience time.Duration) (agent.Answer, error) {
	text := confirmText(r)
	prompt := pinentry.Prompt{
		Title: "p11-agent", Description: "Allow " + useOf(r.Key) + "?\n" + text,
		OK: allow(r.Plain), Cancel: "_Deny", Timeout: patience,
	}
	if agent.Again(ctx) || !r.Offer {
		// To be left alone matters more than other lengths do.
		yes, err := confirmOrBlock(ctx, d, prompt)
		return agent.Answer{Allowed: yes, For: r.Plain}, err
	}
	prompt.Other = "Allow _longer..."
	if r.Plain != agent.Once {
		prompt.Other = "Allow _otherwise..."
	}
	lengths := [2]agent.Remember{agent.Once, agent.UntilLock}
	switch r.Plain {
	case agent.Once:
		lengths[0] = rememberShort
	case agent.UntilLock:
		lengths[1] = rememberShort
	}
	choice, err := d.Choose(ctx, prompt)
	if err == nil && choice == pinentry.ChoiceOther {
		// Who closes this one has not said yes: once is to be had before.
		prompt.Description = "Allow " + useOf(r.Key) + " for how long?\n" + text
		prompt.OK, prompt.Other = allow(lengths[0]), allow(lengths[1])
		choice, err = d.Choose(ctx, prompt)
		r.Plain = lengths[0]
		if choice == pinentry.ChoiceOther {
			r.Plain = lengths[1]
		}
	}
	if err != nil || choice == pinentry.ChoiceCancel {
		return agent.Answer{}, err
	}
	return agent.Answer{Allowed: true, For: r.Plain}, nil
}

// confirmOrBlock asks for yes or no. A client that had to wait before may also be refused
// with "no to everything from here", which is agent.ErrNoToAll.
func confirmOrBlock(ctx context.Context, d *pinentry.Dialogue, prompt pinentry.Prompt) (bool, error) {
	if !agent.Again(ctx) {
		return d.Confirm(ctx, prompt)
	}
	prompt.Other = "Deny _all from here"
	choice, err := d.Choose(ctx, prompt)
	if choice == pinentry.ChoiceOther {
		err = agent.ErrNoToAll
	}
	return choice == pinentry.ChoiceOK, err
}

// rememberShort is the length of time that is offered to everybody.
const rememberShort = agent.Remember(15 * time.Minute)

// allow is the text of a button.
func allow(lasts agent.Remember) string {
	switch lasts {
	case agent.Once:
		return "Allow _once"
	case agent.UntilLock:
		return "Allow _until lock"
	}
	return "Allow _" + lasts.String()
}

// confirmText says what is asked about.
func confirmText(r agent.Question) string {
	lines := []string{labelledLine(r.Key, r.Comment), r.KeyFingerprint}
	if r.Plain != agent.Once {
		lines = append(lines, "Yes counts "+r.Plain.String()+".")
	}
	return about(useLines(r.Use), lines, []string{"Asked because of " + r.Why + ".", requester(r.Caller.Who())})
}

// Insert asks to insert a token. A yes allows nothing: the agent looks at the tokens. So
// the client's own places will do.
func (a *asker) Insert(ctx context.Context, w agent.Wanted) (yes bool, err error) {
	c := &conversation{asker: a, what: "a token that is not inserted", hint: "Insert the token and try again"}
	defer c.close()
	err = c.ask(ctx, func(ctx context.Context, d *pinentry.Dialogue) (err error) {
		yes, err = confirmOrBlock(ctx, d, pinentry.Prompt{
			Title: "p11-agent",
			Description: fmt.Sprintf("Please insert the token %s.\n", strings.Join(w.Tokens, " or ")) +
				about(useLines(request.UseFrom(ctx)), []string{commentLine(w.Comment), w.Fingerprint, requester(request.PeerFrom(ctx))}),
			OK:     "_It is in",
			Cancel: "_Cancel",
		})
		return err
	})
	return yes && err == nil, err
}

// dialogue asks about the PIN of a token: for the PIN where the person is, and for
// consent where the client has no say.
type dialogue struct {
	pins, consent *conversation
	about         token.PINRequest
	quiet         bool // the client tells by itself what to do at the reader
}

// description is for the one who is asked, below the first line.
func (d *dialogue) description(ctx context.Context) string {
	use, t := request.UseFrom(ctx), d.about.Token
	lines := []string{keyLine(t, d.about.Label, d.about.Key, d.about.ID, use), tokenLine(t, d.about.Reader)}
	lines = append(lines, moduleLines(d.about)...)
	if d.about.EachUse {
		lines = append(lines, "This key asks for the PIN each time it is used.")
	}
	if d.about.Tries == token.TriesLow {
		lines = append(lines, fewerTries)
	}
	return about(useLines(use), lines, []string{requester(request.PeerFrom(ctx))})
}

func (d *dialogue) PIN(ctx context.Context, problem string) (pin *secret.Secret, err error) {
	err = d.pins.ask(ctx, func(ctx context.Context, on *pinentry.Dialogue) (err error) {
		pin, err = on.PIN(ctx, pinentry.Prompt{
			Title:       "p11-agent",
			Description: "Enter " + pinOf(d.about.Token) + "\n" + d.description(ctx),
			Label:       "PIN:",
			Error:       problem,
		})
		return err
	})
	if errors.Is(err, pinentry.ErrCancelled) || errors.Is(err, pinentry.ErrEmpty) {
		err = token.ErrCancelled
	}
	return pin, err
}

func (d *dialogue) LastTry(ctx context.Context, problem string) (yes bool, err error) {
	if problem != "" {
		problem += "\n"
	}
	given := ""
	if d.about.Supplied {
		given = "The program that asks has given the PIN.\n"
	}
	err = d.consent.ask(ctx, func(ctx context.Context, on *pinentry.Dialogue) (err error) {
		yes, err = on.Confirm(ctx, pinentry.Prompt{
			Title: "p11-agent",
			Description: "Use the last try for " + pinOf(d.about.Token) + "?\n" + problem +
				"One try is left: a wrong PIN now locks the token.\n" + given + d.description(ctx),
			OK:     "_Try the PIN",
			Cancel: "_Stop",
		})
		return err
	})
	return yes && err == nil, err
}

func (d *dialogue) Notice(ctx context.Context) error {
	if d.quiet {
		return waiting.Ask(ctx, waiting.Question{Ask: func(ctx context.Context) error {
			<-ctx.Done()
			return ctx.Err()
		}})
	}
	// It does not move: what is typed on the reader would be lost.
	err := d.pins.askFor(ctx, 0, func(ctx context.Context, on *pinentry.Dialogue) error {
		return on.Message(ctx, pinentry.Prompt{
			Title:       "p11-agent",
			Description: "Enter " + pinOf(d.about.Token) + " on the card reader\n" + d.description(ctx),
		})
	})
	if errors.Is(err, pinentry.ErrCancelled) {
		err = token.ErrCancelled
	}
	return err
}

func (d *dialogue) Close() error {
	d.pins.note(d, false)
	d.pins.close()
	d.consent.close()
	return nil
}
