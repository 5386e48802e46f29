package status

import (
	"fmt"

	"golang.org/x/crypto/ssh"

	"p11-agent/agent"
	"p11-agent/agent/request"
	"p11-agent/agent/sshagent"
	"p11-agent/cmd/p11-agent/config"
	"p11-agent/token"
)

// NotShown finds keys that the agent offers, and that clients do not see because the list
// of keys has no room for all. It returns their public keys in wire form, and the number
// of keys that the agent offers.
func NotShown(c *config.File, store *token.Store) (hidden map[string]bool, offered int) {
	var identities []agent.Identity
	var wires []string
	named := make(map[string]bool)
	auto, name := c.Automatic(), c.KeyName
	present := store.Keys()
	all := append(append([]*token.Key{}, present...), store.Away()...)
	add := func(i int, k *token.Key, alone bool) {
		if i >= len(present) && !c.OfferAway(k, auto != nil) {
			return
		}
		pub, err := ssh.NewPublicKey(k.Public())
		if err != nil {
			return // token offers only types that SSH has
		}
		wire, comment := string(pub.Marshal()), name(k)
		if _, ok := named[wire]; !ok {
			id := agent.Identity{Key: pub, Comment: k.URI()}
			if comment != "" {
				id.Comment = comment
			}
			identities, wires = append(identities, id), append(wires, wire)
		}
		named[wire] = named[wire] || alone || comment != ""
	}
	for i, alone := range request.Offers(all, auto) {
		add(i, all[i], alone)
	}
	for i, wire := range wires {
		identities[i].Named = named[wire]
	}
	hidden = make(map[string]bool)
	for i, shown := range sshagent.Listed(identities) {
		if !shown {
			hidden[wires[i]] = true
		}
	}
	return hidden, len(identities)
}

// FewShown says that clients do not see all keys.
func FewShown(shown, offered int) string {
	return fmt.Sprintf("clients see %d of the %d keys: OpenSSH takes at most 2048 keys and 256 KiB; keys that the setting \"keys\" names by id or object come first", shown, offered)
}
