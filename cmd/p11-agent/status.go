package main

import (
	"bytes"
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"
	"text/tabwriter"
	"time"

	"github.com/spf13/cobra"

	"p11-agent/agent"
	"p11-agent/agent/request"
	"p11-agent/agent/sshagent"
	"p11-agent/cmd/p11-agent/output"
	"p11-agent/cmd/p11-agent/paths"
	"p11-agent/pinentry/plain"
	"p11-agent/token/module/undumpable"
	"p11-agent/token/pkcs11uri"
	"p11-agent/token/wire"
)

// statusTimeout is how long an agent may take to tell how it fares: it waits for
// nobody itself.
const statusTimeout = 10 * time.Second

// A person is shown so many requests, among them the last ones of each kind, and so many
// that failed.
const shownRequests, shownOfKind, shownFailures = 20, 5, 5

type statusOptions struct {
	json   bool
	color  output.Color
	socket string
}

func newStatusCommand() *cobra.Command {
	o := new(statusOptions)
	cmd := &cobra.Command{
		Use:   "status",
		Short: "Show how the agent fares, and what it was asked",
		Long: `Show the keys, tokens and modules of the running agent, what it was asked last,
and why it refused what it did. The agent is the one of SSH_AUTH_SOCK, or that at
$XDG_RUNTIME_DIR/p11-agent/agent.sock when that is another one.`,
		Args: noArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			return runStatus(cmd.Context(), o, cmd.OutOrStdout(), cmd.ErrOrStderr())
		},
	}
	f := cmd.Flags()
	f.BoolVar(&o.json, "json", false, "print JSON")
	output.AddColorFlag(cmd, &o.color)
	addSocketFlag(cmd, &o.socket)
	return cmd
}

func addSocketFlag(cmd *cobra.Command, socket *string) {
	cmd.Flags().StringVarP(socket, "socket", "a", "", "ask the agent at the socket `PATH`")
}

func runStatus(ctx context.Context, o *statusOptions, out, stderr io.Writer) error {
	a, err := dialAgent(ctx, o.socket, "")
	if err != nil {
		return err
	}
	defer a.Close()
	if o.json {
		var b bytes.Buffer
		if err := json.Indent(&b, a.text, "", "  "); err != nil {
			return err
		}
		b.WriteByte('\n')
		_, err := b.WriteTo(out)
		return err
	}
	if a.note != "" {
		fmt.Fprintln(stderr, a.note)
	}
	return a.report.print(o.color.Writer(out))
}

// runningAgent is an agent that was found.
type runningAgent struct {
	*sshagent.Control
	path   string
	note   string // what a person should know of where it was found
	text   []byte // the report as it came
	report statusReport
}

// noAgentError says that no agent answers.
type noAgentError struct{ tried []string }

func (e *noAgentError) Error() string {
	return "no p11-agent answers: " + strings.Join(e.tried, "; ")
}

func (*noAgentError) Hint() string {
	return `"p11-agent doctor" finds out why; eval "$(p11-agent agent -s)" starts one for this shell`
}

// dialAgent connects to the agent at path, or to the one that commands find by
// themselves, and asks for its status, of the tokens that the URI selects.
func dialAgent(ctx context.Context, path, uri string) (*runningAgent, error) {
	if path != "" {
		path, err := filepath.Abs(path)
		if err != nil {
			return nil, err
		}
		a, err := queryAgent(ctx, path, uri)
		if err != nil {
			return nil, notFound(path+": ", err)
		}
		return a, nil
	}
	var tried []string
	var failed error // of an agent that does answer
	own := ""
	if path := paths.RuntimeSocket(paths.AgentName); path != "" {
		own = path
	} else if path := paths.StateSocket(); path != "" {
		if _, err := os.Lstat(path); err == nil {
			own = path
		}
	}
	named := os.Getenv(socketVariable)
	if named == "" {
		tried = append(tried, socketVariable+" is not set")
	} else {
		a, err := queryAgent(ctx, named, uri)
		if err == nil {
			return a, nil
		}
		if !isNotFound(err) {
			failed = err
		}
		tried = append(tried, fmt.Sprintf("%s is %s: %v", socketVariable, plain.Line(named), err))
	}
	switch {
	case own == "":
		tried = append(tried, "XDG_RUNTIME_DIR is not set")
	case own == named:
	default:
		a, err := queryAgent(ctx, own, uri)
		if err == nil {
			a.note = fmt.Sprintf("note: this is the agent at %s, and %s; ssh asks the one of %s", own, tried[0], socketVariable)
			return a, nil
		}
		if failed == nil && !isNotFound(err) {
			failed = err
		}
		tried = append(tried, fmt.Sprintf("%s: %v", own, err))
	}
	if failed != nil {
		return nil, failed
	}
	return nil, &noAgentError{tried}
}

