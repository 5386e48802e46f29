package audit

import (
	"context"
	"crypto/ed25519"
	"errors"
	"fmt"
	"log/slog"
	"strings"
	"testing"

	"golang.org/x/crypto/ssh"

	"p11-agent/agent/peer"
	"p11-agent/agent/request"
	"p11-agent/agent/request/requesttest"
)

// A fixture is a Trail with the requests that a test records.
type fixture struct{ *Trail }

func newFixture(failed func(Event)) fixture {
	return fixture{New(slog.New(slog.DiscardHandler), failed)}
}

// answer records a request and its answer. key names the key that the request is about.
func (f fixture) answer(c *request.Caller, action request.Action, key string, err error) {
	r := f.Begin(action, &request.Use{Caller: c})
	r.Key = key
	f.End(r, err)
}

var local = &request.Caller{Number: 1, Peer: peer.Peer{Known: true, PID: 4711}}

// The number of events is bounded. Requests of one kind do not push out another kind.
func TestEventsAreBounded(t *testing.T) {
	f := newFixture(nil)
	f.answer(local, request.ActionAdd, "", errors.New("the first"))
	for range 3 * maxSigned {
		f.answer(local, request.ActionSign, "a", nil)
	}
	all := f.Events()
	failures := 0
	for _, e := range all {
		if e.Result == Refused && e.Reason == "the first" {
			failures++
		}
	}
	if count, _ := f.Signatures("a"); len(all) != maxSigned+1 || failures != 1 || count != 3*maxSigned {
		t.Errorf("%d events, %d failures, %d signatures", len(all), failures, count)
	}
}

// A client gets thousands of refusals, or makes as many changes. The events still have the
// signatures and some refusals of other clients.
func TestAttack11Status(t *testing.T) {
	w := requesttest.New(t)
	errNo := errors.New("no")
	for name, attack := range map[string]func(f fixture, n int){
		"the same": func(f fixture, _ int) {
			f.answer(w.Caller("evil", "evil", "-"), request.ActionSign, "", errNo)
		},
		"with numbers": func(f fixture, n int) {
			f.answer(w.Caller("evil"), request.ActionSign, "", fmt.Errorf("no %d", n))
		},
		"other reasons": func(f fixture, n int) {
			f.answer(w.Caller("evil"), request.ActionAdd, "", errors.New(strings.Repeat("x", n%500)))
		},
		"other programs": func(f fixture, n int) {
			f.answer(w.Caller(fmt.Sprint("evil", n)), request.ActionSign, "", errNo)
		},
		"made up hosts": func(f fixture, n int) {
			c := w.Caller("evil", "evil", "-")
			c.Binds[0].HostKey = randomHost(t, n)
			f.answer(c, request.ActionSign, "", errNo)
		},
		"unknown keys": func(f fixture, n int) {
			f.answer(w.Caller("evil", "evil", "-"), request.ActionSign, fmt.Sprint("SHA256:", n), errNo)
		},
		"nothing is removed": func(f fixture, _ int) {
			f.answer(w.Caller("evil", "evil", "-"), request.ActionRemoveAll, "", nil)
		},
	} {
		t.Run(name, func(t *testing.T) {
			f := newFixture(nil)
			f.answer(local, request.ActionSign, "a", nil)
			other := &request.Caller{Peer: peer.Peer{Known: true, UID: 4242}}
			f.answer(other, request.ActionAdd, "", errors.New("something else"))
			const lot = 2000
			for n := range lot {
				attack(f, n)
			}
			all := f.Events()
			signed, counted, noted := 0, 0, false
			for _, e := range all {
				switch {
				case e.Result == OK && e.Action == request.ActionSign:
					signed++
				case e.Reason == "something else":
					noted = true
				default:
					counted += e.Count
					if e.Count < 1 || e.First.After(e.Time) {
						t.Errorf("%+v", e)
					}
				}
			}
			if signed != 1 || !noted || len(all) > maxSigned+maxChanged+maxFailures {
				t.Errorf("of %d events, %d are signatures; the other refusal: %t", len(all), signed, noted)
			}
			if counted != lot {
				t.Errorf("they stand for %d", counted)
			}
		})
	}
}

func randomHost(t *testing.T, n int) ssh.PublicKey {
	seed := make([]byte, ed25519.SeedSize)
	copy(seed, fmt.Sprint(n))
	pub, err := ssh.NewPublicKey(ed25519.NewKeyFromSeed(seed).Public())
	if err != nil {
		t.Fatal(err)
	}
	return pub
}

type declinedError struct{}

func (declinedError) Error() string  { return "no, thanks" }
func (declinedError) Declined() bool { return true }

// The agent tells a person of failures on this machine. It does not if the person has just
// declined the request.
func TestFailed(t *testing.T) {
	forwarded := &request.Caller{Number: 2, Peer: peer.Peer{Known: true, PID: 4712}, Forwarded: true}
	var told []Event
	f := newFixture(func(e Event) { told = append(told, e) })
	for _, test := range []struct {
		caller *request.Caller
		err    error
		want   bool
	}{
		{local, nil, false},
		{local, errors.New("the PIN is locked"), true},
		{local, fmt.Errorf("log in: %w", declinedError{}), false},
		{local, context.Canceled, false},
		{forwarded, errors.New("the PIN is locked"), false},
	} {
		told = nil
		f.answer(test.caller, request.ActionSign, "a", test.err)
		if (len(told) == 1) != test.want {
			t.Errorf("%v by %v: %+v", test.err, test.caller.Peer, told)
		}
		if test.want && (told[0].Reason != "the PIN is locked" || told[0].Key != "a") {
			t.Errorf("%+v", told[0])
		}
	}
}
