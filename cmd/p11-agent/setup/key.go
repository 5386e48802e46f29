package setup

import (
	"bytes"
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"p11-agent/cmd/p11-agent/advice"
	"p11-agent/cmd/p11-agent/backend"
	"p11-agent/cmd/p11-agent/config"
	"p11-agent/cmd/p11-agent/control"
	"p11-agent/cmd/p11-agent/doctor"
	"p11-agent/cmd/p11-agent/export"
	"p11-agent/cmd/p11-agent/files"
	"p11-agent/cmd/p11-agent/newkey"
	"p11-agent/cmd/p11-agent/output"
	"p11-agent/cmd/p11-agent/prompt"
	"p11-agent/pinentry/plain"
	"p11-agent/pinentry/secret"
	"p11-agent/token"
	"p11-agent/token/keygen"
	"p11-agent/token/pin"
	"p11-agent/token/pkcs11uri"
	"p11-agent/token/registry"
	"p11-agent/token/wellknown"
	"p11-agent/token/wire"
)

const (
	// newKind is the kind of a new key. Each token and each server supports it.
	newKind = keygen.ECDSAP256
	// newLabel is the label of a new key and of a new token.
	newLabel = "login"
	// The package of SoftHSM in Debian and in Fedora.
	softHSMPackage, softHSMFedora = "softhsm2", "softhsm"
)

// A choice is one way to a key.
type choice struct {
	text   string
	key    *export.Key        // it is there
	on     *token.TokenStatus // a new key on this token
	module string             // a new key on a new token of this module; empty: SoftHSM's, which is not there yet
	first  string             // a command for root that has to be run before
	files  []string           // that have to be written before; see ownTokens
}

// chooseKey looks for keys and tokens, and chooses the key. It changes only what a new token of SoftHSM needs first.
func (s *conversation) chooseKey(ctx context.Context) error {
	const title = "A key"
	for {
		s.look(ctx)
		keys := s.keysNow()
		if e, ok := marked(keys); ok || len(keys) == 1 {
			if !ok {
				e = keys[0]
			}
			s.use(e)
			_, err := s.offer(ctx, title, describeKey(e))
			return err
		}
		s.say("\n%s", title)
		s.troubles()
		choices := keyChoices(keys)
		if len(keys) == 0 {
			s.say("  No key is there yet.")
			choices = s.newKeyChoices()
		}
		var texts []string
		for _, c := range choices {
			texts = append(texts, c.text)
		}
		if s.ask == nil {
			if len(keys) == 0 {
				texts = append(texts, advice.FirstSteps(s.b.Store.Modules())[0])
			}
			s.toDo(title, "one of these:")
			for _, text := range texts {
				s.say("         - %s", text)
			}
			return nil
		}
		if len(keys) == 0 {
			texts = append(texts, "look again: "+advice.FirstSteps(s.b.Store.Modules())[0]+" before you choose this")
		}
		n, err := s.ask.choose(ctx, "  Which one?", texts)
		switch {
		case err != nil:
			return err
		case n < 0:
			return errors.New("no key was chosen, and nothing was changed")
		case n == len(choices):
			continue
		}
		c := choices[n]
		if c.key != nil {
			s.use(*c.key)
			return nil
		}
		if ok, err := s.prepare(ctx, &c); err != nil || !ok {
			if err != nil {
				s.trouble(err)
			}
			continue
		}
		s.plan = &c
		return nil
	}
}

// use chooses a key that exists.
func (s *conversation) use(e export.Key) {
	s.key, s.uri = e, pkcs11uri.ForKey(e.Token.Token(), "", nil).String()
}