// notFound makes a noAgentError of what means that there is none.
func notFound(where string, err error) error {
	if isNotFound(err) {
		return &noAgentError{[]string{where + err.Error()}}
	}
	return err
}

// isNotFound tells whether no agent of ours has answered, or none that may.
func isNotFound(err error) bool {
	_, answered := errors.AsType[sshagent.ControlError](err)
	return !answered
}

// queryAgent asks the agent at a path for its status.
func queryAgent(ctx context.Context, path, uri string) (*runningAgent, error) {
	// The agent has to see that its client is this program. It has seen that when it
	// answers, and no secret is asked for before.
	if err := undumpable.Suspend(); err != nil {
		return nil, err
	}
	a, err := askStatus(ctx, path, uri)
	if closed := undumpable.Enforce(); closed != nil {
		if err == nil {
			_ = a.Close()
		}
		return nil, closed
	}
	return a, err
}

// askStatus connects to the agent at a path and has it tell its status.
func askStatus(ctx context.Context, path, uri string) (*runningAgent, error) {
	ctx, cancel := context.WithTimeoutCause(ctx, statusTimeout, fmt.Errorf("it does not answer within %v", statusTimeout))
	defer cancel()
	c, err := sshagent.DialControl(ctx, path)
	if err != nil {
		return nil, err
	}
	a := &runningAgent{Control: c, path: path}
	if a.text, err = c.Status(ctx, uri); err == nil {
		if err = json.Unmarshal(a.text, &a.report); err != nil {
			err = fmt.Errorf("what it tells cannot be read: %w", err)
		}
	}
	if err != nil {
		_ = c.Close()
		return nil, err
	}
	return a, nil
}

