package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"slices"
	"strings"

	"github.com/spf13/cobra"

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

func newLoginCommand() *cobra.Command {
	var stdin bool
	var socket string
	cmd := &cobra.Command{
		Use:   "login [flags] [URI]",
		Short: "Log in to a token, at this terminal",
		Long: `Log in to the token that a pkcs11: URI or its label names, so that its keys sign
without asking. The PIN is asked for at this terminal, which works where no pinentry
can show anything. The URI can be left out when one token only needs a login.

A wrong PIN is not asked for again. When one try is left, the agent asks whether to
use it, and for the PIN, with pinentry: on the desktop, or else at this terminal.`,
		Args:              optionalURI,
		ValidArgsFunction: completeTokens(func(t status.Token) bool { return t.Present && t.LoginNeeded && !t.LoggedIn }),
		RunE: func(cmd *cobra.Command, args []string) error {
			return runLogin(cmd.Context(), socket, stdin, argument(args), cmd.OutOrStdout())
		},
	}
	cmd.Flags().BoolVar(&stdin, "stdin", false, "read the PIN from standard input, one line")
	addSocketFlag(cmd, &socket)
	return cmd
}

func newLogoutCommand() *cobra.Command {
	var socket string
	cmd := &cobra.Command{
		Use:   "logout [flags] [URI]",
		Short: "Log out of a token, or of all",
		Long: `Log out of the token that a pkcs11: URI or its label names, or of all, and forget the PIN if it
is kept: the next signature asks for it.`,
		Args:              optionalURI,
		ValidArgsFunction: completeTokens(func(t status.Token) bool { return t.LoggedIn || t.PINKept }),
		RunE: func(cmd *cobra.Command, args []string) error {
			return runLogout(cmd.Context(), socket, argument(args), cmd.OutOrStdout())
		},
	}
	addSocketFlag(cmd, &socket)
	return cmd
}

func newLockCommand() *cobra.Command {
	var socket string
	cmd := &cobra.Command{
		Use:   "lock",
		Short: "Lock the agent with a passphrase",
		Long: `Lock the running agent, as ssh-add -x does: it shows nothing, signs nothing and is
logged out of every token until it is unlocked with the same passphrase.`,
		Args: noArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			return runLock(cmd.Context(), socket, true, cmd.OutOrStdout())
		},
	}
	addSocketFlag(cmd, &socket)
	return cmd
}

func newUnlockCommand() *cobra.Command {
	var socket string
	cmd := &cobra.Command{
		Use:   "unlock",
		Short: "Unlock the agent",
		Long:  `Unlock the running agent with the passphrase that it was locked with.`,
		Args:  noArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			return runLock(cmd.Context(), socket, false, cmd.OutOrStdout())
		},
	}
	addSocketFlag(cmd, &socket)
	return cmd
}

func optionalURI(_ *cobra.Command, args []string) error {
	if len(args) > 1 {
		return exit.Usage(errors.New("only one URI can be given"))
	}
	return checkURI(argument(args))
}

func argument(args []string) string {
	if len(args) == 0 {
		return ""
	}
	return args[0]
}

