// Package audit makes one event of each request that uses or changes keys: a line in the
// log, and an entry for the status.
//
// It promises that events are bounded, printable and without secrets. The events of one
// client do not push out the events of another client. No other package logs the outcome
// of a request. The keyring and the doors define the requests.
package audit

import (
	"context"
	"crypto"
	"errors"
	"log/slog"
	"slices"
	"strings"
	"sync"
	"time"

	"p11-agent/agent/approval"
	"p11-agent/agent/peer"
	"p11-agent/agent/request"
	"p11-agent/pinentry/plain"
)

// A Result is the outcome of a request.
type Result string

// The results.
const (
	OK      Result = "ok"
	Refused Result = "refused"
	// Cancelled says that the client hung up before the answer.
	Cancelled Result = "cancelled"
)

const (
	// These limits bound the events of each kind apart, so that no kind pushes out
	// another: signatures, changes, and requests that failed. Of changes and failures,
	// one way may have a fifth, and one group three fifths.
	maxSigned, maxChanged, maxFailures = 200, 100, 50
	// maxUses bounds the number of keys whose uses the Trail counts.
	maxUses = 4096
)

// An Event is an answered request that uses a key or changes what the agent holds. Its
// texts are printable and bounded, and have no secrets.
type Event struct {
	Time time.Time     // of the answer
	Took time.Duration // with the time that a person took
	// Count is the number of requests that the event stands for, 1 or more. They come
	// from one client, or from one group of clients. The event describes the last of
	// them. First is the time of the answer to the first.
	Count int
	First time.Time
	// Various says that the requests differ in their action, their key, their result or
	// the reason of a refusal.
	Various bool

	Action request.Action
	Result Result
	Reason string // of a refusal
	Note   string // a further remark

	Key string // the fingerprint; empty: the request is not about one key
	// PublicKey is the same key; nil: the agent does not have it.
	PublicKey crypto.PublicKey
	Comment   string // of the identity
	// URI is the URI of the key on a token. If the client names keys itself, URI is what
	// it named: a URI without its secrets, or the path of a module.
	URI       string
	Kind      request.Kind // empty: the request has no data to sign
	Purpose   request.Purpose
	Namespace string
	User      string // the user of the login
	Host      string // the host of the login: its name, or the fingerprint of its key
	Upstream  string // the agent that has the key; empty: this agent

	Forwarded  bool
	Via        []string // the hosts that forwarded the request, the nearest first
	Client     peer.Peer
	Connection uint64
}

// A Record is a request without an answer. End makes an Event of it.
type Record struct {
	Event
	start time.Time
	Use   *request.Use // nil once the event has the names of hosts
	// Told says that the client shows the reason of a refusal to the person.
	Told bool

	prefix *Prefix // nil: none

	naming sync.Once
}

// Begin makes the record of a request for a use.
func (a *Trail) Begin(action request.Action, use *request.Use) *Record {
	c := use.Caller
	return &Record{
		Event: Event{Action: action, Forwarded: c.Forwarded, Connection: c.Number},
		start: time.Now(), Use: use,
	}
}

// About sets the key of the request. prefix is the Prefix of the key's lines in the log,
// and may be nil.
func (r *Record) About(t *request.Target, prefix *Prefix) {
	r.prefix, r.Key, r.PublicKey, r.Comment = prefix, t.Fingerprint, t.PublicKey, t.Comment
	if len(t.Homes) > 0 {
		r.URI = t.Homes[0].URI()
	}
}

// event returns the event of an answered request, with the names of hosts. The first call
// looks up the names. That reads files, so no client waits for it. Afterwards the Record
// forgets the use.
func (r *Record) event() *Event {
	r.naming.Do(func() {
		if r.Use.Login != nil || r.Forwarded {
			r.Host, r.Via = hosts(r.Use)
		}
		r.Use = nil
	})
	return &r.Event
}

// A Trail keeps the last events, and logs each. Any goroutine may call its methods.
type Trail struct {
	log    *slog.Logger
	failed func(Event) // may be nil

	mu       sync.Mutex
	signed   ring
	changed  folds
	failures folds
	uses     map[string]uses // by the fingerprint of the key
}

// uses counts the signatures of a key. last is the time of the last one.
type uses struct {
	count uint64
	last  time.Time
}

// ring keeps the last answered requests.
type ring struct {
	all  []*Record
	next int // where the next record goes, once the ring is full
}

func (r *ring) add(one *Record, limit int) {
	if len(r.all) < limit {
		r.all = append(r.all, one)
		return
	}
	r.all[r.next] = one
	r.next = (r.next + 1) % limit
}

