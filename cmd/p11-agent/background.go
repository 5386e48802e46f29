package main

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"syscall"

	"golang.org/x/sys/unix"

	"p11-agent/agent/logfold"
	"p11-agent/agent/sshagent"
	"p11-agent/cmd/p11-agent/exit"
	"p11-agent/cmd/p11-agent/output"
	"p11-agent/cmd/p11-agent/paths"
)

// shell is how a shell sets variables.
type shell struct{ set, unset string }

var (
	bourne = shell{set: "%[1]s=%[2]s; export %[1]s;\n", unset: "unset %s;\n"}
	cshell = shell{set: "setenv %s %s;\n", unset: "unsetenv %s;\n"}
)

const (
	socketVariable = "SSH_AUTH_SOCK"
	pidVariable    = "SSH_AGENT_PID"
)

// background is what ssh-agent prints when it goes into the background.
func (s shell) background(path string, pid int) string {
	return fmt.Sprintf(s.set, socketVariable, output.ShellWord(path)) + fmt.Sprintf(s.set, pidVariable, strconv.Itoa(pid)) +
		fmt.Sprintf("echo Agent pid %d;\n", pid)
}

// foreground is what it prints when it stays.
func (s shell) foreground(path string, pid int) string {
	return fmt.Sprintf(s.set, socketVariable, output.ShellWord(path)) + fmt.Sprintf("echo Agent pid %d;\n", pid)
}

// killed is what it prints when it has ended another one.
func (s shell) killed(pid int) string {
	return fmt.Sprintf(s.unset, socketVariable) + fmt.Sprintf(s.unset, pidVariable) + fmt.Sprintf("echo Agent pid %d killed;\n", pid)
}

// killAgent ends the agent of the environment, as ssh-agent -k does.
func killAgent(s shell, out io.Writer) error {
	text := os.Getenv(pidVariable)
	if text == "" {
		return fmt.Errorf("%s is not set, so there is no agent to end", pidVariable)
	}
	pid, err := strconv.Atoi(text)
	if err != nil || pid <= 1 {
		return fmt.Errorf("%s is %q, which is no process", pidVariable, text)
	}
	if err := syscall.Kill(pid, syscall.SIGTERM); err != nil {
		return fmt.Errorf("end the agent with process ID %d: %w", pid, err)
	}
	_, err = io.WriteString(out, s.killed(pid))
	return err
}

// The agent in the background is a new process of the same program: a Go
// program cannot go on in a fork. What it needs to know besides its flags is in
// these variables, which it removes.
const (
	childVariable    = "P11_AGENT_BACKGROUND"     // the process that started it
	childEndVariable = "P11_AGENT_BACKGROUND_END" // set: it ends with that process
	childReportFD    = 3                          // it says here how it went
)

// child describes this process when it is the one in the background.
type child struct {
	parent int
	bound  bool // ends when the parent does
}

// backgroundChild returns nil in every other process.
func backgroundChild() *child {
	parent, err := strconv.Atoi(os.Getenv(childVariable))
	if err != nil || parent != os.Getppid() {
		return nil
	}
	c := &child{parent: parent, bound: os.Getenv(childEndVariable) != ""}
	for _, v := range []string{childVariable, childEndVariable} {
		_ = os.Unsetenv(v) // fails for names that cannot be
	}
	return c
}

// reportFD returns the descriptor that it reports on; -1 for every other process.
func (c *child) reportFD() int {
	if c == nil {
		return -1
	}
	return childReportFD
}

// noCommand says that the command of an agent cannot be run. A word that asks the agent
// to start, or to do something else, gets the command that does it.
func noCommand(name string, err error) error {
	if e, ok := errors.AsType[*exec.Error](err); ok {
		err = e.Err
	}
	if errors.Is(err, exec.ErrNotFound) {
		err = errors.New("it was not found in PATH")
	}
	failed := fmt.Errorf("the command %q of the agent cannot be run: %w", name, err)
	what := "to " + name + ", type: "
	does := map[string]string{
		"start": `eval "$(p11-agent agent -s)"`, "run": `eval "$(p11-agent agent -s)"`, "stop": "p11-agent agent -k", "kill": "p11-agent agent -k",
		"end": "p11-agent agent -k", "restart": `p11-agent agent -k; eval "$(p11-agent agent -s)"`, "reload": `kill -HUP "$SSH_AGENT_PID"`,
	}[name]
	if does == "" {
		for _, c := range newRootCommand().Commands() {
			if c.Name() == name {
				what, does = "did you mean: ", "p11-agent "+name
			}
		}
	}
	if does == "" {
		return failed
	}
	return exit.WithHint(failed, what+does)
}

