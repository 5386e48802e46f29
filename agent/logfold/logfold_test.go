package logfold

import (
	"errors"
	"fmt"
	"log/slog"
	"regexp"
	"strconv"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"p11-agent/agent/logfold/logtest"
)

// book is a log that is read while it is written.
type book struct{ logtest.Buffer }

func (b *book) lines() []string { return strings.Split(strings.TrimSuffix(b.String(), "\n"), "\n") }

var timesPattern = regexp.MustCompile(` times=(\d+) `)

// total counts what lines stand for that have this text.
func (b *book) total(t *testing.T, text string) (n int) {
	t.Helper()
	for _, line := range b.lines() {
		if !strings.Contains(line, text) {
			continue
		}
		one := 1
		if m := timesPattern.FindStringSubmatch(line); m != nil {
			var err error
			if one, err = strconv.Atoi(m[1]); err != nil {
				t.Fatal(err)
			}
		}
		n += one
	}
	return n
}

func newBook() (*book, *Handler, *slog.Logger) {
	b := new(book)
	h := New(slog.NewTextHandler(b, &slog.HandlerOptions{Level: slog.LevelDebug}))
	return b, h, slog.New(h)
}

const lot = 12000

// A client that is refused again and again leaves a few lines, and none is lost
// without being counted.
func TestAttack11Lines(t *testing.T) {
	ssh := func(n int) string { return fmt.Sprintf("ssh (%d) ← bash (%d)", n, n+1) }
	refuse := func(log *slog.Logger, n int, attrs ...any) {
		log.Warn("request refused", append([]any{"request", "sign", "key", "SHA256:x", "result", "refused", "reason", "no", "client", ssh(n), "uid", 1000, "forwarded", false, "connection", n}, attrs...)...)
	}
	for name, test := range map[string]struct {
		most  int // lines
		write func(log *slog.Logger, n int)
	}{
		"the same": {25, func(log *slog.Logger, n int) { refuse(log, n) }},
		"numbers in the reason": {25, func(log *slog.Logger, n int) {
			log.Warn("request refused", "client", ssh(n), "reason", fmt.Sprintf("unknown flags %d", n))
		}},
		"other keys":    {40, func(log *slog.Logger, n int) { refuse(log, n, "key", fmt.Sprint("SHA256:", n)) }},
		"other reasons": {40, func(log *slog.Logger, n int) { refuse(log, n, "reason", strings.Repeat("x", n%100)) }},
		"other requests": {60, func(log *slog.Logger, n int) {
			log.Info([]string{"session not bound", "extension refused", "request refused"}[n%3], "connection", n, "client", ssh(1), "uid", 1000, "reason", fmt.Sprint("no ", n))
		}},
		"forwarded": {40, func(log *slog.Logger, n int) {
			refuse(log, n, "forwarded", true, "via", fmt.Sprint("evil SHA256:", n))
		}},
		"from a logger of its own": {25, func(log *slog.Logger, n int) {
			log.With("request", "sign", "key", "SHA256:x").Warn("request refused", "client", ssh(n), "result", "refused", "reason", "no")
		}},
		"other programs": {480, func(log *slog.Logger, n int) {
			log.Warn("request refused", "client", fmt.Sprintf("evil%s (%d)", strings.Repeat("x", n%5000), n), "reason", "no")
		}},
		"made up hosts": {480, func(log *slog.Logger, n int) {
			refuse(log, n, "forwarded", true, "via", strings.Repeat("x", n%5000))
		}},
		"no client": {60, func(log *slog.Logger, n int) { log.Info("cannot ask here", "reason", fmt.Sprint("x", n)) }},
		"changes": {80, func(log *slog.Logger, n int) {
			log.Info("all keys removed", "request", "remove-all", "result", "ok", "client", ssh(n), "forwarded", true, "via", "evil")
		}},
		"changes of other keys": {100, func(log *slog.Logger, n int) {
			log.Info("key added", "request", "add", "key", fmt.Sprint("SHA256:", n), "result", "ok", "client", ssh(n))
		}},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				b, h, log := newBook()
				log.Info("signed", "request", "sign", "key", "SHA256:good", "result", "ok", "client", ssh(1))
				for n := range lot {
					test.write(log, n)
				}
				log.Info("signed", "request", "sign", "key", "SHA256:good", "result", "ok", "client", ssh(1))
				if n := b.total(t, "msg=signed"); n != 2 {
					t.Errorf("%d of the signatures are there", n)
				}
				time.Sleep(time.Minute)
				synctest.Wait()
				if n := len(b.lines()); n > test.most {
					t.Errorf("%d lines, want up to %d", n, test.most)
				}
				if n := b.total(t, ""); n != lot+2 {
					t.Errorf("the lines stand for %d, want %d", n, lot+2)
				}
				h.Close()
			})
		})
	}
}

