package config

import (
	"cmp"
	"slices"

	"golang.org/x/crypto/ssh"

	"p11-agent/agent/request"
	"p11-agent/token"
)

// Offered tells whether the agent offers a key by itself, or why it does not. auto is [File.Automatic]. shadowed is the
// module that the token of the key is used through instead, or "".
func Offered(k *token.Key, auto []request.Selection, shadowed string) (bool, string) {
	if shadowed != "" {
		return false, "it is used through the module " + shadowed
	}
	if request.Offered(k, auto) {
		return true, ""
	}
	if auto == nil {
		return false, k.Unfit()
	}
	return false, cmp.Or(k.Unfit(), "the configuration does not name it")
}

// Homes returns the keys that the agent offers, by public key in wire form. Keys with one
// public key are one identity. They are in the order in which the keyring tries them.
func Homes(keys []*token.Key, auto []request.Selection) map[string][]*token.Key {
	homes := make(map[string][]*token.Key)
	for i := range request.Offers(keys, auto) {
		k := keys[i]
		pub, err := ssh.NewPublicKey(k.Public())
		if err != nil {
			continue
		}
		wire := string(pub.Marshal())
		if !slices.Contains(homes[wire], k) {
			homes[wire] = append(homes[wire], k)
		}
	}
	return homes
}
