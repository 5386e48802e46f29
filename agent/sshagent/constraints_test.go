package sshagent

import (
	"bytes"
	"crypto/rand"
	"slices"
	"strings"
	"testing"
	"time"

	"golang.org/x/crypto/ssh"

	"p11-agent/agent/request"
)

// Pieces of constraints, as ssh-add writes them.

func encodeHop(user, host string, keys ...any) []byte {
	return encode(user, host, "", raw(encode(keys...)))
}

func encodeDestination(from, to []byte) []byte { return encode(from, to, "") }

func destinationsOf(list ...[]byte) raw {
	var all []byte
	for _, d := range list {
		all = appendString(all, d)
	}
	return raw(encode(byte(255), constrainDestination, all))
}

func certsOf(only bool, list ...[]byte) raw {
	var all []byte
	for _, c := range list {
		all = appendString(all, c)
	}
	return raw(encode(byte(255), constrainCerts, only, all))
}

func newCert(t testing.TB) *ssh.Certificate {
	t.Helper()
	cert := &ssh.Certificate{Key: makeSigners()[0].PublicKey(), CertType: ssh.UserCert}
	if err := cert.SignCert(rand.Reader, makeSigners()[1]); err != nil {
		t.Fatal(err)
	}
	return cert
}

type constraintCase struct {
	name string
	in   []byte
	want request.Constraints
	fail string // part of the error; empty: none
}

