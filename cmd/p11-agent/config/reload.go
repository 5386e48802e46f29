package config

import "reflect"

// NeedRestart returns the names of the keys and tables that the agent reads at its start only,
// and that differ from an old configuration. A nil old configuration differs in nothing.
func (c *File) NeedRestart(old *File) (changed []string) {
	if old == nil {
		return nil
	}
	for _, k := range []struct {
		name     string
		now, was any
	}{
		{"[[module]]", c.Modules, old.Modules},
		{"[[socket]]", c.Sockets, old.Sockets},
		{"allow-modules", c.AllowModules, old.AllowModules},
		{"certificates", c.Certificates, old.Certificates},
		{"insert-timeout", c.InsertTimeout, old.InsertTimeout},
		{"known-hosts", c.KnownHosts, old.KnownHosts},
		{"remember-keys", c.RememberKeys, old.RememberKeys},
		{"remote-tokens", c.RemoteTokens, old.RemoteTokens},
		{"software-keys", c.SoftwareKeys, old.SoftwareKeys},
		{"upstream", c.Upstream, old.Upstream},
	} {
		if !reflect.DeepEqual(k.now, k.was) {
			changed = append(changed, k.name)
		}
	}
	return changed
}

// SameApproval tells whether two configurations ask about the same uses of keys.
func (c *File) SameApproval(o *File) bool {
	return c.Confirm == o.Confirm && reflect.DeepEqual(c.KeyTables, o.KeyTables)
}
