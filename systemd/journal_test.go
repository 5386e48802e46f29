package systemd

import (
	"bytes"
	"context"
	"errors"
	"log/slog"
	"maps"
	"strings"
	"testing"
	"unicode/utf8"

	"github.com/coreos/go-systemd/v22/journal"

	"p11-agent/pinentry/plain"
)

// entry is what a handler has sent.
type entry struct {
	message  string
	priority journal.Priority
	fields   map[string]string
}

// recorder returns a handler whose journal is a slice. If failure is not nil, the journal
// takes no entry. fallback gets the lines of the fallback.
func recorder(level slog.Level, failure error) (h *JournalHandler, entries *[]entry, fallback *bytes.Buffer) {
	entries, fallback = new([]entry), new(bytes.Buffer)
	h = NewJournalHandler(level, slog.NewTextHandler(fallback, &slog.HandlerOptions{ReplaceAttr: func(_ []string, a slog.Attr) slog.Attr {
		if a.Key == slog.TimeKey {
			return slog.Attr{}
		}
		return a
	}}))
	h.send = func(message string, p journal.Priority, fields map[string]string) error {
		if failure == nil {
			*entries = append(*entries, entry{message, p, fields})
		}
		return failure
	}
	return h, entries, fallback
}

type hidden string

func (hidden) LogValue() slog.Value { return slog.StringValue("[secret]") }

type broken struct{ text string }

func (b *broken) Error() string { return b.text }

func TestJournalEntries(t *testing.T) {
	for _, test := range []struct {
		name    string
		log     func(*slog.Logger)
		message string
		p       journal.Priority
		fields  map[string]string // besides SYSLOG_IDENTIFIER
	}{
		{"nothing but words", func(l *slog.Logger) { l.Info("agent is listening") }, "agent is listening", journal.PriInfo, nil},
		{
			"attributes", func(l *slog.Logger) { l.Warn("request refused", "key", "SHA256:abc", "forwarded", true, "tries", 2) },
			"request refused key=SHA256:abc forwarded=true tries=2", journal.PriWarning,
			map[string]string{"P11_KEY": "SHA256:abc", "P11_FORWARDED": "true", "P11_TRIES": "2"},
		},
		{
			"an error", func(l *slog.Logger) { l.Error("no", "reason", errors.New(`token "x" is out`)) },
			`no reason="token \"x\" is out"`, journal.PriErr,
			map[string]string{"P11_REASON": `token "x" is out`},
		},
		{
			"of the logger", func(l *slog.Logger) { l.With("module", "opensc").Debug("started", "pid", 7) },
			"started module=opensc pid=7", journal.PriDebug,
			map[string]string{"P11_MODULE": "opensc", "P11_PID": "7"},
		},
		{
			"groups", func(l *slog.Logger) {
				l.With("a", 1).WithGroup("audit").With("b", 2).Info("signed", slog.Group("client", "uid", 3), slog.Group("", "plain", 4), slog.Group("empty"))
			},
			"signed a=1 audit.b=2 audit.client.uid=3 audit.plain=4", journal.PriInfo,
			map[string]string{"P11_A": "1", "P11_AUDIT_B": "2", "P11_AUDIT_CLIENT_UID": "3", "P11_AUDIT_PLAIN": "4"},
		},
		{
			"what attributes of the record are called", func(l *slog.Logger) { l.Info("m", "level", "low", "time", "noon", "msg", "x") },
			"m level=low time=noon msg=x", journal.PriInfo,
			map[string]string{"P11_LEVEL": "low", "P11_TIME": "noon", "P11_MSG": "x"},
		},
		{
			"names that the journal does not take", func(l *slog.Logger) { l.Info("m", "pin-source é", 1, "", 2, strings.Repeat("n", 90), 3) },
			`m "pin-source é"=1 ""=2 ` + strings.Repeat("n", 90) + "=3", journal.PriInfo,
			map[string]string{"P11_PIN_SOURCE__": "1", "P11_" + strings.Repeat("N", 60): "3"},
		},
		{
			"control characters", func(l *slog.Logger) { l.Info("one\nMESSAGE=two\x1b[1m", "card", "a\nPRIORITY=0\x00b\xff") },
			`one MESSAGE=two\x1b[1m card="a\nPRIORITY=0\x00b\xff"`, journal.PriInfo,
			map[string]string{"P11_CARD": "a PRIORITY=0\\x00b\uFFFD"},
		},
		{"a secret", func(l *slog.Logger) { l.Info("m", "pin", hidden("1234")) }, "m pin=[secret]", journal.PriInfo, map[string]string{"P11_PIN": "[secret]"}},
	} {
		t.Run(test.name, func(t *testing.T) {
			h, entries, fallback := recorder(slog.LevelDebug, nil)
			test.log(slog.New(h))
			if len(*entries) != 1 || fallback.Len() > 0 {
				t.Fatalf("%d entries, and the fallback has %q", len(*entries), fallback)
			}
			got := (*entries)[0]
			if got.message != test.message || got.priority != test.p {
				t.Errorf("sent %q with priority %d,\nwant %q with %d", got.message, got.priority, test.message, test.p)
			}
			want := maps.Clone(test.fields)
			if want == nil {
				want = make(map[string]string)
			}
			want["SYSLOG_IDENTIFIER"] = "p11-agent"
			if !maps.Equal(got.fields, want) {
				t.Errorf("sent the fields %q,\nwant %q", got.fields, want)
			}
		})
	}
}

