package main

import (
	"bytes"
	"debug/elf"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"testing"

	sshclient "golang.org/x/crypto/ssh/agent"

	"p11-agent/token/tokentest"
)

// TestProgram tests the memory of the program as make builds it.
func TestProgram(t *testing.T) {
	program := buildAgent(t)
	t.Run("linked", func(t *testing.T) { testLinked(t, program) })
	t.Run("hardened", func(t *testing.T) { testHardened(t, program) })
	t.Run("flat", func(t *testing.T) { testFlat(t, program) })
}

// The linker leaves out functions that no code calls. But if code can call a method by a name that
// it makes at run time, as text/template does, the linker keeps each exported method of each type.
// That is a fifth of the program, in the memory of the agent and of each module process.
func testLinked(t *testing.T, program string) {
	f, err := elf.Open(program)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	symbols, err := f.Symbols()
	if err != nil {
		t.Fatal(err)
	}
	seen := false
	for _, s := range symbols {
		switch s.Name {
		case "main.main":
			seen = true
		case "reflect.Value.MethodByName", "reflect.(*rtype).MethodByName":
			t.Errorf("%s is linked: go build -ldflags=-dumpdep tells what needs it", s.Name)
		}
	}
	if !seen {
		t.Error("the program has no main.main: these are not its symbols")
	}
}

// The program has another address at each start. After the start, no code can write to the tables
// of calls. The stack is not executable. A function of package undumpable runs before all other
// functions.
func testHardened(t *testing.T, program string) {
	f, err := elf.Open(program)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if f.Type != elf.ET_DYN {
		t.Errorf("it is of type %v: go build -buildmode=pie", f.Type)
	}
	flags, err := f.DynValue(elf.DT_FLAGS)
	if err != nil || len(flags) != 1 || elf.DynFlag(flags[0])&elf.DF_BIND_NOW == 0 {
		t.Errorf("the loader binds symbols when they are used (flags %v, %v): -ldflags=-bindnow", flags, err)
	}
	if text, err := f.DynValue(elf.DT_TEXTREL); err != nil || len(text) != 0 {
		t.Errorf("code is changed at the start: %v, %v", text, err)
	}
	var relro, stack bool
	for _, p := range f.Progs {
		switch p.Type {
		case elf.PT_GNU_RELRO:
			relro = true
		case elf.PT_GNU_STACK:
			stack = p.Flags&elf.PF_X == 0
		}
	}
	if !relro {
		t.Error("what is relocated stays writable: -extldflags=-Wl,-z,relro")
	}
	if !stack {
		t.Error("the stack can be executed: -extldflags=-Wl,-z,noexecstack")
	}
	if s := f.Section(".preinit_array"); s == nil || s.Size == 0 {
		t.Error("nothing is called before the constructors: package undumpable is not linked")
	}
}

// The agent and a module process keep no memory after a signature. The test notices 512 bytes for
// each signature.
func testFlat(t *testing.T, program string) {
	const (
		first   = 2000 // after that many signatures, the processes have all that they need for one
		then    = 8000
		clients = 4
	)
	h := tokentest.NewSoftHSM(t)
	h.AddToken("work", storyPIN)
	h.GenerateKey("work", tokentest.P256, "01", "login")
	write := func(name, content string) string {
		path := filepath.Join(h.Dir(), name)
		if err := os.WriteFile(path, []byte(content), 0o600); err != nil {
			t.Fatal(err)
		}
		return path
	}
	config := write("config.toml", fmt.Sprintf("keys = [%q]\n", "pkcs11:token=work?pin-source=file:"+write("pin", storyPIN)))
	socket := filepath.Join(h.Dir(), "s")
	cmd := exec.Command(program, "agent", "-D", "-a", socket, "--config", config)
	cmd.Env = append(os.Environ(), "HOME="+h.Dir(), "XDG_STATE_HOME="+h.Dir())
	cmd.Env = append(cmd.Env, h.Env()...)
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	var said bytes.Buffer
	cmd.Stderr = &said
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	defer func() {
		_ = cmd.Process.Signal(os.Interrupt)
		if err := cmd.Wait(); err != nil {
			t.Errorf("the agent: %v\n%s", err, tail(said.String()))
		}
	}()
	// The agent prints its address when it accepts connections.
	if _, err := io.ReadAtLeast(out, make([]byte, 1<<10), 1); err != nil {
		t.Fatal(err)
	}
	sign := func(count int) {
		var all sync.WaitGroup
		for range clients {
			all.Go(func() {
				conn, err := net.Dial("unix", socket)
				if err != nil {
					t.Error(err)
					return
				}
				defer conn.Close()
				client := sshclient.NewClient(conn)
				keys, err := client.List()
				if err != nil || len(keys) != 1 {
					t.Errorf("%d keys, %v", len(keys), err)
					return
				}
				for range count / clients {
					// Each key on a token signs data like that of ssh-keygen -Y.
					if _, err := client.Sign(keys[0], signedData); err != nil {
						t.Error(err)
						return
					}
				}
			})
		}
		all.Wait()
	}
	sign(first)
	before := anonymous(t, cmd.Process.Pid)
	sign(then)
	after := anonymous(t, cmd.Process.Pid)
	for pid, size := range after {
		if before[pid] == 0 {
			continue // the process has started later
		}
		t.Logf("process %d has %d KiB, and had %d", pid, size>>10, before[pid]>>10)
		if grown := size - before[pid]; grown >= then*512 {
			t.Errorf("process %d has grown by %d bytes with %d signatures", pid, grown, then)
		}
	}
	if len(after) < 2 {
		t.Errorf("%d processes: a module's should be among them", len(after))
	}
}

// signedData is the data of an SSH signature in the namespace "file".
var signedData = append([]byte("SSHSIG"), sshFields("file", "", "sha512", bytes.Repeat([]byte{1}, 64))...)

// tail is the end of a log.
func tail(log string) string { return log[max(0, len(log)-2000):] }

// anonymous returns the memory of a process and of its children without a file, in bytes. The
// memory of files depends on the machine, and not on the program.
func anonymous(t *testing.T, pid int) map[int]int {
	t.Helper()
	sizes := make(map[int]int)
	children, err := filepath.Glob(fmt.Sprintf("/proc/%d/task/*/children", pid))
	if err != nil {
		t.Fatal(err)
	}
	all := []string{strconv.Itoa(pid)}
	for _, file := range children {
		b, _ := os.ReadFile(file) // the thread may have ended
		all = append(all, strings.Fields(string(b))...)
	}
	for _, one := range all {
		status, err := os.ReadFile(filepath.Join("/proc", one, "status"))
		if err != nil {
			continue // the process has ended
		}
		for line := range strings.Lines(string(status)) {
			var size int
			if _, err := fmt.Sscanf(line, "RssAnon: %d kB", &size); err == nil {
				pid, _ := strconv.Atoi(one)
				sizes[pid] = size << 10
			}
		}
	}
	return sizes
}
