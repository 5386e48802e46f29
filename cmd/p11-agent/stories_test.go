package main

import (
	"bufio"
	"bytes"
	"errors"
	"flag"
	"fmt"
	"io/fs"
	"math/rand/v2"
	"net"
	"os"
	"os/exec"
	"os/user"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/rogpeppe/go-internal/testscript"
	"golang.org/x/crypto/ssh/agent"
	"golang.org/x/sys/unix"

	"p11-agent/agent/peer/terminaltest"
	"p11-agent/pinentry/procstat"
	"p11-agent/systemd"
	"p11-agent/systemd/bus/bustest"
	"p11-agent/token/module/undumpable"
	"p11-agent/token/registry"
	"p11-agent/token/tokentest"
	"p11-agent/token/tokentest/pivcard"
)

var update = flag.Bool("update", false, "rewrite the expected texts in testdata/script")

func TestMain(m *testing.M) {
	if calledSSHAgent() {
		// A test has made a link with this name. In PATH, the name is that of the real program.
		main()
		return
	}
	// The files of the scripts have the same modes on each machine.
	syscall.Umask(0o022)
	// The test links the same package as the agent, so both are undumpable. No other program of
	// the scripts is undumpable. main makes itself undumpable again.
	if err := undumpable.Suspend(); err != nil {
		panic(err)
	}
	testscript.Main(terminaltest.Without(m), map[string]func(){
		"p11-agent":    main,
		"fakepinentry": fakePinentry,
		"fakeaskpass":  fakeAskpass,
		"fakepanic":    fakePanic,
		"attacker":     attacker,
	})
}

// storyPIN is the PIN of the tokens that scripts start with.
const storyPIN = "sesame-4711"

// patience is the longest wait for a condition, before a story fails. A story that succeeds does
// not wait that long.
const patience = 3 * time.Minute

// TestStories runs the real program together with the programs of its users. Each script in
// testdata/script is a story. It has its own HOME, runtime directory and token directory. Each
// process that it starts ends with it.
//
// Besides the commands of testscript, scripts have these commands:
//
//	need PROGRAM...     skip the story if a program is missing; in CI, fail. Seven names are not
//	                    programs in PATH: p11-kit-client.so; YKCS11, the module of Yubico, which
//	                    that variable names; scdaemon, in any directory; paramiko, for the
//	                    Python of Debian with it; sk-dummy.so, the FIDO device of OpenSSH for
//	                    tests, which SKDUMMY names; userns, the right to be another user than
//	                    root in a namespace; sshd-tty, an sshd that can give out terminals.
//	                    Without one of the last two, skip the story also in CI
//	tokens NAME...      put these SoftHSM tokens into the token directory
//	card [NAME] DO...   do something with a PIV card; see useCard
//	pcscd DO            do something with the daemon of the readers: stop, start, restart, kill; unplug and
//	                    plug the readers; freeze and thaw, as when the machine sleeps
//	tpm                 make a TPM without tokens, whose resource manager is at DBUS_SESSION_BUS_ADDRESS
//	tpm reset           reset the TPM, as when the machine hibernates; it then takes back no keys and
//	                    sessions that other programs keep for it
//	desktop             start a bus with a service for notifications and a logind on it, before the agent
//	display             start an X server without a screen; XVFB is its DISPLAY
//	manager VARIABLE=VALUE...  put a service manager with this environment on the user's bus
//	bubble REGEXP|none  wait until the desktop shows only this notification, or none
//	bubbles N           check that the agent has requested N notifications
//	logind lock|sleep|wake  make logind report it; sleep waits until no program delays the sleep,
//	                    and fails if the log has no logout by then
//	agent [ARG...]      start an agent in the background, with SSH_AUTH_SOCK and SSH_AGENT_PID
//	adopt [FILE]        the same for an agent that the script has started: FILE, or the last output,
//	                    has its address
//	gone                wait until the agent has ended, and check that its socket is gone
//	sshd                start an sshd that accepts $USER by $WORK/authorized_keys; $WORK/ssh_config
//	                    has the host "box"
//	until PROGRAM...    run a program until it succeeds
//	screen [SESSION] REGEXP  wait until the tmux pane, or the pane of a session, shows this
//	recipe SECTION DIR  write the lines to type of a section of docs/RECIPES.md into DIR/N.sh
//	mask FILE           write the last output to FILE, and replace the parts that differ at each run
//	secret TEXT         fail if TEXT is in a log, or in the arguments or environment of any process
//	connections N M     connect to the agent N times in turn and M times at once, and check that it
//	                    keeps no files of them
func TestStories(t *testing.T) { runScripts(t, "script") }

// TestAttacks runs attackers against the real program: a client, a program in its own namespaces, a
// module. Each script in testdata/attack is one attack. It has the commands of TestStories.
func TestAttacks(t *testing.T) { runScripts(t, "attack") }

