package main

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"os"
	"os/signal"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"github.com/spf13/cobra"
	"golang.org/x/crypto/ssh"
	"golang.org/x/sys/unix"

	"p11-agent/agent"
	"p11-agent/agent/logfold"
	"p11-agent/agent/request"
	"p11-agent/agent/sshagent"
	"p11-agent/cmd/p11-agent/exit"
	"p11-agent/cmd/p11-agent/paths"
	"p11-agent/systemd"
	"p11-agent/token"
	"p11-agent/token/known"
	"p11-agent/token/module/undumpable"
)

// agentOptions are the flags of the agent command: ssh-agent's own.
type agentOptions struct {
	foreground bool
	debug      bool
	kill       bool
	csh        bool
	sh         bool
	socket     string
	lifetime   lifetimeValue
	allow      patternsValue
	hash       string
	options    []string
	system     bool
}

func newAgentCommand(g *globals) *cobra.Command {
	o := new(agentOptions)
	cmd := &cobra.Command{
		Use:   "agent [flags] [COMMAND [ARG...]]",
		Short: "Run the agent",
		Long: `Run the agent. Without flags it goes into the background and prints the
commands that tell a shell where it is:

    eval "$(p11-agent agent -s)"

With a COMMAND it runs for as long as the command does. Under systemd it takes
the socket it is given and stays in the foreground. SIGHUP reads the
configuration again and looks at the tokens again.`,
		RunE: func(cmd *cobra.Command, args []string) error {
			return runAgent(cmd.Context(), g, o, args, cmd.OutOrStdout())
		},
	}
	f := cmd.Flags()
	f.SetInterspersed(false) // what follows the COMMAND is the command's
	f.BoolVarP(&o.foreground, "foreground", "D", false, "stay in the foreground")
	f.BoolVarP(&o.debug, "debug", "d", false, "stay in the foreground and log what happens")
	f.BoolVarP(&o.kill, "kill", "k", false, "end the agent that SSH_AGENT_PID names")
	f.BoolVarP(&o.csh, "csh", "c", false, "print commands for csh")
	f.BoolVarP(&o.sh, "sh", "s", false, "print commands for sh")
	f.StringVarP(&o.socket, "socket", "a", "", "listen on the socket `PATH` (default $XDG_RUNTIME_DIR/p11-agent/agent.sock)")
	f.VarP(&o.lifetime, "lifetime", "t", "keep added keys for `TIME`: seconds, or as 1h30m (default for ever)")
	f.VarP(&o.allow, "allow", "P", "modules that ssh-add -s may name: comma-separated `PATTERNS` (default allow-modules, or /usr/lib*/*,/usr/local/lib*/*)")
	f.StringVarP(&o.hash, "fingerprint", "E", "sha256", "name keys by this `HASH` of them: sha256 or md5")
	f.StringArrayVarP(&o.options, "option", "O", nil, "one of ssh-agent's `OPTIONS`: allow-remote-pkcs11 or no-restrict-websafe; may be repeated")
	f.BoolVar(&o.system, "system", false, "serve the system, such as sshd's host keys: "+paths.SystemConfig+", "+paths.SystemSocket+", no prompts, no keys in memory")
	return cmd
}

// fingerprints returns how keys are named to people, as ssh-agent's -E says.
func fingerprints(hash string) (func(ssh.PublicKey) string, error) {
	switch strings.ToLower(hash) {
	case "sha256":
		return ssh.FingerprintSHA256, nil
	case "md5":
		return func(k ssh.PublicKey) string { return "MD5:" + ssh.FingerprintLegacyMD5(k) }, nil
	}
	return nil, fmt.Errorf("%q is no fingerprint hash: sha256 and md5 are", hash)
}

