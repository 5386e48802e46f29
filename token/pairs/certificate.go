package pairs

import (
	"bytes"
	"crypto/sha256"
	"crypto/x509"
	"fmt"
	"slices"
	"strings"

	"p11-agent/token/wire"
)

// categoryAuthority is CKA_CERTIFICATE_CATEGORY of an authority (PKCS#11 v2.40 section 4.6.2).
const categoryAuthority = 2

func certificate(o wire.Object) (*x509.Certificate, error) {
	c, err := x509.ParseCertificate(o.Value)
	if err != nil {
		return nil, fmt.Errorf("read certificate: %w", err)
	}
	return c, nil
}

// IsAuthority reports whether an object is the certificate of a certificate authority.
func IsAuthority(o wire.Object) bool {
	if o.Class != wire.CKOCertificate {
		return false
	}
	c, err := certificate(o)
	return err == nil && c.IsCA
}

// authoritiesLast returns the objects with the certificates of authorities at the end.
func authoritiesLast(objects []wire.Object) []wire.Object {
	var own, issuers []wire.Object
	for _, o := range objects {
		if IsAuthority(o) {
			issuers = append(issuers, o)
		} else {
			own = append(own, o)
		}
	}
	return append(own, issuers...)
}

// authorities returns the certificates of authorities that belong to no key of the token, by their digests. Before
// a login a root certificate looks like a certificate that a key has issued for itself. Two things tell the root:
// the attributes of the object, and another certificate on the token that the root has issued.
func authorities(objects []wire.Object) map[[sha256.Size]byte]bool {
	var roots, others []*x509.Certificate
	foreign := make(map[[sha256.Size]byte]bool)
	for _, o := range objects {
		if o.Class != wire.CKOCertificate {
			continue
		}
		c, err := certificate(o)
		switch {
		case err != nil:
		case selfIssued(c):
			roots = append(roots, c)
			if o.CertCategory == categoryAuthority || o.Trusted == wire.True || len(o.ID) == 0 {
				foreign[sha256.Sum256(c.Raw)] = true
			}
		default:
			others = append(others, c)
			if c.IsCA {
				foreign[sha256.Sum256(c.Raw)] = true
			}
		}
	}
	for _, root := range roots {
		if slices.ContainsFunc(others, func(c *x509.Certificate) bool { return bytes.Equal(c.RawIssuer, root.RawSubject) }) {
			foreign[sha256.Sum256(root.Raw)] = true
		}
	}
	return foreign
}

// selfIssued reports whether the key of an authority's certificate has signed that certificate.
func selfIssued(c *x509.Certificate) bool {
	return c.IsCA && bytes.Equal(c.RawIssuer, c.RawSubject) &&
		c.CheckSignature(c.SignatureAlgorithm, c.RawTBSCertificate, c.Signature) == nil
}

// unfitCertificate returns the reason not to log in with a certificate, or "".
func unfitCertificate(c *x509.Certificate) string {
	switch {
	case c.IsCA:
		return "its certificate is that of a certificate authority"
	case c.KeyUsage != 0 && c.KeyUsage&(x509.KeyUsageDigitalSignature|x509.KeyUsageContentCommitment) == 0:
		return "its certificate is not for signing"
	}
	return ""
}

// isAttestation reports whether the key only signs statements of the token about its other keys. The label of a
// certificate counts only if the pair has no key object. libykcs11 shows a YubiKey's statement about a key as a
// certificate with the ID of that key, and with a label that says attestation.
func (p *Pair) isAttestation(token wire.TokenID) bool {
	keyed := slices.ContainsFunc(p.Members, Member.isKey)
	for _, m := range p.Members {
		if (m.isKey() || !keyed) && strings.Contains(strings.ToLower(m.Label), "attestation") {
			return true
		}
	}
	// Slot F9 of a YubiKey, in the numbering of libykcs11.
	return strings.HasPrefix(token.Manufacturer, "Yubico") && bytes.Equal(p.ID, []byte{0x19})
}
