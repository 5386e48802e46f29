package procstat

import (
	"os"
	"testing"
	"time"
)

// statSeeds are contents of /proc/PID/stat. The names in them make parsing hard.
var statSeeds = []string{
	"1234 (ssh) S 99 1234 1234 34816 1234 4194304 1 0 0 0 1 2 0 0 20 0 1 0 5678 1 2 3\n",
	"1234 (a) b (c) S) R 99 1234 1234 0 -1 4194304 1 0 0 0 1 2 0 0 20 0 1 0 18446744073709551615 1\n",
	"1234 (\n) Z 0 0 0 0 -1 0 0 0 0 0 0 0 0 0 0 0 0 0 1",
	"1234 () S 99",
	")(",
	"",
}

func TestParse(t *testing.T) {
	for i, want := range []struct {
		name   string
		state  byte
		parent int
		start  uint64
		ok     bool
	}{
		{"ssh", 'S', 99, 5678, true},
		{"a) b (c) S", 'R', 99, 1<<64 - 1, true},
		{"\n", 'Z', 0, 1, true},
		{},
		{},
		{},
	} {
		got, ok := Parse([]byte(statSeeds[i]))
		if string(got.Name) != want.name || got.State != want.state || got.Parent != want.parent || got.Start != want.start || ok != want.ok {
			t.Errorf("%q: %+v %v, want %+v", statSeeds[i], got, ok, want)
		}
	}
	if got, _ := Parse([]byte(statSeeds[0])); got.CPU != 3*Tick || got.TTY != 34816 || got.Foreground != 1234 || got.Group != 1234 || got.Session != 1234 {
		t.Errorf("%+v", got)
	}
}

func TestOf(t *testing.T) {
	self, ok := Of(os.Getpid())
	if !ok || self.Parent != os.Getppid() || self.Start == 0 {
		t.Errorf("this process: %+v %v, want parent %d", self, ok, os.Getppid())
	}
	if at, ok := self.Started(); !ok || time.Since(at) > time.Hour || time.Until(at) > time.Minute {
		t.Errorf("started %v, %t", at, ok)
	}
	if main, ok := OfThread(os.Getpid()); !ok || main.Start != self.Start {
		t.Errorf("the main thread: %+v %v, want start %d", main, ok, self.Start)
	}
	if s, ok := Of(1 << 30); ok {
		t.Errorf("a process that is not there: %+v", s)
	}
}

func FuzzParse(f *testing.F) {
	for _, s := range statSeeds {
		f.Add([]byte(s))
	}
	f.Fuzz(func(t *testing.T, b []byte) {
		if s, ok := Parse(b); ok && s.Parent < 0 {
			t.Errorf("parent %d", s.Parent)
		}
	})
}