func constraintCases(t testing.TB) []constraintCase {
	t.Helper()
	key, cert := makeSigners()[0].PublicKey().Marshal(), newCert(t).Marshal()
	lie := newCert(t)
	lie.Serial++
	forged := lie.Marshal()
	origin, somewhere := encodeHop("", ""), encodeHop("me", "host", key, false)
	destination := destinationsOf(encodeDestination(origin, somewhere))
	lifetime := raw{1, 0, 0, 0, 60}
	of := func(destinations, certs int) request.Constraints {
		return request.Constraints{Destinations: make([]request.Destination, destinations), Certificates: make([]*ssh.Certificate, certs)}
	}
	only := of(0, 2)
	only.CertificatesOnly = true
	both := of(1, 1)
	both.CertificatesOnly = true
	confirmed := of(1, 0)
	confirmed.Confirm = true
	return []constraintCase{
		{name: "none"},
		{name: "lifetime", in: lifetime, want: request.Constraints{Lifetime: time.Minute}},
		{name: "longest lifetime", in: raw{1, 255, 255, 255, 255}, want: request.Constraints{Lifetime: (1<<32 - 1) * time.Second}},
		{name: "confirm", in: raw{2}, want: request.Constraints{Confirm: true}},
		{name: "both", in: encode(raw{2}, lifetime), want: request.Constraints{Lifetime: time.Minute, Confirm: true}},
		{name: "no lifetime at all", in: raw{1, 0, 0, 0, 0}, want: request.Constraints{Lifetime: request.NoTime}},
		{name: "no lifetime at all, twice", in: raw{1, 0, 0, 0, 0, 1, 0, 0, 0, 0}, fail: "twice"},
		{name: "lifetime cut short", in: raw{1, 0, 0, 0}, fail: "cut short"},
		{name: "lifetime twice", in: encode(lifetime, lifetime), fail: "twice"},
		{name: "confirm twice", in: raw{2, 2}, fail: "twice"},
		{name: "number of signatures", in: raw{3, 0, 0, 0, 1}, fail: "constraint 3"},
		{name: "unknown constraint", in: raw{4}, fail: "constraint 4"},
		{name: "unknown constraint after others", in: encode(raw{2}, lifetime, raw{0}), fail: "constraint 0"},
		{name: "extension without a name", in: raw{255}, fail: "not supported"},
		{name: "unknown extension", in: encode(byte(255), "x@example.com", "data"), fail: `"x@example.com"`},
		{name: "unknown extension with a long name", in: encode(byte(255), strings.Repeat("\n", 5000)), fail: `\n"...`},
		{name: "security key provider", in: encode(byte(255), "sk-provider@openssh.com", "internal"), fail: "sk-provider"},

		{name: "destination", in: destination, want: of(1, 0)},
		{name: "destination and confirm", in: encode(destination, byte(2)), want: confirmed},
		{name: "destination of two hops", in: destinationsOf(encodeDestination(origin, somewhere), encodeDestination(encodeHop("", "host", key, false), encodeHop("", "*.example", key, true, key, false))), want: of(2, 0)},
		{name: "destination twice", in: encode(destination, destination), fail: "twice"},
		{name: "destination, none listed", in: destinationsOf(), want: of(0, 0)},
		{name: "destination, none listed at first", in: encode(destinationsOf(), destination), want: of(1, 0)},
		{name: "destination without data", in: encode(byte(255), constrainDestination), fail: "cut short"},
		{name: "destination from a user", in: destinationsOf(encodeDestination(encodeHop("me", "h", key, false), somewhere)), fail: "starts from"},
		{name: "destination from a host without keys", in: destinationsOf(encodeDestination(encodeHop("", "h"), somewhere)), fail: "without keys"},
		{name: "destination from keys without a host", in: destinationsOf(encodeDestination(encodeHop("", "", key, false), somewhere)), fail: "without a host"},
		{name: "destination to nowhere", in: destinationsOf(encodeDestination(origin, origin)), fail: "leads to"},
		{name: "destination to a host without keys", in: destinationsOf(encodeDestination(origin, encodeHop("", "h"))), fail: "leads to"},
		{name: "destination with a bad key", in: destinationsOf(encodeDestination(origin, encodeHop("", "h", encode("ssh-nothing"), false))), fail: `"ssh-nothing"`},
		{name: "destination, key without its flag", in: destinationsOf(encodeDestination(origin, encodeHop("", "h", key))), fail: "cut short"},
		{name: "destination, reserved field of a hop", in: destinationsOf(encodeDestination(origin, encode("", "h", "x", key, false))), fail: "reserved"},
		{name: "destination, reserved field", in: destinationsOf(encode(origin, somewhere, "x")), fail: "reserved"},
		{name: "destination, bytes left over", in: destinationsOf(encode(origin, somewhere, "", byte(0))), fail: "left over"},
		{name: "destination, longest user name", in: destinationsOf(encodeDestination(origin, encodeHop(strings.Repeat("u", 256), "h", key, false))), want: of(1, 0)},
		{name: "destination, longer user name", in: destinationsOf(encodeDestination(origin, encodeHop(strings.Repeat("u", 257), "h", key, false))), fail: "user name"},
		{name: "destination, NUL in a name", in: destinationsOf(encodeDestination(origin, encodeHop("", "h\x00", key, false))), fail: "NUL"},
		{name: "destination, as many as can be", in: destinationsOf(slices.Repeat([][]byte{encodeDestination(origin, somewhere)}, 1024)...), want: of(1024, 0)},
		{name: "destination, one more", in: destinationsOf(slices.Repeat([][]byte{encodeDestination(origin, somewhere)}, 1025)...), fail: "more than 1024"},
		{name: "destination, too many host keys", in: destinationsOf(encodeDestination(origin, encodeHop("", "h", slices.Repeat([]any{key, false}, 1025)...))), fail: "more than 1024"},

		{name: "certificate", in: certsOf(false, cert), want: of(0, 1)},
		{name: "certificates only", in: certsOf(true, cert, cert), want: only},
		{name: "certificates and destinations", in: encode(certsOf(true, cert), destination), want: both},
		{name: "certificates twice", in: encode(certsOf(true, cert), certsOf(true, cert)), fail: "twice"},
		{name: "certificates, none listed", in: certsOf(false), want: of(0, 0)},
		{name: "certificates without data", in: encode(byte(255), constrainCerts, false), fail: "cut short"},
		{name: "plain keys as certificates", in: certsOf(false, key, cert, key, cert), want: of(0, 2)},
		{name: "keys and certificates of unknown types", in: certsOf(false, mldsa(t), cert, encode("ssh-new-cert-v01@example.com", "x")), want: of(0, 1)},
		{name: "nothing but plain keys", in: certsOf(true, key), want: request.Constraints{CertificatesOnly: true}},
		{name: "certificate with a wrong signature", in: certsOf(false, forged), fail: "not signed by its authority"},
		{name: "bad certificate", in: certsOf(false, cert[:len(cert)-1]), fail: "cannot be read"},
		{name: "certificate cut short", in: encode(byte(255), constrainCerts, false, []byte{0, 0, 0, 9, 1}), fail: "cut short"},
		{name: "too many certificates", in: certsOf(false, slices.Repeat([][]byte{cert}, 1025)...), fail: "more than 1024"},
	}
}

func TestConstraints(t *testing.T) {
	for _, test := range constraintCases(t) {
		t.Run(test.name, func(t *testing.T) {
			c, err := parseConstraints(&reader{rest: test.in}, true)
			if test.fail != "" {
				if err == nil || !strings.Contains(err.Error(), test.fail) {
					t.Errorf("%+v, %v; want an error with %q", c, err, test.fail)
				}
				if err != nil && len(err.Error()) > 500 {
					t.Errorf("error of %d bytes", len(err.Error()))
				}
				return
			}
			if err != nil {
				t.Fatal(err)
			}
			if c.Lifetime != test.want.Lifetime || c.Confirm != test.want.Confirm || len(c.Destinations) != len(test.want.Destinations) ||
				len(c.Certificates) != len(test.want.Certificates) || c.CertificatesOnly != test.want.CertificatesOnly {
				t.Errorf("%+v, want %+v", c, test.want)
			}
		})
	}
}

