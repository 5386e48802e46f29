package status

import (
	"cmp"
	"fmt"
	"io"
	"strings"
	"text/tabwriter"
	"time"

	"p11-agent/agent/audit"
	"p11-agent/agent/request"
	"p11-agent/cmd/p11-agent/output"
	"p11-agent/pinentry/plain"
	"p11-agent/token/pkcs11uri"
	"p11-agent/token/wire"
)

// Print shows so many requests, among them so many of each kind, and so many failures.
const shownRequests, shownOfKind, shownFailures = 20, 5, 5

// Print writes the report for a person: one screen.
func (r *Report) Print(out io.Writer) error {
	var b strings.Builder
	locked := ""
	if r.Locked {
		locked = ", " + output.Paint(out, output.Caution, "LOCKED") + " (ssh-add -X or p11-agent unlock opens it)"
	}
	fmt.Fprintf(&b, "p11-agent %s, process %d, up for %s%s\n", plain.Line(r.Version), r.PID, span(r.Time.Sub(r.Started)), locked)
	var next output.Style // of the row that comes next
	mark := func(s output.Style) { next = s }
	section := func(title string, lines int, print func(row func(cells ...string))) {
		if lines == 0 {
			return
		}
		fmt.Fprintf(&b, "\n%s\n", output.Paint(out, output.Strong, title))
		var table strings.Builder
		var styles []output.Style // of the rows; a colour would count as text in the columns
		w := tabwriter.NewWriter(&table, 0, 0, 2, ' ', 0)
		print(func(cells ...string) {
			for i, cell := range cells {
				cells[i] = plain.Line(cell)
			}
			fmt.Fprintln(w, strings.TrimRight("  "+strings.Join(cells, "\t"), "\t"))
			styles, next = append(styles, next), output.None
		})
		_ = w.Flush() // to memory
		for i, row := range strings.Split(strings.TrimSuffix(table.String(), "\n"), "\n") {
			b.WriteString(output.Paint(out, styles[i], row) + "\n")
		}
	}
	section("SOCKETS", len(r.Sockets), func(row func(...string)) {
		for _, s := range r.Sockets {
			row(s.Path, output.Count(s.Connections, "connection"), s.Name)
		}
	})
	section("KEYS", len(r.Keys), func(row func(...string)) {
		for _, k := range r.Keys {
			mark(k.style())
			row(ShortURI(k.Comment), shortType(k.Type), k.Fingerprint, k.where(), r.used(k.Signatures, k.LastUsed), k.limits(r.Time))
		}
	})
	left := r.leftOut()
	section("LEFT OUT", len(left), func(row func(...string)) {
		for _, cells := range left {
			row(cells...)
		}
	})
	section("TOKENS", len(r.Tokens), func(row func(...string)) {
		for _, t := range r.Tokens {
			mark(t.style())
			row(t.Name(), t.Module, t.pin(), t.login(r.Time), r.used(t.Signatures, t.LastUsed))
		}
	})
	section("MODULES", len(r.Modules), func(row func(...string)) {
		for _, m := range r.Modules {
			mark(map[ModuleState]output.Style{Failed: output.Bad}[m.State])
			row(m.Name, m.state(), cmp.Or(m.Reason, m.sandbox()))
		}
	})
	for _, m := range r.Modules {
		output.Steps(&b, fmt.Sprintf("  next for %s: ", plain.Line(m.Name)), m.Next)
	}
	section("UPSTREAM AGENTS", len(r.Upstreams), func(row func(...string)) {
		for _, u := range r.Upstreams {
			mark(map[bool]output.Style{true: output.Bad}[u.Trouble != ""])
			row(u.Path, output.Count(u.Keys, "key"), u.Trouble)
		}
	})
	section("ALLOWED FOR LONGER", len(r.Approvals), func(row func(...string)) {
		for _, a := range r.Approvals {
			lasts := "until lock"
			if !a.Ends.IsZero() {
				lasts = "for " + span(a.Ends.Sub(r.Time))
			}
			row(ShortURI(a.Comment), a.What, strings.TrimSpace(a.Forwarding), lasts)
		}
	})
	section("NO QUESTIONS SHOWN", len(r.Pauses), func(row func(...string)) {
		for _, p := range r.Pauses {
			refused := "refused " + output.Times(p.Refused)
			if p.Block {
				refused = "everything refused"
			}
			row("from "+p.From, cmp.Or(ShortURI(p.About), "about any key"), refused, "for "+span(p.Until.Sub(r.Time)))
		}
	})
	requests := r.shown()
	section("LAST REQUESTS", len(requests), func(row func(...string)) {
		for _, e := range requests {
			mark(map[bool]output.Style{true: output.Caution}[e.Result != audit.OK])
			row(ago(r.Time.Sub(e.Time)), string(e.Request), e.subject(), e.purpose(), e.client(), e.result())
		}
	})
	failures := r.Failures[:min(len(r.Failures), shownFailures)]
	section("LAST FAILURES", len(failures), func(row func(...string)) {
		for _, e := range failures {
			row(ago(r.Time.Sub(e.Time)), string(e.Request), e.subject(), "because "+e.Reason+e.times())
		}
	})
	if !r.Locked && len(r.Keys) == 0 {
		b.WriteString("\nThere are no keys: \"p11-agent list\" shows the keys of all tokens, and why the agent does not offer them.\n")
	}
	_, err := io.WriteString(out, b.String())
	return err
}