// print writes one screen of the report.
func (r *statusReport) print(out io.Writer) error {
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
		var styles []output.Style // of its rows: a colour would count as text in the columns
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
			row(shortURI(k.Comment), shortType(k.Type), k.Fingerprint, k.where(), r.used(k.Signatures, k.LastUsed), k.limits(r.Time))
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
			row(t.name(), t.Module, t.pin(), t.login(r.Time), r.used(t.Signatures, t.LastUsed))
		}
	})
	section("MODULES", len(r.Modules), func(row func(...string)) {
		for _, m := range r.Modules {
			mark(map[string]output.Style{"failed": output.Bad}[m.State])
			row(m.Name, m.state(), cmp.Or(m.Reason, m.sandbox()))
		}
	})
	for _, m := range r.Modules {
		printSteps(&b, fmt.Sprintf("  next for %s: ", plain.Line(m.Name)), m.Next)
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
			row(shortURI(a.Comment), a.What, strings.TrimSpace(a.Forwarding), lasts)
		}
	})
	section("NO QUESTIONS SHOWN", len(r.Pauses), func(row func(...string)) {
		for _, p := range r.Pauses {
			refused := "refused " + times(p.Refused)
			if p.Block {
				refused = "everything refused"
			}
			row("from "+p.From, cmp.Or(shortURI(p.About), "about any key"), refused, "for "+span(p.Until.Sub(r.Time)))
		}
	})
	requests := r.shown()
	section("LAST REQUESTS", len(requests), func(row func(...string)) {
		for _, e := range requests {
			mark(map[bool]output.Style{true: output.Caution}[e.Result != agent.ResultOK])
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
		b.WriteString("\nThere are no keys: \"p11-agent list\" shows what is there, and why it is not offered.\n")
	}
	_, err := io.WriteString(out, b.String())
	return err
}

// style is the one of a key's row.
func (k *statusKey) style() output.Style {
	if k.Present || k.InMemory {
		return output.Good
	}
	return output.Caution
}

// style is the one of a token's row.
func (t *statusToken) style() output.Style {
	switch s := pinStyle(t.PIN); {
	case s != output.None:
		return s
	case !t.Present:
		return output.Caution
	case t.LoggedIn:
		return output.Good
	}
	return output.None
}

// leftOut tells what a bound leaves out.
func (r *statusReport) leftOut() (rows [][]string) {
	shown := 0
	for _, k := range r.Keys {
		if !k.NotShown {
			shown++
		}
	}
	if shown < len(r.Keys) {
		rows = append(rows, []string{"keys", fewShown(shown, len(r.Keys))})
	}
	for _, m := range r.Modules {
		for _, reason := range m.LeftOut {
			rows = append(rows, []string{m.Name, reason})
		}
	}
	for _, t := range r.Tokens {
		for _, reason := range t.LeftOut {
			rows = append(rows, []string{t.name(), reason})
		}
	}
	return rows
}

// shown returns the requests that a person is shown, the newest first: signatures,
// changes and refusals do not keep each other from being shown.
func (r *statusReport) shown() (all []statusEvent) {
	shown, chosen := make([]bool, len(r.Requests)), 0
	choose := func(may func(e *statusEvent) bool) {
		for i := range r.Requests {
			if chosen < shownRequests && !shown[i] && may(&r.Requests[i]) {
				shown[i] = true
				chosen++
			}
		}
	}
	ofKind := make(map[[2]bool]int)
	choose(func(e *statusEvent) bool {
		ok := e.Result == agent.ResultOK
		kind := [2]bool{ok, ok && e.Request == request.ActionSign}
		ofKind[kind]++
		return ofKind[kind] <= shownOfKind
	})
	choose(func(*statusEvent) bool { return true })
	for i, e := range r.Requests {
		if shown[i] {
			all = append(all, e)
		}
	}
	return all
}

// times tells how many requests the event stands for, when it is more than one.
func (e *statusEvent) times() string {
	switch {
	case e.Various:
		return fmt.Sprintf(" (%s, not always the same)", times(e.Count))
	case e.Count > 1:
		return fmt.Sprintf(" (%s)", times(e.Count))
	}
	return ""
}

func (k *statusKey) where() string {
	switch {
	case k.InMemory:
		return "in memory"
	case k.Present:
		return "present"
	}
	return "token away"
}

func (k *statusKey) limits(now time.Time) string {
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

func (r *statusReport) used(n uint64, last time.Time) string {
	if n == 0 {
		return "not used"
	}
	return output.Count(int(n), "signature") + ", last " + ago(r.Time.Sub(last))
}

// name names a token to a person.
func (t *statusToken) name() string {
	serial := cmp.Or(t.Serial, "unknown")
	if t.Reader != "" {
		serial += ", the one in reader " + t.Reader
	}
	return fmt.Sprintf("%s (serial %s)", cmp.Or(t.Label, "without label"), serial)
}

func (t *statusToken) pin() string {
	switch t.PIN {
	case "low":
		return "FEWER PIN TRIES LEFT"
	case "last":
		return "ONE PIN TRY LEFT"
	case "locked":
		return "PIN LOCKED"
	}
	if !t.LoginNeeded {
		return "no PIN needed"
	}
	return "PIN ok"
}

func (t *statusToken) login(now time.Time) string {
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
		return "is being logged in to"
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

func (m *statusModule) state() string {
	text := m.State
	switch m.State {
	case "running":
		text = fmt.Sprintf("process %d", m.PID)
	case "released":
		text = "has let go of its cards"
	}
	if m.Restarts > 0 {
		text += ", started again " + times(m.Restarts)
	}
	return text
}

func (m *statusModule) sandbox() string {
	if m.Sandbox == "" {
		return ""
	}
	return "sandbox: " + m.Sandbox
}

// subject is what a request was about, in the shortest words that there are.
func (e *statusEvent) subject() string {
	text := cmp.Or(e.Comment, e.URI, e.Key, "-")
	return shortURI(text)
}

func (e *statusEvent) purpose() string {
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

// client is the program that asked, without those that it came from.
func (e *statusEvent) client() string {
	first, _, _ := strings.Cut(e.Client, " ← ")
	return first
}

func (e *statusEvent) result() string {
	text := string(e.Result) + e.times()
	if e.Note != "" {
		text += ": " + e.Note
	}
	if e.Result == agent.ResultOK && e.Duration >= 1 {
		text += " after " + span(time.Duration(e.Duration*float64(time.Second)))
	}
	return text
}

// span is a length of time for a person: one number.
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

// shortURI leaves out of a URI what tells two tokens of one name apart. What is no
// URI stays as it is.
func shortURI(text string) string {
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

// shortType is what people call a type of key.
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

func tokenURI(id wire.TokenID) string { return pkcs11uri.ForKey(id, "", nil).String() }

// pinStyle is the style of what is said of the tries for a PIN (pinState).
func pinStyle(pin string) output.Style {
	switch pin {
	case "locked", "last":
		return output.Bad
	case "low":
		return output.Caution
	}
	return output.None
}
