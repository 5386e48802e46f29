package token

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"os"
	"os/exec"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"p11-agent/token/pace"
	"p11-agent/token/registry"
	"p11-agent/token/wellknown"
	"p11-agent/token/wire"
)

// How long a module may take for one request before its process is killed. A
// signature may wait for a finger on the card, a login for a PIN typed on the
// reader. A list waits for nobody, and OpenSC 0.23 deadlocks when a card is pulled
// while it is looked at: until the process is killed, its keys are of no use.
// ModuleSpec.Timeout replaces all of them but the last, which it only makes longer.
const (
	startTimeout = 30 * time.Second
	listTimeout  = 20 * time.Second
	loginTimeout = 2 * time.Minute
	signTimeout  = 2 * time.Minute
	// A card may look for the primes of a long RSA key for minutes.
	generateTimeout = 15 * time.Minute
)

// errGone is why the requests of a process that ended fail.
var errGone = errors.New("the module process ended")

// errOneAtATime is why a process ends that cannot wait for events and answer.
var errOneAtATime = errors.New("it answers nothing while it waits for events")

// errRenewed is why a process ends in whose place there is to be a new one. It
// had nothing under way.
var errRenewed = errors.New("it is started anew to look for tokens")

// oneAtATime tells whether a process failed for that.
func oneAtATime(err error) bool {
	return errors.Is(err, errOneAtATime) || wire.IsReason(err, wire.ReasonOneAtATime)
}

// hungError is why a process is killed that did not answer.
type hungError struct{ timeout time.Duration }

func (e *hungError) Error() string {
	return fmt.Sprintf("it did not answer within %v and was stopped", e.timeout)
}

// process is one running module process. Requests may be made by any number of
// goroutines. It ends by kill, by a request that takes too long, or by itself;
// done is closed then and err says why.
type process struct {
	name    string
	timeout time.Duration // replaces the defaults when not 0
	cmd     *exec.Cmd
	conn    *wire.Conn
	lanes   *wire.Lanes // nil: signatures take the way that other requests take
	log     *slog.Logger
	info    wire.HelloReply
	events  chan struct{}       // one element: slots or tokens have changed
	left    func([]wire.SlotID) // is told of slots that have lost their token, without any: it may be each; nil: nobody is
	done    chan struct{}
	signed  atomic.Bool // it has made a signature
	words   *words      // nil in tests

	// sending is those who tell that nobody waits any more. It is added to under
	// mu while err is nil, and waited for when err is set.
	sending sync.WaitGroup

	mu      sync.Mutex
	next    uint32
	waiting map[uint32]*pending
	queues  map[wire.TokenID]*queue // the zero one's is that of the module itself
	freed   time.Time               // when a key was made: nobody had an answer meanwhile
	alarm   *time.Timer             // when the next of waiting has waited for too long, at alarmAt
	alarmAt time.Time               // zero: it is not set
	err     error                   // why it ends; set once
	gone    time.Time               // when a card of its has gone last
	hurried time.Duration           // how long it may take for its slots, as cards have come or gone; 0: none has
}

// pending is a request under way. Its time goes on when the caller has left:
// a module that hangs is to be killed all the same. It starts anew whenever the
// token answers somebody else: many requests to a slow card are not a hang.
type pending struct {
	answer  chan wire.Frame // one element; nil: it comes on a lane
	queue   *queue          // of the token
	timeout time.Duration
	since   time.Time
	secret  bool                   // the request has a PIN: see words
	long    bool                   // a key is made: whoever waits behind that waits for no hang
	part    func(wire.Frame) error // takes a part of the answer; nil: it comes whole
	soon    time.Time              // when it is to be answered as its card has gone; zero: that is still there
}