func runAgent(ctx context.Context, g *globals, o *agentOptions, command []string, out io.Writer) (err error) {
	if o.csh && o.sh {
		return exit.Usage(errors.New("-c and -s exclude each other"))
	}
	shell := bourne
	if o.csh || !o.sh && strings.HasSuffix(os.Getenv("SHELL"), "csh") {
		shell = cshell
	}
	if o.kill {
		if len(command) > 0 {
			return exit.Usage(errors.New("-k takes no command"))
		}
		return killAgent(shell, out)
	}
	if g.config != "" {
		// The agent leaves the directory it was started in, and reads it again.
		if g.config, err = filepath.Abs(g.config); err != nil {
			return err
		}
	}
	foreground := o.foreground || o.debug
	switch {
	case o.foreground && o.debug:
		return exit.Usage(errors.New("-D and -d exclude each other"))
	case len(command) > 0 && (foreground || o.csh || o.sh):
		return exit.Usage(errors.New("-c, -D, -d and -s take no command"))
	}
	s := &service{globals: g, lifetime: o.lifetime.Duration, system: o.system, warn: warn}
	if o.allow.given {
		allow := token.ParseAllowList(o.allow.patterns)
		s.allow = &allow
	}
	// Scripts start ssh-agent where another one runs, and expect it to have a socket.
	s.elsewhere = calledSSHAgent() && o.socket == "" && !o.system
	if s.fingerprint, err = fingerprints(o.hash); err != nil {
		return exit.Usage(err)
	}
	for _, option := range o.options {
		switch option {
		case "allow-remote-pkcs11":
			s.remoteTokens = true
		case "no-restrict-websafe":
			// It is about keys of FIDO devices, of which there are none here.
		default:
			if strings.HasPrefix(option, "websafe-allow=") {
				continue // of OpenSSH 10.5, about the same keys
			}
			return exit.Usage(fmt.Errorf("-O %s: there is no such option", option))
		}
	}
	if o.system {
		if g.config == "" {
			g.config = paths.SystemConfig
		}
		if o.socket == "" {
			o.socket = paths.SystemSocket
		}
	}
	level := slog.LevelInfo
	if o.debug {
		level = slog.LevelDebug
	}

	if foreground || os.Getenv("LISTEN_PID") == strconv.Itoa(os.Getpid()) {
		// One in the background is started so.
		if err := withoutTraces(); err != nil {
			return err
		}
	}
	inherited, err := systemd.Listeners()
	if err != nil {
		return err
	}
	child := backgroundChild()
	if child != nil || foreground || len(inherited) > 0 {
		// It is the agent.
		nameProcess(filepath.Base(os.Args[0]))
		if err := closeInherited(child.reportFD()); err != nil {
			return err
		}
	}
	if child != nil {
		return s.runInBackground(ctx, child)
	}
	if len(inherited) > 0 {
		s.log = newLog(os.Stderr, level)
		return s.runInherited(ctx, inherited)
	}
	path, err := paths.AgentSocket(o.socket, len(command) > 0, warn)
	if err != nil {
		return err
	}
	defer func() {
		if err != nil {
			paths.RemovePrivateDir(path)
		}
	}()
	// Found here, mistakes of the configuration reach the person who starts it.
	if _, err := loadConfig(g.config); err != nil {
		return err
	}
	if foreground {
		s.log = newLog(os.Stderr, level)
		return s.runInForeground(ctx, path, shell, out)
	}
	return startInBackground(path, shell, command, out)
}

// service is a running agent.
type service struct {
	globals  *globals
	lifetime time.Duration
	allow    *token.AllowList // of -P; nil: what the configuration says
	log      *slog.Logger
	warn     func(error) // tells who starts the agent
	hangups  chan os.Signal
	clear    chan os.Signal         // asks for all keys to be removed
	terminal *terminal              // with which the agent ends; nil: with none
	config   atomic.Pointer[config] // the one in use

	elsewhere    bool // the agent takes another socket when its own is in use
	system       bool // nobody is asked, and nothing is kept in memory
	remoteTokens bool
	fingerprint  func(ssh.PublicKey) string
}

// listener is what the door takes its clients from.
type listener interface {
	AcceptUnix() (*net.UnixConn, error)
	Close() error
}