// style returns the style of the row of a key.
func (k *Key) style() output.Style {
	if k.Present || k.InMemory {
		return output.Good
	}
	return output.Caution
}

// style returns the style of the row of a token.
func (t *Token) style() output.Style {
	switch s := triesStyle(t.PIN); {
	case s != output.None:
		return s
	case !t.Present:
		return output.Caution
	case t.LoggedIn:
		return output.Good
	}
	return output.None
}

// leftOut returns rows about what a bound leaves out.
func (r *Report) leftOut() (rows [][]string) {
	shown := 0
	for _, k := range r.Keys {
		if !k.NotShown {
			shown++
		}
	}
	if shown < len(r.Keys) {
		rows = append(rows, []string{"keys", FewShown(shown, len(r.Keys))})
	}
	for _, m := range r.Modules {
		for _, reason := range m.LeftOut {
			rows = append(rows, []string{m.Name, reason})
		}
	}
	for _, t := range r.Tokens {
		for _, reason := range t.LeftOut {
			rows = append(rows, []string{t.Name(), reason})
		}
	}
	return rows
}

// shown returns the requests to show, the newest first. Each kind has room: signatures,
// changes and refusals.
func (r *Report) shown() (all []Event) {
	shown, chosen := make([]bool, len(r.Requests)), 0
	choose := func(may func(e *Event) bool) {
		for i := range r.Requests {
			if chosen < shownRequests && !shown[i] && may(&r.Requests[i]) {
				shown[i] = true
				chosen++
			}
		}
	}
	ofKind := make(map[[2]bool]int)
	choose(func(e *Event) bool {
		ok := e.Result == audit.OK
		kind := [2]bool{ok, ok && e.Request == request.ActionSign}
		ofKind[kind]++
		return ofKind[kind] <= shownOfKind
	})
	choose(func(*Event) bool { return true })
	for i, e := range r.Requests {
		if shown[i] {
			all = append(all, e)
		}
	}
	return all
}

// times returns the number of requests of the event, when there are several.
func (e *Event) times() string {
	switch {
	case e.Various:
		return fmt.Sprintf(" (%s, not always the same)", output.Times(e.Count))
	case e.Count > 1:
		return fmt.Sprintf(" (%s)", output.Times(e.Count))
	}
	return ""
}

func (k *Key) where() string {
	switch {
	case k.InMemory:
		return "in memory"
	case k.Present:
		return "present"
	}
	return "token away"
}

func (k *Key) limits(now time.Time) string {
	var all []string
	if k.Confirm {
		all = append(all, "confirmed each time")
	}
	if k.Limited {
		all = append(all, "for some hosts only")
	}
	if !k.Expires.IsZero() {
		all = append(all, "for "+span(k.Expires.Sub(now)))
	}
	return strings.Join(all, ", ")
}

func (r *Report) used(n uint64, last time.Time) string {
	if n == 0 {
		return "not used"
	}
	return output.Count(int(n), "signature") + ", last " + ago(r.Time.Sub(last))
}

// Name names the token for a person. The text may have control characters of the label.
func (t *TokenEntry) Name() string {
	serial := cmp.Or(t.Serial, "unknown")
	if t.Reader != "" {
		serial += ", the one in reader " + t.Reader
	}
	return fmt.Sprintf("%s (serial %s)", cmp.Or(t.Label, "without label"), serial)
}

func (t *TokenEntry) pin() string {
	switch t.PIN {
	case PINLow:
		return "FEWER PIN TRIES LEFT"
	case PINLast:
		return "ONE PIN TRY LEFT"
	case PINLocked:
		return "PIN LOCKED"
	}
	if !t.LoginNeeded {
		return "no PIN needed"
	}
	return "PIN ok"
}

