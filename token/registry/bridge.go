package registry

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// grace is how long a command may take to end once it was asked to.
const grace = 2 * time.Second

// BridgeOptions say what a Bridge runs.
type BridgeOptions struct {
	// Command is the program and its arguments, from Module.Remote. A program
	// without a slash is looked for in this process's PATH.
	Command []string
	// Env is the command's whole environment, see Environment. Without any it has
	// none.
	Env []string
	// Dir is where the socket's directory is made; empty is for os.TempDir. It
	// has to be short: the path of a socket has 107 bytes.
	Dir string
	// Stderr takes what the command writes to standard error as well. nil is for
	// nothing.
	Stderr io.Writer
	// Log takes one line for each command that cannot be started or fails, and what
	// commands write to standard error, as debug lines. nil is for none.
	Log *slog.Logger
}

// A Bridge makes a command that speaks p11-kit's protocol on its standard input
// and output available at a socket, which is what p11-kit-client.so can connect
// to. The command gets the connection itself: no byte, and so no PIN, passes
// through this process.
//
// One bridge serves one module process, which has one connection at a time. So
// one command runs at a time: a new connection ends the previous one's command,
// which has lost its client, and may hang on a network.
//
// The socket is in a directory that only this user may enter. When this process
// is killed, the command goes with it; the directory stays behind.
type Bridge struct {
	o        BridgeOptions
	dir      string
	listener *net.UnixListener
	close    func() error

	mu   sync.Mutex
	last *attempt // nil: no command was started yet
}

// NewBridge makes the socket. Clients may connect from now on; they are served
// as soon as Serve runs. Close, or the end of Serve, removes it.
func NewBridge(o BridgeOptions) (*Bridge, error) {
	if len(o.Command) == 0 {
		return nil, errors.New("a remote module needs a command")
	}
	if o.Log == nil {
		o.Log = slog.New(slog.DiscardHandler)
	}
	if o.Env == nil {
		o.Env = []string{} // for exec.Cmd, nil is everything we have
	}
	if err := checkSocketDir(cmp.Or(o.Dir, os.TempDir())); err != nil {
		return nil, err
	}
	dir, err := os.MkdirTemp(o.Dir, "p11-") // mode 0700
	if err != nil {
		return nil, fmt.Errorf("make a directory for the socket of a remote module: %w", err)
	}
	listener, err := net.ListenUnix("unix", &net.UnixAddr{Name: filepath.Join(dir, "s"), Net: "unix"})
	if err != nil {
		return nil, errors.Join(fmt.Errorf("make the socket of a remote module: %w", err), os.RemoveAll(dir))
	}
	b := &Bridge{o: o, dir: dir, listener: listener}
	b.close = sync.OnceValue(func() error {
		return errors.Join(b.listener.Close(), os.RemoveAll(b.dir))
	})
	return b, nil
}

// checkSocketDir tells why no bridge can have its socket below a directory.
func checkSocketDir(dir string) error {
	// What MkdirTemp makes of its pattern: a number of 32 bits is added.
	const longest = "/p11-4294967295/s"
	var err error
	switch {
	case !filepath.IsAbs(dir):
		err = errors.New("it is not an absolute path")
	case len(dir)+len(longest) >= len(unix.RawSockaddrUnix{}.Path):
		err = errors.New("its path is too long")
	default:
		if info, e := os.Stat(dir); e != nil {
			err = bare(e)
		} else if !info.IsDir() {
			err = syscall.ENOTDIR
		} else {
			err = unix.Access(dir, unix.W_OK|unix.X_OK)
		}
	}
	if err != nil {
		return fmt.Errorf("a remote module needs a socket, and none can be made in %s: %w: set TMPDIR to a directory that can be written to", dir, err)
	}
	return nil
}

// Address returns what the module process needs in the environment variable
// P11_KIT_SERVER_ADDRESS.
func (b *Bridge) Address() string {
	// p11-kit decodes percent signs (common/path.c), and ends the path at
	// nothing else; PathEscape leaves alone what need not be escaped.
	parts := strings.Split(filepath.Join(b.dir, "s"), "/")
	for i := range parts {
		parts[i] = url.PathEscape(parts[i])
	}
	return "unix:path=" + strings.Join(parts, "/")
}