func (s *service) runInForeground(ctx context.Context, path string, shell shell, out io.Writer) error {
	s.terminal = controllingTerminal()
	ctx, stop := s.catchSignals(ctx, os.Interrupt, syscall.SIGTERM)
	defer stop()
	l, err := s.listen(path)
	if err != nil {
		return err
	}
	defer paths.RemovePrivateDir(l.Path())
	if _, err := io.WriteString(out, shell.foreground(l.Path(), os.Getpid())); err != nil {
		return errors.Join(err, l.Close())
	}
	return s.serve(ctx, []listener{l})
}

func (s *service) runInherited(ctx context.Context, inherited []*net.UnixListener) error {
	ctx, stop := s.catchSignals(ctx, os.Interrupt, syscall.SIGTERM)
	defer stop()
	var all []listener
	for _, l := range inherited {
		all = append(all, l)
	}
	return s.serve(ctx, all)
}

// listen makes the socket, and its directory when that is the agent's own.
func listen(path string) (*sshagent.Socket, error) {
	l, err := sshagent.Listen(path)
	if errors.Is(err, sshagent.ErrInUse) {
		return nil, fmt.Errorf("%w: use it with SSH_AUTH_SOCK=%s, or end it first", err, path)
	}
	return l, err
}

// listen is listen for the first socket. Where another agent has it, the agent may take a
// private one.
func (s *service) listen(path string) (*sshagent.Socket, error) {
	l, err := listen(path)
	if err != nil && errors.Is(err, sshagent.ErrInUse) && s.elsewhere {
		if path, err = paths.PrivateSocket(s.warn); err == nil {
			if l, err = listen(path); err != nil {
				paths.RemovePrivateDir(path)
			}
		}
	}
	if err == nil && l.Shared() {
		s.warn(fmt.Errorf("%s is in a directory that others may write to: a module could put a socket of its own in that place", l.Path()))
	}
	return l, err
}

// listenNamed makes the sockets that the configuration names, and their rules. Those
// without a path are in dir, which is empty for the agent that all know. Another agent
// leaves out those that are in use.
func (s *service) listenNamed(c *config, dir string) (all []listener, rules []*request.Socket, err error) {
	for _, sc := range c.Sockets {
		path, err := sc.path(dir)
		if err == nil {
			var l *sshagent.Socket
			if l, err = listen(path); err == nil {
				all, rules = append(all, l), append(rules, sc.rules())
			} else if dir != "" && errors.Is(err, sshagent.ErrInUse) {
				s.log.Warn("a [[socket]] is left out", "name", sc.Name, "reason", err)
				err = nil
			}
		}
		if err != nil {
			for _, l := range all {
				_ = l.Close()
			}
			return nil, nil, fmt.Errorf("socket %q: %w", sc.Name, err)
		}
	}
	return all, rules, nil
}

// pathOf returns the path of a listener's socket.
func pathOf(l listener) string {
	switch l := l.(type) {
	case *sshagent.Socket:
		return l.Path()
	case *net.UnixListener:
		return l.Addr().String()
	}
	return ""
}

// isOwn tells whether a path leads to one of the listeners.
func isOwn(path string, listeners []listener) bool {
	st, err := os.Stat(path)
	if err != nil {
		return false // nobody is there now
	}
	return slices.ContainsFunc(listeners, func(l listener) bool {
		ownSt, err := os.Stat(pathOf(l))
		return err == nil && os.SameFile(st, ownSt)
	})
}

// catchSignals makes ctx end with one of these signals, and keeps SIGHUP and SIGUSR1
// for serve. It is called before anybody learns where the agent is: from then on a
// signal may come at any time, and must not end the agent with its socket left.
func (s *service) catchSignals(ctx context.Context, end ...os.Signal) (context.Context, func()) {
	s.hangups, s.clear = make(chan os.Signal, 1), make(chan os.Signal, 1)
	signal.Notify(s.hangups, syscall.SIGHUP)
	signal.Notify(s.clear, syscall.SIGUSR1)
	// Nothing reads these. Otherwise a log whose reader has gone would end the agent.
	pipes := make(chan os.Signal, 1)
	signal.Notify(pipes, syscall.SIGPIPE)
	ctx, cancel := signal.NotifyContext(ctx, end...)
	return ctx, func() {
		cancel()
		for _, c := range []chan os.Signal{s.hangups, s.clear, pipes} {
			signal.Stop(c)
		}
	}
}

