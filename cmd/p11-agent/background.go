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
	"strconv"
	"strings"
	"syscall"

	"golang.org/x/sys/unix"

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

// inBackground is the life of the process that startInBackground starts.
func (l *launch) inBackground(ctx context.Context, c *child) error {
	path := os.Getenv(childSocketVariable)
	_ = os.Unsetenv(childSocketVariable)
	starter := &reportWriter{os.NewFile(childReportFD, "report")}
	unix.CloseOnExec(childReportFD)
	l.warn = starter.warn
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	ctx, signals, stop := catchSignals(ctx, syscall.SIGTERM)
	defer stop()
	if c.bound {
		if err := endWith(c.parent, cancel); err != nil {
			return starter.fail(err)
		}
	}
	socket, err := l.listen(path)
	if err != nil {
		return starter.fail(err)
	}
	defer paths.RemovePrivateDir(socket.Path())
	all, granted := openLogs(socket, l.warn)
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
	if err := l.run(ctx, []listener{socket}, log, signals, nil); err != nil {
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