// Close stops Serve and removes the socket. It may be called at any time and
// more than once.
func (b *Bridge) Close() error { return b.close() }

// Serve runs a command for each connection until ctx ends or the bridge is
// closed, which is no error. When it returns, the socket is removed, and
// neither a goroutine of its making nor a process of the commands' process
// groups is left.
func (b *Bridge) Serve(ctx context.Context) error {
	end := func() {} // ends the command that runs and waits for it
	defer func() { end() }()
	closed := make(chan struct{})
	stop := context.AfterFunc(ctx, func() {
		defer close(closed)
		b.Close()
	})
	defer func() {
		if !stop() {
			<-closed
		}
	}()
	defer b.Close()
	for {
		conn, err := b.listener.AcceptUnix()
		switch {
		case errors.Is(err, net.ErrClosed):
			return nil
		case scarce(err):
			b.o.Log.Warn("remote module has to wait", "err", err)
			select {
			case <-time.After(100 * time.Millisecond):
			case <-ctx.Done():
			}
			continue
		case err != nil:
			return fmt.Errorf("wait for the client of a remote module: %w", err)
		}
		end()
		end = b.run(conn)
	}
}

// scarce tells whether an error of accept(2) passes by itself.
func scarce(err error) bool {
	for _, passing := range []error{syscall.EMFILE, syscall.ENFILE, syscall.ENOBUFS, syscall.ENOMEM, syscall.ECONNABORTED} {
		if errors.Is(err, passing) {
			return true
		}
	}
	return false
}

// run starts the command with conn as its standard input and output, and
// returns what ends it and waits for its end.
func (b *Bridge) run(conn *net.UnixConn) (end func()) {
	ctx, cancel := context.WithCancel(context.Background())
	a := b.started()
	var done sync.WaitGroup
	done.Go(func() {
		defer cancel()
		err := b.command(ctx, conn, &a.said)
		if err != nil && ctx.Err() == nil {
			// Not its arguments, which may hold a PIN.
			b.o.Log.Warn("command of a remote module failed", "program", b.o.Command[0], "err", err, "said", a.said.String())
		}
		a.ended(err)
	})
	return func() {
		cancel()
		done.Wait()
	}
}

// command runs the command until it ends by itself, which it does when the
// client hangs up, or until ctx ends.
func (b *Bridge) command(ctx context.Context, conn *net.UnixConn, said io.Writer) error {
	// os/exec puts a file that it hands over into blocking mode, and p11-kit
	// needs its input to be in that mode: it would spin otherwise.
	file, err := conn.File()
	conn.Close()
	if err != nil {
		return err
	}
	defer file.Close()

	cmd := exec.CommandContext(ctx, b.o.Command[0], b.o.Command[1:]...)
	cmd.Env = b.o.Env
	cmd.Stdin, cmd.Stdout, cmd.Stderr = file, file, said
	if b.o.Stderr != nil {
		cmd.Stderr = io.MultiWriter(said, b.o.Stderr)
	}
	// An agent that is killed ends nothing itself, and a command may be deaf to
	// its client's end. The kernel's signal comes with the end of the thread that
	// has started the command (prctl(2)), so this one has to stay until then.
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true, Pdeathsig: syscall.SIGKILL}
	cmd.Cancel = func() error { return syscall.Kill(-cmd.Process.Pid, syscall.SIGTERM) }
	cmd.WaitDelay = grace
	if err := cmd.Start(); err != nil {
		return err
	}
	file.Close() // the command has it: its client sees the end when the command ends
	err = cmd.Wait()
	// What the command has left behind. Its process group has the number of a
	// process that is gone, but numbers are not given again while a group has
	// them, and if the group is empty, not for thousands of processes to come.
	_ = syscall.Kill(-cmd.Process.Pid, syscall.SIGKILL)
	return err
}
