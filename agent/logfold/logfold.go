// Package logfold keeps clients from filling a log. A client makes the agent write a
// line with each request that is refused; without a limit it pushes the lines of all
// others out of the log's files, or has journald drop them.
//
// The first lines of a client are written as they are. Then lines that differ only in
// numbers are folded: they become one line, which ends with their number and with the
// times of the first and the last one. Of a client whose lines all differ, some are folded
// so, and the others are counted in one line. Each line is written or counted, also when
// the log is closed.
//
// A module that lies makes the agent warn of it at each look. [ForModule] folds the warnings
// about one module.
//
// Clients are told apart by what lines say of them in the attributes of
// [p11-agent/agent]: client (names of programs; numbers of processes are overlooked),
// uid, forwarded and via, of which the first host counts. There is a bound for those
// that are told apart. Lines without a client are told apart by their message.
package logfold

import (
	"context"
	"log/slog"
	"maps"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"
)

// The attributes that lines are known by.
const (
	attrClient    = "client"
	attrUID       = "uid"
	attrForwarded = "forwarded"
	attrVia       = "via"
	attrRequest   = "request"
	attrResult    = "result"

	resultOK    = "ok"
	requestSign = "sign"
)

// A kind is a kind of lines. Those of one use up nothing of another.
type kind int

const (
	refused kind = iota // and everything else that a client causes
	signed
	changed
	other // of no client
	module
)

// limits are those of one client, for lines of one kind.
type limits struct {
	burst   int           // lines that are written as they are
	refill  time.Duration // after which there is one more
	groups  int           // of lines that are folded together, within a period
	clients int           // that are told apart
}

var limitsOf = [...]limits{
	refused: {burst: 20, refill: 30 * time.Second, groups: 4, clients: 16},
	changed: {burst: 50, refill: 10 * time.Second, groups: 16, clients: 16},
	// A person who may sign may sign at many hosts within a short time.
	signed: {burst: 1000, refill: time.Second, groups: 64, clients: 16},
	other:  {burst: 50, refill: 10 * time.Second, groups: 16, clients: 64},
	// Told apart by their messages, which are constants.
	module: {burst: 5, refill: 12 * time.Second, groups: 4, clients: 64},
}

const (
	// firstPeriod is how long lines are folded before that is written, and each
	// following period of the same client is twice as long, up to maxPeriod.
	firstPeriod = 10 * time.Second
	maxPeriod   = 5 * time.Minute
	// forgetAfter is how long after its last line a client has a fresh start.
	forgetAfter = 10 * time.Minute
)

// Granted tells whether a line says that a request was granted.
func Granted(r slog.Record) bool {
	k, _ := about(r)
	return k == signed || k == changed
}

// A Handler folds lines before it hands them on. It is safe for concurrent use.
type Handler struct {
	next slog.Handler
	with string // attributes of WithAttrs, for the key of a group
	*state
}

var _ slog.Handler = (*Handler)(nil)

// state is what the handlers of one log share.
type state struct {
	from   slog.Level // lines below are handed on as they are
	module bool       // all lines are about one module

	mu      sync.Mutex
	closed  bool
	clients [len(limitsOf)]map[string]*client
}

// client is a client, for lines of one kind.
type client struct {
	limits
	spent  time.Duration // of burst times refill, at the time of the last line
	last   time.Time     // line
	period time.Duration // the present one, or the last
	timer  *time.Timer   // ends the period; nil: nothing is folded
	folded []*group
	rest   *group // what is in none of them
}

// group is lines that are folded together.
type group struct {
	key         string // empty: the lines differ
	next        slog.Handler
	line        slog.Record // the last one
	count       int
	first, last time.Time
}

// New returns a Handler before next, for all lines of the agent. Lines below slog.LevelInfo
// are handed on as they are.
func New(next slog.Handler) *Handler { return newHandler(next, &state{from: slog.LevelInfo}) }

