package main

import (
	"bytes"
	"context"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"path/filepath"
	"strconv"
	"time"
)

// sample is one measurement.
type sample struct {
	rate    float64 // per second
	median  float64 // milliseconds, as those that follow
	p99     float64
	longest float64
	jain    float64 // of the counts of the clients
	cpu     float64 // microseconds for each: of the loop itself, or of the agent with its children
}

// A load is what load.c is to do.
type load struct {
	threads int
	each    bool          // a connection for each request
	length  time.Duration // 0: until there are as many as count says
	count   int           // 0: any number
}

// runLoad runs load.c.
func (b *bench) runLoad(ctx context.Context, env []string, l load, args ...string) (s sample, count int, err error) {
	limit := l.length + time.Minute // in case an agent hangs
	if l.length == 0 {
		limit = 10 * time.Minute
	}
	ctx, cancel := context.WithTimeout(ctx, limit)
	defer cancel()
	args = append(args, strconv.Itoa(l.threads), strconv.FormatFloat(l.length.Seconds(), 'f', 3, 64), strconv.Itoa(l.count))
	cmd := command(ctx, env, b.load, args...)
	var said, complaints bytes.Buffer
	cmd.Stdout, cmd.Stderr = &said, &complaints
	if err := cmd.Run(); err != nil {
		return s, 0, fmt.Errorf("%w: %s", err, &complaints)
	}
	var r struct {
		Count                                    int
		Seconds, CPU, Median, P99, Longest, Jain float64
	}
	if err := json.Unmarshal(said.Bytes(), &r); err != nil {
		return s, 0, err
	}
	return sample{
		rate: float64(r.Count) / r.Seconds, median: r.Median / 1000, p99: r.P99 / 1000, longest: r.Longest / 1000,
		jain: r.Jain, cpu: r.CPU * 1e6 / float64(r.Count),
	}, r.Count, nil
}

// loadBare signs on the module itself.
func (b *bench) loadBare(ctx context.Context, t *tokens, m module, k *kind, l load) (sample, error) {
	s, _, err := b.runLoad(ctx, environment(t.dir, append(t.env(), m.env...)), l,
		"token", m.path, tokenLabel, tokenPIN, fmt.Sprintf("%04x", k.id), k.bare, hex.EncodeToString(k.message(toSign())))
	if err != nil {
		return s, fmt.Errorf("the bare loop: %w", err)
	}
	return s, nil
}

// startRelay starts a relay for a key, and returns where it listens.
func (b *bench) startRelay(ctx context.Context, t *tokens, m module, k *kind) (*agent, error) {
	dir, err := b.newDir("relay")
	if err != nil {
		return nil, err
	}
	a := &agent{who: relay, dir: dir, socket: filepath.Join(dir, "s"), env: environment(dir, append(t.env(), m.env...)), tokens: t, module: m}
	if a.process, err = b.start(dir, a.env, b.load, "relay", m.path, tokenLabel, tokenPIN, fmt.Sprintf("%04x", k.id), k.bare,
		hex.EncodeToString(k.message(toSign())), a.socket); err != nil {
		return nil, err
	}
	return a, a.wait(ctx, "it listens", func() (bool, error) { return a.listens() })
}

// loadAgent sends the same request to an agent again and again.
func (b *bench) loadAgent(ctx context.Context, a *agent, request []byte, l load) (sample, error) {
	before, err := cpuTime(a.cmd.Process.Pid)
	if err != nil {
		return sample{}, err
	}
	how := "keep"
	if l.each {
		how = "each"
	}
	s, count, err := b.runLoad(ctx, a.env, l, "agent", a.socket, how, hex.EncodeToString(request))
	if err != nil {
		return s, fmt.Errorf("%s: %w; its log:\n%s", names[a.who], err, a.logged())
	}
	after, err := cpuTime(a.cmd.Process.Pid)
	s.cpu = float64((after - before).Microseconds()) / float64(count)
	return s, err
}

// background is a load that goes on while something else is measured.
func (b *bench) background(a *agent, request []byte, threads int) (*process, error) {
	dir, err := b.newDir("load")
	if err != nil {
		return nil, err
	}
	return b.start(dir, a.env, b.load, "agent", a.socket, "keep", hex.EncodeToString(request), strconv.Itoa(threads), "0", "0")
}

// results are the samples of one row, by agent and round. An agent that was not
// measured has no samples.
type results [contestants][]sample

// contest measures several in turn, each round beginning with the next one of
// them. nil is not measured.
func (b *bench) contest(ctx context.Context, row string, measure [contestants]func(context.Context) (sample, error)) (*results, error) {
	b.say("%s", row)
	r := new(results)
	for round := range b.rounds {
		for i := range contestants {
			who := (i + round) % contestants
			if measure[who] == nil {
				continue
			}
			s, err := measure[who](ctx)
			if err != nil {
				return nil, fmt.Errorf("%s: %w", row, err)
			}
			r[who] = append(r[who], s)
		}
	}
	return r, nil
}

func rate(s sample) float64    { return s.rate }
func median(s sample) float64  { return s.median }
func p99(s sample) float64     { return s.p99 }
func longest(s sample) float64 { return s.longest }
func jain(s sample) float64    { return s.jain }
func cpu(s sample) float64     { return s.cpu }

// of returns what one of them has in each round.
func (r *results) of(who int, what func(sample) float64) spread {
	var values []float64
	for _, s := range r[who] {
		values = append(values, what(s))
	}
	return spread(values)
}

// ratio returns how much more one has than the other, round by round.
func (r *results) ratio(one, other int, what func(sample) float64) spread {
	var values []float64
	for i := range min(len(r[one]), len(r[other])) {
		values = append(values, what(r[one][i])/what(r[other][i]))
	}
	return spread(values)
}

// above returns how much one has beyond what the other has, round by round.
func (r *results) above(one, other int, what func(sample) float64) spread {
	var values []float64
	for i := range min(len(r[one]), len(r[other])) {
		values = append(values, what(r[one][i])-what(r[other][i]))
	}
	return spread(values)
}
