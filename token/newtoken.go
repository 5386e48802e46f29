package token

import (
	"context"
	"errors"
	"fmt"

	"p11-agent/pinentry/secret"
	"p11-agent/token/pkcs11uri"
	"p11-agent/token/process"
	"p11-agent/token/wire"
)

// NewToken makes a token with this label and PIN. The module must offer slots for new tokens, as
// SoftHSM and the module for TPMs do. NewToken returns the URI of the token. The Store lists the
// token then. NewToken changes no other token.
//
// The PIN still belongs to the caller. The module makes a random PIN for the security officer, and
// does not keep it. If ctx ends while the module makes the token, NewToken waits for the whole
// token.
func (s *Store) NewToken(ctx context.Context, module, label string, pin *secret.Secret) (string, error) {
	for _, m := range s.modulesNow() {
		if m.spec.Name == module {
			return m.newToken(ctx, label, pin)
		}
	}
	return "", fmt.Errorf("there is no module %q", module)
}

func (m *moduleState) newToken(ctx context.Context, label string, pin *secret.Secret) (string, error) {
	defer m.supervisor.Use()()
	p, err := m.supervisor.Process(ctx)
	if err != nil {
		return "", err
	}
	if err := ctx.Err(); err != nil {
		return "", err
	}
	ctx = context.WithoutCancel(ctx)
	reply := new(wire.NewTokenReply)
	if err := p.Call(ctx, process.GenerateTimeout, wire.TypeNewToken, &wire.NewToken{Label: label, PIN: pin}, reply); err != nil {
		if e, ok := errors.AsType[*wire.Error](err); ok && e.Reason == wire.ReasonUnsupported {
			return "", fmt.Errorf("module %s: %s", m.spec.Name, e.Text)
		}
		return "", fmt.Errorf("make a token: %w", m.supervisor.Wrap(err))
	}
	if err := m.supervisor.Rescan(ctx); err != nil {
		return "", fmt.Errorf("the token %q was made, and cannot be looked at: %w", label, err)
	}
	return pkcs11uri.ForKey(reply.Token, "", nil).String(), nil
}
