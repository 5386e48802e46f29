package config

import (
	"cmp"
	"errors"
	"fmt"
	"io/fs"
	"path/filepath"
	"strings"

	"p11-agent/cmd/p11-agent/paths"
	"p11-agent/token"
	"p11-agent/token/pkcs11uri"
)

// check finds what the syntax does not show.
func (c *File) check(mode fs.FileMode) error {
	bad := func(format string, args ...any) error {
		return &Error{File: c.path, Text: fmt.Sprintf(format, args...)}
	}
	for _, u := range c.URIs() {
		if err := token.CheckPIN(u); err != nil {
			return &Error{
				File: c.path, Text: fmt.Sprintf("the PIN of %v would be tried on any token", u),
				Advice: "add the token attribute to the URI, and the serial attribute where several tokens have one label",
			}
		}
		if u.PIN() != nil && mode.Perm()&0o077 != 0 {
			return &Error{
				File: c.path, Text: fmt.Sprintf("it holds a pin-value and can be read by others (mode %#o)", mode.Perm()),
				Advice: "run: chmod 600 " + c.path + ", or better name a file with pin-source",
			}
		}
		if names := u.Unrecognized(); len(names) > 0 {
			e := &Error{File: c.path, Text: fmt.Sprintf("%v has the unknown attribute %q, so it would match nothing", u, names[0])}
			if s := pkcs11uri.Suggest(names[0]); s != "" {
				e.Advice = fmt.Sprintf("did you mean %q?", s)
			}
			return e
		}
	}
	var wrong []error
	for _, err := range []error{c.TouchNotice.check(), c.ForgetOn.check()} {
		if err != nil {
			wrong = append(wrong, bad("%v", err))
		}
	}
	if len(wrong) > 0 {
		return errors.Join(wrong...)
	}
	for i, k := range c.KeyTables {
		if k.URI == nil {
			return bad("[[key]] table %d has no uri", i+1)
		}
		if err := cmp.Or(k.checkPIN(), checkAbsent(k.Absent), k.checkAllow()); err != nil {
			return bad("%v", err)
		}
		if k.ForgetOn != nil {
			if err := k.ForgetOn.check(); err != nil {
				return bad("%v: %v", k.URI, err)
			}
		}
		if k.Public == "" {
			continue
		}
		pub, err := readPublicKey(k.Public)
		p := token.PublicKey{URI: k.URI.URI, Key: pub}
		if err == nil {
			err = token.CheckPublicKey(p)
		}
		if err != nil {
			return bad("public-key of %v: %v", k.URI, err)
		}
		c.publicKeys = append(c.publicKeys, p)
	}
	if c.Certificates = paths.ExpandHome(c.Certificates); c.Certificates != "" && !filepath.IsAbs(c.Certificates) {
		return bad("certificates: %q is not an absolute path", c.Certificates)
	}
	for i, path := range c.KnownHosts {
		if c.KnownHosts[i] = paths.ExpandHome(path); !filepath.IsAbs(c.KnownHosts[i]) {
			return bad("known-hosts: %q is not an absolute path", path)
		}
	}
	for i, path := range c.Upstream {
		if c.Upstream[i] = paths.ExpandHome(path); !filepath.IsAbs(c.Upstream[i]) {
			return bad("upstream: %q is not an absolute path", path)
		}
	}
	if err := cmp.Or(c.checkSockets(), checkAbsent(c.Absent), c.checkApproval()); err != nil {
		return asConfigError(c.path, err)
	}
	if p := c.Pinentry.Program; strings.Contains(p, "/") && !filepath.IsAbs(p) {
		return bad("pinentry.program %q is neither an absolute path nor a name", p)
	}
	seen := make(map[string]bool)
	for i, m := range c.Modules {
		switch {
		case m.Name == "" && m.Path == "":
			return bad("[[module]] table %d has neither path nor name", i+1)
		case m.Path != "" && !filepath.IsAbs(m.Path):
			return bad("module path %q is not absolute", m.Path)
		case seen[m.ModuleName()]:
			return bad("module %q is configured twice", m.ModuleName())
		}
		seen[m.ModuleName()] = true
		for j, path := range m.Write {
			if m.Write[j] = paths.ExpandHome(path); !filepath.IsAbs(m.Write[j]) || strings.Contains(path, "\x00") {
				return bad("module %q: write has %q, which is no absolute path", m.ModuleName(), path)
			}
		}
		if len(m.Write) > 0 && m.Sandbox != nil && !*m.Sandbox {
			return bad("module %q: without a sandbox everything can be written: one of write and sandbox = false has to go", m.ModuleName())
		}
		if strings.Contains(m.InitArgs, "\x00") {
			return bad("module %q: init-args has a NUL", m.ModuleName())
		}
		for name := range m.Env {
			if name == "" || strings.ContainsAny(name, "=\x00") {
				return bad("module %q: %q cannot be the name of an environment variable", m.ModuleName(), name)
			}
		}
	}
	return nil
}
