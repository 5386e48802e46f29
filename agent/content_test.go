package agent

import (
	"errors"
	"testing"

	"p11-agent/agent/request"
)

// A key of a token signs logins and SSH signatures. It signs other kinds of data only if
// the configuration allows them. Keys in memory sign all data, as in ssh-agent.
func TestAllow(t *testing.T) {
	const uri = "pkcs11:token=a;id=1"
	for name, test := range map[string]struct {
		allow   []request.Kind
		content request.Content
		ok      bool
	}{
		"login":                     {nil, request.Content{Kind: request.KindLogin}, true},
		"signature":                 {nil, request.Content{Kind: request.KindSignature, Namespace: "odd"}, true},
		"test, allowed":             {[]request.Kind{request.KindUnknown}, request.Content{Kind: request.KindTest}, true},
		"unknown":                   {nil, request.Content{Kind: request.KindUnknown}, false},
		"nothing said":              {nil, request.Content{}, false},
		"host key":                  {nil, request.Content{Kind: request.KindHostKey}, false},
		"another kind":              {[]request.Kind{request.KindTLS}, request.Content{Kind: request.KindHostKey}, false},
		"allowed kind":              {[]request.Kind{request.KindTLS, request.KindHostKey}, request.Content{Kind: request.KindHostKey}, true},
		"everything":                {[]request.Kind{request.KindUnknown}, request.Content{Kind: request.KindX509}, true},
		"unknown, others allowed":   {[]request.Kind{request.KindTLS}, request.Content{Kind: request.KindUnknown}, false},
		"unknown, all are allowed":  {[]request.Kind{request.KindUnknown}, request.Content{Kind: request.KindUnknown}, true},
		"a kind that there is not":  {[]request.Kind{request.KindTLS}, request.Content{Kind: "other"}, false},
		"certificate, not allowed":  {[]request.Kind{}, request.Content{Kind: request.KindSSHCertificate}, false},
		"certificate, just allowed": {[]request.Kind{request.KindSSHCertificate}, request.Content{Kind: request.KindSSHCertificate}, true},
	} {
		t.Run(name, func(t *testing.T) {
			key := edKey(uri)
			f := newFixture(Options{Rules: Rules{Allow: func(k request.Key) []request.Kind {
				if k != request.Key(key) {
					t.Errorf("asked about %v", k)
				}
				return test.allow
			}}}, key)
			_, err := f.Sign(t.Context(), local, request.Sign{Key: wireOf(key), Data: []byte("data"), Content: test.content})
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
