package daemon

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
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

// A manager tells the service manager about the agent. Its methods may be called from any goroutine.
type manager struct {
	log     *slog.Logger
	modules func() []token.ModuleStatus

	// A message is sent with mu held, so that the last message is the newest.
	mu   sync.Mutex
	last string
}

// tell logs that a message to the service manager failed.
func (m *manager) tell(err error) {
	if err != nil {
		m.log.Warn("cannot tell the service manager", "reason", err)
	}
}

// ready tells that the agent is ready, at the start and after reading the configuration again.
func (m *manager) ready() {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.last = statusText(m.modules())
	m.tell(systemd.Ready(m.last))
}

// follow tells of each change until ctx ends.
func (m *manager) follow(ctx context.Context, changed <-chan struct{}) {
	for {
		select {
		case <-ctx.Done():
			return
		case <-changed:
		}
		m.mu.Lock()
		if now := statusText(m.modules()); now != m.last {
			m.last = now
			m.tell(systemd.Status(now))
		}
		m.mu.Unlock()
	}
}

// A watchdog tells the service manager that the agent is alive, as long as the agent answers on its sockets and
// its keyring can make a list. Tokens, modules, prompts and other agents do not count: if one of them hangs, the
// agent keeps running with its logins.
type watchdog struct {
	manager *manager
	every   time.Duration // the service manager's patience
	alive   func()        // returns unless the keyring is stuck
	files   []socketFile
	tell    func() error // systemd.Alive
}

// A socketFile is a socket of the agent's, with the file it had at the start.
type socketFile struct {
	path string
	file os.FileInfo
}

// socketFiles returns the sockets that have a file.
func socketFiles(sockets []socket) (all []socketFile) {
	for _, s := range sockets {
		path := pathOf(s.listener)
		if file, err := os.Stat(path); err == nil {
			all = append(all, socketFile{path, file})
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
		// A keyring that is stuck stops the watchdog here: it tells nothing more.
		w.alive()
		err := w.ping(ctx)
		switch {
		case ctx.Err() != nil:
			return
		case err == nil:
			w.manager.tell(w.tell())
		case !silent:
			w.manager.log.Error("the agent does not answer on its own sockets: the service manager starts it again", "reason", err)
		}
		silent = err != nil
		select {
		case <-ctx.Done():
			return
		case <-beat.C:
		}
	}
}

// ping connects to every socket that is still the agent's. A socket whose file was removed or replaced is left
// out: a restart would not bring it back. A socket for root alone is left out too, if the agent is another user.
func (w *watchdog) ping(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, w.every/3)
	defer cancel()
	for _, d := range w.files {
		if file, err := os.Stat(d.path); err != nil || !os.SameFile(file, d.file) {
			continue
		}
		if err := sshagent.Ping(ctx, d.path); err != nil && !errors.Is(err, os.ErrPermission) {
			return err
		}
	}
	return nil
}
