package sshagent

import (
	"bytes"
	"crypto/rand"
	"crypto/sha256"
	"encoding/binary"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"golang.org/x/crypto/ssh"
	sshclient "golang.org/x/crypto/ssh/agent"

	"p11-agent/agent/door/doortest"
	"p11-agent/agent/request"
)

// keys holds the files of the keys that this process has made, by the arguments of keygen.
var keys = make(map[string]map[string][]byte)

// keygen returns the file of a key of a type, which has a certificate. A process makes each key
// once.
func keygen(t testing.TB, args ...string) (file string) {
	t.Helper()
	what := strings.Join(args, " ")
	if keys[what] == nil {
		keys[what] = makeKey(t, args)
	}
	dir := doortest.Dir(t)
	for name, b := range keys[what] {
		if err := os.WriteFile(filepath.Join(dir, name), b, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	return filepath.Join(dir, "key")
}

// makeKey makes a key for tests, and returns its files. An RSA key of 4096 bits takes three
// seconds, so testdata has one.
func makeKey(t testing.TB, args []string) map[string][]byte {
	t.Helper()
	program := needs(t, "ssh-keygen")
	dir := t.TempDir()
	file := filepath.Join(dir, "key")
	run := func(args ...string) {
		t.Helper()
		if out, err := exec.Command(program, args...).CombinedOutput(); err != nil {
			t.Fatalf("ssh-keygen %v: %v\n%s", args, err, out)
		}
	}
	if slices.Contains(args, "4096") {
		for _, suffix := range []string{"", ".pub"} {
			b, err := os.ReadFile(filepath.Join("testdata", "rsa-4096"+suffix))
			if err == nil {
				err = os.WriteFile(file+suffix, b, 0o600)
			}
			if err != nil {
				t.Fatal(err)
			}
		}
	} else {
		run(append([]string{"-q", "-N", "", "-C", "comment", "-f", file}, args...)...)
	}
	run("-q", "-N", "", "-t", "ed25519", "-f", filepath.Join(dir, "ca"))
	run("-q", "-s", filepath.Join(dir, "ca"), "-I", "id", "-n", "me", file+".pub")
	made := make(map[string][]byte)
	for _, name := range []string{"key", "key.pub", "key-cert.pub"} {
		b, err := os.ReadFile(filepath.Join(dir, name))
		if err != nil {
			t.Fatal(err)
		}
		made[name] = b
	}
	return made
}

var keyTypes = map[string][]string{
	"rsa-1024": {"-t", "rsa", "-b", "1024"}, "rsa-2048": {"-t", "rsa", "-b", "2048"}, "rsa-4096": {"-t", "rsa", "-b", "4096"},
	"ecdsa-256": {"-t", "ecdsa", "-b", "256"}, "ecdsa-384": {"-t", "ecdsa", "-b", "384"}, "ecdsa-521": {"-t", "ecdsa", "-b", "521"},
	"ed25519": {"-t", "ed25519"},
}

// TestSSHAddFile adds keys of every type from files with ssh-add. It checks that each
// private key belongs to its public key.
func TestSSHAddFile(t *testing.T) {
	for name, args := range keyTypes {
		t.Run(name, func(t *testing.T) {
			keyring := newKeyring()
			var got []request.AddKey
			keyring.add = func(r request.AddKey) { got = append(got, r) }
			r := serve(t, &Door{Keyring: keyring})
			file := keygen(t, args...)
			if out, err := r.sshAdd(t, "", "-t", "90", "-c", file); err != nil {
				t.Fatalf("%v: %s", err, out)
			}
			if len(got) != 2 {
				t.Fatalf("%d keys were added, want the key and its certificate", len(got))
			}
			for i, r := range got {
				text, err := os.ReadFile(file + [...]string{".pub", "-cert.pub"}[i])
				if err != nil {
					t.Fatal(err)
				}
				want, _, _, _, err := ssh.ParseAuthorizedKey(text)
				if err != nil {
					t.Fatal(err)
				}
				if !bytes.Equal(r.Public.Marshal(), want.Marshal()) {
					t.Errorf("%s was added", r.Public.Type())
				}
				if r.Comment != "comment" || r.Constraints.Lifetime == 0 || !r.Constraints.Confirm {
					t.Errorf("comment %q, constraints %+v", r.Comment, r.Constraints)
				}
				signer, err := ssh.NewSignerFromSigner(r.Private)
				if err != nil {
					t.Fatal(err)
				}
				sig, err := signer.Sign(rand.Reader, []byte("data"))
				if err != nil {
					t.Fatal(err)
				}
				plain := want
				if cert, ok := want.(*ssh.Certificate); ok {
					plain = cert.Key
				}
				if err := plain.Verify([]byte("data"), sig); err != nil {
					t.Error(err)
				}
			}
		})
	}
}

// addMessages returns whole messages with which clients add keys.
func addMessages(t testing.TB) (all [][]byte) {
	t.Helper()
	for _, args := range keyTypes {
		file := keygen(t, args...)
		text, err := os.ReadFile(file)
		if err != nil {
			t.Fatal(err)
		}
		key, err := ssh.ParseRawPrivateKey(text)
		if err != nil {
			t.Fatal(err)
		}
		text, err = os.ReadFile(file + "-cert.pub")
		if err != nil {
			t.Fatal(err)
		}
		cert, _, _, _, err := ssh.ParseAuthorizedKey(text)
		if err != nil {
			t.Fatal(err)
		}
		for _, c := range []*ssh.Certificate{nil, cert.(*ssh.Certificate)} {
			w := &recorder{}
			client := sshclient.NewClient(w)
			_ = client.Add(sshclient.AddedKey{PrivateKey: key, Certificate: c, Comment: "c"})
			if len(w.frame) < 5 {
				t.Fatal("nothing was sent")
			}
			all = append(all, w.frame[4:])
		}
	}
	return all
}

// recorder takes a request and does not answer.
type recorder struct{ frame []byte }

func (r *recorder) Write(b []byte) (int, error) {
	r.frame = append(r.frame, b...)
	return len(b), nil
}

func (r *recorder) Read([]byte) (int, error) { return 0, os.ErrClosed }

func readPrivate(message []byte) (request.AddKey, error) {
	in := reader{rest: message[1:]}
	r, err := parsePrivate(string(in.bytes()), &in)
	if err == nil {
		err = in.end()
	}
	return r, err
}

// The door refuses a message that adds a key if the message is cut short, or if a field of
// the key is changed.
func TestPrivateKeyDamaged(t *testing.T) {
	for _, m := range addMessages(t) {
		r, err := readPrivate(m)
		if err != nil {
			t.Fatal(err)
		}
		name := r.Public.Type()
		for n := 1; n < len(m); n++ {
			if _, err := readPrivate(m[:n]); err == nil {
				t.Errorf("%s: the first %d of %d bytes are a key", name, n, len(m))
			}
		}
		if _, err := readPrivate(append(bytes.Clone(m), 0)); err == nil {
			t.Errorf("%s: with a byte after it, it is a key", name)
		}
		_, certified := r.Public.(*ssh.Certificate)
		for _, f := range fieldsOf(m) {
			last := f[1] == len(m)
			if f[0] == f[1] || last || certified && f[0] < 200 {
				continue // the comment is anything, and certificates are for servers to judge
			}
			changed := bytes.Clone(m)
			changed[f[1]-1] ^= 1
			got, err := readPrivate(changed)
			if err != nil || strings.Contains(name, "rsa") {
				continue // one of RSA's numbers is computed again
			}
			if pub, err := ssh.NewPublicKey(got.Private.Public()); err != nil || !certified || bytes.Equal(pub.Marshal(), got.Public.(*ssh.Certificate).Key.Marshal()) {
				t.Errorf("%s: with byte %d changed it is a key", name, f[1]-1)
			}
		}
	}
}

// fieldsOf returns where the strings of a message begin and end.
func fieldsOf(m []byte) (all [][2]int) {
	for at := 1; at+4 <= len(m); {
		n := int(binary.BigEndian.Uint32(m[at:]))
		all = append(all, [2]int{at + 4, at + 4 + n})
		at += 4 + n
	}
	return all
}

func TestPrivateKeyRefusals(t *testing.T) {
	for name, test := range map[string]struct {
		message []byte
		fail    string
	}{
		"no key at all":              {encode(""), "type"},
		"DSA":                        {encode("ssh-dss", "p", "q", "g", "y", "x", "c"), `"ssh-dss"`},
		"unknown":                    {encode(strings.Repeat("x", 500), "c"), "cannot be used"},
		"certificate that is none":   {encode("ssh-ed25519-cert-v01@openssh.com", "x"), "cannot be read"},
		"certificate of plain key":   {encode("ssh-ed25519-cert-v01@openssh.com", string(makeSigners()[0].PublicKey().Marshal())), "certificate is expected"},
		"negative numbers":           {encode("ssh-rsa", "\x80", "\x03", "\x03", "\x03", "\x03", "\x03", "c"), "wrong"},
		"RSA with a huge exponent":   {encode("ssh-rsa", strings.Repeat("\x7f", 256), strings.Repeat("\x7f", 256), "\x07", "\x03", "\x0b", "\x03", "c"), "wrong"},
		"RSA of 64 Kibit":            {encode("ssh-rsa", strings.Repeat("\x7f", 8192), "\x03", "\x07", "\x03", "\x0b", "\x03", "c"), "wrong"},
		"ECDSA with another curve":   {encode("ecdsa-sha2-nistp256", "nistp384", "\x04", "\x01", "c"), "wrong"},
		"ECDSA with zero":            {encode("ecdsa-sha2-nistp256", "nistp256", "\x04", "", "c"), "wrong"},
		"Ed25519 that is too short":  {encode("ssh-ed25519", "x", "x", "c"), "wrong"},
		"Ed25519 of different parts": {encode("ssh-ed25519", strings.Repeat("x", 32), strings.Repeat("x", 64), "c"), "wrong"},
	} {
		t.Run(name, func(t *testing.T) {
			in := reader{rest: test.message}
			_, err := parsePrivate(string(in.bytes()), &in)
			if err == nil || !strings.Contains(err.Error(), test.fail) || len(err.Error()) > 300 {
				t.Errorf("got %v, want %q", err, test.fail)
			}
		})
	}
}

func FuzzPrivateKey(f *testing.F) {
	for _, m := range addMessages(f) {
		if len(m) < 1500 {
			f.Add(m)
		}
	}
	f.Add([]byte{msgAddIdentity})
	f.Fuzz(func(t *testing.T, b []byte) {
		if len(b) == 0 || len(b) > 4096 {
			return
		}
		r, err := readPrivate(b)
		if err != nil {
			return
		}
		if _, ok := r.Public.(*ssh.Certificate); ok {
			return // the keyring compares its key
		}
		if pub, err := ssh.NewPublicKey(r.Private.Public()); err != nil || !bytes.Equal(pub.Marshal(), r.Public.Marshal()) {
			t.Errorf("the halves differ: %v", err)
		}
	})
}

// The agent passes keys that it cannot sign with to upstream agents.
func TestSecurityKeys(t *testing.T) {
	keyring := newKeyring()
	r := serve(t, &Door{Keyring: keyring})
	conn := r.dial()
	frame := message(msgAddIdentityConstraint, "sk-ssh-ed25519@openssh.com", "anything")
	if got := ask(t, conn, frame)[0]; !bytes.Equal(got, []byte{msgFailure}) {
		t.Errorf("answer %x", got)
	}
	keyring.pass = func([]byte) ([]byte, error) { return []byte{msgSuccess}, nil }
	if got := ask(t, conn, frame)[0]; !bytes.Equal(got, []byte{msgSuccess}) {
		t.Errorf("answer %x", got)
	}
	calls := keyring.noted()
	if len(calls) != 1 || calls[0].method != "Pass" || calls[0].key != string(frame) {
		t.Errorf("calls %+v", calls)
	}
	// The agent passes on every unknown message, too, and every unknown extension.
	keyring.pass = func(m []byte) ([]byte, error) { return append([]byte{200}, m...), nil }
	for _, frame := range [][]byte{{240, 1, 2}, message(msgExtension, "x@example.com", "data")} {
		if got := ask(t, conn, frame)[0]; !bytes.Equal(got, append([]byte{200}, frame...)) {
			t.Errorf("answer %x", got)
		}
	}
}

func TestParseLogin(t *testing.T) {
	key := makeSigners()[1].PublicKey().Marshal() // RSA
	host := makeSigners()[0].PublicKey().Marshal()
	const hostbound = "publickey-hostbound-v00@openssh.com"
	login := func(parts ...any) []byte { return encode(parts...) }
	session := strings.Repeat("s", sha256.Size)
	certified := func(of int, id string) string {
		c := &ssh.Certificate{Key: makeSigners()[of].PublicKey(), CertType: ssh.UserCert, KeyId: id}
		if err := c.SignCert(rand.Reader, makeSigners()[0]); err != nil {
			t.Fatal(err)
		}
		return string(c.Marshal())
	}
	made := make(map[int]string) // each has another nonce
	certificate := func(of int) string {
		if made[of] == "" {
			made[of] = certified(of, "")
		}
		return made[of]
	}
	// changed returns a certificate with another serial number than the signed one.
	changed := func(certificate string) string {
		key, err := ssh.ParsePublicKey([]byte(certificate))
		if err != nil {
			t.Fatal(err)
		}
		c := key.(*ssh.Certificate)
		c.Serial++
		return string(c.Marshal())
	}
	for _, test := range []struct {
		name string
		data []byte
		want string // user, session, host
	}{
		{"plain", login(session, byte(50), "me", "ssh-connection", "publickey", byte(1), "rsa-sha2-512", string(key)), fmt.Sprintf("me %s ", session)},
		{"old algorithm", login(session, byte(50), "", "ssh-connection", "publickey", byte(1), "ssh-rsa", string(key)), fmt.Sprintf(" %s ", session)},
		{"with its host", login(session, byte(50), "me", "ssh-connection", hostbound, byte(1), "rsa-sha2-256", string(key), string(host)), fmt.Sprintf("me %s %s", session, host)},
		{"host without one", login(session, byte(50), "me", "ssh-connection", hostbound, byte(1), "rsa-sha2-256", string(key), ""), ""},
		{"host missing", login(session, byte(50), "me", "ssh-connection", hostbound, byte(1), "rsa-sha2-256", string(key)), ""},
		{"host not wanted", login(session, byte(50), "me", "ssh-connection", "publickey", byte(1), "rsa-sha2-256", string(key), string(host)), ""},
		{"no signature follows", login(session, byte(50), "me", "ssh-connection", "publickey", byte(0), "rsa-sha2-256", string(key)), ""},
		{"another message", login(session, byte(51), "me", "ssh-connection", "publickey", byte(1), "rsa-sha2-256", string(key)), ""},
		{"another service", login(session, byte(50), "me", "ssh-userauth", "publickey", byte(1), "rsa-sha2-256", string(key)), ""},
		{"another method", login(session, byte(50), "me", "ssh-connection", "hostbased", byte(1), "rsa-sha2-256", string(key)), ""},
		{"another key", login(session, byte(50), "me", "ssh-connection", "publickey", byte(1), "rsa-sha2-256", string(host)), ""},
		{"another type", login(session, byte(50), "me", "ssh-connection", "publickey", byte(1), "ssh-ed25519", string(key)), ""},
		{"of a certificate", login(session, byte(50), "me", "ssh-connection", "publickey", byte(1), "rsa-sha2-256-cert-v01@openssh.com", string(key)), ""},
		{"with its certificate", login(session, byte(50), "me", "ssh-connection", "publickey", byte(1), "rsa-sha2-256-cert-v01@openssh.com", certificate(1)), fmt.Sprintf("me %s ", session)},
		{"another's certificate", login(session, byte(50), "me", "ssh-connection", "publickey", byte(1), "ssh-ed25519-cert-v01@openssh.com", certificate(0)), ""},
		{"not a certificate", login(session, byte(50), "me", "ssh-connection", "publickey", byte(1), "rsa-sha2-256", certificate(1)), ""},
		{"a NUL in the user", login(session, byte(50), "m\x00e", "ssh-connection", "publickey", byte(1), "rsa-sha2-256", string(key)), ""},
		{"a byte after it", login(session, byte(50), "me", "ssh-connection", "publickey", byte(1), "rsa-sha2-256", string(key), byte(0)), ""},
		{"a user of 256 bytes", login(session, byte(50), strings.Repeat("u", 256), "ssh-connection", "publickey", byte(1), "rsa-sha2-256", string(key)), fmt.Sprintf("%s %s ", strings.Repeat("u", 256), session)},
		{"a longer user", login(session, byte(50), strings.Repeat("u", 257), "ssh-connection", "publickey", byte(1), "rsa-sha2-256", string(key)), ""},
		{"the longest session", login(session+session, byte(50), "me", "ssh-connection", "publickey", byte(1), "rsa-sha2-256", string(key)), fmt.Sprintf("me %s ", session+session)},
		{"a longer session", login(session+session+"s", byte(50), "me", "ssh-connection", "publickey", byte(1), "rsa-sha2-256", string(key)), ""},
		{"a session of no hash", login(session[1:], byte(50), "me", "ssh-connection", "publickey", byte(1), "rsa-sha2-256", string(key)), ""},
		{"no session", login("", byte(50), "me", "ssh-connection", "publickey", byte(1), "rsa-sha2-256", string(key)), ""},
		{"a host that is no key", login(session, byte(50), "me", "ssh-connection", hostbound, byte(1), "rsa-sha2-256", string(key), "host"), ""},
		{"a host with more than its key", login(session, byte(50), "me", "ssh-connection", hostbound, byte(1), "rsa-sha2-256", string(key), string(host)+"x"), ""},
		{"a certificate that is not signed", login(session, byte(50), "me", "ssh-connection", "publickey", byte(1), "rsa-sha2-256-cert-v01@openssh.com", changed(certificate(1))), ""},
		{"a host's certificate", login(session, byte(50), "me", "ssh-connection", hostbound, byte(1), "rsa-sha2-256", string(key), certificate(0)), fmt.Sprintf("me %s %s", session, certificate(0))},
		{"a host's certificate that is not signed", login(session, byte(50), "me", "ssh-connection", hostbound, byte(1), "rsa-sha2-256", string(key), changed(certificate(0))), ""},
		{"a certificate with a NUL in it", login(session, byte(50), "me", "ssh-connection", "publickey", byte(1), "rsa-sha2-256-cert-v01@openssh.com", certified(1, "a\x00b")), ""},
		{"a certificate without bounds", login(session, byte(50), "me", "ssh-connection", "publickey", byte(1), "rsa-sha2-256-cert-v01@openssh.com", certified(1, strings.Repeat("i", maxPeerKey))), ""},
		{"SSHSIG", []byte("SSHSIG\x00\x00\x00\x03git"), ""},
		{"nothing", nil, ""},
	} {
		t.Run(test.name, func(t *testing.T) {
			got := ""
			if l := parseLogin(test.data, key); l != nil {
				got = fmt.Sprintf("%s %s %s", l.User, l.SessionID, l.HostKey)
			}
			if got != test.want {
				t.Errorf("got %q", got)
			}
			for n := 0; test.want != "" && n < len(test.data); n++ {
				if parseLogin(test.data[:n], key) != nil {
					t.Fatalf("the first %d bytes are a login", n)
				}
			}
		})
	}
	if !slices.Equal([]bool{
		algorithmFits(ssh.CertAlgoRSASHA512v01, ssh.CertAlgoRSAv01), algorithmFits(ssh.KeyAlgoRSASHA512, ssh.CertAlgoRSAv01),
		algorithmFits(ssh.CertAlgoED25519v01, ssh.CertAlgoED25519v01), algorithmFits(ssh.KeyAlgoED25519, ssh.CertAlgoED25519v01),
	}, []bool{true, false, true, false}) {
		t.Error("algorithms of certificates")
	}
}
