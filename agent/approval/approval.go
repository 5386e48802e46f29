// Package approval decides whether a key may be used: by the rules of the configuration,
// and by what a person answers. It remembers answers for as long as the person says, and
// pauses the questions of clients whose requests a person has refused.
//
// It promises that no answer counts for another use than the one that the person saw:
// another key, host, user, program or way. How a person is asked is left to the
// Confirmer.
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
	ConfirmFirstUse  Confirm = "first-use" // until that is forgotten
	// ConfirmDeny refuses without a question. Only a Rule has it.
	ConfirmDeny Confirm = "deny"
)

// A Remember is how long a yes counts for further signatures of the same kind: a length
// of time, or one of the constants.
type Remember time.Duration

// The constants.
const (
	// Once is for the one signature, and for those that wait with it.
	Once Remember = 0
	// UntilLock is until ssh-add -x or -D, or until the Approver forgets the answer.
	UntilLock Remember = -1
)

// shorter tells whether r ends before o.
func (r Remember) shorter(o Remember) bool { return r != UntilLock && (o == UntilLock || r < o) }

// String names it to a person.
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
	Rules   []Rule  // the first that matches counts in place of Confirm
}

// A Rule says when a person is asked for some of the uses of a key: those that
// fulfil all of its conditions.
//
// A rule that says never is for requests that are not forwarded, unless it asks
// for forwarded ones in so many words; and then its Hosts have to match every host
// on the way, too, for each of them could be the one that asks.
type Rule struct {
	// Hosts are patterns for the names of the host that is logged in to (PATTERNS in
	// ssh_config(5)), so that other uses do not match. They are compared as
	// knownhosts.Known.Fit says. The host has to be proved, see Use.provenHost; one
	// that is not, or has no name, is matched by a lone "*". Where the patterns may
	// mean the host, the rule counts only if it is stricter than what counts without
	// it. nil: any use.
	Hosts     []string
	Purposes  []request.Purpose // nil: any
	Programs  []string          // one of them is in the chain of the client's; nil: any
	Forwarded *bool             // nil: both
	Confirm   Confirm
	Remember  Remember // what a plain yes is good for; for ConfirmFirstUse, Once means UntilLock
}

// A Question is what a person is asked to confirm.
type Question struct {
	*request.Use
	Key            request.Key // on a token, that would sign; nil: it is on none
	KeyFingerprint string      // as keys are named to people
	Why            string      // the person is asked at all
	// Plain is what a yes means when nothing else is chosen.
	Plain Remember
	// Offer says that other lengths may be offered. What is chosen counts only then.
	Offer bool
}

// An Answer is what the person says. The zero value is no.
type Answer struct {
	Allowed bool
	For     Remember
}

// A Confirmer asks a person whether a key may be used.
type Confirmer interface {
	// Confirm returns the answer, which is no if the person closes the question. The
	// error says that the question could not be shown, or had no answer in time. Confirm
	// ends with ctx. The Confirmer asks through [waiting.Ask]. If Again returns true, it
	// offers "no to everything from here", for which it returns ErrNoToAll.
	Confirm(ctx context.Context, r Question) (Answer, error)
}

// ErrNoToAll says that a person refuses everything from where a request comes.
var ErrNoToAll error = declinedAllError{}

type declinedAllError struct{}

func (declinedAllError) Error() string  { return "a person has refused everything from there" }
func (declinedAllError) Declined() bool { return true }

// A DeniedError says that the configuration refuses a use.
type DeniedError struct{ Why string }

func (e *DeniedError) Error() string { return e.Why + " refuses it" }

// A decision is what comes of the rules.
type decision struct {
	confirm Confirm // ConfirmNever, ConfirmAlways or ConfirmDeny
	plain   Remember
	rule    int     // the number of the rule that has decided; 0: none
	word    Confirm // of the configuration where none has
	socket  string  // the name of the socket that has the word; empty: the policy has it
}

// why says what in the configuration has decided.
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
	// A rule that may be meant cannot permit anything, and cannot be passed over.
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

// set has a word of the configuration decide about a use.
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

// stricter returns the one that permits less.
func (d decision) stricter(o decision) decision {
	order := []Confirm{ConfirmNever, ConfirmAlways, ConfirmDeny}
	switch c := cmp.Compare(slices.Index(order, o.confirm), slices.Index(order, d.confirm)); {
	case c > 0, c == 0 && o.plain.shorter(d.plain):
		return o
	}
	return d
}

// matches tells whether a use fulfils all conditions.
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

// fit tells whether patterns mean the host with this key, which may be nil: then only
// a lone "*" does. A revoked key proves nothing.
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

// sameness names what a yes to a use is good for: the identity, what is signed, at
// which host and for which user, asked by programs of the same names over the same
// way. ok is false when that is not known well enough for it to be good for
// anything but the request itself.
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

// maxApprovals bounds what is remembered.
const maxRemembered = 1024

// remembered are the answers that count for longer than once. The zero value is
// ready to use.
type remembered struct {
	asking waiting.Group[Answer] // by sameness

	mu sync.Mutex
	// generation counts how often some were forgotten: a yes to a question from
	// before that is not remembered.
	generation uint64
	kept       map[string]answer // by sameness
}

