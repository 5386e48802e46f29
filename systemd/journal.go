package systemd

import (
	"bytes"
	"context"
	"encoding"
	"fmt"
	"log/slog"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/coreos/go-systemd/v22/journal"

	"p11-agent/pinentry/plain"
)

const (
	// journalIdentifier is what "journalctl -t" finds the entries by.
	journalIdentifier = "p11-agent"
	// journalPrefix begins the names of the fields that attributes become.
	journalPrefix = "P11_"

	// An entry is bounded, so that it fits into one message of the socket.
	maxFieldName  = 64 // bytes, of journald
	maxFieldValue = 1 << 10
	maxMessage    = 4 << 10
	maxFields     = 64
)

// A JournalHandler is a slog.Handler that writes entries with fields into the journal
// (systemd.journal-fields(7)). MESSAGE is the line for people, with the attributes at its end.
// PRIORITY follows from the level. Each attribute is also a field, named P11_ and the attribute's
// groups and name in upper case: "journalctl P11_KEY=SHA256:..." finds the entries about a key.
//
// Control characters become escapes, and long values are cut. An entry that the journal does not
// take goes to the fallback. Many goroutines may use a JournalHandler.
type JournalHandler struct {
	level    slog.Leveler
	fallback slog.Handler
	send     func(message string, priority journal.Priority, fields map[string]string) error

	prefix string  // of the groups that are open, with a final "_"
	fields []field // of WithAttrs
	// text writes the attributes of MESSAGE. It is slog's own handler, so that it quotes
	// them as in every other log.
	text  func(*bytes.Buffer) slog.Handler
	lines *sync.Pool   // of *line, with those of text
	lost  *atomic.Bool // an entry went to the fallback
}

// line is where the text of one entry after the other is written.
type line struct {
	bytes.Buffer
	slog.Handler
}

var _ slog.Handler = (*JournalHandler)(nil)

type field struct{ name, value string }

// NewJournalHandler returns a handler that leaves out entries below the level.
func NewJournalHandler(level slog.Leveler, fallback slog.Handler) *JournalHandler {
	h := &JournalHandler{level: level, fallback: fallback, send: journal.Send, lost: new(atomic.Bool)}
	return h.withText(func(b *bytes.Buffer) slog.Handler {
		return slog.NewTextHandler(b, &slog.HandlerOptions{Level: slog.Level(-1 << 20)}) // Enabled has decided
	})
}

func (h *JournalHandler) withText(text func(*bytes.Buffer) slog.Handler) *JournalHandler {
	with := *h
	with.text = text
	with.lines = &sync.Pool{New: func() any {
		l := new(line)
		l.Handler = text(&l.Buffer)
		return l
	}}
	return &with
}

// Enabled reports whether the level is logged.
func (h *JournalHandler) Enabled(_ context.Context, level slog.Level) bool {
	return level >= h.level.Level()
}

// Handle writes one entry.
func (h *JournalHandler) Handle(ctx context.Context, r slog.Record) error {
	fields := make(map[string]string, 1+len(h.fields)+r.NumAttrs())
	fields["SYSLOG_IDENTIFIER"] = journalIdentifier
	put := func(f field) {
		if len(fields) < maxFields {
			fields[f.name] = f.value
		}
	}
	for _, f := range h.fields {
		put(f)
	}
	r.Attrs(func(a slog.Attr) bool {
		appendFields(h.prefix, a, put)
		return true
	})
	message := plain.LineWithin(r.Message+h.attributes(ctx, r), maxMessage)
	if err := h.send(message, priority(r.Level), fields); err != nil {
		if !h.lost.Swap(true) {
			lost := slog.NewRecord(r.Time, slog.LevelWarn, "the journal does not take entries with fields", 0)
			lost.AddAttrs(slog.Any("reason", err))
			_ = h.fallback.Handle(ctx, lost) // no other place takes the error
		}
		return h.fallback.Handle(ctx, r)
	}
	return nil
}

