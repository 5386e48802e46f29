//go:build amd64 || arm64

package sandbox

import (
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"sync"
	"testing"

	ll "github.com/landlock-lsm/go-landlock/landlock/syscall"
	"golang.org/x/sys/unix"

	"p11-agent/agent/peer/terminaltest"
	"p11-agent/token/tokentest"
	"p11-agent/token/wire"
)

// childVar holds the task of a child. With it, this test program confines itself and does
// the task.
const childVar = "P11_TEST_CONFINED"

// A task tells a confined process what to do.
type task struct {
	Module string
	May    []string
	Env    map[string]string
	Before map[uintptr]unix.Errno // system calls that fail even without the sandbox
	Write  []string               // files to write
}

// An outcome is the result of a task.
type outcome struct {
	Sandbox wire.Sandbox
	Written map[string]string // the error, for each file
	Calls   map[string]string
}

func TestMain(m *testing.M) {
	text := os.Getenv(childVar)
	if text == "" {
		os.Exit(terminaltest.Without(m).Run())
	}
	var t task
	if err := json.Unmarshal([]byte(text), &t); err != nil {
		panic(err)
	}
	if err := json.NewEncoder(os.Stdout).Encode(t.do()); err != nil {
		panic(err)
	}
}

func (t task) do() outcome {
	runtime.LockOSThread()
	if len(t.Before) > 0 {
		p := []unix.SockFilter{load(dataCall)}
		for call, errno := range t.Before {
			p = append(p, jump(unix.BPF_JEQ, uint32(call), 0, 1), answer(errno))
		}
		p = append(p, unix.SockFilter{Code: unix.BPF_RET | unix.BPF_K, K: unix.SECCOMP_RET_ALLOW})
		if err := errors.Join(unix.Prctl(unix.PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0), install(p)); err != nil {
			panic(err)
		}
	}
	o := outcome{Sandbox: Enter(Options{Module: t.Module, Write: t.May, Getenv: func(name string) string { return t.Env[name] }}), Written: make(map[string]string), Calls: make(map[string]string)}
	say := func(err error) string {
		if errno, ok := errors.AsType[unix.Errno](err); ok {
			return unix.ErrnoName(errno)
		}
		return fmt.Sprint(err)
	}
	for _, path := range t.Write {
		f, err := os.OpenFile(path, os.O_WRONLY|os.O_CREATE, 0o600)
		if err == nil {
			_ = f.Close()
		}
		o.Written[path] = say(err)
	}
	for name, args := range harmless() {
		// The calls run on threads from before, and on a new thread.
		results := make(chan string, 2)
		call := func() {
			_, _, errno := unix.RawSyscall6(args[0], args[1], args[2], args[3], args[4], 0, 0)
			results <- unix.ErrnoName(errno)
		}
		var wg sync.WaitGroup
		wg.Go(call)
		wg.Go(func() {
			runtime.LockOSThread() // the thread ends with the goroutine
			call()
		})
		wg.Wait()
		o.Calls[name] = <-results
		if other := <-results; other != o.Calls[name] {
			o.Calls[name] += " and " + other
		}
	}
	return o
}

