package status

import (
	"fmt"

	"p11-agent/agent"
	"p11-agent/agent/sshagent"
)

// Shown tells which of the identities that the agent offers clients see. The list for
// clients may have no room for all.
func Shown(offers []agent.KeyStatus) []bool {
	identities := make([]agent.Identity, len(offers))
	for i, o := range offers {
		identities[i] = o.Identity
	}
	return sshagent.Listed(identities)
}

// FewShown says that clients do not see all keys.
func FewShown(shown, offered int) string {
	return fmt.Sprintf("clients see %d of the %d keys: OpenSSH takes at most 2048 keys and 256 KiB; keys that the setting \"keys\" names by id or object come first", shown, offered)
}
