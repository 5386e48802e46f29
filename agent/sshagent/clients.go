package sshagent

import (
	"cmp"
	"errors"
	"fmt"
	"net"
	"os"
	"runtime/debug"
	"sync"
	"syscall"
	"time"

	"p11-agent/agent/peer"
)

const (
	// restAfter is how long a connection has to ask for nothing to count as resting.
	// ssh pauses for shorter, between the list and the signature.
	restAfter = 2 * time.Second

	// manyOf is the part of all connections that one process has to have to be the one
	// that loses a connection.
	manyOf = 16

	// relieveFrom and relieveTo say when memory goes back to the system: the clients
	// had the first, and have the second.
	relieveFrom = 4 << 20
	relieveTo   = 1 << 20
)

// A resource is something that connections keep for their clients.
type resource int

const (
	// memory has binds, messages that have arrived in part or wait for their answer,
	// what was read out of them, and answers that the client does not take.
	memory resource = iota
	// locked is the memory of what may hold a secret. The kernel lets a process lock so
	// much (RLIMIT_MEMLOCK, mostly 8 MiB), and the PINs of persons need some.
	locked

	resources
)

// used is how many bytes are kept.
type used [resources]int

// maxUsed bounds what the connections of a Server keep, and maxProcess what those of
// one process do, such as the ssh that forwards the agent.
var (
	maxUsed    = used{memory: 16 << 20, locked: 4 << 20}
	maxProcess = used{memory: 4 << 20, locked: 1 << 20}
)

// lockedSize is how much memory is locked for so many bytes: whole pages.
func lockedSize(n int) int {
	page := os.Getpagesize()
	return max(1, (n+page-1)/page) * page
}

var errMadeRoom = errors.New("the connection was closed to make room for another client")

// clients are the connections of a Server. When there are too many, the next one is
// served all the same, and one of the others is closed: a quota that is used up
// would keep the person's own tools out.
//
// The process with the most connections loses one first. Processes with equally many
// are told apart by whether the connection rests, and by how many connections their
// program has. So the tools of a person, with a connection or two for each process,
// lose none before the clients that have taken all the room.
//
// All methods may be called from any goroutine. None waits for a client.
type clients struct {
	limit int
	max   used // maxUsed, or less in tests

	mu        sync.Mutex
	all       map[*conn]struct{}
	processes map[process]map[*conn]struct{} // the same, by who made them
	used      used                           // by all
	peak      int                            // the most memory that was used since some went back
}

// process is one of a user, by its number. That is 0 where the kernel shows none.
type process struct{ uid, pid int }

func (c *conn) process() process { return process{c.recorded.UID, c.recorded.PID} }

func newClients(limit int) *clients {
	return &clients{
		limit: limit, max: maxUsed,
		all: make(map[*conn]struct{}), processes: make(map[process]map[*conn]struct{}),
	}
}

// defaultLimit is how many connections a Server has when nothing else is said: no
// more than half of the files that the process may open, for a client that waits may
// cost a second file, of an upstream agent or a prompt.
func defaultLimit() int {
	var files syscall.Rlimit
	if err := syscall.Getrlimit(syscall.RLIMIT_NOFILE, &files); err != nil {
		return DefaultMaxConnections
	}
	return int(max(1, min(DefaultMaxConnections, files.Cur/2)))
}

// admit counts a connection, and returns the one that it takes the place of, or nil.
// That one is no longer counted, and is to be ended by hangUp.
func (t *clients) admit(c *conn) (victim *conn) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if len(t.all) >= t.limit {
		victim = t.chooseOneLocked()
		t.removeLocked(victim)
	}
	t.all[c] = struct{}{}
	own := t.processes[c.process()]
	if own == nil {
		own = make(map[*conn]struct{})
		t.processes[c.process()] = own
	}
	own[c] = struct{}{}
	return victim
}

// makeRoom returns a connection that is to be ended by hangUp, or nil when there is
// none.
func (t *clients) makeRoom() (victim *conn) {
	t.mu.Lock()
	defer t.mu.Unlock()
	victim = t.chooseOneLocked()
	t.removeLocked(victim)
	return victim
}

// leave ends the count of a connection and of what is kept for it.
func (t *clients) leave(c *conn) {
	t.mu.Lock()
	t.removeLocked(c)
	relieve := t.peak >= relieveFrom && t.used[memory] <= relieveTo
	if relieve {
		t.peak = t.used[memory]
	}
	t.mu.Unlock()
	if relieve {
		// Garbage is collected every two minutes when nothing happens, and goes back
		// to the system slowly: until then an attack would seem to go on.
		debug.FreeOSMemory()
	}
}

func (t *clients) removeLocked(c *conn) {
	if c == nil {
		return
	}
	if _, ok := t.all[c]; ok {
		delete(t.all, c)
		own := t.processes[c.process()]
		if delete(own, c); len(own) == 0 {
			delete(t.processes, c.process())
		}
		for r, n := range c.used {
			t.used[r] -= n
		}
	}
}

