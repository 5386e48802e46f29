// Package export writes the public halves of keys into files, and prints what ssh and git need to use them. It replaces
// no file with another content unless it is told to, and never asks for a PIN.
package export

import (
	"cmp"
	"encoding/hex"
	"errors"
	"fmt"
	"io/fs"
	"regexp"
	"slices"
	"strings"

	"golang.org/x/crypto/ssh"

	"p11-agent/agent/certdir"
	"p11-agent/agent/request"
	"p11-agent/cmd/p11-agent/config"
	"p11-agent/cmd/p11-agent/named"
	"p11-agent/token"
	"p11-agent/token/pkcs11uri"
	"p11-agent/token/selection"
)

// A Key is a key whose public half can be written into a file.
type Key struct {
	Token  *token.Key
	Public ssh.PublicKey
	Name   string // of the file, without ".pub"
	Line   string // for authorized_keys, with its newline
	// Certificates are the files in the directory of certificates that certify the key.
	Certificates []string
}

// Keys returns the keys that the URIs match, or without URIs those that the agent offers. A key is there once, even if
// it is on several tokens. comment names a key that has no configured name. An error for a URI that matches nothing
// wraps [token.ErrNoMatch].
func Keys(c *config.File, store *token.Store, uris []*pkcs11uri.URI, comment func(request.Key) string) ([]Key, error) {
	all := slices.Concat(store.Keys(), store.Away())
	var keys []*token.Key
	if len(uris) == 0 {
		auto := c.Automatic()
		for _, k := range all {
			if ok, _ := config.Offered(k, auto, ""); ok {
				keys = append(keys, k)
			}
		}
		if len(keys) == 0 {
			return nil, errors.New(`there is no key to export: "p11-agent list -v" says what there is, "p11-agent doctor" why`)
		}
	}
	for _, u := range uris {
		sel, n := selection.New(u), len(keys)
		for _, k := range all {
			if request.Selects(config.KeySelection{Selector: sel}, k) {
				keys = append(keys, k)
			}
		}
		if len(keys) == n {
			return nil, named.WithSuggestions(fmt.Errorf("%v: %w", u, token.ErrNoMatch), store, u)
		}
	}
	certificates, err := certificatesOf(c)
	if err != nil {
		return nil, err
	}
	name := c.KeyName
	var list []Key
	seen := make(map[string]bool)
	for _, k := range keys {
		pub, err := ssh.NewPublicKey(k.Public())
		if err != nil || seen[string(pub.Marshal())] {
			continue
		}
		seen[string(pub.Marshal())] = true
		list = append(list, Key{
			Token: k, Public: pub, Name: fileName(cmp.Or(name(k), k.Label())),
			Line:         strings.TrimSpace(string(ssh.MarshalAuthorizedKey(pub))) + " " + cmp.Or(name(k), comment(k)) + "\n",
			Certificates: certificates[string(pub.Marshal())],
		})
	}
	tellApart(list)
	return list, nil
}

// tellApart gives keys of one name different names: with the label of the token, then the ID, then the fingerprint.
func tellApart(list []Key) {
	for _, longer := range []func(Key) string{
		func(e Key) string { return fileName(e.Token.Token().Label + "-" + e.Name) },
		func(e Key) string { return fileName(e.Name + "-" + hex.EncodeToString(e.Token.ID())) },
		func(e Key) string {
			print := ssh.FingerprintSHA256(e.Public)
			return fileName(e.Name + "-" + strings.TrimPrefix(print, "SHA256:")[:8])
		},
	} {
		count := make(map[string]int)
		for _, e := range list {
			count[strings.ToLower(e.Name)]++
		}
		for i, e := range list {
			if count[strings.ToLower(e.Name)] > 1 {
				list[i].Name = longer(e)
			}
		}
	}
}

// maxFileName leaves room for ".pub" and for the name of a temporary file.
const maxFileName = 100

// unsafe are the characters that the name of a file does without.
var unsafe = regexp.MustCompile(`[^A-Za-z0-9._@+]+`)

// fileName makes a name that is safe in shells, ssh's configuration and file systems.
func fileName(s string) string {
	name := unsafe.ReplaceAllString(s, "-")
	name = strings.TrimSuffix(name[:min(len(name), maxFileName)], ".pub")
	return cmp.Or(strings.Trim(name, ".-"), "token-key")
}

// certificatesOf returns the files of certificates, by the key that they certify.
func certificatesOf(c *config.File) (map[string][]string, error) {
	if c.Certificates == "" {
		return nil, nil
	}
	files, err := certdir.Read(c.Certificates)
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return nil, err
	}
	all := make(map[string][]string)
	for _, f := range files {
		if f.Certificate != nil {
			wire := string(f.Certificate.Key.Marshal())
			all[wire] = append(all[wire], f.Path)
		}
	}
	return all, nil
}
