package main

import (
	"context"
	"os"
	"path/filepath"
	"time"
)

// startRow is the start of an agent until it lists its keys.
type startRow struct {
	name  string
	slow  bool // the module takes half a second for each search
	first bool // for the first time ever, so that nothing is remembered
}

var startRows = []startRow{
	{"start for the first time", false, true},
	{"start again", false, false},
	{"start for the first time, slow module", true, true},
	{"start again, slow module", true, false},
}

func startNames() (all []string) {
	for _, r := range startRows {
		all = append(all, r.name)
	}
	return all
}

// measureStarts measures the time from the start of the process to the first list
// with all keys. That of ssh-agent includes ssh-add, which it needs each time.
func measureStarts(ctx context.Context, b *bench) error {
	shown := table{{"", "ssh-agent with ssh-add, ms", "p11-agent, ms", "p11-agent, of ssh-agent's"}}
	for _, r := range startRows {
		if !b.wants(r.name) {
			continue
		}
		found, err := b.startContest(ctx, r)
		if err != nil {
			return err
		}
		shown.add(r.name, found.of(openSSH, median).String(), found.of(ours, median).String(), found.ratio(ours, openSSH, median).String())
		if !r.first {
			b.atMost(r.name+": to the first list of keys, ms", found.of(ours, median), 50)
		}
	}
	b.show("From the start of the process until all keys are listed:", shown)
	return nil
}

func (b *bench) startContest(ctx context.Context, r startRow) (*results, error) {
	t, err := b.signTokens(ctx, p256)
	if err != nil {
		return nil, err
	}
	m := module{path: b.softHSM}
	if r.slow {
		m = b.slowModule("SLOW_SEARCH=500")
	}
	var measure [contestants]func(context.Context) (sample, error)
	for _, who := range []int{openSSH, ours} {
		a, err := b.newAgent(who, t, m)
		if err != nil {
			return nil, err
		}
		if !r.first { // then there is something to remember
			if err := b.launch(ctx, a); err != nil {
				return nil, err
			}
			b.stop(a.process)
		}
		measure[who] = func(ctx context.Context) (sample, error) {
			if r.first {
				if err := os.RemoveAll(filepath.Join(a.dir, ".local")); err != nil {
					return sample{}, err
				}
			}
			begun := time.Now()
			if err := b.launch(ctx, a); err != nil {
				return sample{}, err
			}
			took := time.Since(begun)
			b.stop(a.process)
			return sample{median: took.Seconds() * 1000}, nil
		}
	}
	return b.contest(ctx, r.name, measure)
}
