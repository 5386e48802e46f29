package tokentest

import (
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"syscall"
	"testing"
)

// A daemon is a program in the background, of the test's own.
type daemon struct {
	t    testing.TB
	name string
	log  string // file with what it prints
	cmd  *exec.Cmd
	done chan struct{} // closed when the process has ended
}

// startDaemon starts a program whose output goes to a file in a directory, and
// waits until it answers. env is added to the environment. It ends with the test,
// even with one that crashes: what it has printed shows when the test has failed.
func startDaemon(t testing.TB, name, dir string, env, args []string, answers func() bool) *daemon {
	t.Helper()
	d := launchDaemon(t, name, dir, env, args)
	t.Cleanup(d.endWithTest)
	d.untilItAnswers(answers)
	return d
}

// launchDaemon is startDaemon for those who end it themselves.
func launchDaemon(t testing.TB, name, dir string, env, args []string) *daemon {
	t.Helper()
	d := &daemon{t: t, name: name, log: filepath.Join(dir, name+".log"), cmd: exec.Command(args[0], args[1:]...), done: make(chan struct{})}
	d.cmd.Env = append(os.Environ(), env...)
	out, err := os.Create(d.log)
	if err != nil {
		t.Fatal(err)
	}
	d.cmd.Stdout, d.cmd.Stderr = out, out
	d.cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	started := make(chan error)
	go func() {
		defer close(d.done)
		defer out.Close()
		// The kernel kills the child when the thread ends that has started it. The thread goes on
		// afterwards: it may have started module processes before.
		runtime.LockOSThread()
		defer runtime.UnlockOSThread()
		err := d.cmd.Start()
		started <- err
		if err == nil {
			_ = d.cmd.Wait()
		}
	}()
	if err := <-started; err != nil {
		t.Fatal(err)
	}
	return d
}

func (d *daemon) endWithTest() {
	d.end(syscall.SIGTERM)
	if d.t.Failed() {
		d.t.Logf("%s said:\n%s", d.name, d.output())
	}
}

func (d *daemon) untilItAnswers(answers func() bool) {
	d.t.Helper()
	Until(d.t, d.name+" answers", func() bool {
		select {
		case <-d.done:
			d.t.Fatalf("%s has ended:\n%s", d.name, d.output())
		default:
		}
		return answers()
	})
}

// output is what the daemon has printed, without repeated lines: swtpm has a line
// for each command.
func (d *daemon) output() string {
	b, err := os.ReadFile(d.log)
	if err != nil {
		return err.Error()
	}
	return strings.Join(slices.Compact(strings.Split(string(b), "\n")), "\n")
}

// end sends a signal and waits for the end. It may be called again.
func (d *daemon) end(signal syscall.Signal) {
	d.t.Helper()
	_ = d.cmd.Process.Signal(signal)          // it may have ended
	_ = d.cmd.Process.Signal(syscall.SIGCONT) // it may be frozen
	Wait(d.t, d.done)
}
