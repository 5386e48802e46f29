// Package knownhosts turns host keys into the names under which a person knows
// the hosts: those of ssh's known_hosts files (sshd(8), SSH_KNOWN_HOSTS FILE
// FORMAT).
//
// It promises that the files have each name that it returns for this very key, or for the
// authority that has certified the key. It returns a wildcard as the file has it: a
// wildcard proves that the host is one of several, and no guess makes it say more. It
// finds a hashed name if a guess has the same hash. Time and memory are bounded for any
// content of the files.
//
// It leaves to others whether a host has proved to have the key.
package knownhosts

import (
	"bytes"
	"crypto/hmac"
	"crypto/sha1" //nolint:gosec // what known_hosts uses
	"encoding/base64"
	"errors"
	"os"
	"slices"
	"strings"
	"sync"
	"syscall"
	"time"

	"golang.org/x/crypto/ssh"

	"p11-agent/agent/pattern"
	"p11-agent/pinentry/plain"
)

const (
	maxFile    = 16 << 20 // bytes
	maxLine    = 64 << 10
	maxPattern = 1023 // bytes, as ssh
	maxNames   = 32   // of one key, and as many sets
	maxGuesses = 8192 // candidates that are compared with hashed names
)

// Files are known_hosts files. Its methods may be called from any goroutine.
type Files struct {
	paths []string

	mu      sync.Mutex
	stamps  []stamp
	entries map[string][]entry // by the wire form of the key
	proved  map[string]string  // names that were guessed right, by their hashes
}

// stamp tells whether a file has changed.
type stamp struct {
	exists       bool
	size         int64
	modified     time.Time
	inode, owner uint64
}

// entry is a line of a file.
type entry struct {
	hash               string   // of the one name it has; empty: it has these
	positive, negative []string // patterns, the latter without their !
	odd                bool     // there are further names, which cannot be shown
	authority          bool
	revoked            bool
}

// newEntry reads the names of a line, which are separated by commas there. ok is
// false when ssh takes the line for no host (OpenSSH's hostfile.c,
// match_maybe_hashed, and match.c, match_pattern_list).
func newEntry(names []string) (e entry, ok bool) {
	if strings.HasPrefix(names[0], "|") {
		return entry{hash: names[0]}, len(names) == 1 && plain.PrintsASCII(names[0])
	}
	for _, n := range names {
		n, negated := strings.CutPrefix(n, "!")
		switch {
		case len(n) >= maxPattern:
			return entry{}, false
		case n == "":
		case negated:
			e.negative = append(e.negative, n)
		case plain.PrintsASCII(n):
			e.positive = append(e.positive, n)
		default:
			e.odd = true
		}
	}
	return e, true
}

// has tells whether an entry that is not hashed is for a host: one of its patterns
// matches, and none with a ! in front does.
func (e entry) has(host string) bool {
	fits := func(p string) bool { return pattern.Match(strings.ToLower(p), strings.ToLower(host)) }
	return slices.ContainsFunc(e.positive, fits) && !slices.ContainsFunc(e.negative, fits)
}

// New makes Files of these paths. Files that are not there, that others than the
// user and root can change, or that are larger than 16 MiB count for nothing.
func New(paths ...string) *Files { return &Files{paths: paths} }

// Known is what the files say of a host key.
type Known struct {
	// Names are those of the host, the one that was guessed first in front. One with
	// wildcards stands for hosts that share the key: the host is one of them, or has
	// one of the other names. Names may hold anything but control characters and blanks.
	Names []string
	// Hashed says that there is a name, but only its hash, and that no guess was
	// right.
	Hashed bool
	// Revoked says that the key, or its authority, is marked as revoked.
	Revoked bool

	sets []set // of the names with wildcards
	// hashes are of further names that no guess was right about. An empty one stands
	// for all names that were left out.
	hashes []string
}

// Shared tells whether hosts share the key, so that it proves no single name.
func (k Known) Shared() bool { return len(k.sets) > 0 || slices.ContainsFunc(k.Names, wild) }

// A set is the names that a name with wildcards stands for.
type set struct {
	name string
	all  [][]string // lists of patterns in small letters: a name in the set fits each list
}

// newSet makes the set of the names that fit a pattern and none of the others.
func newSet(pattern string, but ...string) set {
	list := []string{strings.ToLower(pattern)}
	for _, b := range but {
		list = append(list, "!"+strings.ToLower(b))
	}
	return set{name: pattern, all: [][]string{list}}
}

func (s set) equal(o set) bool {
	return s.name == o.name && slices.EqualFunc(s.all, o.all, slices.Equal)
}

// add adds a name that is proved.
func (k *Known) add(name string) { k.Names = append(k.Names, name) }

// addSet adds names that hosts with the same key have.
func (k *Known) addSet(s set) {
	k.add(s.name)
	if !slices.ContainsFunc(k.sets, s.equal) {
		k.sets = append(k.sets, s)
	}
}

