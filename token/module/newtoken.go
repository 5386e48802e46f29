package module

import (
	"context"
	"crypto/rand"
	"encoding/hex"
	"fmt"

	"github.com/miekg/pkcs11"

	"p11-agent/pinentry/secret"
	"p11-agent/token/wire"
)

const (
	// maxTokenLabel is the size of CK_TOKEN_INFO.label, in bytes.
	maxTokenLabel = 32
	// soPINBytes is the number of random bytes in the PIN of a security officer.
	soPINBytes = 16
)

// newToken makes a token in the first slot whose token is not initialised, and sets the
// user's PIN. A cancel does not stop the calls after the first: a token without a PIN is
// useless.
func (s *server) newToken(ctx context.Context, lib *library, m *wire.NewToken) (wire.Message, error) {
	if err := checkPIN(m.PIN, false); err != nil {
		return nil, err
	}
	if m.Label == "" || len(m.Label) > maxTokenLabel {
		return nil, nonsense(fmt.Sprintf("a token has a label of 1 to %d bytes", maxTokenLabel))
	}
	// Two requests must not choose the same slot.
	if err := take(ctx, s.listing); err != nil {
		return nil, err
	}
	defer func() { <-s.listing }()
	slot, err := lib.emptySlot(m.PIN.Len())
	if err != nil {
		return nil, err
	}
	so, err := soPIN()
	if err != nil {
		return nil, err
	}
	defer so.Wipe()
	if err := lib.initToken(slot, so.Bytes(), m.Label); err != nil {
		return nil, err
	}
	if err := lib.setPIN(slot, so, m.PIN); err != nil {
		return nil, fmt.Errorf("the token %q was made, but its PIN cannot be set: %w", m.Label, err)
	}
	id, _, err := lib.tokenInfo(slot)
	if err != nil {
		return nil, err
	}
	return &wire.NewTokenReply{Token: id}, nil
}

// emptySlot returns a slot whose token is not initialised and takes a PIN of this length.
func (l *library) emptySlot(pin int) (uint, error) {
	slots, err := l.slots(true)
	if err != nil {
		return 0, err
	}
	for _, slot := range slots {
		_, info, err := l.tokenInfo(slot)
		if err != nil || info.Flags&wire.CKFTokenInitialized != 0 || info.Flags&wire.CKFProtectedAuthenticationPath != 0 {
			continue
		}
		if n := uint64(pin); n < info.MinPIN || info.MaxPIN > 0 && n > info.MaxPIN {
			return 0, &wire.Error{Reason: wire.ReasonUnsupported, Text: fmt.Sprintf(
				"a PIN has %d to %d characters here: nothing was made", info.MinPIN, info.MaxPIN)}
		}
		return slot, nil
	}
	return 0, &wire.Error{Reason: wire.ReasonUnsupported, Text: "the module has no room for a new token"}
}

// soPIN makes a random PIN for the security officer, of 32 hexadecimal digits.
func soPIN() (*secret.Secret, error) {
	random, err := secret.New(soPINBytes)
	if err != nil {
		return nil, err
	}
	defer random.Wipe()
	pin, err := secret.New(hex.EncodedLen(soPINBytes))
	if err != nil {
		return nil, err
	}
	_, _ = rand.Read(random.Buffer()) // never fails
	pin.SetLen(hex.Encode(pin.Buffer(), random.Buffer()))
	return pin, nil
}

// setPIN logs in as the security officer and sets the user's PIN.
func (l *library) setPIN(slot uint, so, pin *secret.Secret) error {
	session, err := l.openWritable(slot)
	if err != nil {
		return err
	}
	defer func() { _ = l.closeSession(session) }() // the PIN stays set
	if err := l.login(session, pkcs11.CKU_SO, so.Bytes()); err != nil {
		return err
	}
	err = l.initPIN(session, pin.Bytes())
	if out := l.logout(session); err == nil {
		err = out
	}
	return err
}
