package sshagent

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"syscall"
)

// Ping finds out whether an agent takes connections at a Unix socket and answers
// on them: nil when it does. It asks for the agent's extensions, which waits for
// no key, token, person or other agent. An agent that takes the connection and
// closes it, as one does that has too many, is alive as well. Ping waits until
// ctx ends.
func Ping(ctx context.Context, path string) error {
	if err := ping(ctx, path); err != nil {
		return fmt.Errorf("the agent at %s does not answer: %w", path, err)
	}
	return nil
}

func ping(ctx context.Context, path string) error {
	var d net.Dialer
	c, err := d.DialContext(ctx, "unix", path)
	if err != nil {
		return err
	}
	defer c.Close()
	defer context.AfterFunc(ctx, func() { _ = c.Close() })()
	query := appendString([]byte{msgExtension}, extensionQuery)
	if _, err = c.Write(appendString(nil, string(query))); err == nil {
		// Length and number of the answer, whatever it is.
		_, err = io.ReadFull(c, make([]byte, 5))
	}
	switch {
	case err == nil:
		return nil
	case ctx.Err() != nil:
		return ctx.Err()
	case errors.Is(err, io.EOF), errors.Is(err, syscall.ECONNRESET), errors.Is(err, syscall.EPIPE):
		return nil // it was taken, and closed
	}
	return err
}