// serve runs the agent on the sockets until ctx ends or a socket breaks.
func (s *service) serve(ctx context.Context, listeners []listener) error {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	folded := logfold.New(s.log.Handler())
	defer folded.Close() // after all that writes into it
	s.log = slog.New(folded)
	closeAll := func() {
		for _, l := range listeners {
			_ = l.Close()
		}
	}
	if err := harden(s.log); err != nil {
		closeAll()
		return err
	}
	c, err := loadConfig(s.globals.config)
	if err != nil {
		closeAll()
		return err
	}
	warnUnlocked(s.log)
	var ask *asker // nil: nobody is asked
	// nil as it is, not as a nil *asker in an interface.
	var pins token.PINAsker
	var confirm agent.Confirmer
	var insert agent.Inserter
	var working func(context.Context, *token.Key) func()
	var notices *notices // nil: nobody is told
	var failed func(agent.Event)
	questions := agent.NewQuestions()
	state := paths.StateDir()
	if s.system {
		state = cmp.Or(os.Getenv("STATE_DIRECTORY"), paths.SystemState)
	} else {
		ask = newAsker(c, os.Getenv, os.Environ(), s.log)
		pins, confirm, insert = &pausingAsker{ask, questions}, ask, ask
		notices = newNotices(c, s.log)
		defer notices.Close()
		ask.notify = notices.elsewhere
		working, failed = notices.working, notices.failed
	}
	if c.knownKeys(token.KnownKept) == token.KnownIgnored {
		if err := known.Remove(state); err != nil {
			s.log.Warn("the keys that were remembered cannot be forgotten", "reason", err)
		}
	}
	named, rules, err := s.listenNamed(c, paths.PrivateDir(pathOf(listeners[0])))
	if err != nil {
		closeAll()
		return err
	}
	rules = append(make([]*request.Socket, len(listeners)), rules...)
	listeners = append(listeners, named...)
	b := openBackend(c, pins, working, state, token.KnownKept, s.log)
	defer b.stop()
	var certificates *agent.CertificateDir
	if c.Certificates != "" {
		certificates = agent.NewCertificateDir(c.Certificates, s.log)
	}
	var upstreams []agent.Upstream
	for _, path := range c.Upstream {
		if isOwn(path, listeners) {
			closeAll()
			return fmt.Errorf("upstream: %s is a socket of this agent, which would ask itself for ever", path)
		}
		u := sshagent.NewUpstream(path)
		defer u.Close()
		upstreams = append(upstreams, u)
	}

	allow := token.AllowList(c.AllowModules)
	if s.allow != nil {
		allow = *s.allow
	}
	server := &sshagent.Server{Log: s.log, KeepBinds: len(upstreams) > 0}
	status := &statusMaker{started: time.Now(), store: b.store, server: server, listeners: listeners, rules: rules}
	status.configure(c)
	if ask != nil {
		status.promptAt = ask.promptAt
	}
	keyring := agent.NewKeyring(agent.Options{
		Tokens:        &tokens{store: b.store, allow: allow},
		Rules:         s.rules(c),
		Insert:        insert,
		InsertTimeout: c.InsertTimeout.Duration,
		Lifetime:      s.lifetime,
		Confirm:       confirm,
		Questions:     questions,
		SoftwareKeys:  !s.system && (c.SoftwareKeys == nil || *c.SoftwareKeys),
		RemoteTokens:  s.remoteTokens || c.RemoteTokens,
		Certificates:  certificates,
		Upstreams:     upstreams,
		Hosts:         newHosts(c),
		Fingerprint:   s.fingerprint,
		Failed:        failed,
		Report:        status.report,
		Log:           s.log,
	})
	server.Keyring = keyring
	report := &reporter{service: s, modules: b.store.Modules}
	s.config.Store(c)
	watch := watchLogin1(c, b.store, func(e token.Event) { s.forgetApprovals(keyring, b.store, e) }, s.log)
	var helpers sync.WaitGroup
	defer helpers.Wait()
	helpers.Go(func() { watch.Run(ctx) })
	helpers.Go(func() {
		for {
			select {
			case <-ctx.Done():
				return
			case <-s.clear:
				// As ssh-agent does since OpenSSH 10.0. A token may take its time.
				helpers.Go(func() { s.clearAll(ctx, keyring) })
			case <-s.hangups:
				if s.terminal.hangup(ctx, cancel) {
					s.log.Info("the agent ends with its terminal")
					cancel()
					return
				}
				if c := s.reload(ctx, keyring, b.store, report); c != nil {
					watch.Delay(c.forgetsAtSleep())
					status.configure(c)
					if ask != nil {
						ask.configure(c)
						notices.configure(c)
					}
				}
			}
		}
	})

	// Read even where nobody is told, so that no child sees the variables.
	patience, err := systemd.Watchdog()
	if err != nil {
		s.log.Warn("the agent is not watched", "reason", err)
	}
	doors := doorsOf(listeners)
	results := make(chan error, len(listeners))
	for i, l := range listeners {
		go func() { results <- server.ServeSocket(ctx, l, rules[i]) }()
	}
	s.log.Info("agent is listening", "pid", os.Getpid(), "version", version)
	report.ready()
	helpers.Go(func() { report.follow(ctx, b.store.StatusChanged()) })
	if patience > 0 {
		w := &watchdog{service: s, every: patience, alive: keyring.Alive, doors: doors, tell: systemd.Alive}
		helpers.Go(func() { w.run(ctx) })
	}
	var all []error
	for range listeners {
		if err := <-results; err != nil {
			all = append(all, err)
			cancel() // one socket less is no agent any more
		}
	}
	cancel()
	s.notify(systemd.Stopping())
	return errors.Join(all...)
}

