package token_test

import (
	"context"
	"fmt"
	"math/rand/v2"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"p11-agent/token"
	"p11-agent/token/tokentest"
	"p11-agent/token/tokentest/pivcard"
)

// pullModules are the modules of the tests that pull cards.
var pullModules = []struct{ name, file, label string }{
	{"OpenSC", "opensc-pkcs11.so", "piv"},
	{"Yubico", "libykcs11.so*", "YubiKey PIV #"},
}

// A pullWorld has two cards in two readers, and a Store that keeps their PINs. Tests pull the
// first card.
type pullWorld struct {
	testing.TB
	pcscd  *tokentest.PCSCD
	card   *pivcard.Card
	person *tokentest.Person
	store  *token.Store
	key    *token.Key // of the first card
	other  *token.Key // of the second card
}

func newPullWorld(t testing.TB, file, label string) *pullWorld {
	t.Helper()
	w := &pullWorld{TB: t, person: &tokentest.Person{Always: pivPIN}}
	module := tokentest.Module(t, file)
	w.pcscd = tokentest.StartPCSCD(t, "Yubico One", "Yubico Two")
	var labels []string
	for i := range 2 {
		c := tokentest.NewCard(t, pivcard.Options{
			Name: fmt.Sprintf("piv%d", i), PIN: pivPIN, YubiKey: label != "piv", Trace: func(string) {},
			Keys: map[pivcard.Ref]pivcard.Key{pivcard.Authentication: {}, pivcard.Signature: {}},
		})
		w.pcscd.Insert(2*i, c)
		labels = append(labels, fmt.Sprintf("%s%d", label, i))
		if label != "piv" {
			labels[i] = fmt.Sprintf("%s%d", label, c.Serial())
		}
		if i == 0 {
			w.card = c
		}
	}
	w.store = tokentest.Store(t, token.Options{
		Modules: []token.ModuleSpec{realSpec("piv", module, w.pcscd.Env()...)}, Command: self, PINs: w.person,
		Policy: func(*token.Key) token.Policy { return token.Policy{Remember: true} },
	}, pivPIN)
	w.key = tokentest.Key(t, w.store, labels[0], 1)
	w.other = tokentest.Key(t, w.store, labels[1], 1)
	for _, k := range []*token.Key{w.key, w.other} {
		if err := tokentest.Sign(t.Context(), k); err != nil {
			t.Fatal(err)
		}
	}
	return w
}

// listed reports whether the Store lists the key of the first card.
func (w *pullWorld) listed() bool {
	return slices.ContainsFunc(w.store.Keys(), func(k *token.Key) bool { return k.URI() == w.key.URI() })
}

// pulled holds the times of one pull.
type pulled struct {
	how      string
	answered time.Duration // from the pull to the answer of the signature under way; 0: there was none
	seen     time.Duration // from the insertion to the power-up of the card by pcscd
	listed   time.Duration // from the insertion
	signed   time.Duration // likewise
	other    time.Duration // a signature of the other card, from the pull
	failure  string        // of the module, from its status after the pull
}

// pullKinds are the moments of a pull. pullGaps are the times until the card is in again.
var (
	pullKinds = []string{"idle", "in a signature", "behind a signature", "before a signature"}
	pullGaps  = []time.Duration{0, 100 * time.Millisecond, time.Second, 3 * time.Second}
)