// startProcess starts argv as a module process and has it load the module. The
// process lives until it is killed; ctx only bounds the start. prepare is called before
// anything is read from it.
func startProcess(ctx context.Context, spec ModuleSpec, argv []string, log *slog.Logger, prepare func(*process)) (*process, error) {
	asks, theirs, err := connectProcess(unix.SOCK_STREAM)
	if err != nil {
		return nil, err
	}
	opens, theirLanes, err := connectProcess(unix.SOCK_SEQPACKET)
	if err != nil {
		return nil, errors.Join(err, asks.Close(), theirs.Close())
	}
	conn, lanes := wire.NewConn(asks), wire.NewLanes(opens)
	closeAll := func() error { return errors.Join(conn.Close(), lanes.Close(), theirs.Close(), theirLanes.Close()) }

	said, printed, err := os.Pipe()
	if err != nil {
		return nil, errors.Join(fmt.Errorf("start a module process: %w", err), closeAll())
	}
	cmd := exec.Command(argv[0], append(argv[1:len(argv):len(argv)], spec.Name)...)
	cmd.Args[0] = "p11-agent" // for whoever looks at the process list
	cmd.Env = registry.Environment(os.Environ(), spec.Env)
	cmd.Dir = "/"
	cmd.ExtraFiles = []*os.File{theirs, theirLanes} // become wire.FD and wire.LanesFD
	cmd.Stdout = printed                            // what a module prints must not reach ours
	cmd.Stderr = printed
	cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true} // no Ctrl-C of the agent's terminal
	err = cmd.Start()
	_ = printed.Close()
	if err != nil {
		return nil, errors.Join(fmt.Errorf("start a module process: %w", err), closeAll(), said.Close())
	}
	_ = theirs.Close() // so that its end shows as the end of file
	_ = theirLanes.Close()

	p := &process{
		name:    spec.Name,
		timeout: spec.Timeout,
		cmd:     cmd,
		conn:    conn,
		lanes:   lanes,
		log:     log,
		events:  make(chan struct{}, 1),
		done:    make(chan struct{}),
		waiting: make(map[uint32]*pending),
		queues:  make(map[wire.TokenID]*queue),
	}
	if p.words, err = newWords(said, log); err != nil {
		return nil, errors.Join(fmt.Errorf("start a module process: %w", err), closeAll(), said.Close(), cmd.Process.Kill(), cmd.Wait())
	}
	if prepare != nil {
		prepare(p)
	}
	var reading sync.WaitGroup
	reading.Go(func() { p.words.listen(p.words.read) })
	reading.Go(p.read)
	go func() {
		killRest(cmd.Process.Pid)
		state := cmd.Wait()
		p.fail(exitReason(state))
		// A child that has left the group may hold the pipe open.
		_ = said.SetReadDeadline(time.Now().Add(100 * time.Millisecond))
		reading.Wait()
		p.sending.Wait()
		_ = said.Close()
		p.mu.Lock()
		p.err = quoting(p.err, p.words.since(0))
		p.mu.Unlock()
		close(p.done)
	}()

	hello := &wire.Hello{
		Version: wire.Version, Path: spec.Path, InitArgs: spec.InitArgs, Poll: spec.Poll,
		Unconfined: spec.Unconfined, Write: spec.Write,
	}
	if err := p.call(ctx, startTimeout, wire.TypeHello, hello, &p.info); err != nil {
		p.kill(errors.New("it did not start"))
		<-p.done
		err = quoting(err, p.words.since(0))
		if !spec.Unconfined && !fitsSandbox(spec.Path) && maybeSandbox(err) {
			err = fmt.Errorf("%w; %s", err, sandboxHint)
		}
		return nil, err
	}
	trimHello(&p.info)
	return p, nil
}

