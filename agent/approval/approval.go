// Package approval decides whether a request may use a key. It applies the rules of the
// configuration, and asks a person. It remembers an answer for as long as the person says.
// When a person has refused requests of a client, it pauses the questions of that client.
//
// It promises that an answer counts only for the use that the person saw: the same key,
// host, user, program and way. The Confirmer shows the question.
package approval

import (
	"cmp"
	"context"
	"crypto/sha256"
	"encoding/binary"
	"errors"
	"fmt"
	"log/slog"
	"slices"
	"strings"
	"sync"
	"time"

	"golang.org/x/crypto/ssh"

	"p11-agent/agent/knownhosts"
	"p11-agent/agent/peer"
	"p11-agent/agent/request"
	"p11-agent/pinentry"
	"p11-agent/pinentry/plain"
	"p11-agent/pinentry/waiting"
)

// A Confirm says when the agent asks a person before a key signs.
type Confirm = request.Confirm

// The values of confirm in the configuration, for a key and for a socket.
const (
	ConfirmNever     Confirm = "never"
	ConfirmForwarded Confirm = "forwarded" // for requests that may come from another host
	ConfirmAlways    Confirm = "always"
	ConfirmFirstUse  Confirm = "first-use" // until the agent forgets the answer
	// ConfirmDeny refuses without a question. Only a Rule has it.
	ConfirmDeny Confirm = "deny"
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

// A Policy says when the agent asks a person before it uses a key. The zero value never
// asks.
type Policy struct {
	Confirm Confirm // empty: never
	Rules   []Rule  // the first rule that matches counts in place of Confirm
}

// A Rule says when the agent asks a person, for the uses of a key that fulfil all
// conditions of the Rule.
//
// A rule with ConfirmNever does not match a forwarded request, unless Forwarded is true.
// Then its Hosts have to match every host on the way as well: each of them could be the
// sender of the request.
type Rule struct {
	// Hosts are patterns for the names of the host that the user logs in to (PATTERNS in
	// ssh_config(5)). If Hosts is nil, the rule matches any use. Otherwise it matches
	// logins only. knownhosts.Known.Fit compares the patterns with the names.
	//
	// The host has to be proved: see Use.ProvenHost. Only a lone "*" matches a host that
	// is not proved, or has no name. If the patterns may mean the host, the rule counts
	// only if it is stricter than the rest of the policy.
	Hosts     []string
	Purposes  []request.Purpose // nil: any
	Programs  []string          // names; one is in the client's chain of processes; nil: any
	Forwarded *bool             // nil: both
	Confirm   Confirm
	Remember  Remember // how long a plain yes counts; for ConfirmFirstUse, Once means UntilLock
}

// A Question asks a person to confirm a use of a key.
type Question struct {
	*request.Use
	Key            request.Key // the key of a token that would sign; nil: it is on no token
	KeyFingerprint string      // the key's fingerprint in the form for people
	Why            string      // why the agent asks at all
	// Asking asks on behalf of the requests that wait for the answer.
	Asking *Asking
	// Plain is how long a yes counts if the person chooses no other length.
	Plain Remember
	// Offer says that the Confirmer may offer other lengths. Otherwise a choice of the
	// person does not count.
	Offer bool
}

// An Answer is the answer of a person. The zero value is no.
type Answer struct {
	Allowed bool
	For     Remember
}

// A Confirmer asks a person whether a key may be used.
type Confirmer interface {
	// Confirm returns the answer. If the person closes the question, the answer is no.
	// The error says that no prompt can show the question, or that no answer came in
	// time. Confirm ends with ctx. It asks through Question.Asking.
	//
	// If Asking.Again returns true, Confirm offers "no to everything from here". It returns
	// ErrNoToAll when the person chooses that.
	Confirm(ctx context.Context, r Question) (Answer, error)
}

// ErrNoToAll says that a person refuses all requests from the place that this request
// comes from.
var ErrNoToAll error = declinedAllError{}

type declinedAllError struct{}

func (declinedAllError) Error() string  { return "a person has refused everything from there" }
func (declinedAllError) Declined() bool { return true }

// A DeniedError says that the configuration refuses a use.
type DeniedError struct{ Why string }

func (e *DeniedError) Error() string { return e.Why + " refuses it" }

// A decision is the result of the rules for a use.
type decision struct {
	confirm Confirm // ConfirmNever, ConfirmAlways or ConfirmDeny
	plain   Remember
	rule    int     // the number of the rule that decides; 0: no rule does
	word    Confirm // of the configuration, if no rule decides
	socket  string  // the name of the socket that has the word; empty: the policy has it
}

// why names the part of the configuration that decides.
func (d *decision) why() string {
	if d.rule > 0 {
		return fmt.Sprintf("rule %d of the key in the configuration", d.rule)
	}
	if d.socket != "" {
		return fmt.Sprintf("confirm = %q of the socket %s", d.word, d.socket)
	}
	return fmt.Sprintf("confirm = %q in the configuration", d.word)
}

// decide applies the rules to a use.
func (a *Policy) decide(u *request.Use) decision {
	confirm := cmp.Or(a.Confirm, ConfirmNever)
	d := decision{word: confirm}
	d.set(confirm, Once, u)
	// A rule that may match permits nothing, but it may forbid.
	var may []decision
rules:
	for i, r := range a.Rules {
		m := decision{rule: i + 1}
		m.set(r.Confirm, r.Remember, u)
		switch r.matches(u) {
		case knownhosts.Yes:
			d = m
			break rules
		case knownhosts.Maybe:
			may = append(may, m)
		case knownhosts.No:
		}
	}
	for _, m := range may {
		d = d.stricter(m)
	}
	return d
}

// decideSocket applies confirm of the client's socket to a use.
func decideSocket(u *request.Use) decision {
	socket := u.Caller.Socket
	if socket == nil {
		return decision{confirm: ConfirmNever}
	}
	d := decision{word: cmp.Or(socket.Confirm, ConfirmNever), socket: socket.Name}
	d.set(d.word, Once, u)
	return d
}

// set decides about a use by a word of the configuration.
func (d *decision) set(confirm Confirm, plain Remember, u *request.Use) {
	switch confirm {
	case ConfirmNever, ConfirmDeny:
	case ConfirmForwarded:
		confirm = ConfirmNever
		if u.Caller.Forwarded {
			confirm = ConfirmAlways
		}
	case ConfirmFirstUse:
		confirm, plain = ConfirmAlways, cmp.Or(plain, UntilLock)
	default: // also an unknown text
		confirm = ConfirmAlways
	}
	d.confirm, d.plain = confirm, plain
}

// stricter returns the decision that permits less.
func (d decision) stricter(o decision) decision {
	order := []Confirm{ConfirmNever, ConfirmAlways, ConfirmDeny}
	switch c := cmp.Compare(slices.Index(order, o.confirm), slices.Index(order, d.confirm)); {
	case c > 0, c == 0 && o.plain.shorter(d.plain):
		return o
	}
	return d
}

// matches tells whether a use fulfils all conditions of the rule.
func (r *Rule) matches(u *request.Use) knownhosts.Fit {
	switch {
	case r.Purposes != nil && !slices.Contains(r.Purposes, u.Content.Purpose()),
		r.Forwarded != nil && *r.Forwarded != u.Caller.Forwarded,
		r.Forwarded == nil && r.Confirm == ConfirmNever && u.Caller.Forwarded:
		return knownhosts.No
	}
	if r.Programs != nil {
		named := false
		for _, link := range u.Caller.Client().Chain {
			named = named || slices.Contains(r.Programs, link.Name)
		}
		if !named {
			return knownhosts.No
		}
	}
	return r.matchesHosts(u)
}

func (r *Rule) matchesHosts(u *request.Use) knownhosts.Fit {
	if r.Hosts == nil {
		return knownhosts.Yes
	}
	if u.Login == nil {
		return knownhosts.No
	}
	host, _ := u.ProvenHost()
	all := fit(u, r.Hosts, host)
	if host == nil {
		if claimed := u.Where().Key; claimed != nil {
			all = max(all, min(fit(u, r.Hosts, claimed), knownhosts.Maybe))
		}
	}
	if r.Confirm == ConfirmNever {
		for _, b := range u.Caller.Binds {
			if b.Forwarding {
				all = min(all, fit(u, r.Hosts, b.HostKey))
			}
		}
	}
	return all
}

// fit tells whether patterns mean the host with this key. If key is nil, only a lone "*"
// does. A revoked key proves nothing.
func fit(u *request.Use, patterns []string, key ssh.PublicKey) knownhosts.Fit {
	var known request.HostName
	if key != nil && u.Hosts != nil {
		known = u.Hosts.HostName(key, u.Caller.Client())
	}
	if known.Revoked {
		return max(min(known.Fit(patterns), knownhosts.Maybe), request.HostName{}.Fit(patterns))
	}
	return known.Fit(patterns)
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

// over tells whether a yes of this age has ended. running is its age by the monotonic
// clock, which stands still while the machine sleeps. wall is its age by the wall clock,
// which a person may set back. Neither makes the yes last longer.
func (r Remember) over(running, wall time.Duration) bool {
	return r != UntilLock && (running >= time.Duration(r) || wall >= time.Duration(r) || wall < 0)
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

// decide applies the configuration to a use. If the key is on several tokens, the
// strictest policy counts.
func decide(u *request.Use, t *request.Target, policy func(request.Key) Policy) decision {
	if policy == nil {
		return decision{confirm: ConfirmNever}
	}
	of := func(key request.Key) decision {
		p := policy(key)
		return p.decide(u)
	}
	if len(t.Homes) == 0 {
		return of(nil)
	}
	d := of(t.Homes[0])
	for _, home := range t.Homes[1:] {
		d = d.stricter(of(home))
	}
	return d
}

// An Approver decides whether a key may be used. It asks a person where a policy, a
// socket or a constraint says so, and remembers the answers. Any goroutine may call its
// methods.
type Approver struct {
	// Confirm asks a person; nil: there is no way to ask.
	Confirm Confirmer
	// Questions decides whether the agent may ask a person.
	Questions *Questions
	// Log gets a line for each answer that lasts.
	Log *slog.Logger

	kept remembered
}

// Approve returns nil if the request may use the key. Otherwise the error says why not.
// Approve waits for the person as long as ctx lasts.
//
// policy returns the policy of a key of a token. For nil, it returns the policy of keys on
// no token. If policy is nil, no policy asks a person. each says why the agent asks for
// each use. If each is empty, the agent asks if the socket or the policy says so.
func (a *Approver) Approve(ctx context.Context, u *request.Use, t *request.Target, policy func(request.Key) Policy, each string) error {
	d := decide(u, t, policy)
	if d.confirm == ConfirmDeny {
		return &DeniedError{Why: d.why()}
	}
	why := each
	atSocket := decideSocket(u)
	d = d.stricter(atSocket)
	switch {
	case why != "":
	case atSocket.confirm == ConfirmAlways && atSocket.plain == Once:
		// A yes at such a socket counts for one signature.
		why = atSocket.why()
	case u.Unlimited && !u.PINPays:
		return a.ApproveLoss(ctx, u, t)
	case d.confirm == ConfirmNever:
		return nil
	}
	name, ok := sameness(u, t.ID)
	if why != "" || !ok {
		return a.ask(ctx, nil, Question{Use: u, Key: t.Home(), KeyFingerprint: t.Fingerprint, Why: cmp.Or(why, d.why())}).error()
	}
	return a.askOnce(ctx, u, t, d, name)
}

// askOnce asks a person unless an earlier answer counts. Requests with the same name share
// a question.
func (a *Approver) askOnce(ctx context.Context, u *request.Use, t *request.Target, d decision, name string) error {
	if a.kept.has(name, t) {
		return nil
	}
	answer, err := a.kept.asking.Do(ctx, name, func(ctx context.Context, list *waiting.List) (Answer, error) {
		if a.kept.has(name, t) {
			return Answer{Allowed: true}, nil
		}
		generation := a.kept.now()
		said := a.ask(ctx, list, Question{Use: u, Key: t.Home(), KeyFingerprint: t.Fingerprint, Why: d.why(), Plain: d.plain, Offer: true})
		if said.Allowed && said.For != Once {
			a.kept.keep(name, t, u, said.For, generation)
			a.Log.Info("allowed for longer", "result", "ok", "key", t.Fingerprint, "comment", u.Comment, "what", u.Content.String(),
				"lasts", said.For.String(), "client", u.Caller.Client().String(), "forwarded", u.Caller.Forwarded)
		}
		return said.Answer, said.err
	})
	return asked{answer, err}.error()
}

// ApproveLoss asks a person whether a request may use a key without the limits that the
// key had before it was removed.
func (a *Approver) ApproveLoss(ctx context.Context, u *request.Use, t *request.Target) error {
	const why = "the limits that the key had before it was removed"
	return a.ask(ctx, nil, Question{Use: u, Key: t.Home(), KeyFingerprint: t.Fingerprint, Why: why}).error()
}

// Remembered returns the answers that still count, the newest first.
func (a *Approver) Remembered() []Status { return a.kept.list() }

// Forget forgets the answers about keys with these homes, if of returns true for them.
func (a *Approver) Forget(of func(homes []request.Key) bool) {
	a.kept.forget(func(kept answer) bool { return of(kept.homes) })
}

// ForgetKey forgets the answers about the key with this Target.ID.
func (a *Approver) ForgetKey(id string) { a.kept.forgetIdentity(id) }

// ForgetAll forgets all answers.
func (a *Approver) ForgetAll() { a.kept.forgetAll() }

// asked is the result of a question: an answer or an error.
type asked struct {
	Answer
	err error
}

func (a asked) error() error {
	switch {
	case a.err != nil:
		return a.err
	case !a.Allowed:
		return ErrDeclined
	}
	return nil
}

// ask asks a person. requests asks on behalf of the requests that wait for the answer; nil: one
// request.
func (a *Approver) ask(ctx context.Context, requests waiting.Requests, q Question) asked {
	if a.Confirm == nil {
		return asked{err: ErrNoPrompt}
	}
	var answer Answer
	q.Asking = a.Questions.About(q.KeyFingerprint, requests, true)
	err := q.Asking.Show(ctx, func(ctx context.Context) (_ Outcome, err error) {
		answer, err = a.Confirm.Confirm(ctx, q)
		return OutcomeOf(answer.Allowed, err), err
	})
	if err != nil {
		return asked{err: fmt.Errorf("ask for confirmation: %w", err)}
	}
	if answer.For < UntilLock {
		answer.For = Once
	}
	return asked{Answer: answer}
}

// OutcomeOf returns the Outcome of a question for yes or no. err is the error of the
// prompt.
func OutcomeOf(yes bool, err error) Outcome {
	switch {
	case err == nil && yes:
		return OutcomeYes
	case err == nil, errors.Is(err, pinentry.ErrTimeout):
		return OutcomeNo
	case errors.Is(err, ErrNoToAll):
		return OutcomeNoToAll
	}
	return Unanswered
}
