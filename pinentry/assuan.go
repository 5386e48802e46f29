package pinentry

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"slices"
	"strconv"
	"strings"
	"time"

	"p11-agent/pinentry/plain"
	"p11-agent/pinentry/secret"
)

// The limits of a conversation with pinentry.
const (
	// maxLine is the most bytes of a line, its end included (libassuan manual,
	// "Client requests": 1000 octets). Pinentry exits on a longer one.
	maxLine = 1000
	// maxLines is how many lines an answer may have. Pinentry sends a line for the PIN, a
	// line for the end, and a few comments and states.
	maxLines = 200
	// maxErrorText is how much of an error's text is kept.
	maxErrorText = 200
	// defaultPatience is how long pinentry may take for its work between two questions,
	// which needs no person.
	defaultPatience = 20 * time.Second
)

// testOnlyPatience replaces defaultPatience in tests of programs that do not answer.
var testOnlyPatience time.Duration

func patience() time.Duration {
	if testOnlyPatience > 0 {
		return testOnlyPatience
	}
	return defaultPatience
}

// Error codes of libgpg-error (err-codes.h).
const (
	codeTimeout        = 62
	codeCanceled       = 99
	codeNotConfirmed   = 114
	codeLocaleProblem  = 166
	codeFullyCanceled  = 198
	codeUnknownCommand = 275
	codeWindowTooSmall = 301
)

// The mistakes of a program. No error quotes the program, which might have sent the PIN.
var (
	errMalformed = errors.New("sent a malformed line")
	errLongLine  = fmt.Errorf("sent a line of more than %d bytes", maxLine)
	errEndless   = fmt.Errorf("sent more than %d lines for an answer", maxLines)
	errAhead     = errors.New("answered before the question")
	errInquiry   = errors.New("answered with a question")
	errData      = errors.New("sent data that was not asked for")
	errSilent    = errors.New("does not answer")
	errNeeded    = errors.New("the question cannot be asked without it")
	errTooLong   = fmt.Errorf("the answer has more than %d bytes", MaxPIN)
)

// A pinentryError is an ERR line.
type pinentryError struct {
	number uint32 // of libgpg-error: source << 24 | code
	text   string
}

// code is the number without its source. Programs have different sources.
func (e *pinentryError) code() int { return int(e.number & 0xffff) }

func (e *pinentryError) Error() string {
	if e.text == "" {
		return fmt.Sprintf("error %d", e.number)
	}
	return fmt.Sprintf("%s (error %d)", e.text, e.number)
}

// Kinds of lines a server sends (libassuan manual, "Server responses").
type kind int

const (
	kindOK kind = iota
	kindERR
	kindData
	kindStatus // and comments
	kindInquire
)

// reply is one line of a server.
type reply struct {
	kind kind
	data []byte        // kindData: decoded, in the line's own memory
	err  pinentryError // kindERR
}

// parseReply parses a line without its end. It decodes data in place.
func parseReply(line []byte) (reply, error) {
	word, rest, _ := bytes.Cut(line, []byte(" "))
	switch {
	case bytes.Equal(word, []byte("OK")):
		return reply{kind: kindOK}, nil
	case bytes.Equal(word, []byte("ERR")):
		number, text, _ := bytes.Cut(rest, []byte(" "))
		n, ok := parseNumber(number)
		if !ok {
			return reply{}, errMalformed
		}
		text = text[:min(len(text), maxErrorText)]
		return reply{kind: kindERR, err: pinentryError{n, plain.Line(string(text))}}, nil
	case bytes.Equal(word, []byte("D")):
		data, err := unescape(rest)
		return reply{kind: kindData, data: data}, err
	case bytes.Equal(word, []byte("S")), len(line) > 0 && line[0] == '#':
		return reply{kind: kindStatus}, nil
	case bytes.Equal(word, []byte("INQUIRE")):
		return reply{kind: kindInquire}, nil
	}
	return reply{}, errMalformed
}

// parseNumber reads a decimal number of 32 bits. The errors of strconv would quote the line.
func parseNumber(b []byte) (uint32, bool) {
	if len(b) == 0 || len(b) > 10 {
		return 0, false
	}
	var n uint64
	for _, c := range b {
		if c < '0' || c > '9' {
			return 0, false
		}
		n = n*10 + uint64(c-'0')
	}
	return uint32(n), n>>32 == 0
}

