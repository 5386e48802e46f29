package prompt

import (
	"cmp"
	"fmt"
	"slices"
	"strings"

	"p11-agent/agent/peer"
	"p11-agent/agent/request"
	"p11-agent/pinentry/plain"
	"p11-agent/token"
	"p11-agent/token/pin"
	"p11-agent/token/pkcs11uri"
	"p11-agent/token/wire"
)

// What prompts and notifications say of a request. The lines that a person needs
// to judge it come first, as a long text loses its end: pinentry takes some 990
// bytes.

// maxWords bounds a line of them, in bytes.
const maxWords = 200

// about joins lines. Each stays one, whatever is in it: a label must not make
// another that says what the key is for.
func about(lines ...[]string) string {
	var b strings.Builder
	for i, line := range slices.Concat(lines...) {
		if i > 0 {
			b.WriteByte('\n')
		}
		b.WriteString(plain.LineWithin(line, maxWords))
	}
	return b.String()
}

// maxNamed bounds what is shown of a label, in bytes, so that it begins and ends
// in one line of a terminal of the usual width.
const maxNamed = 48

// UseLines says what the key is used for; nothing where that is not known.
func UseLines(use *request.Use) []string {
	if use == nil {
		return nil
	}
	return use.Lines()
}

// TokenLine names a token. reader is where the token is, when another token of the same
// name is there as well.
func TokenLine(t wire.TokenID, reader string) string {
	serial := cmp.Or(plain.Name(t.Serial, maxNamed), "unknown")
	if reader != "" {
		serial += ", the one in reader " + plain.Name(reader, maxNamed)
	}
	return fmt.Sprintf("Token: %s (serial %s)", cmp.Or(plain.Name(t.Label, maxNamed), "without label"), serial)
}

// moduleLines name the module that gets the PIN, where the person needs to know it.
func moduleLines(about pin.Request) (lines []string) {
	if about.Module == "" {
		return nil
	}
	if about.Home != "" {
		lines = append(lines, "WARNING: another module shows this token than so far.",
			fmt.Sprintf("Module: %s (so far: %s)", plain.Name(about.Module, maxNamed), plain.Name(about.Home, maxNamed)))
	} else {
		lines = append(lines, "Module: "+plain.Name(about.Module, maxNamed))
	}
	var others []string
	for _, name := range about.Others {
		if name != about.Home {
			others = append(others, plain.Name(name, maxNamed))
		}
	}
	if len(others) > 0 {
		lines = append(lines, "The token is also shown by: "+strings.Join(others, ", "))
	}
	return lines
}

// Requester says which programs a request comes from, nearest first. They say of
// themselves what they are called, so a name that could pass for two is quoted.
func Requester(p peer.Peer) string {
	text := p.String() // where nothing is known of programs
	if p.Known && len(p.Chain) > 0 {
		var programs []string
		for _, link := range p.Chain {
			name := link.Name
			if strings.ContainsAny(name, " ,\"") {
				name = plain.QuotedName(name, maxNamed)
			}
			if len(programs) == 0 || programs[len(programs)-1] != name { // a shell that started a shell
				programs = append(programs, name)
			}
		}
		text = strings.Join(programs, ", started by ")
	}
	return "Requested by (unverified): " + text
}

// PINOf names the PIN that is asked for, in the first line of a prompt.
func PINOf(t wire.TokenID) string {
	if t.Label == "" {
		return "the PIN of a token without label"
	}
	return "the PIN of token " + plain.QuotedName(t.Label, maxNamed)
}

// useOf says what a confirmation is about, in the first line of a prompt. A line of its
// own names the key.
func useOf(k request.Key) string {
	key, ok := k.(*token.Key)
	switch {
	case !ok:
		return "the use of this key"
	case key.Token().Label == "":
		return "the use of this key of a token without label"
	}
	return "the use of this key of token " + plain.QuotedName(key.Token().Label, maxNamed)
}

// FewerTries is said where a token tells that the last PIN it was given was wrong. The
// question about the last try has words of its own.
const FewerTries = "A wrong PIN was entered earlier; fewer attempts remain."

// KeyLine names the key of a request to a person who sees the token as well: by
// its configured name, or by what is on the token. The serial number is with the
// token, and so left out of the URI.
func KeyLine(t wire.TokenID, label, uri string, id []byte, use *request.Use) string {
	if use != nil && use.Comment != uri {
		return commentLine(use.Comment)
	}
	key := pkcs11uri.ForKey(wire.TokenID{Label: t.Label}, "", id).String()
	if label != "" {
		key = plain.Name(label, maxNamed) + ", " + key
	}
	return "Key: " + key
}

// commentLine names a key by its comment, which the client that has added the key has
// chosen.
func commentLine(comment string) string { return "Key: " + plain.Name(comment, maxWords) }

// labelledLine is commentLine for a key that may be on a token. A comment that is the URI
// does not have the label of the key.
func labelledLine(k request.Key, comment string) string {
	if key, ok := k.(*token.Key); ok && key.Label() != "" && comment == key.URI() {
		return "Key: " + plain.Name(key.Label(), maxNamed) + ", " + comment
	}
	return commentLine(comment)
}