func runScripts(t *testing.T, dir string) {
	root := tokentest.TempDir(t) // short, because sockets are in it
	s := &stories{t: t, tokens: makeTokens(t), softhsm: tokentest.Module(t, "libsofthsm2.so"), opensc: tokentest.Module(t, "opensc-pkcs11.so")}
	// Scripts that use the module declare that they need gcc.
	if _, err := exec.LookPath("gcc"); err == nil {
		s.badModule = tokentest.BuildBadModule(t)
		s.bigModule = tokentest.BuildBigModule(t)
	}
	for _, pattern := range []string{"/usr/lib/*/libykcs11.so.*", "/usr/lib*/libykcs11.so.*"} {
		if found, _ := filepath.Glob(pattern); len(found) > 0 {
			s.ykcs11 = found[0]
		}
	}
	testscript.Run(t, testscript.Params{
		Dir:                 filepath.Join("testdata", dir),
		WorkdirRoot:         root,
		RequireExplicitExec: true,
		RequireUniqueNames:  true,
		UpdateScripts:       *update,
		Setup:               s.setup,
		Condition: func(cond string) (bool, error) {
			switch cond {
			case "root":
				return os.Geteuid() == 0, nil
			case "four":
				return len(strings.TrimSpace(currentUser())) == 4, nil
			case "systemd":
				return systemd.Booted(), nil
			case "usual":
				return usualModules()
			}
			return false, fmt.Errorf("unknown condition %q", cond)
		},
		Cmds: map[string]func(*testscript.TestScript, bool, []string){
			"need":        need,
			"tokens":      s.addTokens,
			"card":        useCard,
			"pcscd":       usePCSCD,
			"tpm":         s.useTPM,
			"desktop":     s.startDesktop,
			"display":     startDisplay,
			"manager":     startManager,
			"bubble":      bubble,
			"bubbles":     bubbles,
			"logind":      logind,
			"agent":       startAgent,
			"adopt":       adopt,
			"gone":        gone,
			"sshd":        startSSHD,
			"until":       until,
			"screen":      screen,
			"recipe":      writeRecipeForStory,
			"mask":        mask,
			"secret":      findSecret,
			"connections": connections,
		},
	})
}

// stories holds what all scripts share.
type stories struct {
	t         *testing.T
	tokens    map[string]string // directories to copy, by the label of the token
	softhsm   string            // SoftHSM's module
	badModule string            // tokentest's
	bigModule string            // likewise
	ykcs11    string            // Yubico's module; empty: it is not installed
	opensc    string            // OpenSC's module
}

// usualModules reports whether the machine has registered only the modules that make deps-check
// installs. The command check reports problems of other modules, which would change its output.
func usualModules() (bool, error) {
	all, err := filepath.Glob("/usr/share/p11-kit/modules/*.module")
	usual := []string{"opensc-pkcs11.module", "p11-kit-trust.module", "softhsm2.module", "tpm2_pkcs11.module"}
	return !slices.ContainsFunc(all, func(file string) bool { return !slices.Contains(usual, filepath.Base(file)) }), err
}

// A story holds what belongs to one script.
type story struct {
	t     testing.TB // of the script
	skip  func(...any)
	fail  func(format string, args ...any) // for failures that show at the end
	agent *process                         // the agent that SSH_AGENT_PID names
	pcscd *tokentest.PCSCD                 // nil: the story has not needed it
	cards map[string]*storyCard
	tpm   *tokentest.TPM // nil: there is none

	manager       *bustest.Bus           // nil: there is no service manager
	notifications *bustest.Notifications // nil: there is no desktop
	login1        *bustest.Login1
}

// storyCard is a card of a story.
type storyCard struct {
	*pivcard.Card
	keys map[pivcard.Ref]pivcard.Key
	slot int // where it is, or was last
}

type storyKey struct{}

func storyOf(ts *testscript.TestScript) *story { return ts.Value(storyKey{}).(*story) }

// kinds are the keys of the token "six", in the order of their IDs.
var kinds = []string{
	tokentest.RSA2048, tokentest.RSA4096, tokentest.P256, tokentest.P384, tokentest.P521, tokentest.Ed25519,
}

// makeTokens makes tokens for the scripts. A script copies them, which is faster than making them.
func makeTokens(t *testing.T) map[string]string {
	tokens := make(map[string]string)
	add := func(label string, fill func(*tokentest.SoftHSM)) {
		h := tokentest.NewSoftHSM(t)
		h.AddToken(label, storyPIN)
		fill(h)
		tokens[label] = filepath.Join(h.Dir(), "tokens")
	}
	add("work", func(h *tokentest.SoftHSM) { h.GenerateKey("work", tokentest.P256, "01", "login") })
	add("home", func(h *tokentest.SoftHSM) { h.GenerateKey("home", tokentest.Ed25519, "01", "login") })
	add("six", func(h *tokentest.SoftHSM) {
		for i, kind := range kinds {
			h.GenerateKey("six", kind, fmt.Sprintf("%02d", i+1), strings.ToLower(kind))
		}
	})
	add("empty", func(*tokentest.SoftHSM) {})
	add("odd", func(h *tokentest.SoftHSM) {
		h.GenerateKey("odd", "rsa:1024", "01", "short")
		h.GenerateKey("odd", "EC:secp256k1", "02", "bitcoin")
	})
	return tokens
}

