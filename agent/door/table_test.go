package door

import (
	"strings"
	"testing"
	"time"

	"p11-agent/agent/peer"
)

// member makes a connection for a table, of a process that runs a program, which has
// asked for nothing for so long.
func member(pid int, program uint64, idle time.Duration) *Conn {
	c := &Conn{recorded: peer.Peer{Known: true, PID: pid, UID: 1000}}
	c.look = func() peer.Peer {
		p := c.recorded
		if program > 0 {
			p.Program.Ino, p.Chain = program, []peer.Process{{PID: pid}}
		}
		return p
	}
	c.active.Store(int64(time.Since(started) - idle))
	return c
}

func (c *Conn) asked() *Conn { c.answered.Store(true); return c }
func (c *Conn) waits() *Conn { c.answering.Store(true); return c }

func repeat(n int, make func(i int) *Conn) (all []*Conn) {
	for i := range n {
		all = append(all, make(i))
	}
	return all
}

// Which connection is closed when there is one too many: the first of each list.
func TestTableChoose(t *testing.T) {
	const tool, evil = 7, 666 // programs
	second := time.Second
	newcomer := func() *Conn { return member(1, tool, 0) }
	for name, all := range map[string][]*Conn{
		"one process has many": append(
			repeat(10, func(i int) *Conn { return member(9, evil, time.Duration(10-i)*second) }),
			member(2, tool, time.Hour).asked(),
		),
		"one process has many, all of which wait": append(
			repeat(10, func(i int) *Conn { return member(9, evil, time.Duration(i)*time.Millisecond).waits() }),
			member(2, tool, time.Hour).asked(),
		),
		"one program has many processes": append(
			repeat(10, func(i int) *Conn { return member(9+i, evil, time.Duration(30-i)*second).asked() }),
			member(2, tool, time.Hour).asked(), member(3, tool, time.Hour).asked(),
		)[0:11],
		"many programs, and a tool that just came": append(
			repeat(10, func(i int) *Conn { return member(9+i, evil+uint64(i), time.Duration(30-i)*second) }),
			member(2, tool, 0), member(3, tool, second).asked(), member(4, tool, 0).waits(),
		),
		"many logins that wait, and programs that rest": append(
			repeat(3, func(i int) *Conn { return member(90+i, evil+uint64(i), time.Duration(10-i)*second) }),
			repeat(100, func(i int) *Conn { return member(200+i, tool, time.Minute).waits() })...,
		),
		"processes that have handed on and ended": append(
			repeat(10, func(i int) *Conn { return member(9+i, 0, time.Duration(10-i)*second) }),
			member(2, tool, time.Hour).asked(), member(3, tool, time.Hour).asked(),
		),
		"the same process, pauses before what is new and what waits": {
			member(9, tool, second).asked(), member(9, tool, 0).asked(), member(9, tool, second), member(9, tool, second).waits(),
		},
		"of those that wait, who came last": {
			member(9, tool, second).waits(), member(9, tool, 2*second).waits(),
		},
	} {
		t.Run(name, func(t *testing.T) {
			table := newTable(len(all))
			for _, c := range all {
				if table.admit(c) != nil {
					t.Fatal("there was room")
				}
			}
			if got := table.admit(newcomer()); got != all[0] {
				for i, c := range all {
					if c == got {
						t.Errorf("connection %d is closed, want the first", i)
					}
				}
			}
			if len(table.all) != len(all) {
				t.Errorf("%d connections, want %d", len(table.all), len(all))
			}
		})
	}
}

func TestTableCharge(t *testing.T) {
	table := newTable(100)
	a, b, c := member(1, 1, 0), member(1, 1, 0), member(2, 2, 0)
	for _, c := range []*Conn{a, b, c} {
		table.admit(c)
	}
	charge := func(c *Conn, n int, victims int, fail string) {
		t.Helper()
		got, err := table.charge(c, Memory, n)
		if len(got) != victims || (err == nil) != (fail == "") || err != nil && !strings.Contains(err.Error(), fail) {
			t.Errorf("%d connections ended, %v; want %d, %q", len(got), err, victims, fail)
		}
	}
	charge(a, MaxProcess[Memory]/2, 0, "")
	charge(b, MaxProcess[Memory]/2, 0, "")
	charge(b, 1, 0, "its process would keep")
	charge(a, -MaxProcess[Memory]/2, 0, "")
	charge(b, 1, 0, "")
	charge(b, -MaxProcess[Memory]/2-1, 0, "")
	if table.used != (Usage{}) {
		t.Errorf("%d bytes are left", table.used[Memory])
	}
	// All together: the process with the most loses a connection.
	table.max[Memory] = 100
	charge(a, 30, 0, "")
	charge(b, 30, 0, "")
	charge(c, 40, 0, "")
	charge(c, 10, 1, "")
	if a.used[Memory]+b.used[Memory] != 60 || table.used[Memory] != 80 || len(table.all) != 2 {
		t.Errorf("%d bytes of %d connections", table.used[Memory], len(table.all))
	}
	gone := a
	if _, ok := table.all[a]; ok {
		gone = b
	}
	charge(gone, 1, 0, "make room")
	charge(gone, -30, 0, "")
	table.leave(gone)
	charge(c, 200, 1, "all connections would keep")
	table.leave(a)
	table.leave(b)
	table.leave(c)
	if table.used != (Usage{}) || len(table.all) != 0 {
		t.Errorf("%d bytes of %d connections are left", table.used[Memory], len(table.all))
	}
}

// A line a minute.
func TestRarely(t *testing.T) {
	var r rarely
	if ok, _ := r.now(); !ok {
		t.Error("the first is not worth a line")
	}
	for range 3 {
		if ok, _ := r.now(); ok {
			t.Error("the next one is, too")
		}
	}
	r.next = time.Now()
	if ok, skipped := r.now(); !ok || skipped != 3 {
		t.Errorf("%t, %d", ok, skipped)
	}
}

// BenchmarkCrowded makes a connection where there are too many.
func BenchmarkCrowded(b *testing.B) {
	table := newTable(MaxConnections)
	for b.Loop() {
		table.admit(member(9, 666, time.Second))
	}
}