// startInBackground starts the agent as a process of its own and waits until it
// listens. Then it prints the commands for a shell or becomes the command.
func startInBackground(path string, s shell, command []string, out io.Writer) error {
	var program string
	if len(command) > 0 {
		// Found before the agent runs, which would be left over.
		var err error
		if program, err = exec.LookPath(command[0]); err != nil {
			return noCommand(command[0], err)
		}
	}
	report, theirs, err := os.Pipe()
	if err != nil {
		return err
	}
	defer report.Close()
	cmd := exec.Command("/proc/self/exe", os.Args[1:]...)
	// The socket is named by the environment, as the flag may not be there.
	cmd.Args[0] = os.Args[0]
	cmd.Env = append(os.Environ(), noTraces, childVariable+"="+strconv.Itoa(os.Getpid()), childSocketVariable+"="+path)
	if len(command) > 0 {
		cmd.Env = append(cmd.Env, childEndVariable+"=1")
	}
	cmd.ExtraFiles = []*os.File{theirs} // becomes childReportFD
	cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true}
	err = cmd.Start()
	_ = theirs.Close()
	if err != nil {
		return fmt.Errorf("start the agent in the background: %w", err)
	}
	path, err = readReport(report)
	if err != nil {
		if werr := cmd.Wait(); errors.Is(err, io.EOF) {
			err = fmt.Errorf("the agent ended before it was listening: %w", werr)
		}
		return err
	}
	pid := cmd.Process.Pid
	if len(command) == 0 {
		_, err := io.WriteString(out, s.background(path, pid))
		return err
	}
	env := append(os.Environ(), socketVariable+"="+path, pidVariable+"="+strconv.Itoa(pid))
	err = syscall.Exec(program, command, dedupe(env))
	// The agent ends with this process, as it would with the command.
	return fmt.Errorf("run %s: %w", program, err)
}

// What the child reports, a line each: warnings, and at last the path of its socket, or
// its error.
const (
	reportWarning = "warning "
	reportOK      = "ok "
)

// readReport prints the warnings of a report and returns the path in it. The error is
// that of the child, or io.EOF.
func readReport(r io.Reader) (path string, err error) {
	lines := bufio.NewReader(r)
	for {
		line, err := lines.ReadString('\n')
		if err != nil {
			return "", err
		}
		line = strings.TrimSuffix(line, "\n")
		if text, ok := strings.CutPrefix(line, reportWarning); ok {
			warn(errors.New(text))
			continue
		}
		if path, ok := strings.CutPrefix(line, reportOK); ok {
			return path, nil
		}
		return "", errors.New(line)
	}
}

// childSocketVariable tells the child where to listen.
const childSocketVariable = "P11_AGENT_BACKGROUND_SOCKET"

// dedupe keeps the last setting of each variable.
func dedupe(env []string) []string {
	last := make(map[string]int)
	for i, kv := range env {
		name, _, _ := strings.Cut(kv, "=")
		last[name] = i
	}
	var kept []string
	for i, kv := range env {
		name, _, _ := strings.Cut(kv, "=")
		if last[name] == i {
			kept = append(kept, kv)
		}
	}
	return kept
}

// runInBackground is the life of the process that startInBackground starts.
func (s *service) runInBackground(ctx context.Context, c *child) error {
	path := os.Getenv(childSocketVariable)
	_ = os.Unsetenv(childSocketVariable)
	report := os.NewFile(childReportFD, "report")
	unix.CloseOnExec(childReportFD)
	tell := func(kind string, err error) error {
		_, werr := fmt.Fprintln(report, kind+strings.ReplaceAll(err.Error(), "\n", "; "))
		return werr
	}
	fail := func(err error) error { return errors.Join(exit.Status(exit.CodeFailure), tell("", err)) }
	s.warn = func(err error) { _ = tell(reportWarning, err) } // the starter may have gone
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	ctx, stop := s.catchSignals(ctx, syscall.SIGTERM)
	defer stop()
	if c.bound {
		if err := endWith(c.parent, cancel); err != nil {
			return fail(err)
		}
	}
	l, err := s.listen(path)
	if err != nil {
		return fail(err)
	}
	defer paths.RemovePrivateDir(l.Path())
	all, granted := s.openLogs(l)
	defer all.Close()
	defer granted.Close()
	s.log = slog.New(&logs{newLog(all, slog.LevelInfo).Handler(), newLog(granted, slog.LevelInfo).Handler()})
	// From here on the terminal belongs to others.
	signal.Ignore(os.Interrupt)
	if err := leaveTerminal(); err != nil {
		return fail(errors.Join(err, l.Close()))
	}
	if _, err := io.WriteString(report, reportOK+l.Path()+"\n"); err != nil {
		return errors.Join(err, l.Close())
	}
	_ = report.Close()
	if err := s.serve(ctx, []listener{l}); err != nil {
		s.log.Error("agent ended", "reason", err)
		return exit.Status(exit.CodeFailure)
	}
	return nil
}

