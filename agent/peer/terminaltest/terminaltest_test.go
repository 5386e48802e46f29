package terminaltest

import (
	"bytes"
	"fmt"
	"os"
	"os/exec"
	"strings"
	"syscall"
	"testing"
)

// roleVariable makes this program play a test program that was started in a terminal.
const roleVariable = "P11_TERMINALTEST_ROLE"

func TestMain(m *testing.M) {
	switch os.Getenv(roleVariable) {
	case "":
		os.Exit(Without(m).Run())
	case "leader": // of the session
		os.Exit(Without(tests{}).Run())
	case "member":
		os.Exit(start("leader"))
	}
}

// start runs this program again in the same session, and returns its status.
func start(role string) int {
	cmd := exec.Command("/proc/self/exe")
	cmd.Env = append(os.Environ(), roleVariable+"="+role)
	cmd.Stdin, cmd.Stdout, cmd.Stderr = os.Stdin, os.Stdout, os.Stderr
	if err := cmd.Run(); cmd.ProcessState == nil {
		fmt.Println(err)
		return 1
	}
	return cmd.ProcessState.ExitCode()
}

// tests stand in for the tests of a program. They print whether they have a terminal, and
// whether a program that they start has one.
type tests struct{}

func (tests) Run() int {
	_, err := os.OpenFile("/dev/tty", os.O_RDWR, 0)
	child := exec.Command("sh", "-c", "exec 2>/dev/null; (: </dev/tty) && echo yes || echo no")
	out, childErr := child.Output()
	fmt.Printf("own: %t, child: %s %v\n", err == nil, bytes.TrimSpace(out), childErr)
	return 7
}

// Tests that start in a terminal do not see it, and neither do their programs. The program
// ends with the status of the tests.
func TestWithout(t *testing.T) {
	for _, role := range []string{"leader", "member"} {
		t.Run(role, func(t *testing.T) {
			_, terminal := New(t)
			cmd := exec.Command("/proc/self/exe")
			cmd.Env = append(os.Environ(), roleVariable+"="+role)
			cmd.Stdin = terminal
			cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true, Setctty: true}
			var out bytes.Buffer
			cmd.Stdout, cmd.Stderr = &out, &out
			_ = cmd.Run() // its status is looked at
			if got, want := strings.TrimSpace(out.String()), "own: false, child: no <nil>"; got != want || cmd.ProcessState.ExitCode() != 7 {
				t.Errorf("got %q and %v, want %q and status 7", got, cmd.ProcessState, want)
			}
		})
	}
}

// The test program itself has no terminal, wherever it was started.
func TestNone(t *testing.T) {
	if f, err := os.OpenFile("/dev/tty", os.O_RDWR, 0); err == nil {
		f.Close()
		t.Error("these tests have a controlling terminal")
	}
}
