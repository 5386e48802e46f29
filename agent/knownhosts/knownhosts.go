// Package knownhosts turns host keys into the names under which a person knows
// the hosts: those of ssh's known_hosts files (sshd(8), SSH_KNOWN_HOSTS FILE
// FORMAT).
//
// It promises that a name it returns is one that the files have for this very
// key, or for the authority that has certified it; that a name which the files
// have only as a hash is found only when somebody else says it, and proved by the
// hash; and that the time and memory it takes are bounded whatever is in the files.
//
// It leaves to others whether a host has proved to have the key.
package knownhosts

import (
	"bytes"
	"crypto/hmac"
	"crypto/sha1" //nolint:gosec // what known_hosts uses
	"encoding/base64"
	"os"
	"slices"
	"strings"
	"sync"
	"syscall"
	"time"

	"golang.org/x/crypto/ssh"
)

const (
	maxFile    = 16 << 20 // bytes
	maxLine    = 64 << 10
	maxNames   = 32   // of one key
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
	patterns  []string // names, patterns and hashed names
	authority bool
	revoked   bool
}

// New makes Files of these paths. Files that are not there, that others than the
// user and root can change, or that are larger than 16 MiB count for nothing.
func New(paths ...string) *Files { return &Files{paths: paths} }

// Known is what the files say of a host key.
type Known struct {
	// Names are those of the host, those that were guessed first. They may hold
	// anything but control characters and blanks.
	Names []string
	// Hashed says that there is a name, but only its hash, and that no guess was
	// right.
	Hashed bool
	// Revoked says that the key, or its authority, is marked as revoked.
	Revoked bool
}

// Lookup returns what the files say of a host key, which may be a certificate.
// guesses returns names that the host may have; it is called when there is need
// of them. The files are read again when they have changed.
func (f *Files) Lookup(key ssh.PublicKey, guesses func() []string) Known {
	entries := f.now()
	var all []string
	guess := sync.OnceValue(func() []string {
		if guesses == nil {
			return nil
		}
		all := guesses()
		return slices.DeleteFunc(all[:min(len(all), maxGuesses)], func(g string) bool { return !printable(g) })
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
			names, hashed := f.names(e, guess)
			all = append(all, names...)
			k.Hashed = k.Hashed || hashed
		}
	}
	if certified {
		for _, e := range entries[string(cert.SignatureKey.Marshal())] {
			switch {
			case e.revoked:
				k.Revoked = true
			case e.authority:
				all = append(all, e.certified(cert)...)
			}
		}
	}
	guessed := guessedFirst(all, guess)
	k.Names = guessed[:min(len(guessed), maxNames)]
	k.Hashed = k.Hashed && len(k.Names) == 0
	return k
}

// guessedFirst puts the names that somebody has said before the others, each once.
func guessedFirst(names []string, guess func() []string) []string {
	var first, rest []string
	for _, n := range names {
		switch {
		case slices.Contains(first, n) || slices.Contains(rest, n):
		case len(names) > 1 && slices.Contains(guess(), n):
			first = append(first, n)
		default:
			rest = append(rest, n)
		}
	}
	return append(first, rest...)
}

// names returns the names of a host that an entry has. hashed says that there may
// be another.
func (f *Files) names(e entry, guess func() []string) (names []string, hashed bool) {
	for _, p := range e.patterns {
		switch {
		case strings.HasPrefix(p, "|"):
			name, found := f.unhash(p, guess)
			if found {
				names = append(names, name)
			}
			hashed = hashed || !found
		case strings.HasPrefix(p, "!"):
		case strings.ContainsAny(p, "*?"):
			for _, g := range guess() {
				if match(e.patterns, g) {
					names = append(names, g)
				}
			}
			if len(names) == 0 {
				names = append(names, p)
			}
		default:
			names = append(names, p)
		}
	}
	return names, hashed
}

// unhash returns the name that has been hashed, if somebody has said it now or
// before: a hash is of one name.
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

// certified returns the names that a certificate has and that its authority may
// certify.
func (e entry) certified(cert *ssh.Certificate) (names []string) {
	if cert.CertType != ssh.HostCert {
		return nil
	}
	for _, name := range cert.ValidPrincipals {
		if printable(name) && match(e.patterns, name) && new(ssh.CertChecker).CheckCert(name, cert) == nil {
			names = append(names, name)
		}
	}
	return names
}

// match tells whether a list of patterns is for a host: one matches, and none
// with a ! in front does.
func match(patterns []string, host string) bool {
	host = strings.ToLower(host)
	ok := false
	for _, p := range patterns {
		p, negated := strings.CutPrefix(strings.ToLower(p), "!")
		if !MatchPattern(p, host) {
			continue
		}
		if negated {
			return false
		}
		ok = true
	}
	return ok
}

// MatchPattern tells whether s is what pattern says, in which * stands for any
// characters and ? for one (PATTERNS in ssh_config(5)). It takes time in
// proportion to the product of both lengths.
func MatchPattern(pattern, s string) bool {
	star, mark := -1, 0
	p, i := 0, 0
	for i < len(s) {
		switch {
		case p < len(pattern) && pattern[p] == '*':
			star, mark = p, i
			p++
		case p < len(pattern) && (pattern[p] == '?' || pattern[p] == s[i]):
			p++
			i++
		case star >= 0:
			mark++
			p, i = star+1, mark
		default:
			return false
		}
	}
	for p < len(pattern) && pattern[p] == '*' {
		p++
	}
	return p == len(pattern)
}

// matchHash tells whether a hashed name, as in "|1|salt|hash", is that of a host
// (HashKnownHosts in ssh_config(5); OpenSSH's hostfile.c).
func matchHash(hashed, host string) bool {
	parts := strings.Split(hashed, "|")
	if len(parts) != 4 || parts[0] != "" || parts[1] != "1" {
		return false
	}
	salt, err := base64.StdEncoding.DecodeString(parts[2])
	if err != nil {
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
		e := entry{authority: marker == "cert-authority", revoked: marker == "revoked"}
		if marker != "" && !e.authority && !e.revoked {
			continue
		}
		for _, h := range hosts {
			if h != "" && printable(h) {
				e.patterns = append(e.patterns, h)
			}
		}
		wire := string(key.Marshal())
		entries[wire] = append(entries[wire], e)
	}
}

// printable tells whether a name can be put before a person.
func printable(name string) bool {
	for _, r := range name {
		if r <= ' ' || r >= 0x7f { // names of hosts are ASCII
			return false
		}
	}
	return true
}