// pull pulls the first card and puts it in again after gap.
func (w *pullWorld) pull(random *rand.Rand, kind int, gap time.Duration) (p pulled) {
	w.Helper()
	slot := w.pcscd.Slots[0]
	ctx := context.Background()
	const work = 200 * time.Millisecond
	var all sync.WaitGroup
	var mu sync.Mutex
	var answers time.Time
	sign := func() {
		all.Go(func() {
			_ = tokentest.Sign(ctx, w.key) // succeeds, or the token is absent
			mu.Lock()
			defer mu.Unlock()
			if now := time.Now(); now.After(answers) {
				answers = now
			}
		})
	}
	p.how = pullKinds[kind]
	switch kind {
	case 0:
		time.Sleep(50 * time.Millisecond)
	case 1:
		w.card.SetDelay(0, work)
		sign()
		time.Sleep(time.Duration(random.Int64N(int64(work))))
	case 2:
		if err := tokentest.Sign(ctx, w.key); err != nil {
			w.Errorf("sign before the pull: %v", err)
		}
		time.Sleep(time.Duration(random.Int64N(int64(30 * time.Millisecond))))
	}
	began := time.Now()
	slot.Remove()
	w.card.SetDelay(0, 0)
	if kind == 3 {
		time.Sleep(time.Duration(random.Int64N(int64(500 * time.Millisecond))))
		sign()
	}
	all.Go(func() {
		if err := tokentest.Sign(ctx, w.other); err != nil {
			w.Errorf("the other card, %s, gap %v: %v", p.how, gap, err)
		}
		p.other = time.Since(began)
	})
	failure, over := make(chan string), make(chan struct{})
	go func() {
		seen := ""
		for {
			if err := w.store.Modules()[0].Err; err != nil {
				seen = err.Error()
			}
			select {
			case <-over:
				failure <- seen
				return
			case <-time.After(2 * time.Millisecond):
			}
		}
	}()
	time.Sleep(gap - time.Since(began))
	powered := w.card.Counts().PowerUps
	back := time.Now()
	slot.Insert(w.card)
	all.Go(func() {
		tokentest.Until(w, "pcscd gives power to the card", func() bool { return w.card.Counts().PowerUps > powered })
		p.seen = time.Since(back)
	})
	for w.store.Poke(); ; {
		err := tokentest.Sign(ctx, w.key)
		if err == nil {
			p.signed = time.Since(back)
			break
		}
		if time.Since(back) > stuck {
			w.Fatalf("%s, gap %v: it does not sign again: %v", p.how, gap, err)
		}
		time.Sleep(5 * time.Millisecond)
	}
	for !w.listed() {
		time.Sleep(time.Millisecond)
	}
	p.listed = time.Since(back)
	all.Wait()
	close(over)
	p.failure = <-failure
	if !answers.IsZero() {
		p.answered = answers.Sub(began)
	}
	return p
}

// BenchmarkPull pulls a card once for each round, at a random moment. It reports how long requests
// wait that meet the pull, in milliseconds.
func BenchmarkPull(b *testing.B) {
	for _, m := range pullModules {
		b.Run(m.name, func(b *testing.B) {
			w := newPullWorld(b, m.file, m.label)
			random := rand.New(rand.NewPCG(1, uint64(time.Now().UnixNano())))
			results := make(map[string][]time.Duration)
			b.ResetTimer()
			for range b.N {
				gap := pullGaps[random.IntN(len(pullGaps))]
				p := w.pull(random, random.IntN(len(pullKinds)), gap)
				if testing.Verbose() {
					b.Logf("%s, gap %v: answered %v, seen %v, signed %v, listed %v, other %v, restarts %d %s", p.how, gap,
						p.answered.Round(time.Millisecond), p.seen.Round(time.Millisecond), p.signed.Round(time.Millisecond), p.listed.Round(time.Millisecond),
						p.other.Round(time.Millisecond), w.store.Modules()[0].Restarts, p.failure)
				}
				if p.answered > 0 {
					results["answered"] = append(results["answered"], p.answered)
				}
				results["seen"] = append(results["seen"], p.seen)
				results["signed"] = append(results["signed"], p.signed)
				results["listed"] = append(results["listed"], p.listed)
				results["other"] = append(results["other"], p.other)
			}
			for name, all := range results {
				slices.Sort(all)
				for _, q := range []struct {
					name string
					at   int
				}{{"p50", len(all) / 2}, {"p95", len(all) * 95 / 100}, {"max", len(all) - 1}} {
					b.ReportMetric(float64(all[q.at].Milliseconds()), strings.Join([]string{name, q.name, "ms"}, "-"))
				}
			}
			b.ReportMetric(float64(w.store.Modules()[0].Restarts), "restarts")
			b.ReportMetric(float64(w.person.Prompts()), "prompts")
		})
	}
}
