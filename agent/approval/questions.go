package approval

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"sync"
	"time"

	"p11-agent/agent/request"
	"p11-agent/pinentry/plain"
	"p11-agent/pinentry/waiting"
)

// Limits of questions. A person who says no by mistake can try again at once, or
// after a second. A client that asks again and again waits longer and longer.
const (
	// firstPause follows a no, and each further no doubles it, up to maxPause.
	firstPause = time.Second
	maxPause   = 5 * time.Minute
	// The first no about a key costs a client nothing, and neither do the first five
	// about any keys. For a forwarded client, the first no about a key costs firstPause.
	freeAboutKey, freeFromWay                   = 1, 5
	freeAboutKeyForwarded, freeFromWayForwarded = 0, 3
	// A group of clients counts each no for noPeriod. When it counts maxNos, it pauses.
	noPeriod = 30 * time.Second
	maxNos   = 10
	// forgetNos is the time after the last no when the agent forgets all of them.
	forgetNos = 30 * time.Minute
	// blockTime is how long "no to everything from here" counts.
	blockTime = time.Hour
	// maxOpen bounds the open questions of a group of clients. Questions about tokens do
	// not count: each token has one at a time.
	maxOpen = 5
)

// describe names the origin of a request to a person. use may be nil.
func describe(c *request.Caller, use *request.Use) string {
	if !c.Forwarded {
		return plain.LineWithin(c.Client().String(), request.MaxField)
	}
	if use == nil {
		use = &request.Use{}
	}
	first := *use
	first.Caller = c
	if via := first.Via(); len(via) > 0 {
		return "the forwarded host " + plain.LineWithin(first.Name(via[0]), request.MaxField)
	}
	return "an unknown forwarded host"
}

// An Outcome is how a question ends.
type Outcome int

// The Outcomes.
const (
	// Unanswered says that no prompt showed the question, or that the answer was not
	// needed any more. If the client hangs up during the question, that counts as a no.
	Unanswered Outcome = iota
	OutcomeYes
	OutcomeNo // or no answer came in time
	// OutcomeNoToAll stands for "no to everything from here".
	OutcomeNoToAll
	outcomeHungUp // the client hung up before there was an answer
)

// Questions decides whether the agent may ask a person a question. It decides by the
// answers to earlier questions of the same client. Every question that a client causes
// goes through it. Any goroutine may call its methods.
type Questions struct {
	turns askingTurns

	mu     sync.Mutex
	keys   map[aboutKey]*nos
	ways   map[request.Origin]*nos
	groups map[request.Group]*nos
}

type aboutKey struct {
	way   request.Origin
	about string
}

// nos counts the questions that a person answered with no.
type nos struct {
	from  string // for people
	count int    // since the last yes
	// spent is noPeriod for each no that the group still counted at the last no.
	spent  time.Duration
	last   time.Time
	until  time.Time // no question is shown before
	paused bool      // there was a pause since the last yes
	block  bool      // a person has refused everything
}

// NewQuestions returns a Questions without earlier answers.
func NewQuestions() *Questions {
	q := new(Questions)
	q.Reset()
	return q
}

// Reset ends all pauses.
func (q *Questions) Reset() {
	q.mu.Lock()
	defer q.mu.Unlock()
	q.keys, q.ways, q.groups = make(map[aboutKey]*nos), make(map[request.Origin]*nos), make(map[request.Group]*nos)
}

// A PausedError says that the agent did not ask a person, because of earlier answers.
type PausedError struct {
	From  string    // the origin of the requests, for people
	Until time.Time // when the agent may show a question again
	Block bool      // the person has refused everything from there
}

func (e *PausedError) Error() string {
	until := e.Until.Format(time.TimeOnly)
	if e.Block {
		return fmt.Sprintf("a person has refused everything from %s: no question is shown before %s", e.From, until)
	}
	return fmt.Sprintf("a person has refused requests from %s: no question is shown before %s", e.From, until)
}

// An Asking asks a person about one thing. Several requests may wait for the answer: it asks on
// behalf of one request at a time. One goroutine at a time uses it.
type Asking struct {
	questions *Questions
	requests  waiting.Requests // nil: one request
	about     string
	inTurn    bool

	again bool // see Again
	// answered notes the outcome for the request that was asked last, and ends its turn. nil: no
	// outcome is missing.
	answered func(Outcome)
}

// About returns an Asking about a key or a token. about names it for people. requests asks on
// behalf of the requests that wait for the answers; nil: one request, with the context of Show. If
// inTurn is true, a question waits until earlier questions of the client have answers.
func (q *Questions) About(about string, requests waiting.Requests, inTurn bool) *Asking {
	return &Asking{questions: q, about: about, requests: requests, inTurn: inTurn}
}

