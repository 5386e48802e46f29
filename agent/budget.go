package agent

import (
	"crypto"
	"crypto/rsa"
	"errors"
	"fmt"
	"runtime/debug"

	"p11-agent/agent/request"
)

// These limits bound the keys in memory and the additions that clients make the agent
// keep. Forwarded clients share the smaller part, so that they cannot take the room of the
// person's own tools.
const (
	maxSoftwareKeys          = 2048
	maxForwardedSoftwareKeys = maxSoftwareKeys / 2
	maxAdditions             = 256
	maxForwardedAdditions    = maxAdditions / 2
	maxKeptBytes             = 32 << 20
	maxForwardedBytes        = 8 << 20
	// At maxHidden removed identities, the keyring forgets those that it would not show
	// anyway.
	maxHidden = 1024
	// When a request frees relieveFrom bytes, the keyring gives memory back to the system.
	relieveFrom = 4 << 20
)

var errTooMany = errors.New("no more can be added")

// The sizes below estimate the memory that Go keeps. TestSizes holds them against the
// heap: they are never too small.

func (c route) size() (size int) {
	for _, d := range c {
		size += d.Size()
	}
	return size
}

// privateSize returns the size of a private key.
func privateSize(key crypto.Signer) int {
	if key, ok := key.(*rsa.PrivateKey); ok {
		return request.Overhead + 3*key.N.BitLen() // 24 times the modulus: the parts of it, and what was computed before
	}
	return 2 * request.Overhead
}

// kept is the share of one addition, or one key in memory, in a budget.
type kept struct {
	size      int
	forwarded bool
}

// budget counts the additions or the keys in memory that the keyring keeps.
type budget struct{ count, size, forwardedCount, forwardedSize int }

func (b *budget) add(k kept) {
	b.count++
	b.size += k.size
	if k.forwarded {
		b.forwardedCount++
		b.forwardedSize += k.size
	}
}

func (b *budget) remove(k kept) {
	b.count--
	b.size -= k.size
	if k.forwarded {
		b.forwardedCount--
		b.forwardedSize -= k.size
	}
}

// addedLocked returns what the keyring keeps of additions, and of limits that keys have
// lost (Keyring.owed). The keyring does not know which client set lost limits, so that
// they count for forwarded clients as well. Additions and lost limits share destinations
// and certificates: each counts once, and sizes remembers its size.
func (k *Keyring) addedLocked() (b budget) {
	sizes := make(map[any]int, len(k.sizes))
	once := func(thing any, size func() int) int {
		if _, counted := sizes[thing]; counted {
			return 0
		}
		n, ok := k.sizes[thing]
		if !ok {
			n = size()
		}
		sizes[thing] = n
		return n
	}
	routes := func(l *limits) (size int) {
		for _, r := range l.routes {
			if len(r) > 0 {
				size += once(&r[0], r.size)
			}
		}
		return size
	}
	for _, a := range k.added {
		size := request.Overhead + 2*len(a.selection.String()) + routes(&a.limits)
		for _, cert := range a.certificates {
			size += once(cert, func() int { return request.KeySize(cert) })
		}
		b.add(kept{size, a.forwarded})
	}
	for wire, l := range k.owed {
		size := request.Overhead + len(wire) + routes(l)
		b.size += size
		b.forwardedSize += size
	}
	k.sizes = sizes
	return b
}

// mayKeep returns nil if there is room for a thing. own is the budget of its kind, with the
// thing. other is the budget of the other kind. maxCount and maxForwarded bound own.
func mayKeep(k kept, own, other budget, maxCount, maxForwarded int) error {
	switch size := own.size + other.size; {
	case own.count > maxCount:
		return fmt.Errorf("%w: %d are kept, which is the limit: remove some (ssh-add -d)", errTooMany, maxCount)
	case size > maxKeptBytes:
		return fmt.Errorf("%w: the agent would keep %d KiB, and the limit is %d KiB: remove some (ssh-add -d)", errTooMany, size>>10, maxKeptBytes>>10)
	case !k.forwarded:
		return nil
	case own.forwardedCount > maxForwarded:
		return fmt.Errorf("%w over a forwarded connection: %d are kept, which is the limit", errTooMany, maxForwarded)
	case own.forwardedSize+other.forwardedSize > maxForwardedBytes:
		return fmt.Errorf("%w over a forwarded connection: the agent would keep %d KiB, and the limit is %d KiB",
			errTooMany, (own.forwardedSize+other.forwardedSize)>>10, maxForwardedBytes>>10)
	}
	return nil
}

// replaced returns the budget with a thing in place of old. If old is nil, the thing
// replaces no other.
func (b budget) replaced(old *kept, k kept) budget {
	if old != nil {
		b.remove(*old)
	}
	b.add(k)
	return b
}

// mayAddLocked returns nil if there is room for another addition.
func (k *Keyring) mayAddLocked(a *addition) error {
	c := request.Constraints{Certificates: a.certificates}
	for _, r := range a.limits.routes {
		c.Destinations = r // a new addition has one route at the most
	}
	own := k.addedLocked()
	for _, old := range k.added {
		if a.replaces(old) {
			own.count--
			if old.forwarded {
				own.forwardedCount--
			}
		}
	}
	added := kept{size: request.Overhead + 2*len(a.selection.String()) + c.Size(), forwarded: a.forwarded}
	own.add(added)
	return mayKeep(added, own, k.software.kept, maxAdditions, maxForwardedAdditions)
}

// keptBytes returns how many bytes the keyring keeps.
func (k *Keyring) keptBytes() int {
	k.mu.Lock()
	defer k.mu.Unlock()
	return k.software.kept.size + k.addedLocked().size
}

// relieve gives memory back to the system when the keyring keeps much less than before.
// By itself, Go collects garbage every two minutes when nothing happens, and gives memory
// back slowly.
func (k *Keyring) relieve(before int) {
	if before-k.keptBytes() >= relieveFrom {
		k.now() // the old view holds the memory
		debug.FreeOSMemory()
	}
}