// connectProcess makes a socket pair: the agent's end, and the file for the child.
func connectProcess(kind int) (*net.UnixConn, *os.File, error) {
	fds, err := unix.Socketpair(unix.AF_UNIX, kind|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return nil, nil, fmt.Errorf("connect a module process: %w", err)
	}
	ours, theirs := os.NewFile(uintptr(fds[0]), "agent"), os.NewFile(uintptr(fds[1]), "module process")
	c, err := net.FileConn(ours)
	_ = ours.Close()
	if err != nil {
		return nil, nil, errors.Join(fmt.Errorf("connect a module process: %w", err), theirs.Close())
	}
	return c.(*net.UnixConn), theirs, nil
}

// sandboxHint is said of a module that fails at the start for a reason that may be
// its sandbox.
const sandboxHint = "if it needs to write elsewhere: write = [...] or sandbox = false in its [[module]] table"

// fitsSandbox tells whether a module is one that the sandbox is made for: what such
// a module lacks is something else.
func fitsSandbox(path string) bool {
	return wellknown.KindOf(path).Sandboxed()
}

// maybeSandbox tells whether a module may have failed to start because of what its
// process may not do. Most do not say more than that they failed.
func maybeSandbox(err error) bool {
	e, ok := errors.AsType[*wire.Error](err)
	if !ok {
		return false
	}
	text := strings.ToLower(e.Text)
	return e.Function == "C_Initialize" || strings.Contains(text, unix.EACCES.Error()) || strings.Contains(text, unix.EPERM.Error())
}

// killRest waits for the end of a process and kills what is left of its group: the
// children that its module has started. The process is still to be waited for, so
// its number is nobody else's yet.
func killRest(pid int) {
	for {
		err := unix.Waitid(unix.P_PID, pid, nil, unix.WEXITED|unix.WNOWAIT, nil)
		if err == nil {
			_ = unix.Kill(-pid, unix.SIGKILL) // most have none
		}
		if err != unix.EINTR {
			return
		}
	}
}

// exitReason says how a process ended.
func exitReason(err error) error {
	e, ok := errors.AsType[*exec.ExitError](err)
	if !ok {
		return errGone
	}
	if ws, ok := e.Sys().(syscall.WaitStatus); ok && ws.Signaled() {
		return fmt.Errorf("%w: it crashed (%s)", errGone, ws.Signal())
	}
	return fmt.Errorf("%w: %s", errGone, e.ProcessState)
}

// kill ends the process, which costs nothing but its module's keys: tokens keep
// what was finished. done is closed when it has ended. All requests under way
// fail with why, so what the module said to one of them is taken as text: the
// others would take it for their own answer, and a login would have its PIN tried
// once more.
func (p *process) kill(why error) {
	if _, ok := errors.AsType[*wire.Error](why); ok {
		why = errors.New(why.Error())
	}
	p.fail(why)
	// It may have gone by itself: then there is nothing to kill.
	_ = p.cmd.Process.Kill()
}

// fail makes why the reason of the end, unless there is one.
func (p *process) fail(why error) {
	p.mu.Lock()
	if p.err == nil {
		p.err = why
	}
	for id, w := range p.waiting {
		if w.answer != nil {
			close(w.answer)
		}
		delete(p.waiting, id)
	}
	if p.alarm != nil {
		p.alarm.Stop()
	}
	var lanes []*wire.Lane
	for _, q := range p.queues {
		for _, w := range q.waiting {
			close(w.seat)
		}
		q.waiting = nil
		for _, s := range q.seats {
			if s.lane != nil {
				lanes = append(lanes, s.lane)
			}
		}
	}
	p.mu.Unlock()
	_ = p.conn.Close() // ends read
	if p.lanes != nil {
		_ = p.lanes.Close()
	}
	for _, l := range lanes {
		_ = l.Close() // ends what waits for an answer
	}
}

func (p *process) failure() error {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.err
}