func (s *stories) setup(env *testscript.Env) error {
	env.Values[storyKey{}] = &story{
		t:    env.T().(testing.TB), //nolint:forcetypeassert // testscript gives it as the narrower interface
		skip: env.T().Skip, fail: func(format string, args ...any) {
			s.t.Errorf("%s: "+format, append([]any{filepath.Base(env.WorkDir)}, args...)...)
		},
		cards: make(map[string]*storyCard),
	}
	work := env.WorkDir
	for _, dir := range []string{"home/pinentry", "home/askpass", "run", "tokens", "bin"} {
		if err := os.MkdirAll(filepath.Join(work, dir), 0o700); err != nil {
			return err
		}
	}
	// The directories of a script's archive do not have the right modes.
	for _, dir := range []string{"home", "run", "tokens"} {
		if err := os.Chmod(filepath.Join(work, dir), 0o700); err != nil {
			return err
		}
	}
	conf := filepath.Join(work, "softhsm2.conf")
	text := fmt.Sprintf("directories.tokendir = %s/tokens\nobjectstore.backend = file\nlog.level = ERROR\n", work)
	if err := os.WriteFile(conf, []byte(text), 0o600); err != nil {
		return err
	}
	// A script that wants a pinentry other than the fake names it.
	if err := writeNew(filepath.Join(work, "home/.config/p11-agent/config.toml"), "[pinentry]\nprogram = \"fakepinentry\"\n"); err != nil {
		return err
	}
	for _, name := range []string{"pinentry", "askpass"} {
		if err := writeNew(filepath.Join(work, "home", name, "answers"), "pin "+storyPIN+"\n"); err != nil {
			return err
		}
	}
	for name, value := range map[string]string{
		"HOME":            work + "/home",
		"XDG_RUNTIME_DIR": work + "/run",
		"SOFTHSM2_CONF":   conf,
		// The story uses no card or TPM of this machine or of another test.
		"PCSCLITE_CSOCK_NAME": filepath.Join(work, "no-pcscd"),
		"TPM2_PKCS11_TCTI":    "swtpm:path=" + filepath.Join(work, "no-tpm"),
		// The story does not notice when this machine sleeps.
		"DBUS_SYSTEM_BUS_ADDRESS": "unix:path=" + filepath.Join(work, "no-bus"),
		"SOFTHSM":                 s.softhsm,
		"MODULE":                  s.badModule,
		"BIGMODULE":               s.bigModule,
		"YKCS11":                  s.ykcs11,
		"OPENSC":                  s.opensc,
		"SCDAEMON":                tokentest.FindSCDaemon(),
		"SKDUMMY":                 "/usr/lib/openssh/regress/misc/sk-dummy/sk-dummy.so",
		"LOG":                     work + "/home/.local/state/p11-agent/agent.log",
		"CONFIG":                  work + "/home/.config/p11-agent/config.toml",
		"LC_ALL":                  "C.UTF-8",
		"TERM":                    "xterm",
		"SHELL":                   "/bin/sh",
		"USER":                    strings.TrimSpace(currentUser()),
		// The race detector also reports races of processes whose output no test reads.
		"GORACE":              "atexit_sleep_ms=0 log_path=" + work + "/race",
		"GIT_CONFIG_NOSYSTEM": "1",
	} {
		env.Setenv(name, value)
	}
	// This runs before testscript removes the directory.
	env.Defer(func() {
		if story, ok := env.T().(interface{ Failed() bool }); ok && story.Failed() {
			log, _ := os.ReadFile(env.Getenv("LOG")) // not every story has an agent
			env.T().Log("The end of the agent's log:\n" + string(log[max(0, len(log)-8<<10):]))
		}
		if err := endLeftovers(work); err != nil {
			s.t.Errorf("%s: %v", filepath.Base(work), err)
		}
		races, err := filepath.Glob(filepath.Join(work, "race.*"))
		if err != nil {
			s.t.Error(err)
		}
		for _, file := range races {
			if b, err := os.ReadFile(file); err != nil || len(b) > 0 {
				s.t.Errorf("%s: %v\n%s", work, err, b)
			}
		}
	})
	return nil
}

// endLeftovers ends the processes of a story that outlive it, and returns an error for them. It
// finds them by their HOME, which is also in each environment that the agent makes. Only root can
// read the environment of an agent. So an ordinary user finds only the other processes.
func endLeftovers(work string) error {
	var all []error
	home := []byte("HOME=" + work + "/home\x00")
	files, err := filepath.Glob("/proc/[0-9]*/environ")
	if err != nil {
		return err
	}
	for _, file := range files {
		b, err := os.ReadFile(file)
		if err != nil || !bytes.Contains(b, home) {
			continue // gone, or a process of another user or story
		}
		pid, err := strconv.Atoi(filepath.Base(filepath.Dir(file)))
		if err != nil {
			return err
		}
		p, err := openProcess(pid)
		if err != nil {
			continue // it has ended
		}
		// Module processes may be about to end with their agent.
		if p.wait(30*time.Second) != nil {
			name, _ := os.ReadFile(filepath.Join(filepath.Dir(file), "cmdline"))
			all = append(all, fmt.Errorf("left a process: %q", name), unix.PidfdSendSignal(p.fd, unix.SIGKILL, nil, 0))
		}
		all = append(all, unix.Close(p.fd))
	}
	return errors.Join(all...)
}

func currentUser() string {
	out, err := exec.Command("id", "-un").Output()
	if err != nil {
		return ""
	}
	return string(out)
}

// writeNew writes a file, unless the script has one of that name.
func writeNew(path, text string) error {
	if err := os.MkdirAll(filepath.Dir(path), 0o700); err != nil {
		return err
	}
	f, err := os.OpenFile(path, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o600)
	if errors.Is(err, fs.ErrExist) {
		return nil
	}
	if err != nil {
		return err
	}
	_, err = f.WriteString(text)
	return errors.Join(err, f.Close())
}

// noNegation refuses a negated command, and a command with wrong arguments.
func noNegation(ts *testscript.TestScript, neg, ok bool, usage string) {
	if neg || !ok {
		ts.Fatalf("usage: %s", usage)
	}
}

func need(ts *testscript.TestScript, neg bool, args []string) {
	noNegation(ts, neg, len(args) > 0, "need PROGRAM...")
	for _, name := range args {
		what, err := name+" is not installed", error(nil)
		switch name {
		case "p11-kit-client.so":
			_, err = registry.FindClient(registry.DefaultDirs(os.LookupEnv, os.Geteuid()).ModuleDirs)
		case "YKCS11":
			if ts.Getenv(name) == "" {
				what, err = "libykcs11 is not installed", fs.ErrNotExist
			}
		case "sk-dummy.so":
			_, err = os.Stat(ts.Getenv("SKDUMMY"))
		case "paramiko":
			err = exec.Command("/usr/bin/python3", "-c", "import paramiko").Run()
		case "scdaemon":
			if tokentest.FindSCDaemon() != "" {
				continue
			}
			err = errors.New(name)
		case "userns":
			if os.Geteuid() == 0 && exec.Command("unshare", "--user", "--map-user=1000", "--map-group=1000", "true").Run() != nil {
				// This is not a program, but a right that containers and chroots take away.
				storyOf(ts).skip("root may not be another user in a namespace here")
			}
			continue
		case "sshd-tty":
			// sshd gives the terminal to the group tty. If the kernel has not done that already,
			// sshd must be root (OpenSSH's sshpty.c, pty_setowner).
			if !ownsTerminals() {
				storyOf(ts).skip("only root's sshd can give out terminals here: /dev/pts is not mounted for the group tty")
			}
			continue
		default:
			_, err = lookPath(name)
		}
		if err != nil {
			if os.Getenv("CI") == "true" {
				ts.Fatalf("%s", what)
			}
			storyOf(ts).skip(what)
		}
	}
}