// A conn speaks with a pinentry process. One goroutine uses it at a time.
type conn struct {
	*child
	p     *Pinentry
	place Place
	title string // the name of the process in errors
	ctype string // as the process knows it
	// flavor is what pinentry calls its kind: see Probed.Flavor. It is known once asked
	// is set.
	flavor string
	asked  bool
	word   string // the last command

	lines lineReader
}

// A lineReader cuts the output of pinentry into lines. The lines stay in locked memory. lineReader
// overwrites them after use.
type lineReader struct {
	r io.Reader
	// buf has room for more than a line. buf[start:end] was read and is not used yet.
	buf        *secret.Secret
	start, end int
}

func newLineReader(r io.Reader) (lineReader, error) {
	buf, err := secret.New(4096)
	return lineReader{r: r, buf: buf}, err
}

// next returns the next line without its end. The line shares the reader's memory until the next
// call. The errors are those of r, and errLongLine.
func (l *lineReader) next() ([]byte, error) {
	b := l.buf.Buffer()
	l.forget()
	for scanned := l.start; ; {
		if i := bytes.IndexByte(b[scanned:l.end], '\n'); i >= 0 {
			line := b[l.start : scanned+i]
			l.start = scanned + i + 1
			if len(line)+1 > maxLine {
				return nil, errLongLine
			}
			return bytes.TrimSuffix(line, []byte("\r")), nil
		}
		if l.end-l.start >= maxLine {
			return nil, errLongLine
		}
		if l.start > 0 {
			l.end = copy(b, b[l.start:l.end])
			secret.Wipe(b[l.end:])
			l.start = 0
		}
		scanned = l.end
		n, err := l.r.Read(b[l.end:])
		l.end += n
		if n == 0 && err != nil {
			return nil, err
		}
	}
}

// forget overwrites the used lines.
func (l *lineReader) forget() { secret.Wipe(l.buf.Buffer()[:l.start]) }

// ahead tells whether unused bytes were read.
func (l *lineReader) ahead() bool { return l.start != l.end }

// dial starts a pinentry and tells it about the place. argv is empty, or has the name of the
// program and its arguments.
func dial(ctx context.Context, p *Pinentry, title, file string, argv []string, place Place) (prompter, error) {
	env := p.environment(place)
	for _, v := range env {
		if strings.ContainsRune(v, 0) {
			return nil, &cannotAskError{fmt.Errorf("%s: the place to ask at has a zero byte in its description", title)}
		}
	}
	child, err := run(file, argv, env, place.TTY)
	if err != nil {
		return nil, &cannotAskError{fmt.Errorf("%s: %w", title, err)}
	}
	c := &conn{child: child, p: p, place: place, title: title, ctype: place.ctype()}
	if c.lines, err = newLineReader(child.out); err == nil {
		err = c.promptly(ctx, c.hello)
	}
	if err != nil {
		c.end()
		c.close()
		return nil, err
	}
	return c, nil
}

// promptly calls do, which needs no person, within ctx and within the patience for pinentry.
func (c *conn) promptly(ctx context.Context, do func() error) error {
	limited, cancel := context.WithTimeout(ctx, patience())
	defer cancel()
	release := c.guard(limited)
	err := do()
	late := release() != nil
	switch {
	case ctx.Err() != nil:
		c.end()
		return ended(ctx)
	case late:
		err = fmt.Errorf("%w within %v", errSilent, patience())
		if c.word != "" {
			err = fmt.Errorf("%w (to %s)", err, c.word)
		}
	}
	if err != nil {
		return &cannotAskError{c.explain(err)}
	}
	return nil
}

// explain ends pinentry and returns why it was of no use.
func (c *conn) explain(err error) error {
	c.end()
	return c.blame(fmt.Errorf("%s: %w", c.title, err))
}

// hello reads the greeting and sends the options.
func (c *conn) hello() error {
	if err := c.answer(nil); err != nil {
		return err
	}
	grab := "grab"
	if c.p.settings().noGrab {
		grab = "no-grab"
	}
	for _, o := range []struct{ name, value string }{
		{grab, ""},
		{"ttyname", c.place.ttyName()},
		{"ttytype", c.place.TTYType},
		{"lc-ctype", c.ctype},
		{"lc-messages", c.place.Locale},
		{"display", c.place.Display},
	} {
		if o.value == "" && o.name != grab {
			continue
		}
		if err := c.option(o.name, o.value); err != nil {
			return err
		}
	}
	return nil
}

