package registry

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"
)

// serve runs a bridge until the test ends, or until the test calls the returned function.
func serve(t *testing.T, o BridgeOptions) (b *Bridge, stop func()) {
	t.Helper()
	before := runtime.NumGoroutine()
	b, err := NewBridge(o)
	must(t, err)
	ctx, cancel := context.WithCancel(t.Context())
	ended := make(chan error, 1)
	go func() { ended <- b.Serve(ctx) }()
	stop = sync.OnceFunc(func() {
		cancel()
		if err := <-ended; err != nil {
			t.Errorf("Serve: %v", err)
		}
		if _, err := os.Stat(b.dir); !errors.Is(err, os.ErrNotExist) {
			t.Errorf("the socket is still there: %v", err)
		}
		// A process that was just waited for may exist for another moment. The limit
		// finds a process that never ends.
		for limit := time.Now().Add(3 * time.Minute); time.Now().Before(limit); runtime.Gosched() {
			if runtime.NumGoroutine() <= before {
				return
			}
		}
		buf := make([]byte, 1<<16)
		t.Errorf("goroutines are left:\n%s", buf[:runtime.Stack(buf, true)])
	})
	t.Cleanup(stop)
	return b, stop
}

func shell(script string) []string { return []string{"/bin/sh", "-c", script} }

func dial(t *testing.T, b *Bridge) *net.UnixConn {
	t.Helper()
	path, ok := strings.CutPrefix(b.Address(), "unix:path=")
	if !ok {
		t.Fatalf("address %s", b.Address())
	}
	conn, err := net.DialUnix("unix", nil, &net.UnixAddr{Name: path, Net: "unix"})
	must(t, err)
	t.Cleanup(func() { conn.Close() })
	return conn
}

// drain reads until no process holds the other end of the connection.
func drain(t *testing.T, r io.Reader) {
	t.Helper()
	if _, err := io.Copy(io.Discard, r); err != nil && !errors.Is(err, syscall.ECONNRESET) {
		t.Errorf("read: %v", err)
	}
}

func TestBridgeReachesModule(t *testing.T) {
	const library = "/usr/lib/softhsm/libsofthsm2.so"
	_, err := os.Stat(library)
	need(t, err == nil, "SoftHSM")
	for _, program := range []string{"p11-kit", "pkcs11-tool", "softhsm2-util"} {
		_, err := exec.LookPath(program)
		need(t, err == nil, program)
	}
	_, err = FindClient(moduleDirs())
	need(t, err == nil, "p11-kit-client.so")

	dir, err := os.MkdirTemp("", "p11")
	must(t, err)
	t.Cleanup(func() { os.RemoveAll(dir) })
	must(t, os.Mkdir(filepath.Join(dir, "tokens"), 0o700))
	conf := filepath.Join(dir, "softhsm2.conf")
	write(t, conf, fmt.Appendf(nil, "directories.tokendir = %s/tokens\nobjectstore.backend = file\nslots.removable = false\n", dir))
	env := []string{"PATH=" + os.Getenv("PATH"), "SOFTHSM2_CONF=" + conf}
	initialize := exec.Command("softhsm2-util", "--init-token", "--free", "--label", "far away", "--pin", "1234", "--so-pin", "12345678")
	initialize.Env = env
	if out, err := initialize.CombinedOutput(); err != nil {
		t.Fatalf("%v\n%s", err, out)
	}

	o, _ := tree(t, map[string]string{"system/far.module": "remote: |p11-kit remote " + library + "\n"})
	o.ModuleDirs = moduleDirs()
	m := module(t, Load(o), "far")
	if m.Skip != "" || len(m.Remote.Command) == 0 {
		t.Fatalf("%+v", m)
	}
	// The directory name has every character that an address has to escape.
	odd := filepath.Join(dir, "100% ;ü")
	must(t, os.Mkdir(odd, 0o700))
	var stderr bytes.Buffer
	b, stop := serve(t, BridgeOptions{Command: m.Remote.Command, Env: env, Dir: odd, Stderr: &stderr})
	if info, err := os.Stat(b.dir); err != nil || info.Mode().Perm() != 0o700 {
		t.Errorf("directory of the socket: %v, %v", info.Mode(), err)
	}
	// There are two connections, one after the other.
	for range 2 {
		tool := exec.Command("pkcs11-tool", "--module", m.Path, "--login", "--pin", "1234", "--list-slots", "--list-objects", "--test")
		tool.Env = []string{"PATH=" + os.Getenv("PATH"), "P11_KIT_SERVER_ADDRESS=" + b.Address()}
		out, err := tool.CombinedOutput()
		if err != nil || !bytes.Contains(out, []byte("token label        : far away")) {
			t.Errorf("%v\n%s\n%s", err, out, &stderr)
		}
	}
	stop()
}

