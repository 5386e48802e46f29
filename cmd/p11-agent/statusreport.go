package main

import (
	"cmp"
	"encoding/json"
	"net"
	"os"
	"slices"
	"sync/atomic"
	"time"

	"p11-agent/agent"
	"p11-agent/agent/request"
	"p11-agent/agent/sshagent"
	"p11-agent/cmd/p11-agent/config"
	"p11-agent/token"
	"p11-agent/token/wire"
)

// statusReport is what a running agent tells of itself, and what status --json
// prints. Members may be added; those that there are keep their names and meaning.
// There must be none called "error".
type statusReport struct {
	Version   string           `json:"version"`
	PID       int              `json:"pid"`
	Started   time.Time        `json:"started"`
	Time      time.Time        `json:"time"` // of the report
	Locked    bool             `json:"locked"`
	Sockets   []statusSocket   `json:"sockets"`
	Keys      []statusKey      `json:"keys"`
	Tokens    []statusToken    `json:"tokens"`
	Modules   []statusModule   `json:"modules"`
	Upstreams []statusUpstream `json:"upstreams"`
	Approvals []statusApproval `json:"approvals"`
	Pauses    []statusPause    `json:"pauses"`
	Requests  []statusEvent    `json:"requests"` // the newest first
	Failures  []statusEvent    `json:"failures"` // likewise
}

type statusSocket struct {
	Path        string `json:"path"`
	Name        string `json:"name,omitempty"` // that of the [[socket]] table
	Connections int    `json:"connections"`
}

type statusKey struct {
	Comment     string    `json:"comment"`
	URI         string    `json:"uri,omitempty"` // where it is used first
	Fingerprint string    `json:"fingerprint"`
	Type        string    `json:"type"`
	Tokens      []string  `json:"tokens,omitempty"` // their URIs
	Present     bool      `json:"present"`
	InMemory    bool      `json:"in_memory"`
	Confirm     bool      `json:"confirm"`
	Limited     bool      `json:"destinations"`
	Expires     time.Time `json:"expires,omitzero"`
	LastUsed    time.Time `json:"last_used,omitzero"`
	Signatures  uint64    `json:"signatures"`
	NotShown    bool      `json:"not_shown,omitempty"` // clients have no room for it in their list
}

type statusToken struct {
	URI         string    `json:"uri"`
	Label       string    `json:"label"`
	Serial      string    `json:"serial"`
	Reader      string    `json:"reader,omitempty"` // where another token of the same name is there
	Module      string    `json:"module"`
	Present     bool      `json:"present"`
	LastSeen    time.Time `json:"last_seen,omitzero"` // when it is not
	Shadowed    string    `json:"used_through,omitempty"`
	Home        string    `json:"belongs_to,omitempty"`
	PIN         string    `json:"pin"` // ok, low, last, locked
	LoginNeeded bool      `json:"login_required"`
	OnReader    bool      `json:"pin_on_reader"`
	LoggedIn    bool      `json:"logged_in"`
	Since       time.Time `json:"logged_in_since,omitzero"`
	Ends        time.Time `json:"login_ends,omitzero"`
	PINKept     bool      `json:"pin_kept"`
	LoginGoesOn bool      `json:"login_under_way"`
	PromptOpen  bool      `json:"prompt_open"`
	PromptAt    string    `json:"prompt_at,omitempty"` // where, for people
	LastUsed    time.Time `json:"last_used,omitzero"`
	Signatures  uint64    `json:"signatures"`
	Keys        []string  `json:"keys"`               // their URIs
	LeftOut     []string  `json:"left_out,omitempty"` // because of a bound, and why
}

type statusModule struct {
	Name     string   `json:"name"`
	Path     string   `json:"path"`
	State    string   `json:"state"` // starting, running, released, failed
	PID      int      `json:"pid,omitempty"`
	Restarts int      `json:"restarts"`
	Sandbox  string   `json:"sandbox,omitempty"`
	Reason   string   `json:"reason,omitempty"`   // why it failed
	Next     []string `json:"next,omitempty"`     // what helps
	LeftOut  []string `json:"left_out,omitempty"` // because of a bound, and why
}

type statusUpstream struct {
	Path    string `json:"path"`
	Keys    int    `json:"keys"`
	Trouble string `json:"trouble,omitempty"`
}

