package approval

import (
	"crypto/sha256"
	"encoding/binary"
	"fmt"
	"slices"
	"strings"
	"sync"
	"time"

	"p11-agent/agent/peer"
	"p11-agent/agent/request"
	"p11-agent/pinentry/plain"
	"p11-agent/pinentry/waiting"
)

// A Remember is how long a yes counts for further signatures of the same kind. It is a
// length of time, or Once, or UntilLock.
type Remember time.Duration

// The special lengths.
const (
	// Once means that a yes counts for one signature, and for those that wait with it.
	Once Remember = 0
	// UntilLock lasts until ssh-add -x or -D, or until the Approver forgets the answer.
	UntilLock Remember = -1
)

// shorter tells whether r ends before o.
func (r Remember) shorter(o Remember) bool { return r != UntilLock && (o == UntilLock || r < o) }

// String returns the length in words for a person.
func (r Remember) String() string {
	switch r {
	case Once:
		return "once"
	case UntilLock:
		return "until lock"
	}
	text := time.Duration(r).String()
	if t, ok := strings.CutSuffix(text, "m0s"); ok {
		text = t + "m"
	}
	if t, ok := strings.CutSuffix(text, "h0m"); ok {
		text = t + "h"
	}
	return "for " + text
}

// over tells whether a yes of this age has ended. running is its age by the monotonic
// clock, which stands still while the machine sleeps. wall is its age by the wall clock,
// which a person may set back. Neither makes the yes last longer.
func (r Remember) over(running, wall time.Duration) bool {
	return r != UntilLock && (running >= time.Duration(r) || wall >= time.Duration(r) || wall < 0)
}

// sameness returns a name that two uses share if a yes to one counts for the other. The
// name depends on the identity, the kind of data, the host, the user, the names of the
// programs and the way. If the agent does not know these well enough, ok is false. Then a
// yes counts for the request itself only.
func sameness(u *request.Use, identity string) (name string, ok bool) {
	c, who := u.Caller, u.Caller.Client()
	host, consistent := u.ProvenHost()
	switch {
	case u.Content.Kind == request.KindUnknown || u.Content.Kind == "", !consistent, c.BindFailed,
		!who.Known || len(who.Chain) == 0,
		u.Login != nil && host == nil && c.Forwarded:
		return "", false
	}
	h := sha256.New()
	add := func(b []byte) {
		h.Write(binary.BigEndian.AppendUint64(nil, uint64(len(b))))
		h.Write(b)
	}
	add([]byte(identity))
	add([]byte(u.Content.Kind))
	add([]byte(u.Content.Namespace))
	add([]byte(u.Content.Detail))
	if u.Login != nil {
		add([]byte(u.Login.User))
	}
	if host != nil {
		add(host.Marshal())
	}
	add(fmt.Appendf(nil, "%t %d", c.Forwarded, who.UID))
	if c.Socket != nil {
		add([]byte(c.Socket.Name))
	}
	for _, b := range c.Binds {
		if b.Forwarding {
			add(b.HostKey.Marshal())
		}
	}
	add(nil)
	for _, name := range request.ProgramNames(who) {
		add([]byte(name))
	}
	return string(h.Sum(nil)), true
}

// maxRemembered bounds the number of remembered answers.
const maxRemembered = 1024

// remembered holds the answers that count for more than one signature. The zero value is
// ready to use.
type remembered struct {
	asking waiting.Group[Answer] // by sameness

	mu sync.Mutex
	// generation counts the calls of forget. If the generation changes during a question,
	// the agent does not remember its answer.
	generation uint64
	kept       map[string]answer // by sameness
}

// An answer is a remembered yes.
type answer struct {
	wire  string // of the identity
	homes []request.Key
	// insertions is the sum over all tokens of the key. away says that no token was
	// present: the signature waits for the next insertion.
	insertions uint64
	away       bool
	since      time.Time
	lasts      Remember
	status     Status // for people
}

