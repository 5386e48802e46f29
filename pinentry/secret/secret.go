// Package secret keeps PINs and passphrases in memory that is locked against swapping, left out
// of core dumps, and followed by a guard page. The memory is overwritten at the end. A Secret
// never prints itself.
//
// If the kernel has memfd_secret(2), its own map of memory does not have the pages of a Secret.
// Then no other process can read them, not even through a /proc/PID/mem that it opened before
// this process could forbid it.
//
// The kernel does not hibernate while such pages exist. So a Secret is short-lived, unless a
// person wants the contrary, and the package keeps no buffer for the next Secret.
//
// The package promises nothing about copies. A reader of the bytes must not turn them into a
// string, or append them to another slice.
package secret

import (
	"crypto/subtle"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"runtime"
	"sync"

	"golang.org/x/sys/unix"
)

// MaxSize is the limit of a Secret, in bytes.
const MaxSize = 1 << 20

const redacted = "[secret]"

// A Secret is a buffer for bytes that must not leak. One goroutine uses it at a time. Any goroutine
// may call Wipe at any time, and more than once, if no other goroutine reads the bytes then.
//
// The nil *Secret and the zero Secret are empty and have no room. Every method works on them.
type Secret struct {
	// Format is skipped for fields that are not exported, and package fmt then
	// follows a pointer when a verb does not suit it (%s): one pointer, not two.
	h *handle
}

type handle struct {
	mu sync.Mutex
	m  *memory // nil once wiped
}

type memory struct {
	region []byte // the whole mapping, guard page included
	data   []byte // the part for the owner, right before the guard page
	n      int    // bytes in use at the start of data
}

// memory is never nil. A Secret without memory has a memory of no size.
func (s *Secret) memory() *memory {
	if s == nil || s.h == nil || s.h.m == nil {
		return new(memory)
	}
	return s.h.m
}

var (
	lockMu  sync.Mutex
	lockErr error
	hideErr error
)

// LockError returns why the kernel refused to lock the memory of a Secret, or nil. Such a Secret
// works, but may reach the swap space: the program logs it once. Any goroutine may call LockError.
func LockError() error {
	lockMu.Lock()
	defer lockMu.Unlock()
	return lockErr
}

// HideError returns why the kernel refused memory of memfd_secret(2) for a Secret, or nil. The
// error is ENOSYS on a kernel without it. Such a Secret works, in locked memory. Any goroutine may
// call HideError.
func HideError() error {
	lockMu.Lock()
	defer lockMu.Unlock()
	return hideErr
}

// noted keeps the first error in one of the two variables above.
func noted(where *error, err error) {
	lockMu.Lock()
	defer lockMu.Unlock()
	if *where == nil {
		*where = err
	}
}

// New returns an empty Secret with room for size bytes. It fails when size is
// negative or above MaxSize, or when there is no memory left to map.
func New(size int) (*Secret, error) {
	if size < 0 || size > MaxSize {
		return nil, fmt.Errorf("a secret of %d bytes: the limit is %d", size, MaxSize)
	}
	page := unix.Getpagesize()
	usable := max(1, (size+page-1)/page) * page
	region, err := hidden(usable + page)
	if err != nil {
		noted(&hideErr, err)
		if region, err = locked(usable + page); err != nil {
			return nil, err
		}
	}
	if err := unix.Mprotect(region[usable:], unix.PROT_NONE); err != nil {
		return nil, errors.Join(fmt.Errorf("guard the memory of a secret: %w", err), unix.Munmap(region))
	}
	data := region[:usable:usable]
	return &Secret{&handle{m: &memory{region: region, data: data[usable-size:]}}}, nil
}

// hidden maps pages that only this process can read. The kernel locks them and
// leaves them out of core files.
func hidden(size int) ([]byte, error) {
	fd, err := unix.MemfdSecret(unix.O_CLOEXEC)
	if err != nil {
		return nil, fmt.Errorf("memfd_secret: %w", err)
	}
	defer unix.Close(fd) // the mapping keeps the pages
	if err := unix.Ftruncate(fd, int64(size)); err != nil {
		return nil, fmt.Errorf("give secret memory its size: %w", err)
	}
	b, err := unix.Mmap(fd, 0, size, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED)
	if err != nil {
		return nil, fmt.Errorf("map secret memory: %w", err)
	}
	// A module may fork. The mapping is shared, so the child must not have it.
	if err := unix.Madvise(b, unix.MADV_DONTFORK); err != nil {
		return nil, errors.Join(fmt.Errorf("keep secret memory from children: %w", err), unix.Munmap(b))
	}
	return b, nil
}