// troubles tells why there may be no key: of tokens that cannot be used, and of tokens whose keys other programs make.
func (s *conversation) troubles() {
	for _, m := range s.b.Store.Modules() {
		for _, t := range m.Away {
			s.say("  token %q has %s, and is not there: insert it", plain.Line(t.ID.Label), output.Count(len(t.Keys), "key"))
		}
		for _, t := range m.Tokens {
			if isPIV(t) && t.Shadowed == "" && len(t.Keys) == 0 {
				s.say("  token %q has no key, and its own program makes one: %s", plain.Line(t.ID.Label), advice.FirstKey(m, t))
			}
		}
	}
	for _, p := range doctor.TokenProblems(s.b.Store.Modules()) {
		s.say("  problem: %s", p.Text)
		for _, step := range p.Next {
			s.say("    next: %s", step)
		}
	}
}

func keyChoices(keys []export.Key) (all []choice) {
	for _, e := range keys {
		all = append(all, choice{text: describeKey(e) + ", " + e.Token.URI(), key: &e})
	}
	return all
}

// newKeyChoices are the ways to a new key.
func (s *conversation) newKeyChoices() (all []choice) {
	var soft, tpm *token.ModuleStatus
	for _, m := range s.b.Store.Modules() {
		switch wellknown.KindOf(m.Path) {
		case wellknown.SoftHSM:
			soft = &m
		case wellknown.TPM2:
			if m.Err == nil && !advice.NoTPM() {
				tpm = &m
			}
		}
		for _, t := range m.Tokens {
			if takesKeys(t) {
				all = append(all, choice{text: fmt.Sprintf("make a key on token %q (%s %s)",
					plain.Line(t.ID.Label), plain.Line(t.ID.Manufacturer), plain.Line(t.ID.Model)), on: &t})
			}
		}
	}
	if tpm != nil {
		all = append(all, choice{text: "make a token and a key in the TPM of this machine", module: tpm.Name})
	}
	off := slices.ContainsFunc(slices.Concat(s.b.Skipped, s.b.Broken), func(m registry.Module) bool {
		return wellknown.KindOf(m.Settings["module"].Value) == wellknown.SoftHSM
	})
	if c, ok := softHSMChoice(soft); ok && (soft != nil || !off) {
		all = append(all, c)
	}
	return all
}

// takesKeys tells whether a key can be made on a token. Other programs make the keys of PIV cards.
func takesKeys(t token.TokenStatus) bool {
	pinless := t.Flags&wire.CKFLoginRequired != 0 && t.Flags&wire.CKFUserPINInitialized == 0
	return t.Shadowed == "" && t.Home == "" && !pinless && t.Tries != pin.TriesNone && t.Tries != pin.TriesLast &&
		t.Flags&wire.CKFWriteProtected == 0 && !isPIV(t)
}

// isPIV tells whether a token is a PIV card, as OpenSC and Yubico's module show it.
func isPIV(t token.TokenStatus) bool {
	return t.ID.Manufacturer == "piv_II" || strings.Contains(t.ID.Manufacturer, "Yubico")
}

// softHSMChoice offers a new token of SoftHSM. m is nil if its module is not registered.
func softHSMChoice(m *token.ModuleStatus) (choice, bool) {
	c := choice{text: "make a token and a key in files, with SoftHSM: to try things, as files can be copied"}
	switch {
	case m == nil:
		c.first = advice.Install(softHSMPackage, softHSMFedora)
		c.text += fmt.Sprintf(" (this runs %q first)", c.first)
		if !strings.HasPrefix(c.first, "sudo ") {
			return c, false // nothing that could be run
		}
	case m.Err == nil:
		c.module = m.Name
		return c, true
	default:
		c.module = m.Name
	}
	if os.Getenv("SOFTHSM2_CONF") != "" {
		return c, m == nil // it is broken by what that names
	}
	conf := wellknown.SoftHSMUserConfig(os.Getenv("HOME"))
	if _, err := os.Lstat(conf); err == nil {
		return c, m == nil
	}
	dir := filepath.Join(os.Getenv("HOME"), ".local", "share", "softhsm2")
	c.files = []string{conf, dir}
	c.text += fmt.Sprintf(" (this writes %s and makes %s)", output.HomePath(conf), output.HomePath(dir))
	return c, true
}

