package systemd

import (
	"bytes"
	"embed"
	"errors"
	"fmt"
	"path/filepath"
	"strings"
	"unicode"
	"unicode/utf8"
)

//go:embed units
var units embed.FS

// The names of the files for systemd and ssh, for Shipped. Comments in the files give
// their purpose and the reasons for their settings.
const (
	UserSocket    = "user/p11-agent.socket"
	UserService   = "user/p11-agent.service"
	Environment   = "user/environment.conf" // for environment.d(5)
	SSHConfig     = "user/ssh_config"       // for ssh_config(5)
	SystemSocket  = "system/p11-agent@.socket"
	SystemService = "system/p11-agent@.service"
	Sysusers      = "system/sysusers.conf" // for sysusers.d(5)
)

// packagedProgram is where packages put the program.
const packagedProgram = "/usr/bin/p11-agent"

// Shipped returns the text of one of the files above. program is the absolute path of the program
// that the file starts. Empty means the path of packages. The error says what is wrong with
// program.
func Shipped(name, program string) ([]byte, error) {
	text, err := units.ReadFile("units/" + name)
	if err != nil {
		return nil, err
	}
	if program == "" || program == packagedProgram {
		return text, nil
	}
	word, err := quoteProgram(program)
	if err != nil {
		return nil, err
	}
	return bytes.ReplaceAll(text, []byte("\nExecStart="+packagedProgram+" "), []byte("\nExecStart="+word+" ")), nil
}

// quoteProgram writes a path as the first word of ExecStart= (systemd.service(5), COMMAND LINES,
// and systemd.syntax(7), QUOTING). systemd expands no variables in that word.
func quoteProgram(path string) (string, error) {
	switch {
	case !filepath.IsAbs(path) || filepath.Clean(path) != path:
		return "", fmt.Errorf("%q is not an absolute path in its shortest form", path)
	case !utf8.ValidString(path):
		return "", fmt.Errorf("%q is not UTF-8, which systemd refuses", path)
	case strings.ContainsFunc(path, unicode.IsControl):
		return "", errors.New("the path has control characters in it")
	case strings.ContainsAny(path, `"'\\`):
		return "", fmt.Errorf("%q has quotes or backslashes in it: systemd starts no such program", path)
	}
	plain := func(r rune) bool {
		return r >= 'a' && r <= 'z' || r >= 'A' && r <= 'Z' || r >= '0' && r <= '9' || strings.ContainsRune("/._-+", r)
	}
	if strings.IndexFunc(path, func(r rune) bool { return !plain(r) }) < 0 {
		return path, nil
	}
	return `"` + strings.ReplaceAll(path, "%", "%%") + `"`, nil
}
