package main

import (
	"crypto/ed25519"
	"crypto/rand"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"slices"
	"strconv"
	"strings"

	"golang.org/x/crypto/ssh"
	sshclient "golang.org/x/crypto/ssh/agent"
)

// attackFlood requests signatures: flood KEYS.pub N M requests N signatures on one connection, and
// one signature on each of M other connections. It uses each key in turn, and signs new data each
// time. With a fourth argument, it binds each of the M connections to an invented host.
func attackFlood(args []string) error {
	if len(args) != 3 && len(args) != 4 {
		return errors.New("usage: flood KEYS.pub N M [bind]")
	}
	text, err := os.ReadFile(args[0])
	if err != nil {
		return err
	}
	var keys []ssh.PublicKey
	for len(text) > 0 {
		key, _, _, rest, err := ssh.ParseAuthorizedKey(text)
		if err != nil {
			break
		}
		keys, text = append(keys, key), rest
	}
	n, err := strconv.Atoi(args[1])
	if err != nil {
		return err
	}
	m, err := strconv.Atoi(args[2])
	if err != nil {
		return err
	}
	conn, err := dialSocket()
	if err != nil {
		return err
	}
	defer conn.Close()
	client := sshclient.NewClient(conn)
	for i := range n {
		askSignature(client, keys[i%len(keys)], i)
	}
	for i := range m {
		again, err := dialSocket()
		if err != nil {
			return err
		}
		client := sshclient.NewClient(again)
		if len(args) == 4 {
			err = bindToOwnHost(client)
		}
		askSignature(client, keys[i%len(keys)], i)
		if err := errors.Join(err, again.Close()); err != nil {
			return err
		}
	}
	return nil
}

func dialSocket() (net.Conn, error) { return net.Dial("unix", os.Getenv("SSH_AUTH_SOCK")) }

// askSignature requests the signature of a file, as ssh-keygen -Y does. It ignores the outcome.
func askSignature(client sshclient.ExtendedAgent, key ssh.PublicKey, i int) {
	data := append([]byte("SSHSIG"), ssh.Marshal(struct{ Namespace, Reserved, Hash, Digest string }{
		fmt.Sprintf("file-%d@example.org", i), "", "sha512", string(make([]byte, 64)),
	})...)
	_, _ = client.Sign(key, data)
}

// bindToOwnHost binds a connection for forwarding, to an invented host.
func bindToOwnHost(client sshclient.ExtendedAgent) error {
	public, private, err := ed25519.GenerateKey(rand.Reader)
	if err != nil {
		return err
	}
	signer, err := ssh.NewSignerFromKey(private)
	if err != nil {
		return err
	}
	key, err := ssh.NewPublicKey(public)
	if err != nil {
		return err
	}
	id := make([]byte, 32)
	sig, err := signer.Sign(rand.Reader, id)
	if err != nil {
		return err
	}
	_, err = client.Extension("session-bind@openssh.com", ssh.Marshal(struct {
		Host, ID, Signature string
		Forwarding          bool
	}{string(key.Marshal()), string(id), string(ssh.Marshal(sig)), true}))
	return err
}

// attackLog sends N requests that the agent refuses, for different reasons: log N. Every hundredth
// request has its own connection.
func attackLog(args []string) error {
	if len(args) != 1 {
		return errors.New("usage: log N")
	}
	n, err := strconv.Atoi(args[0])
	if err != nil {
		return err
	}
	text := func(s string) []byte { return ssh.Marshal(struct{ S string }{s}) }
	key := func(i int) string {
		seed := make([]byte, ed25519.SeedSize)
		binary.BigEndian.PutUint64(seed, uint64(i))
		public, err := ssh.NewPublicKey(ed25519.NewKeyFromSeed(seed).Public())
		if err != nil {
			panic(err)
		}
		return string(public.Marshal())
	}
	odd := func(i int) string { return strings.Repeat("x", i%200) + string(rune('a'+i%26)) }
	kinds := []func(i int) []byte{
		func(i int) []byte { return slices.Concat([]byte{13}, text(key(i)), text(odd(i)), make([]byte, 4)) }, // a signature
		func(i int) []byte { return slices.Concat([]byte{13}, text(odd(i))) },
		func(i int) []byte { return slices.Concat([]byte{18}, text(key(i))) }, // the removal of a key
		func(i int) []byte { return slices.Concat([]byte{20}, text("pkcs11:token="+odd(i)), text("")) },
		func(i int) []byte { return slices.Concat([]byte{21}, text("/usr/lib/"+odd(i)), text("")) },
		func(i int) []byte { return slices.Concat([]byte{23}, text("")) }, // unlock
		func(i int) []byte { return slices.Concat([]byte{27}, text(odd(i)+"@example.org")) },
		func(i int) []byte { return slices.Concat([]byte{27}, text("query"), text("left over")) },
		func(i int) []byte {
			return slices.Concat([]byte{27}, text("session-bind@openssh.com"), text(key(i)), text("id"), text("no signature"), []byte{1})
		},
		func(i int) []byte {
			return slices.Concat([]byte{27}, text("control-v1@p11-agent"), text("status"), text(""))
		},
		func(i int) []byte { return slices.Concat([]byte{27}, text("control-v1@p11-agent"), text(odd(i))) },
		func(i int) []byte { return []byte{byte(100 + i%100)} },
		func(i int) []byte { return []byte{11, 1} }, // a list
		func(i int) []byte { return []byte{19} },    // the removal of all keys
	}
	conn, err := dialSocket()
	if err != nil {
		return err
	}
	defer func() { _ = conn.Close() }()
	for i := range n {
		if i%100 == 99 {
			// The connection ends in the middle of a message.
			if _, err := conn.Write([]byte{0, 0, 1, 0, 13}); err != nil {
				return err
			}
			if err := conn.Close(); err != nil {
				return err
			}
			if conn, err = dialSocket(); err != nil {
				return err
			}
		}
		if err := sendRaw(conn, kinds[i%len(kinds)](i)); err != nil {
			return err
		}
	}
	return nil
}

// sendRaw sends a message and reads its answer.
func sendRaw(conn net.Conn, message []byte) error {
	if _, err := conn.Write(append(binary.BigEndian.AppendUint32(nil, uint32(len(message))), message...)); err != nil {
		return err
	}
	var size [4]byte
	if _, err := io.ReadFull(conn, size[:]); err != nil {
		return err
	}
	_, err := io.CopyN(io.Discard, conn, int64(binary.BigEndian.Uint32(size[:])))
	return err
}