// option sets an option. An option that a pinentry does not know is not an error.
func (c *conn) option(name, value string) error {
	line := "OPTION " + name
	if value != "" {
		line += "=" + value
	}
	// Pinentry does not decode values, so a newline cannot be escaped.
	if len(line) < maxLine && plain.Line(value) != value {
		return fmt.Errorf("%s %q of the place to ask at does not print", name, value)
	}
	err := c.command(line, nil)
	if _, ok := errors.AsType[*pinentryError](err); ok {
		return nil
	}
	return err
}

// command sends a line and reads the answer. Data of the answer goes to pin.
func (c *conn) command(line string, pin *secret.Secret) error {
	if len(line) >= maxLine {
		return fmt.Errorf("a line of %d bytes is too long for pinentry", len(line)+1)
	}
	c.word, _, _ = strings.Cut(line, " ")
	if c.lines.ahead() {
		return errAhead // an old answer would pass for the answer to this question
	}
	if _, err := c.in.WriteString(line + "\n"); err != nil {
		return c.ended()
	}
	return c.answer(pin)
}

// answer reads up to OK (nil) or ERR (*pinentryError). It appends data to pin. Data is an error if
// pin is nil.
func (c *conn) answer(pin *secret.Secret) error {
	defer c.lines.forget()
	for range maxLines {
		line, err := c.lines.next()
		if err != nil {
			if err == errLongLine {
				return err
			}
			return c.ended()
		}
		r, err := parseReply(line)
		if err != nil {
			return err
		}
		switch r.kind {
		case kindOK:
			return nil
		case kindERR:
			return &r.err
		case kindData:
			if pin == nil {
				return errData
			}
			n := pin.Len()
			if n+len(r.data) > MaxPIN {
				return errTooLong
			}
			copy(pin.Buffer()[n:], r.data)
			pin.SetLen(n + len(r.data))
		case kindStatus:
		case kindInquire:
			return errInquiry
		}
	}
	return errEndless
}

// set sends a text for the dialogue, cut to the limit of a line. refused tells that pinentry does
// not take the text.
func (c *conn) set(command, text string, lines bool) (refused bool, err error) {
	if text == "" {
		return false, nil
	}
	shown := plain.Line(text)
	if lines {
		shown = plain.Lines(text)
	}
	line := appendEscaped([]byte(command+" "), shown, maxLine-1)
	err = c.command(string(line), nil)
	if _, ok := errors.AsType[*pinentryError](err); ok {
		return true, fmt.Errorf("%s: %w", command, err)
	}
	return false, err
}

// prepare sends a prompt. If pinentry refuses the description, prepare fails. A refused error text
// goes into the description. A refused third button is taken out of the prompt, as pinentry would
// show "no" in its place.
func (c *conn) prepare(prompt *Prompt) error {
	for _, s := range []struct {
		command, text string
		lines         bool
		without       func() error // runs if pinentry refuses the text; may be nil
	}{
		{command: "SETTITLE", text: prompt.Title},
		{command: "SETDESC", text: prompt.Description, lines: true, without: func() error { return errNeeded }},
		{command: "SETPROMPT", text: prompt.Label},
		{command: "SETERROR", text: prompt.Error, lines: true, without: func() error {
			_, err := c.set("SETDESC", prompt.withError(), true)
			return err
		}},
		{command: "SETOK", text: prompt.OK},
		{command: "SETCANCEL", text: prompt.Cancel},
		{command: "SETNOTOK", text: prompt.Other, without: func() error { prompt.Other = ""; return nil }},
		{command: "SETTIMEOUT", text: strconv.FormatInt(seconds(prompt.Timeout), 10)},
	} {
		refused, err := c.set(s.command, s.text, s.lines)
		if refused && s.without != nil {
			if more := s.without(); more != nil {
				return fmt.Errorf("%w: %w", err, more)
			}
		} else if err != nil && !refused {
			return err
		}
	}
	return nil
}

// put sends the command that shows the prompt, and waits for the person. over is the error of ctx
// when ctx has ended. Then the program has ended too.
func (c *conn) put(ctx context.Context, command string, pin *secret.Secret) (answer, over error) {
	release := c.guard(ctx)
	answer = c.command(command, pin)
	if perr, ok := errors.AsType[*pinentryError](answer); ok && command == "MESSAGE" && perr.code() == codeUnknownCommand {
		answer = c.command("CONFIRM --one-button", pin) // the same, for a program without MESSAGE
	}
	return answer, release()
}

