package peer

import (
	"bytes"
	"cmp"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"

	"p11-agent/pinentry/plain"
	"p11-agent/pinentry/procstat"
)

// Limits of an environment. ARG_MAX allows 6 MiB, which no real environment needs.
const (
	maxEnviron  = 1 << 20
	maxVariable = 1024 // bytes of a value; a longer one does not count
)

// A Desk holds the terminal and the environment of a process. A prompt for the process
// reaches its person there. All data comes from the process: the agent does not trust it.
// Hand the paths, names and addresses to a program that asks the person, and to nothing
// else. If the process has other namespaces than the agent, the Desk holds only Who and
// the two errors.
type Desk struct {
	// Who, as in "ssh (1234)", is the name and number of the process for messages.
	Who string

	Environment
	// EnvErr says why the Environment is unknown.
	EnvErr error

	// Terminal is the process's terminal. It is nil when the process has no terminal that
	// may show a prompt, and TerminalErr says why. The owner of the Desk closes it.
	Terminal    *Terminal
	TerminalErr error
}

// An Environment has the variables that say where a person is. An unknown value is empty.
// A bad value is empty, too: a display that could pass for an option, a path that is not
// absolute, an address of a bus that would run a program, a locale that is a path.
type Environment struct {
	Display        string // DISPLAY
	WaylandDisplay string // WAYLAND_DISPLAY
	XAuthority     string // XAUTHORITY
	DBusAddress    string // DBUS_SESSION_BUS_ADDRESS
	RuntimeDir     string // XDG_RUNTIME_DIR
	GPGTTY         string // GPG_TTY
	TTYType        string // TERM
	// Locale is LC_ALL, LC_MESSAGES, LANG or LC_CTYPE, the first that is set.
	Locale string
}

// Close closes the terminal.
func (d *Desk) Close() { d.Terminal.Close() }

// Desk returns the Desk of the process that made the connection, as it is now. It makes
// some 40 short system calls and waits for nothing. Another process may have the number by
// now: Desk sees that, and then both errors are set.
func (p Peer) Desk() *Desk {
	d := &Desk{Who: p.first()}
	pr, err := p.open()
	if err != nil {
		d.EnvErr, d.TerminalErr = err, err
		return d
	}
	if err := pr.sameNamespaces(); err != nil {
		d.EnvErr, d.TerminalErr = err, err
	} else {
		d.Environment, d.EnvErr = readEnviron(pr.pid)
		d.Terminal, d.TerminalErr = pr.terminal(d.GPGTTY)
	}
	if d.Terminal == nil {
		defer pr.close() // otherwise it is the terminal's
	}
	// The data belongs to the process only if the process lived all the while.
	if err := pr.same(); err != nil {
		d.Close()
		return &Desk{Who: d.Who, EnvErr: err, TerminalErr: err}
	}
	return d
}

// Own returns the terminal on which a person has started this process. This process has to
// be the job in the foreground there, as for a client. The error says why there is no
// terminal.
func Own() (*Terminal, error) {
	pr, err := Self().open()
	if err != nil {
		return nil, err
	}
	t, err := pr.terminal("")
	if err != nil {
		pr.close()
	}
	return t, err
}

// Self returns this process as a Peer of others.
func Self() Peer {
	p := Peer{Known: true, PID: os.Getpid(), UID: os.Geteuid(), GID: os.Getegid()}
	if fd, err := unix.PidfdOpen(p.PID, 0); err == nil {
		p.Chain, p.id = chain(p.PID, fd)
		_ = unix.Close(fd)
	}
	p.text = p.String()
	return p
}

// first returns the name of the process without its ancestors.
func (p Peer) first() string {
	if len(p.Chain) > 1 {
		p.Chain, p.text = p.Chain[:1], ""
	}
	return p.String()
}

// running is a process that was opened by its number. same tells whether it is still the process in
// question.
type running struct {
	who   string
	pid   int
	pidfd int
	id    identity
}

// open finds the process that made the connection.
func (p Peer) open() (*running, error) {
	switch {
	case !p.Known:
		return nil, errors.New("the client is unknown")
	case p.PID <= 0:
		return nil, errors.New("the client is in another PID namespace, out of sight")
	case len(p.Chain) == 0:
		return nil, fmt.Errorf("the client had ended when it was looked at (process %d)", p.PID)
	case p.UID != os.Geteuid():
		return nil, fmt.Errorf("%s is of another user (uid %d)", p.first(), p.UID)
	}
	fd, err := unix.PidfdOpen(p.PID, 0)
	if errors.Is(err, unix.ESRCH) || errors.Is(err, unix.EINVAL) {
		return nil, fmt.Errorf("%s has ended", p.first())
	}
	if err != nil {
		return nil, fmt.Errorf("%s cannot be watched: %w", p.first(), err)
	}
	pr := &running{who: p.first(), pid: p.PID, pidfd: fd, id: p.id}
	if err := pr.same(); err != nil {
		pr.close()
		return nil, err
	}
	return pr, nil
}

