// Package control has a running agent log in, log out, lock and unlock, as a person at a terminal asks. It reads the PIN or the
// passphrase, and says what became of it. It tries no PIN twice.
package control

import (
	"context"
	"errors"
	"fmt"
	"io"
	"slices"
	"strings"

	"p11-agent/agent/sshagent"
	"p11-agent/cmd/p11-agent/exit"
	"p11-agent/cmd/p11-agent/named"
	"p11-agent/cmd/p11-agent/output"
	"p11-agent/cmd/p11-agent/prompt"
	"p11-agent/cmd/p11-agent/status"
	"p11-agent/pinentry/plain"
	"p11-agent/pinentry/secret"
	"p11-agent/token/module/undumpable"
	"p11-agent/token/wire"
)

// CheckURI finds a mistake in a URI that a person types, before the agent is asked: the agent could not tell it better. The
// URI may be empty, and has no PIN.
func CheckURI(text string) error {
	if text == "" {
		return nil
	}
	u, err := named.Parse(text)
	if err != nil {
		return err
	}
	defer u.Wipe()
	if u.PIN() != nil || u.PINSource != nil {
		return exit.Usage(errors.New("the URI says where the PIN comes from: here it is asked for, or read with --stdin"))
	}
	return nil
}

// Login logs in to the token that uri selects, or to the only one that needs a login if uri is "". It reads the PIN at the
// terminal, or from standard input with stdin. The agent asks by itself for a PIN on a card reader and for the last try.
func Login(ctx context.Context, a *status.Agent, uri string, stdin bool, out, stderr io.Writer) error {
	t, err := pickToken(a, uri, out)
	if err != nil || t == nil {
		return err
	}
	if uri == "" {
		uri = t.URI
	}
	if t.PIN == status.PINLocked {
		return fmt.Errorf("the PIN of %s is locked: unlock it with its PUK or SO PIN", plain.Line(t.Name()))
	}
	wanted := ""
	switch {
	case t.OnReader:
		wanted = "Enter " + prompt.PINOf(wire.TokenID{Label: t.Label}) + " on the card reader\n"
	case !stdin && t.PIN != status.PINLast:
		wanted = "Enter " + prompt.PINOf(wire.TokenID{Label: t.Label}) + "\n"
	}
	fmt.Fprintln(stderr, wanted+notes(t))
	var already bool
	switch {
	case t.OnReader:
		already, err = withoutPIN(ctx, a, uri)
	case t.PIN == status.PINLast && !stdin:
		// The agent asks the person itself: it does not trust this program about the last try.
		fmt.Fprintln(stderr, "The agent asks whether to use the last try, and then for the PIN, with pinentry.")
		already, err = withoutPIN(ctx, a, uri)
	default:
		already, err = withPIN(ctx, a, stdin, uri)
	}
	if err != nil {
		return err
	}
	what := "logged in to "
	if already {
		what = "already logged in to "
	}
	_, err = fmt.Fprintln(out, what+plain.Line(t.Name()))
	return err
}

// pickToken returns the token to log in to. It returns nil, after a line on out, if no token needs a login.
func pickToken(a *status.Agent, uri string, out io.Writer) (*status.Token, error) {
	if a.Report.Locked {
		return nil, errors.New("the agent is locked: p11-agent unlock opens it")
	}
	var waiting, done []status.Token
	for _, t := range a.Report.Tokens {
		switch {
		case !t.Present || t.Shadowed != "":
		case t.LoginNeeded && !t.LoggedIn:
			waiting = append(waiting, t)
		default:
			done = append(done, t)
		}
	}
	if uri == "" {
		// A token without keys is logged in to only if it is named.
		waiting = slices.DeleteFunc(waiting, func(t status.Token) bool { return len(t.Keys) == 0 })
	}
	names := func(tokens []status.Token) string {
		var all []string
		for _, t := range tokens {
			all = append(all, output.ShellWord(plain.Line(t.URI)))
		}
		return strings.Join(all, ", ")
	}
	switch {
	case len(waiting) == 1 && (uri == "" || len(done) == 0):
		return &waiting[0], nil
	case len(waiting) > 0 && uri == "":
		return nil, exit.Usage(fmt.Errorf("several tokens need a login, so name one: %s", names(waiting)))
	case len(waiting) > 0 || len(done) > 1 && uri != "":
		return nil, fmt.Errorf("%s selects several tokens, and a PIN is for one: %s", plain.Line(uri), names(append(waiting, done...)))
	case len(done) == 0 && uri != "":
		return nil, fmt.Errorf("no token that is present has a key that %s selects: see p11-agent list", plain.Line(uri))
	case len(done) == 0:
		return nil, errors.New("no token with a key is present: see p11-agent list")
	}
	for _, t := range done {
		what := "already logged in to " + t.Name()
		if !t.LoginNeeded {
			what = t.Name() + " needs no login"
		}
		if _, err := fmt.Fprintln(out, plain.Line(what)); err != nil {
			return nil, err
		}
	}
	return nil, nil
}