// Lookup returns what the files say of a host key, which may be a certificate.
// guesses returns names that the host may have, the likeliest first; it is called
// when there is need of them. The files are read again when they have changed.
func (f *Files) Lookup(key ssh.PublicKey, guesses func() []string) Known {
	entries := f.now()
	guess := sync.OnceValue(func() []string {
		if guesses == nil {
			return nil
		}
		all := guesses()
		return slices.DeleteFunc(all[:min(len(all), maxGuesses)], func(g string) bool { return !plain.PrintsASCII(g) })
	})
	var k Known
	cert, certified := key.(*ssh.Certificate)
	plain := key
	if certified {
		plain = cert.Key
	}
	for _, e := range entries[string(plain.Marshal())] {
		switch {
		case e.revoked:
			k.Revoked = true
		case !e.authority:
			f.line(&k, e, guess)
		}
	}
	if certified {
		valid := CheckHostCertificate(cert) == nil
		for _, e := range entries[string(cert.SignatureKey.Marshal())] {
			switch {
			case e.revoked:
				k.Revoked = true
			case e.authority && valid:
				k.certify(e, cert)
			}
		}
	}
	k.order(guess)
	return k
}

// order puts the names that were guessed in front of the others, each once and within
// bounds.
func (k *Known) order(guess func() []string) {
	var names []string
	add := func(name string) {
		if !slices.Contains(names, name) {
			names = append(names, name)
		}
	}
	if len(k.Names) > 1 {
		for _, g := range guess() {
			for _, n := range k.Names {
				if pattern.Match(strings.ToLower(n), strings.ToLower(g)) {
					add(n)
				}
			}
		}
	}
	for _, n := range k.Names {
		add(n)
	}
	if max(len(names), len(k.sets), len(k.hashes)) > maxNames {
		k.hashes = append(k.hashes[:min(len(k.hashes), maxNames)], "")
		k.sets = k.sets[:min(len(k.sets), maxNames)]
	}
	k.Names = names[:min(len(names), maxNames)]
	k.Hashed = len(names) == 0 && slices.ContainsFunc(k.hashes, func(h string) bool { return h != "" })
}

// line adds what an entry says of the host that has its key.
func (f *Files) line(k *Known, e entry, guess func() []string) {
	if e.hash != "" {
		if name, found := f.unhash(e.hash, guess); found {
			k.add(name)
		} else {
			k.hashes = append(k.hashes, e.hash)
		}
		return
	}
	if e.odd {
		k.hashes = append(k.hashes, "")
	}
	for _, p := range e.positive {
		switch {
		case wild(p):
			k.addSet(newSet(p, e.negative...))
		case e.has(p):
			k.add(p)
		}
	}
}

// unhash returns the name of a hash if it was guessed now or before: a hash has one name.
func (f *Files) unhash(hashed string, guess func() []string) (name string, found bool) {
	f.mu.Lock()
	name, found = f.proved[hashed]
	f.mu.Unlock()
	if found {
		return name, true
	}
	for _, g := range guess() {
		if matchHash(hashed, g) {
			f.mu.Lock()
			f.proved[hashed] = g
			f.mu.Unlock()
			return g, true
		}
	}
	return "", false
}

// certify adds the names that a valid certificate has and that its authority may
// certify. Principals may be patterns. They have no ports, which the names of an entry
// may have (OpenSSH's sshconnect.c, check_host_key).
func (k *Known) certify(e entry, cert *ssh.Certificate) {
	for _, principal := range cert.ValidPrincipals {
		// ssh asks for names in small letters, and principals are compared as they are.
		if principal == "" || !plain.PrintsASCII(principal) || principal != strings.ToLower(principal) {
			continue
		}
		if e.hash != "" {
			if matchHash(e.hash, principal) {
				k.add(principal)
			}
			continue
		}
		for _, pattern := range e.positive {
			k.both(e, principal, pattern)
		}
	}
}

// both adds the names that fit a principal and a pattern of an entry.
func (k *Known) both(e entry, principal, own string) {
	if _, port, ok := strings.Cut(own, "]:"); ok && strings.HasPrefix(own, "[") {
		if wild(port) || wild(principal) {
			port = "*"
		}
		principal = "[" + principal + "]:" + port
	}
	switch {
	case !wild(principal):
		if pattern.Match(strings.ToLower(own), principal) && e.has(principal) {
			k.add(principal)
		}
	case !wild(own):
		if pattern.Match(principal, strings.ToLower(own)) && e.has(own) {
			k.add(own)
		}
	default:
		s := newSet(own, e.negative...)
		within, overlaps := relate(s.all, []string{principal})
		if !overlaps {
			return
		}
		if !within {
			s.name = principal
		}
		s.all = append(s.all, []string{principal})
		k.addSet(s)
	}
}

