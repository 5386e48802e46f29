// Package config reads the configuration file, p11-agent.toml(5), and says what it means
// for each other room: which keys the agent offers, what it asks about, how long it keeps
// PINs, which modules it starts. An unknown key, an unknown value and a value that another
// value contradicts are errors with their place and the next step. No error quotes a value
// that may hold a PIN. The package starts nothing and asks no questions.
package config

import (
	"bytes"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"slices"
	"syscall"

	"github.com/pelletier/go-toml/v2"

	"p11-agent/agent/approval"
	"p11-agent/cmd/p11-agent/paths"
	"p11-agent/token"
	"p11-agent/token/objects"
	"p11-agent/token/pkcs11uri"
	"p11-agent/token/selection"
)

// A File is the configuration file. A nil pointer stands for a key that the file does not have.
type File struct {
	// Which keys the agent offers.
	Keys          *[]KeyURI  `toml:"keys"` // nil: every key; empty: no key
	KeyTables     []KeyTable `toml:"key"`
	Absent        string     `toml:"absent"`
	RememberKeys  *bool      `toml:"remember-keys"`
	SoftwareKeys  *bool      `toml:"software-keys"`
	Certificates  string     `toml:"certificates"`
	Upstream      []string   `toml:"upstream"`
	InsertTimeout Duration   `toml:"insert-timeout"`

	// Where tokens come from, and when logins end.
	Modules      []ModuleTable `toml:"module"`
	AllowModules []string      `toml:"allow-modules"`
	RemoteTokens bool          `toml:"remote-tokens"`
	ForgetOn     ForgetOn      `toml:"forget-on"`

	// When and where the agent asks a person.
	Confirm        approval.Confirm `toml:"confirm"`
	ConfirmTimeout Duration         `toml:"confirm-timeout"`
	ConfirmPlace   ConfirmPlace     `toml:"confirm-place"`
	KnownHosts     []string         `toml:"known-hosts"` // nil: the files of ssh
	Pinentry       PinentryTable    `toml:"pinentry"`
	TouchNotice    NoticeAfter      `toml:"touch-notice"`
	FailureNotice  *bool            `toml:"failure-notice"`

	Sockets []SocketTable `toml:"socket"`

	path       string              // "": there is no file
	publicKeys []objects.PublicKey // of KeyTables
}

// Path returns the path of the file, or "" without a file.
func (c *File) Path() string { return c.path }

// PublicKeys returns the public keys that [[key]] tables give to keys.
func (c *File) PublicKeys() []objects.PublicKey { return c.publicKeys }

// KnownKeys returns what a program does with the list of the keys that the agent has seen:
// otherwise, unless the configuration switches the list off.
func (c *File) KnownKeys(otherwise token.KnownKeys) token.KnownKeys {
	if c.RememberKeys != nil && !*c.RememberKeys {
		return token.KnownIgnored
	}
	return otherwise
}

// URIs returns every URI of the configuration.
func (c *File) URIs() []*pkcs11uri.URI {
	var all []*pkcs11uri.URI
	lists := []*[]KeyURI{c.Keys}
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

// PINSources returns the URIs that say where a PIN comes from.
func (c *File) PINSources() []*pkcs11uri.URI {
	return slices.DeleteFunc(c.URIs(), func(u *pkcs11uri.URI) bool { return u.PIN() == nil && u.PINSource == nil })
}

// A PinentryTable says how prompts appear.
type PinentryTable struct {
	Program string `toml:"program"`
	Grab    *bool  `toml:"grab"`
	// MoveAfter is how long a prompt stays with one client while another client waits.
	MoveAfter Duration `toml:"move-after"`
}

// maxSize is how many bytes the file has at most.
const maxSize = 1 << 20

// Load reads a configuration file. When file is empty, it reads the user's file, which may be
// missing. An error is an *Error, or several joined.
func Load(file string) (*File, error) {
	optional := file == ""
	if optional {
		file = paths.ConfigFile()
	}
	c := &File{AllowModules: selection.DefaultAllowList}
	if file == "" {
		return c, nil
	}
	b, mode, err := readFile(file)
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

// readFile reads the file and returns its mode. The file may name programs and libraries that
// the agent runs: it refuses a file that another user can change.
func readFile(file string) ([]byte, fs.FileMode, error) {
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
		return nil, 0, &Error{File: file, Text: "the configuration is not a regular file"}
	case sys.Uid != 0 && int(sys.Uid) != os.Geteuid():
		return nil, 0, &Error{
			File: file, Text: fmt.Sprintf("the configuration belongs to user %d", sys.Uid),
			Advice: "only your own files and root's are believed",
		}
	case st.Mode().Perm()&0o022 != 0:
		return nil, 0, &Error{
			File: file, Text: fmt.Sprintf("the configuration can be changed by others (mode %#o)", st.Mode().Perm()),
			Advice: "run: chmod go-w " + file,
		}
	case st.Size() > maxSize:
		return nil, 0, &Error{File: file, Text: "the configuration is larger than 1 MiB"}
	}
	b := make([]byte, st.Size())
	n, err := f.ReadAt(b, 0)
	if n < len(b) {
		return nil, 0, unreadable(file, err)
	}
	return b, st.Mode(), nil
}