// notes says what a person should know before typing the PIN.
func notes(t *status.Token) string {
	about := "Token: " + plain.Line(t.Name())
	switch t.PIN {
	case status.PINLow:
		about += "\n" + prompt.FewerTries
	case status.PINLast:
		about += "\nNote: ONE TRY IS LEFT. A wrong PIN now locks the token."
	}
	if t.PromptOpen || t.LoginGoesOn {
		about += "\nNote: another prompt already asks for the PIN of this token. It comes first, for a while"
		if t.PromptAt != "" {
			about += ": " + plain.Line(t.PromptAt)
		}
		about += "."
	}
	return about
}

// withPIN reads the PIN, and logs in with it.
func withPIN(ctx context.Context, a *status.Agent, stdin bool, uri string) (already bool, err error) {
	ask, err := prompt.OpenInput(stdin)
	if err != nil {
		return false, err
	}
	defer ask.Close()
	pin, err := ask.ReadSecret(ctx, "PIN: ")
	if err != nil {
		return false, err
	}
	defer pin.Wipe()
	if pin.Len() == 0 {
		return false, errors.New("no PIN was given, and no PIN was tried")
	}
	return LoginWith(ctx, a, uri, pin)
}

// withoutPIN makes the agent ask for the PIN. This process holds no secret, and the agent finds its terminal only while it
// is dumpable.
func withoutPIN(ctx context.Context, a *status.Agent, uri string) (already bool, err error) {
	if err := undumpable.Suspend(); err != nil {
		return false, err
	}
	return LoginWith(ctx, a, uri, nil)
}

// LoginWith makes the agent log in with a PIN. Without one, the agent asks for it. already tells that the agent was logged in
// before. An error of several lines has what became of the tries.
func LoginWith(ctx context.Context, a *status.Agent, uri string, pin *secret.Secret) (already bool, err error) {
	answer, err := a.Login(ctx, uri, pin)
	if err != nil {
		return false, connectionEnded(ctx, err)
	}
	if answer.Error != "" {
		return false, refused(answer)
	}
	return answer.Already, nil
}

// refused says why there is no login, and what became of the tries.
func refused(a sshagent.ControlAnswer) error {
	text := plain.Line(a.Error)
	switch a.Tries {
	case status.PINLast:
		text += "\np11-agent: ONE TRY IS LEFT: p11-agent login asks whether to use it"
	case status.PINLow:
		text += "\np11-agent: fewer tries are left"
	}
	return errors.New(text)
}

// connectionEnded says why the agent did not answer.
func connectionEnded(ctx context.Context, err error) error {
	if ctx.Err() != nil {
		return context.Cause(ctx)
	}
	return fmt.Errorf("the agent %w", err)
}

// Logout makes the agent log out of the token that uri selects, or of all tokens if uri is "".
func Logout(ctx context.Context, a *status.Agent, uri string, out io.Writer) error {
	answer, err := a.Logout(ctx, uri)
	switch {
	case err != nil:
		return connectionEnded(ctx, err)
	case answer.Error != "":
		return errors.New(plain.Line(answer.Error))
	case uri == "":
		uri = "every token"
	}
	_, err = fmt.Fprintln(out, "logged out of "+plain.Line(uri))
	return err
}