// ownsTerminals reports whether new terminals are as sshd wants them, or this process is root. Root
// can change them.
func ownsTerminals() bool {
	if os.Geteuid() == 0 {
		return true
	}
	far, err := os.OpenFile("/dev/ptmx", os.O_RDWR|unix.O_NOCTTY, 0)
	if err != nil {
		return false
	}
	defer far.Close()
	n, err := unix.IoctlGetInt(int(far.Fd()), unix.TIOCGPTN)
	if err != nil {
		return false
	}
	var st unix.Stat_t
	if err := unix.Stat(fmt.Sprintf("/dev/pts/%d", n), &st); err != nil {
		return false
	}
	tty, err := user.LookupGroup("tty")
	return err == nil && tty.Gid == strconv.Itoa(int(st.Gid))
}

// lookPath also finds programs of the administrator.
func lookPath(name string) (string, error) {
	if path, err := exec.LookPath(name); err == nil {
		return path, nil
	}
	return exec.LookPath(filepath.Join("/usr/sbin", name))
}

func (s *stories) addTokens(ts *testscript.TestScript, neg bool, args []string) {
	noNegation(ts, neg, len(args) > 0, "tokens NAME...")
	for _, name := range args {
		dir, ok := s.tokens[name]
		if !ok {
			ts.Fatalf("there is no token %q", name)
		}
		ts.Check(os.CopyFS(filepath.Join(ts.Getenv("WORK"), "tokens"), os.DirFS(dir)))
	}
}

// A process is a process that the scripts did not start by exec. It has a file descriptor, because
// another process may get the same number later.
type process struct {
	pid, fd int
}

func openProcess(pid int) (*process, error) {
	fd, err := unix.PidfdOpen(pid, 0)
	if err != nil {
		return nil, fmt.Errorf("process %d: %w", pid, err)
	}
	return &process{pid, fd}, nil
}

// wait waits for the end of the process.
func (p *process) wait(limit time.Duration) error {
	for end := time.Now().Add(limit); ; {
		n, err := unix.Poll([]unix.PollFd{{Fd: int32(p.fd), Events: unix.POLLIN}}, int(max(0, time.Until(end).Milliseconds())))
		switch {
		case errors.Is(err, unix.EINTR):
		case err != nil:
			return err
		case n == 0:
			return fmt.Errorf("process %d has not ended", p.pid)
		default:
			return nil
		}
	}
}

// end ends a process that may have ended.
func (p *process) end() error {
	defer unix.Close(p.fd)
	if err := unix.PidfdSendSignal(p.fd, unix.SIGTERM, nil, 0); err != nil && !errors.Is(err, unix.ESRCH) {
		return err
	}
	err := p.wait(patience)
	if err != nil {
		_ = unix.PidfdSendSignal(p.fd, unix.SIGKILL, nil, 0)
	}
	return err
}

func startAgent(ts *testscript.TestScript, neg bool, args []string) {
	if err := ts.Exec("p11-agent", append([]string{"agent", "-s"}, args...)...); err != nil {
		ts.Fatalf("agent: %v", err)
	}
	adopt(ts, neg, nil)
}

var (
	socketLine = regexp.MustCompile(`(?m)^(?:SSH_AUTH_SOCK=|setenv SSH_AUTH_SOCK )([^;]+);`)
	pidLine    = regexp.MustCompile(`(?m)^echo Agent pid ([0-9]+);$`)
)

func adopt(ts *testscript.TestScript, neg bool, args []string) {
	noNegation(ts, neg, len(args) <= 1, "adopt [FILE]")
	text := ts.ReadFile(append(args, "stdout")[0])
	socket, number := socketLine.FindStringSubmatch(text), pidLine.FindStringSubmatch(text)
	if socket == nil || number == nil {
		ts.Fatalf("this does not tell where an agent is: %q", text)
	}
	pid, err := strconv.Atoi(number[1])
	ts.Check(err)
	s := storyOf(ts)
	ts.Setenv("SSH_AUTH_SOCK", socket[1])
	ts.Setenv("SSH_AGENT_PID", number[1])
	p, err := openProcess(pid)
	if errors.Is(err, unix.ESRCH) {
		s.agent = nil // it has ended, and its parent has waited for it
		return
	}
	ts.Check(err)
	s.agent = p
	ts.Defer(func() {
		if err := p.end(); err != nil {
			s.fail("end the agent: %v", err)
		}
	})
}

func gone(ts *testscript.TestScript, neg bool, args []string) {
	noNegation(ts, neg, len(args) == 0, "gone")
	if p := storyOf(ts).agent; p != nil {
		ts.Check(p.wait(patience))
	}
	if _, err := os.Lstat(ts.Getenv("SSH_AUTH_SOCK")); !errors.Is(err, fs.ErrNotExist) {
		ts.Fatalf("the agent has ended, and its socket is still there (%v)", err)
	}
}

// eventually calls try until it returns no error, for a bounded time.
func eventually(try func() error) error {
	for end := time.Now().Add(patience); ; time.Sleep(20 * time.Millisecond) {
		err := try()
		if err == nil || time.Now().After(end) {
			return err
		}
	}
}

