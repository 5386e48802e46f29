package backend

import (
	"cmp"
	"context"
	"log/slog"
	"os"
	"path/filepath"
	"strings"

	"p11-agent/cmd/p11-agent/config"
	"p11-agent/token"
	"p11-agent/token/registry"
)

// A plan is the modules to run: those of the configuration first, then those of p11-kit's
// registry in its order.
type plan struct {
	specs   []token.ModuleSpec
	bridges []*registry.Bridge // to the servers of remote modules
	skipped []registry.Module
	broken  []registry.Module
	log     *slog.Logger
}

// loadRegistry reads p11-kit's registry, and logs its mistakes.
func loadRegistry(c *config.File, log *slog.Logger) registry.Result {
	reg := registry.Load(registry.Options{
		Dirs: registry.DefaultDirs(os.LookupEnv, os.Geteuid()), Program: registry.Program, Log: log,
		ServerAddresses: c.ServerAddresses(),
	})
	for _, w := range reg.Warnings {
		log.Warn("module configuration", "problem", w.String())
	}
	if reg.NoUser != "" {
		// A mistake in the configuration has its own warning.
		log.Debug("the user's own module configuration is not used", "reason", reg.NoUser)
	}
	return reg
}

// newPlan applies the configuration to the registry.
func newPlan(c *config.File, reg registry.Result, log *slog.Logger) *plan {
	m := &plan{log: log}
	tables := make(map[string]config.ModuleTable)
	for _, table := range c.Modules {
		tables[table.ModuleName()] = table
		if table.Path != "" && (table.Enabled == nil || *table.Enabled) {
			m.addConfigured(table)
		}
	}
	for _, module := range reg.Modules {
		table, named := tables[module.Name]
		delete(tables, module.Name)
		switch {
		case named && table.Path != "":
			continue // the configuration has a module of this name
		case named && table.Enabled != nil && !*table.Enabled:
			module.Skip = "it is switched off in " + c.Path()
		}
		m.addRegistered(module, table)
	}
	for _, unknown := range c.UnknownModules(reg) {
		log.Warn("the configuration changes a module that is not registered", "module", unknown.Name, "hint", unknown.Hint)
	}
	return m
}

// addConfigured adds a module that the configuration gives a path.
func (m *plan) addConfigured(table config.ModuleTable) {
	spec := token.ModuleSpec{Name: table.ModuleName(), Path: table.Path}
	table.Configure(&spec)
	if strings.HasPrefix(filepath.Base(table.Path), "p11-kit-client") {
		explainServer(&spec, cmp.Or(table.Env[registry.ServerVariable], os.Getenv(registry.ServerVariable)))
	}
	m.specs = append(m.specs, spec)
}

// addRegistered adds a module of p11-kit's registry. The table may be empty.
func (m *plan) addRegistered(module registry.Module, table config.ModuleTable) {
	if module.Skip != "" {
		m.log.Debug("module is not started", "module", module.Name, "reason", module.Skip)
		m.skipped = append(m.skipped, module)
		return
	}
	spec := token.ModuleSpec{Name: module.Name, Path: module.Path, InitArgs: module.InitArgs}
	table.Configure(&spec)
	// p11-kit's remoting serves one call after the other.
	spec.Poll = module.Remote.Address != "" || len(module.Remote.Command) > 0
	switch {
	case module.Remote.Address != "":
		spec.Env = append(spec.Env, registry.ServerVariable+"="+module.Remote.Address)
		explainServer(&spec, module.Remote.Address)
	case len(module.Remote.Command) > 0:
		b, err := registry.NewBridge(registry.BridgeOptions{
			Command: module.Remote.Command,
			Env:     registry.Environment(os.Environ(), table.Environ()),
			Log:     m.log.With("module", module.Name),
		})
		if err != nil {
			// The other modules work on. This module is not started: without an address
			// it would connect to any server that the user has.
			m.log.Warn("remote module cannot be used", "module", module.Name, "reason", err)
			module.Skip = err.Error()
			m.broken = append(m.broken, module)
			return
		}
		m.bridges = append(m.bridges, b)
		spec.Env = append(spec.Env, registry.ServerVariable+"="+b.Address())
		spec.Cause = b.Cause
	}
	m.specs = append(m.specs, spec)
}

// explainServer lets the state of p11-kit's server explain why a module fails, or why it
// shows no token: p11-kit-client.so says that it works when it cannot connect.
func explainServer(spec *token.ModuleSpec, address string) {
	spec.Cause = func(ctx context.Context) string { return registry.ServerCause(ctx, address) }
	spec.Empty = spec.Cause
}
