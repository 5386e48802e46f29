package pinentry

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"strings"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"p11-agent/pinentry/plain"
)

// defaultGrace is how long a program may take to leave by itself. Then it is killed.
const defaultGrace = 2 * time.Second

// testOnlyGrace replaces defaultGrace in tests of programs that do not leave.
var testOnlyGrace time.Duration

func grace() time.Duration {
	if testOnlyGrace > 0 {
		return testOnlyGrace
	}
	return defaultGrace
}

// errEnded says that the program ended before its answer.
var errEnded = errors.New("ended without an answer")

// A child is a running program, its pipes, and the work for its end.
//
// One goroutine (watch) waits for the program's end and reaps it. Another goroutine reads standard
// error, and watch waits for it. Signals go to the whole process group, as pinentry is often a
// shell script. They are sent under mu, and never after the program is reaped, when another process
// may have its number.
type child struct {
	in  *os.File // its standard input
	out *os.File // its standard output

	cmd *exec.Cmd
	tty *terminal

	errors     *os.File // its standard error
	errorsDone chan struct{}
	complaints tail // read it after done

	done chan struct{} // closed when the program is gone and reaped

	mu       sync.Mutex
	stopping bool
	killer   *time.Timer   // runs when stopping
	killed   chan struct{} // closed by killer
	reaped   bool
}

// run starts file with the arguments argv, its name first. An empty argv means no arguments. The
// program inherits the terminal tty, unless tty is nil. If a signal ends the program, the terminal
// gets its modes back.
func run(file string, argv, env []string, tty *os.File) (_ *child, err error) {
	c := &child{
		cmd:        exec.Command(file),
		errorsDone: make(chan struct{}),
		done:       make(chan struct{}),
		killed:     make(chan struct{}),
	}
	if len(argv) > 0 {
		c.cmd.Args = argv
	}
	c.cmd.Env = env
	c.cmd.Dir = "/"
	// A session of its own is a process group that no terminal stops for reading in the
	// background. A killed agent ends nothing by itself: the dialogue would stay, and read
	// what is typed for the shell. So the kernel sends a signal at the end of the thread that
	// started the program (prctl(2)). Go ends no thread except a locked one.
	c.cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true, Pdeathsig: syscall.SIGTERM}

	var theirs [3]*os.File
	defer func() {
		for _, f := range theirs {
			_ = f.Close() // of a nil *os.File returns an error
		}
		if err != nil {
			c.closeFiles()
		}
	}()
	if theirs[0], c.in, err = os.Pipe(); err != nil {
		return nil, err
	}
	if c.out, theirs[1], err = os.Pipe(); err != nil {
		return nil, err
	}
	if c.errors, theirs[2], err = os.Pipe(); err != nil {
		return nil, err
	}
	c.cmd.Stdin, c.cmd.Stdout, c.cmd.Stderr = theirs[0], theirs[1], theirs[2]
	if tty != nil {
		c.cmd.ExtraFiles = []*os.File{tty} // Place.ttyName
		c.tty = newTerminal(tty)
	}
	if err := c.cmd.Start(); err != nil {
		return nil, err
	}
	go c.listen()
	go c.watch()
	return c, nil
}

func (c *child) closeFiles() {
	_ = c.in.Close()
	_ = c.out.Close()
	_ = c.errors.Close()
	c.tty.close()
}

// stop asks the program to leave, and has it killed when it does not. stop does not wait.
func (c *child) stop() {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.stopping || c.reaped {
		return
	}
	c.stopping = true
	// The first signal lets the program give the terminal back.
	c.signalLocked(syscall.SIGTERM)
	c.killer = time.AfterFunc(grace(), func() {
		c.mu.Lock()
		defer c.mu.Unlock()
		c.signalLocked(syscall.SIGKILL)
		close(c.killed)
	})
}

// end ends the program and waits for its end.
func (c *child) end() {
	c.stop()
	<-c.done
}

func (c *child) signalLocked(sig syscall.Signal) {
	if !c.reaped {
		_ = syscall.Kill(-c.cmd.Process.Pid, sig) // the group may be empty
	}
}