// statusApproval is what a person has allowed for more than once.
type statusApproval struct {
	Comment     string    `json:"comment"`
	Fingerprint string    `json:"fingerprint"`
	What        string    `json:"what"`
	Forwarding  string    `json:"forwarding,omitempty"`
	Client      string    `json:"client"`
	Since       time.Time `json:"since"`
	Ends        time.Time `json:"ends,omitzero"` // left out: when the agent is locked
}

// statusPause tells of clients that have no questions shown for a time.
type statusPause struct {
	From    string    `json:"from"`
	About   string    `json:"about,omitempty"` // left out: everything
	Refused int       `json:"refused"`         // times
	Block   bool      `json:"block"`           // "no to everything from here"
	Until   time.Time `json:"until"`
}

type statusEvent struct {
	Time       time.Time       `json:"time"`
	Count      int             `json:"count"`             // requests that it stands for
	First      time.Time       `json:"first,omitzero"`    // of them; left out: it is one
	Various    bool            `json:"various,omitempty"` // they differ, and this is the last
	Duration   float64         `json:"duration"`          // seconds
	Request    request.Action  `json:"request"`
	Result     agent.Result    `json:"result"`
	Reason     string          `json:"reason,omitempty"`
	Note       string          `json:"note,omitempty"`
	Key        string          `json:"key,omitempty"`
	Comment    string          `json:"comment,omitempty"`
	URI        string          `json:"uri,omitempty"`
	Kind       request.Kind    `json:"kind,omitempty"`
	Purpose    request.Purpose `json:"purpose,omitempty"`
	Namespace  string          `json:"namespace,omitempty"`
	User       string          `json:"user,omitempty"`
	Host       string          `json:"host,omitempty"`
	Upstream   string          `json:"upstream,omitempty"`
	Forwarded  bool            `json:"forwarded"`
	Via        []string        `json:"via,omitempty"`
	Client     string          `json:"client"`
	UID        *int            `json:"uid,omitempty"`
	Connection uint64          `json:"connection"`
}

// statusMaker puts the report together, out of what the keyring knows and what it must
// not know.
type statusMaker struct {
	started   time.Time
	store     *token.Store
	server    *sshagent.Server
	listeners []listener
	rules     []*request.Socket // of the listeners
	policy    atomic.Pointer[func(*token.Key) token.Policy]
	promptAt  func(wire.TokenID) string // nil: nobody is asked
}

// configure notes what the configuration says of the tokens' PINs.
func (r *statusMaker) configure(c *config.File) {
	policy := c.Policy()
	r.policy.Store(&policy)
}

// report is agent.Options.Report.
func (r *statusMaker) report(s agent.Status, sel request.Selection) ([]byte, error) {
	report := statusReport{
		Version: version, PID: os.Getpid(), Started: r.started, Time: time.Now(), Locked: s.Locked,
		Sockets: []statusSocket{}, Keys: []statusKey{}, Tokens: []statusToken{}, Modules: []statusModule{},
		Upstreams: []statusUpstream{}, Approvals: []statusApproval{}, Pauses: []statusPause{}, Requests: []statusEvent{}, Failures: []statusEvent{},
	}
	for i, l := range r.listeners {
		sock := statusSocket{Path: listenerPath(l), Connections: r.server.Connections(l)}
		if r.rules[i] != nil {
			sock.Name = r.rules[i].Name
		}
		report.Sockets = append(report.Sockets, sock)
	}
	identities := make([]agent.Identity, len(s.Keys))
	for i, k := range s.Keys {
		identities[i] = k.Identity
	}
	shown := sshagent.Listed(identities)
	for i, k := range s.Keys {
		if sel == nil || slices.ContainsFunc(k.Homes, sel.Match) {
			key := keyReport(k)
			key.NotShown = !shown[i]
			report.Keys = append(report.Keys, key)
		}
	}
	for _, m := range r.store.Modules() {
		report.Modules = append(report.Modules, moduleReport(m, s.Locked))
		if s.Locked {
			continue // it tells nothing of tokens
		}
		for i, t := range slices.Concat(m.Tokens, m.Away) {
			if sel == nil || slices.ContainsFunc(t.Keys, func(k *token.Key) bool { return sel.Match(k) }) {
				report.Tokens = append(report.Tokens, r.tokenReport(t, i < len(m.Tokens)))
			}
		}
	}
	for _, a := range s.Approvals {
		report.Approvals = append(report.Approvals, statusApproval{
			Comment: a.Comment, Fingerprint: a.Fingerprint, What: a.What, Forwarding: a.Forwarding,
			Client: a.Client.String(), Since: a.Since, Ends: a.Ends,
		})
	}
	for _, p := range s.Pauses {
		report.Pauses = append(report.Pauses, statusPause(p))
	}
	for _, u := range s.Upstreams {
		report.Upstreams = append(report.Upstreams, statusUpstream{Path: u.Name, Keys: u.Keys, Trouble: u.Trouble})
	}
	for _, e := range s.Events {
		report.Requests = append(report.Requests, eventReport(&e))
	}
	for _, e := range s.Failures {
		report.Failures = append(report.Failures, eventReport(&e))
	}
	return json.Marshal(report)
}

