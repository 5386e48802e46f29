package config

import (
	"fmt"
	"slices"
	"strings"
	"time"

	"p11-agent/agent/approval"
	"p11-agent/agent/request"
	"p11-agent/cmd/p11-agent/output"
	"p11-agent/token"
)

// DefaultConfirmTimeout is how long a question waits for an answer without confirm-timeout.
const DefaultConfirmTimeout = time.Minute

// A ConfirmPlace says where the agent may ask for consent.
type ConfirmPlace string

// The values of confirm-place.
const (
	PlaceAny     ConfirmPlace = "any"     // a display, or else a terminal
	PlaceDisplay ConfirmPlace = "display" // no terminal
)

// A RuleTable is an approval.Rule in the file.
type RuleTable struct {
	Host      []string          `toml:"host"`
	Purpose   []request.Purpose `toml:"purpose"`
	Program   []string          `toml:"program"`
	Forwarded *bool             `toml:"forwarded"`
	Confirm   approval.Confirm  `toml:"confirm"`
	Remember  RememberFor       `toml:"remember"`
}

// rule returns the rule, without what it remembers.
func (r *RuleTable) rule() approval.Rule {
	return approval.Rule{Hosts: r.Host, Purposes: r.Purpose, Programs: r.Program, Forwarded: r.Forwarded, Confirm: r.Confirm}
}

// check finds mistakes in a rule. what names the rule in an error.
func (r *RuleTable) check(what string) error {
	switch {
	case r.Confirm == "":
		return &valueError{text: what + " has no confirm, so it would say nothing", advice: "it can be " + output.OneOf(ruleConfirms)}
	case !slices.Contains(ruleConfirms, r.Confirm):
		return unknownValue("confirm of "+what, r.Confirm, ruleConfirms)
	case r.Remember.Remember != approval.Once && (r.Confirm == approval.ConfirmNever || r.Confirm == approval.ConfirmDeny):
		return &valueError{text: fmt.Sprintf("%s asks no question (confirm = %q), so there is nothing to remember", what, r.Confirm), advice: "leave remember out"}
	case r.Host != nil && len(r.Host) == 0, r.Purpose != nil && len(r.Purpose) == 0, r.Program != nil && len(r.Program) == 0:
		return &valueError{text: what + " has an empty list, so it would match nothing", advice: "leave the condition out to match everything"}
	}
	for _, p := range r.Purpose {
		if !slices.Contains(request.Purposes(), p) {
			return unknownValue("purpose of "+what, p, request.Purposes())
		}
	}
	for _, p := range r.Program {
		if p == "" || strings.ContainsRune(p, '/') {
			return &valueError{text: fmt.Sprintf("program of %s has %q: a program is named as in the log, without its directory", what, p)}
		}
	}
	positive := false
	for _, p := range r.Host {
		name, negated := strings.CutPrefix(p, "!")
		if name == "" || strings.ContainsAny(name, "! ,\t\n") {
			return &valueError{text: fmt.Sprintf("host of %s has %q, which is not a pattern", what, p), advice: `patterns are separate strings, as in ["*.example.org", "!test.example.org"]`}
		}
		positive = positive || !negated
	}
	if len(r.Host) > 0 && !positive {
		return &valueError{text: fmt.Sprintf("host of %s says only which hosts are not meant, so it would match nothing", what), advice: `add "*"`}
	}
	return nil
}

// rememberUntilLock is the value of remember that is not a length of time.
const rememberUntilLock = "until-lock"

// A RememberFor is how long a yes counts.
type RememberFor struct{ approval.Remember }

// UnmarshalText parses a length of time, or "until-lock".
func (v *RememberFor) UnmarshalText(b []byte) error {
	if string(b) == rememberUntilLock {
		v.Remember = approval.UntilLock
		return nil
	}
	var d Duration
	if err := d.UnmarshalText(b); err != nil {
		return fmt.Errorf("%w; this one can also be %q", err, rememberUntilLock)
	}
	v.Remember = approval.Remember(d.Duration)
	return nil
}

// Approval returns when the agent asks a person before a key signs. The first [[key]] table with
// confirm decides, or else confirm of the file. The rules are those of the first table with rules.
// A table that only may mean the key can only make the policy stricter.
func (c *File) Approval() func(request.Key) approval.Policy {
	return func(k request.Key) approval.Policy {
		a := approval.Policy{Confirm: c.Confirm}
		key, ok := k.(*token.Key)
		if !ok {
			return a
		}
		confirmed := false
		var unsure []KeyTable // only a login shows whether they mean the key
		for _, table := range c.KeyTables {
			if table.Confirm == "" && table.Rules == nil || !key.MayMatch(table.URI.URI) {
				continue
			}
			if !key.Matches(table.URI.URI) {
				unsure = append(unsure, table)
				continue
			}
			if table.Confirm != "" && !confirmed {
				a.Confirm, confirmed = table.Confirm, true
			}
			if a.Rules == nil {
				for _, r := range table.Rules {
					rule := r.rule()
					rule.Remember = r.Remember.Remember
					a.Rules = append(a.Rules, rule)
				}
			}
		}
		for _, table := range unsure {
			a = stricter(a, table)
		}
		return a
	}
}

// confirmOrder is the order of the values, from the laxest to the strictest.
var confirmOrder = []approval.Confirm{"", approval.ConfirmNever, approval.ConfirmForwarded, approval.ConfirmFirstUse, approval.ConfirmAlways}

// stricter adds to a policy the parts of a table that ask or deny more often.
func stricter(a approval.Policy, table KeyTable) approval.Policy {
	if slices.Index(confirmOrder, table.Confirm) > slices.Index(confirmOrder, a.Confirm) {
		a.Confirm = table.Confirm
	}
	var rules []approval.Rule
	for _, r := range table.Rules {
		if r.Confirm == approval.ConfirmDeny || r.Confirm == approval.ConfirmAlways {
			rules = append(rules, r.rule())
		}
	}
	a.Rules = append(rules, a.Rules...)
	return a
}

// keyConfirms are the values of confirm for keys and sockets, ruleConfirms those for rules.
var (
	keyConfirms  = []approval.Confirm{approval.ConfirmNever, approval.ConfirmForwarded, approval.ConfirmAlways, approval.ConfirmFirstUse}
	ruleConfirms = append(slices.Clone(keyConfirms), approval.ConfirmDeny)
)

// checkApproval finds mistakes in confirm, confirm-place and the rules.
func (c *File) checkApproval() error {
	if c.Confirm != "" && !slices.Contains(keyConfirms, c.Confirm) {
		return unknownValue("confirm", c.Confirm, keyConfirms)
	}
	if places := []ConfirmPlace{PlaceAny, PlaceDisplay}; c.ConfirmPlace != "" && !slices.Contains(places, c.ConfirmPlace) {
		return unknownValue("confirm-place", c.ConfirmPlace, places)
	}
	for _, k := range c.KeyTables {
		if k.Confirm != "" && !slices.Contains(keyConfirms, k.Confirm) {
			return unknownValue(fmt.Sprintf("confirm of %v", k.URI), k.Confirm, keyConfirms)
		}
		for i, r := range k.Rules {
			if err := r.check(fmt.Sprintf("rule %d of %v", i+1, k.URI)); err != nil {
				return err
			}
		}
	}
	return nil
}
