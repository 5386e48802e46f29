package approval

import "context"

// An Inserter asks a person to insert a token.
type Inserter interface {
	// Insert asks the person for the token until ctx ends, which is an error. It returns
	// true when the person says that the token is in, and false when the person declines.
	// ErrNoToAll stands for "no to everything from here".
	Insert(ctx context.Context, w Wanted) (bool, error)
}

// Wanted names the tokens to insert, and the identity that needs one of them.
type Wanted struct {
	Tokens      []string // names; any of the tokens is enough
	Comment     string   // of the identity
	Fingerprint string
	Asking      *Asking // asks on behalf of the requests that wait for the token
}