// Show calls show, which asks a person by Ask and returns the outcome. It returns the error of
// show.
func (a *Asking) Show(ctx context.Context, show func(ctx context.Context) (Outcome, error)) error {
	outcome, err := show(ctx)
	a.note(outcome)
	return err
}

// note notes the outcome for the request that was asked last, unless it has one.
func (a *Asking) note(o Outcome) {
	if a.answered != nil {
		a.answered(o)
	}
	a.answered = nil
}

// Ask asks a question, as [waiting.Ask] does. If the questions of the client pause, the prompt
// does not appear, and the error is a *PausedError. When several requests wait, only the request
// of that client ends, with the PausedError as the cause of its context. Ask goes on with the next
// request.
func (a *Asking) Ask(ctx context.Context, question waiting.Question) error {
	ask := question.Ask
	question.Ask = func(ctx context.Context) error { return a.askOne(ctx, ask) }
	return waiting.Ask(ctx, a.requests, question)
}

// askOne asks on behalf of the request that ctx belongs to.
func (a *Asking) askOne(ctx context.Context, ask func(context.Context) error) error {
	a.note(Unanswered)
	a.again = false
	c := request.CallerFrom(ctx)
	if c == nil {
		return ask(ctx)
	}
	q, w := a.questions, c.OriginApart()
	give := func() {}
	if a.inTurn {
		var err error
		if give, err = q.turns.take(ctx, w); err != nil {
			return err
		}
	}
	from := describe(c, request.UseFrom(ctx))
	again, err := q.begin(w, a.about)
	if err != nil {
		give()
		if r := request.ServedFrom(ctx); r != nil {
			r.End(err)
		}
		return cmp.Or(ctx.Err(), err)
	}
	a.again = again
	err = ask(ctx)
	// The next question of the same client waits until this answer is noted.
	a.answered = func(o Outcome) {
		q.end(w, a.about, from, o)
		give()
	}
	if err != nil && ctx.Err() != nil {
		a.note(endedBy(ctx))
	}
	return err
}

// Again tells whether the client that is asked now had to wait in a pause before this question.
// Then the prompt offers "no to everything from here".
func (a *Asking) Again() bool { return a.again }

// Note notes the outcome of a question that a person has answered at another place than
// the prompt, such as a card reader. ctx is the context of the question.
func (a *Asking) Note(ctx context.Context, outcome Outcome) {
	if c := request.CallerFrom(ctx); c != nil {
		a.questions.end(c.OriginApart(), a.about, describe(c, request.UseFrom(ctx)), outcome)
	}
}

// endedBy returns the outcome of a question whose context has ended.
func endedBy(ctx context.Context) Outcome {
	switch cause, r := context.Cause(ctx), request.ServedFrom(ctx); {
	case errors.Is(cause, ErrNotInserted):
		return OutcomeNo
	case r == nil || r.Err() == nil || errors.Is(cause, request.ErrLocked):
		return Unanswered // the client did not cause the end
	}
	return outcomeHungUp
}

// begin returns a *PausedError if the agent may not show the question now. again tells
// whether the client had to wait before.
func (q *Questions) begin(w request.Origin, about string) (again bool, err error) {
	now := time.Now()
	q.mu.Lock()
	defer q.mu.Unlock()
	q.pruneLocked(now)
	key, all := q.keys[aboutKey{w, about}], q.ways[w]
	var latest *nos
	for _, n := range []*nos{key, all, q.groups[w.Group]} {
		if n != nil && now.Before(n.until) && (latest == nil || n.until.After(latest.until)) {
			latest = n
		}
	}
	if latest != nil {
		return true, &PausedError{From: latest.from, Until: latest.until, Block: latest.block}
	}
	return key != nil && key.paused || all != nil && all.paused, nil
}

// end notes the outcome of a question.
func (q *Questions) end(w request.Origin, about, from string, outcome Outcome) {
	now := time.Now()
	q.mu.Lock()
	defer q.mu.Unlock()
	free := 0
	switch outcome {
	case Unanswered:
		return
	case OutcomeYes:
		delete(q.keys, aboutKey{w, about})
		delete(q.ways, w)
		return
	case outcomeHungUp:
		// Several requests may share a question: the first that leaves does not end it.
		free = 1
	}
	freeAbout, freeFrom := freeAboutKey, freeFromWay
	if w.Forwarded {
		freeAbout, freeFrom = freeAboutKeyForwarded, freeFromWayForwarded
	}
	entry(q.keys, aboutKey{w, about}, from).no(now, freeAbout+free)
	all := entry(q.ways, w, from)
	all.no(now, freeFrom)
	if outcome == OutcomeNoToAll {
		all.block, all.until = true, now.Add(blockTime)
	}
	crowd := "all programs here"
	switch {
	case w.Socket != "":
		crowd = "the socket " + w.Socket
	case w.Forwarded:
		crowd = "all forwarded hosts"
	}
	if w.Apart {
		crowd += " in sandboxes and containers"
	}
	entry(q.groups, w.Group, crowd).spend(now)
}

