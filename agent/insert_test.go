package agent

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"p11-agent/agent/approval"
	"p11-agent/agent/request"
	"p11-agent/pinentry/waiting"
)

// fakeInserter plays the person who inserts tokens.
type fakeInserter struct {
	answer func(ctx context.Context, n int) (bool, error) // of the nth prompt

	mu    sync.Mutex
	asked []approval.Wanted
	open  int
	most  int
}

func (i *fakeInserter) Insert(ctx context.Context, w approval.Wanted) (in bool, err error) {
	err = w.Asking.Ask(ctx, waiting.Question{Ask: func(ctx context.Context) (err error) {
		in, err = i.insert(ctx, w)
		return err
	}})
	return in, err
}

func (i *fakeInserter) insert(ctx context.Context, w approval.Wanted) (bool, error) {
	i.mu.Lock()
	i.asked = append(i.asked, w)
	n := len(i.asked)
	i.open++
	i.most = max(i.most, i.open)
	i.mu.Unlock()
	defer func() {
		i.mu.Lock()
		i.open--
		i.mu.Unlock()
	}()
	return i.answer(ctx, n)
}

// waits is a prompt that stays until ctx ends.
func waits(ctx context.Context, _ int) (bool, error) {
	<-ctx.Done()
	return false, ctx.Err()
}

// setAway sets the present keys and the absent keys.
func (t *fakeTokens) setAway(there, away []request.Key) {
	t.mu.Lock()
	defer t.mu.Unlock()
	for _, k := range there {
		k.(*fakeKey).setAbsent(false)
	}
	for _, k := range away {
		k.(*fakeKey).setAbsent(true)
	}
	t.keys, t.away = there, away
	t.changeLocked()
}

func named(_ request.Key, named bool) bool  { return named }
func always(_ request.Key, named bool) bool { return true }

func TestOfferAway(t *testing.T) {
	one, two, three := edKey("pkcs11:token=a;id=%01"), edKey("pkcs11:token=b;id=%01"), edKey("pkcs11:token=c;id=%01")
	three.unfit = "an attestation key"
	sel := []request.Selection{prefix("pkcs11:token=b"), prefix("pkcs11:token=a"), prefix("pkcs11:token=c")}
	tests := []struct {
		name      string
		automatic []request.Selection
		offer     func(request.Key, bool) bool
		away      []request.Key
		want      []string
	}{
		{"never", nil, nil, []request.Key{one, two, three}, []string{}},
		{"those that are named, of none", nil, named, []request.Key{one, two, three}, []string{}},
		{"those that are named", sel, named, []request.Key{one, two, three}, []string{two.uri, one.uri}},
		{"every one", nil, always, []request.Key{one, two, three}, []string{one.uri, two.uri}},
		{"in the order of the configuration", sel, named, []request.Key{two, three}, []string{two.uri, one.uri}},
		{"by its own id", []request.Selection{prefix(three.uri)}, named, []request.Key{one, two, three}, []string{three.uri}},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			f := newFixture(Options{Rules: Rules{Automatic: tt.automatic, OfferAway: tt.offer}, Insert: &fakeInserter{answer: waits}})
			var there []request.Key
			for _, k := range []request.Key{one, two, three} {
				if !slices.Contains(tt.away, k) {
					there = append(there, k)
				}
			}
			f.tokens.setAway(there, tt.away)
			if got := f.list(t); !slices.Equal(got, tt.want) {
				t.Errorf("listed %q, want %q", got, tt.want)
			}
		})
	}
}

// Fifty requests share a prompt for a card. They go on when the card is in.
func TestInsert(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		key, backup := edKey("pkcs11:token=a;id=%01"), edKey("pkcs11:token=b;id=%01")
		backup.Signer = key.Signer // the same key on two cards
		in := &fakeInserter{answer: waits}
		f := newFixture(Options{Rules: Rules{OfferAway: always}, Insert: in})
		f.tokens.setAway(nil, []request.Key{key, backup})
		var all sync.WaitGroup
		for range 50 {
			all.Go(func() {
				if _, err := f.Sign(t.Context(), local, request.Sign{Key: wireOf(key), Data: []byte("data")}); err != nil {
					t.Error(err)
				}
			})
		}
		synctest.Wait()
		if len(in.asked) != 1 {
			t.Fatalf("%d prompts", len(in.asked))
		}
		if w := in.asked[0]; !slices.Equal(w.Tokens, []string{key.TokenName(), backup.TokenName()}) || w.Comment != key.uri {
			t.Errorf("asked for %+v", w)
		}
		f.list(t) // nothing waits for it
		f.tokens.setAway([]request.Key{backup}, []request.Key{key})
		all.Wait()
		synctest.Wait()
		if in.open != 0 {
			t.Error("the prompt is still open")
		}
		if backup.signed != 50 || key.signed != 0 {
			t.Errorf("%d signatures by the one that is in, %d by the other", backup.signed, key.signed)
		}
	})
}

