package door

import (
	"cmp"
	"fmt"
	"os"
	"runtime/debug"
	"sync"
	"syscall"
	"time"

	"p11-agent/agent/peer"
)

const (
	// A connection that asks for nothing for restAfter counts as resting. Between the
	// list and the signature, ssh pauses for less.
	restAfter = 2 * time.Second

	// A process with more than one of manyOf connections loses one, for any program.
	manyOf = 16

	// The agent gives memory back to the system when the clients had relieveFrom bytes and
	// have at most relieveTo.
	relieveFrom = 4 << 20
	relieveTo   = 1 << 20
)

// A Resource is something that connections keep for their clients.
type Resource int

// The resources.
const (
	// Memory holds binds, messages until they are answered, constraints of requests
	// under way, and answers until the client takes them.
	Memory Resource = iota
	// Locked holds messages with secrets, and the secrets. The kernel bounds the memory
	// that the agent may lock (RLIMIT_MEMLOCK, mostly 8 MiB). Prompts need some of it.
	Locked

	resources
)

// A Usage is how many bytes of each Resource are kept.
type Usage [resources]int

var (
	// MaxProcess bounds what the connections of one process keep, in bytes. Such a process
	// is the ssh that forwards the agent.
	MaxProcess = Usage{Memory: 4 << 20, Locked: 1 << 20}

	// maxUsed bounds what all connections of a Server keep.
	maxUsed = Usage{Memory: 16 << 20, Locked: 4 << 20}
)

// LockedSize returns how much memory is locked for n bytes: whole pages.
func LockedSize(n int) int {
	page := os.Getpagesize()
	return max(1, (n+page-1)/page) * page
}

// A table has the connections of a Server. When the table is full, the Server serves
// a new connection all the same, and closes another one. A fixed quota would shut the
// person's own tools out once other clients have used it up.
//
// The process with the most connections loses one. Among processes with equally many,
// a resting connection goes first, and then one of the program with the most
// connections. A tool has a connection or two for each process, so that it loses none
// before the client that has filled the table.
//
// Any goroutine may call the methods. None of them waits for a client.
type table struct {
	limit int
	max   Usage // maxUsed, or less in tests

	mu        sync.Mutex
	all       map[*Conn]struct{}
	processes map[process]map[*Conn]struct{} // the same, by the process that made them
	used      Usage                          // by all
	peak      int                            // the most memory that was used since some went back
}

// process is a process of a user, by its number. The number is 0 if the kernel shows none.
type process struct{ uid, pid int }

func (c *Conn) process() process { return process{c.recorded.UID, c.recorded.PID} }

func newTable(limit int) *table {
	return &table{
		limit: limit, max: maxUsed,
		all: make(map[*Conn]struct{}), processes: make(map[process]map[*Conn]struct{}),
	}
}

// defaultLimit returns how many connections a Server has by default: at most half of the files that
// the process may open. Upstream agents, prompts and module processes need the other half.
func defaultLimit() int {
	var files syscall.Rlimit
	if err := syscall.Getrlimit(syscall.RLIMIT_NOFILE, &files); err != nil {
		return MaxConnections
	}
	return int(max(1, min(MaxConnections, files.Cur/2)))
}

// admit counts a connection. It returns the connection that has to make room, or nil. The caller
// ends that connection with Server.end.
func (t *table) admit(c *Conn) (victim *Conn) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if len(t.all) >= t.limit {
		victim = t.chooseOneLocked()
		t.removeLocked(victim)
	}
	t.all[c] = struct{}{}
	own := t.processes[c.process()]
	if own == nil {
		own = make(map[*Conn]struct{})
		t.processes[c.process()] = own
	}
	own[c] = struct{}{}
	return victim
}

// makeRoom returns a connection that the caller ends with Server.end, or nil when
// there is none.
func (t *table) makeRoom() (victim *Conn) {
	t.mu.Lock()
	defer t.mu.Unlock()
	victim = t.chooseOneLocked()
	t.removeLocked(victim)
	return victim
}

// leave forgets a connection and what it keeps.
func (t *table) leave(c *Conn) {
	t.mu.Lock()
	t.removeLocked(c)
	relieve := t.peak >= relieveFrom && t.used[Memory] <= relieveTo
	if relieve {
		t.peak = t.used[Memory]
	}
	t.mu.Unlock()
	if relieve {
		// Go collects garbage every two minutes when nothing happens, and gives memory
		// back slowly. Until then the agent would look as large as during an attack.
		debug.FreeOSMemory()
	}
}

