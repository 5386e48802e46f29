package approval

import "context"

// An Inserter asks a person to insert a token.
type Inserter interface {
	// Insert shows what is wanted until ctx ends, which is an error. It reports
	// true when the person says that the token is in, and false when they decline.
	// ErrNoToAll is "no to everything from here".
	Insert(ctx context.Context, w Wanted) (bool, error)
}

// Wanted is what a person is to insert, and what for.
type Wanted struct {
	Tokens      []string // names; any one of them will do
	Comment     string   // of the identity
	Fingerprint string
}
