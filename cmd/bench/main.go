// Command bench measures what p11-agent costs: against the bare loop of
// C_SignInit and C_Sign on the same token, which nothing can be faster than, and
// against OpenSSH's ssh-agent. The programs take turns, so that other load on the machine
// hits all alike. Bench prints ratios, which mean the same on every machine.
//
// It sees the programs from outside only. Everything is in a temporary directory,
// on throw-away SoftHSM tokens, and is gone at the end and on Ctrl-C.
// docs/PERFORMANCE.md tells how the numbers are to be read.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"os/signal"
	"path/filepath"
	"regexp"
	"slices"
	"syscall"
	"time"
)

// options are the flags.
type options struct {
	rounds     int
	length     time.Duration // of one measurement
	only       *regexp.Regexp
	agent      string // the program
	out        string
	profile    string
	signatures int // after which memory is looked at
	logins     int // that come together
}

func main() {
	o := options{}
	seconds := flag.Float64("seconds", 0.8, "how long one measurement takes")
	only := flag.String("only", "", "measure only what matches this regular expression, such as \"sign P-256\"; -list names all")
	list := flag.Bool("list", false, "name what can be measured, and measure nothing")
	flag.IntVar(&o.rounds, "rounds", 3, "how often each is measured")
	flag.StringVar(&o.agent, "agent", "build/p11-agent", "the program to measure")
	flag.StringVar(&o.out, "out", "build/bench.md", "the file that the tables are written to as well")
	flag.StringVar(&o.profile, "profile", "", "measure nothing, and write to this file what perf says of agent and module while they sign")
	flag.IntVar(&o.signatures, "signatures", 100000, "look at the memory after so many signatures")
	flag.IntVar(&o.logins, "logins", 200, "log in so often, 50 at a time")
	flag.Parse()
	if *list {
		for _, name := range allNames() {
			fmt.Println(name)
		}
		return
	}
	if err := start(&o, *only, *seconds); err != nil {
		fmt.Fprintln(os.Stderr, "bench:", err)
		os.Exit(1)
	}
}

// start checks the flags and runs.
func start(o *options, only string, seconds float64) (err error) {
	if o.only, err = regexp.Compile(only); err != nil {
		return fmt.Errorf("-only: %w", err)
	}
	o.length = time.Duration(seconds * float64(time.Second))
	if flag.NArg() > 0 || o.rounds < 1 || o.length <= 0 || o.signatures < 2 || o.logins < 1 {
		return errors.New("it takes no arguments, and numbers have to be positive: see -help")
	}
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM, syscall.SIGHUP)
	defer stop()
	err = run(ctx, o, os.Stdout, os.Stderr)
	if ctx.Err() != nil {
		return errors.New("interrupted by a signal")
	}
	return err
}

// A section is what is measured together. It measures those of its rows that are
// wanted.
type section struct {
	title string
	rows  func() []string // their names
	run   func(context.Context, *bench) error
}

// sections are all there is, in the order of the report.
func sections() []section {
	return []section{
		{"Signatures", signNames, measureSignatures},
		{"Lists", listNames, measureLists},
		{"Tokens of different sizes", sizeNames, measureSizes},
		{"From the start to the first list of keys", startNames, measureStarts},
		{"Logins with ssh", loginNames, measureLogins},
		{"Memory", memoryNames, measureMemory},
		{"A token that makes 16 signatures at a time, in 5 ms", wideNames, measureWide},
		{"A card that makes one signature at a time, in 100 ms, and 20 clients", cardNames, measureCard},
		{"Lists while something else waits", waitNames, measureWaits},
	}
}

func allNames() (names []string) {
	for _, s := range sections() {
		names = append(names, s.rows()...)
	}
	return names
}

// run measures all that is wanted. The report goes to out and into the file, what
// is under way to progress. A section that fails is named in both, and the others
// are measured nevertheless.
func run(ctx context.Context, o *options, out, progress io.Writer) (err error) {
	if !slices.ContainsFunc(allNames(), o.only.MatchString) {
		return fmt.Errorf("nothing matches %q: -list names what there is", o.only)
	}
	b, err := newBench(o, out, progress)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, b.close()) }()
	if o.profile != "" {
		return b.profile(ctx, o.profile)
	}
	var failed []error
	b.head(ctx)
	for _, s := range sections() {
		if !b.wantsAny(s.rows()) {
			continue
		}
		b.print("\n### %s", s.title)
		if err := s.run(ctx, b); err != nil {
			if ctx.Err() != nil {
				return err
			}
			err = fmt.Errorf("%s: %w", s.title, err)
			b.print("\nFAILED: %v", err)
			failed = append(failed, err)
		}
		b.stopAll()
	}
	b.printGoals()
	if o.out != "" {
		if err := os.MkdirAll(filepath.Dir(o.out), 0o777); err != nil {
			return err
		}
		if err := os.WriteFile(o.out, b.report.Bytes(), 0o666); err != nil {
			return err
		}
	}
	return errors.Join(failed...)
}
