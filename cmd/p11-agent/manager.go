package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"sync"
	"time"

	"p11-agent/agent/sshagent"
	"p11-agent/cmd/p11-agent/output"
	"p11-agent/systemd"
	"p11-agent/token"
)

// statusText says in one line how tokens and modules are, for "systemctl status":
// "3 keys on 1 token, logged in to 1; 2 modules".
func statusText(modules []token.ModuleStatus) string {
	keys, tokens, in, failed := 0, 0, 0, 0
	for _, m := range modules {
		if m.Err != nil && !m.Running {
			failed++
		}
		for _, t := range m.Tokens {
			if t.Shadowed != "" {
				continue // counted with another module
			}
			tokens++
			keys += len(t.Keys)
			if t.LoggedIn {
				in++
			}
		}
	}
	text := output.Count(keys, "key") + " on " + output.Count(tokens, "token")
	if in > 0 {
		text += fmt.Sprintf(", logged in to %d", in)
	}
	text += "; " + output.Count(len(modules), "module")
	if failed > 0 {
		text += fmt.Sprintf(", %d not working", failed)
	}
	return text
}

// reporter keeps the service manager told. Its methods may be called from any
// goroutine.
type reporter struct {
	service *service
	modules func() []token.ModuleStatus

	// mu is held while the service manager is told, so that the last that it
	// hears is the newest.
	mu   sync.Mutex
	last string
}

// ready tells that the agent is ready, again after reloading.
func (r *reporter) ready() {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.last = statusText(r.modules())
	r.service.notify(systemd.Ready(r.last))
}

// follow tells of each change until ctx ends.
func (r *reporter) follow(ctx context.Context, changed <-chan struct{}) {
	for {
		select {
		case <-ctx.Done():
			return
		case <-changed:
		}
		r.mu.Lock()
		if now := statusText(r.modules()); now != r.last {
			r.last = now
			r.service.notify(systemd.Status(now))
		}
		r.mu.Unlock()
	}
}

// A watchdog tells the service manager that the agent is alive, for as long as it
// is: it answers on its sockets, and its keyring can make a list. Tokens, modules,
// prompts and other agents have no part in that: one that hangs is no reason to
// end the agent with all its logins.
type watchdog struct {
	service *service
	every   time.Duration // the service manager's patience
	alive   func()        // returns unless the keyring is stuck
	doors   []door
	tell    func() error // systemd.Alive
}

// door is a socket of the agent's, with the file it had at the start.
type door struct {
	path string
	file os.FileInfo
}

// doorsOf returns those that can be found by their path.
func doorsOf(listeners []listener) (all []door) {
	for _, l := range listeners {
		path := pathOf(l)
		if file, err := os.Stat(path); err == nil {
			all = append(all, door{path, file})
		}
	}
	return all
}

// run watches until ctx ends.
func (w *watchdog) run(ctx context.Context) {
	beat := time.NewTicker(w.every / 3)
	defer beat.Stop()
	silent := false
	for {
		// One that is stuck here tells nothing either.
		w.alive()
		err := w.ping(ctx)
		switch {
		case ctx.Err() != nil:
			return
		case err == nil:
			w.service.notify(w.tell())
		case !silent:
			w.service.log.Error("the agent does not answer itself, and leaves it to the service manager to start it again", "reason", err)
		}
		silent = err != nil
		select {
		case <-ctx.Done():
			return
		case <-beat.C:
		}
	}
}

// ping asks at every door that is still the agent's: nobody comes in at one whose
// file was removed or replaced, and starting again would not bring it back. A
// door that is open to root alone, as that of the system, is left out where the
// agent is somebody else.
func (w *watchdog) ping(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, w.every/3)
	defer cancel()
	for _, d := range w.doors {
		if file, err := os.Stat(d.path); err != nil || !os.SameFile(file, d.file) {
			continue
		}
		if err := sshagent.Ping(ctx, d.path); err != nil && !errors.Is(err, os.ErrPermission) {
			return err
		}
	}
	return nil
}