// charge counts n more bytes that are kept for a connection, or fewer when n is
// negative. It returns the connections that have to be ended by hangUp for that. The
// error says why the bytes cannot be kept.
func (t *clients) charge(c *conn, r resource, n int) (victims []*conn, err error) {
	t.mu.Lock()
	defer t.mu.Unlock()
	_, counted := t.all[c]
	if n > 0 {
		if !counted {
			return nil, errMadeRoom
		}
		if sum := n + t.processLocked(c, r); sum > maxProcess[r] {
			return nil, fmt.Errorf("the connections of its process would keep %d KiB, and the limit is %d KiB: close some of them", sum>>10, maxProcess[r]>>10)
		}
		for t.used[r]+n > t.max[r] {
			victim := choose(t.all, c, func(c *conn) int { return c.used[r] })
			if victim == nil {
				return victims, fmt.Errorf("all connections would keep %d KiB, and the limit is %d KiB", (t.used[r]+n)>>10, t.max[r]>>10)
			}
			t.removeLocked(victim)
			victims = append(victims, victim)
		}
	}
	c.used[r] += n
	if counted {
		t.used[r] += n
		t.peak = max(t.peak, t.used[memory])
	}
	return victims, nil
}

// processLocked returns how much is kept for the process of a connection.
func (t *clients) processLocked(c *conn, r resource) (sum int) {
	if c.recorded.PID == 0 {
		return c.used[r] // nothing tells it from others that cannot be seen
	}
	for other := range t.processes[c.process()] {
		sum += other.used[r]
	}
	return sum
}

// chooseOneLocked returns the connection that is ended when there are too many, or nil
// when there is none. Where one process has a good part of all, nothing else need be
// known: programs are looked at only when many processes have a few connections each.
func (t *clients) chooseOneLocked() *conn {
	var most map[*conn]struct{}
	for p, own := range t.processes {
		if p.pid != 0 && len(own) > len(most) {
			most = own
		}
	}
	if len(most) > max(1, t.limit/manyOf) {
		return choose(most, nil, nil)
	}
	return choose(t.all, nil, func(*conn) int { return 1 })
}

// count returns how many connections there are of a listener.
func (t *clients) count(l Listener) (n int) {
	t.mu.Lock()
	defer t.mu.Unlock()
	for c := range t.all {
		if c.listener == l {
			n++
		}
	}
	return n
}

// The states of a connection, in the order in which they are ended.
const (
	resting = iota // it has asked for nothing for restAfter
	pausing        // it has asked for something
	fresh          // it was made just now
	busy           // its client waits for an answer
)

// state tells what a connection does, and since when.
func (c *conn) state(now time.Duration) (state int, since time.Duration) {
	since = time.Duration(c.active.Load())
	switch {
	case c.answering.Load():
		return busy, since
	case now-since >= restAfter:
		return resting, since
	case c.answered.Load():
		return pausing, since
	}
	return fresh, since
}

// started is what times of connections are counted from.
var started = time.Now()

// holder is who a connection belongs to. A process that has ended is not told from
// others: its connections were handed on, and by how many processes tells nothing.
type holder struct {
	process
	program peer.Program // zero: it is not known
}

// holder looks at the process once. Only the clients call it, under their mutex.
func (c *conn) holder() holder {
	if c.held == nil {
		p := c.recorded
		if c.who != nil {
			p = c.who()
		}
		c.held = &holder{process{uid: p.UID}, p.Program}
		if len(p.Chain) > 0 {
			c.held.pid = p.PID
		}
	}
	return *c.held
}

// A candidate is a connection that may be ended, and what is decided by.
type candidate struct {
	*conn
	process, program int // how much those have that it is of
	state            int
	since            time.Duration
}

// compare tells which of two connections is ended first.
func (a candidate) compare(b candidate) int {
	rests := func(c candidate) int { return min(c.state, resting+1) }
	age := cmp.Compare(a.since, b.since)
	if a.state == busy {
		age = -age // who has waited for long is served before who came last
	}
	return cmp.Or(
		cmp.Compare(b.process, a.process),
		cmp.Compare(rests(a), rests(b)),
		cmp.Compare(b.program, a.program),
		cmp.Compare(a.state, b.state),
		age,
	)
}

// choose returns the connection of all that is ended to make room for c, which may be
// nil, or nil when no other one weighs anything. When weigh is nil, all are of one
// process, and weigh the same.
func choose(all map[*conn]struct{}, c *conn, weigh func(*conn) int) *conn {
	type program struct {
		uid int
		peer.Program
	}
	processes, programs := make(map[process]int), make(map[program]int)
	if weigh != nil {
		for other := range all {
			o := other.holder()
			processes[o.process] += weigh(other)
			programs[program{o.uid, o.program}] += weigh(other)
		}
	}
	now := time.Since(started)
	var first candidate
	for other := range all {
		if other == c || weigh != nil && weigh(other) == 0 {
			continue
		}
		next := candidate{conn: other}
		next.state, next.since = other.state(now)
		if weigh != nil {
			o := other.holder()
			next.process, next.program = processes[o.process], programs[program{o.uid, o.program}]
		}
		if first.conn == nil || next.compare(first) < 0 {
			first = next
		}
	}
	return first.conn
}

// hangUp ends a connection from outside. A client that waits gets its answer first:
// it goes on when its prompt has gone from the terminal, not before.
func (c *conn) hangUp() {
	if c.answering.Load() {
		if nc, ok := c.nc.(*net.UnixConn); ok {
			_ = nc.CloseRead()
			return
		}
	}
	_ = c.nc.Close()
}

// rarely says when something that clients can cause at will is worth a line in the
// log: once a minute. The zero value is ready to use.
type rarely struct {
	mu      sync.Mutex
	next    time.Time
	skipped int
}

// now tells whether it is, and how often it was not since the last time.
func (r *rarely) now() (ok bool, skipped int) {
	r.mu.Lock()
	defer r.mu.Unlock()
	now := time.Now()
	if now.Before(r.next) {
		r.skipped++
		return false, 0
	}
	skipped = r.skipped
	r.next, r.skipped = now.Add(time.Minute), 0
	return true, skipped
}