// read hands answers to those who wait, until the connection ends.
func (p *process) read() {
	events := pace.Limit{Burst: eventBurst, Every: eventEvery}
	for {
		f, err := p.conn.ReadFrame()
		if err != nil {
			// The kernel resets the connection of a process that dies before it
			// has read what it was sent.
			if err != io.EOF && !errors.Is(err, syscall.ECONNRESET) {
				p.kill(fmt.Errorf("its answer made no sense: %w", err))
			}
			// At the end of file the process is about to end: Wait tells how.
			// One that only closed its socket is of no use either.
			_ = p.cmd.Process.Kill()
			return
		}
		if f.Type == wire.TypeEvent {
			if events.Take(time.Now()) > 0 {
				p.kill(errors.New("it tells of events without end"))
				return
			}
			if e, err := f.Event(); err == nil && len(e.Gone) > 0 && p.left != nil {
				p.left(e.Gone)
			}
			select {
			case p.events <- struct{}{}:
			default:
			}
			continue
		}
		if f.Type == wire.TypeLost {
			why := lost(f)
			if pulled(why) && p.left != nil {
				p.left(nil)
			}
			p.kill(why)
			return
		}
		p.mu.Lock()
		w := p.waiting[f.ID]
		if w == nil || w.answer == nil {
			p.mu.Unlock()
			p.kill(errors.New("it answered a question that was not asked"))
			return
		}
		now := time.Now()
		w.queue.heard = now
		if f.Type == wire.TypePart {
			p.mu.Unlock()
			if err := w.take(f); err != nil {
				p.kill(fmt.Errorf("its answer made no sense: %w", err))
				return
			}
			continue
		}
		delete(p.waiting, f.ID)
		if w.long {
			p.freed = now
			p.setAlarmLocked(now)
		}
		p.mu.Unlock()
		if w.secret {
			p.words.hush(false)
		}
		w.answer <- f
	}
}

// take has somebody take a part of the answer.
func (w *pending) take(f wire.Frame) error {
	if w.part == nil {
		return errors.New("it came in parts")
	}
	return w.part(f)
}

// lost makes a reason of what a process says of its own end.
func lost(f wire.Frame) error {
	err := f.Decode(nil)
	switch e, ok := errors.AsType[*wire.Error](err); {
	case !ok:
		return fmt.Errorf("its answer made no sense: %w", err)
	case e.Reason == wire.ReasonOneAtATime:
		return errOneAtATime
	case e.Reason == wire.ReasonRenew:
		return errRenewed
	case e.Reason == wire.ReasonPulled:
		return errPulled
	case e.Function == "C_WaitForSlotEvent":
		return fmt.Errorf("it lost its readers and is started anew: %v", err)
	default:
		return fmt.Errorf("it is started anew: %v", err)
	}
}

// call makes one request and waits for its answer. When ctx ends first, the
// module process is told that nobody waits any more. A module that has not
// answered after timeout is killed.
func (p *process) call(ctx context.Context, timeout time.Duration, t wire.Type, req, reply wire.Message) error {
	return p.request(ctx, false, timeout, t, req, reply, nil)
}

// callThrough is call for what is to be undone by the module process when nobody
// waits for it any more: it returns when that is over.
func (p *process) callThrough(ctx context.Context, timeout time.Duration, t wire.Type, req, reply wire.Message) error {
	return p.request(ctx, true, timeout, t, req, reply, nil)
}

// callParts is call for an answer that comes in parts. Each of them gives the module as much
// time as it had at first. part takes them one after the other, and may not wait. It may
// still be called when callParts has returned, unless that was without an error.
func (p *process) callParts(ctx context.Context, timeout time.Duration, t wire.Type, req, reply wire.Message, part func(wire.Frame) error) error {
	return p.request(ctx, false, timeout, t, req, reply, part)
}

