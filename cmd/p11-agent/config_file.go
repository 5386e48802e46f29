package main

import (
	"bytes"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"p11-agent/agent"
	"p11-agent/cmd/p11-agent/paths"
	"p11-agent/token"
	"p11-agent/token/pkcs11uri"
	"slices"
	"syscall"

	"github.com/pelletier/go-toml/v2"
)

// config is the configuration file, p11-agent.toml.
type config struct {
	// Keys is nil when absent, which is not the same as empty.
	Keys         *[]uriValue    `toml:"keys"`
	AllowModules []string       `toml:"allow-modules"`
	Pinentry     pinentryConfig `toml:"pinentry"`
	Modules      []moduleConfig `toml:"module"`
	KeyTables    []keyConfig    `toml:"key"`
	SoftwareKeys *bool          `toml:"software-keys"`
	RemoteTokens bool           `toml:"remote-tokens"`
	Certificates string         `toml:"certificates"`
	Upstream     []string       `toml:"upstream"`
	KnownHosts   []string       `toml:"known-hosts"` // nil: ssh's own
	Sockets      []socketConfig `toml:"socket"`
	TouchNotice  noticeValue    `toml:"touch-notice"`
	ForgetOn     forgetValue    `toml:"forget-on"`

	FailureNotice *bool `toml:"failure-notice"`

	RememberKeys  *bool         `toml:"remember-keys"`
	Absent        string        `toml:"absent"`
	InsertTimeout durationValue `toml:"insert-timeout"`

	Confirm        agent.Confirm `toml:"confirm"`
	ConfirmTimeout durationValue `toml:"confirm-timeout"`
	ConfirmPlace   confirmPlace  `toml:"confirm-place"`

	path       string            // "": there is no file
	publicKeys []token.PublicKey // those that KeyTables name
}

// Path returns the path of the file, or "" when there is none.
func (c *config) Path() string { return c.path }

// PublicKeys returns the public keys that [[key]] tables give to keys.
func (c *config) PublicKeys() []token.PublicKey { return c.publicKeys }

// knownKeys is what the agent does with the list of keys that it has seen.
func (c *config) knownKeys(otherwise token.KnownKeys) token.KnownKeys {
	if c.RememberKeys != nil && !*c.RememberKeys {
		return token.KnownIgnored
	}
	return otherwise
}

// uris returns every URI of the configuration.
func (c *config) uris() []*pkcs11uri.URI {
	var all []*pkcs11uri.URI
	lists := []*[]uriValue{c.Keys}
	for _, s := range c.Sockets {
		lists = append(lists, s.Keys)
	}
	for _, list := range lists {
		if list != nil {
			for _, u := range *list {
				all = append(all, u.URI)
			}
		}
	}
	for _, k := range c.KeyTables {
		if k.URI != nil {
			all = append(all, k.URI.URI)
		}
	}
	return all
}

// sources returns the URIs that say where a PIN comes from.
func (c *config) sources() []*pkcs11uri.URI {
	return slices.DeleteFunc(c.uris(), func(u *pkcs11uri.URI) bool { return u.PIN() == nil && u.PINSource == nil })
}

type pinentryConfig struct {
	Program string `toml:"program"`
	Grab    *bool  `toml:"grab"`
	// MoveAfter is how long a prompt stays with one client while another one waits.
	MoveAfter durationValue `toml:"move-after"`
}

// maxConfig is the most bytes that a configuration file may have.
const maxConfig = 1 << 20

// loadConfig reads the configuration. file is what --config says; empty: the
// file at its usual place, if there is one.
func loadConfig(file string) (*config, error) {
	optional := file == ""
	if optional {
		file = paths.ConfigFile()
	}
	c := &config{AllowModules: token.DefaultAllowList}
	if file == "" {
		return c, nil
	}
	b, mode, err := readConfig(file)
	if optional && errors.Is(err, fs.ErrNotExist) {
		return c, nil
	}
	if err != nil {
		return nil, err
	}
	defer clear(b) // it may hold a PIN
	c.path = file
	d := toml.NewDecoder(bytes.NewReader(b)).DisallowUnknownFields()
	if err := d.Decode(c); err != nil {
		return nil, explainTOML(file, b, err)
	}
	return c, c.check(mode)
}

// readConfig reads a file that may name programs and libraries to run: nobody
// else may be able to change it.
func readConfig(file string) ([]byte, fs.FileMode, error) {
	f, err := os.OpenFile(file, os.O_RDONLY|syscall.O_NONBLOCK, 0)
	if err != nil {
		return nil, 0, unreadable(file, err)
	}
	defer f.Close()
	st, err := f.Stat()
	if err != nil {
		return nil, 0, unreadable(file, err)
	}
	sys, ok := st.Sys().(*syscall.Stat_t)
	switch {
	case !ok || !st.Mode().IsRegular():
		return nil, 0, &configError{File: file, Text: "the configuration is not a regular file"}
	case sys.Uid != 0 && int(sys.Uid) != os.Geteuid():
		return nil, 0, &configError{
			File: file, Text: fmt.Sprintf("the configuration belongs to user %d", sys.Uid),
			Advice: "only your own files and root's are believed",
		}
	case st.Mode().Perm()&0o022 != 0:
		return nil, 0, &configError{
			File: file, Text: fmt.Sprintf("the configuration can be changed by others (mode %#o)", st.Mode().Perm()),
			Advice: "run: chmod go-w " + file,
		}
	case st.Size() > maxConfig:
		return nil, 0, &configError{File: file, Text: "the configuration is larger than 1 MiB"}
	}
	b := make([]byte, st.Size())
	n, err := f.ReadAt(b, 0)
	if n < len(b) {
		return nil, 0, unreadable(file, err)
	}
	return b, st.Mode(), nil
}
