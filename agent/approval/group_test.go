package approval

import (
	"context"
	"errors"
	"fmt"
	"testing"
	"testing/synctest"

	"p11-agent/agent/peer"
	"p11-agent/agent/request"
	"p11-agent/agent/sshkey/keytest"
	"p11-agent/pinentry/waiting"
)

// Refusals for clients of a [[socket]] cost clients of the agent's own socket nothing,
// whether or not they play hosts that the agent is forwarded to.
func TestAttack10GroupOfASocket(t *testing.T) {
	for _, forwarded := range []bool{false, true} {
		synctest.Test(t, func(t *testing.T) {
			q, shown := NewQuestions(), 0
			// Each time it is another program or host.
			refused := func(n int, socket *request.Socket) (paused bool) {
				c := &request.Caller{Peer: peer.Peer{Known: true, UID: 1000}, Socket: socket}
				if forwarded {
					c.Binds = []request.Bind{{HostKey: keytest.New(t).Public, Forwarding: true}}
					c.Forwarded, c.Peer = true, peer.Peer{}
				} else {
					c.Peer.Chain = []peer.Process{{Name: fmt.Sprint(n)}}
				}
				a := q.About("a key", nil, false)
				err := a.Show(c.Context(t.Context()), func(ctx context.Context) (Outcome, error) {
					return OutcomeNo, a.Ask(ctx, waiting.Question{Ask: func(context.Context) error { shown++; return nil }})
				})
				_, paused = errors.AsType[*PausedError](err)
				return paused
			}
			for n := range 30 {
				refused(n, &request.Socket{Name: "box"})
			}
			if shown != maxNos {
				t.Errorf("forwarded %v: %d questions for the socket", forwarded, shown)
			}
			if refused(30, nil) {
				t.Errorf("forwarded %v: the agent's own socket is paused, too", forwarded)
			}
		})
	}
}