// harmless holds system calls that do nothing when they are not denied. The names tell
// the result.
func harmless() map[string][5]uintptr {
	agent, self := uintptr(os.Getppid()), uintptr(os.Getpid())
	const nowhere = 1 // an address, or a file that is not open
	return map[string][5]uintptr{
		"denied: ptrace":          {unix.SYS_PTRACE, unix.PTRACE_DETACH, 0x7ffffff0},
		"denied: unshare":         {unix.SYS_UNSHARE},
		"denied: keyctl":          {unix.SYS_KEYCTL, unix.KEYCTL_GET_KEYRING_ID, ^uintptr(2), 0},
		"denied: bpf":             {unix.SYS_BPF, 0xffff},
		"denied: io_uring":        {unix.SYS_IO_URING_SETUP},
		"denied: clone user":      {unix.SYS_CLONE, unix.CLONE_NEWUSER | unix.CLONE_SIGHAND}, // which do not go together
		"denied: clone parent":    {unix.SYS_CLONE, unix.CLONE_PARENT | unix.CLONE_SIGHAND},
		"denied: fchmod":          {unix.SYS_FCHMOD, 1 << 30},
		"denied: fchmodat2":       {unix.SYS_FCHMODAT2, 1 << 30},
		"denied: fchown":          {unix.SYS_FCHOWN, 1 << 30},
		"denied: fsetxattr":       {unix.SYS_FSETXATTR, 1 << 30},
		"denied: utimensat":       {unix.SYS_UTIMENSAT, 1 << 30},
		"denied: set attributes":  {unix.SYS_IOCTL, 1 << 30, unix.FS_IOC_SETFLAGS},
		"denied: type":            {unix.SYS_IOCTL, 1 << 30, unix.TIOCSTI},
		"denied: set owner":       {unix.SYS_FCNTL, 1 << 30, unix.F_SETOWN, agent},
		"denied: limit the agent": {unix.SYS_PRLIMIT64, agent, 1 << 20},
		"denied: agent's priority": {
			unix.SYS_SETPRIORITY, unix.PRIO_PROCESS, agent, 19,
		},
		"denied: user's priority":    {unix.SYS_SETPRIORITY, unix.PRIO_USER, 0, 0},
		"denied: agent's affinity":   {unix.SYS_SCHED_SETAFFINITY, agent, 0, nowhere},
		"denied: agent's scheduler":  {unix.SYS_SCHED_SETSCHEDULER, agent, 1 << 20, nowhere},
		"denied: agent's scheduling": {unix.SYS_SCHED_SETATTR, agent, nowhere},
		"denied: agent's disk":       {unix.SYS_IOPRIO_SET, 1, agent, 1 << 20},
		"denied: user's disk":        {unix.SYS_IOPRIO_SET, 3, 0, 1 << 20},
		"denied: signal to agent":    {unix.SYS_KILL, agent, 0},
		"denied: signal to thread":   {unix.SYS_TGKILL, agent, agent, 0},
		"missing: clone3":            {unix.SYS_CLONE3},
		"done: getpid":               {unix.SYS_GETPID},
		"done: signal to itself":     {unix.SYS_KILL, self, 0},
		"done: signal to its group":  {unix.SYS_KILL, 0, 0},
		"done: read a limit":         {unix.SYS_PRLIMIT64, 0, unix.RLIMIT_NOFILE},
		"done: own priority":         {unix.SYS_SETPRIORITY, unix.PRIO_PROCESS, self, 0},
	}
}

// confined does a task in another process.
func confined(t *testing.T, todo task) (o outcome) {
	t.Helper()
	text, err := json.Marshal(todo)
	if err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command("/proc/self/exe")
	cmd.Env = append(os.Environ(), childVar+"="+string(text), "GORACE=atexit_sleep_ms=0")
	cmd.Stderr = t.Output()
	out, err := cmd.Output()
	if err != nil {
		t.Fatal(err)
	}
	if err := json.Unmarshal(out, &o); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	return o
}

// abi returns the version of Landlock here. Without Landlock it skips the test.
func abi(t *testing.T) uint32 {
	t.Helper()
	v, err := ll.LandlockGetABIVersion()
	if err == nil {
		return uint32(v)
	}
	if os.Getenv("CI") == "true" {
		t.Fatalf("this kernel has no Landlock: %v", err)
	}
	t.Skipf("this kernel has no Landlock: %v", err)
	return 0
}

func put(t *testing.T, path, text string) {
	t.Helper()
	if err := errors.Join(os.MkdirAll(filepath.Dir(path), 0o700), os.WriteFile(path, []byte(text), 0o600)); err != nil {
		t.Fatal(err)
	}
}

