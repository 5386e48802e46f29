package main

import (
	"bufio"
	"bytes"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"

	"p11-agent/cmd/p11-agent/backend"
	"p11-agent/cmd/p11-agent/exit"
)

func init() {
	attacks["hold-memory"] = holdProgram
	attacks["search"] = searchMemory
}

// holdProgram starts a program, holds it before its first instruction, and tries to open its
// memory. LD_PRELOAD names a FIFO, and the loader waits until a program writes to the FIFO. A
// program that starts slowly gives an attacker as much time.
func holdProgram(args []string) error {
	dir, err := os.MkdirTemp("", "hold")
	if err != nil {
		return err
	}
	defer os.RemoveAll(dir)
	fifo := filepath.Join(dir, "fifo")
	if err := unix.Mkfifo(fifo, 0o600); err != nil {
		return err
	}
	cmd := exec.Command(args[0], args[1:]...)
	cmd.Env = append(os.Environ(), "LD_PRELOAD="+fifo)
	if err := cmd.Start(); err != nil { // Start returns when the kernel has executed the program
		return err
	}
	mem, err := os.OpenFile(fmt.Sprintf("/proc/%d/mem", cmd.Process.Pid), os.O_RDWR, 0)
	if err == nil {
		fmt.Println("opened its memory")
		_ = mem.Close()
	} else {
		fmt.Println(err)
	}
	w, err := os.OpenFile(fifo, os.O_WRONLY, 0)
	if err != nil {
		return err
	}
	_ = w.Close()
	return cmd.Wait()
}

// searchMemory counts how often a text is in the memory of a process and of its children. An
// attacker that has opened /proc/PID/mem in time can do the same. Here the attacker is root, and
// the kernel lets root open the file at any time.
func searchMemory(args []string) error {
	pids := []string{args[0]}
	children, err := filepath.Glob("/proc/" + args[0] + "/task/*/children")
	if err != nil {
		return err
	}
	for _, file := range children {
		b, err := os.ReadFile(file)
		if err != nil {
			return err
		}
		pids = append(pids, strings.Fields(string(b))...)
	}
	for _, pid := range pids {
		n, err := found(pid, []byte(args[1]))
		if errors.Is(err, os.ErrNotExist) && pid != args[0] {
			continue // a module that does not work has no process for long
		}
		if err != nil {
			return err
		}
		cmdline, _ := os.ReadFile("/proc/" + pid + "/cmdline")
		fmt.Printf("%d times in %s\n", n, bytes.ReplaceAll(cmdline, []byte{0}, []byte(" ")))
	}
	return nil
}

// found counts how often a text is in the writable memory of a process.
func found(pid string, text []byte) (int, error) {
	maps, err := os.Open("/proc/" + pid + "/maps")
	if err != nil {
		return 0, err
	}
	defer maps.Close()
	mem, err := os.Open("/proc/" + pid + "/mem")
	if err != nil {
		return 0, err
	}
	defer mem.Close()
	n := 0
	for lines := bufio.NewScanner(maps); lines.Scan(); {
		var from, to uint64
		var perms string
		if _, err := fmt.Sscanf(lines.Text(), "%x-%x %s", &from, &to, &perms); err != nil {
			return 0, err
		}
		const shadow = 1 << 30 // areas of the race detector are larger, and hold no data of the program
		if !strings.HasPrefix(perms, "rw") || to-from > shadow {
			continue
		}
		// A part at a time, as some parts cannot be read. The end of each part is searched
		// again together with the next part.
		const size = 1 << 16
		room := make([]byte, 0, size+len(text))
		for at := from; at < to; at += size {
			part := room[len(room) : len(room)+int(min(size, to-at))]
			got, err := mem.ReadAt(part, int64(at))
			if err != nil && !errors.Is(err, io.EOF) && got == 0 {
				room = room[:0]
				continue
			}
			room = room[:len(room)+got]
			n += bytes.Count(room, text)
			room = room[:copy(room, room[max(0, len(room)-len(text)+1):])]
		}
	}
	return n, nil
}

