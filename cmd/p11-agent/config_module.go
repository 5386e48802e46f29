package main

import (
	"cmp"
	"fmt"
	"maps"
	"p11-agent/token"
	"p11-agent/token/pkcs11uri"
	"p11-agent/token/registry"
	"path/filepath"
	"slices"
	"strings"
)

// moduleConfig adds a module, when it has a path, or changes one of the
// registry.
type moduleConfig struct {
	Name    string            `toml:"name"`
	Path    string            `toml:"path"`
	Enabled *bool             `toml:"enabled"`
	Timeout durationValue     `toml:"timeout"`
	Release releaseValue      `toml:"release"`
	Env     map[string]string `toml:"env"`
	Sandbox *bool             `toml:"sandbox"`
	Write   []string          `toml:"write"`
	// InitArgs is handed to C_Initialize: x-init-reserved of pkcs11.conf(5).
	InitArgs string `toml:"init-args"`
}

func (m moduleConfig) name() string { return cmp.Or(m.Name, filepath.Base(m.Path)) }

// configure sets in spec what the table says of the module. The caller sets name and path.
func (m moduleConfig) configure(spec *token.ModuleSpec) {
	spec.Env, spec.Timeout = m.environ(), m.Timeout.Duration
	m.Release.apply(spec)
	spec.InitArgs = cmp.Or(m.InitArgs, spec.InitArgs)
	spec.Unconfined = m.Sandbox != nil && !*m.Sandbox
	spec.Write = m.Write
}

func (m moduleConfig) environ() []string {
	var env []string
	for _, name := range slices.Sorted(maps.Keys(m.Env)) {
		env = append(env, name+"="+m.Env[name])
	}
	return env
}

// serverAddresses returns where p11-kit-client.so is to connect to, by the name of the
// module, as far as the environments of modules say so.
func (c *config) serverAddresses() map[string]string {
	all := make(map[string]string)
	for _, m := range c.Modules {
		all[m.name()] = m.Env[registry.ServerVariable]
	}
	return all
}

// unregistered returns the modules of the configuration that have no path, and are not in
// p11-kit's registry either.
func (c *config) unregistered(reg registry.Result) (all []unregistered) {
	var names []string
	for _, m := range reg.Modules {
		names = append(names, m.Name)
	}
	for _, m := range c.Modules {
		if m.Path != "" || slices.Contains(names, m.name()) {
			continue
		}
		hint := "the registered modules are " + strings.Join(names, ", ")
		if s := pkcs11uri.Nearest(m.name(), names); s != "" {
			hint = fmt.Sprintf("did you mean %q?", s)
		}
		all = append(all, unregistered{m.name(), hint})
	}
	return all
}

// unregistered is the name of a module that is not there, and what may have been meant.
type unregistered struct{ name, hint string }