// locked maps pages that are not swapped. If the kernel refuses to lock them, locked keeps the
// error for LockError, and succeeds.
func locked(size int) ([]byte, error) {
	b, err := unix.Mmap(-1, 0, size, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_PRIVATE|unix.MAP_ANONYMOUS)
	if err != nil {
		return nil, fmt.Errorf("map memory for a secret: %w", err)
	}
	if err := unix.Mlock(b); err != nil {
		noted(&lockErr, fmt.Errorf("lock the memory of a secret: %w", err))
	}
	// Both are hints that old kernels may not know: the secret is as usable without.
	_ = unix.Madvise(b, unix.MADV_DONTDUMP)
	_ = unix.Madvise(b, unix.MADV_WIPEONFORK)
	return b, nil
}

// From moves b into a new Secret. It overwrites the bytes of b, also when it fails.
func From(b []byte) (*Secret, error) {
	defer Wipe(b)
	s, err := New(len(b))
	if err != nil {
		return nil, err
	}
	s.SetLen(copy(s.Buffer(), b))
	return s, nil
}

// Bytes returns the bytes of the Secret, in its own memory. Do not keep them, and do not touch them
// after Wipe.
func (s *Secret) Bytes() []byte {
	m := s.memory()
	return m.data[:m.n:m.n]
}

// Buffer returns the whole room, for reading into. Afterwards, SetLen says how many bytes count.
func (s *Secret) Buffer() []byte { return s.memory().data }

// SetLen keeps the first n bytes of Buffer and overwrites the rest. Like a slice, it panics when n
// is negative or more than the room.
func (s *Secret) SetLen(n int) {
	m := s.memory()
	Wipe(m.data[n:])
	m.n = n
}

// Len returns the number of bytes held.
func (s *Secret) Len() int { return s.memory().n }

// Clone returns a second Secret with the same bytes.
func (s *Secret) Clone() (*Secret, error) {
	c, err := New(s.Len())
	if err != nil {
		return nil, err
	}
	c.SetLen(copy(c.Buffer(), s.Bytes()))
	return c, nil
}

// Equal tells whether both hold the same bytes. The time depends on the length of o alone. No byte
// gets into other memory, as a hash function would do.
func (s *Secret) Equal(o *Secret) bool {
	want, given := s.Bytes(), o.Bytes()
	same := subtle.ConstantTimeEq(int32(len(want)), int32(len(given)))
	if len(want) == 0 {
		return same == 1
	}
	for i, b := range given {
		same &= subtle.ConstantTimeByteEq(want[i%len(want)], b)
	}
	return same == 1
}

// Wipe overwrites the bytes and gives the memory back. Afterwards the Secret is empty.
func (s *Secret) Wipe() {
	if s == nil || s.h == nil {
		return
	}
	s.h.mu.Lock()
	defer s.h.mu.Unlock()
	if s.h.m == nil {
		return
	}
	Wipe(s.h.m.data)
	// If the kernel refuses, there is nothing to do: the bytes are overwritten.
	_ = unix.Munmap(s.h.m.region)
	s.h.m = nil
}

// Wipe overwrites b with zeros in a way that is not optimised away.
func Wipe(b []byte) {
	clear(b)
	runtime.KeepAlive(b)
}

// Format prints a placeholder for every verb.
func (*Secret) Format(w fmt.State, _ rune) { _, _ = io.WriteString(w, redacted) }

// LogValue gives log/slog a placeholder.
func (*Secret) LogValue() slog.Value { return slog.StringValue(redacted) }

// MarshalText gives every encoder a placeholder.
func (*Secret) MarshalText() ([]byte, error) { return []byte(redacted), nil }
