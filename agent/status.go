package agent

import (
	"time"

	"golang.org/x/crypto/ssh"

	"p11-agent/agent/approval"
	"p11-agent/agent/audit"
	"p11-agent/agent/request"
	"p11-agent/pinentry/plain"
)

// A Status is what the keyring knows of itself.
type Status struct {
	// Locked tells that the agent is locked; then nothing else is told.
	Locked    bool
	Keys      []KeyStatus // in the order of the list
	Upstreams []UpstreamStatus
	Approvals []approval.Status // the newest first
	Pauses    []approval.Pause  // the longest first
	Events    []audit.Event     // the newest first, with those that were not granted
	Failures  []audit.Event     // those of them that were refused
}

// A KeyStatus tells of an identity.
type KeyStatus struct {
	Key         ssh.PublicKey // may be a certificate
	Fingerprint string        // of the key, or of what it certifies
	Comment     string
	Homes       []request.Key // on tokens, the one that is used first in front
	Software    bool          // it is in memory
	Confirm     bool
	Limited     bool      // to destinations
	Expires     time.Time // zero: it does not
	LastUse     time.Time // zero: it was not used since the agent has started
	Signatures  uint64    // since then; those with a certificate of the key count, too
	Identity    Identity  // as it is listed
}

// An UpstreamStatus tells of another agent.
type UpstreamStatus struct {
	Name    string
	Keys    int    // when it was asked last
	Trouble string // why it could not be, empty when it could
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

// Refuse notes that the door has refused a request by itself, as one that cannot be read.
// The reason must quote nothing that may be a secret.
func (k *Keyring) Refuse(c *request.Caller, request request.Action, reason error) {
	k.audit.End(k.begin(c, request), reason)
}
