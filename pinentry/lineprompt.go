package pinentry

import (
	"bufio"
	"bytes"
	"errors"
	"fmt"
	"io"
	"os"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"p11-agent/pinentry/plain"
	"p11-agent/pinentry/secret"
)

// LinePrompt is the main function of a pinentry program that asks in lines, on a terminal on which
// nothing can be drawn. It speaks pinentry's side of the Assuan protocol on standard input and
// output. It asks on the terminal that it inherits as file 3 (Place.TTY), and returns the exit
// status. It runs in a process and a session of its own: the kernel stops a process that reads from
// its terminal in the background.
func LinePrompt() int {
	tty := os.NewFile(3, "terminal")
	if tty == nil || !isTerminal(tty) {
		fmt.Fprintln(os.Stderr, "file 3 is not a terminal")
		return 1
	}
	p := &linePrompt{in: os.Stdin, out: os.Stdout, tty: tty}
	if err := p.serve(); err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	return 0
}

// linePrompt is the state of LinePrompt. text has the texts of the next question.
type linePrompt struct {
	in, out, tty *os.File
	text         map[string]string
}

// The error numbers of a linePrompt (libgpg-error, source 5: pinentry).
const (
	linePromptCancelled = 5<<24 | codeCanceled
	linePromptTimeout   = 5<<24 | codeTimeout
	linePromptUnknown   = 5<<24 | codeUnknownCommand
)

// linePromptWrong is how often linePrompt asks again after an answer that is neither yes nor no.
const linePromptWrong = 3

func (p *linePrompt) serve() error {
	p.text = make(map[string]string)
	lines := bufio.NewReaderSize(p.in, maxLine) // from the agent, which sends no secret
	if err := p.say("OK Pleased to meet you"); err != nil {
		return err
	}
	for {
		b, err := lines.ReadSlice('\n')
		if errors.Is(err, io.EOF) {
			return nil
		}
		if err != nil {
			return err
		}
		command, rest, _ := bytes.Cut(bytes.TrimRight(b, "\r\n"), []byte(" "))
		switch string(command) {
		case "SETDESC", "SETPROMPT", "SETERROR", "SETOK", "SETCANCEL", "SETTIMEOUT":
			decoded, err := unescape(rest)
			if err != nil {
				return err
			}
			p.text[string(command)] = plain.Lines(string(decoded))
		case "RESET":
			clear(p.text)
		case "OPTION", "SETTITLE":
		case "GETINFO":
			if err := p.say("D plain"); err != nil {
				return err
			}
		case "GETPIN":
			err = p.pin()
		case "CONFIRM", "MESSAGE":
			err = p.confirm(string(command) == "MESSAGE" || string(rest) == "--one-button")
		case "BYE":
			return p.say("OK closing connection")
		default:
			err = &pinentryError{linePromptUnknown, "Unknown command"}
		}
		if perr, ok := errors.AsType[*pinentryError](err); ok {
			err = p.say(fmt.Sprintf("ERR %d %s", perr.number, perr.text))
		} else if err == nil {
			err = p.say("OK")
		}
		if err != nil {
			return err
		}
	}
}

func (p *linePrompt) say(line string) error {
	_, err := p.out.WriteString(line + "\n")
	return err
}

// pin asks for a PIN without showing it, and sends it.
func (p *linePrompt) pin() error {
	before, err := unix.IoctlGetTermios(int(p.tty.Fd()), unix.TCGETS)
	if err != nil {
		return err
	}
	quiet := *before
	quiet.Lflag |= unix.ICANON
	quiet.Lflag &^= unix.ECHO | unix.ECHOE | unix.ECHOK | unix.ECHONL
	// Keys that were typed before the question do not answer it.
	if err := unix.IoctlSetTermios(int(p.tty.Fd()), unix.TCSETSF, &quiet); err != nil {
		return err
	}
	pin, err := secret.New(MaxPIN + 2)
	if err != nil {
		return err
	}
	defer pin.Wipe()
	if err = p.show(p.text["SETPROMPT"] + " "); err == nil {
		err = p.line(pin)
	}
	restore := uint(unix.TCSETS)
	if err != nil {
		restore = unix.TCSETSF // no other program gets the rest of the keys
	}
	err = errors.Join(err, unix.IoctlSetTermios(int(p.tty.Fd()), restore, before))
	_, _ = p.tty.WriteString("\n")
	if err != nil {
		return unjoined(err)
	}
	return p.send(pin)
}

