package agent

import (
	"cmp"
	"context"
	"errors"
	"log/slog"
	"slices"
	"strings"
	"sync"
	"time"

	"golang.org/x/crypto/ssh"

	"p11-agent/agent/approval"
	"p11-agent/agent/peer"
	"p11-agent/agent/request"
	"p11-agent/pinentry/plain"
)

// A Result is what became of a request.
type Result string

// The results.
const (
	ResultOK      Result = "ok"
	ResultRefused Result = "refused"
	// ResultCancelled is that of a request whose client hung up.
	ResultCancelled Result = "cancelled"
)

const (
	// What is kept of each kind of requests, so that none pushes out another: signatures,
	// changes, and requests that were not granted. Of the latter two, one way may have a
	// fifth, and one group three fifths.
	maxSigned, maxChanged, maxFailures = 200, 100, 50
	// maxUses bounds of how many keys it is known when they were used.
	maxUses = 4096
)

// An Event is a request that was answered: one that used or was to use a key, or
// that changed what the agent holds. Its texts are printable and bounded, and none
// of them is secret.
type Event struct {
	Time time.Time     // of the answer
	Took time.Duration // what a person took included
	// Count is how many requests of one client the event stands for, 1 or more: it is the
	// last of them. First is when the first was answered.
	Count int
	First time.Time
	// Various says that they were different requests, about different keys, or refused
	// for different reasons.
	Various bool

	Request request.Action
	Result  Result
	Reason  string // why it was not granted
	Note    string // what else there is to say of it

	Key     string // the fingerprint; empty: it is not about one key
	Comment string // of the identity
	// URI is that of the key on the token that signed or was to, or what the client
	// named: a URI without its secrets, or the path of a module.
	URI       string
	Kind      request.Kind // empty: nothing was to be signed
	Purpose   request.Purpose
	Namespace string
	User      string // who was to be logged in
	Host      string // where, by its name, or its key's fingerprint
	Upstream  string // the agent that has the key, if it is not this one

	Forwarded  bool
	Via        []string // the hosts that it was forwarded by, the nearest first
	Client     peer.Peer
	Connection uint64
}

// record is a request that is being answered, and will be an Event.
type record struct {
	Event
	start time.Time
	use   *request.Use // nil once the event has the names of hosts
	id    *identity    // that the request is about, until it is logged; nil: none
	told  bool         // the client shows the reason to whoever waits

	naming sync.Once
}

// begin makes the record of a request, of which there is nothing to sign.
func (k *Keyring) begin(c *request.Caller, action request.Action) *record {
	return k.beginUse(action, k.use("", nil, c, request.Sign{}))
}

func (k *Keyring) beginUse(action request.Action, use *request.Use) *record {
	c := use.Caller
	return &record{
		Event: Event{Request: action, Forwarded: c.Forwarded, Connection: c.Number},
		start: time.Now(), use: use,
	}
}

// about notes which identity the request is about.
func (r *record) about(id *identity) {
	r.id, r.Key, r.Comment = id, id.Fingerprint, id.Comment
	if len(id.Homes) > 0 {
		r.URI = id.Homes[0].URI()
	}
}

// event returns the event once the request is answered, with the names of hosts.
// They are found when somebody wants them: it reads files, and the client need not
// wait for it. What the request came with is of no more use then.
func (r *record) event() *Event {
	r.naming.Do(func() {
		if r.use.Login != nil || r.Forwarded {
			r.Host, r.Via = hosts(r.use)
		}
		r.use = nil
	})
	return &r.Event
}

// audit is the memory of what was answered. The zero value is empty.
type audit struct {
	mu       sync.Mutex
	signed   ring
	changed  folds
	failures folds
	uses     map[string]uses // by the fingerprint of the key
}

// uses is how often a key has signed, and when it did last.
type uses struct {
	count uint64
	last  time.Time
}

// ring keeps the last requests that were answered.
type ring struct {
	all  []*record
	next int // where the next one goes, once it is full
}

func (r *ring) add(one *record, limit int) {
	if len(r.all) < limit {
		r.all = append(r.all, one)
		return
	}
	r.all[r.next] = one
	r.next = (r.next + 1) % limit
}

// newest returns them, the newest first.
func (r *ring) newest() []*record {
	all := slices.Concat(r.all[r.next:], r.all[:r.next])
	slices.Reverse(all)
	return all
}

