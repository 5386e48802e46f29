// Package daemon is the running agent: it listens on sockets, and puts the keyring before the tokens and the prompts before
// the person. It reads its configuration again on SIGHUP, and tells the service manager how it is. It promises to leave
// no socket, process or goroutine behind. The other rooms do the work.
package daemon

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/crypto/ssh"

	"p11-agent/agent"
	"p11-agent/agent/approval"
	"p11-agent/agent/certdir"
	"p11-agent/agent/door"
	"p11-agent/agent/logfold"
	"p11-agent/agent/request"
	"p11-agent/agent/sshagent"
	"p11-agent/cmd/p11-agent/advice"
	"p11-agent/cmd/p11-agent/backend"
	"p11-agent/cmd/p11-agent/config"
	"p11-agent/cmd/p11-agent/paths"
	"p11-agent/cmd/p11-agent/prompt"
	"p11-agent/cmd/p11-agent/status"
	"p11-agent/systemd"
	"p11-agent/systemd/login1"
	"p11-agent/token"
	"p11-agent/token/known"
	"p11-agent/token/pin"
	"p11-agent/token/retention"
	"p11-agent/token/selection"
)

// Options say how a daemon runs. They stay for its life, unlike the configuration.
type Options struct {
	ConfigFile string                     // "": the usual place
	Lifetime   time.Duration              // of the keys that clients add without one; 0: no end
	Allow      *selection.AllowList       // modules that clients may name; nil: the configuration lists them
	Version    string                     // of the program
	NameKey    func(ssh.PublicKey) string // the fingerprint of a key

	RemoteTokens bool // forwarded clients may add tokens
	System       bool // the agent serves the system: it has no prompts, and keeps no keys in memory
}

// A Daemon is the running agent: its sockets, the keyring behind them, and the tokens behind that.
//
// The parts are opened in this order, and closed in the opposite one: log, prompts, sockets, tokens, upstream
// agents, keyring, logind. Only Reload changes the configuration that they use.
type Daemon struct {
	options Options
	config  atomic.Pointer[config.File]
	log     *slog.Logger
	closers []func() // of the parts that are open, in the order of their opening

	signals  *signals
	terminal *terminal // the agent ends with it; nil: it has none

	sockets   []socket
	prompts   *prompts // nil: the agent asks no person
	questions *approval.Questions
	backend   *backend.Modules
	keyring   *agent.Keyring
	server    *sshagent.Door

	status  *status.Maker
	manager *manager
	logind  *login1.Watch
}

// prompts are the ways to a person.
type prompts struct {
	asker   *prompt.Asker
	notices *notices
}

// Open opens the agent behind the sockets. The Daemon owns the sockets and closes them, also when Open fails. Next,
// [Daemon.Serve] answers clients, and [Daemon.Close] gives everything back.
func Open(options Options, listeners []door.Listener, log *slog.Logger) (_ *Daemon, err error) {
	d := &Daemon{options: options, signals: new(signals), questions: approval.NewQuestions()}
	defer func() {
		if err != nil {
			d.Close()
		}
	}()
	d.openLog(log)
	for _, l := range listeners {
		d.addSocket(l, nil)
	}
	if err := harden(d.log); err != nil {
		return nil, err
	}
	warnUnlocked(d.log)
	c, err := config.Load(options.ConfigFile)
	if err != nil {
		return nil, err
	}
	d.config.Store(c)
	d.openPrompts(c)
	if err := d.openNamedSockets(c); err != nil {
		return nil, err
	}
	d.openTokens(c)
	upstreams, err := d.openUpstreams(c)
	if err != nil {
		return nil, err
	}
	d.openKeyring(c, upstreams)
	d.manager = &manager{log: d.log, modules: d.backend.Store.Modules}
	d.logind = watchLogin1(c, d.backend.Store, d.forgetApprovals, d.log)
	return d, nil
}

// Close gives back all that was opened. It is called once, after Serve has returned.
func (d *Daemon) Close() {
	for _, c := range slices.Backward(d.closers) {
		c()
	}
}

// onClose makes Close call f before all that was opened earlier.
func (d *Daemon) onClose(f func()) { d.closers = append(d.closers, f) }

// openLog folds lines that many requests repeat.
func (d *Daemon) openLog(log *slog.Logger) {
	folded := logfold.New(log.Handler())
	d.onClose(func() { folded.Close() })
	d.log = slog.New(folded)
}

func (d *Daemon) addSocket(l door.Listener, rules *request.Socket) {
	d.sockets = append(d.sockets, socket{l, rules})
	d.onClose(func() { _ = l.Close() }) // Serve has closed it, and told of errors
}

// openPrompts opens the ways to a person. An agent for the system has none.
func (d *Daemon) openPrompts(c *config.File) {
	if d.options.System {
		return
	}
	p := &prompts{notices: newNotices(c, d.log)}
	p.asker = prompt.New(c, prompt.Options{Log: d.log, Notify: p.notices.elsewhere})
	d.onClose(p.notices.Close)
	d.prompts = p
}

