package request

import "golang.org/x/crypto/ssh"

// Overhead is that of a structure with its place in lists and maps.
const Overhead = 512

// KeySize is that of a public key that was read.
func KeySize(key ssh.PublicKey) int {
	cert, ok := key.(*ssh.Certificate)
	if !ok {
		return Overhead + 2*len(key.Marshal())
	}
	size := Overhead + 2*len(cert.Marshal()) + KeySize(cert.Key) + KeySize(cert.SignatureKey)
	size += 48 * len(cert.ValidPrincipals)
	return size + 128*(len(cert.CriticalOptions)+len(cert.Extensions))
}

// Size estimates the bytes of memory that the bind keeps.
func (b *Bind) Size() int {
	return Overhead + KeySize(b.HostKey) + len(b.SessionID) + len(b.Message)
}

// Size estimates the bytes of memory that the constraints keep.
func (c *Constraints) Size() int {
	size := Overhead
	for i := range c.Destinations {
		size += c.Destinations[i].Size()
	}
	for _, cert := range c.Certificates {
		size += KeySize(cert)
	}
	return size
}

// Size estimates the bytes of memory that the destination keeps.
func (d *Destination) Size() int { return d.From.size() + d.To.size() }

func (h *Hop) size() int {
	size := 128 + len(h.User) + len(h.Host)
	for _, key := range h.Keys {
		size += KeySize(key.Key)
	}
	return size
}