func TestBridgeEnvironment(t *testing.T) {
	t.Setenv("P11_REGISTRY_TEST_SECRET", "x")
	t.Setenv("SECRET_TOKEN", "x")
	t.Setenv("SOFTHSM2_CONF", "/agent.conf")
	var chosen string
	for _, kv := range Environment([]string{"PATH=" + os.Getenv("PATH"), "SOFTHSM2_CONF=/agent.conf"}, nil) {
		chosen += kv + "\n"
	}
	for _, tt := range []struct {
		name string
		env  []string
		want string
	}{
		{"none", nil, ""},
		{"chosen", Environment([]string{"PATH=" + os.Getenv("PATH"), "SECRET_TOKEN=x", "SOFTHSM2_CONF=/agent.conf"}, nil), chosen},
		{"given", []string{"A=b c"}, "A=b c\n"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			b, stop := serve(t, BridgeOptions{Command: []string{"env"}, Env: tt.env})
			got, err := io.ReadAll(dial(t, b))
			if err != nil || string(got) != tt.want {
				t.Errorf("%q, %v", got, err)
			}
			stop()
		})
	}
}

// A PIN on the connection must not pass through this process's memory. p11-kit spins on
// an input that does not block.
func TestBridgeHandsOverTheConnection(t *testing.T) {
	b, stop := serve(t, BridgeOptions{
		Command: shell(`readlink /proc/self/fd/0; readlink /proc/$$/fd/1; grep ^flags: /proc/$$/fdinfo/0`),
		Env:     []string{"PATH=/usr/bin:/bin"},
	})
	got, err := io.ReadAll(dial(t, b))
	must(t, err)
	lines := strings.Split(string(got), "\n")
	if len(lines) != 4 || !strings.HasPrefix(lines[0], "socket:") || lines[0] != lines[1] {
		t.Fatalf("input and output are not the connection:\n%s", got)
	}
	var flags int
	if _, err := fmt.Sscanf(lines[2], "flags: %o", &flags); err != nil || flags&syscall.O_NONBLOCK != 0 {
		t.Errorf("%s: not in blocking mode", lines[2])
	}
	stop()
}

func TestBridgeEndsCommands(t *testing.T) {
	tests := []struct {
		name, script string
	}{
		{"that end by themselves", `echo ready; read line`},
		{"that wait for ever", `echo ready; exec sleep 1000`},
		{"with children", `sleep 1000 & echo ready; wait`},
		{"whose children ignore hints", `(trap "" TERM; sleep 1000; sleep 1000) & echo ready; wait`},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			b, stop := serve(t, BridgeOptions{Command: shell(tt.script), Env: []string{"PATH=/usr/bin:/bin"}})
			r := bufio.NewReader(dial(t, b))
			if line, err := r.ReadString('\n'); line != "ready\n" {
				t.Fatalf("%q, %v", line, err)
			}
			stop()
			drain(t, r) // returns when the last of the processes is gone
		})
	}
}

