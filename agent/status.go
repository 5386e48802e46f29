package agent

import (
	"time"

	"golang.org/x/crypto/ssh"

	"p11-agent/agent/approval"
	"p11-agent/agent/audit"
	"p11-agent/agent/request"
	"p11-agent/pinentry/plain"
)

// A Status is the state of the keyring.
type Status struct {
	// Locked says that the agent is locked. Then the other fields are empty.
	Locked    bool
	Keys      []KeyStatus // in the order of the list
	Upstreams []UpstreamStatus
	Approvals []approval.Status // the newest first
	Pauses    []approval.Pause  // the longest first
	Events    []audit.Event     // the newest first, with all results
	Failures  []audit.Event     // the Events of refused requests
}

// A KeyStatus is the state of an identity.
type KeyStatus struct {
	Key         ssh.PublicKey // may be a certificate
	Fingerprint string        // of the key, or of the key that the certificate certifies
	Comment     string
	Homes       []request.Key // on tokens, in the order of use
	Software    bool          // the key is in memory
	Confirm     bool
	Limited     bool      // to destinations
	Expires     time.Time // zero: never
	LastUse     time.Time // zero: no use since the start of the agent
	Signatures  uint64    // since the start, also with certificates of the key
	Identity    Identity  // the entry in the list
}

// An UpstreamStatus is the state of another agent.
type UpstreamStatus struct {
	Name    string
	Keys    int    // in its last list
	Trouble string // why its last list failed; empty: it did not
}

// Now returns the state of the keyring. It waits for no person, token or process.
func (k *Keyring) Now() Status {
	if k.lock.locked() {
		return Status{Locked: true}
	}
	v := k.now()
	s := Status{Approvals: k.approver.Remembered(), Pauses: k.opts.Questions.Pauses()}
	for i, id := range v.identities {
		count, last := k.audit.Signatures(id.Fingerprint)
		s.Keys = append(s.Keys, KeyStatus{
			Key: id.key, Fingerprint: id.Fingerprint, Comment: plain.LineWithin(id.Comment, request.MaxField), Homes: id.Homes,
			Software: id.software != nil, Confirm: id.limits.confirm, Limited: id.limits.route(),
			Expires: id.limits.expires, LastUse: last, Signatures: count, Identity: v.list.Identities[i],
		})
	}
	s.Events = k.audit.Events()
	for _, e := range s.Events {
		if e.Result == audit.Refused {
			s.Failures = append(s.Failures, e)
		}
	}
	k.mu.Lock()
	defer k.mu.Unlock()
	for _, u := range k.opts.Upstreams {
		up := UpstreamStatus{Name: u.Name(), Trouble: plain.LineWithin(k.troubles[u.Name()], request.MaxReason)}
		for _, origin := range k.origins {
			if origin == u {
				up.Keys++
			}
		}
		s.Upstreams = append(s.Upstreams, up)
	}
	return s
}

// begin makes the record of a request that uses no key.
func (k *Keyring) begin(c *request.Caller, action request.Action) *audit.Record {
	use := new(request.Use)
	k.setUse(use, nil, c, request.Sign{})
	return k.audit.Begin(action, use)
}

// Refuse logs a request that the door itself has refused, such as an unreadable one. The
// reason must not quote anything that may be a secret.
func (k *Keyring) Refuse(c *request.Caller, request request.Action, reason error) {
	k.audit.End(k.begin(c, request), reason)
}
