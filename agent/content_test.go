package agent

import (
	"errors"
	"slices"
	"testing"
)

// A token signs logins and SSH signatures, and anything else only with a key that
// is for it. Keys in memory sign what they are given, as those of ssh-agent do.
func TestAllow(t *testing.T) {
	const uri = "pkcs11:token=a;id=1"
	for name, test := range map[string]struct {
		allow   []Kind
		content Content
		ok      bool
	}{
		"login":                     {nil, Content{Kind: KindLogin}, true},
		"signature":                 {nil, Content{Kind: KindSignature, Namespace: "odd"}, true},
		"test, allowed":             {[]Kind{KindUnknown}, Content{Kind: KindTest}, true},
		"unknown":                   {nil, Content{Kind: KindUnknown}, false},
		"nothing said":              {nil, Content{}, false},
		"host key":                  {nil, Content{Kind: KindHostKey}, false},
		"another kind":              {[]Kind{KindTLS}, Content{Kind: KindHostKey}, false},
		"allowed kind":              {[]Kind{KindTLS, KindHostKey}, Content{Kind: KindHostKey}, true},
		"everything":                {[]Kind{KindUnknown}, Content{Kind: KindX509}, true},
		"unknown, others allowed":   {[]Kind{KindTLS}, Content{Kind: KindUnknown}, false},
		"unknown, all are allowed":  {[]Kind{KindUnknown}, Content{Kind: KindUnknown}, true},
		"a kind that there is not":  {[]Kind{KindTLS}, Content{Kind: "other"}, false},
		"certificate, not allowed":  {[]Kind{}, Content{Kind: KindSSHCertificate}, false},
		"certificate, just allowed": {[]Kind{KindSSHCertificate}, Content{Kind: KindSSHCertificate}, true},
	} {
		t.Run(name, func(t *testing.T) {
			key := edKey(uri)
			f := newFixture(Options{Rules: Rules{Allow: func(k Key) []Kind {
				if k != Key(key) {
					t.Errorf("asked about %v", k)
				}
				return test.allow
			}}}, key)
			_, err := f.Sign(t.Context(), local, SignRequest{Key: wireOf(key), Data: []byte("data"), Content: test.content})
			kind, refused := errors.AsType[*KindError](err)
			if refused == test.ok || test.ok && err != nil {
				t.Fatalf("error %v", err)
			}
			if refused && kind.Content != test.content {
				t.Errorf("refused %+v", kind.Content)
			}
			if signed := key.signed == 1; signed != test.ok {
				t.Errorf("signed %d times", key.signed)
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
