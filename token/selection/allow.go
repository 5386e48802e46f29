package selection

import (
	"errors"
	"fmt"
	"io/fs"
	"path/filepath"
	"strings"

	"p11-agent/agent/pattern"
)

// An AllowList says which module files a client may name. It has patterns of paths: * stands for
// any run of characters, slashes too, and ? for any one character. A pattern with ! in front
// forbids the files that it matches. ssh-agent -P takes the same patterns, separated by commas.
type AllowList []string

// DefaultAllowList is the default of ssh-agent -P.
var DefaultAllowList = AllowList{"/usr/lib*/*", "/usr/local/lib*/*"}

// ParseAllowList reads the argument of -P: patterns separated by commas.
func ParseAllowList(s string) AllowList {
	return strings.FieldsFunc(s, func(r rune) bool { return r == ',' })
}

// Resolve returns the file that path leads to, with all links followed, when
// the list allows it.
func (a AllowList) Resolve(path string) (string, error) {
	if !filepath.IsAbs(path) {
		return "", errors.New("a module is named by an absolute path")
	}
	real, err := filepath.EvalSymlinks(path)
	if err != nil {
		// The error leaves out the path, which may be a mistyped URI with a PIN.
		if p, ok := errors.AsType[*fs.PathError](err); ok {
			err = p.Err
		}
		return "", fmt.Errorf("module file: %w", err)
	}
	allowed := false
	for _, p := range a {
		if forbidden, no := strings.CutPrefix(p, "!"); no {
			if pattern.Match(forbidden, real) {
				return "", fmt.Errorf("module %s is forbidden by the pattern %q of allow-modules or -P", real, p)
			}
		} else if pattern.Match(p, real) {
			allowed = true
		}
	}
	if !allowed {
		return "", fmt.Errorf("module %s is not in the list of allowed modules (allow-modules, -P)", real)
	}
	return real, nil
}
