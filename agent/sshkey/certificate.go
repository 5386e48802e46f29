package sshkey

import (
	"time"

	"golang.org/x/crypto/ssh"
)

// Plain returns the key that a certificate certifies, or the key itself.
func Plain(key ssh.PublicKey) ssh.PublicKey {
	if cert, ok := key.(*ssh.Certificate); ok {
		return cert.Key
	}
	return key
}

// Valid tells whether a certificate is valid at a time, and when that changes next. The
// zero time means never.
func Valid(cert *ssh.Certificate, now time.Time) (bool, time.Time) {
	const forever = uint64(ssh.CertTimeInfinity)
	at := uint64(max(0, now.Unix()))
	switch {
	case at < cert.ValidAfter:
		return false, unixTime(cert.ValidAfter)
	case at >= cert.ValidBefore && cert.ValidBefore != forever:
		return false, time.Time{}
	default:
		return true, unixTime(cert.ValidBefore)
	}
}

// unixTime is zero for times that do not come.
func unixTime(seconds uint64) time.Time {
	if seconds > 1<<40 {
		return time.Time{}
	}
	return time.Unix(int64(seconds), 0)
}