// What is folded says who, what, why, how often and when.
func TestFoldedLine(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b, h, log := newBook()
		defer h.Close()
		for n := range 100 {
			log.Warn("request refused", "request", "sign", "key", "SHA256:x", "result", "refused", "reason", fmt.Sprintf("no question is shown before 12:00:%02d", n%60), "client", fmt.Sprintf("ssh (%d)", n), "connection", n)
			time.Sleep(10 * time.Millisecond)
		}
		if n := len(b.lines()); n != 20 {
			t.Fatalf("%d lines", n)
		}
		time.Sleep(firstPeriod)
		synctest.Wait()
		lines := b.lines()
		want := `level=WARN msg="request refused" request=sign key=SHA256:x result=refused reason="no question is shown before 12:00:39" client="ssh (99)" connection=99 times=80 first=2000-01-01T00:00:00.200Z last=2000-01-01T00:00:00.990Z`
		if last := lines[len(lines)-1]; len(lines) != 21 || !strings.HasSuffix(last, want) {
			t.Errorf("%d lines, the last is %s", len(lines), last)
		}
		// The fold changes nothing for another client, or for the same client a while later.
		log.Warn("request refused", "client", "scp (7)", "reason", "other")
		time.Sleep(forgetAfter)
		log.Warn("request refused", "client", "ssh (7)", "reason", "again")
		if n := len(b.lines()); n != 23 {
			t.Errorf("%d lines", n)
		}
	})
}

// A flood that goes on for a day leaves less and less.
func TestFoldedForLong(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b, h, log := newBook()
		const each = 500 * time.Millisecond
		for n := range int(24 * time.Hour / each) {
			log.Warn("request refused", "client", "ssh (1)", "key", fmt.Sprint("SHA256:", n), "reason", strconv.Quote(strings.Repeat("x", n%50)))
			time.Sleep(each)
		}
		h.Close()
		if n := len(b.lines()); n > 1600 {
			t.Errorf("%d lines", n)
		}
		if n := b.total(t, ""); n != int(24*time.Hour/each) {
			t.Errorf("they stand for %d", n)
		}
	})
}

// The end of the agent, and an error that may be its end, write what is folded.
func TestEnd(t *testing.T) {
	for name, end := range map[string]func(*Handler, *slog.Logger){
		"closed": func(h *Handler, _ *slog.Logger) { h.Close() },
		"an error": func(_ *Handler, log *slog.Logger) {
			log.Error("agent ended by a signal", "reason", errors.New("x"))
		},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				b, h, log := newBook()
				for range 100 {
					log.Warn("request refused", "client", "ssh (1)")
				}
				end(h, log)
				if n := b.total(t, "request refused"); n != 100 {
					t.Errorf("%d", n)
				}
				h.Close()
				log.Warn("request refused", "client", "ssh (1)")
				if n := b.total(t, "request refused"); n != 101 {
					t.Errorf("%d with one after the end", n)
				}
			})
		})
	}
}