// leaveTerminal points the standard files away from where the agent was
// started, so that whoever reads from there sees its end.
func leaveTerminal() error {
	null, err := os.OpenFile(os.DevNull, os.O_RDWR, 0)
	if err != nil {
		return err
	}
	defer null.Close()
	for fd := range 3 {
		if err := unix.Dup3(int(null.Fd()), fd, 0); err != nil {
			return fmt.Errorf("leave the terminal: %w", err)
		}
	}
	return os.Chdir("/")
}

// endWith calls end when the process ends. It has to be the parent.
func endWith(pid int, end func()) error {
	fd, err := unix.PidfdOpen(pid, 0)
	if err != nil || os.Getppid() != pid {
		return errors.Join(errors.New("the command's process has ended"), err)
	}
	go func() {
		for {
			_, err := unix.Poll([]unix.PollFd{{Fd: int32(fd), Events: unix.POLLIN}}, -1)
			if err != unix.EINTR {
				break
			}
		}
		_ = unix.Close(fd)
		end()
	}()
	return nil
}

// logs writes all lines into one log, and those about what was granted into another
// one, too.
type logs struct{ all, granted slog.Handler }

var _ slog.Handler = (*logs)(nil)

func (l *logs) Enabled(ctx context.Context, level slog.Level) bool { return l.all.Enabled(ctx, level) }

func (l *logs) Handle(ctx context.Context, r slog.Record) error {
	err := l.all.Handle(ctx, r.Clone())
	if logfold.Granted(r) {
		err = errors.Join(err, l.granted.Handle(ctx, r))
	}
	return err
}

func (l *logs) WithAttrs(attrs []slog.Attr) slog.Handler {
	return &logs{l.all.WithAttrs(attrs), l.granted.WithAttrs(attrs)}
}

func (l *logs) WithGroup(name string) slog.Handler {
	return &logs{l.all.WithGroup(name), l.granted.WithGroup(name)}
}

// maxLogFile is the size at which a log file becomes the old one.
const maxLogFile = 1 << 20

// logFile is the log of an agent that has neither terminal nor journal. Two
// files of 1 MiB at most are kept.
type logFile struct {
	path    string
	passing bool // it goes when it is closed

	mu   sync.Mutex
	file *os.File
	size int64
}

// openLogs opens the logs of the agent with this socket: in the state directory, or next
// to the socket where the state directory cannot be written. A directory that others may
// write to is no place for them. Without a place, nothing is logged.
func (s *service) openLogs(socket *sshagent.Socket) (all, granted io.WriteCloser) {
	var errs []error
	dirs := []string{paths.StateDir()}
	if !socket.Shared() {
		dirs = append(dirs, filepath.Dir(socket.Path()))
	}
	for _, dir := range dirs {
		if dir == "" {
			continue
		}
		all, err := openLogFile(dir, paths.AgentLog)
		if err == nil {
			var granted *logFile
			if granted, err = openLogFile(dir, paths.GrantedLog); err == nil {
				// A directory that ends with the agent is removed, if it is empty.
				all.passing = paths.PrivateDir(socket.Path()) == dir
				granted.passing = all.passing
				if len(errs) > 0 {
					s.warn(fmt.Errorf("open the log: %w: it is %s now", errors.Join(errs...), all.path))
				}
				return all, granted
			}
			_ = all.Close()
		}
		errs = append(errs, err)
	}
	if len(errs) > 0 {
		s.warn(fmt.Errorf("open the log: %w: the agent writes none", errors.Join(errs...)))
	}
	return noLog{io.Discard}, noLog{io.Discard}
}

// noLog is where nothing is kept.
type noLog struct{ io.Writer }

func (noLog) Close() error { return nil }

// openLogFile opens a log in a directory, which it makes.
func openLogFile(dir, name string) (*logFile, error) {
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return nil, err
	}
	l := &logFile{path: filepath.Join(dir, name)}
	return l, l.open()
}

func (l *logFile) open() error {
	f, err := os.OpenFile(l.path, os.O_WRONLY|os.O_CREATE|os.O_APPEND|syscall.O_NOFOLLOW, 0o600)
	if err != nil {
		return err
	}
	st, err := f.Stat()
	if err != nil {
		return errors.Join(err, f.Close())
	}
	l.file, l.size = f, st.Size()
	return nil
}

func (l *logFile) Write(b []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.size > maxLogFile {
		// Should the file not be renamed, it grows on: better than no log.
		if err := os.Rename(l.path, l.path+".old"); err == nil {
			old := l.file
			if err := l.open(); err == nil {
				_ = old.Close()
			}
		}
	}
	n, err := l.file.Write(b)
	l.size += int64(n)
	return n, err
}

// Close closes the file, and removes it when it is one in passing.
func (l *logFile) Close() error {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.passing {
		_ = os.Remove(l.path)          // what stays keeps its directory
		_ = os.Remove(l.path + ".old") // mostly, it is not there
	}
	return l.file.Close()
}