// same returns an error unless the process lives and is the one in question. The pidfd was opened
// by the number, so same compares the identity. Data that was read by the number before belongs to
// the process then.
func (r *running) same() error {
	_, err := r.stat()
	return err
}

func (r *running) stat() (procstat.Stat, error) {
	s, ok := procstat.Of(r.pid)
	switch {
	case !alive(r.pidfd), ok && r.id != identity{s.Start, inode(r.pidfd)}:
		return procstat.Stat{}, fmt.Errorf("%s has ended", r.who)
	case !ok:
		return procstat.Stat{}, fmt.Errorf("%s cannot be looked at", r.who)
	}
	return s, nil
}

func (r *running) close() { _ = unix.Close(r.pidfd) }

// A Terminal is the terminal of a process. It stays open, so that no caller looks its name
// up again. Any goroutine may call its methods, except Close.
type Terminal struct {
	// File is open for reading and writing. The Terminal owns it.
	File *os.File

	of   *running
	nr   device // of the process's controlling terminal; zero: it has none
	rdev device // of this terminal
}

// Close closes the terminal. Close of a nil Terminal does nothing.
func (t *Terminal) Close() {
	if t != nil {
		_ = t.File.Close()
		t.of.close()
	}
}

// Check returns nil if the process is still at the terminal and is the job in the foreground, which
// the person sees. Otherwise another program reads what the person types. The error tells a person
// what is in the way.
func (t *Terminal) Check() error {
	s, err := t.of.stat()
	switch {
	case err != nil:
		return err
	case ttyDevice(s.TTY) != t.nr:
		return fmt.Errorf("%s has left its terminal", t.of.who)
	}
	return t.of.foreground(s, t.rdev)
}

// device is the number of a terminal; zero is none.
type device struct{ major, minor uint32 }

// Numbers of devices (the kernel's admin-guide/devices.txt).
const (
	majorPtyMaster = 2
	majorVirtual   = 4 // /dev/tty1, and serial lines from minor 64 on
	majorAlias     = 5 // /dev/tty, /dev/console, /dev/ptmx: another terminal for each process that opens them
	majorPts       = 136
	lastMajorPts   = 143
	majorUSBSerial = 188
)

// ttyDevice decodes tty_nr of proc_pid_stat(5), which has the bits of the
// kernel's new_encode_dev.
func ttyDevice(nr uint32) device { return device{nr >> 8 & 0xfff, nr&0xff | nr>>12&0xfff00} }

// pathUnderRoot returns the usual path of a terminal in a process's own view.
func (d device) pathUnderRoot() string {
	switch {
	case d.major >= majorPts && d.major <= lastMajorPts:
		return fmt.Sprintf("dev/pts/%d", (d.major-majorPts)<<8|d.minor)
	case d.major == majorVirtual && d.minor < 64:
		return fmt.Sprintf("dev/tty%d", d.minor)
	case d.major == majorVirtual:
		return fmt.Sprintf("dev/ttyS%d", d.minor-64)
	case d.major == majorUSBSerial:
		return fmt.Sprintf("dev/ttyUSB%d", d.minor)
	}
	return ""
}