// openNamedSockets makes the sockets of the configuration. An agent with a private socket has these beside it.
func (d *Daemon) openNamedSockets(c *config.File) error {
	named, err := listenNamed(c, paths.PrivateDir(pathOf(d.sockets[0].listener)), d.log)
	for _, s := range named {
		d.addSocket(s.listener, s.rules)
	}
	return err
}

// openTokens starts the modules.
func (d *Daemon) openTokens(c *config.File) {
	state := paths.StateDir()
	if d.options.System {
		state = cmp.Or(os.Getenv("STATE_DIRECTORY"), paths.SystemState)
	}
	if c.KnownKeys(token.KnownKept) == token.KnownIgnored {
		if err := known.Remove(state); err != nil {
			d.log.Warn("cannot forget the keys that were remembered", "reason", err)
		}
	}
	// Without prompts these are nil as they are, not a nil *asker in an interface.
	var pins pin.Asker
	var working func(context.Context, *token.Key) func()
	if p := d.prompts; p != nil {
		pins, working = prompt.Pausing(p.asker, d.questions), p.notices.working
	}
	d.backend = backend.Open(c, backend.Options{Log: d.log, PINs: pins, Working: working, StateDir: state, Known: token.KnownKept})
	d.onClose(d.backend.Close)
}

// openUpstreams prepares the connections to other agents.
func (d *Daemon) openUpstreams(c *config.File) (all []agent.Upstream, err error) {
	for _, path := range c.Upstream {
		if d.owns(path) {
			return nil, fmt.Errorf("upstream: %s is a socket of this agent: name the socket of another agent", path)
		}
		u := sshagent.NewUpstream(path)
		d.onClose(func() { u.Close() })
		all = append(all, u)
	}
	return all, nil
}

// owns tells whether a path leads to a socket of this agent.
func (d *Daemon) owns(path string) bool {
	st, err := os.Stat(path)
	if err != nil {
		return false // no agent is there now
	}
	return slices.ContainsFunc(d.sockets, func(s socket) bool {
		own, err := os.Stat(pathOf(s.listener))
		return err == nil && os.SameFile(st, own)
	})
}

// openKeyring puts the keyring before the tokens, and the SSH door before the keyring.
func (d *Daemon) openKeyring(c *config.File, upstreams []agent.Upstream) {
	o := d.options
	allow := selection.AllowList(c.AllowModules)
	if o.Allow != nil {
		allow = *o.Allow
	}
	d.server = &sshagent.Door{Log: d.log, KeepBinds: len(upstreams) > 0}
	d.status = &status.Maker{
		Version: d.options.Version, Started: time.Now(), Store: d.backend.Store, Sockets: d.statusOfSockets, Trouble: advice.Trouble,
	}
	d.status.SetPolicy(c.Policy())
	options := agent.Options{
		Tokens:        d.backend.Tokens(allow),
		Rules:         backend.Rules(c, o.System),
		InsertTimeout: c.InsertTimeout.Duration,
		Lifetime:      o.Lifetime,
		Questions:     d.questions,
		SoftwareKeys:  !o.System && (c.SoftwareKeys == nil || *c.SoftwareKeys),
		RemoteTokens:  o.RemoteTokens || c.RemoteTokens,
		Upstreams:     upstreams,
		Hosts:         newHosts(c),
		Fingerprint:   o.NameKey,
		Report:        d.status.Report,
		Log:           d.log,
	}
	if p := d.prompts; p != nil {
		d.status.PromptAt = p.asker.PromptAt
		options.Confirm, options.Insert, options.Failed = p.asker, p.asker, p.notices.failed
	}
	if c.Certificates != "" {
		options.Certificates = certdir.New(c.Certificates, d.log)
	}
	d.keyring = agent.NewKeyring(options)
	d.server.Keyring = d.keyring
}

// Serve answers clients until ctx ends or a socket breaks. It tells the service manager of its state.
// When it returns, all sockets are closed and no goroutine of its making is left.
func (d *Daemon) Serve(ctx context.Context) error {
	ctx, cancel := context.WithCancel(ctx)
	var helpers sync.WaitGroup
	defer helpers.Wait()
	defer cancel() // first: the helpers end with ctx
	helpers.Go(func() { d.logind.Run(ctx) })
	helpers.Go(func() { d.heedSignals(ctx, cancel) })
	watchdog := d.newWatchdog()
	ended := d.serveSockets(ctx)
	d.log.Info("agent is listening", "pid", os.Getpid(), "version", d.options.Version)
	d.manager.ready()
	helpers.Go(func() { d.manager.follow(ctx, d.backend.Store.StatusChanged()) })
	if watchdog != nil {
		helpers.Go(func() { watchdog.run(ctx) })
	}
	err := d.waitForSockets(ended, cancel)
	d.manager.tell(systemd.Stopping())
	return err
}