// The sandbox refuses writes, except to the paths that the module is known to write.
func TestFiles(t *testing.T) {
	version := abi(t)
	home := tokentest.HomeDir(t)
	put(t, filepath.Join(home, ".ssh/authorized_keys"), "")
	put(t, filepath.Join(home, "own/log"), "")
	put(t, filepath.Join(home, ".cache/x"), "")
	put(t, filepath.Join(home, "tokens/x"), "")
	put(t, filepath.Join(home, ".config/softhsm2/softhsm2.conf"), "directories.tokendir = "+home+"/tokens # mine\n")
	in := func(names ...string) (all []string) {
		for _, n := range names {
			all = append(all, filepath.Join(home, n))
		}
		return all
	}
	tmp := filepath.Join("/tmp", fmt.Sprintf("p11-test-%d", os.Getpid()))
	never := []string{"new", ".ssh/authorized_keys", ".ssh/new", ".config/new", ".cache/new", "own/new"}
	for _, tt := range []struct {
		name         string
		module       string
		env          map[string]string
		write        []string
		may, mustNot []string
	}{
		{"any module", "/x/vendor.so", nil, nil, []string{"/dev/null", tmp}, in("own/log", "tokens/new")},
		{"one file", "/x/vendor.so", nil, in("own/log"), in("own/log"), nil},
		{"SoftHSM", "/x/libsofthsm2.so", nil, nil, in("tokens/new"), nil},
		{"SoftHSM by its variable", "/x/other.so", map[string]string{"SOFTHSM2_CONF": home + "/.config/softhsm2/softhsm2.conf"}, nil, in("tokens/new"), nil},
		{"OpenSC", "/x/opensc-pkcs11.so", nil, nil, in(".cache/opensc/new"), in("tokens/new")},
		{"OpenSC elsewhere", "/x/opensc-pkcs11.so", map[string]string{"XDG_CACHE_HOME": home + "/own"}, nil, in("own/opensc/new"), nil},
		{"TPM", "/x/libtpm2_pkcs11.so.1", nil, nil, in(".tpm2_pkcs11/new"), in("tokens/new")},
		{"TPM by its variable", "/x/other.so", map[string]string{"TPM2_PKCS11_STORE": home + "/own/"}, nil, in("own/log"), nil},
		{"the proxy", "/x/p11-kit-proxy.so", nil, nil, in("tokens/new"), nil},
		{"a variable that names too much", "/x/other.so", map[string]string{"TPM2_PKCS11_STORE": home, "TMPDIR": "/"}, nil, nil, nil},
	} {
		t.Run(tt.name, func(t *testing.T) {
			env := map[string]string{"HOME": home}
			for name, value := range tt.env {
				env[name] = value
			}
			mustNot := append(tt.mustNot, in(never...)...)
			if tt.env["TPM2_PKCS11_STORE"] == home+"/own/" {
				mustNot = in(never[:5]...)
			}
			o := confined(t, task{Module: tt.module, May: tt.write, Env: env, Write: append(slices.Clone(tt.may), mustNot...)})
			if o.Sandbox.Files != version || o.Sandbox.FilesError != "" || !o.Sandbox.Whole() {
				t.Errorf("in force is %v, and this kernel has Landlock %d", o.Sandbox, version)
			}
			for _, path := range tt.may {
				if o.Written[path] != "<nil>" {
					t.Errorf("%s: %s", path, o.Written[path])
				}
			}
			for _, path := range mustNot {
				if o.Written[path] != "EACCES" {
					t.Errorf("%s: %s, want that it is refused", path, o.Written[path])
				}
			}
			_ = os.Remove(tmp)
		})
	}
}

// The report names a directory that does not exist.
func TestMissing(t *testing.T) {
	abi(t)
	missing := filepath.Join(t.TempDir(), "not there")
	o := confined(t, task{May: []string{missing}})
	if !slices.Equal(o.Sandbox.Missing, []string{missing}) || !strings.Contains(o.Sandbox.String(), "not there") {
		t.Errorf("got %v", o.Sandbox)
	}
}

// Landlock denies signals. The filter denies them where Landlock does not.
func TestCalls(t *testing.T) {
	for name, before := range map[string]map[uintptr]unix.Errno{
		"with Landlock": nil, "without Landlock": {unix.SYS_LANDLOCK_CREATE_RULESET: unix.ENOSYS},
	} {
		t.Run(name, func(t *testing.T) {
			o := confined(t, task{Before: before})
			if !o.Sandbox.Calls {
				t.Fatalf("got %v", o.Sandbox)
			}
			for name := range harmless() {
				outcome, _, _ := strings.Cut(name, ":")
				if want := map[string]string{"denied": "EPERM", "missing": "ENOSYS", "done": ""}[outcome]; o.Calls[name] != want {
					t.Errorf("%s: %q, want %q", name, o.Calls[name], want)
				}
			}
		})
	}
}

