package config

import (
	"p11-agent/agent/request"
	"p11-agent/token"
	"p11-agent/token/selection"
)

// KeySelection is a selection.Selector as the keyring sees it.
type KeySelection struct{ *selection.Selector }

// Match tells whether the selection selects a key.
func (s KeySelection) Match(k request.Key) bool {
	key, ok := k.(*token.Key)
	return ok && s.Selector.Match(key)
}

// Automatic returns the selections of the keys that the agent offers by itself. Nil
// selects every key.
func (c *File) Automatic() []request.Selection { return selections(c.Keys) }

// selections returns a selection for each URI; nil stays nil.
func selections(list *[]KeyURI) []request.Selection {
	if list == nil {
		return nil
	}
	all := []request.Selection{}
	for _, u := range *list {
		all = append(all, KeySelection{Selector: selection.New(u.URI)})
	}
	return all
}

// certainly returns selections without the keys that a URI only may mean; nil stays nil.
func certainly(list *[]KeyURI) []request.Selection {
	all := selections(list)
	for i, s := range all {
		all[i] = KeySelection{Selector: s.(KeySelection).Certain()} //nolint:forcetypeassert // selections makes no other
	}
	return all
}
