package agent

import "log/slog"

// Offers returns the identities that a Keyring with these Rules offers for keys of tokens,
// in the order of its list. No client has added or removed a key, and there are neither
// certificates nor keys in memory. Offers waits for no token.
//
// The Keyring itself answers, so no other code decides what the agent offers.
func Offers(tokens Tokens, rules Rules) []KeyStatus {
	return NewKeyring(Options{Tokens: tokens, Rules: rules, Log: slog.New(slog.DiscardHandler)}).Now().Keys
}
