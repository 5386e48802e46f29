package backend

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strconv"
	"strings"
	"sync/atomic"

	"p11-agent/agent"
	"p11-agent/agent/request"
	"p11-agent/cmd/p11-agent/config"
	"p11-agent/cmd/p11-agent/status"
	"p11-agent/pinentry/plain"
	"p11-agent/pinentry/secret"
	"p11-agent/token"
	"p11-agent/token/pin"
	"p11-agent/token/selection"
	"p11-agent/token/wire"
)

// tokens shows a token.Store to the keyring, which knows nothing of PKCS#11.
type tokens struct {
	store *token.Store
	allow selection.AllowList
	last  atomic.Pointer[keyList]
}

// Tokens returns the tokens as the keyring uses them. allow limits which modules a client
// may name.
func (b *Modules) Tokens(allow selection.AllowList) agent.Tokens {
	return &tokens{store: b.Store, allow: allow}
}

// keyList is the keys of one generation of the store.
type keyList struct {
	generation uint64
	keys, away []request.Key
}

var _ agent.Tokens = (*tokens)(nil)

func (t *tokens) list() *keyList {
	generation := t.store.Generation()
	if l := t.last.Load(); l != nil && l.generation == generation {
		return l
	}
	l := &keyList{generation: generation, keys: agentKeys(t.store.Keys()), away: agentKeys(t.store.Away())}
	t.last.Store(l)
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
	parse := func() (*selection.Selector, error) { return selection.Parse(provider, t.allow) }
	if remote {
		parse = func() (*selection.Selector, error) { return selection.ParseRemote(provider) }
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
		// The login may show that the URI does not mean some of these keys.
		if keys, err = t.store.SelectOf(ctx, sel.Selector, func(k *token.Key) bool { return reached(k) }); err != nil {
			return nil, false, err
		}
	}
	return agentKeys(keys), taken, nil
}

var errOnlyURI = errors.New("a token is named by its URI here")

func (t *tokens) Login(ctx context.Context, s request.Selection, given *secret.Secret) (answer request.LoginAnswer, err error) {
	sel, ok := s.(config.KeySelection)
	if !ok || sel.URI() == nil {
		return answer, errOnlyURI
	}
	// Of a token that several modules show, the store lists the keys that it uses.
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
		answer.Already, answer.Tries = true, status.PINOf(st.Tries)
		return answer, nil
	}
	// The person who gave a PIN in advance was not told of the module.
	if err := token.CheckHome(sel.Selector, keys[0]); err != nil {
		return answer, err
	}
	err = t.store.LoginTold(ctx, sel.Selector, keys[0], given)
	st, _ = t.status(keys[0])
	answer.Tries = status.PINOf(st.Tries)
	if e, ok := errors.AsType[*pin.Error](err); ok {
		answer.Tries = status.PINOf(e.Tries)
	}
	return answer, err
}

// status returns the status of the token of a key.
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

// Comment returns the comment that ssh-add -l shows for a key without a configured name: its
// URI, which has no blanks, and the label after it.
func Comment(k request.Key) string {
	key, ok := k.(*token.Key)
	if !ok || key.PublicLabel() == "" {
		return k.URI()
	}
	return key.URI() + " " + shownLabel(key.PublicLabel())
}

// maxLabel is how many bytes of a label a comment shows at most.
const maxLabel = 48

// shownLabel shows the label of a key in the comment of an identity. A label that could
// pass for another URI is quoted.
func shownLabel(label string) string {
	shown := plain.Name(label, maxLabel)
	if strings.Contains(strings.ToLower(shown), "pkcs11:") && shown[0] != '"' {
		return strconv.Quote(shown)
	}
	return shown
}