// insertionsOf adds up how often each token of an identity has appeared.
func insertionsOf(t *request.Target) (n uint64) {
	for _, key := range t.Homes {
		n += key.Insertions()
	}
	return n
}

// over tells whether the answer has ended.
func (a *answer) over(now time.Time) bool {
	return a.lasts.over(now.Sub(a.since), now.Round(0).Sub(a.since.Round(0)))
}

// has tells whether a yes of this name counts. The yes ends when a token of the identity
// is inserted again.
func (a *remembered) has(name string, t *request.Target) bool {
	a.mu.Lock()
	defer a.mu.Unlock()
	kept, ok := a.kept[name]
	if !ok {
		return false
	}
	insertions := insertionsOf(t)
	if kept.away && insertions == kept.insertions+1 {
		kept.away, kept.insertions = false, insertions
		a.kept[name] = kept
	}
	if kept.over(time.Now()) || insertions != kept.insertions {
		delete(a.kept, name)
		return false
	}
	return true
}

func (a *remembered) now() (generation uint64) {
	a.mu.Lock()
	defer a.mu.Unlock()
	return a.generation
}

// keep remembers a yes. generation is that of the start of the question.
func (a *remembered) keep(name string, t *request.Target, u *request.Use, lasts Remember, generation uint64) {
	a.mu.Lock()
	defer a.mu.Unlock()
	if generation != a.generation {
		return
	}
	now := time.Now()
	if a.kept == nil {
		a.kept = make(map[string]answer)
	}
	if len(a.kept) >= maxRemembered {
		oldest := ""
		for name, kept := range a.kept {
			if kept.over(now) {
				delete(a.kept, name)
			} else if oldest == "" || kept.since.Before(a.kept[oldest].since) {
				oldest = name
			}
		}
		if len(a.kept) >= maxRemembered {
			delete(a.kept, oldest)
		}
	}
	a.kept[name] = answer{
		wire: t.ID, homes: t.Homes, insertions: insertionsOf(t), since: now, lasts: lasts,
		away: len(t.Homes) > 0 && !slices.ContainsFunc(t.Homes, request.Key.Present),
		status: Status{
			Fingerprint: t.Fingerprint, Comment: plain.LineWithin(t.Comment, request.MaxField), What: plain.LineWithin(u.What(), request.MaxReason),
			Forwarding: plain.LineWithin(u.Forwarding(), request.MaxField), Client: u.Caller.Client(), Since: now,
		},
	}
}

// A Status describes an answer that counts for more than one signature.
type Status struct {
	Fingerprint string // of the key
	Comment     string // of the identity
	What        string // the use that it allows
	Forwarding  string // the way that requests come; empty: they are not forwarded
	Client      peer.Peer
	Since       time.Time
	Ends        time.Time // zero: when the Approver forgets the answer
}

// list returns the answers that still count, the newest first.
func (a *remembered) list() (all []Status) {
	a.mu.Lock()
	defer a.mu.Unlock()
	now := time.Now()
	for _, kept := range a.kept {
		if kept.over(now) {
			continue
		}
		if kept.lasts != UntilLock {
			kept.status.Ends = kept.since.Add(time.Duration(kept.lasts))
		}
		all = append(all, kept.status)
	}
	slices.SortFunc(all, func(x, y Status) int { return y.Since.Compare(x.Since) })
	return all
}

// forget forgets the answers for which which returns true.
func (a *remembered) forget(which func(answer) bool) {
	a.mu.Lock()
	defer a.mu.Unlock()
	a.generation++
	for name, kept := range a.kept {
		if which(kept) {
			delete(a.kept, name)
		}
	}
}

func (a *remembered) forgetAll() { a.forget(func(answer) bool { return true }) }

// forgetIdentity forgets the answers for the identity with this wire form.
func (a *remembered) forgetIdentity(wire string) {
	a.forget(func(kept answer) bool { return kept.wire == wire })
}
