package config

import (
	"errors"
	"fmt"
	"path/filepath"
	"slices"
	"strings"

	"p11-agent/agent/approval"
	"p11-agent/agent/request"
	"p11-agent/cmd/p11-agent/output"
	"p11-agent/cmd/p11-agent/paths"
)

// A SocketTable adds a socket with rules of its own.
type SocketTable struct {
	Name     string         `toml:"name"`
	Path     string         `toml:"path"`
	Keys     *[]KeyURI      `toml:"keys"`
	Confirm  *SocketConfirm `toml:"confirm"`   // nil: never
	ReadOnly *bool          `toml:"read-only"` // nil: true if keys or confirm limits the socket
}

// A SocketConfirm says when a person is asked at a socket. It has the values that confirm of
// a key has, and the older ones: true is "always", false is "never".
type SocketConfirm any

// confirm returns what the table says of confirm, and "" for never.
func (s SocketTable) confirm() approval.Confirm {
	if s.Confirm == nil {
		return ""
	}
	switch v := (*s.Confirm).(type) {
	case bool:
		if v {
			return approval.ConfirmAlways
		}
	case string:
		if v != string(approval.ConfirmNever) {
			return approval.Confirm(v)
		}
	}
	return ""
}

// checkConfirm finds a value that confirm does not have.
func (s SocketTable) checkConfirm() error {
	if s.Confirm == nil {
		return nil
	}
	what := fmt.Sprintf("confirm of the socket %q", s.Name)
	switch v := (*s.Confirm).(type) {
	case bool:
		return nil
	case string:
		if slices.Contains(keyConfirms, approval.Confirm(v)) {
			return nil
		}
		return unknownValue(what, approval.Confirm(v), keyConfirms)
	}
	return &valueError{text: fmt.Sprintf("%s has to be %s", what, output.OneOf(keyConfirms))}
}

// SocketPath returns the path of the socket. Without a path in the table, the socket is in
// privateDir, or in the runtime directory when privateDir is empty.
func (s SocketTable) SocketPath(privateDir string) (string, error) {
	if s.Path != "" {
		return s.Path, nil
	}
	if privateDir != "" {
		return filepath.Join(privateDir, s.Name+".sock"), nil
	}
	if path := paths.RuntimeSocket(s.Name); path != "" {
		return path, nil
	}
	return "", errors.New("XDG_RUNTIME_DIR is not set: give the socket a path")
}

// readOnly tells whether clients of the socket can use keys only. A socket that shows some
// keys, or asks before it uses them, is for other users and programs: by default these
// change nothing.
func (s SocketTable) readOnly() bool {
	if s.ReadOnly != nil {
		return *s.ReadOnly
	}
	return s.Keys != nil || s.confirm() != ""
}

// Rules returns the limits of the socket for the keyring.
func (s SocketTable) Rules() *request.Socket {
	return &request.Socket{Name: s.Name, Only: certainly(s.Keys), Confirm: s.confirm(), ReadOnly: s.readOnly()}
}

// checkSockets finds mistakes in the tables of sockets.
func (c *File) checkSockets() error {
	names, taken := make(map[string]bool), make(map[string]bool)
	for i := range c.Sockets {
		s := &c.Sockets[i]
		s.Path = paths.ExpandHome(s.Path)
		switch {
		case s.Name == "":
			return fmt.Errorf("[[socket]] table %d has no name", i+1)
		case strings.ContainsAny(s.Name, "/\x00") || s.Name[0] == '.' || s.Name == "agent":
			return fmt.Errorf("[[socket]]: %q cannot be the name of a socket", s.Name)
		case names[s.Name] || s.Path != "" && taken[s.Path]:
			return fmt.Errorf("[[socket]]: %q is there twice", s.Name)
		case s.Path != "" && !filepath.IsAbs(s.Path):
			return fmt.Errorf("[[socket]]: the path %q is not absolute", s.Path)
		}
		if err := s.checkConfirm(); err != nil {
			return err
		}
		names[s.Name], taken[s.Path] = true, true
	}
	return nil
}