// newest returns the records, the newest first.
func (r *ring) newest() []*Record {
	all := slices.Concat(r.all[r.next:], r.all[:r.next])
	slices.Reverse(all)
	return all
}

// folds keeps the last requests. A fold may stand for many requests of one client.
type folds []*fold // the oldest first; a fold never changes

// fold stands for requests from one way, or from one group.
type fold struct {
	way     request.Origin
	kind    foldKind
	last    *Record
	count   int
	first   time.Time
	various bool // the requests are not all of one kind
}

// foldKind is equal for requests of the same kind.
type foldKind struct {
	request     request.Action
	result      Result
	key, reason string
}

// add adds a request. f keeps at most limit folds. If same is true, the requests of one
// way and one kind share a fold. When a way or a group has too many folds, the new request
// joins its last fold.
func (f *folds) add(r *Record, limit int, same bool) {
	one := &fold{
		way: r.Use.Caller.Origin(), last: r, count: 1, first: r.Time,
		kind: foldKind{r.Action, r.Result, r.Key, withoutNumbers(r.Reason)},
	}
	into, ofWay, ofGroup, fromWay, fromGroup := -1, -1, -1, 0, 0
	for i, old := range *f {
		if old.way.Group != one.way.Group {
			continue
		}
		ofGroup = i
		fromGroup++
		if old.way != one.way {
			continue
		}
		ofWay = i
		fromWay++
		if same && old.kind == one.kind {
			into = i
		}
	}
	switch {
	case into >= 0:
	case fromWay >= limit/5:
		into = ofWay
	case fromGroup >= limit*3/5:
		into = ofGroup
	}
	if into >= 0 {
		old := (*f)[into]
		one.count += old.count
		one.first, one.various = old.first, old.various || old.kind != one.kind
		*f = slices.Delete(*f, into, into+1)
	}
	if len(*f) >= limit {
		*f = slices.Delete(*f, 0, 1)
	}
	*f = append(*f, one)
}

// withoutNumbers replaces each number in a text, such as the time when a pause ends.
func withoutNumbers(text string) string {
	return strings.Join(strings.FieldsFunc(text, func(r rune) bool { return r >= '0' && r <= '9' }), "0")
}

// eventsOf returns the events of records and of folds, the newest first.
func eventsOf(records []*Record, folded folds) (all []Event) {
	for _, r := range records {
		all = append(all, *r.event())
	}
	for _, f := range folded {
		e := *f.last.event()
		e.Count, e.First, e.Various = f.count, f.first, f.various
		all = append(all, e)
	}
	slices.SortStableFunc(all, func(a, b Event) int { return b.Time.Compare(a.Time) })
	return all
}

func (a *Trail) add(r *Record) {
	e := &r.Event
	a.mu.Lock()
	defer a.mu.Unlock()
	switch {
	case e.Result != OK:
		a.failures.add(r, maxFailures, true)
		return
	case e.Action != request.ActionSign:
		a.changed.add(r, maxChanged, false)
		return
	}
	a.signed.add(r, maxSigned)
	if a.uses == nil {
		a.uses = make(map[string]uses)
	}
	u, known := a.uses[e.Key]
	if !known && len(a.uses) >= maxUses {
		// Clients may add and remove many keys in memory.
		oldest := ""
		for key, u := range a.uses {
			if oldest == "" || u.last.Before(a.uses[oldest].last) {
				oldest = key
			}
		}
		delete(a.uses, oldest)
	}
	a.uses[e.Key] = uses{u.count + 1, e.Time}
}

// End makes an Event of a request, keeps the event and logs it in one line. err is the
// answer to the request. The client of a successful signature does not wait for the line.
func (a *Trail) End(r *Record, err error) {
	e := &r.Event
	e.Time = time.Now()
	e.Took = e.Time.Sub(r.start)
	e.Count, e.First = 1, e.Time
	switch {
	case err == nil:
		e.Result = OK
	case errors.Is(err, context.Canceled):
		e.Result, e.Reason = Cancelled, "the client hung up"
	default:
		e.Result, e.Reason = Refused, plain.LineWithin(strings.ReplaceAll(err.Error(), "\n", "; "), request.MaxReason)
	}
	if content := r.Use.Content; content.Kind != "" {
		e.Kind, e.Purpose, e.Namespace = content.Kind, content.Purpose(), plain.LineWithin(content.Namespace, request.MaxField)
		if r.Use.Login != nil {
			e.User = plain.LineWithin(r.Use.Login.User, request.MaxField)
		}
	}
	e.Comment, e.URI = plain.LineWithin(e.Comment, request.MaxField), plain.LineWithin(e.URI, request.MaxField)
	c := r.Use.Caller
	e.Client = c.Client() // the client may end after the answer
	a.add(r)
	if err == nil && e.Action == request.ActionSign && c.Later != nil {
		c.Later(func() { a.logEvent(r) })
		return
	}
	a.logEvent(r)
	if a.failed != nil && e.Result == Refused && !r.Told && !e.Forwarded && !approval.Declined(err) {
		a.failed(*r.event())
	}
}