// terminal finds the terminal of the process. gpgTTY is the GPG_TTY of its environment, and only a
// hint. The Terminal owns r.
//
// terminal never opens a name in this process's view. In the view of the other process, /dev/pts/3
// may be another terminal, even with the same device number.
func (r *running) terminal(gpgTTY string) (*Terminal, error) {
	s, err := r.stat()
	if err != nil {
		return nil, err
	}
	var firstErr error
	try := func(fd int, err error) *Terminal {
		if err != nil {
			return nil
		}
		defer unix.Close(fd) //nolint:errcheck // it is only a path
		t, err := r.openTerminal(fd, s)
		if firstErr == nil {
			firstErr = err
		}
		return t
	}
	for n := range 3 {
		// O_PATH, because opening a device may have an effect.
		fd, err := unix.Open(procFile(r.pid, "fd/"+strconv.Itoa(n)), unix.O_PATH|unix.O_CLOEXEC, 0)
		if errors.Is(err, unix.EACCES) || errors.Is(err, unix.EPERM) {
			return nil, fmt.Errorf("the terminal of %s cannot be opened: its files cannot be read", r.who)
		}
		if t := try(fd, err); t != nil {
			return t, nil
		}
	}
	for _, path := range []string{gpgTTY, ttyDevice(s.TTY).pathUnderRoot()} {
		if path == "" {
			continue
		}
		if t := try(openUnderRoot(r.pid, path)); t != nil {
			return t, nil
		}
	}
	switch {
	case firstErr != nil:
		return nil, firstErr
	case ttyDevice(s.TTY) == device{}:
		return nil, fmt.Errorf("%s has no terminal", r.who)
	}
	return nil, fmt.Errorf("the terminal of %s cannot be opened", r.who)
}

// openUnderRoot opens the file that a path leads to in a process's own view. It follows links.
func openUnderRoot(pid int, path string) (int, error) {
	root, err := unix.Open(procFile(pid, "root"), unix.O_PATH|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		return -1, err
	}
	defer unix.Close(root) //nolint:errcheck // nothing was written
	return unix.Openat2(root, path, &unix.OpenHow{
		Flags:   unix.O_PATH | unix.O_CLOEXEC,
		Resolve: unix.RESOLVE_IN_ROOT | unix.RESOLVE_NO_MAGICLINKS,
	})
}

// openTerminal opens the file of a path descriptor if it is the terminal of the process. It returns
// nil and nil for another file.
func (r *running) openTerminal(path int, s procstat.Stat) (*Terminal, error) {
	var st unix.Stat_t
	if err := unix.Fstat(path, &st); err != nil || st.Mode&unix.S_IFMT != unix.S_IFCHR {
		return nil, nil //nolint:nilnil // see above
	}
	rdev := device{unix.Major(st.Rdev), unix.Minor(st.Rdev)}
	switch {
	case ttyDevice(s.TTY) != device{} && ttyDevice(s.TTY) != rdev:
		return nil, nil //nolint:nilnil // see above
	case rdev.major == majorPtyMaster, rdev.major == majorAlias:
		return nil, nil //nolint:nilnil // see above
	}
	// Without O_NONBLOCK, open of a serial line waits for a carrier.
	fd, err := unix.Open("/proc/self/fd/"+strconv.Itoa(path), unix.O_RDWR|unix.O_NOCTTY|unix.O_NONBLOCK|unix.O_CLOEXEC, 0)
	if err != nil {
		if ttyDevice(s.TTY) == (device{}) {
			return nil, nil //nolint:nilnil // a device of any kind
		}
		return nil, fmt.Errorf("the terminal of %s cannot be opened: %w", r.who, err)
	}
	if _, err := unix.IoctlGetTermios(fd, unix.TCGETS); err != nil {
		_ = unix.Close(fd)
		return nil, nil //nolint:nilnil // see above
	}
	if err := r.foreground(s, rdev); err != nil {
		_ = unix.Close(fd)
		return nil, err
	}
	// os.NewFile would hand a non-blocking file to the poller, which cannot use it.
	_ = unix.SetNonblock(fd, false)
	return &Terminal{File: os.NewFile(uintptr(fd), "terminal of "+r.who), of: r, nr: ttyDevice(s.TTY), rdev: rdev}, nil
}

// foreground returns nil if the process is the job in the foreground of the terminal, which gets
// what a person types. A process in a session without a terminal (setsid(1)) is so, if the ancestor
// with this terminal is: the ancestor waits for the process, or could read by itself.
func (r *running) foreground(s procstat.Stat, rdev device) error {
	_, at, ok := r.member(s, rdev)
	switch {
	case !ok:
		return fmt.Errorf("%s has left the job in the foreground of its terminal", r.who)
	case at.Group != at.Foreground:
		return fmt.Errorf("%s is in the background of its terminal", r.who)
	}
	return nil
}

// member finds the process that has this terminal: the process itself, whose Stat is s, or its
// nearest ancestor. No process between them may have another terminal.
func (r *running) member(s procstat.Stat, rdev device) (pid int, at procstat.Stat, ok bool) {
	pid = r.pid
	for range maxChain {
		if ttyDevice(s.TTY) == rdev {
			return pid, s, true
		}
		if ttyDevice(s.TTY) != (device{}) || s.Parent <= 1 {
			break
		}
		parent, ok := parentOf(pid, s)
		if !ok {
			break
		}
		pid, s = s.Parent, parent
	}
	return 0, procstat.Stat{}, false
}

