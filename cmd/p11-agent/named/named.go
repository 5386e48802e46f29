// Package named reads what a person types for a token or a key: a pkcs11: URI, or the label of a token. For a name
// that is wrong or selects nothing, it suggests what was meant and says what is there. It never repeats a text that
// may hold a PIN.
package named

import (
	"errors"
	"fmt"
	"io"
	"os"
	"slices"
	"strings"

	"p11-agent/cmd/p11-agent/exit"
	"p11-agent/cmd/p11-agent/output"
	"p11-agent/token"
	"p11-agent/token/pkcs11uri"
)

// Parse reads the argument of a command: a URI, or the label of a token. Its errors are mistakes on the command line.
// The caller wipes the URI.
func Parse(text string) (*pkcs11uri.URI, error) {
	u, err := pkcs11uri.ParseNamed([]byte(text))
	if err == nil {
		if err = u.CheckNames(); err == nil {
			return u, nil
		}
		u.Wipe()
	}
	return nil, exit.Usage(exit.WithHint(err, meantText(text)))
}

// meantText suggests the URI that a wrong text probably means. It suggests nothing for a text that may hold a PIN.
func meantText(text string) string {
	if text == "" || strings.Contains(strings.ToLower(text), "pin") {
		return ""
	}
	fits := func(meant string) bool {
		u, err := pkcs11uri.Parse(meant)
		return err == nil && u.CheckNames() == nil
	}
	// A line of ssh-add -l or list --public has the URI as a word.
	for _, word := range strings.Fields(text) {
		if word != text && pkcs11uri.IsURI([]byte(word)) && fits(word) {
			return fmt.Sprintf("did you mean %s?", output.ShellWord(word))
		}
	}
	rest := text
	if pkcs11uri.IsURI([]byte(text)) {
		rest = text[len("pkcs11:"):]
		if meant := "pkcs11:token=" + rest; !strings.Contains(rest, "=") && fits(meant) {
			return fmt.Sprintf("did you mean %s?", output.ShellWord(meant))
		}
		return ""
	}
	// The scheme is missing, or mistyped.
	if before, after, found := strings.Cut(rest, ":"); found && !strings.Contains(before, "=") {
		rest = after
	}
	if meant := "pkcs11:" + strings.TrimLeft(rest, "/"); fits(meant) {
		return fmt.Sprintf("did you mean %s?", output.ShellWord(meant))
	}
	return ""
}

// WithSuggestions adds a hint to an error that wraps [token.ErrNoMatch]: what the URI probably means, and what the
// tokens have. It returns other errors as they are.
func WithSuggestions(err error, store *token.Store, u *pkcs11uri.URI) error {
	if !errors.Is(err, token.ErrNoMatch) {
		return err
	}
	meant, there := Suggest(store, u)
	return exit.WithHint(err, strings.Join(append(meant, there), "\n"))
}

// Suggest returns what a URI that matches nothing may mean, and a sentence about the keys or tokens that are present.
func Suggest(store *token.Store, u *pkcs11uri.URI) (meant []string, there string) {
	var labels, objects, keys, matched []string
	var ids [][]byte
	for _, m := range store.Modules() {
		for _, t := range m.Tokens {
			labels = append(labels, t.ID.Label)
			if t.Shadowed == "" && u.MatchToken(t.ID) {
				matched = append(matched, t.ID.Label)
			}
			for _, k := range t.Keys {
				objects, ids = append(objects, k.Label()), append(ids, k.ID())
				if t.Shadowed == "" && u.MatchToken(t.ID) {
					keys = append(keys, fmt.Sprintf("%q (id=%s)", k.Label(), pkcs11uri.FormatID(k.ID())))
				}
			}
		}
	}
	add := func(format string, args ...any) {
		meant = append(meant, fmt.Sprintf("did you mean "+format+"?", args...))
	}
	attribute := func(near *pkcs11uri.URI) string { return strings.TrimPrefix(near.String(), "pkcs11:") }
	if u.Token != nil && !slices.Contains(labels, *u.Token) {
		if s := pkcs11uri.Nearest(*u.Token, labels); s != "" {
			add("%s", attribute(&pkcs11uri.URI{Token: &s}))
		} else if slices.Contains(objects, *u.Token) {
			add("%s, as the label of a key", output.ShellWord((&pkcs11uri.URI{Object: u.Token}).String()))
		}
	}
	if u.Object != nil && !slices.Contains(objects, *u.Object) {
		if s := pkcs11uri.Nearest(*u.Object, objects); s != "" {
			add("%s", attribute(&pkcs11uri.URI{Object: &s}))
		} else if slices.Contains(labels, *u.Object) {
			add("%s, as the label of a token", output.ShellWord((&pkcs11uri.URI{Token: u.Object}).String()))
		}
	}
	if id := pkcs11uri.MeantID(u.ID); id != nil && !slices.ContainsFunc(ids, func(there []byte) bool { return slices.Equal(there, u.ID) }) {
		add("id=%s", pkcs11uri.FormatID(id))
	}
	switch {
	case len(labels) == 0:
		there = "insert the token: no token is present"
	case len(keys) > 0 && len(matched) == 1:
		there = fmt.Sprintf("token %q has: %s", matched[0], some(keys))
	case len(keys) > 0:
		there = "keys that are present: " + some(keys)
	default:
		for i, l := range labels {
			labels[i] = fmt.Sprintf("%q", l)
		}
		slices.Sort(labels)
		there = "tokens that are present: " + some(slices.Compact(labels))
	}
	return meant, there
}

// some joins the first of many names.
func some(names []string) string {
	const most = 8
	if more := len(names) - most; more > 0 {
		return strings.Join(names[:most], ", ") + fmt.Sprintf(" and %d more: see p11-agent list", more)
	}
	return strings.Join(names, ", ")
}

// NoteUnquoted says how to quote a URI, if a shell may have cut this one off at its first ";". Such a URI is the last
// word of the command line, and has one attribute.
func NoteUnquoted(stderr io.Writer, text string) {
	if text != os.Args[len(os.Args)-1] || !pkcs11uri.IsURI([]byte(text)) || strings.Count(text, "=") != 1 || strings.ContainsAny(text, ";?") {
		return
	}
	fmt.Fprintln(stderr, `note: if the URI goes on after a ";", quote the whole URI: a shell ends the command at a ";"`)
}