// prepare does what a new token of SoftHSM needs first: it installs the package and makes the directory of tokens.
func (s *conversation) prepare(ctx context.Context, c *choice) (bool, error) {
	if c.first != "" {
		if err := s.attached(ctx, strings.Fields(c.first)...); err != nil {
			return false, err
		}
		s.changed = true
	}
	if c.files != nil && (c.first == "" || !systemSoftHSM()) {
		if err := ownTokens(c.files[0], c.files[1]); err != nil {
			return false, err
		}
		s.changed = true
		s.say("  wrote %s", output.HomePath(c.files[0]))
	}
	if c.first == "" && c.files == nil {
		return true, nil
	}
	s.look(ctx)
	for _, m := range s.b.Store.Modules() {
		if wellknown.KindOf(m.Path) == wellknown.SoftHSM {
			c.module = m.Name
			return m.Err == nil, m.Err
		}
	}
	return false, errors.New("SoftHSM's module is not registered with p11-kit: name it with a [[module]] table in the configuration")
}

// systemSoftHSM tells whether this user may use the machine's directory of tokens.
func systemSoftHSM() bool {
	dir, err := wellknown.SoftHSMTokens(wellknown.SoftHSMSystemConfig)
	if err != nil || dir == "" {
		return false
	}
	probe, err := os.CreateTemp(dir, ".p11-agent-*")
	if err != nil {
		return false
	}
	_ = probe.Close()
	return os.Remove(probe.Name()) == nil
}

// ownTokens gives this user a directory for tokens of SoftHSM. It writes the configuration last.
func ownTokens(conf, dir string) error {
	for _, d := range []string{dir, filepath.Dir(conf)} {
		if err := os.MkdirAll(d, 0o700); err != nil {
			return err
		}
	}
	return files.Create(conf, []byte("directories.tokendir = "+dir+"\n"), 0o644)
}

// makeKey makes the key that was chosen, and the token if it is new. The person types the PIN once: for the token, the key
// and the agent's login.
func (s *conversation) makeKey(ctx context.Context) error {
	if s.plan == nil {
		return nil
	}
	for {
		err := s.makeWithPIN(ctx)
		refused, wrong := errors.AsType[*pin.Error](err)
		if !wrong || refused.Tries == pin.TriesNone || refused.Tries == pin.TriesLast {
			return err
		}
		fmt.Fprintf(s.stderr, "  p11-agent: error: %v\n", err)
		again, err := s.ask.yes(ctx, "  Type the PIN again?", false)
		if err != nil {
			return err
		}
		if !again {
			return errors.New("no key was made")
		}
	}
}

func (s *conversation) makeWithPIN(ctx context.Context) error {
	pin, err := s.askPIN(ctx)
	if err != nil {
		return err
	}
	defer pin.Wipe()
	uri := ""
	if s.plan.on != nil {
		uri = s.plan.on.URI
	} else {
		label := s.freeLabel()
		if uri, err = s.b.Store.NewToken(ctx, s.plan.module, label, pin); err != nil {
			return err
		}
		s.changed = true
		s.say("  made the token %q", label)
		// A second try makes the key on this token.
		for _, m := range s.b.Store.Modules() {
			for _, t := range m.Tokens {
				if t.URI == uri {
					s.plan.on = &t
				}
			}
		}
	}
	u, err := pkcs11uri.Parse(uri)
	if err != nil {
		return err
	}
	label := newLabel
	u.Object = &label
	k, err := newkey.Make(ctx, s.b.Store, u, newKind, pin)
	//nolint:errorlint // wrapped, it says what became of the key
	if err == context.Canceled {
		return errInterrupted
	}
	if err != nil {
		return err
	}
	s.changed = true
	if err := newkey.Print(io.Discard, s.stderr, k); err != nil {
		return err
	}
	if err := s.take(k.Key); err != nil {
		return err
	}
	s.say("  made %s", describeKey(s.key))
	// From here on the agent uses the card.
	s.b.Close()
	s.b = nil
	s.logIn(ctx, pin)
	return nil
}

