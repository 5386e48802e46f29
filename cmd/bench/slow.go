package main

import (
	"context"
	"fmt"
)

// slowModule is the one of slow.c with these settings.
func (b *bench) slowModule(settings ...string) module {
	return module{path: b.slow, env: append([]string{"SLOW_MODULE=" + b.softHSM}, settings...)}
}

func wideNames() []string { return []string{"token of 16 at a time"} }

// measureWide measures how well a token is kept at work that can do much at once.
func measureWide(ctx context.Context, b *bench) error {
	const clients = 16
	t, err := b.signTokens(ctx, p256)
	if err != nil {
		return err
	}
	agents, err := b.launchBoth(ctx, t, b.slowModule("SLOW_SIGN=5", fmt.Sprintf("SLOW_WIDTH=%d", clients)))
	if err != nil {
		return err
	}
	r, err := b.signContest(ctx, wideNames()[0], agents, p256, load{threads: clients, length: b.length}, true)
	if err != nil {
		return err
	}
	shown := table{{"connections", "bare /s", "ssh-agent /s", "p11-agent /s", "of bare", "times ssh-agent", "p99 ssh-agent, ms", "p99 p11-agent, ms"}}
	times := r.ratio(ours, openSSH, rate)
	shown.add(fmt.Sprint(clients), r.of(bare, rate).short(), r.of(openSSH, rate).short(), r.of(ours, rate).short(),
		r.ratio(ours, bare, rate).String(), times.String(), r.of(openSSH, p99).short(), r.of(ours, p99).short())
	b.show("", shown)
	b.atLeast("token of 16 at a time, 16 connections: times the rate of ssh-agent", times, 14)
	return nil
}

func cardNames() []string { return []string{"card of one at a time"} }

// The card of cardNames, and those who want it.
const (
	cardClients = 20
	cardTurn    = 100 // ms
	cardTurns   = 4   // for each client, if all are served alike
)

// measureCard measures whether a slow card serves those fairly who wait for it.
func measureCard(ctx context.Context, b *bench) error {
	t, err := b.signTokens(ctx, p256)
	if err != nil {
		return err
	}
	agents, err := b.launchBoth(ctx, t, b.slowModule(fmt.Sprintf("SLOW_SIGN=%d", cardTurn), "SLOW_WIDTH=1"))
	if err != nil {
		return err
	}
	r, err := b.signContest(ctx, cardNames()[0], agents, p256, load{threads: cardClients, count: cardTurns * cardClients}, false)
	if err != nil {
		return err
	}
	shown := table{{"", "signatures /s", "Jain index of the clients' counts", "longest wait, s", "in turns of all 20"}}
	for _, who := range []int{openSSH, ours} {
		wait := func(s sample) float64 { return s.longest / 1000 }
		// Served first come, first served, everybody waits for one turn of each.
		turns := func(s sample) float64 { return s.longest / (cardClients * cardTurn) }
		shown.add(names[who], r.of(who, rate).short(), r.of(who, jain).String(), r.of(who, wait).String(), r.of(who, turns).String())
	}
	b.show("The longest wait is one turn of all 20 when the first request is served first.", shown)
	b.atLeast("card of one at a time, 20 clients: Jain index", r.of(ours, jain), 0.95)
	return nil
}