// A value whose methods panic costs no entry.
func TestJournalSurvivesValues(t *testing.T) {
	h, entries, _ := recorder(slog.LevelInfo, nil)
	slog.New(h).Info("m", "reason", (*broken)(nil))
	if len(*entries) != 1 || !strings.Contains((*entries)[0].fields["P11_REASON"], "PANIC") {
		t.Errorf("sent %+v", *entries)
	}
}

func TestJournalIsBounded(t *testing.T) {
	h, entries, _ := recorder(slog.LevelInfo, nil)
	var attrs []any
	for i := range 200 {
		attrs = append(attrs, strings.Repeat("k", i%50)+"x", strings.Repeat("é", 5000))
	}
	slog.New(h).With(attrs...).WithGroup(strings.Repeat("g", 100)).Info(strings.Repeat("é", 5000), attrs...)
	e := (*entries)[0]
	size := len(e.message)
	if size > maxMessage || !utf8.ValidString(e.message) {
		t.Errorf("the message has %d bytes", size)
	}
	for name, value := range e.fields {
		size += len(name) + len(value)
		if len(name) > maxFieldName || len(value) > maxFieldValue || !utf8.ValidString(value) {
			t.Errorf("%s has %d bytes", name, len(value))
		}
	}
	// A datagram of the journal's socket has room for that (net.core.wmem_default).
	if len(e.fields) > maxFields || size > 200<<10 {
		t.Errorf("%d fields of %d bytes in all", len(e.fields), size)
	}
}

func TestJournalLevel(t *testing.T) {
	h, entries, _ := recorder(slog.LevelInfo, nil)
	l := slog.New(h).With("a", 1).WithGroup("g")
	l.Debug("no")
	l.Info("yes")
	if len(*entries) != 1 || h.Enabled(context.Background(), slog.LevelDebug) {
		t.Errorf("sent %+v", *entries)
	}
}

func TestJournalFallback(t *testing.T) {
	h, _, fallback := recorder(slog.LevelInfo, errors.New("the socket is gone"))
	l := slog.New(h).With("a", 1).WithGroup("g")
	l.Info("first", "b", 2)
	l.Info("second", "b", 3)
	want := `level=WARN msg="the journal does not take entries with fields" a=1 g.reason="the socket is gone"
level=INFO msg=first a=1 g.b=2
level=INFO msg=second a=1 g.b=3
`
	if fallback.String() != want {
		t.Errorf("the fallback has\n%s\nwant\n%s", fallback, want)
	}
}

func FuzzJournal(f *testing.F) {
	f.Add("request refused", "key", "SHA256:abc")
	f.Add("a\nMESSAGE=b", "=\n", "\x00\xff\u0085")
	f.Fuzz(func(t *testing.T, message, name, value string) {
		h, entries, _ := recorder(slog.LevelInfo, nil)
		slog.New(h).WithGroup(name).Info(message, name, value)
		e := (*entries)[0]
		for name, value := range e.fields {
			if strings.Trim(name, "ABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789_") != "" || name[0] == '_' {
				t.Errorf("the name %q", name)
			}
			if plain.LineWithin(value, maxFieldValue) != value || strings.Contains(value, "\n") {
				t.Errorf("the value %q", value)
			}
		}
		if plain.LineWithin(e.message, maxMessage) != e.message {
			t.Errorf("the message %q", e.message)
		}
	})
}

// BenchmarkJournal measures the entry of a signature without sending it.
func BenchmarkJournal(b *testing.B) {
	h, _, _ := recorder(slog.LevelInfo, nil)
	h.send = func(string, journal.Priority, map[string]string) error { return nil }
	log := slog.New(h)
	attrs := []slog.Attr{
		slog.String("request", "sign"), slog.String("key", "SHA256:"+strings.Repeat("k", 43)),
		slog.String("uri", "pkcs11:model=SoftHSM%20v2;manufacturer=SoftHSM%20project;serial=9b8d2f5c1e0a7f43;token=work;id=%01;object=ssh"),
		slog.String("kind", "login"), slog.String("purpose", "login"), slog.String("user", "me"), slog.String("host", "host.example.org"),
		slog.String("result", "ok"), slog.String("client", "ssh (4711) ← git (4710) ← bash (4709) ← tmux: server (4708)"), slog.Int("uid", 1000),
		slog.Bool("forwarded", false), slog.Uint64("connection", 12), slog.Duration("duration", 0),
	}
	b.ReportAllocs()
	for b.Loop() {
		log.LogAttrs(b.Context(), slog.LevelInfo, "signed", attrs...)
	}
}
