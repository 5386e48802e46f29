package main

import (
	"bufio"
	"cmp"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"maps"
	"os/exec"
	"regexp"
	"slices"
	"strings"
	"sync"
	"time"
)

// An event is a line of go test -json (go doc test2json).
type event struct {
	Action     string
	Package    string
	ImportPath string // in place of Package, for what a build prints
	Test       string // empty: the package itself
	Elapsed    float64
	Output     string
}

// A key names a test, or a package where test is empty.
type key struct{ pkg, test string }

// parent returns the test that k is a subtest of.
func (k key) parent() (p key, ok bool) {
	i := strings.LastIndexByte(k.test, '/')
	return key{k.pkg, k.test[:max(i, 0)]}, i > 0
}

// A tally is what has come of the tests so far. Two goroutines may use it.
type tally struct {
	out     io.Writer
	allowed *regexp.Regexp // reasons for skipping a test

	mu                      sync.Mutex
	printed                 time.Time // when a line was printed last
	passed, failed, skipped int
	output                  map[key]*strings.Builder // of what has not ended
	parents                 map[key]bool             // tests with subtests
	broken                  map[key]bool             // tests with a failed subtest, packages with a failed test
	reasons                 map[string][]string      // tests, by the reason why they were skipped
}

func newTally(out io.Writer, allowed *regexp.Regexp) *tally {
	return &tally{
		out: out, allowed: allowed, printed: time.Now(),
		output: make(map[key]*strings.Builder), parents: make(map[key]bool), broken: make(map[key]bool), reasons: make(map[string][]string),
	}
}

func (t *tally) say(format string, args ...any) {
	t.printed = time.Now()
	fmt.Fprintf(t.out, format, args...)
}

// read reads the events to their end. A line that is no event is printed.
func (t *tally) read(r io.Reader) error {
	lines := bufio.NewReader(r)
	for {
		line, err := lines.ReadBytes('\n')
		if len(line) > 0 {
			var e event
			if json.Unmarshal(line, &e) == nil && e.Action != "" {
				t.add(e)
			} else {
				t.mu.Lock()
				t.say("%s", line)
				t.mu.Unlock()
			}
		}
		if errors.Is(err, io.EOF) {
			return nil
		}
		if err != nil {
			return err
		}
	}
}

func (t *tally) add(e event) {
	t.mu.Lock()
	defer t.mu.Unlock()
	k := key{e.Package, e.Test}
	switch e.Action {
	case "build-output":
		t.say("%s", e.Output)
	case "run":
		t.output[k] = new(strings.Builder)
		if p, ok := k.parent(); ok {
			t.parents[p] = true
		}
	case "output":
		if t.output[k] == nil {
			t.output[k] = new(strings.Builder)
		}
		t.output[k].WriteString(e.Output)
	case "pass", "fail", "skip":
		if e.Test == "" {
			t.endPackage(k, e)
		} else {
			t.endTest(k, e.Action)
		}
	}
}

// endTest counts a test that has ended.
func (t *tally) endTest(k key, action string) {
	output := ""
	if b := t.output[k]; b != nil {
		output = b.String()
	}
	delete(t.output, k)
	if action == "skip" {
		why := reason(output)
		t.reasons[why] = append(t.reasons[why], k.pkg+"."+k.test)
		if t.allowed.MatchString(why) {
			t.skipped++
			return
		}
		action = "fail"
		output += "this test must not be skipped here\n"
	}
	switch {
	case action == "fail":
		t.say("%s", output)
		if !t.broken[k] {
			t.failed++
		}
		t.broken[key{pkg: k.pkg}] = true
		if p, ok := k.parent(); ok {
			t.broken[p] = true
		}
	case !t.parents[k]:
		t.passed++
	}
}

// endPackage prints how a package has ended. Tests that it has not come to the end
// of have failed.
func (t *tally) endPackage(k key, e event) {
	if e.Action == "fail" {
		for _, test := range slices.SortedFunc(maps.Keys(t.output), func(a, b key) int { return cmp.Compare(b.test, a.test) }) {
			if test.pkg == k.pkg && test.test != "" { // subtests before their parents
				t.endTest(test, "fail")
			}
		}
		if b := t.output[k]; b != nil {
			t.say("%s", b)
		}
		if !t.broken[k] {
			t.failed++
		}
	}
	delete(t.output, k)
	switch {
	case e.Action == "fail" || t.broken[k]:
		t.say("FAIL  %s  %.1fs\n", k.pkg, e.Elapsed)
	case e.Action == "pass":
		t.say("ok    %s  %.1fs\n", k.pkg, e.Elapsed)
	}
}

// logged is a line that a test has logged, with the file that it comes from.
var logged = regexp.MustCompile(`(?m)^\s+([\w.-]+\.go):\d+: (.*\S)\s*$`)

// reason returns why a test was skipped: what it has logged last. What comes from
// other files than those of tests is the log of a package for tests, such as
// testscript.
func reason(output string) string {
	why := "no reason given"
	ofTest := false
	for _, m := range logged.FindAllStringSubmatch(output, -1) {
		if test := strings.HasSuffix(m[1], "_test.go"); test || !ofTest {
			why, ofTest = m[2], ofTest || test
		}
	}
	return why
}

// stillRunning says what is waited for, when nothing has been said for a while.
func (t *tally) stillRunning() {
	t.mu.Lock()
	defer t.mu.Unlock()
	if time.Since(t.printed) < quiet {
		return
	}
	running := make(map[string]bool)
	for k := range t.output {
		running[k.pkg] = true
	}
	t.say("...   %d passed so far, now running: %s\n", t.passed, strings.Join(slices.Sorted(maps.Keys(running)), " "))
}

// finish takes the status of go test into account, and prints what was skipped.
func (t *tally) finish(err error) error {
	t.mu.Lock()
	defer t.mu.Unlock()
	if _, exited := errors.AsType[*exec.ExitError](err); exited {
		if t.failed == 0 {
			t.failed++
			t.say("go test failed: %v\n", err)
		}
		err = nil
	}
	for _, why := range slices.Sorted(maps.Keys(t.reasons)) {
		t.say("skipped: %s: %s\n", why, strings.Join(t.reasons[why], " "))
	}
	return err
}

func (t *tally) last() string {
	t.mu.Lock()
	defer t.mu.Unlock()
	return fmt.Sprintf("%d passed, %d failed, %d skipped", t.passed, t.failed, t.skipped)
}
