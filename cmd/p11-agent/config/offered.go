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
	if auto == nil {
		return k.Unfit() == "", k.Unfit()
	}
	for _, s := range auto {
		if s.Match(k) && (k.Unfit() == "" || !s.Broad()) {
			return true, ""
		}
	}
	return false, cmp.Or(k.Unfit(), "the configuration does not name it")
}