func TestBridgeEndsLeftProcesses(t *testing.T) {
	b, stop := serve(t, BridgeOptions{
		Command: shell(`(trap "" TERM HUP; echo ready; exec sleep 1000) & read line`),
		Env:     []string{"PATH=/usr/bin:/bin"},
	})
	conn := dial(t, b)
	r := bufio.NewReader(conn)
	if line, err := r.ReadString('\n'); line != "ready\n" {
		t.Fatalf("%q, %v", line, err)
	}
	_, err := io.WriteString(conn, "go\n")
	must(t, err)
	drain(t, r) // without stop: the end of the command is enough
	stop()
}

func TestBridgeKillsTheStubborn(t *testing.T) {
	b, stop := serve(t, BridgeOptions{Command: shell(`trap "" TERM; echo ready; while :; do sleep 1000; done`), Env: []string{"PATH=/usr/bin:/bin"}})
	r := bufio.NewReader(dial(t, b))
	if line, err := r.ReadString('\n'); line != "ready\n" {
		t.Fatalf("%q, %v", line, err)
	}
	stop()
	drain(t, r)
}

// bridgeMain runs a bridge until the test kills it. The command ignores the end of its
// client.
func bridgeMain() int {
	b, err := NewBridge(BridgeOptions{Command: shell(`trap "" TERM HUP; echo $$; exec sleep 1000`), Env: []string{"PATH=/usr/bin:/bin"}})
	if err != nil {
		panic(err)
	}
	fmt.Println(b.Address())
	if err := b.Serve(context.Background()); err != nil {
		panic(err)
	}
	return 0
}

func TestBridgeTakesItsCommandAlongWhenKilled(t *testing.T) {
	self, err := os.Executable()
	must(t, err)
	dir, err := os.MkdirTemp("", "p11") // a killed process removes nothing
	must(t, err)
	t.Cleanup(func() { os.RemoveAll(dir) })
	agent := exec.Command(self)
	agent.Env = append(os.Environ(), roleVariable+"=bridge", "TMPDIR="+dir)
	out, err := agent.StdoutPipe()
	must(t, err)
	must(t, agent.Start())
	t.Cleanup(func() { _ = agent.Wait() })
	t.Cleanup(func() { _ = agent.Process.Kill() })
	address, err := bufio.NewReader(out).ReadString('\n')
	must(t, err)
	path := strings.TrimPrefix(strings.TrimSpace(address), "unix:path=")
	conn, err := net.DialUnix("unix", nil, &net.UnixAddr{Name: path, Net: "unix"})
	must(t, err)
	t.Cleanup(func() { conn.Close() })
	r := bufio.NewReader(conn)
	_, err = r.ReadString('\n') // it runs
	must(t, err)
	must(t, agent.Process.Kill())
	drain(t, r) // returns when it is gone
}

// The other end of the connection is p11-kit-client.so in a module process. If the
// vendor's code goes wrong there, the process may send anything.
func TestBridgeEndsCommandsOfClientsThatTalkNonsense(t *testing.T) {
	const library = "/usr/lib/softhsm/libsofthsm2.so"
	_, err := os.Stat(library)
	need(t, err == nil, "SoftHSM")
	_, err = exec.LookPath("p11-kit")
	need(t, err == nil, "p11-kit")
	var log bytes.Buffer // written by goroutines that stop waits for
	b, stop := serve(t, BridgeOptions{
		Command: []string{"p11-kit", "remote", library}, Env: []string{"PATH=" + os.Getenv("PATH")},
		Log: slog.New(slog.NewTextHandler(&log, nil)),
	})
	for name, nonsense := range map[string][]byte{
		"text":              bytes.Repeat([]byte("GET / HTTP/1.1\r\n\r\n"), 100),
		"zeros":             make([]byte, 4096),
		"enormous lengths":  bytes.Repeat([]byte{0xff}, 4096),
		"a version alone":   {0},
		"a header cut off":  {0, 0, 0},
		"a large call":      append([]byte{0, 0, 0, 0, 1, 0, 0, 0, 4, 0x7f, 0xff, 0xff, 0xff}, make([]byte, 1<<16)...),
		"nothing whatever":  nil,
		"an odd first byte": {7},
	} {
		conn := dial(t, b)
		// The command may hang up before it has read everything.
		if _, err := conn.Write(nonsense); err != nil && !errors.Is(err, syscall.EPIPE) && !errors.Is(err, syscall.ECONNRESET) {
			t.Errorf("%s: %v", name, err)
		}
		if err := conn.CloseWrite(); err != nil && !errors.Is(err, syscall.ENOTCONN) {
			t.Errorf("%s: %v", name, err)
		}
		drain(t, conn) // returns when the command has ended
	}
	// The next connection ends a command that stays and writes nothing.
	silent := dial(t, b)
	next := dial(t, b)
	drain(t, silent)
	must(t, next.Close())
	stop()
	if strings.Contains(log.String(), "signal") {
		t.Errorf("a command crashed: %s", &log)
	}
}

