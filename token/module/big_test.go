package module

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"log"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/miekg/pkcs11"

	"p11-agent/agent/peer/proctest"
	"p11-agent/pinentry/secret"
	"p11-agent/token/tokentest"
	"p11-agent/token/wire"
)

// loadHere loads a module into this process, and returns the slot of its token.
func loadHere(t *testing.T, path string, env ...string) (lib *library, slot uint) {
	t.Helper()
	for _, kv := range env {
		name, value, _ := strings.Cut(kv, "=")
		t.Setenv(name, value)
	}
	lib, err := load(path)
	if err != nil {
		t.Fatal(err)
	}
	if err := lib.initialize(""); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = lib.finalize() }) // never fails
	slots, err := lib.slots(true)
	if err != nil || len(slots) == 0 {
		t.Fatalf("slots %v, %v", slots, err)
	}
	return lib, slots[0]
}

// loadBig loads a module into this process. Its token has so many pairs, and no pair
// signs.
func loadBig(t *testing.T, pairs int) (lib *library, slot uint, calls func() uint64) {
	t.Helper()
	h := tokentest.NewSoftHSM(t)
	h.AddToken("big", "")
	counts := filepath.Join(h.Dir(), "counts")
	lib, slot = loadHere(t, tokentest.BuildBigModule(t), append(h.Env(), tokentest.BigModuleEnv(h.Module(), pairs, "", counts)...)...)
	return lib, slot, func() uint64 {
		b, err := os.ReadFile(counts)
		if errors.Is(err, os.ErrNotExist) {
			return 0 // the module has made no call yet
		}
		if err != nil {
			t.Fatal(err)
		}
		return binary.NativeEndian.Uint64(b) + binary.NativeEndian.Uint64(b[8:])
	}
}

// TestListGrowsLinearly counts calls of PKCS#11, parts and allocations for a list of n
// pairs, and for a list of twice as many.
func TestListGrowsLinearly(t *testing.T) {
	type cost struct{ calls, parts, objects, allocations float64 }
	measure := func(pairs int) (c cost) {
		t.Run(fmt.Sprint(pairs), func(t *testing.T) {
			lib, slot, calls := loadBig(t, pairs)
			session, err := lib.openSession(slot)
			if err != nil {
				t.Fatal(err)
			}
			if err := lib.login(session, pkcs11.CKU_USER, []byte(tokentest.PIN)); err != nil {
				t.Fatal(err)
			}
			r := &reading{lib: lib, session: session, log: log.New(io.Discard, "", 0), pause: func() error { return nil }}
			r.send = func(part *wire.ObjectsPart) error {
				if len(part.Objects) > partObjects {
					t.Errorf("a part has %d objects", len(part.Objects))
				}
				c.parts++
				return nil
			}
			c.allocations = testing.AllocsPerRun(1, func() {
				c.parts = 0
				before := calls()
				r.begin()
				if err := r.all(nil); err != nil {
					t.Fatal(err)
				}
				c.calls, c.objects = float64(calls()-before), float64(r.count)
			})
		})
		return c
	}
	const n = 1000
	one, two := measure(n), measure(2*n)
	if one.objects != 2*n || two.objects != 4*n {
		t.Fatalf("%v and %v objects are listed", one.objects, two.objects)
	}
	for what, of := range map[string]func(cost) float64{
		"calls":       func(c cost) float64 { return c.calls },
		"parts":       func(c cost) float64 { return c.parts },
		"allocations": func(c cost) float64 { return c.allocations },
	} {
		if of(two) > 2.2*of(one) {
			t.Errorf("%v %s for %d pairs, %v for %d", of(one), what, n, of(two), 2*n)
		}
	}
}

