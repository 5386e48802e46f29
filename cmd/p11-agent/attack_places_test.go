package main

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"strings"
	"syscall"

	"golang.org/x/sys/unix"

	"p11-agent/agent/peer/terminaltest"
)

func init() {
	attacks["press"] = pressEnter
	attacks["hold"] = holdPrompt
	attacks["last-try"] = takeLastTry
}

// onOwnTerminal runs a program on a terminal of the attacker. The program leads the session there.
// With "child" in front, a shell leads the session, and the program is its child. keys gets the
// text that the terminal shows, and returns the text to type. At the end, onOwnTerminal prints the
// text of the terminal and the status of the program.
func onOwnTerminal(args []string, keys func(shown string) string) error {
	if len(args) < 2 {
		return errors.New("usage: leader|child PROGRAM [ARGUMENT...]")
	}
	far, tty, err := terminaltest.Open("/dev/ptmx")
	if err != nil {
		return err
	}
	defer far.Close()
	size := unix.Winsize{Row: 30, Col: 100}
	if err := unix.IoctlSetWinsize(int(far.Fd()), unix.TIOCSWINSZ, &size); err != nil {
		return err
	}
	if args[0] == "child" {
		// The shell is another process, and older than the program.
		args = append([]string{"", "sh", "-c", `"$0" "$@"; exit $?`}, args[1:]...)
	}
	cmd := exec.Command(args[1], args[2:]...)
	cmd.Stdin, cmd.Stdout, cmd.Stderr = tty, tty, tty
	cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true, Setctty: true}
	cmd.Env = append(os.Environ(), "TERM=xterm")
	if err := cmd.Start(); err != nil {
		return err
	}
	_ = tty.Close()
	var shown strings.Builder
	buf := make([]byte, 4096)
	for {
		n, err := far.Read(buf)
		shown.Write(buf[:n])
		if err != nil {
			break // all files of the terminal are closed
		}
		if text := keys(string(buf[:n])); text != "" {
			_, _ = io.WriteString(far, text)
		}
	}
	_ = cmd.Wait()
	fmt.Println(shown.String())
	fmt.Println("status", cmd.ProcessState.ExitCode())
	return nil
}

// pressEnter presses Enter each time that the terminal shows text.
func pressEnter(args []string) error {
	return onOwnTerminal(args, func(string) string { return "\r" })
}

// holdPrompt types nothing.
func holdPrompt(args []string) error {
	return onOwnTerminal(args, func(string) string { return "" })
}

// takeLastTry requests a login with a wrong PIN through the control door. It claims that the
// person agrees to use the last try. Its arguments are URI PIN.
func takeLastTry(args []string) error {
	if len(args) != 2 {
		return errors.New("usage: URI PIN")
	}
	conn, err := net.Dial("unix", os.Getenv("SSH_AUTH_SOCK"))
	if err != nil {
		return err
	}
	defer conn.Close()
	message := []byte{27} // SSH_AGENTC_EXTENSION
	for _, s := range []string{"control-v1@p11-agent", "login", args[0], args[1]} {
		message = append(binary.BigEndian.AppendUint32(message, uint32(len(s))), s...)
	}
	message = append(message, 1)
	if _, err := conn.Write(append(binary.BigEndian.AppendUint32(nil, uint32(len(message))), message...)); err != nil {
		return err
	}
	var size [4]byte
	if _, err := io.ReadFull(conn, size[:]); err != nil {
		return err
	}
	answer := make([]byte, binary.BigEndian.Uint32(size[:]))
	if _, err := io.ReadFull(conn, answer); err != nil {
		return err
	}
	fmt.Printf("%q\n", answer)
	return nil
}
