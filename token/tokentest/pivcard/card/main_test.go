package main

import (
	"bufio"
	"fmt"
	"io"
	"os"
	"os/exec"
	"strings"
	"testing"

	"p11-agent/agent/peer/terminaltest"
	"p11-agent/token/tokentest"
	"p11-agent/token/tokentest/pivcard"
)

func TestMain(m *testing.M) { os.Exit(terminaltest.Without(m).Run()) }

// A card that is told by hand what to do is one for OpenSC.
func TestCard(t *testing.T) {
	p := tokentest.StartPCSCD(t)
	in, commands := io.Pipe()
	answers, out := io.Pipe()
	done := make(chan error, 1)
	go func() {
		done <- run(pivcard.Options{Name: "by hand"}, p.Slots[0].Addr(), in, out)
		out.Close()
	}()
	lines := bufio.NewScanner(answers)
	do := func(command, want string) {
		t.Helper()
		if _, err := fmt.Fprintln(commands, command); err != nil {
			t.Fatal(err)
		}
		if !lines.Scan() || lines.Text() != want {
			t.Errorf("%s: %q, want %q", command, lines.Text(), want)
		}
	}
	seen := func() bool {
		cmd := exec.Command("opensc-tool", "--name")
		cmd.Env = append(os.Environ(), p.Env()...)
		b, err := cmd.CombinedOutput()
		return err == nil && strings.Contains(string(b), "Personal Identity Verification Card")
	}
	tokentest.Until(t, "OpenSC sees the card", seen)
	do("tries 1", "ok")
	do("counts", "PINs: 0 right, 0 wrong, 0 while locked, 1 tries left; signatures: 0")
	do("pin 999999", "ok")
	do("counts", "PINs: 0 right, 0 wrong, 0 while locked, 3 tries left; signatures: 0")
	do("pin too-long-a-PIN", "error: a PIN of 14 characters cannot be on the card")
	do("delay 1ms", "ok")
	do("reset", "ok")
	do("out", "ok")
	tokentest.Until(t, "OpenSC sees no card", func() bool { return !seen() })
	do("in", "ok")
	tokentest.Until(t, "OpenSC sees the card again", seen)
	do("jump", `error: no such command: "jump"`)
	fmt.Fprintln(commands, "quit")
	if err := <-done; err != nil {
		t.Error(err)
	}
}
