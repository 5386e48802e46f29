// Package doctor finds out why something does not work, and says what to type next.
//
// It looks at the configuration, the agents, ssh, readers, modules, tokens, prompts,
// systemd, certificates and the machine. It promises to ask for no PIN, to log in nowhere
// and to change nothing. The checks run at the same time; their findings come in the order
// in which a person best puts things right. The steps themselves are the business of
// package advice.
package doctor

import (
	"cmp"
	"context"
	"log/slog"
	"sync"
	"time"

	"p11-agent/cmd/p11-agent/backend"
	"p11-agent/cmd/p11-agent/config"
	"p11-agent/cmd/p11-agent/exit"
	"p11-agent/cmd/p11-agent/paths"
	"p11-agent/cmd/p11-agent/probe"
	"p11-agent/token"
	"p11-agent/token/selection"
)

// modulesTimeout is how long the modules may take.
const modulesTimeout = 15 * time.Second

// A Check looks at one thing.
type Check struct {
	Name string
	Run  func(context.Context, *Group)
}

// Examine runs all checks at the same time. file is the path of the configuration file;
// empty: the user's, if there is one.
func Examine(ctx context.Context, file string) Groups {
	conf := &Group{Name: "configuration"}
	c := findConfiguration(conf, file)
	// Some checks look at the same thing. The first of them asks, and the others wait.
	ssh := sync.OnceValue(func() probe.SSH { return probe.ReadSSH(ctx) })
	asked := sync.OnceValue(func() askedAgent { return askAgent(ctx, ssh()) })
	modules, done := openModules(ctx, c)
	defer done()
	return append(Groups{conf}, run(ctx, []Check{
		{"the agent that ssh asks", func(ctx context.Context, r *Group) { findAgent(ctx, r, asked()) }},
		{"ssh", func(_ context.Context, r *Group) { findSSH(r, ssh(), asked().Keys) }},
		{"smart card readers", func(ctx context.Context, r *Group) {
			daemon := probe.AskPCSCD(ctx)
			// A card is unknown when no token has the name of its reader.
			findCards(ctx, r, daemon, modules().Store.Modules())
		}},
		{"modules", func(_ context.Context, r *Group) { findRegistry(r, c); findModules(r, modules()) }},
		{"tokens and keys", func(ctx context.Context, r *Group) {
			b := modules()
			findTokens(r, b.Store.Modules())
			// Modules that hang have had their time. The others answer at once.
			ctx, cancel := context.WithTimeout(ctx, time.Second)
			defer cancel()
			findKeys(ctx, r, c, b)
		}},
		{"asking for the PIN", func(ctx context.Context, r *Group) { findPrompt(ctx, r, c) }},
		{"systemd", findUnits},
		{"certificates", func(_ context.Context, r *Group) { findCertificates(r, c, time.Now()) }},
		{"this machine", func(_ context.Context, r *Group) { findMachine(r) }},
	})...)
}

// ExamineConfig runs the checks of the configuration c: what the agent would do with the
// modules and tokens of this machine.
func ExamineConfig(ctx context.Context, c *config.File, log *slog.Logger) Groups {
	ctx, cancel := context.WithTimeout(ctx, backend.LookTimeout)
	defer cancel()
	b := backend.Look(ctx, c, backend.Options{Log: log})
	defer b.Close()
	return run(ctx, []Check{
		{"configuration", func(_ context.Context, r *Group) {
			r.ok("configuration: %s", cmp.Or(c.Path(), "none, so the agent uses the defaults"))
		}},
		{"modules", func(_ context.Context, r *Group) { findRegistry(r, c); findModules(r, b) }},
		{"tokens and keys", func(ctx context.Context, r *Group) {
			findTokens(r, b.Store.Modules())
			findKeys(ctx, r, c, b)
			findSources(r, c)
		}},
		{"asking for the PIN", func(_ context.Context, r *Group) { findPinentry(r, c) }},
	})
}

// Broken returns what is wrong with a configuration file that cannot be read.
func Broken(file string) Groups {
	r := &Group{Name: "configuration"}
	findConfiguration(r, file)
	return Groups{r}
}

// run runs the checks at the same time. The groups have the order of the checks.
func run(ctx context.Context, checks []Check) Groups {
	all := make(Groups, len(checks))
	var wg sync.WaitGroup
	for i, check := range checks {
		all[i] = &Group{Name: check.Name}
		wg.Go(func() { check.Run(ctx, all[i]) })
	}
	wg.Wait()
	return all
}

// openModules starts the modules. The first function returns when they have shown their
// tokens, or modulesTimeout is over; any goroutine may call it.
func openModules(ctx context.Context, c *config.File) (modules func() *backend.Modules, done func()) {
	b := backend.Open(c, backend.Options{Log: slog.New(slog.DiscardHandler), StateDir: paths.StateDir(), Known: token.KnownRead})
	ctx, cancel := context.WithTimeout(ctx, modulesTimeout)
	return sync.OnceValue(func() *backend.Modules {
		b.Wait(ctx)
		return b
	}), func() { cancel(); b.Close() }
}

// findConfiguration reads the configuration. When that fails, the other checks use the
// defaults.
func findConfiguration(r *Group, file string) *config.File {
	c, err := config.Load(file)
	if err == nil {
		r.ok("%s", cmp.Or(c.Path(), "there is no configuration file, so the agent uses the defaults"))
		findSources(r, c)
		return c
	}
	for _, e := range exit.Each(err) {
		f := r.bad("%v", e)
		if hint := exit.Hint(e); hint != "" {
			f.Next("%s", hint)
		}
		if len(f.next) == 0 {
			f.Next("correct the file: p11-agent.toml(5) describes it; the agent does not start with this file")
		}
	}
	return &config.File{AllowModules: selection.DefaultAllowList}
}
