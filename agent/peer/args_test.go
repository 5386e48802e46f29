package peer

import (
	"os/exec"
	"slices"
	"strings"
	"testing"
)

// Arguments returns the arguments of the process itself, with empty arguments. Without the
// empty ones, an option would take the next argument.
func TestArguments(t *testing.T) {
	cut := strings.Repeat("x", maxArguments)
	for _, test := range []struct{ arguments, want []string }{
		{[]string{"-c", "echo; read x", "ssh", "-l", "", "web1"}, nil},
		{[]string{"-c", "echo; read x", "ssh", "web1", cut, "more"}, []string{"sh", "-c", "echo; read x", "ssh", "web1"}},
	} {
		cmd := exec.Command("sh", test.arguments...)
		in, err := cmd.StdinPipe()
		if err != nil {
			t.Fatal(err)
		}
		out, err := cmd.StdoutPipe()
		if err != nil {
			t.Fatal(err)
		}
		if err := cmd.Start(); err != nil {
			t.Fatal(err)
		}
		// Start returns before the kernel shows the arguments.
		if _, err := out.Read(make([]byte, 1)); err != nil {
			t.Fatal(err)
		}
		want := test.want
		if want == nil {
			want = append([]string{"sh"}, test.arguments...)
		}
		if got := (Peer{Chain: []Process{{PID: cmd.Process.Pid}, {PID: 1}}}).Arguments(); !slices.Equal(got, want) {
			t.Errorf("%.100q, want %.100q", got, want)
		}
		_ = in.Close()
		_ = cmd.Wait() // read fails at the end of its input
		if got := (Peer{Chain: []Process{{PID: cmd.Process.Pid}}}).Arguments(); got != nil {
			t.Errorf("when the process has ended: %.100q", got)
		}
	}
	if got := (Peer{}).Arguments(); got != nil {
		t.Errorf("of an unknown process: %q", got)
	}
}