func until(ts *testscript.TestScript, neg bool, args []string) {
	noNegation(ts, neg, len(args) > 0, "until PROGRAM...")
	if err := eventually(func() error { return ts.Exec(args[0], args[1:]...) }); err != nil {
		ts.Fatalf("%q does not come true: %v", args, err)
	}
}

func screen(ts *testscript.TestScript, neg bool, args []string) {
	noNegation(ts, neg, len(args) == 1 || len(args) == 2, "screen [SESSION] REGEXP")
	capture := []string{"-S", filepath.Join(ts.Getenv("WORK"), "tmux"), "capture-pane", "-p"}
	if len(args) == 2 {
		capture, args = append(capture, "-t", args[0]), args[1:]
	}
	want, err := regexp.Compile("(?m)" + args[0])
	ts.Check(err)
	err = eventually(func() error {
		if err := ts.Exec("tmux", capture...); err != nil {
			return err
		}
		if !want.MatchString(ts.ReadFile("stdout")) {
			return errors.New("it shows something else")
		}
		return nil
	})
	if err != nil {
		ts.Fatalf("wait for the screen to show %q: %v", args[0], err)
	}
}

// cardPIN is the PIN that a card begins with.
const cardPIN = "8-apples"

// cardCommands are the actions of the command card. The name of a card is "card" if the command
// does not name it. A new card is in no reader:
//
//	new [yubikey] [like NAME]  make the card: one that answers as a YubiKey, or one with the keys
//	                           of another card; any other action makes the usual card
//	in [SLOT]                  put it into a slot; reader one has slots 0 and 1, reader two 2 and 3
//	out, pull                  take it out; pull does so in the middle of a command, if need be
//	reset, cut                 reset it, as another program may; cut the power off and on again
//	pin PIN                    give it another PIN
//	tries N                    leave N tries
//	delay DURATION             delay each use of a private key
//	counts WHAT=N...           check the counts of the card: right, wrong and blocked PINs,
//	                           signed, and the left tries
//	pins N                     the same as counts right=N wrong=0 blocked=0
var cardCommands = []string{"new", "in", "out", "pull", "reset", "cut", "pin", "tries", "delay", "counts", "pins"}

func useCard(ts *testscript.TestScript, neg bool, args []string) {
	st := storyOf(ts)
	name := "card"
	if len(args) > 0 && !slices.Contains(cardCommands, args[0]) {
		name, args = args[0], args[1:]
	}
	noNegation(ts, neg, len(args) > 0 && slices.Contains(cardCommands, args[0]), "card [NAME] "+strings.Join(cardCommands, "|"))
	do, args := args[0], args[1:]
	argument := func() string {
		noNegation(ts, neg, len(args) == 1, "card [NAME] "+do+" ARGUMENT")
		return args[0]
	}
	if do == "new" {
		noNegation(ts, neg, st.cards[name] == nil, "card NAME new, once")
		st.newCard(ts, name, args)
		return
	}
	c := st.cards[name]
	if c == nil {
		c = st.newCard(ts, name, nil)
	}
	switch do {
	case "in":
		if len(args) > 0 {
			slot, err := strconv.Atoi(argument())
			ts.Check(err)
			c.slot = slot
		}
		st.needPCSCD(ts).Insert(c.slot, c.Card)
	case "out":
		st.needPCSCD(ts).Remove(c.slot)
	case "pull":
		st.needPCSCD(ts).Pull(c.slot)
	case "reset":
		c.Reset()
	case "cut":
		c.PowerOff()
		c.PowerOn()
	case "pin":
		ts.Check(c.SetPIN(argument()))
	case "tries":
		n, err := strconv.Atoi(argument())
		ts.Check(err)
		c.SetTries(n)
	case "delay":
		d, err := time.ParseDuration(argument())
		ts.Check(err)
		c.SetDelay(0, d)
	case "counts":
		c.check(ts, args)
	case "pins":
		c.check(ts, []string{"right=" + argument(), "wrong=0", "blocked=0"})
	}
}

func (st *story) newCard(ts *testscript.TestScript, name string, args []string) *storyCard {
	c := &storyCard{keys: make(map[pivcard.Ref]pivcard.Key)}
	o := pivcard.Options{Name: name, PIN: cardPIN}
	for len(args) > 0 {
		switch {
		case args[0] == "yubikey":
			o.YubiKey, args = true, args[1:]
		case args[0] == "like" && len(args) > 1 && st.cards[args[1]] != nil:
			c.keys, args = st.cards[args[1]].keys, args[2:]
		case args[0] == "twin" && len(args) > 1 && st.cards[args[1]] != nil:
			o.Name, o.Serial, args = args[1], st.cards[args[1]].Serial(), args[2:]
		default:
			ts.Fatalf("usage: card NAME new [yubikey] [like CARD] [twin CARD]")
		}
	}
	if len(c.keys) == 0 {
		for _, ref := range []pivcard.Ref{pivcard.Authentication, pivcard.Signature, pivcard.KeyManagement, pivcard.CardAuthentication} {
			key, err := pivcard.NewKey(ref)
			ts.Check(err)
			c.keys[ref] = key
		}
	}
	o.Keys = c.keys
	c.Card = tokentest.NewCard(st.t, o)
	st.cards[name] = c
	return c
}

// check compares the counts of the card with the wanted counts.
func (c *storyCard) check(ts *testscript.TestScript, wants []string) {
	n := c.Counts()
	counts := map[string]int{"right": n.Right, "wrong": n.Wrong, "blocked": n.Blocked, "signed": n.Signatures, "tries": c.Tries()}
	for _, w := range wants {
		what, text, _ := strings.Cut(w, "=")
		want, err := strconv.Atoi(text)
		got, ok := counts[what]
		if err != nil || !ok {
			ts.Fatalf("a card does not count %q", w)
		}
		if got != want {
			ts.Fatalf("the card counts %v, and %s was to be %d; what happened to it:\n%s", counts, what, want, strings.Join(c.Events(), "\n"))
		}
	}
}

