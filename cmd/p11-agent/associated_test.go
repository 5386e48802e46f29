package main

import (
	"crypto/rand"
	"fmt"
	"strings"
	"testing"

	"golang.org/x/crypto/ssh"
	sshclient "golang.org/x/crypto/ssh/agent"

	"p11-agent/token/tokentest"
)

// The test sends what "ssh-add -s MODULE FILE..." of OpenSSH 10.5 sends for public keys of all
// kinds. The agent adds the certificates of the keys on the token, and skips the rest. With -C,
// ssh-add adds only certificates. Then files for other keys are a failure.
func TestAssociatedCertificates(t *testing.T) {
	softhsm := tokentest.NewSoftHSM(t)
	softhsm.AddToken("work", storyPIN)
	softhsm.GenerateKey("work", tokentest.P256, "01", "login")
	s := newStandIn(t, "ssh-agent")
	s.env = append(s.env, softhsm.Env()...)
	a := s.background()
	k := newBehaviourPairs(t)
	r := &rig{t: t, socket: a.socket}
	r.connect()
	add := func(what string, only byte, keys ...[]byte) {
		t.Helper()
		var list []byte
		for _, key := range keys {
			list = append(list, sshFields(key)...)
		}
		fields := []any{softhsm.Module(), storyPIN}
		if keys != nil {
			fields = append(fields, byte(255), "associated-certs-v00@openssh.com", only, list)
		}
		r.ask(what, 26, fields...)
	}
	add("the token", 0)
	keys, err := r.client.List()
	if err != nil || len(keys) != 1 {
		t.Fatalf("%d keys, %v, %s", len(keys), err, &r.said)
	}
	public, err := ssh.ParsePublicKey(keys[0].Blob)
	if err != nil {
		t.Fatal(err)
	}
	cert := &ssh.Certificate{Key: public, CertType: ssh.UserCert, ValidBefore: ssh.CertTimeInfinity, ValidPrincipals: []string{"me"}}
	if err := cert.SignCert(rand.Reader, k.other.signer); err != nil {
		t.Fatal(err)
	}
	forged := *cert
	forged.Serial++
	unknown := sshFields("ssh-new-cert-v01@example.com", "nonce", "key")
	add("foreign certificates only", 1, k.ed.cert.Marshal(), k.ec.cert.Marshal())
	add("no certificates at all", 1, public.Marshal(), k.ed.public.Marshal())
	add("a forged one", 0, forged.Marshal())
	listed := func() (types []string) {
		keys, err := r.client.List()
		if err != nil {
			t.Fatal(err)
		}
		for _, key := range keys {
			types = append(types, key.Format)
		}
		return types
	}
	r.say("%q", listed())
	add("all kinds", 0, public.Marshal(), k.ed.cert.Marshal(), unknown, cert.Marshal(), k.ed.public.Marshal())
	r.say("%q", listed())
	// Both the key and the certificate sign.
	for _, key := range []ssh.PublicKey{public, cert} {
		data := loginData("one", "me", key, k.host.public)
		if sig, err := r.client.SignWithFlags(key, data, sshclient.SignatureFlags(0)); err != nil || public.Verify(data, sig) != nil {
			t.Errorf("%s: %v", key.Type(), err)
		}
	}
	want := []string{
		"the token: answer 6", "foreign certificates only: answer 5", "no certificates at all: answer 5", "a forged one: answer 5",
		fmt.Sprintf("%q", []string{ssh.KeyAlgoECDSA256}), "all kinds: answer 6", fmt.Sprintf("%q", []string{ssh.KeyAlgoECDSA256, ssh.CertAlgoECDSA256v01}),
	}
	if got := r.said.String(); got != strings.Join(want, "\n")+"\n" {
		t.Errorf("it said\n%s\nwant\n%s", got, strings.Join(want, "\n"))
	}
}
