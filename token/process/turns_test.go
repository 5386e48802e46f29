package process

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"p11-agent/token/wire"
)

// tokenThat is a token in a bubble of time that takes so long for a signature, and
// makes so many at once. What more it is asked for waits in the module.
type tokenThat struct {
	takes  time.Duration
	beside chan struct{}

	mu     sync.Mutex
	asked  int      // that are with the module
	most   int      // of asked
	served []string // data of the requests, in order
}

func newTokenThat(takes time.Duration, beside int) *tokenThat {
	return &tokenThat{takes: takes, beside: make(chan struct{}, beside)}
}

func (k *tokenThat) serve(c *wire.ModuleConn, r wire.Request) {
	m, ok := r.Message.(*wire.Operate)
	if !ok {
		return
	}
	k.mu.Lock()
	k.asked++
	k.most = max(k.most, k.asked)
	k.served = append(k.served, string(m.Data))
	k.mu.Unlock()
	go func() {
		k.beside <- struct{}{}
		time.Sleep(k.takes)
		<-k.beside
		k.mu.Lock()
		k.asked--
		k.mu.Unlock()
		_ = c.WriteReply(r.ID, &wire.OperateReply{Result: m.Data}) // the agent may have gone
	}()
}

var someToken = wire.TokenID{Label: "some"}

// ask requests a signature, as package token does.
func (p *Process) ask(ctx context.Context, info wire.TokenInfo, data string) error {
	s, err := p.AwaitTurn(ctx, someToken, info)
	if err != nil {
		return err
	}
	s.Request = wire.Operate{Key: wire.KeyID{Token: someToken}, Mechanism: wire.CKMECDSA, ResultLen: 64, Data: []byte(data)}
	got, _, err := p.Operate(ctx, s)
	if err == nil && string(got) != data {
		err = fmt.Errorf("%q is signed in place of %q", got, data)
	}
	return err
}

// TestWidth checks that the queue learns how many signatures a token makes at once.
func TestWidth(t *testing.T) {
	for _, tt := range []struct {
		name     string
		takes    time.Duration
		beside   int
		sessions uint64
		most     int // under way at once, in the end
	}{
		{"a card", 100 * time.Millisecond, 1, 0, 1},
		{"an HSM", 5 * time.Millisecond, 1000, 0, wire.MaxLanes},
		{"an HSM that works on few", 5 * time.Millisecond, 4, 0, wire.MaxLanes},
		{"one with few sessions", 5 * time.Millisecond, 1000, 4, 3},
		{"one with a single session", 5 * time.Millisecond, 1000, 2, 1},
		{"one that is fast", 100 * time.Microsecond, 1, 0, quickWidth},
	} {
		t.Run(tt.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				token := newTokenThat(tt.takes, tt.beside)
				p := pipeProcess(t, token.serve)
				info := wire.TokenInfo{MaxSessions: tt.sessions}
				round := func(clients, each int) {
					var all sync.WaitGroup
					for range clients {
						all.Go(func() {
							for range each {
								if err := p.ask(t.Context(), info, "data"); err != nil {
									t.Error(err)
								}
							}
						})
					}
					all.Wait()
				}
				round(100, 1)
				token.most = 0
				round(100, 1)
				if got := token.most; (tt.beside > 1 || tt.most == quickWidth) && got != tt.most {
					t.Errorf("%d requests at once, want %d", got, tt.most)
				}
				// Now and then it is tried whether a card does two.
				if got := token.most; tt.most == 1 && got > 2 {
					t.Errorf("%d requests at once", got)
				}
			})
		})
	}
}

// The queue serves requests in their order. A request whose client has gone costs the others no time.
func TestQueue(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		card := newTokenThat(100*time.Millisecond, 1)
		p := pipeProcess(t, card.serve)
		var all sync.WaitGroup
		var want []string
		for i := range 30 {
			ctx, cancel := context.WithCancel(t.Context())
			defer cancel()
			data := fmt.Sprint(i)
			goes := i > 5 && i%3 == 0
			if !goes {
				want = append(want, data)
			}
			all.Go(func() {
				if err := p.ask(ctx, wire.TokenInfo{}, data); goes != errors.Is(err, context.Canceled) {
					t.Errorf("%s: %v", data, err)
				}
			})
			synctest.Wait() // it waits, or is with the card
			if goes {
				cancel()
			}
		}
		start := time.Now()
		all.Wait()
		if !slices.Equal(card.served, want) {
			t.Errorf("served were %v, want %v", card.served, want)
		}
		if took := time.Since(start); took != time.Duration(len(want))*card.takes {
			t.Errorf("%d signatures took %v", len(want), took)
		}
	})
}

// The end of the process ends all turns and all waits for one.
func TestQueueEnds(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		card := newTokenThat(time.Hour, 1)
		p := pipeProcess(t, card.serve)
		var all sync.WaitGroup
		for range 10 {
			all.Go(func() {
				if err := p.ask(t.Context(), wire.TokenInfo{}, "data"); !errors.Is(err, ErrGone) {
					t.Error(err)
				}
			})
		}
		synctest.Wait()
		p.Kill(ErrGone)
		all.Wait()
		if err := p.ask(t.Context(), wire.TokenInfo{}, "data"); !errors.Is(err, ErrGone) {
			t.Error(err)
		}
		time.Sleep(20 * time.Hour) // the card comes to an end, too
	})
}
