package systemd

import (
	"bytes"
	"context"
	"encoding"
	"fmt"
	"log/slog"
	"slices"
	"strings"
	"sync/atomic"
	"unicode"
	"unicode/utf8"

	"github.com/coreos/go-systemd/v22/journal"
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

// A JournalHandler is a slog.Handler that writes entries with fields into the
// journal (systemd.journal-fields(7)): MESSAGE is the line for people, with the
// attributes behind it, PRIORITY follows from the level, and each attribute is
// also a field of its own, whose name is P11_ and that of the attribute in upper
// case, behind those of its groups: "journalctl P11_KEY=SHA256:..." finds the
// entries about a key.
//
// Control characters become spaces, and long values are cut. An entry that the
// journal does not take goes to the fallback. It may be used by many goroutines.
type JournalHandler struct {
	level    slog.Leveler
	fallback slog.Handler
	send     func(message string, priority journal.Priority, fields map[string]string) error

	prefix string  // of the groups that are open, with a final "_"
	fields []field // of WithAttrs
	// what writes the attributes of MESSAGE: slog's own, so that they are quoted
	// as in every other log.
	text func(*bytes.Buffer) slog.Handler
	lost *atomic.Bool // an entry went to the fallback
}

var _ slog.Handler = (*JournalHandler)(nil)

type field struct{ name, value string }

// NewJournalHandler makes a handler that leaves out what is below the level.
func NewJournalHandler(level slog.Leveler, fallback slog.Handler) *JournalHandler {
	return &JournalHandler{
		level: level, fallback: fallback, send: journal.Send, lost: new(atomic.Bool),
		text: func(b *bytes.Buffer) slog.Handler {
			return slog.NewTextHandler(b, &slog.HandlerOptions{
				Level: slog.Level(-1 << 20), // Enabled has decided
				ReplaceAttr: func(groups []string, a slog.Attr) slog.Attr {
					// The record's own, not an attribute that is called the same.
					_, isLevel := a.Value.Any().(slog.Level)
					if len(groups) == 0 && (a.Key == slog.TimeKey && a.Value.Kind() == slog.KindTime || a.Key == slog.LevelKey && isLevel) {
						return slog.Attr{}
					}
					return a
				},
			})
		},
	}
}

// Enabled reports whether the level is logged.
func (h *JournalHandler) Enabled(_ context.Context, level slog.Level) bool {
	return level >= h.level.Level()
}

// Handle writes one entry.
func (h *JournalHandler) Handle(ctx context.Context, r slog.Record) error {
	fields := map[string]string{"SYSLOG_IDENTIFIER": journalIdentifier}
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
	message := printable(r.Message, maxMessage)
	var b bytes.Buffer
	// It leaves the message out, which it would quote.
	bare := slog.NewRecord(r.Time, r.Level, "", 0)
	r.Attrs(func(a slog.Attr) bool {
		bare.AddAttrs(a)
		return true
	})
	if err := h.text(&b).Handle(ctx, bare); err == nil {
		if rest := strings.TrimPrefix(strings.TrimSpace(b.String()), `msg=""`); rest != "" {
			message = printable(message+rest, maxMessage)
		}
	}
	if err := h.send(message, priority(r.Level), fields); err != nil {
		if !h.lost.Swap(true) {
			lost := slog.NewRecord(r.Time, slog.LevelWarn, "the journal does not take entries with fields", 0)
			lost.AddAttrs(slog.Any("reason", err))
			_ = h.fallback.Handle(ctx, lost) // there is nobody left to tell
		}
		return h.fallback.Handle(ctx, r)
	}
	return nil
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
	with.text = func(b *bytes.Buffer) slog.Handler { return h.text(b).WithAttrs(attrs) }
	return &with
}

// WithGroup returns a handler that puts this name in front of those of attributes.
func (h *JournalHandler) WithGroup(name string) slog.Handler {
	if name == "" {
		return h
	}
	with := *h
	with.fallback = h.fallback.WithGroup(name)
	with.prefix = h.prefix + name + "_"
	with.text = func(b *bytes.Buffer) slog.Handler { return h.text(b).WithGroup(name) }
	return &with
}

// priority is that of syslog(3).
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
	put(field{fieldName(prefix + a.Key), printable(valueText(v), maxFieldValue)})
}

// fieldName makes a name that journald takes: of upper case letters, digits and
// underscores.
func fieldName(name string) string {
	name = journalPrefix + strings.Map(func(r rune) rune {
		switch {
		case r >= 'a' && r <= 'z':
			return r - 'a' + 'A'
		case r >= 'A' && r <= 'Z', r >= '0' && r <= '9', r == '_':
			return r
		}
		return '_'
	}, name)
	return name[:min(len(name), maxFieldName)]
}

// valueText is the text of a value as slog.TextHandler has it, without quotes. As
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

// printable puts a text on one line of most bytes at the most.
func printable(text string, most int) string {
	line := strings.Map(func(r rune) rune {
		if unicode.IsControl(r) {
			return ' '
		}
		return r // a byte that is not UTF-8 comes as U+FFFD
	}, text)
	if len(line) > most {
		const more = "…"
		end := most - len(more)
		for !utf8.RuneStart(line[end]) {
			end--
		}
		line = line[:end] + more
	}
	return line
}