func (t *Token) login(now time.Time) string {
	switch {
	case !t.Present:
		return "away, last seen " + ago(now.Sub(t.LastSeen))
	case t.Shadowed != "":
		return "used through module " + t.Shadowed
	case t.PromptOpen:
		if t.PromptAt != "" {
			return "a PIN prompt is open: " + t.PromptAt
		}
		return "a PIN prompt is open"
	case t.LoginGoesOn:
		return "a login is under way"
	case !t.LoggedIn && !t.LoginNeeded:
		return ""
	case !t.LoggedIn:
		return "not logged in"
	}
	text := "logged in for " + span(now.Sub(t.Since))
	if !t.Ends.IsZero() {
		text += ", " + span(t.Ends.Sub(now)) + " left"
	}
	if t.PINKept {
		text += ", PIN kept"
	}
	return text
}

func (m *Module) state() string {
	text := string(m.State)
	switch m.State {
	case Running:
		text = fmt.Sprintf("process %d", m.PID)
	case Released:
		text = "has released its cards"
	}
	if m.Restarts > 0 {
		text += ", started again " + output.Times(m.Restarts)
	}
	return text
}

func (m *Module) sandbox() string {
	if m.Sandbox == "" {
		return ""
	}
	return "sandbox: " + m.Sandbox
}

// subject returns what the request was about, in few words.
func (e *Event) subject() string {
	text := cmp.Or(e.Comment, e.URI, e.Key, "-")
	return ShortURI(text)
}

func (e *Event) purpose() string {
	text := string(e.Purpose)
	switch {
	case e.Request != request.ActionSign:
		return "-"
	case e.User != "" && e.Host != "":
		text = fmt.Sprintf("%s as %s at %s", text, e.User, e.Host)
	case e.User != "":
		text = fmt.Sprintf("%s as %s", text, e.User)
	case e.Purpose == request.PurposeOther && e.Namespace != "":
		text = "namespace " + e.Namespace
	case e.Purpose == request.PurposeOther:
		text = cmp.Or(string(e.Kind), "-")
	}
	if e.Forwarded {
		text += ", FORWARDED"
		if len(e.Via) > 0 {
			text += " by " + strings.Join(e.Via, ", ")
		}
	}
	return text
}

// client returns the program that asked, without the programs that started it.
func (e *Event) client() string {
	first, _, _ := strings.Cut(e.Client, " ← ")
	return first
}

func (e *Event) result() string {
	text := string(e.Result) + e.times()
	if e.Note != "" {
		text += ": " + e.Note
	}
	if e.Result == audit.OK && e.Duration >= 1 {
		text += " after " + span(time.Duration(e.Duration*float64(time.Second)))
	}
	return text
}

// span returns a length of time for a person, with one number.
func span(d time.Duration) string {
	switch {
	case d < time.Second:
		return "less than 1 s"
	case d < 2*time.Minute:
		return fmt.Sprintf("%d s", d/time.Second)
	case d < 2*time.Hour:
		return fmt.Sprintf("%d min", d/time.Minute)
	case d < 48*time.Hour:
		return fmt.Sprintf("%d h", d/time.Hour)
	}
	return fmt.Sprintf("%d days", d/(24*time.Hour))
}

func ago(d time.Duration) string {
	if d < time.Second {
		return "just now"
	}
	return span(d) + " ago"
}

// ShortURI returns the URI of a key with the label of the token, the label and the ID
// only. It returns other texts as they are.
func ShortURI(text string) string {
	u, err := pkcs11uri.Parse(text)
	if err != nil || u.Token == nil {
		return text
	}
	defer u.Wipe()
	label := ""
	if u.Object != nil {
		label = *u.Object
	}
	return pkcs11uri.ForKey(wire.TokenID{Label: *u.Token}, label, u.ID).String()
}

// shortType returns the usual name of a type of key.
func shortType(kind string) string {
	plain, certified := strings.CutSuffix(kind, "-cert-v01@openssh.com")
	switch plain {
	case "ssh-rsa":
		plain = "RSA"
	case "ssh-ed25519":
		plain = "Ed25519"
	default:
		plain = strings.Replace(plain, "ecdsa-sha2-nistp", "P-", 1)
	}
	if certified {
		plain += " certificate"
	}
	return plain
}

// triesStyle returns the style of the words about the tries for a PIN.
func triesStyle(p PIN) output.Style {
	switch p {
	case PINLocked, PINLast:
		return output.Bad
	case PINLow:
		return output.Caution
	}
	return output.None
}
