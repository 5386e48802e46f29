package main

import (
	"bytes"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"testing"

	"github.com/rogpeppe/go-internal/txtar"
)

// module is a module with every way that tests can end.
const module = `
-- go.mod --
module m
go 1.26
-- good/good_test.go --
package good

import "testing"

func TestGood(t *testing.T)  { t.Log("not to be seen") }
func TestParts(t *testing.T) { t.Run("a", TestGood); t.Run("b/c", TestGood) }
func TestGone(t *testing.T)  { t.Log("looked around"); t.Skip("missing: a card") }
func TestNone(t *testing.T)  { t.Run("a", func(t *testing.T) { t.Skip("missing: a TPM") }) }
-- bad/bad_test.go --
package bad

import "testing"

func TestGood(t *testing.T)  { t.Log("not to be seen") }
func TestBad(t *testing.T)   { t.Error("it is broken") }
func TestParts(t *testing.T) { t.Run("a", TestGood); t.Run("b", TestBad) }
-- panics/panics_test.go --
package panics

import "testing"

func TestGood(t *testing.T)   { t.Log("not to be seen") }
func TestPanics(t *testing.T) { panic("the end of it") }
func TestNever(t *testing.T)  {}
-- exits/exits_test.go --
package exits

import ("os"; "testing")

func TestMain(m *testing.M)  { m.Run(); println("cleaning up failed"); os.Exit(3) }
func TestGood(t *testing.T) {}
-- builds/builds_test.go --
package builds

import "testing"

func TestGood(t *testing.T) { nonsense() }
`

func TestRun(t *testing.T) {
	dir := t.TempDir()
	for _, f := range txtar.Parse([]byte(module)).Files {
		name := filepath.Join(dir, f.Name)
		if err := os.MkdirAll(filepath.Dir(name), 0o700); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(name, f.Data, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	t.Chdir(dir)
	t.Setenv("GOFLAGS", "")
	for _, test := range []struct {
		name, skips string
		args        []string
		ok          bool
		last        string
		parts       []string
	}{
		{"all is well", "", []string{"./good"}, true, "3 passed, 0 failed, 2 skipped", []string{
			"ok    m/good", "skipped: missing: a card: m/good.TestGone\n", "skipped: missing: a TPM: m/good.TestNone/a\n",
		}},
		{"skips that may be", "card|TPM", []string{"./good"}, true, "3 passed, 0 failed, 2 skipped", nil},
		{"a skip that may not be", "card", []string{"./good"}, false, "3 passed, 1 failed, 1 skipped", []string{
			"must not be skipped here", "missing: a TPM", "FAIL  m/good",
		}},
		{"failures", "", []string{"./bad"}, false, "2 passed, 2 failed, 0 skipped", []string{
			"bad_test.go:6: it is broken", "--- FAIL: TestParts/b", "FAIL  m/bad",
		}},
		{"a panic", "", []string{"./panics"}, false, "1 passed, 1 failed, 0 skipped", []string{"panic: the end of it", "FAIL  m/panics"}},
		{"no test fails, but the program does", "", []string{"./exits"}, false, "1 passed, 1 failed, 0 skipped", []string{"cleaning up failed", "FAIL  m/exits"}},
		{"what cannot be built", "", []string{"./good", "./builds"}, false, "3 passed, 1 failed, 2 skipped", []string{"undefined: nonsense", "FAIL  m/builds"}},
		{"nothing at all", "", []string{"-run", "TestNothing", "./good"}, false, "0 passed, 0 failed, 0 skipped", nil},
		{"no such package", "", []string{"./nowhere"}, false, "0 passed, 1 failed, 0 skipped", nil},
	} {
		t.Run(test.name, func(t *testing.T) {
			var out bytes.Buffer
			ok, err := run(&out, regexp.MustCompile(test.skips), "count", test.args)
			if ok != test.ok || err != nil || !strings.HasSuffix(out.String(), test.last+"\n") {
				t.Errorf("got %t and %v, want %t and the line %q:\n%s", ok, err, test.ok, test.last, &out)
			}
			for _, part := range test.parts {
				if !strings.Contains(out.String(), part) {
					t.Errorf("%q is missing:\n%s", part, &out)
				}
			}
			if strings.Contains(out.String(), "not to be seen") {
				t.Errorf("the output of a good test is shown:\n%s", &out)
			}
			if b, err := os.ReadFile("count"); err != nil || string(b) != test.last+"\n" {
				t.Errorf("the file has %q, %v", b, err)
			}
		})
	}
}

func TestReason(t *testing.T) {
	for output, want := range map[string]string{
		"=== RUN   TestA\n    a_test.go:7: looked around\n    a_test.go:8: missing: a card: it is out\n--- SKIP: TestA (0.00s)\n": "missing: a card: it is out",
		"    a_test.go:8: missing: a card\n    script.go:9: # a story\n        > need card\n":                                     "missing: a card",
		"    help.go:8: missing: a card\n":   "missing: a card",
		"=== RUN   TestA\n--- SKIP: TestA\n": "no reason given",
	} {
		if got := reason(output); got != want {
			t.Errorf("%q: got %q, want %q", output, got, want)
		}
	}
}

// While nothing ends, a person sees that the tests go on.
func TestStillRunning(t *testing.T) {
	var out bytes.Buffer
	tally := newTally(&out, regexp.MustCompile(""))
	tally.add(event{Action: "run", Package: "m/slow", Test: "TestSlow"})
	tally.stillRunning()
	if out.Len() > 0 {
		t.Errorf("it is early to say %q", &out)
	}
	tally.printed = tally.printed.Add(-quiet)
	tally.stillRunning()
	if want := "...   0 passed so far, now running: m/slow\n"; out.String() != want {
		t.Errorf("got %q, want %q", &out, want)
	}
}

// A line that is no event is printed, such as what a program prints that does not
// know of events.
func TestOtherLines(t *testing.T) {
	var out bytes.Buffer
	tally := newTally(&out, regexp.MustCompile(""))
	if err := tally.read(strings.NewReader("{}\nwarning: x\n{\"Action\":\"start\",\"Package\":\"m\"}\nno end")); err != nil {
		t.Fatal(err)
	}
	if want := "{}\nwarning: x\nno end"; out.String() != want {
		t.Errorf("got %q, want %q", &out, want)
	}
}