// "make install" installs the program in such a way that no other program can read its memory,
// not even before its first instruction. The honest program can still use the control door.
func TestAttack12Start(t *testing.T) {
	if os.Geteuid() != 0 {
		if os.Getenv("CI") == "true" {
			t.Fatal("only root can become the user who may not read the program")
		}
		t.Skip("only root can become the user who may not read the program")
	}
	// Other users than root cannot enter the directory of t.TempDir.
	dir, err := os.MkdirTemp("", "p11")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = os.RemoveAll(dir) })
	home := filepath.Join(dir, "home")
	const nobody = 65534
	if err := errors.Join(os.Chmod(dir, 0o755), os.Mkdir(home, 0o700), os.Chown(home, nobody, nobody)); err != nil {
		t.Fatal(err)
	}
	program := filepath.Join(dir, "p11-agent")
	copyFile(t, buildAgent(t), program, 0o711)
	as := func(argv ...string) *exec.Cmd {
		cmd := exec.Command(argv[0], argv[1:]...)
		cmd.Env = []string{"HOME=" + home, "TMPDIR=" + home, "PATH=" + os.Getenv("PATH"), "GORACE=atexit_sleep_ms=0"}
		cmd.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: nobody, Gid: nobody}}
		return cmd
	}
	hold := func() string {
		cmd := as("/proc/self/exe", "hold-memory", program, "version")
		cmd.Args[0] = "attacker"
		out, err := cmd.CombinedOutput()
		if err != nil {
			t.Fatalf("%v\n%s", err, out)
		}
		return string(out)
	}
	if said := hold(); !strings.Contains(said, "permission denied") {
		t.Errorf("the attacker says: %s", said)
	}
	// If the user can read the program, the attack succeeds. So the attack is a real one.
	if err := os.Chmod(program, 0o755); err != nil {
		t.Fatal(err)
	}
	if said := hold(); !strings.Contains(said, "opened its memory") {
		t.Errorf("the test is no good: the attacker says: %s", said)
	}

	if err := os.Chmod(program, 0o711); err != nil {
		t.Fatal(err)
	}
	socket := filepath.Join(home, "s")
	agent := as(program, "agent", "-D", "-a", socket)
	var log bytes.Buffer
	agent.Stderr = &log
	out, err := agent.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := agent.Start(); err != nil {
		t.Fatal(err)
	}
	defer func() {
		_ = agent.Process.Signal(os.Interrupt)
		if err := agent.Wait(); err != nil {
			t.Errorf("the agent: %v\n%s", err, &log)
		}
	}()
	// The agent prints its address when it accepts connections.
	if _, err := io.ReadAtLeast(out, make([]byte, 1<<10), 1); err != nil {
		t.Fatal(err)
	}
	for command, want := range map[string]string{"status": "SOCKETS", "logout": "logged out of every token"} {
		if said, err := as(program, command, "-a", socket).CombinedOutput(); err != nil || !bytes.Contains(said, []byte(want)) {
			t.Errorf("%s: %v\n%s", command, err, said)
		}
	}
}

// A process refuses to start while another process traces it. So it holds no secret.
func TestAttack12Tracer(t *testing.T) {
	for _, command := range []string{"agent", backend.ModuleCommand, "login"} {
		t.Run(command, func(t *testing.T) {
			// The thread that starts the process also traces it.
			runtime.LockOSThread()
			defer runtime.UnlockOSThread()
			said := filepath.Join(t.TempDir(), "said")
			f, err := os.Create(said)
			if err != nil {
				t.Fatal(err)
			}
			defer f.Close()
			cmd := exec.Command("/proc/self/exe", command)
			cmd.Args[0] = "p11-agent"
			cmd.Stderr = f // no pipe, as only this thread waits
			cmd.SysProcAttr = &syscall.SysProcAttr{Ptrace: true}
			if err := cmd.Start(); err != nil {
				t.Fatal(err)
			}
			status := trace(t, cmd.Process.Pid)
			b, err := os.ReadFile(said)
			if err != nil {
				t.Fatal(err)
			}
			if !status.Exited() || status.ExitStatus() != exit.CodeFailure || !bytes.Contains(b, []byte(" traces this one")) {
				t.Errorf("it ends with %#x and says %q", status, b)
			}
		})
	}
}

// trace lets a process go on after each signal, until the process ends.
func trace(t *testing.T, pid int) (status syscall.WaitStatus) {
	t.Helper()
	for {
		if _, err := syscall.Wait4(pid, &status, 0, nil); err == syscall.EINTR {
			continue
		} else if err != nil {
			t.Fatal(err)
		}
		if !status.Stopped() {
			return status
		}
		sig := int(status.StopSignal())
		if sig == int(syscall.SIGTRAP) {
			sig = 0
		}
		if err := syscall.PtraceCont(pid, sig); err != nil {
			t.Fatal(err)
		}
	}
}
