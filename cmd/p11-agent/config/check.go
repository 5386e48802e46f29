package config

import (
	"errors"
	"fmt"
	"io/fs"
	"path/filepath"
	"strings"

	"p11-agent/cmd/p11-agent/paths"
	"p11-agent/token/pin"
	"p11-agent/token/pkcs11uri"
)

// check finds the mistakes that the syntax does not show. It also replaces "~/" in paths, and
// reads the public keys that [[key]] tables name. mode is the mode of the file.
func (c *File) check(mode fs.FileMode) error {
	for _, u := range c.URIs() {
		if err := c.checkURI(u, mode); err != nil {
			return asError(c.path, err)
		}
	}
	if err := errors.Join(asError(c.path, c.TouchNotice.check()), asError(c.path, c.ForgetOn.check())); err != nil {
		return err
	}
	for _, check := range []func() error{
		c.checkKeys, c.checkPaths, c.checkSockets, c.checkAbsent, c.checkApproval, c.checkPinentry, c.checkModules,
	} {
		if err := check(); err != nil {
			return asError(c.path, err)
		}
	}
	return nil
}

// checkURI finds a URI whose PIN is not safe, and a URI that matches nothing.
func (c *File) checkURI(u *pkcs11uri.URI, mode fs.FileMode) error {
	if err := pin.CheckURI(u); err != nil {
		return &valueError{
			text:   fmt.Sprintf("the PIN of %v would be tried on any token", u),
			advice: "add the token attribute to the URI, and the serial attribute where several tokens have one label",
		}
	}
	if u.PIN() != nil && mode.Perm()&0o077 != 0 {
		return &valueError{
			text:   fmt.Sprintf("the configuration holds a pin-value, and other users can read it (mode %#o)", mode.Perm()),
			advice: "run: chmod 600 " + c.path + ", or better name a file with pin-source",
		}
	}
	if names := u.Unrecognized(); len(names) > 0 {
		e := &valueError{text: fmt.Sprintf("%v has the unknown attribute %q, so it would match nothing", u, names[0])}
		if s := pkcs11uri.Suggest(names[0]); s != "" {
			e.advice = fmt.Sprintf("did you mean %q?", s)
		}
		return e
	}
	return nil
}

// checkPaths makes the paths of the file absolute.
func (c *File) checkPaths() error {
	if c.Certificates = paths.ExpandHome(c.Certificates); c.Certificates != "" && !filepath.IsAbs(c.Certificates) {
		return fmt.Errorf("certificates: %q is not an absolute path", c.Certificates)
	}
	for _, list := range []struct {
		key   string
		paths []string
	}{{"known-hosts", c.KnownHosts}, {"upstream", c.Upstream}} {
		for i, path := range list.paths {
			if list.paths[i] = paths.ExpandHome(path); !filepath.IsAbs(list.paths[i]) {
				return fmt.Errorf("%s: %q is not an absolute path", list.key, path)
			}
		}
	}
	return nil
}

func (c *File) checkPinentry() error {
	if p := c.Pinentry.Program; strings.Contains(p, "/") && !filepath.IsAbs(p) {
		return fmt.Errorf("pinentry.program %q is neither an absolute path nor a name", p)
	}
	return nil
}

func (c *File) checkAbsent() error { return checkAbsent(c.Absent) }
