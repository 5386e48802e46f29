package config

import (
	"errors"
	"fmt"
	"path/filepath"
	"strings"

	"p11-agent/agent/request"
	"p11-agent/cmd/p11-agent/paths"
)

// SocketTable adds a socket with rules of its own.
type SocketTable struct {
	Name     string    `toml:"name"`
	Path     string    `toml:"path"`
	Keys     *[]KeyURI `toml:"keys"`
	Confirm  bool      `toml:"confirm"`
	ReadOnly *bool     `toml:"read-only"` // nil: if it limits something
}

// SocketPath returns where the socket is: beside that of an agent which has a directory
// of its own, own, or else in the one that all know.
func (s SocketTable) SocketPath(own string) (string, error) {
	if s.Path != "" {
		return s.Path, nil
	}
	if own != "" {
		return filepath.Join(own, s.Name+".sock"), nil
	}
	if path := paths.RuntimeSocket(s.Name); path != "" {
		return path, nil
	}
	return "", errors.New("XDG_RUNTIME_DIR is not set: give the socket a path")
}

// readOnly tells whether keys can only be used there. A socket that shows some keys, or
// has their use confirmed, is for others, who are to change nothing.
func (s SocketTable) readOnly() bool {
	if s.ReadOnly != nil {
		return *s.ReadOnly
	}
	return s.Keys != nil || s.Confirm
}

// Rules returns what the keyring is to keep.
func (s SocketTable) Rules() *request.Socket {
	return &request.Socket{Name: s.Name, Only: certainly(s.Keys), Confirm: s.Confirm, ReadOnly: s.readOnly()}
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
		names[s.Name], taken[s.Path] = true, true
	}
	return nil
}
