package config

import (
	"cmp"
	"fmt"
	"maps"
	"path/filepath"
	"slices"
	"strings"

	"p11-agent/token"
	"p11-agent/token/pkcs11uri"
	"p11-agent/token/registry"
)

// ModuleTable adds a module, when it has a path, or changes one of the
// registry.
type ModuleTable struct {
	Name    string            `toml:"name"`
	Path    string            `toml:"path"`
	Enabled *bool             `toml:"enabled"`
	Timeout Duration          `toml:"timeout"`
	Release ReleaseAfter      `toml:"release"`
	Env     map[string]string `toml:"env"`
	Sandbox *bool             `toml:"sandbox"`
	Write   []string          `toml:"write"`
	// InitArgs is handed to C_Initialize: x-init-reserved of pkcs11.conf(5).
	InitArgs string `toml:"init-args"`
}

func (m ModuleTable) ModuleName() string { return cmp.Or(m.Name, filepath.Base(m.Path)) }

// Configure sets in spec what the table says of the module. The caller sets name and path.
func (m ModuleTable) Configure(spec *token.ModuleSpec) {
	spec.Env, spec.Timeout = m.Environ(), m.Timeout.Duration
	m.Release.apply(spec)
	spec.InitArgs = cmp.Or(m.InitArgs, spec.InitArgs)
	spec.Unconfined = m.Sandbox != nil && !*m.Sandbox
	spec.Write = m.Write
}

func (m ModuleTable) Environ() []string {
	var env []string
	for _, name := range slices.Sorted(maps.Keys(m.Env)) {
		env = append(env, name+"="+m.Env[name])
	}
	return env
}

// ServerAddresses returns where p11-kit-client.so is to connect to, by the name of the
// module, as far as the environments of modules say so.
func (c *File) ServerAddresses() map[string]string {
	all := make(map[string]string)
	for _, m := range c.Modules {
		all[m.ModuleName()] = m.Env[registry.ServerVariable]
	}
	return all
}

// UnknownModules returns the modules of the configuration that have no path, and are not in
// p11-kit's registry either.
func (c *File) UnknownModules(reg registry.Result) (all []UnknownModule) {
	var names []string
	for _, m := range reg.Modules {
		names = append(names, m.Name)
	}
	for _, m := range c.Modules {
		if m.Path != "" || slices.Contains(names, m.ModuleName()) {
			continue
		}
		hint := "the registered modules are " + strings.Join(names, ", ")
		if s := pkcs11uri.Nearest(m.ModuleName(), names); s != "" {
			hint = fmt.Sprintf("did you mean %q?", s)
		}
		all = append(all, UnknownModule{m.ModuleName(), hint})
	}
	return all
}

// UnknownModule is the name of a module that is not there, and what may have been meant.
type UnknownModule struct{ Name, Hint string }