func (p *process) request(ctx context.Context, through bool, timeout time.Duration, t wire.Type, req, reply wire.Message, part func(wire.Frame) error) error {
	if err := ctx.Err(); err != nil {
		return err
	}
	long := t == wire.TypeGenerate || t == wire.TypeNewToken
	switch {
	case long:
		timeout = max(timeout, p.timeout)
	case p.timeout != 0:
		timeout = p.timeout
	}
	w := &pending{
		answer: make(chan wire.Frame, 1), timeout: timeout, since: time.Now(), long: long, part: part,
		secret: p.words != nil && hasPIN(req),
	}
	mark := p.words.mark()
	p.mu.Lock()
	if p.err != nil {
		p.mu.Unlock()
		return p.ended(ctx)
	}
	w.queue = p.queueLocked(tokenOf(req))
	id := p.numberLocked()
	p.waitLocked(id, w)
	p.mu.Unlock()
	if w.secret {
		p.words.hush(true) // read, or the end of the process, undoes it
	}

	if err := p.conn.WriteRequest(id, t, req); err != nil {
		p.mu.Lock()
		if p.waiting[id] == w {
			delete(p.waiting, id)
			if w.secret {
				defer p.words.hush(false)
			}
		}
		p.mu.Unlock()
		if _, ok := errors.AsType[*net.OpError](err); !ok {
			return err // it was not sent
		}
		// The process has gone, or has closed its socket and is of no use: its end
		// says why.
		_ = p.cmd.Process.Kill()
		return p.ended(ctx)
	}
	select {
	case f, ok := <-w.answer:
		if !ok {
			return p.ended(ctx)
		}
		return p.words.explain(f.Decode(reply), mark)
	case <-ctx.Done():
		// The number is spent: an answer still finds its entry and is dropped
		// there. Should the connection fail now, its reader notices as well.
		tell := make(chan struct{})
		p.mu.Lock()
		if p.err == nil && p.waiting[id] == w {
			cancel := p.numberLocked()
			p.sending.Go(func() {
				_ = p.conn.WriteRequest(cancel, wire.TypeCancel, &wire.Cancel{Request: id})
				close(tell)
			})
		} else {
			close(tell)
		}
		p.mu.Unlock()
		if !through {
			return ctx.Err()
		}
		<-tell
		f, ok := <-w.answer // its time goes on
		if !ok {
			return p.ended(context.WithoutCancel(ctx))
		}
		return p.words.explain(f.Decode(reply), mark)
	}
}

// waitLocked notes that a request is under way.
func (p *process) waitLocked(id uint32, w *pending) {
	switch {
	case w.queue.gone:
		w.soon = w.since.Add(goneTimeout)
	case p.hurried > 0 && w.queue == p.queues[wire.TokenID{}]:
		w.soon = w.since.Add(p.hurried)
	}
	p.waiting[id] = w
	if p.alarmAt.IsZero() || p.deadlineLocked(w).Before(p.alarmAt) {
		p.setAlarmLocked(w.since)
	}
}

// deadlineLocked is when a request has waited for too long.
func (p *process) deadlineLocked(w *pending) time.Time {
	from := w.since
	for _, later := range []time.Time{w.queue.heard, p.freed} {
		if later.After(from) {
			from = later
		}
	}
	by := from.Add(w.timeout)
	if soon := p.soonLocked(w); !soon.IsZero() && soon.Before(by) {
		by = soon
	}
	return by
}

// soonLocked is when a request has waited for too long as its card has gone; zero: the
// card is there.
func (p *process) soonLocked(w *pending) time.Time {
	if w.soon.IsZero() {
		return w.soon
	}
	for _, o := range p.waiting {
		// What was under way before the card was pulled may be work for a card that is
		// there. What has come since may wait for the same that w waits for.
		if o.soon.IsZero() && o.since.Before(p.gone.Add(-noticeTime)) {
			return w.soon.Add(othersTimeout)
		}
	}
	return w.soon
}

