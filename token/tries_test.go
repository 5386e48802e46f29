package token_test

import (
	"testing"

	"p11-agent/token/pin"
	"p11-agent/token/tokentest"
)

// After a login, the agent knows the left tries at once, without another look.
func TestTriesAfterLogin(t *testing.T) {
	b := newBench(t, new(tokentest.Person), nil)
	tries := func() pin.Tries { return tokenStatus(t, b.store, b.card.ID().Label).Tries }
	want(t, "at first", tries(), pin.TriesUnknown)
	if _, err := b.store.Login(t.Context(), nil, b.store.Keys()[:1], tokentest.Secret(t, "wrong-1")); err == nil {
		t.Fatal("logged in with a wrong PIN")
	}
	want(t, "after a wrong PIN", tries(), pin.TriesLow)
	_, err := b.store.Login(t.Context(), nil, b.store.Keys()[:1], tokentest.Secret(t, rightPIN))
	noError(t, err)
	want(t, "after the right one", tries(), pin.TriesUnknown)
}