// The report says why a part is not in force: the kernel does not have it, or forbids it.
// The other parts are in force.
func TestNotInForce(t *testing.T) {
	version := abi(t)
	if !scoped(int(version)) {
		t.Skipf("Landlock %d does not confine signals here", version)
	}
	files := fmt.Sprintf("files, signals and abstract sockets (landlock %d)", version)
	all := files + ", system calls (seccomp)"
	for _, tt := range []struct {
		name   string
		before map[uintptr]unix.Errno
		want   string
	}{
		{"all there", nil, all},
		{"no Landlock", map[uintptr]unix.Errno{unix.SYS_LANDLOCK_CREATE_RULESET: unix.ENOSYS}, "files: not supported by this kernel, system calls and signals (seccomp)"},
		{"Landlock switched off", map[uintptr]unix.Errno{unix.SYS_LANDLOCK_CREATE_RULESET: unix.EOPNOTSUPP}, "files: not supported by this kernel, system calls and signals (seccomp)"},
		{"Landlock refused", map[uintptr]unix.Errno{unix.SYS_LANDLOCK_CREATE_RULESET: unix.EPERM}, "files: refused (EPERM), system calls and signals (seccomp)"},
		{"seccomp refused", map[uintptr]unix.Errno{unix.SYS_SECCOMP: unix.EPERM}, files + ", system calls: refused (EPERM)"},
		{"no seccomp", map[uintptr]unix.Errno{unix.SYS_SECCOMP: unix.ENOSYS}, files + ", system calls: not supported by this kernel"},
		{"nothing", map[uintptr]unix.Errno{unix.SYS_PRCTL: unix.EPERM}, "files: refused (EPERM), system calls and signals: refused (EPERM)"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			o := confined(t, task{Before: tt.before})
			if got := o.Sandbox.String(); got != tt.want {
				t.Errorf("got %q, want %q", got, tt.want)
			}
			if o.Sandbox.Whole() != (tt.want == all) {
				t.Errorf("whole: %v", o.Sandbox.Whole())
			}
		})
	}
}

// run applies a filter as the kernel does.
func run(t *testing.T, p []unix.SockFilter, arch, call uint32, args ...uint32) uint32 {
	t.Helper()
	data := map[uint32]uint32{dataCall: call, dataArch: arch}
	for i, arg := range args {
		data[dataFirst+8*uint32(i)] = arg
	}
	var a uint32
	for pc := 0; ; pc++ {
		in := p[pc]
		yes := false
		switch in.Code {
		case unix.BPF_LD | unix.BPF_W | unix.BPF_ABS:
			a = data[in.K]
			continue
		case unix.BPF_RET | unix.BPF_K:
			return in.K
		case unix.BPF_JMP | unix.BPF_JEQ | unix.BPF_K:
			yes = a == in.K
		case unix.BPF_JMP | unix.BPF_JGE | unix.BPF_K:
			yes = a >= in.K
		case unix.BPF_JMP | unix.BPF_JSET | unix.BPF_K:
			yes = a&in.K != 0
		default:
			t.Fatalf("instruction %#x", in.Code)
		}
		if yes {
			pc += int(in.Jt)
		} else {
			pc += int(in.Jf)
		}
	}
}

const (
	deny  = unix.SECCOMP_RET_ERRNO | uint32(unix.EPERM)
	pass  = uint32(unix.SECCOMP_RET_ALLOW)
	own   = 4711 // the process
	other = 42
)

// The filter denies the calls in the lists, and no other call.
func TestProgram(t *testing.T) {
	for _, signals := range []bool{false, true} {
		p := program(own, signals)
		for call := range uint32(1000) {
			want := pass
			switch {
			case slices.Contains(denied, uintptr(call)), slices.Contains(callsHere, uintptr(call)):
				want = deny
			case call == unix.SYS_CLONE3:
				want = unix.SECCOMP_RET_ERRNO | uint32(unix.ENOSYS)
			case signals && (call == unix.SYS_TGKILL || call == unix.SYS_TKILL || call == unix.SYS_RT_SIGQUEUEINFO ||
				call == unix.SYS_RT_TGSIGQUEUEINFO || call == unix.SYS_PIDFD_SEND_SIGNAL):
				want = deny // to process 0, or to a process that cannot be seen
			case call == unix.SYS_IOPRIO_SET:
				want = deny // the rule does not name this value
			}
			if got := run(t, p, auditArch, call); got != want {
				t.Errorf("call %d: %#x, want %#x", call, got, want)
			}
		}
	}
	p := program(own, true)
	const thread = unix.CLONE_VM | unix.CLONE_FS | unix.CLONE_FILES | unix.CLONE_SIGHAND | unix.CLONE_THREAD |
		unix.CLONE_SYSVSEM | unix.CLONE_SETTLS | unix.CLONE_PARENT_SETTID | unix.CLONE_CHILD_CLEARTID
	for flags, want := range map[uint32]uint32{
		thread: pass, uint32(unix.SIGCHLD): pass, unix.CLONE_VFORK | unix.CLONE_VM: pass,
		unix.CLONE_NEWUSER: deny, thread | unix.CLONE_NEWNS: deny, unix.CLONE_NEWPID: deny, unix.CLONE_NEWNET: deny,
		unix.CLONE_PARENT: deny,
	} {
		if got := run(t, p, auditArch, unix.SYS_CLONE, flags); got != want {
			t.Errorf("clone with %#x: %#x, want %#x", flags, got, want)
		}
	}
	const i386 = 0x40000003
	for call := range uint32(500) {
		if got := run(t, p, i386, call); got != deny {
			t.Errorf("call %d of a 32-bit program: %#x", call, got)
		}
		if foreignCalls != 0 {
			if got := run(t, p, auditArch, foreignCalls+call); got != deny {
				t.Errorf("call %d of x32: %#x", call, got)
			}
		}
	}
}

