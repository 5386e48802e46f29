package pinentry

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"p11-agent/pinentry/plain"
)

// defaultGrace is what a program gets for leaving by itself before it is killed.
const defaultGrace = 2 * time.Second

// testOnlyGrace replaces it in tests of programs that do not leave.
var testOnlyGrace time.Duration

func grace() time.Duration {
	if testOnlyGrace > 0 {
		return testOnlyGrace
	}
	return defaultGrace
}

// errEnded says that the program was gone before it had answered.
var errEnded = errors.New("it ended without an answer")

// A child is a running program, its pipes, and what is left to do when it ends.
//
// One goroutine (watch) waits for its end and reaps it; another reads what it
// complains about and is waited for by watch. Signals go to its whole process
// group, as pinentry is often a shell script. They are sent under mu, and never
// once the process is reaped, when its number may be that of another.
type child struct {
	in  *os.File // what it reads
	out *os.File // what it writes

	cmd *exec.Cmd
	tty *terminal

	errors     *os.File // its standard error
	errorsDone chan struct{}
	complaints tail // to be read after done

	done chan struct{} // closed when it is gone and reaped

	mu       sync.Mutex
	stopping bool
	killer   *time.Timer   // runs when stopping
	killed   chan struct{} // closed by killer
	reaped   bool
}

// run starts file with the arguments argv, its name first; empty: it has none. It inherits the terminal tty, unless that is nil, which gets
// its modes back should the program be ended by a signal.
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
	// A session of its own is a process group of its own, and one that no
	// terminal stops for reading in the background. An agent that is killed ends
	// nothing itself: the dialogue would stay, and have what is typed for the shell.
	// The kernel's signal comes with the end of the thread that has started the
	// program (prctl(2)), and Go keeps its threads unless a locked one is let go.
	c.cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true, Pdeathsig: syscall.SIGTERM}

	var theirs [3]*os.File
	defer func() {
		for _, f := range theirs {
			_ = f.Close() // a nil *os.File does not mind
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

// stop asks the program to leave and has it killed when it does not. It does
// not wait.
func (c *child) stop() {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.stopping || c.reaped {
		return
	}
	c.stopping = true
	// First the signal that lets it give the terminal back.
	c.signalLocked(syscall.SIGTERM)
	c.killer = time.AfterFunc(grace(), func() {
		c.mu.Lock()
		defer c.mu.Unlock()
		c.signalLocked(syscall.SIGKILL)
		close(c.killed)
	})
}

// end ends the program and waits for that.
func (c *child) end() {
	c.stop()
	<-c.done
}

func (c *child) signalLocked(sig syscall.Signal) {
	if !c.reaped {
		_ = syscall.Kill(-c.cmd.Process.Pid, sig) // it may have no members left
	}
}

// listen keeps the end of what the program says on standard error: there it
// tells what is wrong with the display.
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

// watch waits for the program's end, and for that of what it has started.
func (c *child) watch() {
	defer close(c.done)
	c.watchTerminal()
	waitDead(c.cmd.Process.Pid)
	c.stop() // a script is gone, but perhaps not what it ran
	select {
	case <-c.errorsDone:
	case <-c.killed:
		// Something has left the group, with our pipes. It is on its own.
		_ = c.errors.SetReadDeadline(time.Now())
		<-c.errorsDone
	}

	c.mu.Lock()
	c.killer.Stop()
	c.signalLocked(syscall.SIGKILL)
	c.reaped = true
	c.mu.Unlock()
	_ = c.cmd.Wait() // its status is read where it matters
	select {
	case <-c.killed:
		c.tty.restore(false)
	default:
		if ws, ok := c.cmd.ProcessState.Sys().(syscall.WaitStatus); ok && ws.Signaled() {
			c.tty.restore(ws.Signal() == syscall.SIGTERM)
		}
	}
	// What it wrote before can still be read; what has left the group is not
	// waited for.
	_ = c.out.SetReadDeadline(time.Now().Add(grace()))
}

// watchTerminal stops the program when its terminal is hung up, and returns when
// the program has ended or there is nothing to watch: pinentry-curses reads the
// end of file over and over, for as long as it lives.
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

// waitDead returns when the process has ended. It stays a zombie, and its
// number its own.
func waitDead(pid int) {
	for unix.Waitid(unix.P_PID, pid, nil, unix.WEXITED|unix.WNOWAIT, nil) == unix.EINTR {
	}
}

// close waits for the program's end, which somebody has seen to, and gives
// everything back.
func (c *child) close() {
	<-c.done
	c.closeFiles()
}

// guard ends the program when ctx ends. The function it returns is called when
// the program is not waited for any more; it returns the error of ctx if that
// has ended, and then the program has ended too.
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

// ended describes the end of a program that should not have ended yet.
func (c *child) ended() error {
	c.end() // it may have closed its output and stayed
	if !c.cmd.ProcessState.Success() {
		return fmt.Errorf("%w (%s)", errEnded, c.cmd.ProcessState)
	}
	return errEnded
}

// blame adds what the program, which has ended, had to say.
func (c *child) blame(err error) error {
	if said := c.complaints.String(); said != "" {
		return fmt.Errorf("%w, saying %q", err, said)
	}
	return err
}

func (c *child) name() string { return filepath.Base(c.cmd.Path) }

// tail keeps the last bytes written to it.
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
