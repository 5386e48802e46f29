package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"time"

	"p11-agent/pinentry/procstat"
)

// grace is how long a program gets for ending by itself.
const grace = 5 * time.Second

// process is a program in the background. Only the goroutine that closes ended
// waits for it.
type process struct {
	cmd   *exec.Cmd
	log   string
	ended chan struct{}
}

// environment is that of every program: nothing of the caller's but PATH.
func environment(home string, more []string) []string {
	return append([]string{
		"HOME=" + home, "XDG_RUNTIME_DIR=" + home, "PATH=" + os.Getenv("PATH"), "LC_ALL=C.UTF-8", "P11_KIT_NO_USER_CONFIG=1",
	}, more...)
}

// command makes a command in a session of its own, which is killed as a whole
// when ctx ends: Ctrl-C is for this program alone, which stops the others.
func command(ctx context.Context, env []string, path string, args ...string) *exec.Cmd {
	cmd := exec.CommandContext(ctx, path, args...)
	cmd.Env = env
	cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true}
	cmd.Cancel = func() error { return syscall.Kill(-cmd.Process.Pid, syscall.SIGKILL) }
	cmd.WaitDelay = time.Second
	return cmd
}

// start starts a program that stays, with its output in a file of its directory.
func (b *bench) start(dir string, env []string, path string, args ...string) (*process, error) {
	log := filepath.Join(dir, "log")
	f, err := os.OpenFile(log, os.O_WRONLY|os.O_CREATE|os.O_APPEND, 0o600)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	// Not with a context, which would kill it: stop ends it in its own way.
	cmd := command(context.Background(), env, path, args...)
	cmd.Dir = dir
	cmd.Stdout, cmd.Stderr = f, f
	// Should this program be killed. It is in vain for programs with a group of their
	// own, as ssh-agent has it in some places.
	cmd.SysProcAttr.Pdeathsig = syscall.SIGTERM
	if err := cmd.Start(); err != nil {
		return nil, err
	}
	p := &process{cmd: cmd, log: log, ended: make(chan struct{})}
	b.running = append(b.running, p)
	go func() {
		_ = cmd.Wait() // how it ended is in cmd.ProcessState
		close(p.ended)
	}()
	return p, nil
}

// failed returns why a program has ended, or nil while it runs.
func (p *process) failed() error {
	select {
	case <-p.ended:
		said, _ := os.ReadFile(p.log) // may be missing
		return fmt.Errorf("%s has ended: %v\n%s", filepath.Base(p.cmd.Path), p.cmd.ProcessState, said[max(0, len(said)-2000):])
	default:
		return nil
	}
}

// stop ends a program, and what is left of its group.
func (b *bench) stop(p *process) {
	b.running = slices.DeleteFunc(b.running, func(other *process) bool { return other == p })
	_ = p.cmd.Process.Signal(syscall.SIGTERM) // it may have ended
	late := time.AfterFunc(grace, func() { _ = p.cmd.Process.Kill() })
	<-p.ended
	late.Stop()
	_ = syscall.Kill(-p.cmd.Process.Pid, syscall.SIGKILL) // mostly no process is left
}

// endChild ends the child of a program, and waits until the program has ended as well.
func (b *bench) endChild(p *process, child int) error {
	if err := syscall.Kill(child, syscall.SIGTERM); err != nil {
		return err
	}
	select {
	case <-p.ended:
		return nil
	case <-time.After(time.Minute):
		return fmt.Errorf("%s does not end", filepath.Base(p.cmd.Path))
	}
}

// stopAll ends what runs in the background, the last first.
func (b *bench) stopAll() {
	for _, c := range b.held {
		_ = c.Close() // nothing is written any more
	}
	b.held = nil
	for len(b.running) > 0 {
		b.stop(b.running[len(b.running)-1])
	}
}

// stat is what the kernel tells of a process.
type stat struct {
	procstat.Stat
	pid int
}

// family returns a process and all that descend from it.
func family(pid int) ([]stat, error) {
	entries, err := os.ReadDir("/proc")
	if err != nil {
		return nil, err
	}
	children := make(map[int][]stat)
	var all []stat
	for _, e := range entries {
		n, err := strconv.Atoi(e.Name())
		if err != nil {
			continue
		}
		known, ok := procstat.Of(n)
		s := stat{known, n}
		switch {
		case !ok: // it has ended meanwhile
		case n == pid:
			all = append(all, s)
		default:
			children[s.Parent] = append(children[s.Parent], s)
		}
	}
	if len(all) == 0 {
		return nil, fmt.Errorf("process %d has ended", pid)
	}
	for i := 0; i < len(all); i++ {
		all = append(all, children[all[i].pid]...)
	}
	return all, nil
}

// cpuTime returns the processor time of a family so far.
func cpuTime(pid int) (sum time.Duration, err error) {
	all, err := family(pid)
	for _, s := range all {
		sum += s.CPU
	}
	return sum, err
}

// resident returns the resident memory of a process and of all that descend from
// it, in MiB.
func resident(pid int) (first, others float64, err error) {
	all, err := family(pid)
	for _, s := range all {
		mib, err := residentOf(s.pid)
		if err != nil {
			return 0, 0, err
		}
		if s.pid == pid {
			first = mib
		} else {
			others += mib
		}
	}
	return first, others, err
}

func residentOf(pid int) (float64, error) {
	text, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", pid))
	if err != nil {
		return 0, err
	}
	for line := range strings.Lines(string(text)) {
		if value, ok := strings.CutPrefix(line, "VmRSS:"); ok {
			kib, err := strconv.Atoi(strings.TrimSpace(strings.TrimSuffix(strings.TrimSpace(value), "kB")))
			return float64(kib) / 1024, err
		}
	}
	return 0, errors.New("/proc/PID/status has no VmRSS")
}
