package approval

import (
	"cmp"
	"fmt"
	"slices"

	"golang.org/x/crypto/ssh"

	"p11-agent/agent/knownhosts"
	"p11-agent/agent/request"
)

// A Confirm says when the agent asks a person before a key signs.
type Confirm = request.Confirm

// The values of confirm in the configuration, for a key and for a socket.
const (
	ConfirmNever     Confirm = "never"
	ConfirmForwarded Confirm = "forwarded" // for requests that may come from another host
	ConfirmAlways    Confirm = "always"
	ConfirmFirstUse  Confirm = "first-use" // until the agent forgets the answer
	// ConfirmDeny refuses without a question. Only a Rule has it.
	ConfirmDeny Confirm = "deny"
)

// A Policy says when the agent asks a person before it uses a key. The zero value never
// asks.
type Policy struct {
	Confirm Confirm // empty: never
	Rules   []Rule  // the first rule that matches counts in place of Confirm
}

// A Rule says when the agent asks a person, for the uses of a key that fulfil all
// conditions of the Rule.
//
// A rule with ConfirmNever does not match a forwarded request, unless Forwarded is true.
// Then its Hosts have to match every host on the way as well: each of them could be the
// sender of the request.
type Rule struct {
	// Hosts are patterns for the names of the host that the user logs in to (PATTERNS in
	// ssh_config(5)). If Hosts is nil, the rule matches any use. Otherwise it matches
	// logins only. knownhosts.Known.Fit compares the patterns with the names.
	//
	// The host has to be proved: see Use.ProvenHost. Only a lone "*" matches a host that
	// is not proved, or has no name. If the patterns may mean the host, the rule counts
	// only if it is stricter than the rest of the policy.
	Hosts     []string
	Purposes  []request.Purpose // nil: any
	Programs  []string          // names; one is in the client's chain of processes; nil: any
	Forwarded *bool             // nil: both
	Confirm   Confirm
	Remember  Remember // how long a plain yes counts; for ConfirmFirstUse, Once means UntilLock
}

// A decision is the result of the rules for a use.
type decision struct {
	confirm Confirm // ConfirmNever, ConfirmAlways or ConfirmDeny
	plain   Remember
	rule    int     // the number of the rule that decides; 0: no rule does
	word    Confirm // of the configuration, if no rule decides
	socket  string  // the name of the socket that has the word; empty: the policy has it
}

// why names the part of the configuration that decides.
func (d *decision) why() string {
	if d.rule > 0 {
		return fmt.Sprintf("rule %d of the key in the configuration", d.rule)
	}
	if d.socket != "" {
		return fmt.Sprintf("confirm = %q of the socket %s", d.word, d.socket)
	}
	return fmt.Sprintf("confirm = %q in the configuration", d.word)
}

// decide applies the configuration to a use. If the key is on several tokens, the
// strictest policy counts.
func decide(u *request.Use, t *request.Target, policy func(request.Key) Policy) decision {
	if policy == nil {
		return decision{confirm: ConfirmNever}
	}
	of := func(key request.Key) decision {
		p := policy(key)
		return p.decide(u)
	}
	if len(t.Homes) == 0 {
		return of(nil)
	}
	d := of(t.Homes[0])
	for _, home := range t.Homes[1:] {
		d = d.stricter(of(home))
	}
	return d
}

// decide applies the rules to a use.
func (a *Policy) decide(u *request.Use) decision {
	confirm := cmp.Or(a.Confirm, ConfirmNever)
	d := decision{word: confirm}
	d.set(confirm, Once, u)
	// A rule that may match permits nothing, but it may forbid.
	var may []decision
rules:
	for i, r := range a.Rules {
		m := decision{rule: i + 1}
		m.set(r.Confirm, r.Remember, u)
		switch r.matches(u) {
		case knownhosts.Yes:
			d = m
			break rules
		case knownhosts.Maybe:
			may = append(may, m)
		case knownhosts.No:
		}
	}
	for _, m := range may {
		d = d.stricter(m)
	}
	return d
}

// decideSocket applies confirm of the client's socket to a use.
func decideSocket(u *request.Use) decision {
	socket := u.Caller.Socket
	if socket == nil {
		return decision{confirm: ConfirmNever}
	}
	d := decision{word: cmp.Or(socket.Confirm, ConfirmNever), socket: socket.Name}
	d.set(d.word, Once, u)
	return d
}

// set decides about a use by a word of the configuration.
func (d *decision) set(confirm Confirm, plain Remember, u *request.Use) {
	switch confirm {
	case ConfirmNever, ConfirmDeny:
	case ConfirmForwarded:
		confirm = ConfirmNever
		if u.Caller.Forwarded {
			confirm = ConfirmAlways
		}
	case ConfirmFirstUse:
		confirm, plain = ConfirmAlways, cmp.Or(plain, UntilLock)
	default: // also an unknown text
		confirm = ConfirmAlways
	}
	d.confirm, d.plain = confirm, plain
}

// stricter returns the decision that permits less.
func (d decision) stricter(o decision) decision {
	order := []Confirm{ConfirmNever, ConfirmAlways, ConfirmDeny}
	switch c := cmp.Compare(slices.Index(order, o.confirm), slices.Index(order, d.confirm)); {
	case c > 0, c == 0 && o.plain.shorter(d.plain):
		return o
	}
	return d
}

// matches tells whether a use fulfils all conditions of the rule.
func (r *Rule) matches(u *request.Use) knownhosts.Fit {
	switch {
	case r.Purposes != nil && !slices.Contains(r.Purposes, u.Content.Purpose()),
		r.Forwarded != nil && *r.Forwarded != u.Caller.Forwarded,
		r.Forwarded == nil && r.Confirm == ConfirmNever && u.Caller.Forwarded:
		return knownhosts.No
	}
	if r.Programs != nil {
		named := false
		for _, link := range u.Caller.Client().Chain {
			named = named || slices.Contains(r.Programs, link.Name)
		}
		if !named {
			return knownhosts.No
		}
	}
	return r.matchesHosts(u)
}

func (r *Rule) matchesHosts(u *request.Use) knownhosts.Fit {
	if r.Hosts == nil {
		return knownhosts.Yes
	}
	if u.Login == nil {
		return knownhosts.No
	}
	host, _ := u.ProvenHost()
	all := fit(u, r.Hosts, host)
	if host == nil {
		if claimed := u.Where().Key; claimed != nil {
			all = max(all, min(fit(u, r.Hosts, claimed), knownhosts.Maybe))
		}
	}
	if r.Confirm == ConfirmNever {
		for _, b := range u.Caller.Binds {
			if b.Forwarding {
				all = min(all, fit(u, r.Hosts, b.HostKey))
			}
		}
	}
	return all
}

// fit tells whether patterns mean the host with this key. If key is nil, only a lone "*"
// does. A revoked key proves nothing.
func fit(u *request.Use, patterns []string, key ssh.PublicKey) knownhosts.Fit {
	var known request.HostName
	if key != nil && u.Hosts != nil {
		known = u.Hosts.HostName(key, u.Caller.Client())
	}
	if known.Revoked {
		return max(min(known.Fit(patterns), knownhosts.Maybe), request.HostName{}.Fit(patterns))
	}
	return known.Fit(patterns)
}
