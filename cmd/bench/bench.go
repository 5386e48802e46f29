package main

import (
	"bytes"
	"context"
	_ "embed"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"time"
)

// The throw-away tokens. Their PIN is no secret: no other user can read the
// directory that they are in, and they end with it.
const (
	tokenLabel = "bench"
	tokenPIN   = "1234"
	tokenSOPIN = "12345678"
)

//go:embed testdata/load.c
var loadSource []byte

//go:embed testdata/slow.c
var slowSource []byte

// bench is a run under way. One goroutine uses it, on a thread of its own:
// programs in the background are told to end when that thread does.
type bench struct {
	*options
	begun    time.Time
	out      io.Writer
	progress io.Writer
	report   bytes.Buffer // all that was printed
	goals    []goal

	dir      string
	programs map[string]string
	softHSM  string // the module
	slow     string // the one of slow.c
	load     string // the program of load.c
	named    int    // directories that were made in dir
	running  []*process
	held     []net.Conn // with requests that are not answered

	signing *tokens // with a key of each kind that was needed
}

// newBench finds what is needed, and makes the directory and the programs.
func newBench(o *options, out, progress io.Writer) (b *bench, err error) {
	b = &bench{options: o, begun: time.Now(), out: out, progress: progress, programs: make(map[string]string)}
	if err := b.find(); err != nil {
		return nil, err
	}
	runtime.LockOSThread()
	defer func() {
		if err != nil {
			err = errors.Join(err, b.close())
		}
	}()
	if b.dir, err = os.MkdirTemp("", "p11-bench-"); err != nil {
		return b, err
	}
	if b.dir, err = filepath.EvalSymlinks(b.dir); err != nil { // ssh-agent compares real paths
		return b, err
	}
	if len(b.dir) > 80 { // the path of a socket in it has 107 bytes at most
		return b, fmt.Errorf("TMPDIR is too long a path for a socket: %s", b.dir)
	}
	if b.load, err = b.compile("load", loadSource); err != nil {
		return b, err
	}
	b.slow, err = b.compile("slow.so", slowSource, "-shared", "-fPIC")
	return b, err
}

// close stops everything and removes the directory.
func (b *bench) close() error {
	defer runtime.UnlockOSThread()
	b.stopAll()
	if b.dir == "" {
		return nil
	}
	return os.RemoveAll(b.dir)
}

// find finds the programs, and says which are missing.
func (b *bench) find() error {
	var missing []string
	for _, name := range []string{"cc", "softhsm2-util", "ssh", "ssh-agent", "ssh-add", "ssh-keygen", "sshd"} {
		path, err := exec.LookPath(name)
		if err != nil && name == "sshd" { // not in everybody's PATH
			path, err = firstFile("/usr/sbin/sshd", "/usr/local/sbin/sshd", "/sbin/sshd")
		}
		if err != nil {
			missing = append(missing, name)
		}
		b.programs[name] = path
	}
	var err error
	if b.softHSM, err = firstFile("/usr/lib/softhsm/libsofthsm2.so", "/usr/lib/*/softhsm/libsofthsm2.so",
		"/usr/lib64/softhsm/libsofthsm2.so", "/usr/lib*/pkcs11/libsofthsm2.so", "/usr/lib/*/pkcs11/libsofthsm2.so",
		"/usr/lib*/libsofthsm2.so", "/usr/local/lib/softhsm/libsofthsm2.so"); err != nil {
		missing = append(missing, "libsofthsm2.so")
	} else if b.softHSM, err = filepath.EvalSymlinks(b.softHSM); err != nil {
		return err
	}
	if len(missing) > 0 {
		return fmt.Errorf("what is not installed here is needed: %s: run \"make deps-check\", or install it by other means", strings.Join(missing, ", "))
	}
	if b.programs["p11-agent"], err = filepath.Abs(b.agent); err != nil {
		return err
	}
	if _, err := os.Stat(b.programs["p11-agent"]); err != nil {
		return fmt.Errorf("%w: run \"make build\" first", err)
	}
	return nil
}

// firstFile returns the first file that matches one of the patterns.
func firstFile(patterns ...string) (string, error) {
	for _, pattern := range patterns {
		// The patterns are constants: Glob fails on malformed ones only.
		if files, _ := filepath.Glob(pattern); len(files) > 0 {
			return files[0], nil
		}
	}
	return "", os.ErrNotExist
}

// compile makes a program or a library of C, and returns its path.
func (b *bench) compile(name string, source []byte, flags ...string) (string, error) {
	path := filepath.Join(b.dir, name)
	argv := append([]string{"-std=gnu11", "-O2", "-x", "c", "-o", path, "-"}, flags...)
	cmd := exec.Command(b.programs["cc"], append(argv, "-pthread", "-ldl")...)
	cmd.Stdin = bytes.NewReader(source)
	if said, err := cmd.CombinedOutput(); err != nil {
		return "", fmt.Errorf("compile %s: %w\n%s", name, err, said)
	}
	return path, nil
}

// newDir makes another private directory.
func (b *bench) newDir(name string) (string, error) {
	b.named++
	dir := filepath.Join(b.dir, fmt.Sprintf("%s%d", name, b.named))
	return dir, os.Mkdir(dir, 0o700)
}

// wants tells whether a row was asked for.
func (b *bench) wants(row string) bool { return b.only.MatchString(row) }

func (b *bench) wantsAny(rows []string) bool { return slices.ContainsFunc(rows, b.wants) }

// print prints a line of the report.
func (b *bench) print(format string, args ...any) {
	text := fmt.Sprintf(format, args...) + "\n"
	b.report.WriteString(text)
	fmt.Fprint(b.out, text)
}

// say tells what is measured now.
func (b *bench) say(format string, args ...any) {
	at := time.Since(b.begun).Round(time.Second)
	fmt.Fprintf(b.progress, "[%d:%02d] %s\n", at/time.Minute, at%time.Minute/time.Second, fmt.Sprintf(format, args...))
}

// head prints what the numbers are of.
func (b *bench) head(ctx context.Context) {
	version := func(name string, args ...string) string {
		said, err := exec.CommandContext(ctx, b.programs[name], args...).CombinedOutput()
		if err != nil {
			return name + " of unknown version"
		}
		return strings.TrimSpace(string(said))
	}
	b.print("%s, %s, %d processors; %d rounds of %v.\nRatios are the median of the rounds, with the least and the greatest of them in brackets.",
		version("p11-agent", "--version"), version("ssh", "-V"), runtime.NumCPU(), b.rounds, b.length)
}

// poll waits for a condition that no event tells.
func poll(ctx context.Context, patience time.Duration, what string, done func() (bool, error)) error {
	ctx, cancel := context.WithTimeout(ctx, patience)
	defer cancel()
	for {
		ok, err := done()
		if ok {
			return nil
		}
		select {
		case <-ctx.Done():
			return errors.Join(fmt.Errorf("%s: not within %v", what, patience), err)
		case <-time.After(time.Millisecond):
		}
	}
}
