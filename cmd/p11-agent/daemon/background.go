package daemon

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
	"strconv"
	"strings"
	"syscall"

	"golang.org/x/sys/unix"

	"p11-agent/agent/door"
	"p11-agent/cmd/p11-agent/exit"
	"p11-agent/cmd/p11-agent/output"
	"p11-agent/cmd/p11-agent/paths"
)

// An agent in the background is a new process of the same program: a Go program cannot fork. Besides its flags,
// the starter tells it these things.
const (
	childVariable       = "P11_AGENT_BACKGROUND"        // the starter's process
	childEndVariable    = "P11_AGENT_BACKGROUND_END"    // set: the agent ends with the starter
	childSocketVariable = "P11_AGENT_BACKGROUND_SOCKET" // where the agent listens
	childReportFD       = 3                             // where the agent reports how its start goes
)

// A Child is an agent in the background, seen from inside.
type Child struct {
	parent int
	bound  bool // it ends with the parent
	socket string
}

// BackgroundChild returns nil unless this process is an agent in the background. It removes the variables.
func BackgroundChild() *Child {
	parent, err := strconv.Atoi(os.Getenv(childVariable))
	if err != nil || parent != os.Getppid() {
		return nil
	}
	c := &Child{parent: parent, bound: os.Getenv(childEndVariable) != "", socket: os.Getenv(childSocketVariable)}
	for _, v := range []string{childVariable, childEndVariable, childSocketVariable} {
		_ = os.Unsetenv(v) // fails for names that cannot be
	}
	return c
}

// ReportFD returns the descriptor of the report. It is -1 in a process that is not in the background.
func (c *Child) ReportFD() int {
	if c == nil {
		return -1
	}
	return childReportFD
}

// A Background is an agent in the background, as its starter sees it.
type Background struct {
	Socket string // where it listens
	PID    int
}

// Start starts this program again as an agent in the background, with the same arguments, and waits
// until it listens at the path. bound makes it end with this process. warn is told the agent's warnings.
func Start(path string, bound bool, warn func(error)) (*Background, error) {
	report, theirs, err := os.Pipe()
	if err != nil {
		return nil, err
	}
	defer report.Close()
	cmd := exec.Command("/proc/self/exe", os.Args[1:]...)
	cmd.Args[0] = os.Args[0]
	cmd.Env = append(os.Environ(), noTraces, childVariable+"="+strconv.Itoa(os.Getpid()), childSocketVariable+"="+path)
	if bound {
		cmd.Env = append(cmd.Env, childEndVariable+"=1")
	}
	cmd.ExtraFiles = []*os.File{theirs} // becomes childReportFD
	cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true}
	err = cmd.Start()
	_ = theirs.Close()
	if err != nil {
		return nil, fmt.Errorf("start the agent in the background: %w", err)
	}
	path, err = readReport(report, warn)
	if err != nil {
		if werr := cmd.Wait(); errors.Is(err, io.EOF) {
			err = fmt.Errorf("the agent ended before it was listening: %w", werr)
		}
		return nil, err
	}
	return &Background{path, cmd.Process.Pid}, nil
}

// Become makes this process a program that uses the agent. A bound agent ends with the program, and with this
// process if that fails.
func (b *Background) Become(program string, argv []string) error {
	env := append(os.Environ(), paths.SocketVariable+"="+b.Socket, paths.PIDVariable+"="+strconv.Itoa(b.PID))
	return fmt.Errorf("run %s: %w", program, syscall.Exec(program, argv, lastOfEach(env)))
}

// The lines of a report: warnings, and at last the path of the socket. A line with neither word is an error.
const (
	reportWarning = "warning "
	reportOK      = "ok "
)

// readReport reads a report to its end, and returns the path of the socket. The error is the agent's, or io.EOF.
func readReport(r io.Reader, warn func(error)) (path string, err error) {
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

// lastOfEach keeps the last setting of each variable.
func lastOfEach(env []string) []string {
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

// InBackground runs the agent in the process that Start starts.
func (l *Launch) InBackground(ctx context.Context, c *Child) error {
	starter := &reportWriter{os.NewFile(childReportFD, "report")}
	unix.CloseOnExec(childReportFD)
	l.Warn = starter.warn
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	ctx, signals, stop := catchSignals(ctx, syscall.SIGTERM)
	defer stop()
	if c.bound {
		if err := endWith(c.parent, cancel); err != nil {
			return starter.fail(err)
		}
	}
	socket, err := l.listen(c.socket)
	if err != nil {
		return starter.fail(err)
	}
	defer paths.RemovePrivateDir(socket.Path())
	all, granted := openLogs(socket, l.Warn)
	defer all.Close()
	defer granted.Close()
	log := slog.New(&logs{output.NewLog(all, slog.LevelInfo).Handler(), output.NewLog(granted, slog.LevelInfo).Handler()})
	// From here on the terminal belongs to others.
	signal.Ignore(os.Interrupt)
	if err := leaveTerminal(); err != nil {
		return starter.fail(errors.Join(err, socket.Close()))
	}
	if err := starter.listening(socket.Path()); err != nil {
		return errors.Join(err, socket.Close())
	}
	if err := l.run(ctx, []door.Listener{socket}, log, signals, nil); err != nil {
		log.Error("agent ended", "reason", err)
		return exit.Status(exit.CodeFailure)
	}
	return nil
}

// A reportWriter tells the starter how the start goes. readReport reads it.
type reportWriter struct{ pipe *os.File }

// warn ignores that the starter may have gone.
func (w *reportWriter) warn(err error) { _ = w.line(reportWarning, err.Error()) }

// fail reports why the agent cannot start, and returns the error that ends the process.
func (w *reportWriter) fail(err error) error {
	return errors.Join(exit.Status(exit.CodeFailure), w.line("", err.Error()))
}

// listening reports the path of the socket, which ends the report.
func (w *reportWriter) listening(path string) error {
	if _, err := io.WriteString(w.pipe, reportOK+path+"\n"); err != nil {
		return err
	}
	_ = w.pipe.Close()
	return nil
}

func (w *reportWriter) line(kind, text string) error {
	_, err := fmt.Fprintln(w.pipe, kind+strings.ReplaceAll(text, "\n", "; "))
	return err
}

// leaveTerminal points the standard files to /dev/null, so that a program that reads the starter's output sees
// its end.
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

// endWith calls end when the parent process ends.
func endWith(pid int, end func()) error {
	fd, err := unix.PidfdOpen(pid, 0)
	if err != nil || os.Getppid() != pid {
		return errors.Join(errors.New("the process of the command has ended"), err)
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

// EndNamed ends the agent that SSH_AGENT_PID names, as ssh-agent -k does, and returns its
// process ID.
func EndNamed() (pid int, err error) {
	text := os.Getenv(paths.PIDVariable)
	if text == "" {
		return 0, fmt.Errorf("no agent to end: %s is not set", paths.PIDVariable)
	}
	pid, err = strconv.Atoi(text)
	if err != nil || pid <= 1 {
		return 0, fmt.Errorf("no agent to end: %s is %q, not the ID of a process", paths.PIDVariable, text)
	}
	if err := syscall.Kill(pid, syscall.SIGTERM); err != nil {
		return 0, fmt.Errorf("end the agent with process ID %d: %w", pid, err)
	}
	return pid, nil
}
