package main

import (
	"bytes"
	"context"
	"encoding/hex"
	"io"
	"math"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
	"time"
)

// build builds p11-agent and returns its path and an empty directory beside it.
func build(t *testing.T) (program, dir string) {
	t.Helper()
	above, err := os.MkdirTemp("", "p11") // short enough for sockets below it
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := os.RemoveAll(above); err != nil {
			t.Error(err)
		}
	})
	program, dir = filepath.Join(above, "p11-agent"), filepath.Join(above, "tmp")
	if out, err := exec.Command("go", "build", "-o", program, "../p11-agent").CombinedOutput(); err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	if err := os.Mkdir(dir, 0o700); err != nil {
		t.Fatal(err)
	}
	return program, dir
}

// needed ends the test where something is missing that is measured with.
func needed(t *testing.T, program string) {
	t.Helper()
	b := &bench{options: &options{agent: program}, programs: make(map[string]string)}
	if err := b.find(); err != nil {
		if os.Getenv("CI") == "true" {
			t.Fatal(err)
		}
		t.Skip(err)
	}
}

// Some of each table is measured, in no time to speak of, and nothing is left.
func TestRun(t *testing.T) {
	program, dir := build(t)
	needed(t, program)
	t.Setenv("TMPDIR", dir)
	out := filepath.Join(filepath.Dir(dir), "out", "bench.md")
	o := &options{
		rounds: 1, length: 20 * time.Millisecond, agent: program, out: out, signatures: 100, logins: 4,
		only: regexp.MustCompile(`^sign (P-256|Ed25519) (1|8) kept|^sign P-256 2 each|^list 2 keys 1|^start again$|^login 50|^memory|^token|^list while a card`),
	}
	var said, progress bytes.Buffer
	if err := run(t.Context(), o, &said, &progress); err != nil {
		t.Fatalf("%v\n%s%s", err, &said, &progress)
	}
	const n = ` *[0-9.]+ *\|`
	for _, want := range []string{
		`\| P-256 +\| 1 +\|` + n + n + n + n + n + n,
		`\| P-256 +\| 8 +\|` + n + n + n + n + n + n,
		`(?m)^\| P-256 +\| 1 +\|` + n + n + n + `$`,
		`\| P-256 +\| 2 +\|` + n + n + n + n + n,
		`\| Ed25519 +\| 1 +\|` + n + ` [-0-9]+ +\|` + n,
		`\| 2 +\| 1 +\|` + n + n + n,
		`\| 2 +\| 1, one for each request \|` + n + n + n,
		`\| start again +\|` + n + n + n,
		`\| 4 logins, 50 at a time \|` + n + n + n,
		`\| p11-agent +\| [0-9.]+ \([0-9.]+ and [0-9.]+\) `,
		`\| 16 +\|` + n + n + n + n,
		`\| list while a card is busy \|` + n + n,
		`\| list of 2 keys: .* \| (reached|missed by [0-9.]+ %) `,
	} {
		if !regexp.MustCompile(want).MatchString(said.String()) {
			t.Errorf("the report has no line %s", want)
		}
	}
	if t.Failed() {
		t.Logf("%s", &said)
	}
	if file, err := os.ReadFile(out); err != nil || !bytes.Equal(file, said.Bytes()) {
		t.Errorf("the file does not have what was printed: %v\n%s", err, file)
	}
	if left, err := os.ReadDir(dir); err != nil || len(left) > 0 {
		t.Errorf("left behind: %v, %v", left, err)
	}
}

// On a busy machine the time of a measurement may be over before a client has sent
// anything. Each client sends one request nevertheless, so that there is something to
// report.
func TestLateClients(t *testing.T) {
	needed(t, os.Args[0])
	dir, err := os.MkdirTemp("", "p11") // short enough for a socket below it
	if err != nil {
		t.Fatal(err)
	}
	defer os.RemoveAll(dir)
	b := &bench{dir: dir, programs: map[string]string{"cc": "cc"}}
	load, err := b.compile("load", loadSource)
	if err != nil {
		t.Fatal(err)
	}
	l, err := net.Listen("unix", filepath.Join(dir, "s"))
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	go func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return // the test is over
			}
			go func() {
				defer c.Close()
				for request := make([]byte, len(listRequest)); ; {
					if _, err := io.ReadFull(c, request); err != nil {
						return
					}
					_, _ = c.Write([]byte{0, 0, 0, 5, 12, 0, 0, 0, 0}) // SSH_AGENT_IDENTITIES_ANSWER, none
				}
			}()
		}
	}()
	out, err := exec.Command(load, "agent", l.Addr().String(), "keep", hex.EncodeToString(listRequest), "3", "1e-9", "0").CombinedOutput()
	if err != nil || !bytes.HasPrefix(out, []byte(`{"count": 3,`)) {
		t.Errorf("%v: %s", err, out)
	}
}