func TestBridgeRunsOneCommandAtATime(t *testing.T) {
	b, stop := serve(t, BridgeOptions{Command: shell(`echo $$; exec sleep 1000`), Env: []string{"PATH=/usr/bin:/bin"}})
	first := bufio.NewReader(dial(t, b))
	one, err := first.ReadString('\n')
	must(t, err)
	second := bufio.NewReader(dial(t, b))
	two, err := second.ReadString('\n')
	must(t, err)
	if one == two {
		t.Errorf("both connections have process %s", one)
	}
	drain(t, first) // the first command is gone while the second runs
	stop()
	drain(t, second)
}

// A lineWriter passes on the written text, line by line.
type lineWriter chan string

func (w lineWriter) Write(p []byte) (int, error) {
	w <- string(p)
	return len(p), nil
}

func TestBridgeReportsFailures(t *testing.T) {
	const secret = "123456"
	for _, tt := range []struct {
		name    string
		command []string
		want    string
	}{
		{"no such program", []string{"/nowhere/p11-kit", "pin-value=" + secret}, "no such file"},
		{"not found", []string{"p11-kit-nowhere", "pin-value=" + secret}, "not found"},
		{"exit status", shell("exit 3 # pin-value=" + secret), "exit status 3"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			lines := make(lineWriter, 1)
			b, stop := serve(t, BridgeOptions{Command: tt.command, Log: slog.New(slog.NewTextHandler(lines, nil))})
			for range 2 { // the bridge serves the next client as well
				drain(t, dial(t, b))
				if line := <-lines; !strings.Contains(line, tt.want) || strings.Contains(line, secret) {
					t.Errorf("log: %s", line)
				}
			}
			stop()
		})
	}
}

func TestBridgeClose(t *testing.T) {
	b, err := NewBridge(BridgeOptions{Command: shell("true")})
	must(t, err)
	must(t, b.Close())
	must(t, b.Close())
	must(t, b.Serve(t.Context()))
	if _, err := os.Stat(b.dir); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("the socket is still there: %v", err)
	}
	if _, err := NewBridge(BridgeOptions{}); err == nil {
		t.Error("a bridge without a command")
	}
	file := filepath.Join(t.TempDir(), "file")
	write(t, file, nil)
	for _, dir := range []string{"/nowhere", "relative", file} {
		if _, err := NewBridge(BridgeOptions{Command: shell("true"), Dir: dir}); err == nil || !strings.Contains(err.Error(), "set TMPDIR") {
			t.Errorf("a bridge in %s: %v", dir, err)
		}
	}
	long := filepath.Join(t.TempDir(), strings.Repeat("x", 110))
	must(t, os.Mkdir(long, 0o700))
	if _, err := NewBridge(BridgeOptions{Command: shell("true"), Dir: long}); err == nil {
		t.Error("a bridge with a path that is too long")
	}
	if left, err := os.ReadDir(long); err != nil || len(left) != 0 {
		t.Errorf("left behind: %v, %v", left, err)
	}
}