// A call that changes a process may change only the calling process.
func TestProgramArguments(t *testing.T) {
	p := program(own, true)
	const group = 1<<32 - own // -own
	for _, tt := range []struct {
		call uint32
		args []uint32
		want uint32
	}{
		{unix.SYS_PRLIMIT64, []uint32{0}, pass},
		{unix.SYS_PRLIMIT64, []uint32{own}, pass},
		{unix.SYS_PRLIMIT64, []uint32{other}, deny},
		{unix.SYS_SCHED_SETAFFINITY, []uint32{other}, deny},
		{unix.SYS_SCHED_SETATTR, []uint32{own}, pass},
		{unix.SYS_SCHED_SETATTR, []uint32{other}, deny},
		{unix.SYS_SCHED_SETPARAM, []uint32{other}, deny},
		{unix.SYS_SCHED_SETSCHEDULER, []uint32{other}, deny},
		{unix.SYS_MIGRATE_PAGES, []uint32{other}, deny},
		{unix.SYS_MOVE_PAGES, []uint32{other}, deny},
		{unix.SYS_SETPRIORITY, []uint32{unix.PRIO_PROCESS, 0, 19}, pass},
		{unix.SYS_SETPRIORITY, []uint32{unix.PRIO_PROCESS, own, 19}, pass},
		{unix.SYS_SETPRIORITY, []uint32{unix.PRIO_PROCESS, other, 19}, deny},
		{unix.SYS_SETPRIORITY, []uint32{unix.PRIO_PGRP, 0, 19}, deny},
		{unix.SYS_SETPRIORITY, []uint32{unix.PRIO_USER, 0, 19}, deny},
		{unix.SYS_IOPRIO_SET, []uint32{1, 0}, pass},
		{unix.SYS_IOPRIO_SET, []uint32{1, other}, deny},
		{unix.SYS_IOPRIO_SET, []uint32{3, 0}, deny},
		{unix.SYS_IOCTL, []uint32{0, unix.TCGETS}, pass},
		{unix.SYS_IOCTL, []uint32{0, controls[0]}, deny},
		{unix.SYS_IOCTL, []uint32{0, controls[len(controls)-1]}, deny},
		{unix.SYS_FCNTL, []uint32{0, unix.F_SETLK}, pass},
		{unix.SYS_FCNTL, []uint32{0, unix.F_SETOWN_EX}, deny},
		{unix.SYS_KILL, []uint32{0}, pass},
		{unix.SYS_KILL, []uint32{own}, pass},
		{unix.SYS_KILL, []uint32{group}, pass},
		{unix.SYS_KILL, []uint32{other}, deny},
		{unix.SYS_KILL, []uint32{1<<32 - 1}, deny}, // every process
		{unix.SYS_TGKILL, []uint32{own, other}, pass},
		{unix.SYS_TGKILL, []uint32{other, other}, deny},
		{unix.SYS_RT_SIGQUEUEINFO, []uint32{other}, deny},
		{unix.SYS_RT_TGSIGQUEUEINFO, []uint32{own}, pass},
	} {
		if got := run(t, p, auditArch, tt.call, tt.args...); got != tt.want {
			t.Errorf("call %d with %v: %#x, want %#x", tt.call, tt.args, got, tt.want)
		}
	}
}

// A configuration that a person writes while the module is loaded changes the module's files.
func TestOwn(t *testing.T) {
	home := t.TempDir()
	config, tokens := filepath.Join(home, "softhsm2.conf"), filepath.Join(home, "tokens")
	env := map[string]string{"HOME": filepath.Join(home, "me"), "SOFTHSM2_CONF": config}
	own := func() []string {
		return Own(Options{Module: "/x/libsofthsm2.so", Getenv: func(name string) string { return env[name] }})
	}
	if files := own(); len(files) != 0 {
		t.Errorf("%q before there is a configuration", files)
	}
	if err := errors.Join(os.Mkdir(tokens, 0o700), os.WriteFile(config, []byte("directories.tokendir = "+tokens+"\n"), 0o600)); err != nil {
		t.Fatal(err)
	}
	if files := own(); !slices.Equal(files, []string{tokens}) {
		t.Errorf("%q with a configuration", files)
	}
}