// checkURI finds what is wrong with a URI before an agent is asked, which could tell
// no better.
func checkURI(text string) error {
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

// pickToken returns the token to log in to; nil: nothing is to be done.
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
		// None is chosen that has no keys.
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

func runLogin(ctx context.Context, socket string, stdin bool, uri string, out io.Writer) error {
	a, err := status.Find(ctx, socket, uri)
	if err != nil {
		return err
	}
	defer a.Close()
	if a.Note != "" {
		fmt.Fprintln(os.Stderr, a.Note)
	}
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
	fmt.Fprintln(os.Stderr, wanted+loginNotes(t))
	var answer sshagent.ControlAnswer
	switch {
	case t.OnReader:
		answer, err = loginWithoutPIN(ctx, a, uri)
	case t.PIN == status.PINLast && !stdin:
		// The agent does not believe this program that a person wants it.
		fmt.Fprintln(os.Stderr, "The agent asks whether to use the last try, and then for the PIN, with pinentry.")
		answer, err = loginWithoutPIN(ctx, a, uri)
	default:
		answer, err = loginWithPIN(ctx, a, stdin, uri)
	}
	if err != nil {
		return err
	}
	if answer.Error != "" {
		return loginRefused(answer)
	}
	what := "logged in to "
	if answer.Already {
		what = "already logged in to "
	}
	_, err = fmt.Fprintln(out, what+plain.Line(t.Name()))
	return err
}

// loginNotes says what a person should know before the PIN is asked for.
func loginNotes(t *status.Token) string {
	about := "Token: " + plain.Line(t.Name())
	switch t.PIN {
	case status.PINLow:
		about += "\n" + prompt.FewerTries
	case status.PINLast:
		about += "\nNote: ONE TRY IS LEFT. A wrong PIN now locks the token."
	}
	if t.PromptOpen || t.LoginGoesOn {
		about += "\nNote: somebody is being asked for the PIN of this token already, and that comes first, for a while"
		if t.PromptAt != "" {
			about += ": " + plain.Line(t.PromptAt)
		}
		about += "."
	}
	return about
}

// loginWithPIN reads the PIN and has it tried.
func loginWithPIN(ctx context.Context, a *status.Agent, stdin bool, uri string) (none sshagent.ControlAnswer, err error) {
	ask, err := prompt.OpenInput(stdin)
	if err != nil {
		return none, err
	}
	defer ask.Close()
	pin, err := ask.ReadSecret(ctx, "PIN: ")
	if err != nil {
		return none, err
	}
	defer pin.Wipe()
	if pin.Len() == 0 {
		return none, errors.New("no PIN was given, and none tried")
	}
	return logIn(ctx, a, uri, pin)
}

// loginWithoutPIN has the agent ask. This process holds no secret, and the agent finds
// its terminal only while it is dumpable.
func loginWithoutPIN(ctx context.Context, a *status.Agent, uri string) (sshagent.ControlAnswer, error) {
	if err := undumpable.Suspend(); err != nil {
		return sshagent.ControlAnswer{}, err
	}
	return logIn(ctx, a, uri, nil)
}

func logIn(ctx context.Context, a *status.Agent, uri string, pin *secret.Secret) (sshagent.ControlAnswer, error) {
	answer, err := a.Login(ctx, uri, pin)
	if err != nil {
		return sshagent.ControlAnswer{}, connectionEnded(ctx, err)
	}
	return answer, nil
}

// loginRefused says what became of a PIN, and of the tries.
func loginRefused(a sshagent.ControlAnswer) error {
	text := plain.Line(a.Error)
	switch status.PIN(a.Tries) {
	case status.PINLast:
		text += "\np11-agent: ONE TRY IS LEFT: p11-agent login asks whether to use it"
	case status.PINLow:
		text += "\np11-agent: fewer tries are left"
	}
	return errors.New(text)
}

// connectionEnded says why there is no answer.
func connectionEnded(ctx context.Context, err error) error {
	if ctx.Err() != nil {
		return context.Cause(ctx)
	}
	return fmt.Errorf("the agent %w", err)
}

func runLogout(ctx context.Context, socket, uri string, out io.Writer) error {
	a, err := status.Find(ctx, socket, "")
	if err != nil {
		return err
	}
	defer a.Close()
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

func runLock(ctx context.Context, socket string, lock bool, out io.Writer) error {
	a, err := status.Find(ctx, socket, "")
	if err != nil {
		return err
	}
	defer a.Close()
	switch {
	case lock && a.Report.Locked:
		return errors.New("the agent is locked already")
	case !lock && !a.Report.Locked:
		return errors.New("the agent is not locked")
	}
	ask, err := prompt.OpenInput(false)
	if err != nil {
		return err
	}
	defer ask.Close()
	prompt := "Passphrase to unlock the agent: "
	if lock {
		prompt = "Passphrase to lock the agent: "
	}
	phrase, err := ask.ReadSecret(ctx, prompt)
	if err != nil {
		return err
	}
	defer phrase.Wipe()
	if phrase.Len() == 0 {
		return errors.New("a lock needs a passphrase")
	}
	do, done := a.Unlock, "agent unlocked"
	if lock {
		again, err := ask.ReadSecret(ctx, "The same again: ")
		if err != nil {
			return err
		}
		defer again.Wipe()
		if !phrase.Equal(again) {
			return errors.New("the two are not the same: the agent is not locked")
		}
		do, done = a.Lock, "agent locked"
	}
	ok, err := do(ctx, phrase)
	switch {
	case err != nil:
		return connectionEnded(ctx, err)
	case !ok && !lock:
		return errors.New("the agent is not unlocked: the passphrase is wrong")
	case !ok:
		return errors.New("the agent has not locked itself: its log says why")
	}
	_, err = fmt.Fprintln(out, done)
	return err
}
