// Package proctest tells a test which goroutines run and which files are open, and waits for
// both. It is for tests.
//
// A test names the code of a goroutine by a function or a type. So the compiler finds a name
// that has changed.
package proctest

import (
	"bytes"
	"context"
	"fmt"
	"os"
	"path/filepath"
	"reflect"
	"runtime"
	"runtime/pprof"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"
)

// Patience is how long a test waits for a condition. No test passes or fails because
// something takes less time.
const Patience = 3 * time.Minute

// Until waits until a condition holds that no event tells. what names it for the error.
func Until(t testing.TB, what string, condition func() bool) {
	t.Helper()
	for end := time.Now().Add(Patience); !condition(); time.Sleep(time.Millisecond) {
		if time.Now().After(end) {
			t.Fatalf("waited %v in vain for this: %s", Patience, what)
		}
	}
}

// A Goroutine is a goroutine at one moment.
type Goroutine struct {
	State string // what it waits for, as the runtime says: "select", "chan receive"
	Stack string
}

// Goroutines returns all goroutines but the one that calls it.
func Goroutines() (all []Goroutine) {
	buf := make([]byte, 1<<20)
	n := runtime.Stack(buf, true)
	for n == len(buf) {
		buf = make([]byte, 2*len(buf))
		n = runtime.Stack(buf, true)
	}
	for one := range strings.SplitSeq(string(buf[:n]), "\n\n") {
		state, stack, _ := strings.Cut(one, "\n")
		_, state, _ = strings.Cut(state, "[")
		state, _, _ = strings.Cut(strings.TrimSuffix(state, "]:"), ",") // without the minutes
		all = append(all, Goroutine{state, stack})
	}
	return all[1:]
}

// Count returns how many goroutines of Goroutines fulfil a condition.
func Count(is func(Goroutine) bool) int {
	return len(slices.DeleteFunc(Goroutines(), func(g Goroutine) bool { return !is(g) }))
}

// label is the label that holds the name of a test.
const label = "test"

// Mark labels the goroutine that calls it, and each goroutine that starts from it later, with the
// name of the test.
func Mark(t testing.TB) {
	pprof.SetGoroutineLabels(pprof.WithLabels(context.Background(), pprof.Labels(label, t.Name())))
}

// CountOf returns how many goroutines that Mark has labelled for the test fulfil a condition. Their
// State is unknown. Tests that run at the same time do not count each other's goroutines.
func CountOf(t testing.TB, is func(Goroutine) bool) (n int) {
	t.Helper()
	var profile bytes.Buffer
	if err := pprof.Lookup("goroutine").WriteTo(&profile, 1); err != nil {
		t.Fatal(err)
	}
	labels := fmt.Sprintf("# labels: {%q:%q}\n", label, t.Name())
	for one := range strings.SplitSeq(profile.String(), "\n\n") {
		count, frames, ok := strings.Cut(one, labels)
		if !ok {
			continue
		}
		// The text before the labels ends with the number of such goroutines, and their addresses.
		count = count[strings.LastIndexByte(strings.TrimSuffix(count, "\n"), '\n')+1:]
		count, _, _ = strings.Cut(count, " @ ")
		alike, err := strconv.Atoi(count)
		if err != nil {
			t.Fatalf("a goroutine profile has %q: %v", one, err)
		}
		// A frame is "#", an address, the function with an offset, and a place.
		var stack strings.Builder
		for frame := range strings.Lines(frames) {
			if fields := strings.Split(frame, "\t"); len(fields) > 2 {
				function, _, _ := strings.Cut(fields[2], "+0x")
				stack.WriteString(function + "()\n")
			}
		}
		if is(Goroutine{Stack: stack.String()}) {
			n += alike
		}
	}
	return n
}

// Runs tells whether a function is on the stack, such as (*T).Method.
func (g Goroutine) Runs(function any) bool { return strings.Contains(g.Stack, name(function)+"(") }

// In tells whether a function is at the top of the stack.
func (g Goroutine) In(function any) bool { return strings.HasPrefix(g.Stack, name(function)+"(") }

// name returns the name of a function in a stack.
func name(function any) string {
	return runtime.FuncForPC(reflect.ValueOf(function).Pointer()).Name()
}

// Methods returns how the names of all methods in the package of T begin in a stack.
func Methods[T any]() string { return reflect.TypeFor[T]().PkgPath() + ".(" }

// MethodsOf returns how the names of the methods of *T begin in a stack.
func MethodsOf[T any]() string { return Methods[T]() + "*" + reflect.TypeFor[T]().Name() + ")." }

// NoLeaks fails the test if goroutines that run the code, or more open files than now, are
// left after the test. code is what stacks have, as Methods returns it. Call NoLeaks first
// in a test, so that it looks after all other cleanups.
func NoLeaks(t testing.TB, code ...string) {
	t.Helper()
	open := func() int {
		// The first use of the runtime's poller opens files that stay.
		return Files(t, os.Getpid()) - Files(t, os.Getpid(), "anon_inode:[event")
	}
	most := open()
	t.Cleanup(func() {
		var left []string
		defer func() {
			if t.Failed() && len(left) > 0 {
				t.Logf("goroutines:\n%s", strings.Join(left, "\n\n"))
			}
		}()
		// Goroutines that have done everything may not have ended yet.
		Until(t, "every goroutine ends", func() bool {
			left = left[:0]
			for _, g := range Goroutines() {
				// TestMain waits for all tests.
				if !g.Runs((*testing.M).Run) && slices.ContainsFunc(code, func(c string) bool { return strings.Contains(g.Stack, c) }) {
					left = append(left, g.Stack)
				}
			}
			return len(left) == 0
		})
		Until(t, "files that were opened are closed", func() bool { return open() <= most })
	})
}

// Files counts the open files of a process. kinds are beginnings of their names in /proc,
// such as "socket:"; none means all.
func Files(t testing.TB, pid int, kinds ...string) int {
	t.Helper()
	n, err := OpenFiles(pid, kinds...)
	if err != nil {
		t.Fatal(err)
	}
	return n
}

// OpenFiles does the same outside of a test.
func OpenFiles(pid int, kinds ...string) (n int, err error) {
	dir := fmt.Sprintf("/proc/%d/fd", pid)
	list, err := os.ReadDir(dir)
	if err != nil {
		return 0, err
	}
	for _, e := range list {
		to, err := os.Readlink(filepath.Join(dir, e.Name())) // the file may have been closed
		if err == nil && (len(kinds) == 0 || slices.ContainsFunc(kinds, func(kind string) bool { return strings.HasPrefix(to, kind) })) {
			n++
		}
	}
	return n, nil
}