// TestListBetweenLogins logs in between two parts of a list. The login need not wait for
// the end of the list, and the list begins again with the private keys.
func TestListBetweenLogins(t *testing.T) {
	const pairs = 1000
	lib, slot, _ := loadBig(t, pairs)
	id, _, err := lib.tokenInfo(slot)
	if err != nil {
		t.Fatal(err)
	}
	s := newServer(nil, log.New(io.Discard, "", 0))
	tok := s.token(id)
	in := make(chan error, 1)
	parts, listed := 0, 0
	send := func(part *wire.ObjectsPart) error {
		if part.First {
			listed = 0
		}
		listed += len(part.Objects)
		if parts++; parts == 1 {
			pin, err := secret.From([]byte(tokentest.PIN))
			if err != nil {
				return err
			}
			go func() {
				_, err := s.login(context.Background(), lib, tok, &wire.Login{Token: id, PIN: pin})
				in <- err
			}()
			proctest.Until(t, "the login waits for its turn", func() bool { return len(tok.gate.turn) == 1 })
		}
		if parts == 3 { // the list is long past its beginning
			if err := <-in; err != nil {
				t.Error(err)
			}
		}
		return nil
	}
	m, err := s.listObjects(t.Context(), lib, &wire.Objects{Token: id}, send)
	if err != nil {
		t.Fatal(err)
	}
	reply := m.(*wire.ObjectsReply)
	if listed += len(reply.Objects); listed != 2*pairs || !reply.Info.LoggedIn {
		t.Errorf("%d objects are listed, logged in: %v", listed, reply.Info.LoggedIn)
	}
}

// TestNamedObjects checks that the process searches for named objects only if the token
// has more objects than the process lists.
func TestNamedObjects(t *testing.T) {
	lib, slot, calls := loadBig(t, 100)
	session, err := lib.openSession(slot)
	if err != nil {
		t.Fatal(err)
	}
	label := make([]byte, 32)
	for i := range label {
		label[i] = byte(32 + i)
	}
	named := []wire.ObjectName{{ID: []byte{0x10, 0, 0, 80}}, {Label: string(label)}, {ID: []byte{0x10, 0, 0, 90}, Label: "another"}}
	list := func(most int, named []wire.ObjectName) (ids []byte, cut bool, cost uint64) {
		r := &reading{lib: lib, session: session, log: log.New(io.Discard, "", 0), pause: func() error { return nil }}
		r.send = func(part *wire.ObjectsPart) error {
			for _, o := range part.Objects {
				ids = append(ids, o.ID[3])
			}
			return nil
		}
		r.begin()
		r.most = most
		before := calls()
		if err := errors.Join(r.all(named), r.flush()); err != nil {
			t.Fatal(err)
		}
		return ids, r.cut, calls() - before
	}
	_, _, plain := list(200, nil)
	ids, cut, cost := list(200, named)
	if len(ids) != 100 || cut || cost != plain {
		t.Errorf("%d objects, cut: %v, %d calls in place of %d", len(ids), cut, cost, plain)
	}
	ids, cut, _ = list(2, named)
	// Each eighth pair has this label.
	if want := append([]byte{0, 1, 80}, 9, 17, 25, 33, 41, 49, 57, 65, 73, 81, 89, 97); !cut || !bytes.Equal(ids, want) {
		t.Errorf("%v are listed, cut: %v, want %v", ids, cut, want)
	}
}

// TestLongCertificates reads certificates of 400 KB. The reply counts a certificate that
// is too long to be read.
func TestLongCertificates(t *testing.T) {
	h := tokentest.NewSoftHSM(t)
	h.AddToken("long", "")
	lib, slot := loadHere(t, h.Module(), h.Env()...)
	session, err := lib.openWritable(slot)
	if err != nil {
		t.Fatal(err)
	}
	if err := lib.login(session, pkcs11.CKU_USER, []byte(tokentest.PIN)); err != nil {
		t.Fatal(err)
	}
	for _, tt := range []struct {
		size int
		long bool
	}{{1000, false}, {400 << 10, false}, {roomLong, false}, {roomLong + 1, true}} {
		object, err := lib.ctx.CreateObject(session, []*pkcs11.Attribute{
			pkcs11.NewAttribute(pkcs11.CKA_CLASS, pkcs11.CKO_CERTIFICATE),
			pkcs11.NewAttribute(pkcs11.CKA_CERTIFICATE_TYPE, pkcs11.CKC_X_509),
			pkcs11.NewAttribute(pkcs11.CKA_TOKEN, true),
			pkcs11.NewAttribute(pkcs11.CKA_SUBJECT, []byte("long")),
			pkcs11.NewAttribute(pkcs11.CKA_ID, []byte{7}),
			pkcs11.NewAttribute(pkcs11.CKA_VALUE, bytes.Repeat([]byte{0x30}, tt.size)),
		})
		if err != nil {
			t.Fatal(err)
		}
		o, long, err := readCertificate(lib, session, object)
		switch {
		case err != nil || o == nil:
			t.Errorf("%d bytes: %v", tt.size, err)
		case long != tt.long, !long && len(o.Value) != tt.size:
			t.Errorf("%d bytes: %d are read, too long: %v", tt.size, len(o.Value), long)
		}
	}
}