func TestInsertFails(t *testing.T) {
	errNoDisplay := errors.New("no display")
	tests := []struct {
		name    string
		answer  func(ctx context.Context, n int) (bool, error)
		after   time.Duration
		prompts int
		err     string
	}{
		{"declined", func(context.Context, int) (bool, error) { return false, nil }, 0, 1, "has declined to insert it"},
		{"no prompt", func(context.Context, int) (bool, error) { return false, errNoDisplay }, 0, 1, "no prompt can ask for it: no display"},
		{"no answer", waits, time.Minute, 1, "the token was not inserted in time"},
		{"it is not in, whatever the person says", func(ctx context.Context, n int) (bool, error) {
			if n == 3 {
				return waits(ctx, n)
			}
			return true, nil
		}, time.Minute, 3, "the token was not inserted in time"},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				key := edKey("pkcs11:token=a;id=%01")
				in := &fakeInserter{answer: tt.answer}
				f := newFixture(Options{Rules: Rules{OfferAway: always}, Insert: in})
				f.tokens.setAway(nil, []request.Key{key})
				start := time.Now()
				_, err := f.Sign(t.Context(), local, request.Sign{Key: wireOf(key), Data: []byte("data")})
				if err == nil || !strings.Contains(err.Error(), tt.err) || !strings.Contains(err.Error(), key.TokenName()) {
					t.Errorf("got %v", err)
				}
				if d := time.Since(start); d != tt.after {
					t.Errorf("after %v, want %v", d, tt.after)
				}
				if len(in.asked) != tt.prompts || in.most != 1 {
					t.Errorf("%d prompts, %d at once", len(in.asked), in.most)
				}
				if !strings.Contains(f.log.String(), tt.err) {
					t.Errorf("the log does not say so:\n%s", f.log)
				}
			})
		})
	}
}

// A prompt stays open when a client hangs up and others still wait. It closes with the last
// client.
func TestInsertHangUp(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		key := edKey("pkcs11:token=a;id=%01")
		in := &fakeInserter{answer: waits}
		f := newFixture(Options{Rules: Rules{OfferAway: always}, Insert: in})
		f.tokens.setAway(nil, []request.Key{key})
		var cancels []context.CancelFunc
		var all sync.WaitGroup
		for range 2 {
			ctx, cancel := context.WithCancel(t.Context())
			cancels = append(cancels, cancel)
			all.Go(func() {
				if _, err := f.Sign(ctx, local, request.Sign{Key: wireOf(key), Data: []byte("data")}); !errors.Is(err, context.Canceled) {
					t.Errorf("got %v", err)
				}
			})
			synctest.Wait()
		}
		cancels[0]()
		synctest.Wait()
		if in.open != 1 {
			t.Errorf("%d prompts after the first hung up", in.open)
		}
		cancels[1]()
		all.Wait()
		synctest.Wait()
		if in.open != 0 {
			t.Error("the prompt is still open")
		}
	})
}

// Without a prompt, and for a key that is not offered while its token is absent, the agent
// gives the reason at once.
func TestInsertWithoutPrompt(t *testing.T) {
	key := edKey("pkcs11:token=a;id=%01")
	f := newFixture(Options{Rules: Rules{OfferAway: always}})
	f.tokens.setAway(nil, []request.Key{key})
	_, err := f.Sign(t.Context(), local, request.Sign{Key: wireOf(key), Data: []byte("data")})
	if !isAbsent(err) {
		t.Errorf("got %v", err)
	}
	in := &fakeInserter{answer: waits}
	f = newFixture(Options{Insert: in})
	f.tokens.setAway([]request.Key{key}, nil)
	f.list(t)
	key.setAbsent(true) // pulled while it is listed
	if _, err := f.Sign(t.Context(), local, request.Sign{Key: wireOf(key), Data: []byte("data")}); !isAbsent(err) {
		t.Errorf("got %v", err)
	}
	if len(in.asked) != 0 {
		t.Error("a person was asked for a key that is not to be offered while it is away")
	}
}

type busyError struct{ absentError }

func (busyError) Busy() bool { return true }

// The agent does not ask for a token that is in, and that another program uses exclusively.
func TestInsertNotWhenBusy(t *testing.T) {
	key := edKey("pkcs11:token=a;id=%01")
	in := &fakeInserter{answer: waits}
	f := newFixture(Options{Rules: Rules{OfferAway: always}, Insert: in}, key)
	key.err = fmt.Errorf("sign: %w", busyError{})
	if _, err := f.Sign(t.Context(), local, request.Sign{Key: wireOf(key), Data: []byte("data")}); !isBusy(err) {
		t.Errorf("got %v", err)
	}
	if len(in.asked) != 0 {
		t.Error("a person was asked to insert a token that is in")
	}
}

// A removed identity stays removed while its token is absent.
func TestRemovedAndAway(t *testing.T) {
	key := edKey("pkcs11:token=a;id=%01")
	f := newFixture(Options{Rules: Rules{OfferAway: always}, Insert: &fakeInserter{answer: waits}})
	f.tokens.setAway(nil, []request.Key{key})
	if err := f.Remove(t.Context(), local, wireOf(key)); err != nil {
		t.Fatal(err)
	}
	if got := f.list(t); len(got) != 0 {
		t.Errorf("listed %q", got)
	}
	key.insertions++
	f.tokens.setAway([]request.Key{key}, nil)
	if got := f.list(t); len(got) != 1 {
		t.Errorf("after it was inserted: %q", got)
	}
	if err := f.RemoveAll(t.Context(), local); err != nil {
		t.Fatal(err)
	}
	f.tokens.setAway(nil, []request.Key{key})
	if got := f.list(t); len(got) != 0 {
		t.Errorf("after all were removed: %q", got)
	}
}