// needPCSCD returns the pcscd of the story, and starts it at the first call. It has two readers.
// One of them has a name that the module of Yubico looks for.
func (st *story) needPCSCD(ts *testscript.TestScript) *tokentest.PCSCD {
	if st.pcscd == nil {
		st.pcscd = tokentest.StartPCSCD(st.t, "Yubico Virtual", "Virtual")
		for _, kv := range st.pcscd.Env() {
			name, value, _ := strings.Cut(kv, "=")
			ts.Setenv(name, value)
		}
	}
	return st.pcscd
}

func usePCSCD(ts *testscript.TestScript, neg bool, args []string) {
	p := storyOf(ts).needPCSCD(ts)
	do := map[string]func(){
		"stop": p.Stop, "start": p.Start, "restart": p.Restart, "kill": p.Kill,
		"unplug": p.Unplug, "plug": p.Plug, "freeze": p.Freeze, "thaw": p.Thaw,
	}
	noNegation(ts, neg, len(args) == 1 && do[args[0]] != nil, "pcscd stop|start|restart|kill|unplug|plug|freeze|thaw")
	do[args[0]]()
}

// useTPM is the command tpm. The TPM ends after all stories.
func (s *stories) useTPM(ts *testscript.TestScript, neg bool, args []string) {
	st := storyOf(ts)
	noNegation(ts, neg, len(args) == 0 && st.tpm == nil || len(args) == 1 && args[0] == "reset" && st.tpm != nil, "tpm, then tpm reset")
	if st.tpm != nil {
		st.tpm.Reset()
		return
	}
	st.tpm = tokentest.NewTPM(s.t)
	for _, kv := range st.tpm.Env() {
		name, value, _ := strings.Cut(kv, "=")
		ts.Setenv(name, value)
	}
}

func (s *stories) startDesktop(ts *testscript.TestScript, neg bool, args []string) {
	noNegation(ts, neg, len(args) == 0, "desktop")
	b := bustest.Start(s.t)
	st := storyOf(ts)
	st.notifications = b.Notifications("body", "body-markup")
	st.login1 = b.Login1()
	st.login1.AddSession("mine", os.Geteuid(), false)
	ts.Setenv("DBUS_SESSION_BUS_ADDRESS", b.Address())
	ts.Setenv("DBUS_SYSTEM_BUS_ADDRESS", b.Address())
}

// startDisplay starts an X server with a high number. Other servers choose low numbers themselves.
func startDisplay(ts *testscript.TestScript, neg bool, args []string) {
	noNegation(ts, neg, len(args) == 0, "display")
	for range 5 {
		display := fmt.Sprintf(":%d", 1000+rand.IntN(50000))
		if runDisplay(ts, display) {
			ts.Setenv("XVFB", display)
			return
		}
	}
	ts.Fatalf("Xvfb does not start")
}

// runDisplay starts the server, and reports whether it is ready. The server ends with the story.
func runDisplay(ts *testscript.TestScript, display string) bool {
	ready, theirs, err := os.Pipe()
	ts.Check(err)
	defer ready.Close()
	// Without -noreset, the server disconnects a client that connects just after the last client
	// has left.
	cmd := exec.Command("Xvfb", display, "-displayfd", "3", "-screen", "0", "800x600x24", "-nolisten", "tcp", "-noreset")
	cmd.ExtraFiles = []*os.File{theirs}
	ts.Check(errors.Join(cmd.Start(), theirs.Close()))
	ts.Defer(func() {
		_ = cmd.Process.Signal(syscall.SIGTERM)
		_ = cmd.Wait() // a signal ends it
	})
	ts.Check(ready.SetReadDeadline(time.Now().Add(patience)))
	_, err = bufio.NewReader(ready).ReadString('\n')
	return err == nil
}

func startManager(ts *testscript.TestScript, neg bool, args []string) {
	noNegation(ts, neg, true, "manager [VARIABLE=VALUE...]")
	s := storyOf(ts)
	if s.manager == nil {
		s.manager = bustest.Start(s.t)
		ts.Check(os.Symlink(s.manager.Socket(), filepath.Join(ts.Getenv("XDG_RUNTIME_DIR"), "bus")))
	}
	s.manager.Systemd1(args...)
}

func bubble(ts *testscript.TestScript, neg bool, args []string) {
	noNegation(ts, neg, len(args) == 1, "bubble REGEXP|none")
	want, err := regexp.Compile("(?s)^" + args[0] + "$")
	ts.Check(err)
	ts.Check(eventually(func() error {
		open := storyOf(ts).notifications.Open()
		switch {
		case args[0] == "none" && len(open) == 0:
			return nil
		case len(open) == 1 && want.MatchString(open[0].Summary+"\n"+open[0].Body):
			return nil
		}
		return fmt.Errorf("shown is %+v", open)
	}))
}

func bubbles(ts *testscript.TestScript, neg bool, args []string) {
	noNegation(ts, neg, len(args) == 1, "bubbles N")
	if all := storyOf(ts).notifications.All(); strconv.Itoa(len(all)) != args[0] {
		ts.Fatalf("%d notifications were asked for: %+v", len(all), all)
	}
}