// attributes returns the text of a record's attributes, for the end of MESSAGE.
func (h *JournalHandler) attributes(ctx context.Context, r slog.Record) string {
	// The time is the journal's, and the message would be quoted.
	r.Time, r.Message = time.Time{}, ""
	l := h.lines.Get().(*line) //nolint:forcetypeassert // there is nothing else in it
	defer h.lines.Put(l)
	l.Reset()
	if err := l.Handle(ctx, r); err != nil {
		return ""
	}
	_, rest, _ := bytes.Cut(bytes.TrimSpace(l.Bytes()), []byte(`msg=""`)) // behind the level
	return string(rest)
}

// WithAttrs returns a handler whose entries have these attributes, too.
func (h *JournalHandler) WithAttrs(attrs []slog.Attr) slog.Handler {
	if len(attrs) == 0 {
		return h
	}
	with := *h
	with.fallback = h.fallback.WithAttrs(attrs)
	with.fields = slices.Clone(h.fields)
	for _, a := range attrs {
		appendFields(h.prefix, a, func(f field) {
			if len(with.fields) < maxFields {
				with.fields = append(with.fields, f)
			}
		})
	}
	return with.withText(func(b *bytes.Buffer) slog.Handler { return h.text(b).WithAttrs(attrs) })
}

// WithGroup returns a handler that puts this name before the names of later attributes.
func (h *JournalHandler) WithGroup(name string) slog.Handler {
	if name == "" {
		return h
	}
	with := *h
	with.fallback = h.fallback.WithGroup(name)
	with.prefix = h.prefix + name + "_"
	return with.withText(func(b *bytes.Buffer) slog.Handler { return h.text(b).WithGroup(name) })
}

// priority returns the priority of syslog(3) for a level.
func priority(level slog.Level) journal.Priority {
	switch {
	case level >= slog.LevelError:
		return journal.PriErr
	case level >= slog.LevelWarn:
		return journal.PriWarning
	case level >= slog.LevelInfo:
		return journal.PriInfo
	}
	return journal.PriDebug
}

// appendFields calls put with the fields that an attribute becomes.
func appendFields(prefix string, a slog.Attr, put func(field)) {
	v := a.Value.Resolve()
	if v.Kind() == slog.KindGroup {
		if a.Key != "" { // a group without a name is no group
			prefix += a.Key + "_"
		}
		for _, member := range v.Group() {
			appendFields(prefix, member, put)
		}
		return
	}
	if a.Key == "" {
		return
	}
	put(field{fieldName(prefix + a.Key), plain.LineWithin(valueText(v), maxFieldValue)})
}

// fieldName makes a name that journald takes: of upper case letters, digits and
// underscores.
func fieldName(name string) string {
	b := append(make([]byte, 0, maxFieldName), journalPrefix...)
	for _, r := range name {
		switch {
		case len(b) == maxFieldName:
			return string(b)
		case r >= 'a' && r <= 'z':
			r += 'A' - 'a'
		case r >= 'A' && r <= 'Z', r >= '0' && r <= '9':
		default:
			r = '_'
		}
		b = append(b, byte(r))
	}
	return string(b)
}

// valueText returns the text that slog.TextHandler writes for a value, without quotes. As
// there, a value whose methods panic (a nil pointer, mostly) does no harm.
func valueText(v slog.Value) (text string) {
	defer func() {
		if r := recover(); r != nil {
			text = fmt.Sprintf("!PANIC: %v", r)
		}
	}()
	if v.Kind() != slog.KindAny {
		return v.String()
	}
	switch v := v.Any().(type) {
	case encoding.TextMarshaler:
		b, err := v.MarshalText()
		if err != nil {
			return "!ERROR:" + err.Error()
		}
		return string(b)
	case error:
		return v.Error()
	default:
		return fmt.Sprintf("%+v", v)
	}
}
