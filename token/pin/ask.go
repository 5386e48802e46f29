package pin

import (
	"context"
	"errors"

	"p11-agent/pinentry/secret"
	"p11-agent/pinentry/waiting"
	"p11-agent/token/wire"
)

// An Asker asks persons for PINs. Several goroutines call its methods, one at a time for each
// token. ctx carries the values of the request's context and ends when no request waits for
// the answer any more. Request.Waiting has the requests that wait.
type Asker interface {
	// Ask opens a dialogue with a person about one token.
	Ask(ctx context.Context, about Request) (Dialogue, error)
}

// A Request says what a PIN is for.
type Request struct {
	Token wire.TokenID
	// Module is the module that gets the PIN, when a person needs to know it: the token
	// belongs to another module, Home, or Others show the token as well.
	Module string
	Home   string
	Others []string
	// Reader is the reader that the token is in, when another token of the same name is
	// present.
	Reader  string
	Key     string // the key's canonical URI
	Label   string // the key's label, may be empty
	ID      []byte // CKA_ID, may be empty
	EachUse bool   // the key wants its PIN for each signature
	Pad     bool   // the person types the PIN on the reader
	Tries   Tries
	// Supplied tells that the request brought the PIN. The only question is whether to use the
	// last try for it.
	Supplied bool
	// Waiting asks on behalf of the requests that wait for the PIN. nil: one request, with the
	// context of the dialogue.
	Waiting waiting.Requests
	// ClientTells says that the client itself tells the person to type the PIN on the reader:
	// the Asker shows no notice.
	ClientTells bool
}

// A Dialogue is one conversation with a person. One goroutine uses it.
type Dialogue interface {
	// PIN returns what the person typed, which the caller wipes. problem says what was wrong
	// with the PIN before, and is empty the first time. PIN fails with ErrCancelled when the
	// person declines.
	PIN(ctx context.Context, problem string) (*secret.Secret, error)
	// LastTry asks whether to go on although a wrong PIN would lock the token; problem as for
	// PIN.
	LastTry(ctx context.Context, problem string) (bool, error)
	// Notice asks the person to type the PIN on the reader and stays until ctx ends, which is
	// no error. It fails with ErrCancelled when the person declines.
	Notice(ctx context.Context) error
	Close() error
}

// A ReaderObserver is a Dialogue that hears what came of a PIN that the person typed on the
// reader. err is nil, or says why the login failed. It is called after Notice has ended.
type ReaderObserver interface{ TypedOnReader(err error) }

// typedOnReader shows a notice while call waits for the person at the reader. When the person
// declines the notice, call does not wait for the reader any longer.
func typedOnReader(ctx context.Context, token string, d Dialogue, call func(ctx context.Context) error) error {
	ctx, done := context.WithCancel(ctx)
	defer done()
	declined := make(chan error, 1)
	go func() {
		err := d.Notice(ctx)
		if err != nil {
			done()
		}
		declined <- err
	}()
	err := call(ctx)
	done()
	if nerr := <-declined; err != nil && nerr != nil && !errors.Is(nerr, context.Canceled) {
		return noticeFailed(token, nerr)
	}
	return err
}

// noticeFailed makes a failure of a notice one of a login.
func noticeFailed(token string, err error) error {
	if errors.Is(err, ErrCancelled) || errors.Is(err, context.DeadlineExceeded) {
		return err
	}
	return &LoginError{Token: token, Err: err}
}
