package daemon

import (
	"cmp"
	"context"
	"log/slog"
	"os"
	"slices"
	"strings"
	"sync/atomic"
	"time"

	"p11-agent/agent/audit"
	"p11-agent/agent/request"
	"p11-agent/cmd/p11-agent/config"
	"p11-agent/cmd/p11-agent/prompt"
	"p11-agent/cmd/p11-agent/status"
	"p11-agent/pinentry/notify"
	"p11-agent/systemd/bus"
	"p11-agent/systemd/login1"
	"p11-agent/token"
	"p11-agent/token/retention"
)

// notices are notifications on the desktop: of tokens that work for long, and of failures.
type notices struct {
	*notify.Notifier
	failures atomic.Bool // failure-notice
}

func newNotices(c *config.File, log *slog.Logger) *notices {
	n := &notices{Notifier: notify.New(notify.Options{
		Title: "Waiting for the token: touch it if it blinks",
		After: c.TouchNotice.After(), Bus: bus.Session, Log: log,
	})}
	n.configure(c)
	return n
}

// configure takes the values of the configuration.
func (n *notices) configure(c *config.File) {
	n.SetAfter(c.TouchNotice.After())
	n.failures.Store(c.FailureNotice == nil || *c.FailureNotice)
}

// failed is [agent.Options] Failed. ssh itself says no more than "agent refused operation".
func (n *notices) failed(e audit.Event) {
	title := map[request.Action]string{
		request.ActionSign: "p11-agent: refused to sign", request.ActionAdd: "p11-agent: refused to add a key",
	}[e.Action]
	if title == "" || !n.failures.Load() {
		return
	}
	lines := []string{e.Reason}
	if key := cmp.Or(e.Comment, e.URI, e.Key); key != "" {
		lines = append(lines, "Key: "+status.ShortURI(key))
	}
	// The client is not part of the key: its process differs from one try to the next.
	n.Tell(strings.Join(lines, "\n"), title, append(lines, prompt.Requester(e.Client)))
}

// elsewhere tells that a client waits for a prompt of another client.
func (n *notices) elsewhere(key string, lines []string) {
	if n.failures.Load() {
		n.Tell(key, "p11-agent: a program waits for a prompt that is elsewhere", lines)
	}
}

// working is [token.Options] Working.
func (n *notices) working(ctx context.Context, k *token.Key) (done func()) {
	return n.Begin(k.Token(), func() []string {
		use := request.UseFrom(ctx)
		return slices.Concat([]string{prompt.TokenLine(k.Token(), k.TokenReader()), prompt.KeyLine(k.Token(), k.Label(), k.URI(), k.ID(), use)},
			prompt.UseLines(use), []string{prompt.Requester(request.PeerFrom(ctx))})
	})
}

// watchLogin1 watches for sleep and the screen lock. It calls forget at both.
func watchLogin1(c *config.File, store *token.Store, forget func(retention.Event), log *slog.Logger) *login1.Watch {
	// A module that takes longer to log out is stopped. Sleep waits for a shorter time.
	const lockTimeout, wakeTimeout = 10 * time.Second, 30 * time.Second
	within := func(d time.Duration, f func(context.Context)) func(context.Context) {
		return func(ctx context.Context) {
			ctx, cancel := context.WithTimeout(ctx, d)
			defer cancel()
			f(ctx)
		}
	}
	w := login1.New(login1.Options{
		Bus: bus.System(), UID: os.Geteuid(),
		Sleep: func(ctx context.Context) {
			forget(retention.Sleep)
			store.Forget(ctx, retention.Sleep)
		},
		Lock: within(lockTimeout, func(ctx context.Context) {
			forget(retention.ScreenLock)
			store.Forget(ctx, retention.ScreenLock)
		}),
		Wake: within(wakeTimeout, func(ctx context.Context) {
			if err := store.Rescan(ctx); err != nil {
				log.Debug("not all tokens were looked at after sleep", "reason", err)
			}
		}),
		Log: log,
	})
	w.Delay(c.ForgetsAtSleep())
	return w
}
