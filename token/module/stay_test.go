package module

import (
	"testing"

	"p11-agent/pinentry/secret/secrettest"
	"p11-agent/token/tokentest"
	"p11-agent/token/wire"
)

// A PIN is for one stay of a token in a slot. The process looks for a token where the
// agent says that it is.
func TestStay(t *testing.T) {
	hsm := tokentest.NewSoftHSM(t)
	for _, label := range []string{"work", "home"} {
		hsm.AddToken(label, "")
		hsm.GenerateKey(label, tokentest.P256, "01", label)
	}
	p := start(t, hsm.Env()...)
	p.hello(hsm.Module())
	slots := make(map[string]uint64)
	for _, s := range p.slots(false) {
		slots[s.Token.Label] = s.ID
	}
	id := p.token("work")
	objects := func(m *wire.Objects) (wire.ObjectsReply, error) {
		var reply wire.ObjectsReply
		return reply, p.do(wire.TypeObjects, m, &reply)
	}

	// A Peek at a slot leaves nothing behind.
	peek, err := objects(&wire.Objects{Token: id, Slot: slots["work"], Peek: true})
	if err != nil || len(peek.Objects) != 1 || peek.Info.Stay != 0 {
		t.Fatalf("a look at the slot: %v, %v", peek, err)
	}
	if _, err := objects(&wire.Objects{Token: id, Slot: slots["home"], Peek: true}); err == nil {
		t.Error("another token's slot was looked at")
	}

	// A twin has its own name. The process looks for it where the agent says that it is.
	twin := id
	twin.Twin = 3
	first, err := objects(&wire.Objects{Token: twin, Slot: slots["work"], Placed: true})
	if err != nil || first.Info.Stay == 0 {
		t.Fatalf("the token is not in its slot: %v, %v", first, err)
	}
	_, err = objects(&wire.Objects{Token: twin, Slot: slots["home"], Placed: true})
	wantReason(t, err, wire.ReasonNoToken)
	second, err := objects(&wire.Objects{Token: twin, Slot: slots["work"], Placed: true})
	if err != nil || second.Info.Stay <= first.Info.Stay {
		t.Fatalf("the next stay: %d after %d, %v", second.Info.Stay, first.Info.Stay, err)
	}

	login := func(stay uint64) error {
		return p.do(wire.TypeLogin, &wire.Login{Token: twin, Stay: stay, PIN: secrettest.Of(t, tokentest.PIN)}, new(wire.TokenReply))
	}
	wantReason(t, login(first.Info.Stay), wire.ReasonOtherToken)
	if err := login(second.Info.Stay); err != nil {
		t.Error(err)
	}
}
