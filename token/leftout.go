package token

import (
	"errors"
	"fmt"

	"p11-agent/token/pairs"
	"p11-agent/token/process"
	"p11-agent/token/wire"
)

// leftOut counts what a look at a token leaves out because of a bound.
type leftOut struct {
	objects      bool // some are not read
	long         int  // certificates
	texts        int  // objects
	keys         int
	certificates int // of keys, that are not kept
}

// listed counts what the module process has left out.
func (l *leftOut) listed(all *process.Listing) { l.objects, l.long = all.Cut, all.Long }

// skipped counts an object that package pairs does not use.
func (l *leftOut) skipped(reason error) {
	if errors.Is(reason, pairs.ErrLongText) {
		l.texts++
	}
}

// reasons returns sentences for a person.
func (l *leftOut) reasons() (all []string) {
	note := func(is bool, format string, args ...any) {
		if is {
			all = append(all, fmt.Sprintf(format, args...))
		}
	}
	note(l.objects, "objects of the token: %d of them and %d MiB are read at the most; to have a key found all the same, name it by its id or object in keys",
		wire.MaxObjects, wire.MaxObjectBytes>>20)
	note(l.keys > 0, "%s: of one module %d keys and %d MiB are used at the most; to have a key used, name it by its id or object in keys",
		count(l.keys, "key"), maxModuleKeys, maxKeyBytes>>20)
	note(l.long > 0, "%s: 1 MiB of each is read at the most", count(l.long, "certificate"))
	note(l.texts > 0, "%s: an ID or a label has %d bytes at the most", count(l.texts, "object"), pairs.MaxText)
	note(l.certificates > 0, "%s of keys: there is room for %d MiB; the keys are used without them", count(l.certificates, "certificate"), maxKeyBytes>>20)
	return all
}

// tokensLeftOut counts what a look at a module leaves out because of a bound.
type tokensLeftOut struct {
	tokens int
	unread int // tokens whose objects are not read
}

// reasons returns sentences for a person.
func (l *tokensLeftOut) reasons() (all []string) {
	if l.tokens > 0 {
		all = append(all, fmt.Sprintf("%s: %d tokens of one module are used at the most", count(l.tokens, "token"), maxTokens))
	}
	if l.unread > 0 {
		all = append(all, fmt.Sprintf("the objects of %s: %d MiB of one module are read at the most", count(l.unread, "token"), maxLook>>20))
	}
	return all
}

// count prints a number of things.
func count(n int, what string) string {
	if n == 1 {
		return "1 " + what
	}
	return fmt.Sprintf("%d %ss", n, what)
}
