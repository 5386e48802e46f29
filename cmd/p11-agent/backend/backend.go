// Package backend runs the modules that the configuration and p11-kit's registry name, and
// shows their tokens to the keyring. A module that fails costs its own keys only. The package
// knows neither prompts nor the SSH protocol: the caller brings the pin.Asker.
package backend

import (
	"context"
	"log/slog"
	"time"

	"p11-agent/cmd/p11-agent/config"
	"p11-agent/cmd/p11-agent/paths"
	"p11-agent/token"
	"p11-agent/token/pin"
	"p11-agent/token/registry"
	"p11-agent/token/wire"
)

// ModuleCommand is the hidden subcommand that turns this program into a module process.
const ModuleCommand = "module-process"

// LookTimeout is how long a command waits for modules by default.
const LookTimeout = 30 * time.Second

// Options say how the modules run and what they may do.
type Options struct {
	Log  *slog.Logger
	PINs pin.Asker // nil: a PIN comes from the configuration only

	// Working and Generating are told that a token works for long: see token.Options.
	Working    func(context.Context, *token.Key) (done func())
	Generating func(wire.TokenID) (done func())

	// StateDir is where the agent keeps the list of the keys that it has seen, and Known is
	// what this program does with the list. Look sets both.
	StateDir string
	Known    token.KnownKeys

	// Timeout limits how long Look waits for the modules; 0: LookTimeout.
	Timeout time.Duration
}

// Modules are the running modules and the tokens that they show.
type Modules struct {
	Store   *token.Store
	Skipped []registry.Module // not started, as the configuration or the registry says
	Broken  []registry.Module // not started: their remote commands cannot be used

	stopBridges func()
}

// Open starts the modules and returns at once. The caller calls Close.
func Open(c *config.File, o Options) *Modules {
	m := newPlan(c, loadRegistry(c, o.Log), o.Log)
	return &Modules{
		Store: token.Open(token.Options{
			Modules:    m.specs,
			Command:    []string{"/proc/self/exe", ModuleCommand},
			PINs:       o.PINs,
			Sources:    c.PINSources(),
			Homes:      c.URIs(),
			PublicKeys: c.PublicKeys(),
			Policy:     c.Policy(),
			Working:    o.Working,
			Generating: o.Generating,
			StateDir:   o.StateDir,
			Known:      c.KnownKeys(o.Known),
			Log:        o.Log,
		}),
		Skipped: m.skipped, Broken: m.broken,
		stopBridges: serve(m.bridges, o.Log),
	}
}

// Look opens the modules for a command that needs the tokens once. It waits until every
// module has shown its tokens, Timeout has passed, or ctx has ended; after that the command
// uses the tokens that are there. The command reads what the agent remembers, and keeps nothing.
func Look(ctx context.Context, c *config.File, o Options) *Modules {
	o.StateDir, o.Known = paths.StateDir(), token.KnownRead
	if o.Timeout == 0 {
		o.Timeout = LookTimeout
	}
	b := Open(c, o)
	ctx, cancel := context.WithTimeout(ctx, o.Timeout)
	defer cancel()
	b.Wait(ctx)
	return b
}

// Wait returns when every module has shown its tokens, or when ctx has ended.
func (b *Modules) Wait(ctx context.Context) {
	select {
	case <-b.Store.Settled():
	case <-ctx.Done():
	}
}

// Settled tells whether every module has shown its tokens.
func (b *Modules) Settled() bool {
	select {
	case <-b.Store.Settled():
		return true
	default:
		return false
	}
}

// Close ends the modules. It waits until their processes have ended.
func (b *Modules) Close() {
	_ = b.Store.Close() // never fails
	b.stopBridges()
}

// serve runs the bridges to remote modules until stop is called. stop waits for their end.
func serve(bridges []*registry.Bridge, log *slog.Logger) (stop func()) {
	ctx, cancel := context.WithCancel(context.Background())
	served := make(chan struct{}, len(bridges))
	for _, b := range bridges {
		go func() {
			if err := b.Serve(ctx); err != nil {
				log.Error("remote module", "reason", err)
			}
			served <- struct{}{}
		}()
	}
	return func() {
		cancel()
		for range bridges {
			<-served
		}
	}
}