// After an interrupt, the shell has its prompt back, and no process is left.
func TestInterrupted(t *testing.T) {
	program, dir := build(t)
	needed(t, program)
	t.Setenv("TMPDIR", dir)
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	o := &options{rounds: 1, length: time.Hour, agent: program, only: regexp.MustCompile("^sign P-256 1 kept")}
	err := run(ctx, o, new(bytes.Buffer), writerFunc(func(line string) {
		if strings.Contains(line, "sign P-256") {
			cancel()
		}
	}))
	if err == nil || ctx.Err() == nil {
		t.Errorf("it ends with %v", err)
	}
	if left, err := os.ReadDir(dir); err != nil || len(left) > 0 {
		t.Errorf("left behind: %v, %v", left, err)
	}
}

type writerFunc func(string)

func (f writerFunc) Write(b []byte) (int, error) {
	f(string(b))
	return len(b), nil
}

func TestNothingMatches(t *testing.T) {
	o := &options{only: regexp.MustCompile("nonsense")}
	if err := run(t.Context(), o, new(bytes.Buffer), new(bytes.Buffer)); err == nil || !strings.Contains(err.Error(), `"nonsense": -list`) {
		t.Errorf("it ends with %v", err)
	}
	seen := make(map[string]bool)
	for _, name := range allNames() {
		if seen[name] {
			t.Errorf("two are called %q", name)
		}
		seen[name] = true
	}
}

func TestSpread(t *testing.T) {
	for _, test := range []struct {
		s           spread
		full, short string
	}{
		{nil, "-", "-"},
		{spread{0.5}, "0.50", "0.50"},
		{spread{3, 1, 2}, "2.00 (1.00..3.00)", "2.00"},
		{spread{10, 20}, "15.0 (10.0..20.0)", "15.0"},
		{spread{0.012}, "0.012", "0.012"},
		{spread{1234.5}, "1234", "1234"},
		{spread{0}, "0.00", "0.00"},
	} {
		if full, short := test.s.String(), test.s.short(); full != test.full || short != test.short {
			t.Errorf("%v: got %q and %q, want %q and %q", []float64(test.s), full, short, test.full, test.short)
		}
	}
	if !math.IsNaN(spread(nil).median()) {
		t.Error("the median of nothing is a number")
	}
}

func TestGoals(t *testing.T) {
	b := new(bench)
	b.atLeast("a", spread{2}, 2)
	b.atLeast("b", spread{1.5}, 2)
	b.atMost("c", spread{2}, 2)
	b.atMost("d", spread{3}, 2)
	b.notSlower("e", spread{1.1, 1.2})
	b.notSlower("f", spread{0.9, 1.1, 1.2})
	b.notSlower("g", spread{1.1})
	b.atMost("not measured", nil, 2)
	b.atMost("no number", spread{math.NaN()}, 2)
	var got []string
	for _, g := range b.goals {
		got = append(got, g.what+" "+g.verdict)
	}
	want := "a reached, b missed by 25.0 %, c reached, d missed by 50.0 %, e missed by 15.0 %, f reached, g missed by 10.0 %, no number missed by NaN %"
	if got := strings.Join(got, ", "); got != want {
		t.Errorf("got  %s\nwant %s", got, want)
	}
}

func TestTable(t *testing.T) {
	got := table{{"key", "µs"}, {"P-256", "1"}}.String()
	if want := "| key   | µs  |\n| ----- | --- |\n| P-256 | 1   |\n"; got != want {
		t.Errorf("got\n%swant\n%s", got, want)
	}
}

// The processes of a family are found, and what they have used.
func TestFamily(t *testing.T) {
	cmd := exec.Command("sh", "-c", "sleep 60 & echo; wait")
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	if _, err := out.Read(make([]byte, 1)); err != nil {
		t.Fatal(err)
	}
	all, err := family(cmd.Process.Pid)
	if err != nil || len(all) != 2 || all[0].pid != cmd.Process.Pid || all[1].Parent != cmd.Process.Pid {
		t.Errorf("got %v, %v", all, err)
	}
	if first, others, err := resident(cmd.Process.Pid); err != nil || first <= 0 || others <= 0 {
		t.Errorf("resident: %v and %v, %v", first, others, err)
	}
	for _, s := range all {
		if p, err := os.FindProcess(s.pid); err == nil {
			_ = p.Kill() // the sleep may be another's child by now
		}
	}
	_ = cmd.Wait() // it was killed
	if _, err := family(cmd.Process.Pid); err == nil {
		t.Error("a process that has ended has a family")
	}
}
