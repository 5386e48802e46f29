package main

import (
	"context"
	"fmt"
	"time"
)

func memoryNames() []string { return []string{"memory"} }

// measureMemory measures what agents keep in memory after the first signature, and
// after many of them.
func measureMemory(ctx context.Context, b *bench) error {
	t, err := b.signTokens(ctx, p256)
	if err != nil {
		return err
	}
	agents, err := b.launchBoth(ctx, t, module{path: b.softHSM})
	if err != nil {
		return err
	}
	half := b.signatures / 2
	after := []string{"after the first signature, MiB", fmt.Sprintf("after %d, MiB", half), fmt.Sprintf("after %d, MiB", 2*half)}
	shown := table{append([]string{""}, after...)}
	for _, who := range []int{openSSH, ours} {
		a := agents[who]
		b.say("memory of %s", names[who])
		if err := a.sign(ctx, p256); err != nil {
			return err
		}
		request, err := a.signRequest(ctx, p256)
		if err != nil {
			return err
		}
		cells := []string{names[who]}
		var sums []float64
		for i := range after {
			if i > 0 {
				if _, err := b.loadAgent(ctx, a, request, load{threads: 8, count: half}); err != nil {
					return err
				}
			}
			first, others, err := b.idleMemory(ctx, a)
			if err != nil {
				return err
			}
			cells = append(cells, fmt.Sprintf("%s (%s and %s)", number(first+others), number(first), number(others)))
			sums = append(sums, first+others)
		}
		shown.add(cells...)
		if who == ours {
			b.atMost("memory of agent and module process, MiB", spread{max(sums[0], sums[2])}, 40)
			b.atMost("memory after all signatures, of that after half of them", spread{sums[2] / sums[1]}, 1.05)
		}
	}
	b.show("Resident, of all processes together. In brackets: the agent, and its helper or module process.", shown)
	return nil
}

// idleMemory reads what is resident once the agent has rested for a moment.
func (b *bench) idleMemory(ctx context.Context, a *agent) (first, others float64, err error) {
	select {
	case <-ctx.Done():
		return 0, 0, ctx.Err()
	case <-time.After(b.length):
	}
	return resident(a.cmd.Process.Pid)
}
