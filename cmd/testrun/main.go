// Command testrun runs go test, prints what went wrong, and counts:
//
//	go run ./cmd/testrun [-o FILE] [-skips REGEXP] -- ARGUMENTS OF GO TEST
//
// It prints a line for each package, the whole output of each test that fails, and
// the tests that were skipped with their reasons. Its last line is
//
//	N passed, N failed, N skipped
//
// A test with subtests counts as its subtests. A package that fails without a failed
// test counts as one that failed. The status is 1 unless all of it went well.
package main

import (
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"os/exec"
	"os/signal"
	"regexp"
	"syscall"
	"time"
)

// quiet is how long testrun prints nothing before it says what it waits for.
const quiet = 30 * time.Second

func main() {
	file := flag.String("o", "", "write the last line to this file, too")
	skips := flag.String("skips", "", "count skipped tests as failed, unless their reason matches")
	flag.Parse()
	allowed, err := regexp.Compile(*skips)
	if err == nil {
		var ok bool
		if ok, err = run(os.Stdout, allowed, *file, flag.Args()); err == nil && !ok {
			os.Exit(1)
		}
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, "testrun:", err)
		os.Exit(2)
	}
}

// systemPath is the PATH of the tests. go test puts its own directory before it. Wrappers that a
// developer's shell has in front, such as those of pyenv, can cost more than the programs.
const systemPath = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"

// run runs go test, and tells whether everything went well.
func run(out io.Writer, allowed *regexp.Regexp, file string, args []string) (ok bool, err error) {
	cmd := exec.Command("go", append([]string{"test", "-json"}, args...)...)
	cmd.Stderr = os.Stderr
	cmd.Env = append(os.Environ(), "PATH="+systemPath)
	events, err := cmd.StdoutPipe()
	if err != nil {
		return false, err
	}
	// The tests end first, so that they are counted. Ctrl-C reaches them by itself,
	// and other signals do not.
	signals := make(chan os.Signal, 1)
	signal.Notify(signals, os.Interrupt, syscall.SIGTERM, syscall.SIGHUP)
	defer signal.Stop(signals)
	if err := cmd.Start(); err != nil {
		return false, err
	}
	t := newTally(out, allowed)
	read := make(chan error, 1)
	go func() { read <- t.read(events) }()
	still := time.NewTicker(quiet)
	defer still.Stop()
	for reading := true; reading; {
		select {
		case err = <-read:
			reading = false
		case s := <-signals:
			_ = cmd.Process.Signal(s) // it may have ended
		case <-still.C:
			t.stillRunning()
		}
	}
	err = errors.Join(err, t.finish(cmd.Wait()))
	last := t.last()
	fmt.Fprintln(out, last)
	if file != "" {
		err = errors.Join(err, os.WriteFile(file, []byte(last+"\n"), 0o644))
	}
	return t.failed == 0 && t.passed > 0, err
}
