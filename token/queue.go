package token

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
	// quick is what a signature takes at the most that is made by this machine, or by a
	// device that is nearly as near. A smart card takes longer, and so does a network.
	quick = time.Millisecond
	// quickWidth is how many signatures a token is asked for at once that is quick.
	quickWidth = 16
	// instant is what a signature takes at the most for which it is worth to wait on a
	// thread, and how long it is waited for there: see wire.Lane.Ready.
	instant = 200 * time.Microsecond
	// aloneFor is how many signatures must have had the token for themselves before one is
	// waited for on a thread: the thread is missed as soon as there are two clients.
	aloneFor = 8
	// laneIdle is how long a seat is kept that nobody needs.
	laneIdle = 10 * time.Second
	// probation is how many signatures a token that works on one at a time gets one
	// at a time before it is tried with two again.
	probation = 64
)

// queue is who waits for signatures of one token, in the order in which they have
// come, and what is known of how the token works. The process's mu guards it.
//
// How many signatures a token can make at once, it does not tell. More requests
// than that wait in the module, in an order of its own, and cannot be taken back
// from there. So a token is asked for two at first. When their answers come
// closer together than one of them takes, they were made side by side, and it is
// asked for as many as it has sessions. When the second comes as much later than
// the first as it takes, it has waited for it, and the token is asked for one after
// the other.
type queue struct {
	most    int // sessions that there are for signatures
	waiting []*waiter
	running int
	idle    []*seat // the one that was used last is used next: it is the warmest
	seats   []*seat // all of them

	heard   time.Time // when the token has answered last, whatever that was
	signed  time.Time // when it has signed last
	fastest map[kind]time.Duration
	quick   bool // it makes signatures so fast that it does not matter how many at once
	beside  bool // it makes signatures side by side
	waited  int  // how often one has waited for another since that was tried
	alone   int  // signatures since there was another one under way
	gone    bool // the token was taken out, and was not seen since
}

// kind is what signatures take the same time for.
type kind struct {
	mechanism uint64
	size      uint32 // of the signature
}

func (s *seat) kind() kind { return kind{s.req.Mechanism, s.req.SignatureLen} }

// waiter is somebody who waits for a seat.
type waiter struct {
	seat chan *seat // one element; closed when the process has ended
}

// seat is the right to ask a token for a signature, one at a time, and the lane for
// it. Whoever sits on it uses it.
type seat struct {
	queue *queue
	lane  *wire.Lane // nil: it is yet to be opened
	used  time.Time

	req     wire.Sign
	reply   wire.SignReply
	pending pending
	mark    uint64 // see words
	beside  bool   // another signature was under way at some time
}

func newQueue() *queue { return &queue{most: 1, fastest: make(map[kind]time.Duration)} }

// width is how many signatures the token is asked for at once.
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

// take sits somebody down.
func (q *queue) take() *seat {
	var s *seat
	if n := len(q.idle); n > 0 {
		s, q.idle = q.idle[n-1], q.idle[:n-1]
	} else {
		s = &seat{queue: q}
		q.seats = append(q.seats, s)
	}
	s.beside = q.running > 0
	q.alone++
	if s.beside {
		q.alone = 0
	}
	if q.running++; s.beside && !q.quick && !q.beside {
		for _, o := range q.seats {
			o.beside = true
		}
	}
	return s
}

// give has those sit down who have waited for longest, as many as there are seats
// for.
func (q *queue) give() {
	n := 0
	for ; n < len(q.waiting) && q.running < q.width(); n++ {
		q.waiting[n].seat <- q.take()
	}
	q.waiting = slices.Delete(q.waiting, 0, n)
}

