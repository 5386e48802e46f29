package pkcs11uri

// Canonical returns the whole URI except its pin-value, in one form. Two URIs are equal
// in the sense of RFC 7512 section 2.6 if their canonical forms are equal.
func (u URI) Canonical() string { return u.format(true) }