// ForModule returns a Handler before next, for the lines about one module. It folds
// warnings: a few of each message in a minute are written as they are. Other lines are
// handed on as they are.
func ForModule(next slog.Handler) *Handler {
	return newHandler(next, &state{from: slog.LevelWarn, module: true})
}

func newHandler(next slog.Handler, s *state) *Handler {
	h := &Handler{next: next, state: s}
	for k := range h.clients {
		h.clients[k] = make(map[string]*client)
	}
	return h
}

// Enabled reports whether the next handler takes the level.
func (h *Handler) Enabled(ctx context.Context, level slog.Level) bool {
	return h.next.Enabled(ctx, level)
}

// WithAttrs returns a handler whose lines have these attributes, too.
func (h *Handler) WithAttrs(attrs []slog.Attr) slog.Handler {
	with := *h
	with.next = h.next.WithAttrs(attrs)
	for _, a := range attrs {
		with.with += a.String() + " "
	}
	return &with
}

// WithGroup returns a handler that puts this name in front of those of attributes.
func (h *Handler) WithGroup(name string) slog.Handler {
	with := *h
	with.next = h.next.WithGroup(name)
	with.with += name + "."
	return &with
}

// Handle hands a line on, or folds it. An error is usually the last that is written,
// so that what was folded before is written first.
func (h *Handler) Handle(ctx context.Context, r slog.Record) error {
	if r.Level < h.from {
		return h.next.Handle(ctx, r)
	}
	if r.Level >= slog.LevelError {
		h.flush()
	}
	k, name := about(r)
	switch {
	case h.module:
		k, name = module, r.Message
	case k == other:
		name = h.with + r.Message
	}
	now := time.Now()
	h.mu.Lock()
	if h.closed {
		h.mu.Unlock()
		return h.next.Handle(ctx, r)
	}
	c := h.clientLocked(k, name, now)
	if c.timer == nil && c.take(now) {
		h.mu.Unlock()
		return h.next.Handle(ctx, r)
	}
	defer h.mu.Unlock()
	c.last = now
	c.fold(h, r)
	if c.timer == nil {
		c.period = min(max(2*c.period, firstPeriod), maxPeriod)
		c.timer = time.AfterFunc(c.period, func() { h.end(c) })
	}
	return nil
}

// about returns of which kind a line is, and which client it is about, if any.
func about(r slog.Record) (k kind, name string) {
	k = other
	var b strings.Builder
	result, request := "", ""
	r.Attrs(func(a slog.Attr) bool {
		switch a.Key {
		case attrClient:
			k = refused
			b.WriteString(withoutProcesses(a.Value.String()))
		case attrUID, attrForwarded:
			b.WriteByte(' ')
			b.WriteString(a.Value.String())
		case attrVia:
			first, _, _ := strings.Cut(a.Value.String(), " ")
			b.WriteByte(' ')
			b.WriteString(first)
		case attrRequest:
			request = a.Value.String()
		case attrResult:
			result = a.Value.String()
		}
		return true
	})
	switch {
	case k == other:
		return k, ""
	case result != resultOK:
		return refused, b.String()
	case request == requestSign || request == "" && r.Message == "signed":
		return signed, b.String()
	}
	return changed, b.String()
}

// withoutProcesses leaves the numbers of processes out of a client: "ssh (1) ← git (2)".
func withoutProcesses(client string) string {
	b := make([]byte, 0, len(client))
	for {
		before, rest, found := strings.Cut(client, " (")
		b = append(b, before...)
		if !found {
			return string(b)
		}
		number, after, closed := strings.Cut(rest, ")")
		if !closed || strings.Trim(number, "0123456789") != "" {
			b = append(b, " ("...)
			client = rest
			continue
		}
		client = after
	}
}

// withoutNumbers replaces each number in a text.
func withoutNumbers(text string) string {
	b := make([]byte, 0, len(text))
	for i := range len(text) {
		switch c := text[i]; {
		case c < '0' || c > '9':
			b = append(b, c)
		case len(b) == 0 || b[len(b)-1] != '0':
			b = append(b, '0')
		}
	}
	return string(b)
}