// clearAll removes all keys.
func (s *service) clearAll(ctx context.Context, keyring *agent.Keyring) {
	if err := keyring.Clear(ctx); err != nil {
		s.log.Warn("SIGUSR1 asks for all keys to be removed", "reason", err)
		return
	}
	s.log.Info("SIGUSR1: all keys are removed")
}

// rules is what the configuration tells the keyring, now and when it is read
// again.
func (s *service) rules(c *config) agent.Rules {
	return agent.Rules{
		Automatic: automatic(c), Name: names(c), Listed: listedAs, OfferAway: c.offerAway, Allow: c.allows(s.system), Approval: c.approval(),
	}
}

// forgetApprovals has persons asked again about the keys whose logins end at an
// event.
func (s *service) forgetApprovals(keyring *agent.Keyring, store *token.Store, e token.Event) {
	inMemory := s.config.Load().ForgetOn.retention().EndsAt(e)
	keyring.ForgetApprovals(func(k request.Key) bool {
		if key, ok := k.(*token.Key); ok {
			return store.Forgets(key, e)
		}
		return inMemory
	})
}

// notify logs when the service manager could not be told something.
func (s *service) notify(err error) {
	if err != nil {
		s.log.Warn("cannot tell the service manager", "reason", err)
	}
}

// reload reads the configuration again, and returns it if it is used. Modules
// stay as they are: a change of those needs a restart.
func (s *service) reload(ctx context.Context, k *agent.Keyring, store *token.Store, report *reporter) *config {
	s.notify(systemd.Reloading())
	defer report.ready()
	c, err := loadConfig(s.globals.config)
	if err != nil {
		s.log.Error("the configuration is not used, the old one stays", "reason", err)
		return nil
	}
	store.SetSources(c.sources())
	store.SetHomes(c.uris())
	store.SetPublicKeys(c.publicKeys)
	store.SetPolicy(c.policy())
	k.Configure(s.rules(c))
	old := s.config.Swap(c)
	if !c.sameApproval(old) {
		k.ForgetApprovals(func(request.Key) bool { return true })
	}
	ctx, cancel := context.WithTimeout(ctx, 10*time.Second)
	defer cancel()
	if err := store.Rescan(ctx); err != nil && ctx.Err() == nil {
		s.log.Warn("cannot look at all tokens", "reason", err)
	}
	s.log.Info("configuration read again")
	if changed := c.needRestart(old); len(changed) > 0 {
		s.log.Warn("these changes count after a restart of the agent", "keys", strings.Join(changed, ", "))
	}
	return c
}

