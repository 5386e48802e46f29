package main

import (
	"context"
	"errors"
	"fmt"
	"os/exec"
	"path/filepath"
	"strings"
)

// profile has perf note where the time of p11-agent and its module process goes
// while eight clients sign, and prints the heaviest functions. perf starts the
// agent: it may not look at one that runs, which keeps its memory to itself.
func (b *bench) profile(ctx context.Context, file string) error {
	perf, err := exec.LookPath("perf")
	if err != nil {
		return fmt.Errorf("%w: install it, or look at one stage: make microbench BENCH=^BenchmarkRequest", err)
	}
	if file, err = filepath.Abs(file); err != nil {
		return err
	}
	t, err := b.signTokens(ctx, p256)
	if err != nil {
		return err
	}
	a, err := b.newAgent(ours, t, module{path: b.softHSM})
	if err != nil {
		return err
	}
	a.under = []string{perf, "record", "-q", "-g", "-o", file, "--"}
	if err := b.launch(ctx, a); err != nil {
		return err
	}
	if err := a.sign(ctx, p256); err != nil {
		return err
	}
	request, err := a.signRequest(ctx, p256)
	if err != nil {
		return err
	}
	b.say("signing for %v", 5*b.length)
	if _, err := b.loadAgent(ctx, a, request, load{threads: 8, length: 5 * b.length}); err != nil {
		return err
	}
	// It writes the rest when its child has ended.
	children, err := family(a.cmd.Process.Pid)
	if err != nil {
		return err
	}
	if len(children) < 2 {
		return errors.New("perf has not started the agent")
	}
	if err := b.endChild(a.process, children[1].pid); err != nil {
		return err
	}
	report := command(ctx, environment(b.dir, nil), perf, "report", "-i", file, "--stdio", "-q", "-g", "none", "--no-children",
		"--percent-limit", "0.5", "--sort", "comm,dso,symbol")
	said, err := report.Output()
	if err != nil {
		return fmt.Errorf("perf report: %w", err)
	}
	for line := range strings.Lines(strings.TrimSpace(string(said))) {
		b.print("%s", strings.TrimRight(line, " -\n"))
	}
	b.print("\nexe is the module process. The whole profile: perf report -i %s", file)
	return nil
}