func (t *table) removeLocked(c *Conn) {
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

// charge counts n more bytes that a connection keeps, or fewer when n is negative. It
// returns the connections that have to make room: the caller ends them with
// Server.end. The error says why the connection cannot keep the bytes.
func (t *table) charge(c *Conn, r Resource, n int) (victims []*Conn, err error) {
	t.mu.Lock()
	defer t.mu.Unlock()
	_, counted := t.all[c]
	if n > 0 {
		if !counted {
			return nil, ErrMadeRoom
		}
		if sum := n + t.processLocked(c, r); sum > MaxProcess[r] {
			return nil, fmt.Errorf("the connections of its process would keep %d KiB, and the limit is %d KiB: close some of them", sum>>10, MaxProcess[r]>>10)
		}
		for t.used[r]+n > t.max[r] {
			victim := choose(t.all, c, func(c *Conn) int { return c.used[r] })
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
		t.peak = max(t.peak, t.used[Memory])
	}
	return victims, nil
}

// processLocked returns how much the process of a connection keeps.
func (t *table) processLocked(c *Conn, r Resource) (sum int) {
	if c.recorded.PID == 0 {
		return c.used[r] // the kernel does not show which process it is
	}
	for other := range t.processes[c.process()] {
		sum += other.used[r]
	}
	return sum
}

// chooseOneLocked returns the connection that ends when the table is full, or nil when
// there is none. It looks at programs only when many processes have a few connections
// each: that takes 20 system calls for each process.
func (t *table) chooseOneLocked() *Conn {
	var most map[*Conn]struct{}
	for p, own := range t.processes {
		if p.pid != 0 && len(own) > len(most) {
			most = own
		}
	}
	if len(most) > max(1, t.limit/manyOf) {
		return choose(most, nil, nil)
	}
	return choose(t.all, nil, func(*Conn) int { return 1 })
}

// count returns how many connections there are of a listener.
func (t *table) count(l Listener) (n int) {
	t.mu.Lock()
	defer t.mu.Unlock()
	for c := range t.all {
		if c.listener == l {
			n++
		}
	}
	return n
}

// The states of a connection, in the order in which connections make room.
const (
	resting = iota // it has asked for nothing for restAfter
	pausing        // it has asked for something
	fresh          // it was made just now
	busy           // its client waits for an answer
)

// state returns what a connection does, and since when.
func (c *Conn) state(now time.Duration) (state int, since time.Duration) {
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

// kept returns what the connections keep, and how many there are.
func (t *table) kept() (Usage, int) {
	t.mu.Lock()
	defer t.mu.Unlock()
	return t.used, len(t.all)
}

// started is the time from which times of connections are counted.
var started = time.Now()

// A holder is the process that a connection belongs to, and its program. All processes that have
// ended count as one: they have handed their connections to another process.
type holder struct {
	process
	program peer.Program // zero: it is not known
}

// holder looks at the process once. Only the table calls it, and holds its mutex.
func (c *Conn) holder() holder {
	if c.held == nil {
		p := c.who()
		c.held = &holder{process{uid: p.UID}, p.Program}
		if len(p.Chain) > 0 {
			c.held.pid = p.PID
		}
	}
	return *c.held
}

// A candidate is a connection that may end to make room.
type candidate struct {
	*Conn
	process, program int // how much its process and its program weigh
	state            int
	since            time.Duration
}

// compare returns a negative number when a ends before b.
func (a candidate) compare(b candidate) int {
	rests := func(c candidate) int { return min(c.state, resting+1) }
	age := cmp.Compare(a.since, b.since)
	if a.state == busy {
		age = -age // the request that came last ends first
	}
	return cmp.Or(
		cmp.Compare(b.process, a.process),
		cmp.Compare(rests(a), rests(b)),
		cmp.Compare(b.program, a.program),
		cmp.Compare(a.state, b.state),
		age,
	)
}

// choose returns the connection that ends to make room for c, which may be nil. It
// returns nil when no other connection weighs anything. weigh is nil when all are of
// one process, and weigh the same.
func choose(all map[*Conn]struct{}, c *Conn, weigh func(*Conn) int) *Conn {
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
		next := candidate{Conn: other}
		next.state, next.since = other.state(now)
		if weigh != nil {
			o := other.holder()
			next.process, next.program = processes[o.process], programs[program{o.uid, o.program}]
		}
		if first.Conn == nil || next.compare(first) < 0 {
			first = next
		}
	}
	return first.Conn
}

// rarely lets one line a minute into the log, about something that clients can cause as often as
// they like. The zero value is ready to use.
type rarely struct {
	mu      sync.Mutex
	next    time.Time
	skipped int
}

// now tells whether the log gets a line now, and how many lines were skipped since the last one.
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