// parentOf returns the Stat of the parent of a process, whose own Stat is s.
func parentOf(pid int, s procstat.Stat) (procstat.Stat, bool) {
	parent, ok := procstat.Of(s.Parent)
	// The process is the parent only if the child still lives and names it afterwards.
	again, still := procstat.Of(pid)
	return parent, ok && still && again.Start == s.Start && again.Parent == s.Parent
}

// wanted are the variables that say where a person is. Each has a function that accepts good
// values.
var wanted = map[string]func(string) bool{
	"DISPLAY":                  isName,
	"WAYLAND_DISPLAY":          isName,
	"XAUTHORITY":               filepath.IsAbs,
	"DBUS_SESSION_BUS_ADDRESS": isSocketAddress,
	"XDG_RUNTIME_DIR":          filepath.IsAbs,
	"GPG_TTY":                  filepath.IsAbs,
	"TERM":                     isWord,
	"LC_ALL":                   isWord,
	"LC_MESSAGES":              isWord,
	"LC_CTYPE":                 isWord,
	"LANG":                     isWord,
}

func isName(s string) bool { return !strings.HasPrefix(s, "-") }

// isWord refuses values that C libraries take for the path of a file to load.
func isWord(s string) bool {
	return strings.IndexFunc(s, func(r rune) bool {
		return !(r >= 'a' && r <= 'z' || r >= 'A' && r <= 'Z' || r >= '0' && r <= '9' || strings.ContainsRune("._@+-", r))
	}) < 0
}

// isSocketAddress refuses addresses that run a program when a client connects to them (D-Bus
// specification, "unixexec" and "autolaunch").
func isSocketAddress(s string) bool {
	for one := range strings.SplitSeq(s, ";") {
		if !strings.HasPrefix(one, "unix:") {
			return false
		}
	}
	return true
}

// readEnviron reads the wanted variables of a process's environment. The rest of the environment
// may have secrets, so readEnviron wipes it.
func readEnviron(pid int) (Environment, error) {
	if pid == os.Getpid() {
		// An undumpable process cannot read this file of its own.
		return ParseEnvironment([]byte(strings.Join(os.Environ(), "\x00"))), nil
	}
	f, err := os.Open(procFile(pid, "environ"))
	if err != nil {
		return Environment{}, unreadable(err)
	}
	defer f.Close()
	buf := make([]byte, 16<<10)
	n := 0
	defer func() { clear(buf) }()
	for {
		m, err := f.Read(buf[n:])
		n += m
		if m == 0 && errors.Is(err, io.EOF) {
			return ParseEnvironment(buf[:n]), nil
		}
		if err != nil {
			return Environment{}, unreadable(err)
		}
		if n < len(buf) {
			continue
		}
		if n >= maxEnviron {
			return Environment{}, fmt.Errorf("the environment has more than %d bytes", maxEnviron)
		}
		bigger := make([]byte, 4*len(buf))
		copy(bigger, buf)
		clear(buf)
		buf = bigger
	}
}

func unreadable(err error) error {
	return fmt.Errorf("the environment cannot be read: %w", unpathed(err))
}

// ParseEnvironment returns the wanted variables of an environment, in which each variable ends with
// a NUL (proc_pid_environ(5)). A value that is too long or does not print does not count. As with
// getenv(3), the first setting of a variable counts.
func ParseEnvironment(b []byte) Environment {
	env := make(map[string]string)
	for kv := range bytes.SplitSeq(b, []byte{0}) {
		name, value, ok := bytes.Cut(kv, []byte("="))
		good := wanted[string(name)]
		if _, again := env[string(name)]; !ok || good == nil || again {
			continue
		}
		env[string(name)] = ""
		if len(value) <= maxVariable && plain.Prints(value) && good(string(value)) {
			env[string(name)] = string(value)
		}
	}
	return Environment{
		Display: env["DISPLAY"], WaylandDisplay: env["WAYLAND_DISPLAY"], XAuthority: env["XAUTHORITY"],
		DBusAddress: env["DBUS_SESSION_BUS_ADDRESS"], RuntimeDir: env["XDG_RUNTIME_DIR"],
		GPGTTY: env["GPG_TTY"], TTYType: env["TERM"],
		Locale: cmp.Or(env["LC_ALL"], env["LC_MESSAGES"], env["LANG"], env["LC_CTYPE"]),
	}
}