// clientLocked returns a client. When there are too many, it is one that stands for
// all that are new.
func (s *state) clientLocked(k kind, name string, now time.Time) *client {
	all := s.clients[k]
	c := all[name]
	if c == nil && len(all) >= limitsOf[k].clients {
		maps.DeleteFunc(all, func(_ string, c *client) bool { return c.timer == nil && now.Sub(c.last) >= forgetAfter })
		if len(all) >= limitsOf[k].clients {
			name = ""
			c = all[name]
		}
	}
	if c == nil {
		c = &client{limits: limitsOf[k]}
		all[name] = c
	}
	return c
}

// take tells whether the client may have a line written.
func (c *client) take(now time.Time) bool {
	quiet := now.Sub(c.last)
	spent := max(0, c.spent-quiet)
	if spent+c.refill > time.Duration(c.burst)*c.refill {
		return false
	}
	if quiet >= forgetAfter {
		c.period = 0
	}
	c.spent, c.last = spent+c.refill, now
	return true
}

// fold adds a line to those like it.
func (c *client) fold(h *Handler, r slog.Record) {
	key := h.with + lineKey(r)
	i := slices.IndexFunc(c.folded, func(g *group) bool { return g.key == key })
	var g *group
	switch {
	case i >= 0:
		g = c.folded[i]
	case len(c.folded) < c.groups:
		g = &group{key: key, first: r.Time}
		c.folded = append(c.folded, g)
	default:
		if c.rest == nil {
			c.rest = &group{first: r.Time}
		}
		g = c.rest
	}
	g.count++
	g.next, g.line, g.last = h.next, r.Clone(), r.Time
}

// lineKey is the same for lines that differ only in numbers.
func lineKey(r slog.Record) string {
	var b strings.Builder
	b.WriteString(r.Message)
	r.Attrs(func(a slog.Attr) bool {
		switch value := a.Value.String(); a.Key {
		case "connection", "duration":
		case attrClient:
			b.WriteString(" client=" + withoutProcesses(value))
		case "key", "uri", "user", "namespace", "host", "comment":
			b.WriteString(" " + a.Key + "=" + value)
		default:
			b.WriteString(" " + a.Key + "=" + withoutNumbers(value))
		}
		return true
	})
	return b.String()
}

// end writes what was folded in a period that is over.
func (h *Handler) end(c *client) {
	h.mu.Lock()
	groups := c.takeFolded()
	h.mu.Unlock()
	write(groups)
}

// takeFolded ends the period.
func (c *client) takeFolded() []*group {
	groups := c.folded
	if c.rest != nil {
		groups = append(groups, c.rest)
	}
	if c.timer != nil {
		c.timer.Stop()
	}
	c.timer, c.folded, c.rest = nil, nil, nil
	return groups
}

// flush writes all that is folded.
func (h *Handler) flush() {
	h.mu.Lock()
	var groups []*group
	for _, all := range h.clients {
		for _, name := range slices.Sorted(maps.Keys(all)) {
			groups = append(groups, all[name].takeFolded()...)
		}
	}
	h.mu.Unlock()
	write(groups)
}

// Close writes all that is folded. Lines that come later are not folded.
func (h *Handler) Close() {
	h.mu.Lock()
	h.closed = true
	h.mu.Unlock()
	h.flush()
}

func write(groups []*group) {
	for _, g := range groups {
		line := g.line
		if g.count > 1 {
			if g.key == "" {
				line.AddAttrs(slog.String("folded", strconv.Itoa(g.count)+" lines that differ, of which this is the last"))
			}
			line.AddAttrs(slog.Int("times", g.count), slog.Time("first", g.first), slog.Time("last", g.last))
		}
		_ = g.next.Handle(context.Background(), line) // slog.Logger drops this error, too
	}
}