// logEvent writes the one line about a request.
func (a *Trail) logEvent(r *Record) {
	e, prefix := r.event(), r.prefix
	r.prefix = nil
	level, message := slog.LevelInfo, e.Action.Done()
	switch {
	case e.Result == Refused:
		level, message = slog.LevelWarn, "request refused"
	case e.Result == Cancelled:
		message = "request refused"
	case e.Note != "":
		level = slog.LevelWarn
	}
	ctx := context.Background()
	if !a.log.Enabled(ctx, level) {
		return
	}
	line := slog.NewRecord(e.Time, level, message, 0)
	attrs := make([]slog.Attr, 0, 20)
	text := func(name, value string) {
		if value != "" {
			attrs = append(attrs, slog.String(name, value))
		}
	}
	handler, begun := a.begun(prefix, e)
	if !begun {
		attrs = e.appendBeginning(attrs)
	}
	text("kind", string(e.Kind))
	text("purpose", string(e.Purpose))
	text("namespace", e.Namespace)
	text("user", e.User)
	text("host", e.Host)
	text("upstream", e.Upstream)
	text("result", string(e.Result))
	text("reason", e.Reason)
	text("note", e.Note)
	text("client", e.Client.String())
	if e.Client.Known {
		attrs = append(attrs, slog.Int("uid", e.Client.UID))
	}
	attrs = append(attrs, slog.Bool("forwarded", e.Forwarded))
	text("via", strings.Join(e.Via, " "))
	attrs = append(attrs, slog.Uint64("connection", e.Connection), slog.Duration("duration", e.Took.Round(time.Millisecond)))
	line.AddAttrs(attrs...)
	_ = handler.Handle(ctx, line) // slog.Logger drops this error, too
}

// appendBeginning adds the first fields of a line: the request and its key.
func (e *Event) appendBeginning(attrs []slog.Attr) []slog.Attr {
	text := func(name, value string) {
		if value != "" {
			attrs = append(attrs, slog.String(name, value))
		}
	}
	text("request", string(e.Action))
	text("key", e.Key)
	if e.Comment != e.URI {
		text("comment", e.Comment)
	}
	text("uri", e.URI)
	return attrs
}

// A Prefix is the beginning of the log line of each signature of a key, in the form of the
// log's handler. It saves half of the cost of a line, which is the quoting of the URI. The
// zero value is ready to use.
type Prefix struct {
	once    sync.Once
	uri     string // the URI in it
	handler slog.Handler
}

// begun returns the handler for a line, and whether it has written the beginning already.
// prefix may be nil.
func (a *Trail) begun(prefix *Prefix, e *Event) (handler slog.Handler, begun bool) {
	if prefix == nil || e.Action != request.ActionSign {
		return a.log.Handler(), false
	}
	prefix.once.Do(func() { prefix.uri, prefix.handler = e.URI, a.log.Handler().WithAttrs(e.appendBeginning(nil)) })
	if prefix.uri != e.URI { // the key is on several tokens
		return a.log.Handler(), false
	}
	return prefix.handler, true
}

// Events returns the events, the newest first.
func (a *Trail) Events() []Event {
	a.mu.Lock()
	signed, folded := a.signed.newest(), slices.Concat(a.changed, a.failures)
	a.mu.Unlock()
	slices.Reverse(folded)
	return eventsOf(signed, folded)
}

// Signatures returns how often a key has signed, and the time of the last signature.
// fingerprint names the key.
func (a *Trail) Signatures(fingerprint string) (count uint64, last time.Time) {
	a.mu.Lock()
	defer a.mu.Unlock()
	u := a.uses[fingerprint]
	return u.count, u.last
}

// New returns an empty trail that writes to log. The Trail calls failed for each refused
// request of this machine. It does not if a person has just refused the request in a
// prompt, or if the client shows the reason (Record.Told). failed must not wait, and may be
// nil.
func New(log *slog.Logger, failed func(Event)) *Trail { return &Trail{log: log, failed: failed} }

// hosts names the host of a login, and the hosts that forwarded the request.
func hosts(u *request.Use) (host string, via []string) {
	if h := u.Where(); h.Key != nil {
		host = u.Name(h)
		if !h.Verified {
			host += " (not verified)"
		}
	}
	for _, h := range u.Via() {
		via = append(via, u.Name(h))
	}
	return host, via
}
