package backend

import (
	"p11-agent/agent"
	"p11-agent/cmd/p11-agent/config"
	"p11-agent/cmd/p11-agent/status"
	"p11-agent/token"
	"p11-agent/token/selection"
)

// Rules returns what the configuration tells the keyring. system says that the agent serves
// the system.
func Rules(c *config.File, system bool) agent.Rules {
	return agent.Rules{
		Automatic: c.Automatic(), Name: c.KeyName, Listed: Comment, OfferAway: c.OfferAway, Allow: c.Allows(system), Approval: c.Approval(),
	}
}

// Unreadable says why the agent does not offer a present key that the configuration selects.
const Unreadable = "OpenSSH does not read a key of this size"

// An Offer is an identity that the agent offers: the keys of tokens with one public key.
type Offer struct {
	Present []*token.Key // in the order in which the agent tries them
	Away    []*token.Key
	Shown   bool // to clients, whose list may have no room for all identities
}

// Offers returns the identities that an agent with this configuration offers by itself, in
// the order of its list. The keyring decides.
func (b *Modules) Offers(c *config.File) []Offer {
	identities := agent.Offers(b.Tokens(selection.AllowList{}), Rules(c, false))
	shown := status.Shown(identities)
	all := make([]Offer, len(identities))
	for i, id := range identities {
		all[i].Shown = shown[i]
		for _, home := range id.Homes {
			k, ok := home.(*token.Key)
			switch {
			case !ok:
			case k.Present():
				all[i].Present = append(all[i].Present, k)
			default:
				all[i].Away = append(all[i].Away, k)
			}
		}
	}
	return all
}