// An answer is one of them.
type answer struct {
	wire  string // of the identity
	homes []request.Key
	// insertions counts those of all tokens of the key. away says that none of them was
	// present: the signature waits for the next insertion.
	insertions uint64
	away       bool
	since      time.Time
	lasts      Remember
	status     Status // for people
}

// insertionsOf counts how often the tokens of an identity have appeared, all
// together.
func insertionsOf(t *request.Target) (n uint64) {
	for _, key := range t.Homes {
		n += key.Insertions()
	}
	return n
}

// over tells whether it has ended.
func (a *answer) over(now time.Time) bool {
	return a.lasts.over(now.Sub(a.since), now.Round(0).Sub(a.since.Round(0)))
}

// over tells whether a yes has ended that was given so long ago, by the clock that
// runs and by the one on the wall. The first stands still while the machine sleeps,
// the second may be set back, and neither makes it last longer.
func (r Remember) over(running, wall time.Duration) bool {
	return r != UntilLock && (running >= time.Duration(r) || wall >= time.Duration(r) || wall < 0)
}

// has tells whether there is a yes. It ends when a token of the identity is put
// in again.
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

// keep remembers a yes that was asked for in a generation.
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

// A Status describes an answer that counts for more than once.
type Status struct {
	Fingerprint string // of the key
	Comment     string // of the identity
	What        string // it is allowed for
	Forwarding  string // the way that requests come; empty: they are not forwarded
	Client      peer.Peer
	Since       time.Time
	Ends        time.Time // zero: when it is forgotten
}

// list returns those that last, the newest first.
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

// forget forgets some.
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

// forgetIdentity forgets those for an identity, by its wire form.
func (a *remembered) forgetIdentity(wire string) {
	a.forget(func(kept answer) bool { return kept.wire == wire })
}

// decide applies the configuration to a use. For a key on several tokens the strictest
// policy counts.
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
// socket or a constraint says so, and remembers the answers. All methods may be called
// from any goroutine.
type Approver struct {
	// Confirm asks a person; nil: there is no way to ask.
	Confirm Confirmer
	// Questions decides whether a person may be asked.
	Questions *Questions
	// Log gets a line for each answer that lasts.
	Log *slog.Logger

	kept remembered
}

// Approve returns nil if the key may be used. Otherwise the error says why not. policy
// returns the policy of each key of a token, and for nil that of a key on no token; nil
// never asks. each says why a person is asked for each use; empty: only if the socket or
// the policy wants that. Approve waits for the person as long as ctx lasts.
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
		// A yes at such a socket is good for the one signature.
		why = atSocket.why()
	case u.Unlimited && !u.PINPays:
		return a.ApproveLoss(ctx, u, t)
	case d.confirm == ConfirmNever:
		return nil
	}
	name, ok := sameness(u, t.ID)
	if why != "" || !ok {
		return a.ask(ctx, Question{Use: u, Key: t.Home(), KeyFingerprint: t.Fingerprint, Why: cmp.Or(why, d.why())}).error()
	}
	return a.askOnce(ctx, u, t, d, name)
}

// askOnce asks a person unless an earlier answer counts. Requests of the same name share
// one question.
func (a *Approver) askOnce(ctx context.Context, u *request.Use, t *request.Target, d decision, name string) error {
	if a.kept.has(name, t) {
		return nil
	}
	answer, err := a.kept.asking.Do(ctx, name, func(ctx context.Context) (Answer, error) {
		if a.kept.has(name, t) {
			return Answer{Allowed: true}, nil
		}
		generation := a.kept.now()
		said := a.ask(ctx, Question{Use: u, Key: t.Home(), KeyFingerprint: t.Fingerprint, Why: d.why(), Plain: d.plain, Offer: true})
		if said.Allowed && said.For != Once {
			a.kept.keep(name, t, u, said.For, generation)
			a.Log.Info("allowed for longer", "result", "ok", "key", t.Fingerprint, "comment", u.Comment, "what", u.Content.String(),
				"lasts", said.For.String(), "client", u.Caller.Client().String(), "forwarded", u.Caller.Forwarded)
		}
		return said.Answer, said.err
	})
	return asked{answer, err}.error()
}

// ApproveLoss asks a person whether a key may be used without the limits that it had
// before it was removed.
func (a *Approver) ApproveLoss(ctx context.Context, u *request.Use, t *request.Target) error {
	const why = "the limits that the key had before it was removed"
	return a.ask(ctx, Question{Use: u, Key: t.Home(), KeyFingerprint: t.Fingerprint, Why: why}).error()
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

// asked is what came of a question.
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

// ask asks a person.
func (a *Approver) ask(ctx context.Context, q Question) asked {
	if a.Confirm == nil {
		return asked{err: ErrNobody}
	}
	var answer Answer
	err := a.Questions.Ask(ctx, q.KeyFingerprint, true, func(ctx context.Context) (_ Outcome, err error) {
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

// outcomeOf returns what came of a question that is answered with yes or no.
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
