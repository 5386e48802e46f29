package known

import (
	"context"
	"crypto/ed25519"
	"crypto/x509"
	"encoding/json"
	"fmt"
	"log/slog"
	"reflect"
	"strings"
	"sync"
	"testing"
	"time"

	"p11-agent/token/pairs"
)

// FuzzKnown reads lists. parse reads what was written in the same way again.
func FuzzKnown(f *testing.F) {
	der, err := x509.MarshalPKIXPublicKey(ed25519.PublicKey(make([]byte, ed25519.PublicKeySize)))
	if err != nil {
		f.Fatal(err)
	}
	for _, l := range []List{
		{Version: 1},
		{Version: 1, Tokens: []Token{{Module: "m", Label: "card", Serial: "1", There: true, Keys: []Key{
			{ID: []byte{1}, Label: "one", Public: der, Always: true, Unfit: "not for signing"},
		}}}},
		{Version: 2, Tokens: []Token{{Module: "m", Label: "card", Serial: "1", Home: true}}},
	} {
		b, err := json.Marshal(l)
		if err != nil {
			f.Fatal(err)
		}
		f.Add(b)
	}
	f.Add([]byte(`{"version":1,"tokens":[{"keys":[{"public":"AAAA"}]}]}`))
	f.Add([]byte(`{"version":1,"tokens":null}{`))
	f.Fuzz(func(t *testing.T, b []byte) {
		l, err := parse(b)
		if err != nil {
			return
		}
		again, err := json.Marshal(l)
		if err != nil {
			t.Fatal(err)
		}
		l2, err := parse(again)
		if err != nil {
			t.Fatalf("the written list cannot be read: %v", err)
		}
		if third, err := json.Marshal(l2); err != nil || !reflect.DeepEqual(third, again) {
			t.Fatalf("%s became %s (%v)", again, third, err)
		}
	})
}

func (a share) plus(b share) share {
	return share{a.tokens + b.tokens, a.keys + b.keys, a.bytes + b.bytes}
}

func TestBoundedIsFair(t *testing.T) {
	seen := time.Unix(1_800_000_000, 0)
	var tokens []Token
	add := func(module string, n, keys int, there bool, text string) {
		for i := range n {
			entry := Token{Module: module, Label: fmt.Sprint(module, i), There: there, Seen: seen.Add(time.Duration(i))}
			for range keys {
				entry.Keys = append(entry.Keys, Key{Label: text})
			}
			tokens = append(tokens, entry)
		}
	}
	add("few", 3, 2, false, "one")
	add("many tokens", 1000, 1, true, "one")
	add("many keys", 4, 3000, true, "one")
	add("long keys", 10, 100, true, strings.Repeat("\x01", pairs.MaxText))
	kept := bounded(tokens)
	counts := make(map[string]share)
	var all share
	for _, e := range kept {
		counts[e.Module] = counts[e.Module].plus(e.share())
		all = all.plus(e.share())
	}
	if !all.within(share{maxTokens, maxKeys, maxFile}) {
		t.Errorf("the list has %+v", all)
	}
	if counts["few"].tokens != 3 {
		t.Errorf("of the module with few tokens %+v is left", counts["few"])
	}
	for name, c := range counts {
		if c.tokens == 0 {
			t.Errorf("nothing of module %q is left", name)
		}
	}
	if c := counts["many tokens"]; c.tokens < 200 {
		t.Errorf("unused room is left: %+v", c)
	}
	last := kept[3]
	if last.Module != "many tokens" || last.Label == "many tokens0" {
		t.Errorf("the oldest is kept: %+v", last)
	}
}

// Take gives each module its own tokens, once.
func TestTake(t *testing.T) {
	l := &List{Tokens: []Token{{Module: "a", Label: "one"}, {Module: "b", Label: "two"}, {Module: "a", Label: "three"}}}
	if taken := l.Take("a"); len(taken) != 2 || taken[0].Label != "one" || taken[1].Label != "three" {
		t.Errorf("module a has %+v", taken)
	}
	if again := l.Take("a"); len(again) > 0 {
		t.Errorf("module a has %+v again", again)
	}
	if len(l.Tokens) != 1 || l.Tokens[0].Label != "two" {
		t.Errorf("the list has %+v", l.Tokens)
	}
}

// Keep writes the list after each change, at a pace, and at the end.
func TestKeep(t *testing.T) {
	dir := t.TempDir()
	changed := make(chan struct{}, 1)
	ctx, cancel := context.WithCancel(t.Context())
	labels := make(chan string, 1)
	var done sync.WaitGroup
	done.Go(func() {
		Keep(ctx, dir, changed, func() []Token { return []Token{{Module: "m", Label: <-labels}} }, slog.New(slog.DiscardHandler))
	})
	changed <- struct{}{}
	labels <- "first"
	changed <- struct{}{} // Keep has taken the element before
	cancel()
	labels <- "last"
	done.Wait()
	l := Load(dir, slog.New(slog.DiscardHandler))
	if len(l.Tokens) != 1 || l.Tokens[0].Label != "last" {
		t.Errorf("the file has %+v", l.Tokens)
	}
}
