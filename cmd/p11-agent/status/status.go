// Package status is the report of a running agent. It makes the report, finds the agent
// that sends one, and prints the report for a person.
//
// It promises that status --json and list --json keep the names and meanings of their
// members, and describe tokens, keys and modules in the same way. A report of a locked agent
// names no tokens. Which keys the agent offers is the business of package
// agent; what helps against the failure of a module is the business of package advice.
package status

import (
	"time"

	"p11-agent/agent/audit"
	"p11-agent/agent/request"
)

// A Report is the status of a running agent, and the output of status --json. New members
// may come; the present ones keep their names and meaning. No member may have the name
// "error", which is that of a refusal.
type Report struct {
	Version   string     `json:"version"`
	PID       int        `json:"pid"`
	Started   time.Time  `json:"started"`
	Time      time.Time  `json:"time"` // of the report
	Locked    bool       `json:"locked"`
	Sockets   []Socket   `json:"sockets"`
	Keys      []Key      `json:"keys"`
	Tokens    []Token    `json:"tokens"`
	Modules   []Module   `json:"modules"`
	Upstreams []Upstream `json:"upstreams"`
	Approvals []Approval `json:"approvals"`
	Pauses    []Pause    `json:"pauses"`
	Requests  []Event    `json:"requests"` // the newest first
	Failures  []Event    `json:"failures"` // likewise
}

// A Socket is one socket of the agent.
type Socket struct {
	Path        string `json:"path"`
	Name        string `json:"name,omitempty"` // that of the [[socket]] table
	Connections int    `json:"connections"`
}

// A Key is one identity that the agent offers. Its URI is of the home that signs.
type Key struct {
	KeyEntry
	Comment    string    `json:"comment"`
	Tokens     []string  `json:"tokens,omitempty"` // their URIs
	Present    bool      `json:"present"`
	InMemory   bool      `json:"in_memory"`
	Confirm    bool      `json:"confirm"`
	Limited    bool      `json:"destinations"`
	Expires    time.Time `json:"expires,omitzero"`
	LastUsed   time.Time `json:"last_used,omitzero"`
	Signatures uint64    `json:"signatures"`
}

// A Token is one token of a module, and what the agent does with it.
type Token struct {
	TokenEntry
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
	Keys        []string  `json:"keys"` // their URIs
}

// A Module is one PKCS#11 module.
type Module struct {
	ModuleEntry
	State  ModuleState `json:"state"`
	PID    int         `json:"pid,omitempty"`
	Reason string      `json:"reason,omitempty"` // why it failed
}

// An Upstream is another agent whose keys this agent offers as well.
type Upstream struct {
	Path    string `json:"path"`
	Keys    int    `json:"keys"`
	Trouble string `json:"trouble,omitempty"`
}

// An Approval is an answer of a person that counts for later requests, too.
type Approval struct {
	Comment     string    `json:"comment"`
	Fingerprint string    `json:"fingerprint"`
	What        string    `json:"what"`
	Forwarding  string    `json:"forwarding,omitempty"`
	Client      string    `json:"client"`
	Since       time.Time `json:"since"`
	Ends        time.Time `json:"ends,omitzero"` // zero: when the agent is locked
}

// A Pause is a time in which the agent shows no questions of some clients.
type Pause struct {
	From    string    `json:"from"`
	About   string    `json:"about,omitempty"` // empty: everything
	Refused int       `json:"refused"`         // times
	Block   bool      `json:"block"`           // "no to everything from here"
	Until   time.Time `json:"until"`
}

// An Event is a request, or several of one kind.
type Event struct {
	Time       time.Time       `json:"time"`
	Count      int             `json:"count"`             // of requests
	First      time.Time       `json:"first,omitzero"`    // of these requests; zero: there is one
	Various    bool            `json:"various,omitempty"` // the requests differ, and this is the last one
	Duration   float64         `json:"duration"`          // seconds
	Request    request.Action  `json:"request"`
	Result     audit.Result    `json:"result"`
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

// A ModuleState tells whether the process of a module runs.
type ModuleState string

// The values of ModuleState.
const (
	Starting ModuleState = "starting"
	Running  ModuleState = "running"
	Released ModuleState = "released" // the agent has ended the process, and starts it again when needed
	Failed   ModuleState = "failed"
)
