package readers

import (
	"context"
	"errors"
	"log/slog"
	"slices"
	"sync"
	"testing"

	"p11-agent/token/pcsc"
	"p11-agent/token/pcsc/pcsctest"
	"p11-agent/token/wire"
)

var (
	empty = pcsc.Reader{Name: "one", Events: 1}
	card  = pcsc.Reader{Name: "one", Card: true, Events: 2}
	other = pcsc.Reader{Name: "one", Card: true, Events: 4}
	alone = pcsc.Reader{Name: "one", Card: true, Events: 2, Users: pcsc.Exclusive}
)

func start(t *testing.T, list ...pcsc.Reader) (*pcsctest.Service, *Readers) {
	t.Helper()
	service := pcsctest.Start(t, list...)
	r := New(service.Env(), func() []int { return nil }, slog.New(slog.DiscardHandler))
	r.SetUsed(true)
	return service, r
}

// moved is what a Follower learns: two lists, or none if pcscd has gone.
type moved struct{ before, now []pcsc.Reader }

type follower chan moved

func (f follower) CardsMoved(before, now []pcsc.Reader) { f <- moved{before, now} }
func (f follower) ServiceLost()                         { f <- moved{} }

func TestFollow(t *testing.T) {
	service, r := start(t, card)
	ctx, cancel := context.WithCancel(t.Context())
	var all sync.WaitGroup
	defer all.Wait()
	defer cancel()
	learned := make(follower, 1)
	r.SetUsed(false)
	r.Follow(ctx, learned, func(func()) { t.Error("it follows a module that uses no reader") })
	r.SetUsed(true)
	r.Follow(ctx, learned, all.Go)
	r.Follow(ctx, learned, func(func()) { t.Error("it follows twice") })
	if got := <-learned; got.before != nil || !slices.Equal(got.now, []pcsc.Reader{card}) || r.Moves() != 1 || !r.Known() {
		t.Errorf("at first: %+v, %d moves", got, r.Moves())
	}
	service.Set(other)
	if got := <-learned; !AnyLeft(got.before, got.now) || !r.AwaitMove(ctx, 1) {
		t.Errorf("another card: %+v, %d moves", got, r.Moves())
	}
	if r.AwaitMove(ctx, 2) {
		t.Error("a card has moved that has not")
	}
	service.End()
	if got := <-learned; got.now != nil || r.Moves() != 3 || r.Known() {
		t.Errorf("without pcscd: %+v, %d moves", got, r.Moves())
	}
	if r.AwaitMove(ctx, 3) {
		t.Error("a card has moved without pcscd")
	}
}

func TestWatch(t *testing.T) {
	service, r := start(t, card)
	if _, err := r.Watch(t.Context()); !errors.Is(err, ErrMissed) {
		t.Errorf("before a look: %v", err)
	}
	if held := r.Looked(t.Context(), []pcsc.Reader{alone}); len(held) != 1 {
		t.Errorf("held just before: %v", held)
	}
	if _, err := r.Watch(t.Context()); !errors.Is(err, ErrMissed) {
		t.Errorf("after a look that could not see the card: %v", err)
	}
	if held := r.Looked(t.Context(), []pcsc.Reader{card}); len(held) != 0 {
		t.Errorf("held: %v", held)
	}
	service.Set(alone)
	if _, err := r.Watch(t.Context()); !errors.Is(err, ErrInUse) {
		t.Errorf("in use: %v", err)
	}
	service.Set(card)
	w, err := r.Watch(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	defer w.Close()
	if w.Changed(t.Context()) {
		t.Error("a change without one")
	}
	service.Set(alone)
	if w.Changed(t.Context()) {
		t.Error("a program that uses the card is no change")
	}
	service.Set(empty)
	if !w.Changed(t.Context()) {
		t.Error("a pull is no change")
	}
	service.End()
	if w.Changed(t.Context()) {
		t.Error("a change without pcscd")
	}
	service.Begin()
	if !w.Changed(t.Context()) {
		t.Error("no change after pcscd was away")
	}
}

// A request waits for a reader only while another program uses it alone.
func TestAwait(t *testing.T) {
	service, r := start(t, card)
	slot := func() wire.Slot { return wire.Slot{Description: "one"} }
	var p Patience
	if again, err := p.Await(t.Context(), r, slot); again || err != nil {
		t.Errorf("a free reader: %v, %v", again, err)
	}
	service.Set(alone)
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	r.SetUsed(false)
	if again, err := p.Await(ctx, r, slot); again || err != nil {
		t.Errorf("a module without readers: %v, %v", again, err)
	}
	r.SetUsed(true)
	if all := r.InUse(t.Context(), nil); len(all) != 1 || all[0].Reader != "one" {
		t.Errorf("in use: %v", all)
	}
	if all := r.InUse(t.Context(), map[string]bool{"one": true}); len(all) != 0 {
		t.Errorf("in use, without the one that is left out: %v", all)
	}
	questions := 0
	again, err := p.Await(t.Context(), r, func() wire.Slot {
		if questions++; questions == 2 {
			service.Set(card)
		}
		return slot()
	})
	if !again || err != nil {
		t.Errorf("a reader that gets free: %v, %v", again, err)
	}
}
