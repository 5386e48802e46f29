package main

import (
	"context"
	"fmt"
)

// listRow is lists of so many keys, on so many connections at a time.
type listRow struct {
	keys, at int
	each     bool
	found    *results
}

func (r *listRow) String() string {
	how := "kept"
	if r.each {
		how = "each"
	}
	return fmt.Sprintf("list %d keys %d %s", r.keys, r.at, how)
}

var listSizes = []int{2, 100, 1000}

func listRows(keys int) []*listRow {
	return []*listRow{{keys: keys, at: 1}, {keys: keys, at: 8}, {keys: keys, at: 1, each: true}}
}

func listNames() (all []string) {
	for _, keys := range listSizes {
		for _, r := range listRows(keys) {
			all = append(all, r.String())
		}
	}
	return all
}

// measureLists measures rates and times of lists.
func measureLists(ctx context.Context, b *bench) error {
	shown := table{{
		"keys", "connections", "ssh-agent /s", "p11-agent /s", "times ssh-agent", "p99 ssh-agent, ms", "p99 p11-agent, ms",
	}}
	for _, keys := range listSizes {
		var rows []*listRow
		for _, r := range listRows(keys) {
			if b.wants(r.String()) {
				rows = append(rows, r)
			}
		}
		if len(rows) == 0 {
			continue
		}
		if err := b.listKeys(ctx, keys, rows); err != nil {
			return err
		}
		for _, r := range rows {
			f, at := r.found, fmt.Sprint(r.at)
			if r.each {
				at += ", one for each request"
			}
			shown.add(fmt.Sprint(keys), at, f.of(openSSH, rate).short(), f.of(ours, rate).short(), f.ratio(ours, openSSH, rate).String(),
				f.of(openSSH, p99).short(), f.of(ours, p99).short())
			if r.at == 1 && !r.each {
				b.listGoals(r)
			}
		}
	}
	b.show("", shown)
	return nil
}

// listKeys measures the rows of one number of keys.
func (b *bench) listKeys(ctx context.Context, keys int, rows []*listRow) error {
	b.say("making %d keys", keys)
	t, err := b.newTokens(ctx)
	if err != nil {
		return err
	}
	if err := b.add(ctx, t, p256, 1, keys); err != nil {
		return err
	}
	agents, err := b.launchBoth(ctx, t, module{path: b.softHSM})
	if err != nil {
		return err
	}
	for _, r := range rows {
		var measure [contestants]func(context.Context) (sample, error)
		for _, who := range []int{openSSH, ours} {
			measure[who] = func(ctx context.Context) (sample, error) {
				return b.loadAgent(ctx, agents[who], listRequest, load{threads: r.at, each: r.each, length: b.length})
			}
		}
		if r.found, err = b.contest(ctx, r.String(), measure); err != nil {
			return err
		}
	}
	b.stopAll()
	return nil
}

func (b *bench) listGoals(r *listRow) {
	switch r.keys {
	case 2:
		b.notSlower("list of 2 keys: time, of ssh-agent's", r.found.ratio(openSSH, ours, rate))
	case 1000:
		b.atMost("list of 1,000 keys: p99, ms", r.found.of(ours, p99), 5)
	}
}