// The door refuses every list of constraints that is cut short, unless it is cut between
// two constraints.
func TestConstraintsCutShort(t *testing.T) {
	key := makeSigners()[0].PublicKey().Marshal()
	pieces := []raw{
		{2},
		{1, 0, 0, 0, 60},
		destinationsOf(encodeDestination(encodeHop("", ""), encodeHop("me", "host", key, false))),
		certsOf(true, newCert(t).Marshal()),
	}
	var whole []byte
	ends := map[int]bool{0: true}
	for _, p := range pieces {
		whole = append(whole, p...)
		ends[len(whole)] = true
	}
	for n := range len(whole) + 1 {
		if _, err := parseConstraints(&reader{rest: whole[:n]}, true); (err == nil) != ends[n] {
			t.Errorf("the first %d of %d bytes: %v", n, len(whole), err)
		}
	}
}

// The door reads destinations and certificates as they were written.
func TestConstraintDetails(t *testing.T) {
	one, two := makeSigners()[0].PublicKey(), makeSigners()[1].PublicKey()
	cert := newCert(t)
	in := encode(destinationsOf(
		encodeDestination(encodeHop("", ""), encodeHop("me", "first", one.Marshal(), false)),
		encodeDestination(encodeHop("", "first", one.Marshal(), false), encodeHop("", "second", two.Marshal(), true, one.Marshal(), false)),
	), certsOf(true, cert.Marshal()))
	c, err := parseConstraints(&reader{rest: in}, true)
	if err != nil {
		t.Fatal(err)
	}
	clear(in) // the result must not share memory with the message
	if len(c.Destinations) != 2 || len(c.Certificates) != 1 || !c.CertificatesOnly || !bytes.Equal(c.Certificates[0].Marshal(), cert.Marshal()) {
		t.Fatalf("%+v", c)
	}
	same := func(h request.Hop, user, host string, keys ...ssh.PublicKey) bool {
		return h.User == user && h.Host == host && slices.EqualFunc(h.Keys, keys, func(k request.HostKey, want ssh.PublicKey) bool {
			return bytes.Equal(k.Key.Marshal(), want.Marshal()) && k.CA == (want == two)
		})
	}
	first, second := c.Destinations[0], c.Destinations[1]
	if !same(first.From, "", "") || !same(first.To, "me", "first", one) || !same(second.From, "", "first", one) || !same(second.To, "", "second", two, one) {
		t.Errorf("%+v", c.Destinations)
	}
}

func FuzzConstraints(f *testing.F) {
	cases := constraintCases(f)
	if len(cases) == 0 {
		f.Fatal("no seeds")
	}
	for _, c := range cases {
		if len(c.in) < 4096 {
			f.Add([]byte(c.in))
		}
	}
	f.Fuzz(func(t *testing.T, b []byte) {
		c, err := parseConstraints(&reader{rest: b}, true)
		if err != nil {
			if len(err.Error()) > 500 {
				t.Errorf("error of %d bytes", len(err.Error()))
			}
			return
		}
		// If the test writes them again, the door reads the same.
		var again []byte
		if c.Lifetime > 0 {
			again = append(again, encode(byte(1), uint32(c.Lifetime/time.Second))...)
		}
		if c.Confirm {
			again = append(again, 2)
		}
		if len(c.Destinations) > 0 {
			var list [][]byte
			for _, d := range c.Destinations {
				list = append(list, encodeDestination(encodeAgain(d.From), encodeAgain(d.To)))
			}
			again = append(again, destinationsOf(list...)...)
		}
		if len(c.Certificates) > 0 || c.CertificatesOnly {
			var list [][]byte
			for _, cert := range c.Certificates {
				list = append(list, cert.Marshal())
			}
			again = append(again, certsOf(c.CertificatesOnly, list...)...)
		}
		d, err := parseConstraints(&reader{rest: again}, true)
		if err != nil {
			t.Fatalf("%x read, but not %x: %v", b, again, err)
		}
		if d.Lifetime != c.Lifetime || d.Confirm != c.Confirm || len(d.Destinations) != len(c.Destinations) || len(d.Certificates) != len(c.Certificates) || d.CertificatesOnly != c.CertificatesOnly {
			t.Errorf("%+v, and again %+v", c, d)
		}
	})
}

func encodeAgain(h request.Hop) []byte {
	var keys []any
	for _, k := range h.Keys {
		keys = append(keys, k.Key.Marshal(), k.CA)
	}
	return encodeHop(h.User, h.Host, keys...)
}
