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

// grace is how long a command may take to end after the Bridge asks it to.
const grace = 2 * time.Second

// BridgeOptions say what a Bridge runs.
type BridgeOptions struct {
	// Command is the program and its arguments, from Module.Remote. If the program has no
	// slash, the Bridge looks for it in this process's PATH.
	Command []string
	// Env is the command's whole environment: see Environment. If Env is nil, the command
	// has an empty environment.
	Env []string
	// Dir is the parent of the socket's directory. If Dir is empty, the parent is
	// os.TempDir. Dir has to be short, because the path of a socket has at most 107
	// bytes.
	Dir string
	// Stderr also gets what the command writes to standard error. It may be nil.
	Stderr io.Writer
	// Log takes one line for each command that fails or cannot be started. It takes the
	// commands' standard error as debug lines. nil turns the log off.
	Log *slog.Logger
}

// A Bridge runs a command that speaks p11-kit's protocol on its standard input and
// output. The Bridge offers the command at a socket, because p11-kit-client.so can
// connect only to a socket. The command gets the connection itself. So no byte, and no
// PIN, passes through this process.
//
// One bridge serves one module process, which has one connection at a time. So one
// command runs at a time. A new connection ends the command of the previous connection:
// that command has lost its client, and may hang on a network.
//
// The socket is in a directory that only this user may enter. If this process is killed,
// the kernel ends the command, but the directory stays.
type Bridge struct {
	o        BridgeOptions
	dir      string
	listener *net.UnixListener
	close    func() error

	mu   sync.Mutex
	last *attempt // nil: no command was started yet
}

// NewBridge makes the socket. Clients may connect at once, and Serve serves them. Close,
// or the end of Serve, removes the socket.
func NewBridge(o BridgeOptions) (*Bridge, error) {
	if len(o.Command) == 0 {
		return nil, errors.New("a remote module needs a command")
	}
	if o.Log == nil {
		o.Log = slog.New(slog.DiscardHandler)
	}
	if o.Env == nil {
		o.Env = []string{} // for exec.Cmd, nil means the whole environment of this process
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

// checkSocketDir returns an error that says why no bridge can have its socket in dir.
func checkSocketDir(dir string) error {
	// MkdirTemp adds a number of 32 bits to its pattern.
	const longest = "/p11-4294967295/s"
	var err error
	switch {
	case !filepath.IsAbs(dir):
		err = errors.New("not an absolute path")
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

// Address returns the value that the module process needs in the environment variable
// P11_KIT_SERVER_ADDRESS.
func (b *Bridge) Address() string {
	// p11-kit decodes percent signs (common/path.c), and no other character ends the
	// path. PathEscape does not escape more than necessary.
	parts := strings.Split(filepath.Join(b.dir, "s"), "/")
	for i := range parts {
		parts[i] = url.PathEscape(parts[i])
	}
	return "unix:path=" + strings.Join(parts, "/")
}

// Close stops Serve and removes the socket. The caller may call it at any time and more
// than once.
func (b *Bridge) Close() error { return b.close() }

// Serve runs a command for each connection until ctx ends or Close closes the bridge.
// Both ends are no error. When Serve returns, it has removed the socket and ended its own
// goroutines. No process of the commands' process groups is left either.
func (b *Bridge) Serve(ctx context.Context) error {
	end := func() {} // ends the running command and waits for its end
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

// scarce tells whether an error of accept(2) is temporary.
func scarce(err error) bool {
	for _, passing := range []error{syscall.EMFILE, syscall.ENFILE, syscall.ENOBUFS, syscall.ENOMEM, syscall.ECONNABORTED} {
		if errors.Is(err, passing) {
			return true
		}
	}
	return false
}

// run starts the command with conn as its standard input and output. It returns a
// function that ends the command and waits for its end.
func (b *Bridge) run(conn *net.UnixConn) (end func()) {
	ctx, cancel := context.WithCancel(context.Background())
	a := b.started()
	var done sync.WaitGroup
	done.Go(func() {
		defer cancel()
		err := b.command(ctx, conn, &a.said)
		if err != nil && ctx.Err() == nil {
			// The command's arguments stay out of the log: they may hold a PIN.
			b.o.Log.Warn("command of a remote module failed", "program", b.o.Command[0], "err", err, "said", a.said.String())
		}
		a.ended(err)
	})
	return func() {
		cancel()
		done.Wait()
	}
}

// command runs the command until it ends by itself, or until ctx ends. The command ends
// by itself when the client hangs up.
func (b *Bridge) command(ctx context.Context, conn *net.UnixConn, said io.Writer) error {
	// os/exec puts a file for a child into blocking mode. p11-kit needs its input in that
	// mode: otherwise it would spin.
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
	// An agent that is killed cannot end the command, and the command may not notice that
	// its client has gone. So the kernel signals the command when the thread that started
	// it ends (prctl(2)). This thread therefore has to stay until the command ends.
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true, Pdeathsig: syscall.SIGKILL}
	cmd.Cancel = func() error { return syscall.Kill(-cmd.Process.Pid, syscall.SIGTERM) }
	cmd.WaitDelay = grace
	if err := cmd.Start(); err != nil {
		return err
	}
	file.Close() // the command has a copy: its client sees the end when the command ends
	err = cmd.Wait()
	// Kill the processes that the command left in its process group. The group has the
	// number of a process that is gone. The kernel does not reuse the number while the
	// group exists. If the group is empty, the kernel reuses it only after thousands of
	// new processes.
	_ = syscall.Kill(-cmd.Process.Pid, syscall.SIGKILL)
	return err
}