// CheckHostCertificate tells why a certificate proves no name of a host at all
// (sshkey_cert_check_host in OpenSSH 10.5's sshkey.c): it is for a user, it is not
// valid now, it has no principals, it has critical options, or its authority has not
// signed it or has signed it with an algorithm that ssh does not take.
func CheckHostCertificate(cert *ssh.Certificate) error {
	switch {
	case cert.CertType != ssh.HostCert:
		return errors.New("not a certificate of a host")
	case len(cert.ValidPrincipals) == 0:
		return errors.New("the certificate names no principals")
	case cert.Signature == nil || !slices.Contains(authorityAlgorithms, cert.Signature.Format):
		return errors.New("the certificate's authority has signed it with an algorithm that is not allowed")
	}
	return new(ssh.CertChecker).CheckCert(cert.ValidPrincipals[0], cert)
}

// authorityAlgorithms are the signatures of authorities that ssh takes
// (SSH_ALLOWED_CA_SIGALGS in OpenSSH 10.5's myproposal.h), without SHA-1.
var authorityAlgorithms = []string{
	ssh.KeyAlgoED25519, ssh.KeyAlgoECDSA256, ssh.KeyAlgoECDSA384, ssh.KeyAlgoECDSA521,
	ssh.KeyAlgoSKED25519, ssh.KeyAlgoSKECDSA256, ssh.KeyAlgoRSASHA512, ssh.KeyAlgoRSASHA256,
}

// wild tells whether a pattern may stand for several names.
func wild(pattern string) bool { return strings.ContainsAny(pattern, "*?") }

// match tells whether a list of patterns is for a host: one matches, and none
// with a ! in front does.
func match(patterns []string, host string) bool {
	host = strings.ToLower(host)
	ok := false
	for _, p := range patterns {
		p, negated := strings.CutPrefix(strings.ToLower(p), "!")
		if !pattern.Match(p, host) {
			continue
		}
		if negated {
			return false
		}
		ok = true
	}
	return ok
}

// matchHash tells whether a hashed name, as in "|1|salt|hash", is that of a host
// (HashKnownHosts in ssh_config(5); OpenSSH's hostfile.c).
func matchHash(hashed, host string) bool {
	parts := strings.Split(hashed, "|")
	if len(parts) != 4 || parts[0] != "" || parts[1] != "1" {
		return false
	}
	salt, err := base64.StdEncoding.DecodeString(parts[2])
	if err != nil || len(salt) != sha1.Size {
		return false
	}
	want, err := base64.StdEncoding.DecodeString(parts[3])
	if err != nil {
		return false
	}
	mac := hmac.New(sha1.New, salt)
	mac.Write([]byte(strings.ToLower(host)))
	return hmac.Equal(mac.Sum(nil), want)
}

// now returns the entries as the files have them.
func (f *Files) now() map[string][]entry {
	f.mu.Lock()
	defer f.mu.Unlock()
	stamps := make([]stamp, len(f.paths))
	for i, p := range f.paths {
		stamps[i] = stampOf(p)
	}
	if f.entries == nil || !slices.Equal(stamps, f.stamps) {
		f.entries, f.proved = make(map[string][]entry), make(map[string]string)
		for _, p := range f.paths {
			parse(read(p), f.entries)
		}
	}
	f.stamps = stamps
	return f.entries
}

func stampOf(path string) (s stamp) {
	st, err := os.Stat(path)
	if err != nil {
		return stamp{}
	}
	s = stamp{exists: true, size: st.Size(), modified: st.ModTime()}
	if sys, ok := st.Sys().(*syscall.Stat_t); ok {
		s.inode, s.owner = sys.Ino, uint64(sys.Uid)
	}
	return s
}

// read returns the file, or nothing where it cannot be believed.
func read(path string) []byte {
	f, err := os.OpenFile(path, os.O_RDONLY|syscall.O_NONBLOCK, 0)
	if err != nil {
		return nil
	}
	defer f.Close()
	st, err := f.Stat()
	if err != nil || !st.Mode().IsRegular() || st.Size() > maxFile || st.Mode().Perm()&0o022 != 0 {
		return nil
	}
	if sys, ok := st.Sys().(*syscall.Stat_t); !ok || sys.Uid != 0 && int(sys.Uid) != os.Geteuid() {
		return nil
	}
	b := make([]byte, st.Size())
	n, _ := f.ReadAt(b, 0) // it may have become shorter
	return b[:n]
}

// parse adds the entries of a file. Lines that are wrong are passed over, as ssh
// does.
func parse(file []byte, entries map[string][]entry) {
	for line := range bytes.Lines(file) {
		if len(line) > maxLine || !bytes.ContainsRune(line, ' ') && !bytes.ContainsRune(line, '\t') {
			continue
		}
		marker, hosts, key, _, _, err := ssh.ParseKnownHosts(line)
		if err != nil {
			continue
		}
		e, ok := newEntry(hosts)
		e.authority, e.revoked = marker == "cert-authority", marker == "revoked"
		if cert, certified := key.(*ssh.Certificate); certified {
			// Marked lines are about the key in it, and others about no key at all.
			key, ok = cert.Key, ok && marker != ""
		}
		if !ok && !e.revoked || marker != "" && !e.authority && !e.revoked {
			continue
		}
		wire := string(key.Marshal())
		entries[wire] = append(entries[wire], e)
	}
}
