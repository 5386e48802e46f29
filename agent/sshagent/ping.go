package sshagent

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"syscall"
)

// Ping returns nil if an agent takes connections at a Unix socket and answers on them. Ping asks
// for the agent's extensions. The answer needs no key, token, person or other agent. An agent with
// too many connections takes a connection and closes it: Ping counts it as alive. Ping waits until
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
		// Any answer will do: read its length and number.
		_, err = io.ReadFull(c, make([]byte, 5))
	}
	switch {
	case err == nil:
		return nil
	case ctx.Err() != nil:
		return ctx.Err()
	case errors.Is(err, io.EOF), errors.Is(err, syscall.ECONNRESET), errors.Is(err, syscall.EPIPE):
		return nil // the agent took the connection, and closed it
	}
	return err
}
