package main

import (
	"bytes"
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"os/exec"
	"strings"
	"sync"
	"syscall"
	"time"

	"github.com/spf13/cobra"

	"p11-agent/cmd/p11-agent/backend"
	"p11-agent/cmd/p11-agent/config"
	"p11-agent/cmd/p11-agent/exit"
	"p11-agent/cmd/p11-agent/output"
	"p11-agent/cmd/p11-agent/paths"
	"p11-agent/token"
)

const (
	// doctorTimeout is how long the modules may take.
	doctorTimeout = 15 * time.Second
	// probeTimeout is how long anything else may take that is asked once.
	probeTimeout = 5 * time.Second
)

type doctorOptions struct {
	json, verbose bool
	color         output.Color
}

func newDoctorCommand(g *globals) *cobra.Command {
	o := new(doctorOptions)
	cmd := &cobra.Command{
		Use:   "doctor",
		Short: "Find out why it does not work, and say what to do",
		Long: `Look at everything that a signature needs: the configuration, the agent that ssh
asks, ssh itself, pcscd and its readers, modules, tokens, keys, the place where
PINs are asked for, systemd's units, certificates, and the machine. Each warning
and each problem comes with what to type next.

It needs no running agent, never asks for a PIN, never logs in, and changes
nothing. The exit status is 1 when there is a problem.`,
		Args: noArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			return runDoctor(cmd.Context(), g, o, cmd.OutOrStdout())
		},
	}
	f := cmd.Flags()
	f.BoolVar(&o.json, "json", false, "print JSON")
	f.BoolVarP(&o.verbose, "verbose", "v", false, "tell what was looked at and is well, too")
	output.AddColorFlag(cmd, &o.color)
	return cmd
}

// runDoctor has everything looked at at once, as most of it waits for others, and
// prints it in the order in which it is best put right.
func runDoctor(ctx context.Context, g *globals, o *doctorOptions, out io.Writer) error {
	conf := &report{group: "configuration"}
	c := findConfiguration(conf, g.config)

	var wg sync.WaitGroup
	reports := []*report{conf}
	look := func(group string, find func(*report)) {
		r := &report{group: group}
		reports = append(reports, r)
		wg.Go(func() { find(r) })
	}
	asked, client := &report{group: "the agent that ssh asks"}, &report{group: "ssh"}
	reports = append(reports, asked, client)
	wg.Go(func() {
		s := askSSH(ctx)
		findSSH(client, s, findAgent(ctx, asked, s))
	})
	// These three go together: a reader with a card that nobody knows is one
	// whose name no token has.
	cards, mods, toks := &report{group: "smart card readers"}, &report{group: "modules"}, &report{group: "tokens and keys"}
	reports = append(reports, cards, mods, toks)
	wg.Go(func() { findTokensAndCards(ctx, c, cards, mods, toks) })
	look("asking for the PIN", func(r *report) { findPrompt(ctx, r, c) })
	look("systemd", func(r *report) { findUnits(ctx, r) })
	look("certificates", func(r *report) { findCertificates(r, c, time.Now()) })
	look("this machine", findMachine)
	wg.Wait()

	if o.json {
		if err := printReportsJSON(out, reports); err != nil {
			return err
		}
		if verdict(reports...) != nil {
			return exit.Status(exit.CodeFailure)
		}
		return nil
	}
	if err := printReports(o.color.Writer(out), reports, o.verbose); err != nil {
		return err
	}
	return verdict(reports...)
}

// findConfiguration reads the configuration. Where it is broken the others go on
// with what there is without one.
func findConfiguration(r *report, file string) *config.File {
	c, err := config.Load(file)
	if err == nil {
		r.ok("%s", cmp.Or(c.Path(), "there is no configuration file, so everything is as usual"))
		findSources(r, c)
		return c
	}
	for _, e := range exit.Each(err) {
		f := r.bad("%v", e)
		if hint := exit.Hint(e); hint != "" {
			f.Next("%s", hint)
		}
		if len(f.next) == 0 {
			f.Next("put it right: p11-agent.toml(5) says what can be there; the agent does not start like this")
		}
	}
	return &config.File{AllowModules: token.DefaultAllowList}
}

func findTokensAndCards(ctx context.Context, c *config.File, cards, mods, toks *report) {
	findRegistry(mods, c)
	b := backend.Open(c, backend.Options{Log: slog.New(slog.DiscardHandler), StateDir: paths.StateDir(), Known: token.KnownRead})
	defer b.Close()
	daemon := askPCSCD(ctx)
	ctx, cancel := context.WithTimeout(ctx, doctorTimeout)
	defer cancel()
	b.Wait(ctx)
	findCards(ctx, cards, daemon, b.Store.Modules())
	findModules(mods, b)
	findTokens(toks, b.Store.Modules())
	// What hangs has had its time; what is there is selected at once.
	ctx, cancel = context.WithTimeout(context.WithoutCancel(ctx), time.Second)
	defer cancel()
	findKeys(ctx, toks, c, b.Store)
}

// A said is what a program that was run has said.
type said struct {
	out, err string
	status   error
}

// maxSaid bounds what is read of a program.
const maxSaid = 1 << 20

// ask runs a program, in the language of programs, for a bounded time. It gets no
// terminal to ask anything at. What it starts ends with it.
func ask(ctx context.Context, name string, args ...string) (said, error) {
	path, err := exec.LookPath(name)
	if err != nil {
		return said{}, err
	}
	ctx, cancel := context.WithTimeout(ctx, probeTimeout)
	defer cancel()
	cmd := exec.CommandContext(ctx, path, args...)
	cmd.Env = append(os.Environ(), "LC_ALL=C", "SYSTEMD_PAGER=", "SYSTEMD_COLORS=0")
	cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true}
	cmd.Cancel = func() error { return syscall.Kill(-cmd.Process.Pid, syscall.SIGKILL) }
	cmd.WaitDelay = time.Second // for what has left its group with its pipes
	var out, errs limited
	cmd.Stdout, cmd.Stderr = &out, &errs
	err = cmd.Run()
	if ctx.Err() != nil {
		return said{}, fmt.Errorf("%s does not answer", name)
	}
	if _, ok := errors.AsType[*exec.ExitError](err); err != nil && !ok {
		return said{}, err
	}
	return said{out: out.String(), err: strings.TrimSpace(errs.String()), status: err}, nil
}

// limited keeps the beginning of what is written to it.
type limited struct{ b bytes.Buffer }

func (l *limited) Write(b []byte) (int, error) {
	l.b.Write(b[:min(len(b), max(0, maxSaid-l.b.Len()))])
	return len(b), nil
}

func (l *limited) String() string { return l.b.String() }
