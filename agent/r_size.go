package agent

import "golang.org/x/crypto/ssh"

// overhead is that of a structure with its place in lists and maps.
const overhead = 512

// keySize is that of a public key that was read.
func keySize(key ssh.PublicKey) int {
	cert, ok := key.(*ssh.Certificate)
	if !ok {
		return overhead + 2*len(key.Marshal())
	}
	size := overhead + 2*len(cert.Marshal()) + keySize(cert.Key) + keySize(cert.SignatureKey)
	size += 48 * len(cert.ValidPrincipals)
	return size + 128*(len(cert.CriticalOptions)+len(cert.Extensions))
}

// Size estimates the bytes of memory that the bind keeps.
func (b *Bind) Size() int {
	return overhead + keySize(b.HostKey) + len(b.SessionID) + len(b.Message)
}

// Size estimates the bytes of memory that the constraints keep.
func (c *Constraints) Size() int {
	size := overhead
	for i := range c.Destinations {
		size += c.Destinations[i].Size()
	}
	for _, cert := range c.Certificates {
		size += keySize(cert)
	}
	return size
}

// Size estimates the bytes of memory that the destination keeps.
func (d *Destination) Size() int { return d.From.size() + d.To.size() }

func (h *Hop) size() int {
	size := 128 + len(h.User) + len(h.Host)
	for _, key := range h.Keys {
		size += keySize(key.Key)
	}
	return size
}
