package config

import (
	"cmp"
	"errors"
	"fmt"
	"maps"
	"path/filepath"
	"slices"
	"strings"

	"p11-agent/cmd/p11-agent/paths"
	"p11-agent/token"
	"p11-agent/token/pkcs11uri"
	"p11-agent/token/registry"
)

// A ModuleTable adds a module when it has a path. Otherwise it changes a module of p11-kit's
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
	// InitArgs goes to C_Initialize, as x-init-reserved of pkcs11.conf(5).
	InitArgs string `toml:"init-args"`
}

// checkModules finds mistakes in the [[module]] tables.
func (c *File) checkModules() error {
	seen := make(map[string]bool)
	for i, m := range c.Modules {
		switch {
		case m.Name == "" && m.Path == "":
			return fmt.Errorf("[[module]] table %d has neither path nor name", i+1)
		case m.Path != "" && !filepath.IsAbs(m.Path):
			return fmt.Errorf("module path %q is not absolute", m.Path)
		case seen[m.ModuleName()]:
			return fmt.Errorf("module %q is configured twice", m.ModuleName())
		}
		seen[m.ModuleName()] = true
		if err := m.check(); err != nil {
			return fmt.Errorf("module %q: %w", m.ModuleName(), err)
		}
	}
	return nil
}

func (m ModuleTable) check() error {
	for i, path := range m.Write {
		if m.Write[i] = paths.ExpandHome(path); !filepath.IsAbs(m.Write[i]) || strings.Contains(path, "\x00") {
			return fmt.Errorf("write has %q, which is not an absolute path", path)
		}
	}
	if len(m.Write) > 0 && m.Sandbox != nil && !*m.Sandbox {
		return errors.New("without a sandbox the module can write every file: remove write or sandbox = false")
	}
	if strings.Contains(m.InitArgs, "\x00") {
		return errors.New("init-args has a NUL")
	}
	for name := range m.Env {
		if name == "" || strings.ContainsAny(name, "=\x00") {
			return fmt.Errorf("%q cannot be the name of an environment variable", name)
		}
	}
	return nil
}

// ModuleName returns the name of the module: that of the table, or the name of its file.
func (m ModuleTable) ModuleName() string { return cmp.Or(m.Name, filepath.Base(m.Path)) }

// Configure sets in spec what the table says of the module. The caller sets name and path.
func (m ModuleTable) Configure(spec *token.ModuleSpec) {
	spec.Env, spec.Timeout = m.Environ(), m.Timeout.Duration
	m.Release.apply(spec)
	spec.InitArgs = cmp.Or(m.InitArgs, spec.InitArgs)
	spec.Unconfined = m.Sandbox != nil && !*m.Sandbox
	spec.Write = m.Write
}

// Environ returns the environment of the module's process, as NAME=value, in the order of the names.
func (m ModuleTable) Environ() []string {
	var env []string
	for _, name := range slices.Sorted(maps.Keys(m.Env)) {
		env = append(env, name+"="+m.Env[name])
	}
	return env
}

// ServerAddresses returns the addresses that p11-kit-client.so connects to, by the name of the
// module. A module without an address in its environment has "".
func (c *File) ServerAddresses() map[string]string {
	all := make(map[string]string)
	for _, m := range c.Modules {
		all[m.ModuleName()] = m.Env[registry.ServerVariable]
	}
	return all
}

// UnknownModules returns the [[module]] tables that name no module: they have no path, and
// p11-kit's registry has no module of that name.
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

// An UnknownModule is the name in a table without a module. Hint says which names there are.
type UnknownModule struct{ Name, Hint string }