// folds keeps the last requests of which one client may have made many: some of
// those stand for others, too.
type folds []*fold // the oldest first; none is changed

// fold is requests from one way.
type fold struct {
	way     request.Origin
	kind    foldKind
	last    *record
	count   int
	first   time.Time
	various bool // they are not of one kind
}

// foldKind is what makes requests the same.
type foldKind struct {
	request     request.Action
	result      Result
	key, reason string
}

// add adds a request, of at most limit. Where same is set, those of one kind are kept
// once. Of a way, or a group, that has many of different kinds, the last one stands
// for those that follow.
func (f *folds) add(r *record, limit int, same bool) {
	one := &fold{
		way: r.use.Caller.Origin(), last: r, count: 1, first: r.Time,
		kind: foldKind{r.Request, r.Result, r.Key, withoutNumbers(r.Reason)},
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

// withoutNumbers replaces each number in a text: when a pause ends, for example.
func withoutNumbers(text string) string {
	return strings.Join(strings.FieldsFunc(text, func(r rune) bool { return r >= '0' && r <= '9' }), "0")
}

// eventsOf returns the events of records and of folds, the newest first.
func eventsOf(records []*record, folded folds) (all []Event) {
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

func (a *audit) add(r *record) {
	e := &r.Event
	a.mu.Lock()
	defer a.mu.Unlock()
	switch {
	case e.Result != ResultOK:
		a.failures.add(r, maxFailures, true)
		return
	case e.Request != request.ActionSign:
		a.changed.add(r, maxChanged, false)
		return
	}
	a.signed.add(r, maxSigned)
	if a.uses == nil {
		a.uses = make(map[string]uses)
	}
	u, known := a.uses[e.Key]
	if !known && len(a.uses) >= maxUses {
		// Keys in memory come and go.
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

// end makes an Event of a request, which is answered with err: it is kept, and
// logged in one line. Nothing else says what became of a request. The line about a
// signature that was made is what its client need not wait for.
func (k *Keyring) end(r *record, err error) {
	e := &r.Event
	e.Time = time.Now()
	e.Took = e.Time.Sub(r.start)
	e.Count, e.First = 1, e.Time
	switch {
	case err == nil:
		e.Result = ResultOK
	case errors.Is(err, context.Canceled):
		e.Result, e.Reason = ResultCancelled, errHungUp.Error()
	default:
		e.Result, e.Reason = ResultRefused, plain.LineWithin(strings.ReplaceAll(err.Error(), "\n", "; "), request.MaxReason)
	}
	if content := r.use.Content; content.Kind != "" {
		e.Kind, e.Purpose, e.Namespace = content.Kind, content.Purpose(), plain.LineWithin(content.Namespace, request.MaxField)
		if r.use.Login != nil {
			e.User = plain.LineWithin(r.use.Login.User, request.MaxField)
		}
	}
	e.Comment, e.URI = plain.LineWithin(e.Comment, request.MaxField), plain.LineWithin(e.URI, request.MaxField)
	c := r.use.Caller
	e.Client = c.Who() // who may have gone once there is an answer
	k.audit.add(r)
	if err == nil && e.Request == request.ActionSign && c.Later != nil {
		c.Later(func() { k.logEvent(r) })
		return
	}
	k.logEvent(r)
	if k.opts.Failed != nil && e.Result == ResultRefused && !r.told && !e.Forwarded && !approval.Declined(err) {
		k.opts.Failed(*r.event())
	}
}

// logEvent writes the one line about a request.
func (k *Keyring) logEvent(r *record) {
	e, id := r.event(), r.id
	r.id = nil
	level, message := slog.LevelInfo, e.Request.Done()
	switch {
	case e.Result == ResultRefused:
		level, message = slog.LevelWarn, "request refused"
	case e.Result == ResultCancelled:
		message = "request refused"
	case e.Note != "":
		level = slog.LevelWarn
	}
	ctx := context.Background()
	if !k.log.Enabled(ctx, level) {
		return
	}
	line := slog.NewRecord(e.Time, level, message, 0)
	attrs := make([]slog.Attr, 0, 20)
	text := func(name, value string) {
		if value != "" {
			attrs = append(attrs, slog.String(name, value))
		}
	}
	handler, begun := k.begun(id, e)
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

// appendBeginning adds what is said of a request first: what it is about.
func (e *Event) appendBeginning(attrs []slog.Attr) []slog.Attr {
	text := func(name, value string) {
		if value != "" {
			attrs = append(attrs, slog.String(name, value))
		}
	}
	text("request", string(e.Request))
	text("key", e.Key)
	if e.Comment != e.URI {
		text("comment", e.Comment)
	}
	text("uri", e.URI)
	return attrs
}

// A beginning is what the lines about signatures with an identity begin with, as the
// handler of the log has it: half of what a line costs is to quote a URI.
type beginning struct {
	once    sync.Once
	uri     string // with which that is so
	handler slog.Handler
}

// begun returns the handler for a line about an identity, which may be nil, and
// whether it has the beginning already.
func (k *Keyring) begun(id *identity, e *Event) (handler slog.Handler, begun bool) {
	if id == nil || e.Request != request.ActionSign {
		return k.log.Handler(), false
	}
	b := &id.beginning
	b.once.Do(func() { b.uri, b.handler = e.URI, k.log.Handler().WithAttrs(e.appendBeginning(nil)) })
	if b.uri != e.URI { // it has several homes
		return k.log.Handler(), false
	}
	return b.handler, true
}

// Refuse notes that the door has refused a request of its own accord, as one that
// cannot be read. The reason quotes nothing that may be a secret.
func (k *Keyring) Refuse(c *request.Caller, request request.Action, reason error) {
	k.end(k.begin(c, request), reason)
}

// hosts names the host that a use is at, and those that it came by.
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

// A Status is what the keyring knows of itself.
type Status struct {
	// Locked tells that the agent is locked; then nothing else is told.
	Locked    bool
	Keys      []KeyStatus // in the order of the list
	Upstreams []UpstreamStatus
	Approvals []approval.Status // the newest first
	Pauses    []approval.Pause  // the longest first
	Events    []Event           // the newest first, with those that were not granted
	Failures  []Event           // those of them that were refused
}

// A KeyStatus tells of an identity.
type KeyStatus struct {
	Key         ssh.PublicKey // may be a certificate
	Fingerprint string        // of the key, or of what it certifies
	Comment     string
	Homes       []request.Key // on tokens, the one that is used first in front
	Software    bool          // it is in memory
	Confirm     bool
	Limited     bool      // to destinations
	Expires     time.Time // zero: it does not
	LastUse     time.Time // zero: it was not used since the agent has started
	Signatures  uint64    // since then; those with a certificate of the key count, too
	Identity    Identity  // as it is listed
}

// An UpstreamStatus tells of another agent.
type UpstreamStatus struct {
	Name    string
	Keys    int    // when it was asked last
	Trouble string // why it could not be, empty when it could
}

// Now tells how the keyring fares. It waits for nobody.
func (k *Keyring) Now() Status {
	if k.lock.locked() {
		return Status{Locked: true}
	}
	v := k.now()
	s := Status{Approvals: k.approver.Remembered(), Pauses: k.opts.Questions.Pauses()}
	k.audit.mu.Lock()
	signed, folded := k.audit.signed.newest(), slices.Concat(k.audit.changed, k.audit.failures)
	for i, id := range v.identities {
		used := k.audit.uses[id.Fingerprint]
		s.Keys = append(s.Keys, KeyStatus{
			Key: id.key, Fingerprint: id.Fingerprint, Comment: plain.LineWithin(id.Comment, request.MaxField), Homes: id.Homes,
			Software: id.software != nil, Confirm: id.limits.confirm, Limited: id.limits.route(),
			Expires: id.limits.expires, LastUse: used.last, Signatures: used.count, Identity: v.list.Identities[i],
		})
	}
	k.audit.mu.Unlock()
	slices.Reverse(folded)
	s.Events = eventsOf(signed, folded)
	for _, e := range s.Events {
		if e.Result == ResultRefused {
			s.Failures = append(s.Failures, e)
		}
	}
	k.mu.Lock()
	defer k.mu.Unlock()
	for _, u := range k.opts.Upstreams {
		up := UpstreamStatus{Name: u.Name(), Trouble: plain.LineWithin(k.troubles[u.Name()], request.MaxReason)}
		for _, origin := range k.origins {
			if origin == u {
				up.Keys++
			}
		}
		s.Upstreams = append(s.Upstreams, up)
	}
	return s
}

// sooner returns the earlier of two times that are set.
func sooner(a, b time.Time) time.Time {
	if a.IsZero() || !b.IsZero() && b.Before(a) {
		return cmp.Or(b, a)
	}
	return a
}
