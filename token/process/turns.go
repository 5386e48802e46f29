package process

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"slices"
	"sync/atomic"
	"time"

	"p11-agent/token/wire"
)

const (
	// quick is the most time of a signature that this machine makes, or a device that is nearly as near. A smart card
	// takes longer, and so does an HSM in the network.
	quick = time.Millisecond
	// quickWidth is how many signatures the agent requests at once from a quick token.
	quickWidth = 16
	// instant is the most time of a signature that is worth waiting for on the thread, and how long the thread waits:
	// see wire.Lane.Ready.
	instant = 200 * time.Microsecond
	// aloneFor is how many signatures in a row must have had the token for themselves before one waits on the thread.
	// With two clients, the scheduler lacks the thread.
	aloneFor = 8
	// laneIdle is how long an unused turn keeps its lane.
	laneIdle = 10 * time.Second
	// probation is how many signatures a token makes one by one before the agent tries two at once again.
	probation = 64
)

// A queue orders the operations of one token, first come, first served. It learns how the token works. Process.mu
// guards it. Most operations are signatures, and the comments speak of signatures.
//
// A token does not say how many signatures it makes at once. Further requests would wait inside the module, in an
// order of its own, and could not be taken back. So the agent starts with two requests. If their answers come closer
// together than one of them takes, then the token made them side by side, and the agent requests as many as the token
// has sessions. If the second comes as much later as it takes, then it has waited for the first, and the agent
// requests one after the other.
type queue struct {
	most    int          // the sessions for signatures
	waiting []chan *Turn // one element each; closed when the process has ended
	running int
	idle    []*Turn // the one that was used last is used next: its caches are warm
	turns   []*Turn // all of them

	heard   time.Time // the last answer of the token to any request
	signed  time.Time // the last signature
	fastest map[kind]time.Duration
	quick   bool // the token is so fast that the number of requests does not matter
	beside  bool // the token makes signatures side by side
	waited  int  // how often a signature has waited for another since the last trial of two
	alone   int  // the signatures since two were under way
	gone    bool // the card has left, and no look has seen it since
}

// A kind of operation: all of a kind take about the same time.
type kind struct {
	function  wire.Function
	mechanism uint64
	size      uint32 // of the result
}

func (t *Turn) kind() kind {
	return kind{t.Request.Function, t.Request.Mechanism, t.Request.ResultLen}
}

// A Turn is the right to request one operation of a token at a time, and the lane for the request. The goroutine
// that has it uses it alone.
type Turn struct {
	// Request is the request, for the holder of the turn to fill in.
	Request wire.Operate

	queue   *queue
	lane    *wire.Lane // nil: not open
	used    time.Time  // when the turn ended last
	reply   wire.OperateReply
	pending pending
	mark    uint64 // see output
	hidden  bool   // the output of the module counts as secret meanwhile
	beside  bool   // another signature was under way meanwhile
}

func newQueue() *queue { return &queue{most: 1, fastest: make(map[kind]time.Duration)} }

// width returns how many signatures to request at once.
func (q *queue) width() int {
	switch {
	case q.quick:
		return min(q.most, quickWidth)
	case q.beside:
		return q.most
	case q.waited >= 2:
		return 1
	default:
		return min(2, q.most)
	}
}

// take starts a turn.
func (q *queue) take() *Turn {
	var t *Turn
	if n := len(q.idle); n > 0 {
		t, q.idle = q.idle[n-1], q.idle[:n-1]
	} else {
		t = &Turn{queue: q}
		q.turns = append(q.turns, t)
	}
	t.beside = q.running > 0
	q.alone++
	if t.beside {
		q.alone = 0
	}
	if q.running++; t.beside && !q.quick && !q.beside {
		for _, o := range q.turns {
			o.beside = true
		}
	}
	return t
}

// give starts turns for those that have waited longest, up to the width.
func (q *queue) give() {
	n := 0
	for ; n < len(q.waiting) && q.running < q.width(); n++ {
		q.waiting[n] <- q.take()
	}
	q.waiting = slices.Delete(q.waiting, 0, n)
}

// learn updates what the queue knows of the token after a signature.
func (q *queue) learn(t *Turn, now time.Time) {
	k := t.kind()
	took, apart := now.Sub(t.pending.since), now.Sub(q.signed)
	q.signed = now
	fastest, known := q.fastest[k]
	if !known || took < fastest {
		if len(q.fastest) >= wire.MaxList {
			clear(q.fastest)
		}
		q.fastest[k] = took
	}
	if took < quick {
		q.quick = true
	}
	if q.quick || q.beside || !t.beside || !known {
		return
	}
	apart = min(took, apart)
	switch {
	case q.waited >= 2:
		if q.waited++; q.waited >= probation {
			q.waited = 0
		}
	case 2*apart <= fastest:
		q.beside = true
	case 10*apart >= 7*fastest:
		q.waited++
	}
}

