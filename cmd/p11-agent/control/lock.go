package control

import (
	"context"
	"errors"
	"fmt"
	"io"

	"p11-agent/cmd/p11-agent/prompt"
	"p11-agent/cmd/p11-agent/status"
	"p11-agent/pinentry/secret"
)

// Lock reads a passphrase twice, and locks the agent with it.
func Lock(ctx context.Context, a *status.Agent, out io.Writer) error {
	if a.Report.Locked {
		return errors.New("the agent is locked already")
	}
	ask, err := prompt.OpenInput(false)
	if err != nil {
		return err
	}
	defer ask.Close()
	phrase, err := passphrase(ctx, ask, "Passphrase to lock the agent: ")
	if err != nil {
		return err
	}
	defer phrase.Wipe()
	again, err := ask.ReadSecret(ctx, "The same again: ")
	if err != nil {
		return err
	}
	defer again.Wipe()
	if !phrase.Equal(again) {
		return errors.New("the two passphrases differ: the agent is not locked")
	}
	ok, err := a.Lock(ctx, phrase)
	return locked(ctx, ok, err, out, "agent locked", "the agent has not locked itself: its log says why")
}

// Unlock reads the passphrase, and unlocks the agent with it.
func Unlock(ctx context.Context, a *status.Agent, out io.Writer) error {
	if !a.Report.Locked {
		return errors.New("the agent is not locked")
	}
	ask, err := prompt.OpenInput(false)
	if err != nil {
		return err
	}
	defer ask.Close()
	phrase, err := passphrase(ctx, ask, "Passphrase to unlock the agent: ")
	if err != nil {
		return err
	}
	defer phrase.Wipe()
	ok, err := a.Unlock(ctx, phrase)
	return locked(ctx, ok, err, out, "agent unlocked", "the agent is not unlocked: the passphrase is wrong")
}

// passphrase reads a passphrase that is not empty. The caller wipes it.
func passphrase(ctx context.Context, ask *prompt.Input, question string) (*secret.Secret, error) {
	phrase, err := ask.ReadSecret(ctx, question)
	if err != nil {
		return nil, err
	}
	if phrase.Len() == 0 {
		phrase.Wipe()
		return nil, errors.New("a lock needs a passphrase")
	}
	return phrase, nil
}

// locked prints what became of a lock, from the agent's answer.
func locked(ctx context.Context, ok bool, err error, out io.Writer, done, refused string) error {
	switch {
	case err != nil:
		return connectionEnded(ctx, err)
	case !ok:
		return errors.New(refused)
	}
	_, err = fmt.Fprintln(out, done)
	return err
}