// ask shows a prompt within ctx. The person's answer is the answer to the command that shows the
// prompt.
func (c *conn) ask(ctx context.Context, prompt Prompt, command string, pin *secret.Secret) error {
	c.tty.remember()
	if err := c.promptly(ctx, func() error { return c.prepare(&prompt) }); err != nil {
		return err
	}
	err, over := c.put(ctx, command, pin)
	if perr, ok := errors.AsType[*pinentryError](err); ok && over == nil && perr.code() == codeLocaleProblem && c.ctype != fallbackCtype {
		if again := c.withFallback(ctx, &prompt); again != nil {
			if _, ok := errors.AsType[*cannotAskError](again); !ok {
				return again
			}
			return &cannotAskError{fmt.Errorf("%s: %w; then %w", c.title, err, again)}
		}
		err, over = c.put(ctx, command, pin)
	}
	switch {
	case over != nil:
		return over
	case err == nil:
		return nil
	}
	if perr, ok := errors.AsType[*pinentryError](err); ok {
		switch perr.code() {
		case codeTimeout:
			return ErrTimeout
		case codeNotConfirmed:
			if prompt.Other != "" {
				return errOther
			}
			return ErrCancelled
		case codeCanceled, codeFullyCanceled:
			return ErrCancelled
		}
	}
	err = c.explain(err)
	if pin.Len() > 0 || errors.Is(err, errTooLong) {
		return err // the person answered, but not well
	}
	return &cannotAskError{err}
}

// withFallback sends the prompt again, with a locale that is installed here. The locale of the
// place is not. Pinentry has shown nothing yet.
func (c *conn) withFallback(ctx context.Context, prompt *Prompt) error {
	c.ctype = fallbackCtype
	return c.promptly(ctx, func() error {
		if err := c.command("RESET", nil); err != nil {
			return err
		}
		if err := c.option("lc-ctype", c.ctype); err != nil {
			return err
		}
		return c.prepare(prompt)
	})
}

func (c *conn) pin(ctx context.Context, prompt Prompt) (*secret.Secret, error) {
	pin, err := secret.New(MaxPIN)
	if err != nil {
		return nil, err
	}
	prompt.Other = ""
	if err := c.ask(ctx, prompt, "GETPIN", pin); err != nil {
		pin.Wipe()
		return nil, err
	}
	return pin, nil
}

// threeButtons are the flavors of GnuPG's pinentry 1.2.1 that show a third button (SETNOTOK).
// pinentry-gnome3 does not. Other programs may answer for their second button as these do for the
// third. Then "no" would pass for something else.
var threeButtons = []string{"curses", "tty", "gtk2", "qt", "qt5"}

// learnFlavor asks pinentry once for its flavor. A pinentry that does not know the question has
// none.
func (c *conn) learnFlavor(ctx context.Context) error {
	if c.asked {
		return nil
	}
	answer, err := secret.New(MaxPIN) // the flavor is no secret: answers are read so
	if err != nil {
		return err
	}
	defer answer.Wipe()
	return c.promptly(ctx, func() error {
		err := c.command("GETINFO flavor", answer)
		if _, ok := errors.AsType[*pinentryError](err); ok {
			err = nil
			answer.SetLen(0)
		}
		c.asked = err == nil
		c.flavor = plain.Line(string(answer.Bytes()))
		return err
	})
}

// asksWith returns what pinentry asks with here: the end of a flavor such as "gtk2:curses".
func (c *conn) asksWith() string { return c.flavor[strings.LastIndexByte(c.flavor, ':')+1:] }

func (c *conn) confirm(ctx context.Context, prompt Prompt) error {
	prompt.Label = ""
	if prompt.Other != "" {
		if err := c.learnFlavor(ctx); err != nil {
			return err
		}
		if !slices.Contains(threeButtons, c.asksWith()) {
			prompt.Other = ""
		}
	}
	return c.ask(ctx, prompt, "CONFIRM", nil)
}

func (c *conn) message(ctx context.Context, prompt Prompt) error {
	prompt.Label, prompt.Cancel, prompt.Other = "", "", ""
	return c.ask(ctx, prompt, "MESSAGE", nil)
}

// again has pinentry forget the last prompt. Its options stay.
func (c *conn) again(ctx context.Context) error {
	return c.promptly(ctx, func() error { return c.command("RESET", nil) })
}

func (c *conn) close() {
	// Pinentry leaves at BYE and at the end of its input. A pinentry that waits for the
	// person reads neither, but it was stopped before.
	_ = c.in.SetWriteDeadline(time.Now().Add(grace()))
	_, _ = c.in.WriteString("BYE\n")
	_ = c.in.Close()
	select {
	case <-c.done:
	case <-time.After(grace()):
		c.stop()
	}
	c.child.close()
	c.lines.buf.Wipe()
}
