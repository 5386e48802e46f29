package main

import (
	"context"
	"crypto/ed25519"
	"encoding/binary"
	"io"
	"maps"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"golang.org/x/crypto/ssh"

	"p11-agent/token/tokentest"
)

// unreadableKeys returns identities that OpenSSH does not read: its clients reject the whole list.
// It returns the wire forms of their keys, and their comments.
func unreadableKeys(t *testing.T, k behaviourPairs) map[string][2]string {
	t.Helper()
	forged := *k.ed.cert
	forged.Serial++
	crowded := *k.ed.cert
	crowded.ValidPrincipals = slices.Repeat([]string{"me"}, 257)
	torn := *k.ed.cert
	torn.KeyId = "a\x00b"
	for _, c := range []*ssh.Certificate{&crowded, &torn} {
		if err := c.SignCert(zeros{}, k.other.signer); err != nil {
			t.Fatal(err)
		}
	}
	return map[string][2]string{
		"wrong signature of the CA": {string(forged.Marshal()), "bad"},
		"257 principals":            {string(crowded.Marshal()), "bad"},
		"NUL in the key ID":         {string(torn.Marshal()), "bad"},
		"NUL in the comment":        {string(k.ed.public.Marshal()), "b\x00ad"},
	}
}

type zeros struct{}

func (zeros) Read(b []byte) (int, error) {
	clear(b)
	return len(b), nil
}

// addIdentity asks the agent to add a key with a wire form. The wire form may be a certificate.
func (r *rig) addIdentity(what string, k pair, wire, comment string) {
	r.t.Helper()
	private := k.private.(ed25519.PrivateKey)
	var fields []any
	if in, ok := strings.CutPrefix(wire, string(sshFields(ssh.CertAlgoED25519v01))); ok && in != "" {
		fields = []any{ssh.CertAlgoED25519v01, wire}
	} else {
		fields = []any{ssh.KeyAlgoED25519}
	}
	fields = append(fields, []byte(private[32:]), []byte(private), comment)
	r.ask(what, 17, fields...)
}

// OpenSSH does not read one identity. The other identities stay in the list. The identity comes
// from a client, a forwarded client or an upstream agent.
func TestListIsReadable(t *testing.T) {
	needPrograms(t, "ssh-add", "ssh-agent")
	k := newBehaviourPairs(t)
	upstream := filepath.Join(tokentest.TempDir(t), "u")
	list := sshFields(byte(12), uint32(5), k.rsa.public.Marshal(), "of the upstream agent")
	all := unreadableKeys(t, k)
	for _, bad := range all {
		list = append(list, sshFields(bad[0], bad[1])...)
	}
	serveList(t, upstream, list)
	for _, forwarded := range []bool{false, true} {
		r := &rig{t: t, socket: startOne(t, "p11-agent", "upstream = [\""+upstream+"\"]\n")}
		theirs := &rig{t: t, socket: startOne(t, "ssh-agent")}
		for _, r := range []*rig{r, theirs} {
			r.connect()
			r.status("good one", r.client.Add(k.ec.added("good")))
			if forwarded {
				r.bind("bind", "one", k.host, k.host, 1)
			}
			for _, name := range slices.Sorted(maps.Keys(all)) {
				bad := all[name]
				r.addIdentity(name, k.ed, bad[0], bad[1])
			}
			// A text may end in a NUL, which does not belong to the text.
			r.addIdentity("NUL at the end of the comment", k.ed, string(k.ed.public.Marshal()), "end\x00")
			r.said.WriteString("\n")
		}
		if ours, theirs := r.said.String(), theirs.said.String(); ours != theirs {
			t.Errorf("p11-agent:\n%s\nssh-agent:\n%s", ours, theirs)
		}
		cmd := exec.Command("ssh-add", "-l")
		cmd.Env = append(os.Environ(), "SSH_AUTH_SOCK="+r.socket)
		out, err := cmd.CombinedOutput()
		if err != nil || !strings.Contains(string(out), " good (ECDSA)\n") || !strings.Contains(string(out), " end (ED25519)\n") ||
			!strings.Contains(string(out), "of the upstream agent") || strings.Count(string(out), "\n") != 3 {
			t.Errorf("%v:\n%s", err, out)
		}
	}
}

// serveList sends the same answer to each request.
func serveList(t *testing.T, path string, answer []byte) {
	t.Helper()
	var config net.ListenConfig
	l, err := config.Listen(context.Background(), "unix", path)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { l.Close() })
	go func() {
		for {
			conn, err := l.Accept()
			if err != nil {
				return
			}
			go func() {
				defer conn.Close()
				for {
					var length [4]byte
					if _, err := io.ReadFull(conn, length[:]); err != nil {
						return
					}
					request := make([]byte, binary.BigEndian.Uint32(length[:]))
					if _, err := io.ReadFull(conn, request); err != nil {
						return
					}
					if request[0] != 11 { // a bind
						_, _ = conn.Write([]byte{0, 0, 0, 1, 6})
						continue
					}
					if _, err := conn.Write(append(binary.BigEndian.AppendUint32(nil, uint32(len(answer))), answer...)); err != nil {
						return
					}
				}
			}()
		}
	}()
}
