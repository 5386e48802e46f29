package token_test

import (
	"fmt"
	"maps"
	"net"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"

	ll "github.com/landlock-lsm/go-landlock/landlock/syscall"
	"golang.org/x/sys/unix"

	"p11-agent/token"
	"p11-agent/token/tokentest"
)

// needLandlock ends the test if the kernel has no Landlock.
func needLandlock(t *testing.T) (version int) {
	t.Helper()
	version, err := ll.LandlockGetABIVersion()
	switch {
	case err != nil && os.Getenv("CI") == "true":
		t.Fatalf("this kernel has no Landlock: %v", err)
	case err != nil:
		t.Skipf("this kernel has no Landlock: %v", err)
	}
	return version
}

// A module tries forbidden actions: on the thread that starts the module, on a thread of its own,
// and in a program. The sandbox refuses them. Without the sandbox, they succeed.
func TestIntruder(t *testing.T) {
	scoped := needLandlock(t) >= 6
	library := tokentest.BuildBadModule(t)
	for _, confined := range []bool{true, false} {
		t.Run(fmt.Sprintf("sandbox=%v", confined), func(t *testing.T) {
			// The module may write to dir, because its report goes there. dir has a link to the
			// home, where the module may not write: the target of the link counts.
			dir, home := tokentest.TempDir(t), tokentest.HomeDir(t)
			noError(t, os.Symlink(home, filepath.Join(dir, "home")))
			keys := filepath.Join(home, ".ssh/authorized_keys")
			noError(t, os.Mkdir(filepath.Dir(keys), 0o700))
			noError(t, os.WriteFile(keys, []byte("ssh-ed25519 mine\n"), 0o600))
			l, err := net.Listen("unix", "@"+dir)
			noError(t, err)
			defer l.Close()
			spec := realSpec("bad", library, tokentest.BadModuleEnv("intrude="+dir, "", "")...)
			spec.Unconfined = !confined
			s := tokentest.Store(t, token.Options{Modules: []token.ModuleSpec{spec}, Command: self})
			st := status(s, "bad")
			noError(t, st.Err)

			report, err := os.ReadFile(filepath.Join(dir, "report"))
			noError(t, err)
			got := make(map[string]unix.Errno)
			for line := range strings.Lines(string(report)) {
				what, errno, ok := cutLast(strings.TrimSpace(line))
				if !ok {
					t.Fatalf("line %q", line)
				}
				got[what] = errno
			}
			seen := 0
			for what, errno := range got {
				seen++
				refused := errno == unix.EACCES || errno == unix.EPERM
				switch {
				case strings.HasPrefix(what, "allowed: "):
					want(t, what, errno, 0)
				case strings.HasPrefix(what, "abstract socket") && !scoped:
				case errno == unix.EOPNOTSUPP || errno == unix.ENOTTY || errno == unix.ENODATA:
					want(t, what+" is not what this file system has", confined, false)
				case strings.HasPrefix(what, "bpf") && !confined:
					// The kernel decides whether such programs exist.
				case refused != confined:
					t.Errorf("%s: %v", what, errno)
				}
			}
			if seen < 90 {
				t.Errorf("it tried only %d: %v", seen, maps.Collect(maps.All(got)))
			}
			after, err := os.ReadFile(keys)
			noError(t, err)
			want(t, "the file is as it was", string(after) == "ssh-ed25519 mine\n", confined)
			text := "off (configuration)"
			if confined {
				text = "files (landlock "
				if scoped {
					text = "files, signals and abstract sockets (landlock "
				}
			}
			if !strings.HasPrefix(st.Sandbox, text) {
				t.Errorf("the status is %q", st.Sandbox)
			}
		})
	}
}

// cutLast takes the number off the end of a line.
func cutLast(line string) (what string, errno unix.Errno, ok bool) {
	i := strings.LastIndexByte(line, ' ')
	if i < 0 {
		return "", 0, false
	}
	n, err := strconv.Atoi(line[i+1:])
	return line[:i], unix.Errno(n), err == nil
}

// A module that needs to write elsewhere does not start. The error of the module gives two
// remedies. Both remedies work.
func TestSandboxHint(t *testing.T) {
	needLandlock(t)
	library := tokentest.BuildBadModule(t)
	dir := tokentest.HomeDir(t)
	for _, tt := range []struct {
		name string
		set  func(*token.ModuleSpec)
		runs bool
	}{
		{"by default", func(*token.ModuleSpec) {}, false},
		{"write", func(spec *token.ModuleSpec) { spec.Write = []string{dir} }, true},
		{"something else", func(spec *token.ModuleSpec) { spec.Write = []string{tokentest.TempDir(t)} }, false},
		{"no sandbox", func(spec *token.ModuleSpec) { spec.Unconfined = true }, true},
	} {
		t.Run(tt.name, func(t *testing.T) {
			spec := realSpec("bad", library, tokentest.BadModuleEnv("write="+filepath.Join(dir, "file"), "", "")...)
			tt.set(&spec)
			s := tokentest.Store(t, token.Options{Modules: []token.ModuleSpec{spec}, Command: self})
			st := status(s, "bad")
			if tt.runs {
				noError(t, st.Err)
				return
			}
			if st.Err == nil || !strings.Contains(st.Err.Error(), "C_Initialize") || !strings.Contains(st.Err.Error(), "sandbox = false") {
				t.Errorf("got %v", st.Err)
			}
			want(t, "sandbox of a module that does not run", st.Sandbox, "")
		})
	}
}
