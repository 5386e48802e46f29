package registry

import (
	"bytes"
	"log/slog"
	"net"
	"path/filepath"
	"strings"
	"testing"
)

// Cause tells what the command printed and how it ended, without the command's arguments.
func TestCause(t *testing.T) {
	for _, tt := range []struct{ name, script, want string }{
		{"fails silently", "exit 3", `its command "sh" failed: exit status 3`},
		{"says why", "echo 'no such host: hsm' >&2; exit 255", `its command "sh" failed: exit status 255; it said: no such host: hsm`},
		{"says much", "for n in 1 2 3 4 5; do echo line $n >&2; done; printf end >&2; exit 1", `its command "sh" failed: exit status 1; it said: line 4 | line 5 | end`},
		{"fools a terminal", `printf '\033[2Jred\n' >&2; exit 1`, `its command "sh" failed: exit status 1; it said: ?[2Jred`},
		{"ends well", "exit 0", ""},
		{"ends well and says something", "echo bye >&2", `its command "sh" ended; it said: bye`},
	} {
		t.Run(tt.name, func(t *testing.T) {
			var log bytes.Buffer
			b, _ := serve(t, BridgeOptions{Command: []string{"sh", "-c", tt.script, "secret-pin"}, Log: slog.New(slog.NewTextHandler(&log, nil))})
			if got := b.Cause(t.Context()); got != "" {
				t.Errorf("before a start: %q", got)
			}
			c := dial(t, b)
			_, _ = c.Read(make([]byte, 1)) // until the command has ended
			if got := b.Cause(t.Context()); got != tt.want {
				t.Errorf("got  %q\nwant %q", got, tt.want)
			}
			if strings.Contains(log.String(), "secret-pin") {
				t.Errorf("the log has an argument: %s", log.String())
			}
		})
	}
	b, _ := serve(t, BridgeOptions{Command: []string{"p11-kit-nowhere"}})
	_, _ = dial(t, b).Read(make([]byte, 1))
	if got := b.Cause(t.Context()); !strings.HasPrefix(got, `its command "p11-kit-nowhere" failed: `) || !strings.Contains(got, "not found") {
		t.Errorf("%q", got)
	}
}

func TestServerCause(t *testing.T) {
	path := filepath.Join(t.TempDir(), "a b")
	address := "unix:path=" + strings.ReplaceAll(path, " ", "%20")
	if got := ServerCause(t.Context(), address); !strings.Contains(got, "no such file") {
		t.Errorf("without a server: %q", got)
	}
	l, err := net.Listen("unix", path)
	must(t, err)
	defer l.Close()
	for _, a := range []string{address, "vsock:port=1"} {
		if got := ServerCause(t.Context(), a); got != "" {
			t.Errorf("%s: %q", a, got)
		}
	}
}
