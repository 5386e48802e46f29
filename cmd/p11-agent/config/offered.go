package config

import (
	"cmp"

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
