package pin

import (
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"path/filepath"
	"slices"
	"strings"
	"sync"

	"p11-agent/pinentry/secret"
	"p11-agent/token/statefile"
	"p11-agent/token/wire"
)

// The bounds of Refusals. The oldest entries go.
const (
	maxRefusalsFile  = 1 << 20 // bytes
	maxRefusedFiles  = 256     // lines of the file
	maxRefusedValues = 64
)

// refusalsFile is the name of the file of Refusals in the state directory.
const refusalsFile = "refused-pins"

// An Origin identifies a PIN of a source without telling the PIN.
type Origin struct {
	What  string // for a person
	Until string // what has to happen before the agent tries the PIN again

	token wire.TokenID
	state string // changes when the PIN changes; empty: the PIN itself is compared
	disk  bool   // a refusal is remembered on disk
}

// Value is the Origin of a pin-value.
func Value() Origin { return Origin{What: "pin-value", Until: "it changes"} }

func (o Origin) key() string {
	t := o.token
	text := fmt.Appendf(nil, "{%q %q %q %q} %q %q", t.Label, t.Manufacturer, t.Model, t.Serial, o.What, o.state)
	if t.Twin != 0 {
		text = fmt.Appendf(text, " %d", t.Twin)
	}
	sum := sha256.Sum256(text)
	return hex.EncodeToString(sum[:])
}

// Refusals remembers the PINs of sources that a token has refused. It remembers PIN files on
// disk too, by the file's identity and age: an agent that is restarted again and again does
// not lock a token.
//
// A refused pin-value is kept itself, as a Secret. The hash function of a digest would leave
// a copy of the PIN in memory that is not locked. Methods may be called from any goroutine.
type Refusals struct {
	log  *slog.Logger
	path string // empty: nothing is written

	mu     sync.Mutex
	keys   map[string]bool
	values []refusedValue
}

// A refusedValue is a pin-value that a token has refused.
type refusedValue struct {
	key string // of its Origin
	pin *secret.Secret
}

// LoadRefusals reads the refusals in a state directory. Without a directory they are only in
// memory.
func LoadRefusals(dir string, log *slog.Logger) *Refusals {
	r := &Refusals{log: log, keys: make(map[string]bool)}
	if dir == "" {
		return r
	}
	r.path = filepath.Join(dir, refusalsFile)
	b, err := statefile.Read(r.path, maxRefusalsFile)
	if err != nil {
		if !errors.Is(err, fs.ErrNotExist) {
			log.Warn("cannot read which PIN files were refused before", "reason", err)
		}
		return r
	}
	for line := range strings.Lines(string(b)) {
		r.keys[strings.TrimSpace(line)] = true
	}
	return r
}

// has tells whether the PIN of an Origin was refused.
func (r *Refusals) has(o Origin, pin *secret.Secret) bool {
	r.mu.Lock()
	defer r.mu.Unlock()
	if o.state == "" {
		return slices.ContainsFunc(r.values, func(v refusedValue) bool { return v.key == o.key() && v.pin.Equal(pin) })
	}
	return r.keys[o.key()]
}

// add remembers that the PIN of an Origin was refused.
func (r *Refusals) add(o Origin, pin *secret.Secret) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if o.state == "" {
		r.addValueLocked(o, pin)
		return
	}
	r.keys[o.key()] = true
	if r.path == "" || !o.disk {
		return
	}
	if err := r.save(o.key()); err != nil {
		r.log.Warn("cannot write down that a PIN file was refused", "reason", err)
	}
}

func (r *Refusals) addValueLocked(o Origin, pin *secret.Secret) {
	kept, err := pin.Clone()
	if err != nil {
		r.log.Warn("cannot remember that a pin-value was refused", "reason", err)
		return
	}
	if len(r.values) == maxRefusedValues {
		r.values[0].pin.Wipe()
		r.values = slices.Delete(r.values, 0, 1)
	}
	r.values = append(r.values, refusedValue{o.key(), kept})
}

// save adds a line to the file.
func (r *Refusals) save(key string) error {
	b, err := statefile.Read(r.path, maxRefusalsFile)
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	lines := strings.Fields(string(b))
	lines = append(lines, key)
	lines = lines[max(0, len(lines)-maxRefusedFiles):]
	return statefile.Write(r.path, []byte(strings.Join(lines, "\n")+"\n"))
}
