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

// This file has the lines that prompts and notifications show of a request. The lines that a
// person needs for the decision come first: pinentry cuts a text after some 990 bytes.

// maxWords limits a line, in bytes.
const maxWords = 200

// about joins lines. Each stays one line: a label cannot add a line about the use of the key.
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

// maxNamed limits a label, in bytes, so that it fits into one line of a usual terminal.
const maxNamed = 48

// UseLines returns the lines about the use of a key, or nil when the use is not known.
func UseLines(use *request.Use) []string {
	if use == nil {
		return nil
	}
	return use.Lines()
}

// TokenLine names a token. reader is its reader when another token has the same name, or "".
func TokenLine(t wire.TokenID, reader string) string {
	serial := cmp.Or(plain.Name(t.Serial, maxNamed), "unknown")
	if reader != "" {
		serial += ", the one in reader " + plain.Name(reader, maxNamed)
	}
	return fmt.Sprintf("Token: %s (serial %s)", cmp.Or(plain.Name(t.Label, maxNamed), "without label"), serial)
}

// moduleLines name the module that gets the PIN, when the person needs to know it.
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

// Requester names the programs that a request comes from, nearest first. Programs choose their
// names, so Requester quotes a name that could pass for two.
func Requester(p peer.Peer) string {
	text := p.String() // when no program is known
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

// PINOf names the PIN of a token, in the first line of a prompt.
func PINOf(t wire.TokenID) string {
	if t.Label == "" {
		return "the PIN of a token without label"
	}
	return "the PIN of token " + plain.QuotedName(t.Label, maxNamed)
}

// useOf names the use of a key, in the first line of a question for consent. Another line names
// the key.
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

// FewerTries is the line for a token that reports a wrong PIN. The question about the last try
// has its own words.
const FewerTries = "A wrong PIN was entered earlier; fewer attempts remain."

// KeyLine names the key of a request: by its configured name, or by label and URI. The URI has
// no serial number, because TokenLine has it.
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

// commentLine names a key by its comment. The client that adds a key chooses the comment.
func commentLine(comment string) string { return "Key: " + plain.Name(comment, maxWords) }

// labelledLine is commentLine for a key that may be on a token. It adds the label when the
// comment is the URI.
func labelledLine(k request.Key, comment string) string {
	if key, ok := k.(*token.Key); ok && key.Label() != "" && comment == key.URI() {
		return "Key: " + plain.Name(key.Label(), maxNamed) + ", " + comment
	}
	return commentLine(comment)
}