// listen keeps the end of the program's standard error, which says what is wrong with the display.
func (c *child) listen() {
	defer close(c.errorsDone)
	buf := make([]byte, 512)
	for {
		n, err := c.errors.Read(buf)
		c.complaints.write(buf[:n])
		if err != nil {
			return
		}
	}
}

// watch waits for the end of the program and of the programs that it has started.
func (c *child) watch() {
	defer close(c.done)
	c.watchTerminal()
	waitDead(c.cmd.Process.Pid)
	c.stop() // a script has ended, but perhaps not its children
	select {
	case <-c.errorsDone:
	case <-c.killed:
		// A process has left the group, and keeps the pipes. Leave it alone.
		_ = c.errors.SetReadDeadline(time.Now())
		<-c.errorsDone
	}

	c.mu.Lock()
	c.killer.Stop()
	c.signalLocked(syscall.SIGKILL)
	c.reaped = true
	c.mu.Unlock()
	_ = c.cmd.Wait() // other methods read the status
	select {
	case <-c.killed:
		c.tty.restore(false)
	default:
		if ws, ok := c.cmd.ProcessState.Sys().(syscall.WaitStatus); ok && ws.Signaled() {
			c.tty.restore(ws.Signal() == syscall.SIGTERM)
		}
	}
	// Readers still get the earlier output of the program. They do not wait for a process
	// that has left the group.
	_ = c.out.SetReadDeadline(time.Now().Add(grace()))
}

// watchTerminal stops the program when its terminal is hung up. It returns when the program has
// ended, or when there is no terminal. Otherwise pinentry-curses would read the end of file over
// and over.
func (c *child) watchTerminal() {
	if c.tty == nil {
		return
	}
	pidfd, err := unix.PidfdOpen(c.cmd.Process.Pid, 0)
	if err != nil {
		return // an old kernel: the end of the request ends the program
	}
	defer unix.Close(pidfd) //nolint:errcheck // nothing was written
	fds := []unix.PollFd{{Fd: int32(pidfd), Events: unix.POLLIN}, {Fd: int32(c.tty.fd)}}
	for {
		_, err := unix.Poll(fds, -1)
		switch {
		case err == unix.EINTR:
		case err != nil || fds[0].Revents != 0:
			return
		case fds[1].Revents != 0:
			c.stop()
			return
		}
	}
}

// waitDead returns when the process has ended. The process stays a zombie, and keeps its number.
func waitDead(pid int) {
	for unix.Waitid(unix.P_PID, pid, nil, unix.WEXITED|unix.WNOWAIT, nil) == unix.EINTR {
	}
}

// close waits for the program's end, and gives everything back. The caller has ended the program.
func (c *child) close() {
	<-c.done
	c.closeFiles()
}

// guard ends the program when ctx ends. The caller calls release when it does not wait for the
// program any more. release returns the error of ctx if ctx has ended. Then the program has ended
// too.
func (c *child) guard(ctx context.Context) (release func() error) {
	stop := context.AfterFunc(ctx, c.stop)
	return func() error {
		if stop() {
			return nil
		}
		<-c.done
		return ended(ctx)
	}
}

// ended describes the end of a program that should have gone on.
func (c *child) ended() error {
	c.end() // the program may have closed its output only
	if !c.cmd.ProcessState.Success() {
		return fmt.Errorf("%w (%s)", errEnded, c.cmd.ProcessState)
	}
	return errEnded
}

// blame adds the standard error of the program, which has ended, to an error.
func (c *child) blame(err error) error {
	if said := c.complaints.String(); said != "" {
		return fmt.Errorf("%w, saying %q", err, said)
	}
	return err
}

// tail keeps the last bytes that are written to it.
type tail struct{ b []byte }

const maxTail = 400

func (t *tail) write(b []byte) {
	t.b = append(t.b, b...)
	if cut := len(t.b) - maxTail; cut > 0 {
		t.b = append(t.b[:0], t.b[cut:]...)
	}
}

// String returns one printable line.
func (t *tail) String() string {
	return strings.Join(strings.Fields(plain.Lines(string(t.b))), " ")
}