func logind(ts *testscript.TestScript, neg bool, args []string) {
	noNegation(ts, neg, len(args) == 1, "logind lock|sleep|wake")
	st := storyOf(ts)
	switch args[0] {
	case "lock":
		st.login1.Lock("mine")
	case "wake":
		st.login1.Sleep(false)
	case "sleep":
		ts.Check(eventually(func() error {
			if st.login1.Held() != 1 {
				return errors.New("nothing delays sleep")
			}
			return nil
		}))
		type seen struct {
			log []byte
			err error
		}
		released := make(chan seen, 1)
		log := ts.Getenv("LOG")
		st.login1.OnRelease(func() {
			b, err := os.ReadFile(log)
			released <- seen{b, err}
		})
		defer st.login1.OnRelease(nil)
		st.login1.Sleep(true)
		select {
		case s := <-released:
			ts.Check(s.err)
			if !bytes.Contains(s.log, []byte("the machine goes to sleep")) {
				ts.Fatalf("the machine sleeps before the tokens are logged out: %s", s.log)
			}
		case <-time.After(patience):
			ts.Fatalf("sleep is delayed for ever")
		}
	default:
		ts.Fatalf("logind %s: there is no such command", args[0])
	}
}

// startSSHD starts a server on a free port. If another program takes the port meanwhile, startSSHD
// tries another port.
func startSSHD(ts *testscript.TestScript, neg bool, args []string) {
	noNegation(ts, neg, len(args) == 0, "sshd")
	program, err := lookPath("sshd")
	ts.Check(err)
	if os.Geteuid() == 0 {
		// The sshd of Debian needs its directory for privilege separation.
		ts.Check(os.MkdirAll("/run/sshd", 0o755))
	}
	work := ts.Getenv("WORK")
	hostKey := filepath.Join(work, "host")
	ts.Check(ts.Exec("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", hostKey))
	public, err := os.ReadFile(hostKey + ".pub")
	ts.Check(err)
	ts.Check(os.WriteFile(filepath.Join(work, "known_hosts"), slices.Concat([]byte("box "), public), 0o600))

	for range 5 {
		l, err := net.Listen("tcp4", "127.0.0.1:0")
		ts.Check(err)
		port := l.Addr().(*net.TCPAddr).Port
		ts.Check(l.Close())
		config := fmt.Sprintf(`
			ListenAddress 127.0.0.1:%[1]d
			HostKey %[2]s/host
			AuthorizedKeysFile %[2]s/authorized_keys
			PidFile %[2]s/sshd.pid
			StrictModes no
			UsePAM no
			PermitRootLogin yes
			PasswordAuthentication no
			KbdInteractiveAuthentication no
			PermitUserRC no
			AllowAgentForwarding yes
			LogLevel VERBOSE
			MaxStartups 200
			MaxAuthTries 3
			# ssh's first choice, sntrup761, costs a client 0.2 s. This one hashes with SHA-512, too,
			# so session identifiers have the same length.
			KexAlgorithms ecdh-sha2-nistp521
		`, port, work)
		ts.Check(os.WriteFile(filepath.Join(work, "sshd_config"), []byte(config), 0o600))
		config = fmt.Sprintf(`
			Host box
			HostName 127.0.0.1
			HostKeyAlias box
			Port %[1]d
			User %[2]s
			UserKnownHostsFile %[3]s/known_hosts
			GlobalKnownHostsFile /dev/null
			StrictHostKeyChecking yes
			IdentityFile none
			BatchMode yes
			PreferredAuthentications publickey
		`, port, ts.Getenv("USER"), work)
		ts.Check(os.WriteFile(filepath.Join(work, "ssh_config"), []byte(config), 0o600))
		ok, err := runSSHD(ts, program, port)
		ts.Check(err)
		if ok {
			return
		}
	}
	ts.Fatalf("sshd finds no port")
}

// runSSHD reports whether the server got its port.
func runSSHD(ts *testscript.TestScript, program string, port int) (bool, error) {
	work := ts.Getenv("WORK")
	log, err := os.Create(filepath.Join(work, "sshd.log"))
	if err != nil {
		return false, err
	}
	defer log.Close()
	cmd := exec.Command(program, "-D", "-e", "-f", filepath.Join(work, "sshd_config"))
	cmd.Stderr = log
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	if err := cmd.Start(); err != nil {
		return false, err
	}
	ended := make(chan struct{})
	go func() {
		_ = cmd.Wait() // a signal ends it
		close(ended)
	}()
	ts.Defer(func() {
		// The signal also ends the children, which serve one connection each.
		_ = syscall.Kill(-cmd.Process.Pid, syscall.SIGTERM)
		<-ended
	})
	err = eventually(func() error {
		text, err := os.ReadFile(log.Name())
		switch {
		case err != nil:
			return err
		case bytes.Contains(text, []byte("Server listening on 127.0.0.1 port "+strconv.Itoa(port))):
			return nil
		}
		select {
		case <-ended:
			return nil
		default:
			return fmt.Errorf("sshd does not start: %s", text)
		}
	})
	if err != nil {
		return false, err
	}
	select {
	case <-ended:
		text, err := os.ReadFile(log.Name())
		if err != nil || !bytes.Contains(text, []byte("Address already in use")) {
			return false, fmt.Errorf("sshd: %s (%w)", text, err)
		}
		return false, nil
	default:
		return true, nil
	}
}

