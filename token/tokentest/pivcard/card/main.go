// Command card puts a PIV card in software into a reader of vpcd, for trying
// things by hand: a real pcscd, OpenSC and p11-agent take it for a real card. It
// is told what to do on standard input, one command a line:
//
//	in              insert the card (it is at the start)
//	out             pull it, in the middle of a command if need be
//	reset           reset it, as another program may do
//	pin NEW         change its PIN behind everybody's back
//	tries N         leave so many tries for the PIN
//	delay TIME      take so long for each use of a private key, such as 3s
//	counts          print what was done to it
//	quit            pull it and end
//
// See docs/ARCHITECTURE.md for how a pcscd is started that has such a reader.
package main

import (
	"bufio"
	"flag"
	"fmt"
	"io"
	"os"
	"strconv"
	"strings"
	"time"

	"p11-agent/token/tokentest/pivcard"
)

func main() {
	o := pivcard.Options{}
	addr := flag.String("addr", "127.0.0.1:35963", "where vpcd listens; its second slot is at the next `port`")
	flag.StringVar(&o.Name, "name", "", "common name in the certificates, OpenSC's token `label`")
	flag.StringVar(&o.PIN, "pin", pivcard.PIN, "the PIN, up to 8 characters")
	flag.BoolVar(&o.YubiKey, "yubikey", false, "answer as a YubiKey does")
	rsa := flag.Bool("rsa", false, "have an RSA key for authentication in place of a P-256 key")
	trace := flag.Bool("trace", false, "print each command and its answer, without PINs")
	flag.Parse()
	if *rsa {
		o.Keys = map[pivcard.Ref]pivcard.Key{
			pivcard.Authentication: {Algorithm: pivcard.RSA2048}, pivcard.Signature: {},
			pivcard.KeyManagement: {}, pivcard.CardAuthentication: {},
		}
	}
	if *trace {
		o.Trace = func(line string) { fmt.Fprintln(os.Stderr, line) }
	}
	if err := run(o, *addr, os.Stdin, os.Stdout); err != nil {
		fmt.Fprintln(os.Stderr, "card:", err)
		os.Exit(1)
	}
}

// run serves a card until its commands end.
func run(o pivcard.Options, addr string, in io.Reader, out io.Writer) error {
	c, err := pivcard.New(o)
	if err != nil {
		return err
	}
	slot := pivcard.NewSlot(addr)
	defer slot.Close()
	slot.Insert(c)
	lines := bufio.NewScanner(in)
	for lines.Scan() {
		word, value, _ := strings.Cut(strings.TrimSpace(lines.Text()), " ")
		if word == "quit" {
			return nil
		}
		if err := do(c, slot, word, value, out); err != nil {
			fmt.Fprintln(out, "error:", err)
		}
	}
	return lines.Err()
}

func do(c *pivcard.Card, slot *pivcard.Slot, word, value string, out io.Writer) error {
	switch word {
	case "":
		return nil
	case "in":
		slot.Insert(c)
	case "out":
		slot.Remove()
	case "reset":
		c.Reset()
	case "pin":
		if err := c.SetPIN(value); err != nil {
			return err
		}
	case "tries":
		n, err := strconv.Atoi(value)
		if err != nil {
			return err
		}
		c.SetTries(n)
	case "delay":
		d, err := time.ParseDuration(value)
		if err != nil {
			return err
		}
		c.SetDelay(0, d)
	case "counts":
		n := c.Counts()
		fmt.Fprintf(out, "PINs: %d right, %d wrong, %d while locked, %d tries left; signatures: %d\n", n.Right, n.Wrong, n.Blocked, c.Tries(), n.Signatures)
		return nil
	default:
		return fmt.Errorf("no such command: %q", word)
	}
	fmt.Fprintln(out, "ok")
	return nil
}