func listenerPath(l listener) string {
	switch l := l.(type) {
	case *sshagent.Socket:
		return l.Path()
	case *net.UnixListener:
		return l.Addr().String()
	}
	return ""
}

func keyReport(k agent.KeyStatus) statusKey {
	key := statusKey{
		Comment: k.Comment, Fingerprint: k.Fingerprint, Type: k.Key.Type(), Present: k.Software, InMemory: k.Software,
		Confirm: k.Confirm, Limited: k.Limited, Expires: k.Expires, LastUsed: k.LastUse, Signatures: k.Signatures,
	}
	for _, home := range k.Homes {
		if home.Present() && (key.URI == "" || !key.Present) {
			key.URI = home.URI()
		}
		key.Present = key.Present || home.Present()
		if home, ok := home.(*token.Key); ok {
			key.Tokens = append(key.Tokens, tokenURI(home.Token()))
		}
	}
	if len(k.Homes) > 0 {
		key.URI = cmp.Or(key.URI, k.Homes[0].URI())
	}
	return key
}

func (r *statusMaker) tokenReport(t token.TokenStatus, present bool) statusToken {
	st := statusToken{
		URI: t.URI, Label: t.ID.Label, Serial: t.ID.Serial, Reader: t.Reader, Module: t.Module, Present: present, Shadowed: t.Shadowed, Home: t.Home,
		PIN: pinState(t.Tries), LoginNeeded: t.Flags&wire.CKFLoginRequired != 0,
		OnReader: t.Flags&wire.CKFProtectedAuthenticationPath != 0,
		LoggedIn: t.LoggedIn, Since: t.LoggedInSince, Ends: t.LoginEnds, PINKept: t.PINKept,
		LoginGoesOn: t.LoginUnderWay, PromptOpen: t.PromptOpen, LastUsed: t.LastUse, Signatures: t.Signatures,
		Keys: []string{}, LeftOut: t.LeftOut,
	}
	if !present {
		st.LastSeen = t.Seen
	}
	if st.PromptOpen && r.promptAt != nil {
		st.PromptAt = r.promptAt(t.ID)
	}
	for _, k := range t.Keys {
		st.Keys = append(st.Keys, k.URI())
	}
	if policy := r.policy.Load(); policy != nil && *policy != nil && len(t.Keys) > 0 {
		if pad := (*policy)(t.Keys[0]).Pad; pad != nil {
			st.OnReader = *pad
		}
	}
	return st
}

func moduleReport(m token.ModuleStatus, locked bool) statusModule {
	module := statusModule{Name: m.Name, Path: m.Path, PID: m.PID, Restarts: m.Restarts, Sandbox: m.Sandbox, State: "starting"}
	switch {
	case m.Err != nil:
		module.State = "failed"
		if !locked { // it may name a token
			module.Reason, module.Next = trouble(m)
		}
	case m.Running:
		module.State, module.Reason, module.LeftOut = "running", m.Empty, m.LeftOut
	case m.Released:
		module.State = "released"
	}
	return module
}

func eventReport(e *agent.Event) statusEvent {
	event := statusEvent{
		Time: e.Time, Duration: e.Took.Round(time.Millisecond).Seconds(), Request: e.Request, Result: e.Result, Reason: e.Reason, Note: e.Note,
		Key: e.Key, Comment: e.Comment, URI: e.URI, Kind: e.Kind, Purpose: e.Purpose, Namespace: e.Namespace,
		User: e.User, Host: e.Host, Upstream: e.Upstream, Forwarded: e.Forwarded, Via: e.Via,
		Client: e.Client.String(), Connection: e.Connection, Count: e.Count, Various: e.Various,
	}
	if e.Count > 1 {
		event.First = e.First
	}
	if e.Client.Known {
		event.UID = &e.Client.UID
	}
	return event
}