// learn makes of an answer what can be known of how the token works.
func (q *queue) learn(s *seat, now time.Time) {
	k := s.kind()
	took, apart := now.Sub(s.pending.since), now.Sub(q.signed)
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
	if q.quick || q.beside || !s.beside || !known {
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

// sit waits until it is the caller's turn to ask a token for a signature. Info is
// what the token says of itself. The seat is given up by sign, or by leave.
func (p *process) sit(ctx context.Context, token wire.TokenID, info wire.TokenInfo) (*seat, error) {
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
	w := &waiter{seat: make(chan *seat, 1)}
	q.waiting = append(q.waiting, w)
	p.mu.Unlock()
	select {
	case s, ok := <-w.seat:
		if !ok {
			return nil, p.ended(ctx)
		}
		return s, nil
	case <-ctx.Done():
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	if i := slices.Index(q.waiting, w); i >= 0 {
		q.waiting = slices.Delete(q.waiting, i, i+1)
	} else if s, ok := <-w.seat; ok {
		p.leaveLocked(s)
	}
	return nil, ctx.Err()
}

// sessions returns how many sessions a token has for signatures, as far as it says:
// one keeps the login.
func sessions(info wire.TokenInfo) int {
	if info.MaxSessions == 0 {
		return wire.MaxLanes
	}
	return int(max(1, min(info.MaxSessions-1, wire.MaxLanes)))
}

func (p *process) queueLocked(token wire.TokenID) *queue {
	q := p.queues[token]
	if q == nil {
		q = newQueue()
		p.queues[token] = q
	}
	return q
}

// forgetQueues forgets those of tokens that are not there, where nothing is under way, and
// takes note of those that are.
func (p *process) forgetQueues(there []*Token) {
	p.mu.Lock()
	defer p.mu.Unlock()
	for id, q := range p.queues {
		present := slices.ContainsFunc(there, func(t *Token) bool { return t.ID == id })
		q.gone = q.gone && !present
		if id == (wire.TokenID{}) || q.running > 0 || len(q.waiting) > 0 || present {
			continue
		}
		delete(p.queues, id)
		for _, s := range q.seats {
			if s.lane != nil {
				_ = s.lane.Close()
			}
		}
	}
}

// leaveLocked gives a seat to the next who waits.
func (p *process) leaveLocked(s *seat) {
	q := s.queue
	q.running--
	now := time.Now()
	s.used = now
	s.reply.Signature, s.req.Data = nil, nil // they are the caller's
	q.idle = append(q.idle, s)
	if oldest := q.idle[0]; now.Sub(oldest.used) > laneIdle {
		q.idle = slices.Delete(q.idle, 0, 1)
		q.seats = slices.Delete(q.seats, slices.Index(q.seats, oldest), 1+slices.Index(q.seats, oldest))
		if oldest.lane != nil {
			_ = oldest.lane.Close()
		}
	}
	if p.err == nil {
		q.give()
	}
}

// waitsHere is set while somebody waits on a thread. It is one at a time: the more
// there are, the more there is to do for the scheduler meanwhile.
var waitsHere atomic.Bool

// waitHere waits for the answer on the caller's thread if that is worth while, and
// tells whether it is there.
func (s *seat) waitHere(worthWhile bool) bool {
	if !worthWhile || !waitsHere.CompareAndSwap(false, true) {
		return false
	}
	defer waitsHere.Store(false)
	return s.lane.Ready(instant)
}

// sign asks for the signature that s.req describes, and gives the seat up. When ctx
// ends first, the module process is told that nobody waits any more, and the seat
// is given up once it has answered. A module that has not answered after the time
// for it is killed. fastest is the least that such a signature has taken so far.
func (p *process) sign(ctx context.Context, s *seat) (signature []byte, fastest time.Duration, err error) {
	timeout := signTimeout
	if p.timeout != 0 {
		timeout = p.timeout
	}
	if err = ctx.Err(); err == nil {
		err = p.openLane(s)
	}
	p.mu.Lock()
	switch {
	case p.err != nil:
		p.mu.Unlock()
		return nil, 0, p.ended(ctx)
	case err != nil:
		p.leaveLocked(s)
		p.mu.Unlock()
		return nil, 0, err
	}
	id := p.numberLocked()
	s.pending = pending{queue: s.queue, timeout: timeout, since: time.Now()}
	s.mark = p.words.mark()
	p.waitLocked(id, &s.pending)
	fastest, known := s.queue.fastest[s.kind()]
	here := known && fastest < instant && s.queue.alone > aloneFor
	p.mu.Unlock()

	if s.lane == nil {
		err = wire.ErrTooLong // there is no room for a lane
	} else {
		err = s.lane.Send(id, &s.req)
	}
	if err == wire.ErrTooLong {
		p.mu.Lock()
		delete(p.waiting, id)
		p.mu.Unlock()
		err = p.request(ctx, false, timeout, wire.TypeSign, &s.req, &s.reply, nil)
		p.mu.Lock()
		defer p.mu.Unlock()
		return p.outcomeLocked(s, err)
	}
	var f wire.Frame
	if err == nil {
		if s.waitHere(here) {
			f, err = s.lane.Receive()
		} else {
			f, err = s.receive(ctx)
		}
	}
	if errors.Is(err, os.ErrDeadlineExceeded) {
		p.forsake(id, s)
		return nil, 0, ctx.Err()
	}
	signature, fastest, err = p.answered(id, s, f, err)
	if err == errGone {
		err = p.ended(ctx)
	}
	return signature, fastest, err
}

// openLane opens the lane of a seat that has none. Without one there is still the
// way that other requests take.
func (p *process) openLane(s *seat) error {
	if s.lane != nil || p.lanes == nil {
		return nil
	}
	lane, err := p.lanes.Open(s.req.Key.Token)
	if err != nil {
		p.log.Warn("signatures take a longer way", "error", err)
		return nil
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.err != nil {
		return lane.Close()
	}
	s.lane = lane
	return nil
}

// receive waits for the answer until ctx ends, upon which it is
// os.ErrDeadlineExceeded.
func (s *seat) receive(ctx context.Context) (wire.Frame, error) {
	interrupted := make(chan struct{})
	stop := context.AfterFunc(ctx, func() {
		s.lane.Interrupt()
		close(interrupted)
	})
	f, err := s.lane.Receive()
	if !stop() {
		<-interrupted
		s.lane.Resume()
	}
	return f, err
}

// answered notes the outcome of a request, the answer or why there is none, and gives
// the seat up. The error is errGone when the process has to end, or has.
func (p *process) answered(id uint32, s *seat, f wire.Frame, err error) ([]byte, time.Duration, error) {
	if err != nil {
		if _, ok := errors.AsType[*net.OpError](err); err != io.EOF && !ok {
			p.kill(fmt.Errorf("its answer made no sense: %w", err))
		}
		// It has gone, or has closed its socket and is of no use: its end says why.
		_ = p.cmd.Process.Kill()
		return nil, 0, errGone
	}
	err = p.words.explain(f.Decode(&s.reply), s.mark)
	p.mu.Lock()
	defer p.mu.Unlock()
	delete(p.waiting, id)
	s.queue.heard = time.Now()
	return p.outcomeLocked(s, err)
}

// outcomeLocked returns the outcome of a request, and gives the seat up.
func (p *process) outcomeLocked(s *seat, err error) (signature []byte, fastest time.Duration, _ error) {
	signature = s.reply.Signature
	if err == nil {
		s.queue.learn(s, time.Now())
	}
	fastest = s.queue.fastest[s.kind()]
	p.leaveLocked(s)
	return signature, fastest, err
}

// forsake says that nobody waits for a request any more, and gives the seat up when
// it is answered all the same.
func (p *process) forsake(id uint32, s *seat) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.err != nil {
		return
	}
	cancel := p.numberLocked()
	p.sending.Go(func() {
		_ = p.conn.WriteRequest(cancel, wire.TypeCancel, &wire.Cancel{Request: id})
		f, err := s.lane.Receive()
		_, _, _ = p.answered(id, s, f, err)
	})
}
