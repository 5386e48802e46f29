package main

import (
	"context"
	"errors"
	"fmt"
)

var connections = []int{1, 2, 8, 64}

// signRow is signatures with keys of a kind, on so many connections at a time,
// which are kept or made anew for each request.
type signRow struct {
	kind  *kind
	at    int
	each  bool
	found *results
}

func (r *signRow) String() string {
	how := "kept"
	if r.each {
		how = "each"
	}
	return fmt.Sprintf("sign %s %d %s", r.kind.name, r.at, how)
}

func signRows() (rows []*signRow) {
	for _, each := range []bool{false, true} {
		for i := range kinds {
			for _, at := range connections {
				rows = append(rows, &signRow{kind: &kinds[i], at: at, each: each})
			}
		}
	}
	return rows
}

func signNames() (all []string) {
	for _, r := range signRows() {
		all = append(all, r.String())
	}
	return all
}

// measureSignatures measures rates and times of signatures, and the processor time
// that they take.
func measureSignatures(ctx context.Context, b *bench) error {
	var rows []*signRow
	var wanted []*kind
	for _, r := range signRows() {
		if b.wants(r.String()) {
			rows, wanted = append(rows, r), append(wanted, r.kind)
		}
	}
	t, err := b.signTokens(ctx, wanted...)
	if err != nil {
		return err
	}
	agents, err := b.launchBoth(ctx, t, module{path: b.softHSM})
	if err != nil {
		return err
	}
	for _, r := range rows {
		l := load{threads: r.at, each: r.each, length: b.length}
		if !r.each {
			if agents[relay], err = b.startRelay(ctx, t, agents[ours].module, r.kind); err != nil {
				return err
			}
		}
		if r.found, err = b.signContest(ctx, r.String(), agents, r.kind, l, !r.each); err != nil {
			return err
		}
		if !r.each {
			b.stop(agents[relay].process)
			agents[relay] = nil
		}
	}
	b.showSignatures(rows)
	return nil
}

// both are the two agents, at their places among the contestants, and a relay in some
// contests.
type both [contestants]*agent

// launchBoth launches both agents on the same token.
func (b *bench) launchBoth(ctx context.Context, t *tokens, m module) (agents both, err error) {
	for _, who := range []int{openSSH, ours} {
		if agents[who], err = b.launchNew(ctx, who, t, m); err != nil {
			return agents, err
		}
	}
	return agents, nil
}

// signContest has all that offer such a key sign with it.
func (b *bench) signContest(ctx context.Context, row string, agents both, k *kind, l load, withBare bool) (*results, error) {
	var measure [contestants]func(context.Context) (sample, error)
	if withBare {
		measure[bare] = func(ctx context.Context) (sample, error) {
			return b.loadBare(ctx, agents[ours].tokens, agents[ours].module, k, l)
		}
	}
	for _, who := range []int{openSSH, ours} {
		a := agents[who]
		switch err := a.sign(ctx, k); { // which logs in
		case who == openSSH && errors.Is(err, errNoKey):
			continue
		case err != nil:
			return nil, err
		}
		request, err := a.signRequest(ctx, k)
		if err != nil {
			return nil, err
		}
		measure[who] = func(ctx context.Context) (sample, error) { return b.loadAgent(ctx, a, request, l) }
	}
	if a := agents[relay]; a != nil {
		request, err := agents[ours].signRequest(ctx, k) // it takes any
		if err != nil {
			return nil, err
		}
		measure[relay] = func(ctx context.Context) (sample, error) { return b.loadAgent(ctx, a, request, l) }
	}
	return b.contest(ctx, row, measure)
}

func (b *bench) showSignatures(rows []*signRow) {
	kept := table{{
		"key", "connections", "bare /s", "ssh-agent /s", "p11-agent /s", "relay, of bare", "p11-agent, of bare", "times ssh-agent",
	}}
	waits := table{{"key", "connections", "p99 bare, ms", "p99 ssh-agent, ms", "p99 p11-agent, ms"}}
	each := table{{
		"key", "connections", "ssh-agent /s", "p11-agent /s", "times ssh-agent", "p99 ssh-agent, ms", "p99 p11-agent, ms",
	}}
	cost := table{{
		"key", "connections", "bare, µs", "ssh-agent, µs", "p11-agent, µs", "relay above bare, µs", "p11-agent above bare, µs",
	}}
	for _, r := range rows {
		f, name, at := r.found, r.kind.name, fmt.Sprint(r.at)
		times := f.ratio(ours, openSSH, rate)
		if r.each {
			each.add(name, at, f.of(openSSH, rate).short(), f.of(ours, rate).short(), times.String(),
				f.of(openSSH, p99).short(), f.of(ours, p99).short())
			continue
		}
		share := f.ratio(ours, bare, rate)
		kept.add(name, at, f.of(bare, rate).short(), f.of(openSSH, rate).short(), f.of(ours, rate).short(),
			f.ratio(relay, bare, rate).String(), share.String(), times.String())
		waits.add(name, at, f.of(bare, p99).short(), f.of(openSSH, p99).short(), f.of(ours, p99).short())
		above := f.above(ours, bare, cpu)
		cost.add(name, at, f.of(bare, cpu).short(), f.of(openSSH, cpu).short(), f.of(ours, cpu).short(),
			f.above(relay, bare, cpu).String(), above.String())
		b.signGoals(r, share, times, above)
	}
	b.show("On connections that are kept:", kept)
	b.show("How long it takes, on those:", waits)
	b.show("With a connection for each request:", each)
	b.show("Processor time for one signature, of the loop, and of the agents with their children, on connections that are kept:", cost)
}

// signGoals notes what the rates of a row were to be.
func (b *bench) signGoals(r *signRow, share, times, above spread) {
	for _, g := range []struct {
		kind         string
		at           int
		share, times float64
	}{
		{"P-256", 1, 0.40, 3},
		{"P-256", 8, 0.65, 5},
		{"RSA-2048", 1, 0.88, 1.2},
		{"RSA-2048", 8, 0.93, 2},
	} {
		if g.kind != r.kind.name || g.at != r.at {
			continue
		}
		name := fmt.Sprintf("signatures, %s, %d at a time: ", g.kind, g.at)
		b.atLeast(name+"share of the bare loop's rate", share, g.share)
		b.atLeast(name+"times the rate of ssh-agent", times, g.times)
		if r.kind == p256 {
			b.atMost(name+"processor time above the bare loop's, µs", above, 60)
		}
	}
}