// take chooses the new key. It notes if the configuration keeps the agent from offering the key.
func (s *conversation) take(k *token.Key) error {
	u, err := pkcs11uri.Parse(k.URI())
	if err != nil {
		return err
	}
	keys, err := export.Keys(s.config, s.b.Store, []*pkcs11uri.URI{u}, backend.Comment)
	if err != nil {
		return err
	}
	for _, e := range keys {
		if bytes.Equal(e.Token.ID(), k.ID()) {
			s.use(e)
			if ok, reason := config.Offered(e.Token, s.config.Automatic(), ""); !ok {
				s.say("  note: the agent does not offer it: %s. Add %q to keys in %s", reason, e.Token.URI(), output.HomePath(s.config.Path()))
			}
			return nil
		}
	}
	return fmt.Errorf("the key %v was made, and is not listed", k)
}

// freeLabel returns a label that no present token has.
func (s *conversation) freeLabel() string {
	var taken []string
	for _, m := range s.b.Store.Modules() {
		for _, t := range m.Tokens {
			taken = append(taken, t.ID.Label)
		}
	}
	label := newLabel
	for n := 2; slices.Contains(taken, label); n++ {
		label = fmt.Sprintf("%s-%d", newLabel, n)
	}
	return label
}

// askPIN asks for the PIN of the token, or for a PIN for a new token. It returns nil if the token takes no PIN from here.
func (s *conversation) askPIN(ctx context.Context) (*secret.Secret, error) {
	fresh := s.plan.on == nil
	if !fresh && (s.plan.on.Flags&wire.CKFLoginRequired == 0 || s.plan.on.Flags&wire.CKFProtectedAuthenticationPath != 0) {
		return nil, nil //nolint:nilnil // no PIN is an answer
	}
	ask, err := prompt.OpenInput(false)
	if err != nil {
		return nil, err
	}
	defer ask.Close()
	prompt := ""
	if fresh {
		s.say("\n  Choose a PIN for the new token. Without it no other PIN can be set.")
		prompt = "  New PIN: "
	} else {
		s.say("\n  The key is made on token %q (serial %s).", plain.Line(s.plan.on.ID.Label), plain.Line(cmp.Or(s.plan.on.ID.Serial, "unknown")))
		prompt = "  PIN: "
	}
	for {
		pin, err := ask.ReadSecret(ctx, prompt)
		if err != nil {
			return nil, err
		}
		same := true
		if pin.Len() > 0 && fresh {
			same, err = typedAgain(ctx, ask, pin)
		}
		if err == nil && pin.Len() == 0 {
			err = errors.New("no PIN was given: no key was made")
		}
		if err == nil && same {
			return pin, nil
		}
		pin.Wipe()
		if err != nil {
			return nil, err
		}
		s.say("  The two are not the same.")
	}
}

// typedAgain lets the person check a new PIN, which the terminal does not show.
func typedAgain(ctx context.Context, ask *prompt.Input, pin *secret.Secret) (same bool, err error) {
	again, err := ask.ReadSecret(ctx, "  The same again, or Enter if you are sure of it: ")
	if err != nil {
		return false, err
	}
	defer again.Wipe()
	return again.Len() == 0 || pin.Equal(again), nil
}

// logIn makes the agent log in with the PIN. If that fails, the agent asks for the PIN when it needs it.
func (s *conversation) logIn(ctx context.Context, pin *secret.Secret) {
	if s.agent == nil || pin.Len() == 0 {
		return
	}
	if _, err := control.LoginWith(ctx, s.agent, s.uri, pin); err != nil {
		s.trouble(fmt.Errorf("the agent is not logged in, and asks for the PIN at the first use: %w", err))
		return
	}
	s.say("  logged the agent in: it asks for no PIN until the token is removed or the agent ends")
}