// hurry has all that is under way with cards that have gone, or with the module, answered
// soon. listing is how long the module may take from now on to list its slots, until calm; 0:
// as long as before.
func (p *process) hurry(gone []wire.TokenID, listing time.Duration) {
	now := time.Now()
	p.mu.Lock()
	defer p.mu.Unlock()
	p.gone = now
	if listing > 0 {
		p.hurried = listing
	}
	if p.err != nil {
		return
	}
	for _, id := range gone {
		if q := p.queues[id]; q != nil {
			q.gone = true
		}
	}
	for _, w := range p.waiting {
		if (w.queue.gone || w.queue == p.queues[wire.TokenID{}]) && w.soon.IsZero() {
			w.soon = now.Add(goneTimeout)
		}
	}
	p.setAlarmLocked(now)
}

// expect bounds how long the process may take from now on to list its slots, until calm,
// unless that is bounded already.
func (p *process) expect(listing time.Duration) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.hurried == 0 {
		p.hurried = listing
	}
}

// calm takes note that the process has answered since a card has gone.
func (p *process) calm() {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.hurried = 0
}

// setAlarmLocked sets the alarm to the first deadline there is. It is not put off
// for answers: when it goes off, it is set anew.
func (p *process) setAlarmLocked(now time.Time) {
	p.alarmAt = time.Time{}
	making := p.makingLocked()
	for _, w := range p.waiting {
		if making && !w.long {
			continue
		}
		if d := p.deadlineLocked(w); p.alarmAt.IsZero() || d.Before(p.alarmAt) {
			p.alarmAt = d
		}
	}
	switch {
	case p.alarmAt.IsZero():
	case p.alarm == nil:
		p.alarm = time.AfterFunc(p.alarmAt.Sub(now), p.hung)
	default:
		p.alarm.Reset(p.alarmAt.Sub(now))
	}
}

// makingLocked tells whether a key is made: some modules do nothing else
// meanwhile, and no token does.
func (p *process) makingLocked() bool {
	for _, w := range p.waiting {
		if w.long {
			return true
		}
	}
	return false
}

// hung ends the process, if it has not answered a request in time.
func (p *process) hung() {
	now := time.Now()
	p.mu.Lock()
	making := p.makingLocked()
	for _, w := range p.waiting {
		if (w.long || !making) && !p.deadlineLocked(w).After(now) {
			why := error(&hungError{w.timeout})
			if soon := p.soonLocked(w); !soon.IsZero() && !soon.After(now) {
				why = errPulled
			}
			p.mu.Unlock()
			p.kill(fmt.Errorf("%w: %w", errGone, why))
			return
		}
	}
	if p.err == nil {
		p.setAlarmLocked(now)
	}
	p.mu.Unlock()
}

// tokenOf returns the token that a request is about, the zero one for those
// about the module.
func tokenOf(req wire.Message) wire.TokenID {
	switch r := req.(type) {
	case *wire.Objects:
		return r.Token
	case *wire.Token:
		return r.Token
	case *wire.Login:
		return r.Token
	case *wire.Sign:
		return r.Key.Token
	case *wire.Generate:
		return r.Token
	}
	return wire.TokenID{}
}

// hasPIN tells whether a request brings a PIN.
func hasPIN(req wire.Message) bool {
	switch r := req.(type) {
	case *wire.Login:
		return r.PIN.Len() > 0
	case *wire.Sign:
		return r.PIN.Len() > 0
	case *wire.NewToken:
		return r.PIN.Len() > 0
	}
	return false
}

// numberLocked returns the next request number.
func (p *process) numberLocked() uint32 {
	p.next++
	if p.next == 0 {
		p.next = 1
	}
	return p.next
}

// ended returns the error of a request whose process has gone. It waits for the
// process to be reaped, as its end says more than that of its connection.
func (p *process) ended(ctx context.Context) error {
	select {
	case <-p.done:
	case <-ctx.Done(): // a process stuck in the kernel cannot even be killed
		return ctx.Err()
	}
	err := p.failure()
	if !errors.Is(err, errGone) {
		err = fmt.Errorf("%w: %w", errGone, err)
	}
	return err
}
