package pairs

import (
	"encoding/binary"
	"fmt"
	"strings"
	"testing"

	"p11-agent/token/wire"
)

// crowd makes the objects of so many Ed25519 pairs.
func crowd(n int, private bool, change func(i int, o *wire.Object)) (all []wire.Object) {
	add := func(i int, class uint64) {
		point := make([]byte, 32)
		binary.BigEndian.PutUint64(point, uint64(i)+1)
		o := wire.Object{
			Class: class, ID: binary.BigEndian.AppendUint32(nil, uint32(i)), Label: fmt.Sprintf("key %d", i),
			KeyType: wire.CKKECEdwards, ECParams: []byte{0x06, 0x03, 0x2b, 0x65, 0x70},
		}
		if class == wire.CKOPublicKey {
			o.ECPoint = point
		}
		if change != nil {
			change(i, &o)
		}
		all = append(all, o)
	}
	for i := range n {
		add(i, wire.CKOPublicKey)
	}
	for i := range n {
		if private {
			add(i, wire.CKOPrivateKey)
		}
	}
	return all
}

// TestPairGrowsLinearly counts the pairs that Find checks, and its allocations, for n objects
// and for twice as many.
func TestPairGrowsLinearly(t *testing.T) {
	tests := map[string]func(i int, o *wire.Object){
		"as usual":     nil,
		"one ID":       func(_ int, o *wire.Object) { o.ID = []byte{1} },
		"no ID":        func(_ int, o *wire.Object) { o.ID = nil },
		"one label":    func(_ int, o *wire.Object) { o.Label = "key" },
		"all the same": func(_ int, o *wire.Object) { o.ID, o.Label = nil, "" },
		"one public key": func(_ int, o *wire.Object) {
			if o.ECPoint != nil {
				o.ECPoint = make([]byte, 32)
			}
		},
		"public halves of private keys": func(i int, o *wire.Object) {
			point := make([]byte, 32)
			binary.BigEndian.PutUint64(point, uint64(i)+1)
			o.ECPoint, o.ID = point, nil
		},
	}
	for name, change := range tests {
		t.Run(name, func(t *testing.T) {
			const n = 1000
			steps := func(n int) int {
				f := newFinder(Options{})
				f.find(crowd(n, true, change))
				return f.index.steps
			}
			if one, two := steps(n), steps(2*n); two > 2*one+one/10 || one > 20*n {
				t.Errorf("%d pairs are checked for %d, and %d for %d", one, n, two, 2*n)
			}
			allocs := func(n int) float64 {
				objects := crowd(n, true, change)
				return testing.AllocsPerRun(1, func() { Find(objects, Options{}) })
			}
			if one, two := allocs(n), allocs(2*n); two > 2.5*one {
				t.Errorf("%.0f allocations for %d, and %.0f for %d", one, n, two, 2*n)
			}
		})
	}
}

// A public key stands for its private key when a list is cut short, also after a login.
func TestPairOfCutList(t *testing.T) {
	objects := crowd(2, false, nil)
	for _, tt := range []struct {
		hidden, cut bool
		want        int
	}{{true, false, 2}, {false, true, 2}, {false, false, 0}} {
		got := Find(objects, Options{Hidden: tt.hidden, Cut: tt.cut}).Pairs
		if len(got) != tt.want {
			t.Errorf("hidden: %v, cut: %v: %d keys, want %d", tt.hidden, tt.cut, len(got), tt.want)
		}
		for _, p := range got {
			if p.Visible || p.Open {
				t.Errorf("hidden: %v, cut: %v: a private key that the token has not shown counts as visible", tt.hidden, tt.cut)
			}
		}
	}
}

// Find leaves out objects with an endless label or ID.
func TestPairBoundsTexts(t *testing.T) {
	long := strings.Repeat("x", MaxText+1)
	skipped := 0
	all := Find([]wire.Object{{Class: wire.CKOPublicKey, Label: long}, {Class: wire.CKOPrivateKey, ID: []byte(long)}}, Options{
		Hidden: true, Skip: func(o wire.Object, _ error) {
			if skipped++; len(o.Label)+len(o.ID) > 0 {
				t.Error("Skip gets the long text")
			}
		},
	}).Pairs
	if len(all) != 0 || skipped != 2 {
		t.Errorf("%d pairs, %d skipped", len(all), skipped)
	}
}
