package status

import (
	"time"

	"p11-agent/agent/request"
	"p11-agent/token"
	"p11-agent/token/pin"
	"p11-agent/token/wire"
)

// The entries are the parts that "status --json" and "list --json" have in common. A member
// keeps its name, its type and its meaning in both.

// A TokenEntry describes a token, present or away.
type TokenEntry struct {
	URI          string    `json:"uri"`
	Label        string    `json:"label"`
	Serial       string    `json:"serial"`
	Manufacturer string    `json:"manufacturer"`
	Model        string    `json:"model"`
	Module       string    `json:"module"`
	Slot         string    `json:"slot"`
	Reader       string    `json:"reader,omitempty"` // set when another token has the same name
	LoginNeeded  bool      `json:"login_required"`
	PIN          PIN       `json:"pin"`
	Shadowed     string    `json:"used_through,omitempty"` // another module, which the agent uses for the token
	Home         string    `json:"belongs_to,omitempty"`   // another module, which does not show the token
	Present      bool      `json:"present"`
	LastSeen     time.Time `json:"last_seen,omitzero"` // set when the token is away
	LeftOut      []string  `json:"left_out,omitempty"` // what a bound leaves out, and why
}

// A KeyEntry describes a key.
type KeyEntry struct {
	URI         string `json:"uri,omitempty"` // empty: the key is in memory
	Type        string `json:"type"`
	Fingerprint string `json:"fingerprint"`
	NotShown    bool   `json:"not_shown,omitempty"` // the list for clients has no room for the key
}

// A ModuleEntry describes a PKCS#11 module.
type ModuleEntry struct {
	Name     string   `json:"name"`
	Path     string   `json:"path"`
	Restarts int      `json:"restarts"`           // of its process, since the program has started
	Sandbox  string   `json:"sandbox,omitempty"`  // what its process may not do
	Next     []string `json:"next,omitempty"`     // what helps against its failure
	LeftOut  []string `json:"left_out,omitempty"` // what a bound leaves out, and why
}

// NewTokenEntry describes a token. present tells whether the token is there now.
func NewTokenEntry(t token.TokenStatus, present bool) TokenEntry {
	e := TokenEntry{
		URI: t.URI, Label: t.ID.Label, Serial: t.ID.Serial, Manufacturer: t.ID.Manufacturer, Model: t.ID.Model,
		Module: t.Module, Slot: t.Slot, Reader: t.Reader, Present: present, Shadowed: t.Shadowed, Home: t.Home,
		PIN: PINOf(t.Tries), LoginNeeded: t.Flags&wire.CKFLoginRequired != 0, LeftOut: t.LeftOut,
	}
	if !present {
		e.LastSeen = t.Seen
	}
	return e
}

// NewModuleEntry describes a module. It leaves Next out.
func NewModuleEntry(m token.ModuleStatus) ModuleEntry {
	return ModuleEntry{Name: m.Name, Path: m.Path, Restarts: m.Restarts, Sandbox: m.Sandbox, LeftOut: m.LeftOut}
}

// A PIN tells how many tries for the PIN of a token are left.
type PIN = request.Tries

// The values of PIN.
const (
	PINOK     = request.TriesOK
	PINLow    = request.TriesLow
	PINLast   = request.TriesLast
	PINLocked = request.TriesLocked
)

// PINOf returns the PIN for what a token tells.
func PINOf(t pin.Tries) PIN {
	switch t {
	case pin.TriesLow:
		return PINLow
	case pin.TriesLast:
		return PINLast
	case pin.TriesNone:
		return PINLocked
	default:
		return PINOK
	}
}