// AwaitTurn waits until the caller may request an operation of a token, and returns the turn. info is what the token
// said of itself. [Process.Operate] ends the turn. The error is that of ctx, or [ErrGone].
func (p *Process) AwaitTurn(ctx context.Context, token wire.TokenID, info wire.TokenInfo) (*Turn, error) {
	p.mu.Lock()
	if p.err != nil {
		p.mu.Unlock()
		return nil, p.ended(ctx)
	}
	q := p.queueLocked(token)
	q.most = sessions(info)
	if len(q.waiting) == 0 && q.running < q.width() {
		defer p.mu.Unlock()
		return q.take(), nil
	}
	turn := make(chan *Turn, 1)
	q.waiting = append(q.waiting, turn)
	p.mu.Unlock()
	select {
	case t, ok := <-turn:
		if !ok {
			return nil, p.ended(ctx)
		}
		return t, nil
	case <-ctx.Done():
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	if i := slices.Index(q.waiting, turn); i >= 0 {
		q.waiting = slices.Delete(q.waiting, i, i+1)
	} else if t, ok := <-turn; ok {
		p.endTurnLocked(t)
	}
	return nil, ctx.Err()
}

// sessions returns how many sessions a token has for signatures, as far as it says. One session more keeps the login.
func sessions(info wire.TokenInfo) int {
	if info.MaxSessions == 0 {
		return wire.MaxLanes
	}
	return int(max(1, min(info.MaxSessions-1, wire.MaxLanes)))
}

func (p *Process) queueLocked(token wire.TokenID) *queue {
	q := p.queues[token]
	if q == nil {
		q = newQueue()
		p.queues[token] = q
	}
	return q
}

// ForgetQueues forgets the idle queues of tokens that are not present, and notes which tokens are.
func (p *Process) ForgetQueues(present func(wire.TokenID) bool) {
	p.mu.Lock()
	defer p.mu.Unlock()
	for id, q := range p.queues {
		present := present(id)
		q.gone = q.gone && !present
		if id == (wire.TokenID{}) || q.running > 0 || len(q.waiting) > 0 || present {
			continue
		}
		delete(p.queues, id)
		for _, t := range q.turns {
			t.closeLane()
		}
	}
}

// Queues returns the number of queues; for tests.
func (p *Process) Queues() int {
	p.mu.Lock()
	defer p.mu.Unlock()
	return len(p.queues)
}

func (t *Turn) closeLane() {
	if t.lane != nil {
		_ = t.lane.Close()
	}
}

// endTurnLocked ends a turn, and starts the next.
func (p *Process) endTurnLocked(t *Turn) {
	q := t.queue
	q.running--
	now := time.Now()
	t.used = now
	t.reply.Result, t.Request.Data, t.Request.Params.Source = nil, nil, nil // they belong to the caller
	q.idle = append(q.idle, t)
	if oldest := q.idle[0]; now.Sub(oldest.used) > laneIdle {
		q.idle = slices.Delete(q.idle, 0, 1)
		q.turns = slices.Delete(q.turns, slices.Index(q.turns, oldest), 1+slices.Index(q.turns, oldest))
		oldest.closeLane()
	}
	if p.err == nil {
		q.give()
	}
}

// onThread is set while a signature waits on its thread. Only one does at a time: each more would cost the scheduler
// more work.
var onThread atomic.Bool

// waitOnThread waits a moment for the answer on the caller's thread, if that is worthwhile. It reports whether the
// answer is there.
func (t *Turn) waitOnThread(worthwhile bool) bool {
	if !worthwhile || !onThread.CompareAndSwap(false, true) {
		return false
	}
	defer onThread.Store(false)
	return t.lane.Ready(instant)
}

// Operate requests the operation that t.Request describes, and ends the turn. When ctx ends first, Operate returns
// its error, and the turn ends with the late answer. A module that does not answer in time ends. fastest is the
// shortest time that such an operation has taken so far. The result of a decryption or derivation is a secret:
// package process keeps no copy of it, and the caller wipes it.
func (p *Process) Operate(ctx context.Context, t *Turn) (result []byte, fastest time.Duration, err error) {
	timeout := SignTimeout
	if p.timeout != 0 {
		timeout = p.timeout
	}
	if err = ctx.Err(); err == nil {
		err = p.openLane(t)
	}
	p.mu.Lock()
	switch {
	case p.err != nil:
		p.mu.Unlock()
		return nil, 0, p.ended(ctx)
	case err != nil:
		p.endTurnLocked(t)
		p.mu.Unlock()
		return nil, 0, err
	}
	id := p.numberLocked()
	t.pending = pending{queue: t.queue, timeout: timeout, since: time.Now()}
	t.mark = p.output.mark()
	p.addLocked(id, &t.pending)
	fastest, known := t.queue.fastest[t.kind()]
	worthwhile := known && fastest < instant && t.queue.alone > aloneFor
	p.mu.Unlock()

	if t.lane == nil {
		err = wire.ErrTooLong // the process has no room for a lane
	} else {
		p.hide(t)
		err = t.lane.Send(id, &t.Request)
	}
	if err == wire.ErrTooLong {
		p.show(t)
		p.mu.Lock()
		delete(p.waiting, id)
		p.mu.Unlock()
		err = p.request(ctx, false, timeout, wire.TypeOperate, &t.Request, &t.reply, nil)
		p.mu.Lock()
		defer p.mu.Unlock()
		return p.outcomeLocked(t, err)
	}
	var f wire.Frame
	if err == nil {
		if t.waitOnThread(worthwhile) {
			f, err = t.lane.Receive()
		} else {
			f, err = t.receive(ctx)
		}
	}
	if errors.Is(err, os.ErrDeadlineExceeded) {
		p.forsake(id, t)
		return nil, 0, ctx.Err()
	}
	result, fastest, err = p.answered(id, t, f, err)
	if err == ErrGone {
		err = p.ended(ctx)
	}
	return result, fastest, err
}

// hide keeps what the module prints secret while it decrypts or derives: it may say why it does not decrypt. show ends
// that.
func (p *Process) hide(t *Turn) {
	if p.output != nil && t.Request.Function.Secret() {
		p.output.beginSecret()
		t.hidden = true
	}
}

func (p *Process) show(t *Turn) {
	if t.hidden {
		p.output.endSecret()
		t.hidden = false
	}
}

// openLane opens the lane of a turn that has none. If that fails, the signature takes the connection of the other
// requests.
func (p *Process) openLane(t *Turn) error {
	if t.lane != nil || p.lanes == nil {
		return nil
	}
	lane, err := p.lanes.Open(t.Request.Key.Token)
	if err != nil {
		p.log.Warn("cannot open a fast lane to the module; using the shared connection", "error", err)
		return nil
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.err != nil {
		return lane.Close()
	}
	t.lane = lane
	return nil
}

// receive waits for the answer. It returns os.ErrDeadlineExceeded when ctx ends first.
func (t *Turn) receive(ctx context.Context) (wire.Frame, error) {
	interrupted := make(chan struct{})
	stop := context.AfterFunc(ctx, func() {
		t.lane.Interrupt()
		close(interrupted)
	})
	f, err := t.lane.Receive()
	if !stop() {
		<-interrupted
		t.lane.Resume()
	}
	return f, err
}

// answered takes the answer of an operation, or the error of the lane, and ends the turn. It returns ErrGone itself
// when the process ends.
func (p *Process) answered(id uint32, t *Turn, f wire.Frame, err error) ([]byte, time.Duration, error) {
	p.show(t)
	if err != nil {
		if _, ok := errors.AsType[*net.OpError](err); err != io.EOF && !ok {
			p.Kill(fmt.Errorf("its answer made no sense: %w", err))
		}
		// The process has ended, or has closed its socket and is of no use. Its end gives the reason.
		_ = p.cmd.Process.Kill()
		return nil, 0, ErrGone
	}
	err = p.output.explain(f.Decode(&t.reply), t.mark)
	p.mu.Lock()
	defer p.mu.Unlock()
	delete(p.waiting, id)
	t.queue.heard = time.Now()
	return p.outcomeLocked(t, err)
}

// outcomeLocked returns the outcome of an operation, and ends the turn.
func (p *Process) outcomeLocked(t *Turn, err error) (result []byte, fastest time.Duration, _ error) {
	result = t.reply.Result
	if err == nil {
		t.queue.learn(t, time.Now())
	}
	fastest = t.queue.fastest[t.kind()]
	p.endTurnLocked(t)
	return result, fastest, err
}

// forsake tells the module process that the client has gone, and ends the turn with the late answer.
func (p *Process) forsake(id uint32, t *Turn) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.err != nil {
		return
	}
	cancel := p.numberLocked()
	p.sending.Go(func() {
		_ = p.conn.WriteRequest(cancel, wire.TypeCancel, &wire.Cancel{Request: id})
		f, err := t.lane.Receive()
		late, _, _ := p.answered(id, t, f, err)
		clear(late) // it may be a secret
	})
}