// unjoined returns the *pinentryError in err, if there is one, and err otherwise.
func unjoined(err error) error {
	if perr, ok := errors.AsType[*pinentryError](err); ok {
		return perr
	}
	return err
}

// send writes a PIN as data, with each byte escaped. The bytes stay in locked memory.
func (p *linePrompt) send(pin *secret.Secret) error {
	const hex = "0123456789ABCDEF"
	line, err := secret.New(2 + 3*(MaxPIN+2) + 1)
	if err != nil {
		return err
	}
	defer line.Wipe()
	b := line.Buffer()
	n := copy(b, "D ")
	for _, c := range pin.Bytes() {
		b[n], b[n+1], b[n+2] = '%', hex[c>>4], hex[c&15]
		n += 3
	}
	b[n] = '\n'
	line.SetLen(n + 1)
	_, err = p.out.Write(line.Bytes())
	return err
}

// confirm asks for yes or no, or for Enter.
func (p *linePrompt) confirm(one bool) error {
	ok, cancel := button(p.text["SETOK"], "Yes"), button(p.text["SETCANCEL"], "No")
	question := fmt.Sprintf("%s (y), %s (n)? ", ok, cancel)
	if one {
		question = "Press Enter. "
	}
	answer, err := secret.New(MaxPIN + 2)
	if err != nil {
		return err
	}
	defer answer.Wipe()
	if err := unix.IoctlSetInt(int(p.tty.Fd()), unix.TCFLSH, unix.TCIFLUSH); err != nil {
		return err
	}
	for range linePromptWrong {
		if err := p.show(question); err != nil {
			return err
		}
		answer.SetLen(0)
		if err := p.line(answer); err != nil {
			return err
		}
		given := bytes.TrimSpace(answer.Bytes())
		switch {
		case one, bytes.EqualFold(given, []byte("y")), bytes.EqualFold(given, []byte("yes")):
			return nil
		case bytes.EqualFold(given, []byte("n")), bytes.EqualFold(given, []byte("no")):
			return &pinentryError{linePromptCancelled, "Operation cancelled"}
		}
	}
	return &pinentryError{linePromptCancelled, "Operation cancelled"}
}

// button returns the text of a button without its marks.
func button(text, usual string) string {
	if text == "" {
		return usual
	}
	const double = "\x00"
	text = strings.ReplaceAll(text, "__", double)
	return strings.ReplaceAll(strings.ReplaceAll(text, "_", ""), double, "_")
}

// show writes the texts of the question, and the line for the answer.
func (p *linePrompt) show(question string) error {
	prompt := Prompt{Description: p.text["SETDESC"], Error: p.text["SETERROR"]}
	// The cursor may be anywhere in a line.
	_, err := p.tty.WriteString("\r\n" + strings.ReplaceAll(prompt.withError(), "\n", "\r\n") + "\r\n" + question)
	return err
}

// line reads a line without its end. The error is a *pinentryError at the end of the file, or when
// SETTIMEOUT is over.
func (p *linePrompt) line(to *secret.Secret) error {
	wait := -1
	if s, err := strconv.Atoi(p.text["SETTIMEOUT"]); err == nil && s > 0 && s <= maxSeconds {
		wait = s
	}
	end := time.Now().Add(time.Duration(wait) * time.Second)
	b := to.Buffer()
	for n := 0; n < len(b); {
		left := -1
		if wait > 0 {
			left = max(0, int(time.Until(end).Milliseconds()))
		}
		fds := []unix.PollFd{{Fd: int32(p.tty.Fd()), Events: unix.POLLIN}, {Fd: int32(p.in.Fd())}}
		ready, err := unix.Poll(fds, left)
		switch {
		case err == unix.EINTR:
			continue
		case err != nil:
			return err
		case ready == 0:
			return &pinentryError{linePromptTimeout, "Timeout"}
		case fds[1].Revents != 0:
			return errors.New("the agent is gone")
		}
		got, err := unix.Read(int(p.tty.Fd()), b[n:n+1])
		switch {
		case err == unix.EINTR || err == unix.EAGAIN:
			continue
		case err != nil:
			return err
		case got == 0: // Ctrl-D
			return &pinentryError{linePromptCancelled, "Operation cancelled"}
		case b[n] == '\n' || b[n] == '\r':
			to.SetLen(n)
			return nil
		}
		n++
	}
	return fmt.Errorf("the line has more than %d bytes", MaxPIN)
}