// noTraces keeps the stack of a panic out of the log. debug.SetTraceback cannot do
// that: it takes nothing away from what the environment says, or does not say, at
// the start.
const noTraces = "GOTRACEBACK=none"

// withoutTraces starts the program anew with noTraces, in the same process, unless
// that is there. It returns when it cannot, or need not.
func withoutTraces() error {
	name, value, _ := strings.Cut(noTraces, "=")
	if os.Getenv(name) == value {
		return nil
	}
	program, err := os.Executable()
	if err != nil {
		return err
	}
	return fmt.Errorf("start again: %w", syscall.Exec(program, os.Args, dedupe(append(os.Environ(), noTraces))))
}

// crashSignals have Go print all stacks and registers whatever GOTRACEBACK says,
// when they are sent to the process. Where its own code causes one it becomes a
// panic.
var crashSignals = []os.Signal{
	syscall.SIGQUIT, syscall.SIGABRT, syscall.SIGSEGV, syscall.SIGBUS, syscall.SIGFPE, syscall.SIGILL, syscall.SIGTRAP, syscall.SIGSYS,
}

// harden keeps others of the same user from looking into the process, and its
// memory out of core files and out of the log.
func harden(log *slog.Logger) error {
	crashes := make(chan os.Signal, 1)
	signal.Notify(crashes, crashSignals...)
	go func() { // until the process ends
		log.Error("agent ended by a signal", "signal", (<-crashes).String())
		os.Exit(exit.CodeFailure)
	}()
	if err := undumpable.Enforce(); err != nil {
		return err
	}
	if err := unix.Setrlimit(unix.RLIMIT_CORE, &unix.Rlimit{}); err != nil {
		return fmt.Errorf("switch core files off: %w", err)
	}
	return nil
}

// parseLifetime reads a time as ssh-agent does (sshd_config(5), TIME FORMATS; convtime in
// OpenSSH 10.5's misc.c): numbers with units as in 1h30m, of which one at most is seconds.
// A number without a unit is seconds.
func parseLifetime(s string) (time.Duration, error) {
	units := map[byte]time.Duration{
		's': time.Second, 'm': time.Minute, 'h': time.Hour, 'd': 24 * time.Hour, 'w': 7 * 24 * time.Hour,
	}
	bad := fmt.Errorf("%q is no length of time: write seconds, or 1h30m", s)
	if s == "" {
		return 0, bad
	}
	total, seconds := time.Duration(0), false
	for rest := s; rest != ""; {
		n := strings.IndexFunc(rest, func(r rune) bool { return r < '0' || r > '9' })
		digits, unit := rest, time.Second
		if n >= 0 {
			digits = rest[:n]
			var ok bool
			if unit, ok = units[rest[n]|0x20]; !ok {
				return 0, bad
			}
			rest = rest[n+1:]
		} else {
			rest = ""
		}
		v, err := strconv.ParseUint(digits, 10, 31)
		if err != nil || unit == time.Second && seconds {
			return 0, bad
		}
		seconds = seconds || unit == time.Second
		total += time.Duration(v) * unit
		if total < 0 || total > 1<<31*time.Second {
			return 0, bad
		}
	}
	return total, nil
}

// warn tells a person of what is not as it should be and ends nothing.
func warn(err error) { fmt.Fprintf(os.Stderr, "p11-agent: warning: %v\n", err) }