// serveSockets serves each socket in a goroutine, which sends one result.
func (d *Daemon) serveSockets(ctx context.Context) (ended <-chan error) {
	results := make(chan error, len(d.sockets))
	for _, s := range d.sockets {
		go func() { results <- d.server.Serve(ctx, s.listener, s.rules) }()
	}
	return results
}

// waitForSockets returns when all sockets have ended. A socket that breaks ends the others: an agent with a
// socket less is not the agent that was asked for.
func (d *Daemon) waitForSockets(ended <-chan error, cancel func()) error {
	var all []error
	for range d.sockets {
		if err := <-ended; err != nil {
			all = append(all, err)
			cancel()
		}
	}
	return errors.Join(all...)
}

// newWatchdog returns nil when the service manager watches no agent. It reads the variables of the watchdog
// in any case, so that no child sees them. It is called before the sockets are served, while they have their files.
func (d *Daemon) newWatchdog() *watchdog {
	patience, err := systemd.Watchdog()
	if err != nil {
		d.log.Warn("the agent is not watched", "reason", err)
	}
	if patience <= 0 {
		return nil
	}
	return &watchdog{manager: d.manager, every: patience, alive: d.keyring.Alive, files: socketFiles(d.sockets), tell: systemd.Alive}
}

// heedSignals does what signals ask for, until ctx ends. end ends the agent.
func (d *Daemon) heedSignals(ctx context.Context, end func()) {
	var clears sync.WaitGroup
	defer clears.Wait()
	for {
		select {
		case <-ctx.Done():
			return
		case <-d.signals.clear:
			// As ssh-agent does since OpenSSH 10.0. A token may take its time.
			clears.Go(func() { d.clear(ctx) })
		case <-d.signals.hangup:
			if d.terminal.hangup(ctx, end) {
				d.log.Info("the agent ends with its terminal")
				end()
				return
			}
			d.Reload(ctx)
		}
	}
}

// clear removes all keys.
func (d *Daemon) clear(ctx context.Context) {
	if err := d.keyring.Clear(ctx); err != nil {
		d.log.Warn("cannot remove all keys, as SIGUSR1 asks", "reason", err)
		return
	}
	d.log.Info("SIGUSR1: all keys are removed")
}

// Reload reads the configuration again and uses it, and looks at the tokens again. A mistake in the file
// leaves the old configuration in use. Modules stay as they are: a change of those needs a restart.
func (d *Daemon) Reload(ctx context.Context) {
	d.manager.tell(systemd.Reloading())
	defer d.manager.ready()
	c, err := config.Load(d.options.ConfigFile)
	if err != nil {
		d.log.Error("the configuration is not used, the old one stays", "reason", err)
		return
	}
	old := d.config.Swap(c)
	d.configure(c)
	if !c.SameApproval(old) {
		d.keyring.ForgetApprovals(func(request.Key) bool { return true })
	}
	d.rescan(ctx)
	d.log.Info("configuration read again")
	if changed := c.NeedRestart(old); len(changed) > 0 {
		d.log.Warn("these changes count after a restart of the agent", "keys", strings.Join(changed, ", "))
	}
}

// statusOfSockets returns the sockets for the report.
func (d *Daemon) statusOfSockets() (all []status.Socket) {
	for _, s := range d.sockets {
		sock := status.Socket{Path: pathOf(s.listener), Connections: d.server.Connections(s.listener)}
		if s.rules != nil {
			sock.Name = s.rules.Name
		}
		all = append(all, sock)
	}
	return all
}

// configure tells each part what the configuration says.
func (d *Daemon) configure(c *config.File) {
	store := d.backend.Store
	store.SetSources(c.PINSources())
	store.SetHomes(c.URIs())
	store.SetPublicKeys(c.PublicKeys())
	store.SetPolicy(c.Policy())
	d.keyring.Configure(backend.Rules(c, d.options.System))
	d.logind.Delay(c.ForgetsAtSleep())
	d.status.SetPolicy(c.Policy())
	if p := d.prompts; p != nil {
		p.asker.Configure(c)
		p.notices.configure(c)
	}
}

// rescan looks at all tokens.
func (d *Daemon) rescan(ctx context.Context) {
	const patience = 10 * time.Second
	ctx, cancel := context.WithTimeout(ctx, patience)
	defer cancel()
	if err := d.backend.Store.Rescan(ctx); err != nil && ctx.Err() == nil {
		d.log.Warn("cannot look at all tokens", "reason", err)
	}
}

// forgetApprovals ends the remembered approvals of the keys whose logins end at an event.
func (d *Daemon) forgetApprovals(e retention.Event) {
	inMemory := d.config.Load().ForgetOn.Retention().EndsAt(e)
	d.keyring.ForgetApprovals(func(k request.Key) bool {
		if key, ok := k.(*token.Key); ok {
			return d.backend.Store.Forgets(key, e)
		}
		return inMemory
	})
}