func entry[K comparable](m map[K]*nos, key K, from string) *nos {
	n := m[key]
	if n == nil {
		n = new(nos)
		m[key] = n
	}
	n.from = from
	return n
}

// no counts one no of a key or a way. The first free ones cause no pause.
func (n *nos) no(now time.Time, free int) {
	n.count++
	n.last = now
	if n.block {
		return
	}
	pause := time.Duration(0)
	if over := n.count - free; over > 0 {
		pause = maxPause
		if over < 16 {
			pause = min(firstPause<<(over-1), maxPause)
		}
	}
	n.until = now.Add(pause)
	n.paused = n.paused || pause > 0
}

// spend counts one no of a group.
func (n *nos) spend(now time.Time) {
	n.spent = max(0, n.spent-now.Sub(n.last)) + noPeriod
	n.count++
	n.last = now
	n.until = now.Add(n.spent - (maxNos-1)*noPeriod) // mostly in the past
}

// pruneLocked forgets old answers. There are few: each comes from a question that a
// person has answered, and each group may ask few questions.
func (q *Questions) pruneLocked(now time.Time) {
	prune(q.keys, now)
	prune(q.ways, now)
	prune(q.groups, now)
}

func prune[K comparable](m map[K]*nos, now time.Time) {
	for key, n := range m {
		if !now.Before(n.until) && (n.block || now.Sub(n.last) >= forgetNos) {
			delete(m, key)
		}
	}
}

// A Pause says that the agent shows no questions of some clients for a time.
type Pause struct {
	From    string    // the origin of the requests
	About   string    // the key or the token; empty: all of them
	Refused int       // how often a person has answered no
	Block   bool      // the person has refused everything
	Until   time.Time // when the agent may show a question again
}

// Pauses returns the pauses that last now, the longest first.
func (q *Questions) Pauses() (all []Pause) {
	now := time.Now()
	q.mu.Lock()
	defer q.mu.Unlock()
	add := func(n *nos, about string) {
		if now.Before(n.until) {
			all = append(all, Pause{From: n.from, About: about, Refused: n.count, Block: n.block, Until: n.until})
		}
	}
	for key, n := range q.keys {
		add(n, key.about)
	}
	for _, n := range q.ways {
		add(n, "")
	}
	for _, n := range q.groups {
		add(n, "")
	}
	slices.SortFunc(all, func(a, b Pause) int {
		return cmp.Or(b.Until.Compare(a.Until), strings.Compare(a.From, b.From), strings.Compare(a.About, b.About))
	})
	return all
}

// askingTurns bounds the questions that are open at a time. A forwarded host has one, and
// a group has maxOpen. So a no to one question can pause the next one. The zero value is
// ready to use.
type askingTurns struct {
	mu  sync.Mutex
	all map[any]*askingTurn // by way, and by group
}

type askingTurn struct {
	slots chan struct{}
	users int // that have a slot, or wait for one
}

// take waits for a turn; give ends it.
func (t *askingTurns) take(ctx context.Context, w request.Origin) (give func(), err error) {
	own := maxOpen
	if w.Forwarded {
		own = 1
	}
	giveWay, err := t.takeOf(ctx, w, own)
	if err != nil {
		return nil, err
	}
	giveGroup, err := t.takeOf(ctx, w.Group, maxOpen)
	if err != nil {
		giveWay()
		return nil, err
	}
	return func() { giveGroup(); giveWay() }, nil
}

func (t *askingTurns) takeOf(ctx context.Context, key any, limit int) (give func(), err error) {
	t.mu.Lock()
	one := t.all[key]
	if one == nil {
		one = &askingTurn{slots: make(chan struct{}, limit)}
		if t.all == nil {
			t.all = make(map[any]*askingTurn)
		}
		t.all[key] = one
	}
	one.users++
	t.mu.Unlock()
	leave := func() {
		t.mu.Lock()
		defer t.mu.Unlock()
		if one.users--; one.users == 0 {
			delete(t.all, key)
		}
	}
	select {
	case one.slots <- struct{}{}:
		return func() { <-one.slots; leave() }, nil
	case <-ctx.Done():
		leave()
		return nil, ctx.Err()
	}
}