// masks match the text that differs from run to run.
var masks = []struct {
	what *regexp.Regexp
	by   string
}{
	{regexp.MustCompile(`serial=[0-9a-f]{16}`), "serial=SERIAL"},
	{regexp.MustCompile(`"serial": "[0-9a-f]{16}"`), `"serial": "SERIAL"`},
	{regexp.MustCompile(`\(serial [0-9a-f]{16}\)`), "(serial SERIAL)"},
	{regexp.MustCompile(`SHA256:[A-Za-z0-9+/]{43}`), "FINGERPRINT"},
	{regexp.MustCompile(`\bAAAA[A-Za-z0-9+/]+=*`), "BASE64"},
	{regexp.MustCompile(`slot ID 0x[0-9a-f]+`), "slot ID 0xID"},
	{regexp.MustCompile(`/usr/[^ ")]*/(libsofthsm2|opensc-pkcs11)\.so`), "/usr/.../$1.so"},
	{regexp.MustCompile(`/[^ ")]*/fakepinentry`), "/.../fakepinentry"},
	// Processes and times in the output of status.
	{regexp.MustCompile(`\b[0-9]+ (s|min) ago|just now`), "AGO"},
	{regexp.MustCompile(`(for|up for) (less than 1 s|[0-9]+ (s|min))`), "$1 TIME"},
	{regexp.MustCompile(`process [0-9]+`), "process PID"},
	{regexp.MustCompile(`(ssh-[a-z]+|p11-agent) \([0-9]+\)`), "$1 (PID)"},
	{regexp.MustCompile(`landlock [0-9]+`), "landlock ABI"},
	{regexp.MustCompile(`[0-9]+ connections?`), "N connections"},
}

func mask(ts *testscript.TestScript, neg bool, args []string) {
	noNegation(ts, neg, len(args) == 1, "mask FILE")
	text := strings.ReplaceAll(ts.ReadFile("stdout"), ts.Getenv("WORK"), "WORK")
	for _, m := range masks {
		text = m.what.ReplaceAllString(text, m.by)
	}
	ts.Check(os.WriteFile(ts.MkAbs(args[0]), []byte(text), 0o600))
}

// findSecret searches the places that must not have secrets: logs, outputs, and the arguments and
// environments of processes.
func findSecret(ts *testscript.TestScript, neg bool, args []string) {
	noNegation(ts, neg, len(args) == 1, "secret TEXT")
	secret := []byte(args[0])
	work := ts.Getenv("WORK")
	looked := 0
	err := filepath.WalkDir(work, func(path string, d fs.DirEntry, err error) error {
		if err != nil || !d.Type().IsRegular() || strings.HasPrefix(d.Name(), "answers") || strings.HasPrefix(d.Name(), "pin-") {
			return err
		}
		looked++
		b, err := os.ReadFile(path)
		if err == nil && bytes.Contains(b, secret) {
			err = fmt.Errorf("the secret is in %s", path)
		}
		return err
	})
	ts.Check(err)
	seen := 0 // the searched processes of the story, with those of the agent, without those of another story
	dirs, err := filepath.Glob("/proc/[0-9]*")
	ts.Check(err)
	home := []byte("HOME=" + work + "/home\x00")
	agentPID := ts.Getenv("SSH_AGENT_PID")
	for _, dir := range dirs {
		environ, err := os.ReadFile(filepath.Join(dir, "environ"))
		switch {
		case err == nil && bytes.Contains(environ, home):
		case errors.Is(err, fs.ErrPermission) && isOrHasParent(dir, agentPID):
			// The kernel shows the environments of the agent and of its module processes only to
			// root. It shows their arguments to each user.
		default:
			continue // gone, or a process of another user or story
		}
		cmdline, _ := os.ReadFile(filepath.Join(dir, "cmdline")) // the process may have ended
		if bytes.Contains(environ, secret) || bytes.Contains(cmdline, secret) {
			ts.Fatalf("the secret is in %s: %q", dir, cmdline)
		}
		seen++
	}
	if looked == 0 || seen == 0 {
		ts.Fatalf("looked at %d files and %d processes: that is not where the agent is", looked, seen)
	}
}

// isOrHasParent tells whether the directory in /proc belongs to a process, or to a child of it.
func isOrHasParent(dir, pid string) bool {
	number, err := strconv.Atoi(filepath.Base(dir))
	if err != nil {
		return false
	}
	stat, ok := procstat.Of(number)
	return filepath.Base(dir) == pid || ok && strconv.Itoa(stat.Parent) == pid
}

func connections(ts *testscript.TestScript, neg bool, args []string) {
	noNegation(ts, neg, len(args) == 2, "connections IN-TURN AT-ONCE")
	inTurn, err := strconv.Atoi(args[0])
	ts.Check(err)
	atOnce, err := strconv.Atoi(args[1])
	ts.Check(err)
	dir := fmt.Sprintf("/proc/%s/fd", ts.Getenv("SSH_AGENT_PID"))
	files := func() int {
		entries, err := os.ReadDir(dir)
		ts.Check(err)
		return len(entries)
	}
	list := func() (net.Conn, error) {
		c, err := net.Dial("unix", ts.Getenv("SSH_AUTH_SOCK"))
		if err != nil {
			return nil, err
		}
		keys, err := agent.NewClient(c).List()
		if err == nil && len(keys) == 0 {
			err = errors.New("the agent lists no keys")
		}
		return c, err
	}
	// The first connection opens the files that the agent opens only once.
	c, err := list()
	ts.Check(err)
	ts.Check(c.Close())
	before := files()
	ts.Check(eventually(func() error {
		if n := files(); n != before-1 && n != before {
			before = n
			return errors.New("not settled")
		}
		return nil
	}))
	for range inTurn {
		c, err := list()
		ts.Check(err)
		ts.Check(c.Close())
	}
	open := make([]net.Conn, atOnce)
	errs := make([]error, atOnce)
	var wg sync.WaitGroup
	for i := range atOnce {
		wg.Go(func() { open[i], errs[i] = list() })
	}
	wg.Wait()
	ts.Check(errors.Join(errs...))
	if n := files(); n < before+atOnce-1 {
		ts.Fatalf("%d clients are connected, and the agent has %d files open: those are not its own", atOnce, n)
	}
	for _, c := range open {
		ts.Check(c.Close())
	}
	ts.Check(eventually(func() error {
		if n := files(); n > before {
			return fmt.Errorf("the agent has %d files open, and had %d", n, before)
		}
		return nil
	}))
}
