package request

import (
	"slices"
	"testing"

	"golang.org/x/crypto/ssh"

	"p11-agent/agent/peer"
	"p11-agent/agent/sshkey/keytest"
)

// What a person is told can be judged: a host is called verified only when it has
// proved to be the one that the request is for.
func TestLines(t *testing.T) {
	shared, any, many := keytest.New(t).Public, keytest.New(t).Public, keytest.New(t).Public
	hub, inner, evil, gone, secret := keytest.New(t).Public, keytest.New(t).Public, keytest.New(t).Public, keytest.New(t).Public, keytest.New(t).Public
	names := hostTable{
		string(hub.Marshal()):    {Names: []string{"hub.example.org", "192.0.2.1"}},
		string(inner.Marshal()):  {Names: []string{"inner.example.org"}},
		string(gone.Marshal()):   {Names: []string{"gone.example.org"}, Revoked: true},
		string(secret.Marshal()): {Hashed: true},
		string(shared.Marshal()): {Names: []string{"web1", "*.example.com"}},
		string(any.Marshal()):    {Names: []string{"*"}},
		string(many.Marshal()):   {Names: []string{"db?.example.com", "a,b", "c", "d", "e"}},
	}
	print := ssh.FingerprintLegacyMD5
	bound := func(forwarding bool, keys ...ssh.PublicKey) *Caller {
		c := &Caller{Forwarded: forwarding || len(keys) > 1}
		for i, k := range keys {
			c.Binds = append(c.Binds, Bind{HostKey: k, SessionID: []byte{byte(i)}, Forwarding: forwarding || i < len(keys)-1})
		}
		return c
	}
	login := func(user string, session byte, host ssh.PublicKey) *Login {
		l := &Login{User: user, SessionID: []byte{session}}
		if host != nil {
			l.HostKey = host.Marshal()
		}
		return l
	}
	local := new(Caller)
	for name, test := range map[string]struct {
		caller  *Caller
		content Content
		login   *Login
		want    []string
	}{
		"login, proved":              {bound(false, hub), Content{}, login("root", 0, nil), []string{"For: SSH login as root at hub.example.org (host verified)"}},
		"login, proved and said":     {bound(false, hub), Content{}, login("root", 0, hub), []string{"For: SSH login as root at hub.example.org (host verified)"}},
		"login, only said":           {local, Content{}, login("root", 0, hub), []string{"For: SSH login as root at hub.example.org (NOT VERIFIED: only the request says so)"}},
		"login, another session":     {bound(false, hub), Content{}, login("root", 9, nil), []string{"For: SSH login as root at an unknown host"}},
		"login, another host":        {bound(false, evil), Content{}, login("root", 0, hub), []string{"For: SSH login as root at ANOTHER HOST than the one connected to, with the key " + print(hub)}},
		"login, said, no name":       {local, Content{}, login("root", 0, evil), []string{"For: SSH login as root at a host NOT VERIFIED, key " + print(evil)}},
		"login, no host":             {local, Content{}, login("root", 0, nil), []string{"For: SSH login as root at an unknown host"}},
		"login, no name":             {bound(false, evil), Content{}, login("root", 0, nil), []string{"For: SSH login as root at a host that is not in known_hosts, key " + print(evil)}},
		"login, hashed name":         {bound(false, secret), Content{}, login("root", 0, nil), []string{"For: SSH login as root at a host whose name is hashed in known_hosts, key " + print(secret)}},
		"login, revoked":             {bound(false, gone), Content{}, login("root", 0, nil), []string{"For: SSH login as root at a host with a REVOKED key, " + print(gone)}},
		"login, a wildcard":          {bound(false, shared), Content{}, login("root", 0, shared), []string{"For: SSH login as root at a host of web1, *.example.com (host verified)"}},
		"login, a wildcard for all":  {bound(false, any), Content{}, login("root", 0, nil), []string{"For: SSH login as root at a host of * (host verified)"}},
		"login, many wildcards":      {bound(false, many), Content{}, login("root", 0, nil), []string{`For: SSH login as root at a host of db?.example.com, "a,b", c and 2 more (host verified)`}},
		"login, a wildcard, said":    {local, Content{}, login("root", 0, any), []string{"For: SSH login as root at a host of * (NOT VERIFIED: only the request says so)"}},
		"forwarded by a wildcard":    {bound(false, shared, inner), Content{}, login("me", 1, inner), []string{"For: SSH login as me at inner.example.org (host verified)", "FORWARDED through a host of web1, *.example.com"}},
		"login, odd user":            {bound(false, hub), Content{}, login("root at github.com (host verified)\n\x1b[2J", 0, nil), []string{`For: SSH login as "root at github.com (host verified)\n\x1b[2J" at hub.example.org (host verified)`}},
		"login, no user":             {bound(false, hub), Content{}, login("", 0, nil), []string{`For: SSH login as "" at hub.example.org (host verified)`}},
		"forwarded":                  {bound(false, hub, inner), Content{}, login("me", 1, inner), []string{"For: SSH login as me at inner.example.org (host verified)", "FORWARDED through hub.example.org"}},
		"forwarded, host not proved": {bound(true, hub), Content{}, login("me", 1, inner), []string{"For: SSH login as me at inner.example.org (NOT VERIFIED: only the request says so)", "FORWARDED through hub.example.org"}},
		"the hub's own session":      {bound(true, hub), Content{}, login("me", 0, hub), []string{"For: SSH login as me at hub.example.org (NOT VERIFIED: only the request says so)", "FORWARDED through hub.example.org"}},
		"forwarded twice":            {bound(false, hub, evil, inner), Content{}, login("me", 2, inner), []string{"For: SSH login as me at inner.example.org (host verified)", "FORWARDED through hub.example.org, " + print(evil)}},
		"a session bound as its own": {bound(false, evil, hub), Content{}, login("me", 1, nil), []string{"For: SSH login as me at hub.example.org (NOT VERIFIED: only the request says so)", "FORWARDED through " + print(evil)}},
		"a wrong proof":              {&Caller{Forwarded: true, BindFailed: true}, Content{}, login("me", 0, nil), []string{"For: SSH login as me at an unknown host", "FORWARDED by a host whose proof of itself is wrong"}},
		"git":                        {local, Content{Kind: KindSignature, Namespace: "git"}, nil, []string{"For: git signature (a commit, a tag or a push)"}},
		"git, forwarded":             {bound(true, hub), Content{Kind: KindSignature, Namespace: "git"}, nil, []string{"For: git signature (a commit, a tag or a push)", "FORWARDED through hub.example.org"}},
		"odd namespace":              {local, Content{Kind: KindSignature, Namespace: "git\x00"}, nil, []string{`For: SSH signature, namespace "git\x00"`}},
		"host key":                   {local, Content{Kind: KindHostKey}, nil, []string{"WARNING: this is no SSH login, but: host key of an SSH server"}},
		"unknown":                    {local, Content{Kind: KindUnknown}, nil, []string{"WARNING: this is UNKNOWN DATA: no SSH login, and no signature of a file or commit."}},
		"unknown, forwarded":         {bound(true, evil), Content{}, nil, []string{"WARNING: this is UNKNOWN DATA: no SSH login, and no signature of a file or commit.", "FORWARDED through " + print(evil)}},
	} {
		t.Run(name, func(t *testing.T) {
			if test.login != nil {
				test.content.Kind = KindLogin
			}
			u := &Use{Caller: test.caller, Content: test.content, Login: test.login, Hosts: names, Fingerprint: print}
			if got := u.Lines(); !slices.Equal(got, test.want) {
				t.Errorf("%q, want %q", got, test.want)
			}
		})
	}
}

func TestContentPurpose(t *testing.T) {
	for _, test := range []struct {
		content Content
		want    Purpose
	}{
		{Content{Kind: KindLogin}, PurposeLogin},
		{Content{Kind: KindSignature, Namespace: "git"}, PurposeGit},
		{Content{Kind: KindSignature, Namespace: "file"}, PurposeFile},
		{Content{Kind: KindSignature, Namespace: "gít"}, PurposeOther},
		{Content{Kind: KindUnknown, Namespace: "git"}, PurposeOther},
		{Content{}, PurposeOther},
	} {
		if got := test.content.Purpose(); got != test.want || !slices.Contains(Purposes(), got) {
			t.Errorf("%+v is for %q, want %q", test.content, got, test.want)
		}
	}
}

// hostTable names host keys by their wire form.
type hostTable map[string]HostName

func (h hostTable) HostName(key ssh.PublicKey, _ peer.Peer) HostName { return h[string(key.Marshal())] }
