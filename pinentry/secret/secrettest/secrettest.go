// Package secrettest makes secrets, and looks for them in the memory of the process itself. It is
// for tests.
package secrettest

import (
	"bufio"
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"os"
	"strings"
	"testing"

	"p11-agent/pinentry/secret"
)

// maxMapping leaves out the shadow memory of the race detector: terabytes that do not hold
// the program's own bytes.
const maxMapping = 1 << 30

// Invert returns a copy of b with every bit flipped. In this form, a test holds the secret
// that it looks for, and Copies does not find the test's own copy.
func Invert(b []byte) []byte {
	inverted := make([]byte, len(b))
	for i := range b {
		inverted[i] = ^b[i]
	}
	return inverted
}

// Of returns a Secret with a text. It is wiped when the test ends.
func Of(t testing.TB, text string) *secret.Secret {
	t.Helper()
	s, err := secret.From([]byte(text))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(s.Wipe)
	return s
}

// Count returns the result of Copies.
func Count(t testing.TB, inverted []byte) int {
	t.Helper()
	n, err := Copies(inverted)
	if err != nil {
		t.Fatal(err)
	}
	return n
}

// Found returns the result of Copies if only n Secrets hold the bytes. If the kernel hides
// the memory of a Secret, not even this process can read it through /proc/self/mem.
func Found(n int) int {
	if secret.HideError() == nil {
		return 0
	}
	return n
}

// Copies takes the inverse of some bytes. It counts how often the writable memory of this
// process has the bytes: heap, stacks and every other mapping. The count 0 is exact. A larger
// count is an estimate.
func Copies(inverted []byte) (int, error) {
	if len(inverted) < 8 {
		return 0, errors.New("fewer than 8 bytes may be found by chance")
	}
	maps, err := os.ReadFile("/proc/self/maps")
	if err != nil {
		return 0, err
	}
	mem, err := os.Open("/proc/self/mem")
	if err != nil {
		return 0, err
	}
	defer mem.Close()
	pagemap, err := os.Open("/proc/self/pagemap")
	if err != nil {
		return 0, err
	}
	defer pagemap.Close()

	found := 0
	lines := bufio.NewScanner(bytes.NewReader(maps))
	for lines.Scan() {
		var start, end uint64
		var perms string
		if _, err := fmt.Sscanf(lines.Text(), "%x-%x %s", &start, &end, &perms); err != nil {
			return 0, fmt.Errorf("read /proc/self/maps: %w", err)
		}
		if !strings.HasPrefix(perms, "rw") || end-start > maxMapping {
			continue
		}
		n, err := search(mem, pagemap, start, end, inverted)
		if err != nil {
			return 0, err
		}
		found += n
	}
	return found, lines.Err()
}

// search looks through a mapping. It reads one run of present pages after the other.
func search(mem, pagemap *os.File, start, end uint64, inverted []byte) (int, error) {
	const chunk = 16 // pages
	page := uint64(os.Getpagesize())
	buf := make([]byte, chunk*page+uint64(len(inverted)))
	entries := make([]byte, 8*(end-start)/page)
	if _, err := pagemap.ReadAt(entries, int64(start/page*8)); err != nil {
		return 0, fmt.Errorf("read /proc/self/pagemap: %w", err)
	}
	present := func(addr uint64) bool {
		const swappedOrPresent = 3 << 62
		return binary.NativeEndian.Uint64(entries[(addr-start)/page*8:])&swappedOrPresent != 0
	}
	found, kept := 0, 0 // kept: bytes at the start of buf that were before addr
	for addr := start; addr < end; {
		if !present(addr) {
			addr += page
			kept = 0
			continue
		}
		size := page
		for size < chunk*page && addr+size < end && present(addr+size) {
			size += page
		}
		n, err := mem.ReadAt(buf[kept:kept+int(size)], int64(addr))
		if err != nil && !errors.Is(err, io.EOF) && n == 0 {
			// The page is unmapped by now, or unreadable like the kernel's own pages.
			addr += size
			kept = 0
			continue
		}
		have := buf[:kept+n]
		found += count(have, inverted)
		kept = copy(buf, have[max(0, len(have)-len(inverted)+1):])
		// Otherwise the search would find the buffer itself.
		clear(buf[kept:])
		addr += size
	}
	clear(buf)
	return found, nil
}

func count(have, inverted []byte) int {
	n := 0
	for i := 0; i+len(inverted) <= len(have); i++ {
		j := 0
		for j < len(inverted) && have[i+j] == ^inverted[j] {
			j++
		}
		if j == len(inverted) {
			n++
		}
	}
	return n
}
