package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"time"
)

// waitRow is a situation in which a client waits for a signature.
type waitRow struct {
	name string
	// begin brings it about with an agent, until stopAll.
	begin func(context.Context, *bench, *agent) error
	// module is where the keys are.
	module func(b *bench) (module, error)
}

const (
	// unansweredFor is after which a request counts as one that waits.
	unansweredFor = 200 * time.Millisecond
	// tried is how long ssh-agent may take for a list, or is not measured.
	tried = 3 * time.Second
)

var waitRows = []waitRow{
	{"list while a prompt is open", openPrompt, promptModule},
	{"list while a card is busy", keepBusy, busyModule},
	{"list while a module hangs", hangUp, hangingModule},
}

func waitNames() (all []string) {
	for _, r := range waitRows {
		all = append(all, r.name)
	}
	return all
}

// measureWaits measures lists while other clients wait.
func measureWaits(ctx context.Context, b *bench) error {
	shown := table{{"", "p99 ssh-agent, ms", "p99 p11-agent, ms", "longest p11-agent, ms"}}
	for _, row := range waitRows {
		if !b.wants(row.name) {
			continue
		}
		r, err := b.waitContest(ctx, row)
		if err != nil {
			return fmt.Errorf("%s: %w", row.name, err)
		}
		theirs := r.of(openSSH, p99).String()
		if len(r[openSSH]) == 0 {
			theirs = fmt.Sprintf("no answer within %v", tried)
		}
		shown.add(row.name, theirs, r.of(ours, p99).String(), r.of(ours, longest).String())
		b.atMost(row.name+": p99, ms", r.of(ours, p99), 5)
		b.stopAll()
	}
	b.show("", shown)
	return nil
}

func (b *bench) waitContest(ctx context.Context, row waitRow) (*results, error) {
	t, err := b.signTokens(ctx, p256)
	if err != nil {
		return nil, err
	}
	var measure [contestants]func(context.Context) (sample, error)
	for _, who := range []int{openSSH, ours} {
		m, err := row.module(b)
		if err != nil {
			return nil, err
		}
		a, err := b.launchNew(ctx, who, t, m)
		if err != nil {
			return nil, err
		}
		if err := row.begin(ctx, b, a); err != nil {
			return nil, err
		}
		if _, err := a.ask(ctx, listRequest, tried); who == openSSH && errors.Is(err, os.ErrDeadlineExceeded) {
			continue
		}
		measure[who] = func(ctx context.Context) (sample, error) {
			return b.loadAgent(ctx, a, listRequest, load{threads: 1, length: b.length})
		}
	}
	return b.contest(ctx, row.name, measure)
}

// unanswered sends a request to sign, and makes sure that it is not answered.
func (b *bench) unanswered(ctx context.Context, a *agent) error {
	request, err := a.signRequest(ctx, p256)
	if err != nil {
		return err
	}
	c, err := a.send(ctx, request)
	if err != nil {
		return err
	}
	b.held = append(b.held, c)
	if answer, err := receive(c, time.Now().Add(unansweredFor)); !errors.Is(err, os.ErrDeadlineExceeded) {
		return fmt.Errorf("%s does not wait, it answers %v, %w", names[a.who], answer, err)
	}
	return nil
}

// promptModule has a person asked who is not there.
func promptModule(b *bench) (module, error) {
	dir, err := b.newDir("person")
	if err != nil {
		return module{}, err
	}
	ask := filepath.Join(dir, "ask")
	script := fmt.Sprintf(`#!/bin/sh
# As pinentry it gets requests, as askpass a text as its argument.
if [ $# = 0 ] || [ "${1#--}" != "$1" ]; then
	echo OK
	while read -r word rest; do
		case $word in
		GETPIN|CONFIRM) break ;;
		*) echo OK ;;
		esac
	done
fi
: >%s/asked
exec sleep 600
`, dir)
	return module{path: b.softHSM, ask: ask}, os.WriteFile(ask, []byte(script), 0o700)
}

// openPrompt has the agent ask that person.
func openPrompt(ctx context.Context, b *bench, a *agent) error {
	if err := b.unanswered(ctx, a); err != nil {
		return err
	}
	return a.wait(ctx, "it asks a person", func() (bool, error) {
		_, err := os.Stat(filepath.Join(filepath.Dir(a.module.ask), "asked"))
		return err == nil, err
	})
}

// busyModule is the card that measureCard has.
func busyModule(b *bench) (module, error) {
	return b.slowModule(fmt.Sprintf("SLOW_SIGN=%d", cardTurn), "SLOW_WIDTH=1"), nil
}

// keepBusy has several clients want signatures all the time.
func keepBusy(ctx context.Context, b *bench, a *agent) error {
	if err := a.sign(ctx, p256); err != nil {
		return err
	}
	request, err := a.signRequest(ctx, p256)
	if err != nil {
		return err
	}
	_, err = b.background(a, request, 4)
	return err
}

// hangingModule hangs while there is a file.
func hangingModule(b *bench) (module, error) {
	dir, err := b.newDir("hang")
	file := filepath.Join(dir, "now")
	m := b.slowModule("SLOW_HANG=" + file)
	m.hang = file
	return m, err
}

// hangUp makes the module hang, with a signature under way.
func hangUp(ctx context.Context, b *bench, a *agent) error {
	if err := a.sign(ctx, p256); err != nil {
		return err
	}
	if err := os.WriteFile(a.module.hang, nil, 0o600); err != nil {
		return err
	}
	return b.unanswered(ctx, a)
}