// What was granted is told from the rest, and what is for developers is left alone.
func TestGranted(t *testing.T) {
	record := func(attrs ...any) slog.Record {
		r := slog.NewRecord(time.Now(), slog.LevelInfo, "signed", 0)
		r.Add(attrs...)
		return r
	}
	for _, test := range []struct {
		line slog.Record
		want bool
	}{
		{record("request", "sign", "result", "ok", "client", "ssh (1)"), true},
		{record("request", "lock", "result", "ok", "client", "ssh (1)"), true},
		{record("request", "sign", "result", "refused", "client", "ssh (1)"), false},
		{record("client", "ssh (1)"), false},
		{record("result", "ok"), false},
	} {
		if got := Granted(test.line); got != test.want {
			t.Errorf("%v: %t", test.line, got)
		}
	}
	b, h, log := newBook()
	defer h.Close()
	for range 500 {
		log.Debug("asking", "client", "ssh (1)")
	}
	if n := len(b.lines()); n != 500 {
		t.Errorf("%d lines for developers", n)
	}
}

func TestWithoutProcesses(t *testing.T) {
	for client, want := range map[string]string{
		"ssh (12) ← git (3) ← bash (4)": "ssh ← git ← bash",
		"process 7":                     "process 7",
		"odd (name (12) ← x (y) ( (3)":  "odd (name ← x (y) (",
		"":                              "",
		"evil7 (7":                      "evil7 (7",
	} {
		if got := withoutProcesses(client); got != want {
			t.Errorf("%q, want %q", got, want)
		}
	}
}

// Lines are folded by many goroutines, for the race detector.
func TestManyWrite(t *testing.T) {
	b, h, log := newBook()
	var all sync.WaitGroup
	for i := range 20 {
		all.Go(func() {
			for range 100 {
				log.With("module", i%3).Info("module printed", "n", i)
				log.Warn("request refused", "client", fmt.Sprint("ssh", i%30))
			}
		})
	}
	all.Go(h.flush)
	all.Wait()
	h.Close()
	if n := b.total(t, ""); n != 4000 {
		t.Errorf("%d", n)
	}
}

// If the agent logs the same warning of a module again and again, the log has a few lines
// and a count of them, also if the module makes up names.
func TestModule(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := new(book)
		h := ForModule(slog.NewTextHandler(b, nil))
		log := slog.New(h).With("module", "m")
		for i := range 1000 {
			log.Warn("it lies", "n", i)
			log.With("token", i).Warn("it lies", "label", strings.Repeat("x", i))
			log.Info("it works", "n", i)
		}
		log.Warn("something else")
		count := func(text string) (n int) {
			for _, line := range b.lines() {
				if strings.Contains(line, text) {
					n++
				}
			}
			return n
		}
		if n, most := count("it lies"), limitsOf[module].burst; n != most {
			t.Errorf("%d lines of one message, want %d", n, most)
		}
		if n := count("something else"); n != 1 {
			t.Errorf("%d lines of another message, want 1", n)
		}
		if n := count("it works"); n != 1000 {
			t.Errorf("%d lines that are no warnings, want all", n)
		}
		time.Sleep(time.Minute)
		synctest.Wait()
		if n, most := count("it lies"), 10; n > most {
			t.Errorf("%d lines with the counts, want up to %d", n, most)
		}
		if n := b.total(t, "it lies"); n != 2000 {
			t.Errorf("the lines stand for %d, want 2000", n)
		}
		log.Warn("it lies", "n", "again")
		if count("n=again") != 1 {
			t.Error("after the period nothing is written")
		}
		for range 10 {
			log.Warn("it lies")
		}
		h.Close()
		if n := b.total(t, "it lies"); n != 2011 {
			t.Errorf("at the end, the lines stand for %d, want 2011", n)
		}
		log.Warn("it lies", "n", "late")
		if count("n=late") != 1 {
			t.Error("after the end it is folded")
		}
	})
}
