package status

import (
	"cmp"
	"encoding/json"
	"os"
	"slices"
	"sync/atomic"
	"time"

	"p11-agent/agent"
	"p11-agent/agent/audit"
	"p11-agent/agent/request"
	"p11-agent/token"
	"p11-agent/token/pkcs11uri"
	"p11-agent/token/wire"
)

// A Maker makes reports out of what the keyring and the token store know. Its fields must
// not change while it is in use. Its methods may run at the same time.
type Maker struct {
	Version string
	Started time.Time
	Store   *token.Store
	// Sockets returns the sockets of the agent.
	Sockets func() []Socket
	// Trouble returns why a module does not work, and what helps.
	Trouble func(token.ModuleStatus) (reason string, next []string)
	// PromptAt tells a person where the prompt for a token's PIN is. Nil: the agent asks
	// for no PINs.
	PromptAt func(wire.TokenID) string

	policy atomic.Pointer[func(*token.Key) token.Policy]
}

// SetPolicy sets what the configuration says about PINs. It may be called again when the
// configuration changes.
func (r *Maker) SetPolicy(policy func(*token.Key) token.Policy) { r.policy.Store(&policy) }

// Report returns the report as JSON, about the keys that sel selects; nil: about all. It is
// agent.Options.Report.
func (r *Maker) Report(s agent.Status, sel request.Selection) ([]byte, error) {
	report := Report{
		Version: r.Version, PID: os.Getpid(), Started: r.Started, Time: time.Now(), Locked: s.Locked,
		Sockets: append([]Socket{}, r.Sockets()...), Keys: []Key{}, Tokens: []Token{}, Modules: []Module{},
		Upstreams: []Upstream{}, Approvals: []Approval{}, Pauses: []Pause{}, Requests: []Event{}, Failures: []Event{},
	}
	shown := Shown(s.Keys)
	for i, k := range s.Keys {
		if sel == nil || slices.ContainsFunc(k.Homes, sel.Match) {
			key := keyReport(k)
			key.NotShown = !shown[i]
			report.Keys = append(report.Keys, key)
		}
	}
	for _, m := range r.Store.Modules() {
		report.Modules = append(report.Modules, r.moduleReport(m, s.Locked))
		if s.Locked {
			continue // a locked agent tells nothing about tokens
		}
		for i, t := range slices.Concat(m.Tokens, m.Away) {
			if sel == nil || slices.ContainsFunc(t.Keys, func(k *token.Key) bool { return sel.Match(k) }) {
				report.Tokens = append(report.Tokens, r.tokenReport(t, i < len(m.Tokens)))
			}
		}
	}
	for _, a := range s.Approvals {
		report.Approvals = append(report.Approvals, Approval{
			Comment: a.Comment, Fingerprint: a.Fingerprint, What: a.What, Forwarding: a.Forwarding,
			Client: a.Client.String(), Since: a.Since, Ends: a.Ends,
		})
	}
	for _, p := range s.Pauses {
		report.Pauses = append(report.Pauses, Pause(p))
	}
	for _, u := range s.Upstreams {
		report.Upstreams = append(report.Upstreams, Upstream{Path: u.Name, Keys: u.Keys, Trouble: u.Trouble})
	}
	for _, e := range s.Events {
		report.Requests = append(report.Requests, eventReport(&e))
	}
	for _, e := range s.Failures {
		report.Failures = append(report.Failures, eventReport(&e))
	}
	return json.Marshal(report)
}

func keyReport(k agent.KeyStatus) Key {
	key := Key{
		KeyEntry: KeyEntry{Fingerprint: k.Fingerprint, Type: k.Key.Type()},
		Comment:  k.Comment, Present: k.Software, InMemory: k.Software,
		Confirm: k.Confirm, Limited: k.Limited, Expires: k.Expires, LastUsed: k.LastUse, Signatures: k.Signatures,
	}
	for _, home := range k.Homes {
		if home.Present() && (key.URI == "" || !key.Present) {
			key.URI = home.URI()
		}
		key.Present = key.Present || home.Present()
		if home, ok := home.(*token.Key); ok {
			key.Tokens = append(key.Tokens, pkcs11uri.ForKey(home.Token(), "", nil).String())
		}
	}
	if len(k.Homes) > 0 {
		key.URI = cmp.Or(key.URI, k.Homes[0].URI())
	}
	return key
}

func (r *Maker) tokenReport(t token.TokenStatus, present bool) Token {
	st := Token{
		TokenEntry: NewTokenEntry(t, present), OnReader: t.Flags&wire.CKFProtectedAuthenticationPath != 0,
		LoggedIn: t.LoggedIn, Since: t.LoggedInSince, Ends: t.LoginEnds, PINKept: t.PINKept,
		LoginGoesOn: t.LoginUnderWay, PromptOpen: t.PromptOpen, LastUsed: t.LastUse, Signatures: t.Signatures,
		Keys: []string{},
	}
	if st.PromptOpen && r.PromptAt != nil {
		st.PromptAt = r.PromptAt(t.ID)
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

func (r *Maker) moduleReport(m token.ModuleStatus, locked bool) Module {
	module := Module{ModuleEntry: NewModuleEntry(m), PID: m.PID, State: Starting}
	if !m.Running {
		module.LeftOut = nil
	}
	switch {
	case m.Err != nil:
		module.State = Failed
		if !locked { // the reason may name a token
			module.Reason, module.Next = r.Trouble(m)
		}
	case m.Running:
		module.State, module.Reason = Running, m.Empty
	case m.Released:
		module.State = Released
	}
	return module
}

func eventReport(e *audit.Event) Event {
	event := Event{
		Time: e.Time, Duration: e.Took.Round(time.Millisecond).Seconds(), Request: e.Action, Result: e.Result, Reason: e.Reason, Note: e.Note,
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
