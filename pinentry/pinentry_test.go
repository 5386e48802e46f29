package pinentry

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync/atomic"
	"syscall"
	"testing"
	"testing/synctest"
	"time"

	"golang.org/x/sys/unix"

	"p11-agent/agent/door/doortest"
	"p11-agent/agent/peer/proctest"
	"p11-agent/agent/peer/terminaltest"
	"p11-agent/pinentry/secret"
	"p11-agent/pinentry/secret/secrettest"
)

var scenarios map[string]scenario

func init() {
	defer commandScenarios()
	scenarios = map[string]scenario{
		"ok": {},

		// PINs.
		"pin-plain":      says("D 123456\nOK\n"),
		"pin-percent":    says("D 12%2534%0A%0D\nOK\n"),
		"pin-lower":      says("D %c3%bc%0a%2f\nOK\n"),
		"pin-split":      says("D 1234\nD 5678\nD 9\nOK\n"),
		"pin-utf8":       says("D grüße\nOK\n"),
		"pin-blanks":     says("D  1 2 \nOK\n"),
		"pin-zero-byte":  says("D 12%0034\nOK\n"),
		"pin-crlf":       says("D 123456\r\nOK\r\n"),
		"pin-chatter":    says("# comment\nS PASSWORD_FROM_CACHE\nD 123456\nS BUTTON_INFO close\nOK got it\n"),
		"pin-longest":    says("D " + strings.Repeat("x", MaxPIN) + "\nOK\n"),
		"pin-escaped":    says("D " + strings.Repeat("%25", MaxPIN) + "\nOK\n"),
		"pin-too-long":   says("D " + strings.Repeat("x", MaxPIN) + "\nD x\nOK\n"),
		"pin-empty":      says("OK\n"),
		"pin-empty-data": says("D \nOK\n"),
		"pin-in-bits": {ask: func(f *fake) {
			for _, c := range []byte("D 123456\nOK\n") {
				f.say("%c", c)
				_ = os.Stdout.Sync()
			}
		}},
		"pin-then-error": says("D 1234\nERR 83886179 Operation cancelled\n"),
		"pin-then-exit":  {ask: func(f *fake) { f.say("D 1234\n"); exit(0) }},
		"pin-inverted": {ask: func(f *fake) {
			// The test's own memory must not hold the PIN, so the test passes its inverse.
			hidden, _ := os.ReadFile(filepath.Join(f.dir, "inverted"))
			f.say("D %s\nOK\n", secrettest.Invert(hidden))
		}},

		// Programs that do not answer the question.
		"cancelled":       says("ERR 83886179 Operation cancelled <Pinentry>\n"),
		"cancelled-bare":  says("ERR 99\n"),
		"cancelled-gnome": says("ERR 67108963 cancelled\n"), // another source
		"closed": {ask: func(f *fake) {
			f.say("ERR 83886278 Fully cancelled\n")
			exit(0)
		}},
		"not-confirmed": says("ERR 83886194 Not confirmed <Pinentry>\n"),
		"timeout":       says("ERR 83886142 Timeout <Pinentry>\n"),
		"never":         {ask: func(f *fake) { f.hang() }},
		"stubborn":      {ask: func(f *fake) { f.ignoreTERM(); f.hang() }},
		"stubborn-late": {other: func(f *fake, word, _ string) bool {
			if word == "RESET" {
				f.ignoreTERM()
				f.hang()
			}
			return false
		}},

		// A third button.
		"three-ok":     flavour("D curses\nOK\n", "OK\n"),
		"three-cancel": flavour("D curses\nOK\n", "S BUTTON_INFO close\nERR 83886179 Operation cancelled <Pinentry>\n"),
		"three-other":  flavour("D gtk2:curses\nOK\n", "ERR 83886194 Not confirmed <Pinentry>\n"),
		"three-split":  flavour("D q\nD t\nOK\n", "ERR 83886194 Not confirmed <Pinentry>\n"),
		"two-gnome":    flavour("D gnome3\nOK\n", "ERR 83886194 Not confirmed <Pinentry>\n"),
		"two-unnamed":  flavour("ERR 83886355 Unknown command\n", "ERR 83886194 Not confirmed <Pinentry>\n"),
		"two-silent":   flavour("OK\n", "ERR 83886194 Not confirmed <Pinentry>\n"),
		"two-strange":  flavour("D curses\nERR 83886355 no\n", "ERR 83886194 Not confirmed <Pinentry>\n"),
		"two-ok":       flavour("D gnome3\nOK\n", "OK\n"),
		"three-mad":    flavour("D "+strings.Repeat("x", MaxPIN+1)+"\nOK\n", "OK\n"),
		"three-late":   flavour("D curses\nOK\n", "ERR 83886142 Timeout <Pinentry>\n"),

		// Programs that cannot ask.
		"exits":         {start: func(f *fake) { f.die("cannot open display: :7\x1b[2J\n") }},
		"refuses":       {start: func(f *fake) { f.say("ERR 67109133 no access\n"); exit(0) }},
		"no-pinentry":   {start: func(f *fake) { f.say("Usage: foo [options] 123456\n") }},
		"binary":        {start: func(f *fake) { f.say("\x00\xff\xfe\n") }},
		"empty-line":    {start: func(f *fake) { f.say("\n") }},
		"long-greeting": {start: func(f *fake) { f.say("OK %s\n", strings.Repeat("x", 1000)) }},
		"no-tty":        says("S ERROR curses.isatty 83918950\nERR 83918950 Inappropriate ioctl for device <Pinentry>\n"),
		"exits-asked":   {ask: func(f *fake) { f.die("Qt: could not connect to display\n") }},
		"closes-asked":  {ask: func(f *fake) { _ = os.Stdout.Close(); f.hang() }},
		"long-line":     {ask: func(f *fake) { f.say("D %s\nOK\n", strings.Repeat("x", 1000)) }},
		"endless-line":  {ask: func(f *fake) { endless("x") }},
		"endless-lines": {ask: func(f *fake) { endless("S x\n") }},
		"garbage":       says("123456\nOK\n"),
		"bad-error":     says("ERR one 123456\n"),
		"huge-error":    says("ERR 4294967395 123456\n"),
		"bad-escape":    says("D 12%4\nOK\n"),
		"inquire":       says("INQUIRE QUALITY 123456\n"),
		"okay":          says("OKAY\n"),
		"ahead":         {other: func(f *fake, word, _ string) bool { f.say("OK\nOK\n"); return true }},
		"data-unasked":  {other: func(f *fake, word, _ string) bool { f.say("D 123456\nOK\n"); return true }},
		"no-description": {other: func(f *fake, word, _ string) bool {
			return word == "SETDESC" && f.sayOK("ERR 83886355 Unknown command\n")
		}},

		// Programs that refuse commands.
		"minimal": {other: func(f *fake, word, _ string) bool {
			return word != "SETDESC" && word != "RESET" &&
				f.sayOK("ERR 83886355 Unknown command\n")
		}, ask: func(f *fake) { f.say("D 123456\nOK\n") }},

		// One process, several questions.
		"wrong-then-right": {ask: func(f *fake) { f.say("D pin%d\nOK\n", f.asks) }},
		"dies-when-idle": {ask: func(f *fake) {
			f.say("D pin%d\nOK\n", f.asks)
			exit(0)
		}},
		"no-reset": {
			ask:   func(f *fake) { f.say("D pin%d\nOK\n", f.asks) },
			other: func(f *fake, word, _ string) bool { return word == "RESET" && f.sayOK("ERR 275 Unknown command\n") },
		},
		"locale": {
			ask: func(f *fake) {
				if f.asks == 1 {
					f.say("S ERROR curses.dialog_create_copy 83886246\nERR 83886246 A locale function failed <Pinentry>\n")
				} else {
					f.say("D 123456\nOK\n")
				}
			},
		},

		// Other programs may ask.
		"dead-display": {
			start: func(f *fake) {
				if os.Getenv("DISPLAY") != "" {
					f.die("could not connect to display")
				}
			},
			ask: func(f *fake) { f.say("D 123456\nOK\n") },
		},
		"small-window": {ask: func(f *fake) {
			if filepath.Base(os.Args[0]) == "pinentry-tty" {
				f.say("D 123456\nOK\n")
			} else {
				f.say("ERR 83886381 Screen or window too small <Pinentry>\n")
			}
		}},
		"askpass-pin":       onlyAskpass(prints("123456\n", 0)),
		"askpass-crlf":      onlyAskpass(prints("123456\r\n", 0)),
		"askpass-no-lf":     onlyAskpass(prints("123456", 0)),
		"askpass-blank":     onlyAskpass(prints(" 1 \n", 0)),
		"askpass-longest":   onlyAskpass(prints(strings.Repeat("x", MaxPIN)+"\r\n", 0)),
		"askpass-too-long":  onlyAskpass(prints(strings.Repeat("x", MaxPIN+1), 0)),
		"askpass-lines":     onlyAskpass(prints("1234\n5678\n", 0)),
		"askpass-empty":     onlyAskpass(prints("\n", 0)),
		"askpass-silent":    onlyAskpass(prints("", 0)),
		"askpass-yes":       onlyAskpass(prints("yes\n", 0)),
		"askpass-no":        onlyAskpass(prints("no\n", 0)),
		"askpass-cancelled": onlyAskpass(func(f *fake) { fmt.Fprint(os.Stderr, "no \x1b display\n"); exit(1) }),
		"askpass-half":      onlyAskpass(func(f *fake) { f.say("1234"); exit(255) }),
		"askpass-never":     onlyAskpass(func(f *fake) { f.hang() }),
		"askpass-endless":   onlyAskpass(func(f *fake) { endless("y\n") }),
		"askpass-crash":     onlyAskpass(func(f *fake) { _ = syscall.Kill(os.Getpid(), syscall.SIGKILL) }),

		// A program that leaves another program behind.
		"leaves-child": {ask: func(f *fake) { f.spawn(false); f.hang() }},
		"leaves-orphan": {ask: func(f *fake) {
			f.spawn(true)
			f.hang()
		}},
		"orphan": {start: func(f *fake) { f.ignoreTERM(); f.hang() }},

		// A program that notices when another one runs at the same time.
		"exclusive": {ask: func(f *fake) {
			lock, err := os.OpenFile(filepath.Join(f.dir, "lock"), os.O_CREATE|os.O_EXCL, 0o600)
			if err != nil {
				f.say("ERR 1 two at once\n")
				return
			}
			time.Sleep(20 * time.Millisecond) // the person reads
			_ = errors.Join(lock.Close(), os.Remove(lock.Name()))
			f.say("OK\n")
		}},
	}
}

// flavour returns a scenario that reports its flavor, and answers questions.
func flavour(name, answer string) scenario {
	return scenario{
		other: func(f *fake, word, _ string) bool {
			if word == "GETINFO" {
				f.say("%s", name)
			}
			return word == "GETINFO"
		},
		ask: func(f *fake) { f.say("%s", answer) },
	}
}

func (f *fake) sayOK(line string) bool { f.say("%s", line); return true }

// spawn starts another fake, which holds the pipes of this fake.
func (f *fake) spawn(escape bool) {
	cmd := exec.Command(os.Args[0])
	cmd.Env = append(os.Environ(), "PINENTRY_USER_DATA="+fakeMark+" orphan "+f.dir)
	cmd.Stdin, cmd.Stdout, cmd.Stderr = os.Stdin, os.Stdout, os.Stderr
	cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: escape}
	if err := cmd.Start(); err != nil {
		panic(err)
	}
}

func endless(s string) {
	s = strings.Repeat(s, 1000)
	for {
		if _, err := os.Stdout.WriteString(s); err != nil {
			exit(0)
		}
	}
}

// onlyAskpass returns a scenario with an askpass program, and a pinentry without a terminal.
func onlyAskpass(do func(*fake)) scenario {
	return scenario{
		ask:     func(f *fake) { f.say("ERR 83918950 Inappropriate ioctl for device <Pinentry>\n") },
		askpass: do,
	}
}

func TestPIN(t *testing.T) {
	for scenario, want := range map[string]string{
		"pin-plain":       "123456",
		"pin-percent":     "12%34\n\r",
		"pin-lower":       "ü\n/",
		"pin-split":       "123456789",
		"pin-utf8":        "grüße",
		"pin-blanks":      " 1 2 ",
		"pin-zero-byte":   "12\x0034",
		"pin-crlf":        "123456",
		"pin-chatter":     "123456",
		"pin-longest":     strings.Repeat("x", MaxPIN),
		"pin-escaped":     strings.Repeat("%", MaxPIN),
		"pin-in-bits":     "123456",
		"minimal":         "123456",
		"askpass-pin":     "123456",
		"askpass-crlf":    "123456",
		"askpass-no-lf":   "123456",
		"askpass-blank":   " 1 ",
		"askpass-longest": strings.Repeat("x", MaxPIN),
	} {
		t.Run(scenario, func(t *testing.T) {
			s := newStage(t, scenario)
			s.withAskpass(scenario)
			pin, err := s.open(t.Context()).PIN(t.Context(), Prompt{Description: "Card"})
			if err != nil {
				t.Fatal(err)
			}
			defer pin.Wipe()
			if got := string(pin.Bytes()); got != want {
				t.Errorf("the PIN is %q, not %q", got, want)
			}
		})
	}
}

func TestNoPIN(t *testing.T) {
	anyError := errors.New("any")
	for scenario, want := range map[string]error{
		"cancelled":         ErrCancelled,
		"cancelled-bare":    ErrCancelled,
		"cancelled-gnome":   ErrCancelled,
		"closed":            ErrCancelled,
		"not-confirmed":     ErrCancelled,
		"timeout":           ErrTimeout,
		"pin-empty":         ErrEmpty,
		"pin-empty-data":    ErrEmpty,
		"pin-too-long":      errTooLong,
		"pin-then-error":    ErrCancelled,
		"pin-then-exit":     errEnded,
		"askpass-cancelled": ErrCancelled,
		"askpass-half":      ErrCancelled,
		"askpass-empty":     ErrEmpty,
		"askpass-silent":    ErrEmpty,
		"askpass-too-long":  errTooLong,
		"askpass-endless":   errTooLong,
		"askpass-lines":     anyError,
		"askpass-crash":     ErrNoPrompt,
	} {
		t.Run(scenario, func(t *testing.T) {
			s := newStage(t, scenario)
			s.withAskpass(scenario)
			pin, err := s.open(t.Context()).PIN(t.Context(), Prompt{})
			if err == nil || pin != nil || (want != anyError && !errors.Is(err, want)) {
				t.Errorf("%v, a PIN: %t; want %v", err, pin != nil, want)
			}
			if want != ErrNoPrompt && errors.Is(err, ErrNoPrompt) {
				t.Errorf("there was an answer, but: %v", err)
			}
			noSecret(t, "the error", fmt.Sprint(err))
		})
	}
}

// noSecret looks for the PINs of the fakes in a text.
func noSecret(t *testing.T, where, text string) {
	t.Helper()
	for _, pin := range []string{"123456", "1234", "5678", "grüße", "pin1", "xxxx"} {
		if strings.Contains(text, pin) {
			t.Errorf("%s has the PIN in it: %s", where, text)
		}
	}
	if strings.ContainsAny(text, "\x1b\x00") {
		t.Errorf("%s has control characters in it: %q", where, text)
	}
}

func TestProgramsThatCannotAsk(t *testing.T) {
	for scenario, want := range map[string]string{
		"exits":          `ended without an answer (exit status 1), saying "cannot open display: :7\\x1b[2J"`,
		"refuses":        "no access (error 67109133)",
		"no-pinentry":    errMalformed.Error(),
		"binary":         errMalformed.Error(),
		"empty-line":     errMalformed.Error(),
		"long-greeting":  errLongLine.Error(),
		"no-tty":         "Inappropriate ioctl for device <Pinentry> (error 83918950)",
		"exits-asked":    `ended without an answer (exit status 1), saying "Qt: could not connect to display"`,
		"closes-asked":   errEnded.Error(),
		"long-line":      errLongLine.Error(),
		"endless-line":   errLongLine.Error(),
		"endless-lines":  errEndless.Error(),
		"garbage":        errMalformed.Error(),
		"bad-error":      errMalformed.Error(),
		"huge-error":     errMalformed.Error(),
		"bad-escape":     errMalformed.Error(),
		"okay":           errMalformed.Error(),
		"inquire":        errInquiry.Error(),
		"ahead":          errAhead.Error(),
		"data-unasked":   errData.Error(),
		"no-description": "SETDESC: Unknown command (error 83886355)",
	} {
		t.Run(scenario, func(t *testing.T) {
			s := newStage(t, scenario)
			logged := s.logs()
			d, err := s.Open(t.Context(), s.place)
			if err == nil {
				defer d.Close()
				_, err = d.PIN(t.Context(), Prompt{Description: "x"})
			}
			if !errors.Is(err, ErrNoPrompt) || !strings.Contains(err.Error(), "pinentry: "+want) {
				t.Errorf("got %v\nwant %s", err, want)
			}
			noSecret(t, "the error", err.Error())
			noSecret(t, "the log", logged())
		})
	}
}

func TestProgramsThatAreNotThere(t *testing.T) {
	noLeaks(t)
	dir := doortest.Dir(t)
	file := filepath.Join(dir, "no-program")
	if err := os.WriteFile(file, []byte("\x7fELF"), 0o755); err != nil {
		t.Fatal(err)
	}
	for name, p := range map[string]*Pinentry{
		"nothing at all":       {},
		"not in PATH":          {Path: "/nonexistent:relative:" + dir},
		"no such file":         {Program: "/nonexistent/pinentry"},
		"a relative path":      {Program: "./pinentry", Path: dir},
		"not a program":        {Program: file},
		"not a program, named": {Program: "no-program", Path: dir},
		"a directory":          {Program: dir},
		"no askpass":           {Askpass: "/nonexistent/askpass"},
	} {
		d, err := p.Open(t.Context(), Place{Askpass: name == "no askpass"})
		if name == "no askpass" && err == nil { // it is looked for when it is needed
			_, err = d.Confirm(t.Context(), Prompt{})
			_ = d.Close()
		}
		if !errors.Is(err, ErrNoPrompt) {
			t.Errorf("%s: %v", name, err)
		}
	}
}

func TestConfirm(t *testing.T) {
	for scenario, want := range map[string]struct {
		yes bool
		err error
	}{
		"ok":                {yes: true},
		"cancelled":         {},
		"not-confirmed":     {},
		"closed":            {},
		"timeout":           {err: ErrTimeout},
		"pin-plain":         {err: ErrNoPrompt}, // data is no answer to a question
		"askpass-silent":    {yes: true},
		"askpass-empty":     {yes: true},
		"askpass-yes":       {yes: true},
		"askpass-no":        {},
		"askpass-pin":       {},
		"askpass-cancelled": {},
		"askpass-crash":     {err: ErrNoPrompt},
		"askpass-endless":   {err: errTooLong},
	} {
		t.Run(scenario, func(t *testing.T) {
			s := newStage(t, scenario)
			s.withAskpass(scenario)
			yes, err := s.open(t.Context()).Confirm(t.Context(), Prompt{Label: "not sent"})
			if yes != want.yes || !errors.Is(err, want.err) {
				t.Errorf("%t, %v; want %t, %v", yes, err, want.yes, want.err)
			}
		})
	}
}

// Choose shows a third button only if the program is known to have one. The button never
// counts as yes.
func TestChoose(t *testing.T) {
	for scenario, want := range map[string]struct {
		choice Choice
		shown  bool
		err    error
	}{
		"three-ok":          {ChoiceOK, true, nil},
		"three-cancel":      {ChoiceCancel, true, nil},
		"three-other":       {ChoiceOther, true, nil},
		"three-split":       {ChoiceOther, true, nil},
		"three-late":        {ChoiceCancel, true, ErrTimeout},
		"three-mad":         {ChoiceCancel, false, ErrNoPrompt},
		"two-gnome":         {ChoiceCancel, false, nil},
		"two-unnamed":       {ChoiceCancel, false, nil},
		"two-silent":        {ChoiceCancel, false, nil},
		"two-strange":       {ChoiceCancel, false, nil},
		"two-ok":            {ChoiceOK, false, nil},
		"closed":            {ChoiceCancel, false, nil},
		"askpass-yes":       {ChoiceOK, false, nil},
		"askpass-no":        {ChoiceCancel, false, nil},
		"askpass-cancelled": {ChoiceCancel, false, nil},
	} {
		t.Run(scenario, func(t *testing.T) {
			s := newStage(t, scenario)
			s.withAskpass(scenario)
			d := s.open(t.Context())
			prompt := Prompt{Description: "sure?", OK: "_Once", Other: "_Longer", Cancel: "_No"}
			for i := range 2 {
				choice, err := d.Choose(t.Context(), prompt)
				if choice != want.choice || !errors.Is(err, want.err) {
					t.Errorf("%d, %v; want %d, %v", choice, err, want.choice, want.err)
				}
				if scenario == "closed" || strings.HasPrefix(scenario, "askpass") || want.err == ErrNoPrompt {
					return // not one program
				}
				heard := s.heard()
				if shown := containsLine(heard, "SETNOTOK _Longer"); shown != want.shown {
					t.Errorf("a third button is shown: %t, want %t", shown, want.shown)
				}
				info := slices.DeleteFunc(heard, func(line string) bool { return line != "GETINFO flavor" })
				if len(info) != 1 {
					t.Errorf("question %d: %d times it was asked what it is", i, len(info))
				}
			}
			// A question for yes or no has no third button.
			if yes, err := d.Confirm(t.Context(), prompt); yes != (want.choice == ChoiceOK) || !errors.Is(err, want.err) {
				t.Errorf("confirm: %t, %v", yes, err)
			}
			if heard := s.heard(); len(slices.DeleteFunc(heard, func(l string) bool { return l != "SETNOTOK _Longer" })) > 2 {
				t.Error("a question for yes or no has a third button")
			}
		})
	}
}

func TestMessage(t *testing.T) {
	for scenario, want := range map[string]error{
		"ok":                nil,
		"cancelled":         ErrCancelled,
		"timeout":           ErrTimeout,
		"askpass-silent":    nil,
		"askpass-cancelled": ErrCancelled,
	} {
		t.Run(scenario, func(t *testing.T) {
			s := newStage(t, scenario)
			s.withAskpass(scenario)
			if err := s.open(t.Context()).Message(t.Context(), Prompt{Description: "type it on the reader"}); !errors.Is(err, want) {
				t.Errorf("%v, want %v", err, want)
			}
		})
	}
}

func TestPinentryOptions(t *testing.T) {
	s := newStage(t, "pin-plain")
	s.NoGrab = true
	_, s.place.TTY = terminaltest.New(t)
	s.place.TTYType = "xterm"
	s.place.Display, s.place.Locale = ":7", "de_DE.UTF-8"
	d := s.open(t.Context())
	ask := func(p Prompt) {
		t.Helper()
		pin, err := d.PIN(t.Context(), p)
		if err != nil {
			t.Fatal(err)
		}
		pin.Wipe()
	}
	ask(Prompt{
		Title:       "Title\nwith %25",
		Description: "line\r\nSETDESC injected\n100%\x1b[2J\xff\u202e ü",
		Label:       "PIN\t\nGETPIN",
		OK:          "_Yes", Cancel: "N_o",
		Timeout: 1500 * time.Millisecond,
	})
	ask(Prompt{Description: "again", Error: "wrong PIN\n2 tries left"})
	if _, err := d.Confirm(t.Context(), Prompt{Description: "sure?"}); !errors.Is(err, ErrNoPrompt) {
		t.Errorf("confirm: %v", err)
	}
	want := []string{
		"OPTION no-grab",
		"OPTION ttyname=/proc/self/fd/3",
		"OPTION ttytype=xterm",
		"OPTION lc-ctype=de_DE.UTF-8",
		"OPTION lc-messages=de_DE.UTF-8",
		"OPTION display=:7",
		"SETTITLE Title with %2525",
		`SETDESC line\x0d%0ASETDESC injected%0A100%25\x1b[2J�\u202e ü`,
		"SETPROMPT PIN  GETPIN",
		"SETOK _Yes",
		"SETCANCEL N_o",
		"SETTIMEOUT 2",
		"GETPIN",
		"RESET",
		"SETDESC again",
		"SETERROR wrong PIN%0A2 tries left",
		"SETTIMEOUT 0",
		"GETPIN",
		"RESET",
		"SETDESC sure?",
		"SETTIMEOUT 0",
		"CONFIRM",
	}
	if got := s.heard(); !slices.Equal(got, want) {
		t.Errorf("heard\n%s\nwant\n%s", strings.Join(got, "\n"), strings.Join(want, "\n"))
	}
}

func TestLongTextIsCut(t *testing.T) {
	for name, text := range map[string]string{
		"letters":    strings.Repeat("x", 5000),
		"two bytes":  strings.Repeat("ü", 2500),
		"four bytes": strings.Repeat("🔑", 2500),
		"percents":   strings.Repeat("%", 5000),
		"controls":   strings.Repeat("\x01", 5000),
		"invalid":    strings.Repeat("\xff", 5000),
		"newlines":   strings.Repeat("\n", 5000),
	} {
		t.Run(name, func(t *testing.T) {
			s := newStage(t, "ok")
			d := s.open(t.Context())
			yes, err := d.Confirm(t.Context(), Prompt{Title: text, Description: text, Error: text, OK: text})
			if err != nil || !yes {
				t.Fatalf("%t, %v", yes, err)
			}
			cut := 0
			for _, line := range s.heard() {
				if len(line)+1 > maxLine {
					t.Errorf("a line of %d bytes", len(line)+1)
				}
				if strings.HasSuffix(line, "…") {
					cut++
					if len(line) < maxLine-20 {
						t.Errorf("cut to %d bytes", len(line))
					}
				}
			}
			if cut != 4 {
				t.Errorf("%d texts end in an ellipsis, not 4", cut)
			}
		})
	}
}

func TestPlaceThatCannotBeSent(t *testing.T) {
	for name, change := range map[string]func(*Place){
		"newline":        func(p *Place) { p.TTYType = "xterm\nSETDESC injected" },
		"carriage":       func(p *Place) { p.Locale = "C\rBYE" },
		"too long":       func(p *Place) { p.TTYType = strings.Repeat("x", 1000) },
		"zero byte":      func(p *Place) { p.Display = ":0\x00" },
		"invalid":        func(p *Place) { p.TTYType = "\xff" },
		"reversed order": func(p *Place) { p.TTYType = "\u202e" },
	} {
		s := newStage(t, "ok")
		change(&s.place)
		if d, err := s.Open(t.Context(), s.place); !errors.Is(err, ErrNoPrompt) {
			t.Errorf("%s: %v", name, err)
			_ = d.Close()
		}
		for _, log := range s.files("log-") {
			if strings.Contains(log, "\nSETDESC") || strings.Contains(log, "\nBYE") && !strings.HasSuffix(log, "\nBYE\n") {
				t.Errorf("%s: an option became a command:\n%s", name, log)
			}
		}
	}
}

func TestWrongThenRight(t *testing.T) {
	s := newStage(t, "wrong-then-right")
	d := s.open(t.Context())
	for i, want := range []string{"pin1", "pin2", "pin3"} {
		pin, err := d.PIN(t.Context(), Prompt{Error: strings.Repeat("!", i)})
		if err != nil {
			t.Fatal(err)
		}
		if string(pin.Bytes()) != want {
			t.Errorf("answer %d is %q", i, pin.Bytes())
		}
		pin.Wipe()
	}
	heard := s.heard() // of one process
	if containsLine(heard, "SETERROR ") || !containsLine(heard, "SETERROR !") || !containsLine(heard, "SETERROR !!") {
		t.Errorf("heard %q", heard)
	}
}

func TestAnotherProcessWhenTheFirstIsGone(t *testing.T) {
	for _, scenario := range []string{"dies-when-idle", "no-reset"} {
		t.Run(scenario, func(t *testing.T) {
			s := newStage(t, scenario)
			d := s.open(t.Context())
			for range 3 {
				pin, err := d.PIN(t.Context(), Prompt{})
				if err != nil {
					t.Fatal(err)
				}
				if string(pin.Bytes()) != "pin1" {
					t.Errorf("the answer is %q", pin.Bytes())
				}
				pin.Wipe()
			}
			if n := len(s.files("log-")); n != 3 {
				t.Errorf("%d processes, not 3", n)
			}
		})
	}
}

func TestLocaleThatIsNotInstalled(t *testing.T) {
	t.Run("fallback fails", func(t *testing.T) {
		s := newStage(t, "locale")
		if pin, err := s.open(t.Context()).PIN(t.Context(), Prompt{}); !errors.Is(err, ErrNoPrompt) {
			t.Errorf("%v, %v", pin, err)
		}
	})
	s := newStage(t, "locale")
	s.place.Locale = "xx_YY.utf8@euro"
	pin, err := s.open(t.Context()).PIN(t.Context(), Prompt{Description: "grüße", Error: "falsch"})
	if err != nil {
		t.Fatal(err)
	}
	pin.Wipe()
	want := []string{
		"OPTION grab", "OPTION lc-ctype=xx_YY.utf8@euro", "OPTION lc-messages=xx_YY.utf8@euro",
		"SETDESC grüße", "SETERROR falsch", "SETTIMEOUT 0", "GETPIN",
		"RESET", "OPTION lc-ctype=C.UTF-8",
		"SETDESC grüße", "SETERROR falsch", "SETTIMEOUT 0", "GETPIN",
	}
	if got := s.heard(); !slices.Equal(got, want) {
		t.Errorf("heard %q", got)
	}
}

func TestCtype(t *testing.T) {
	for locale, want := range map[string]string{
		"": "C.UTF-8", "C": "C.UTF-8", "POSIX": "C.UTF-8", "de_DE": "C.UTF-8", "de_DE.ISO-8859-1": "C.UTF-8",
		"de_DE@euro": "C.UTF-8", "de_DE.UTF-8": "de_DE.UTF-8", "de_DE.utf8": "de_DE.utf8", "de_DE.UTF-8@euro": "de_DE.UTF-8@euro",
		"C.UTF-8": "C.UTF-8", "utf-8": "C.UTF-8",
	} {
		if got := (Place{Locale: locale}).ctype(); got != want {
			t.Errorf("%q: %q, want %q", locale, got, want)
		}
	}
}

func TestFallback(t *testing.T) {
	for name, c := range map[string]struct {
		scenario string
		place    Place
		tty      bool
		askpass  string
		want     string // the error, or nothing
		says     string // in the log
	}{
		"a dead display":    {"dead-display", Place{Display: ":7"}, true, "", `pinentry: ended without an answer (exit status 1), saying`, ""},
		"an askpass":        {"askpass-pin", Place{Askpass: true}, false, "askpass", "", ""},
		"not the askpass":   {"askpass-pin", Place{}, false, "askpass", "Inappropriate ioctl", ""},
		"no askpass":        {"askpass-pin", Place{Askpass: true}, false, "", "SSH_ASKPASS is not set", ""},
		"askpass not found": {"askpass-pin", Place{Askpass: true}, false, "nonexistent", `SSH_ASKPASS: "nonexistent" is not in the agent's PATH`, ""},
		"a small window":    {"small-window", Place{}, true, "", "", "Screen or window too small"},
		"no window":         {"small-window", Place{}, false, "", "Screen or window too small", ""},
	} {
		t.Run(name, func(t *testing.T) {
			s := newStage(t, c.scenario)
			c.place.UserData = s.place.UserData
			s.place, s.Askpass = c.place, c.askpass
			if c.tty {
				_, s.place.TTY = terminaltest.New(t)
			}
			logged := s.logs()
			d, err := s.Open(t.Context(), s.place)
			if err == nil {
				defer d.Close()
			}
			for range 2 { // and it stays so
				var pin *secret.Secret
				if d != nil {
					pin, err = d.PIN(t.Context(), Prompt{})
				}
				if c.want != "" {
					if !errors.Is(err, ErrNoPrompt) || !strings.Contains(err.Error(), c.want) {
						t.Errorf("%v", err)
					}
					continue
				}
				if err != nil {
					t.Fatal(err)
				}
				if string(pin.Bytes()) != "123456" {
					t.Errorf("the answer is %q", pin.Bytes())
				}
				pin.Wipe()
			}
			if c.says != "" && strings.Count(logged(), c.says) != 1 {
				t.Errorf("log: %s", logged())
			}
			noSecret(t, "the log", logged())
		})
	}
}

// A prompt appears on a terminal only while no other program reads from the terminal.
func TestTerminalInUse(t *testing.T) {
	modes := func(t *testing.T, tty *os.File, change func(*unix.Termios)) {
		t.Helper()
		err := control(tty, func(fd int) error {
			m, err := unix.IoctlGetTermios(fd, unix.TCGETS)
			if err != nil {
				return err
			}
			change(m)
			return unix.IoctlSetTermios(fd, unix.TCSETS, m)
		})
		if err != nil {
			t.Fatal(err)
		}
	}
	t.Run("raw", func(t *testing.T) {
		s := newStage(t, "pin-plain")
		_, s.place.TTY = terminaltest.New(t)
		d := s.open(t.Context())
		modes(t, s.place.TTY, func(m *unix.Termios) { m.Lflag &^= unix.ICANON })
		if _, err := d.PIN(t.Context(), Prompt{}); !errors.Is(err, ErrNoPrompt) || !errors.Is(err, errNotLineMode) {
			t.Errorf("asked on a terminal that a shell edits a line on: %v", err)
		}
		if containsLine(s.heard(), "GETPIN") {
			t.Error("the program was told to ask")
		}
		modes(t, s.place.TTY, func(m *unix.Termios) { m.Lflag |= unix.ICANON })
		pin, err := d.PIN(t.Context(), Prompt{})
		if err != nil {
			t.Errorf("later on: %v", err)
		}
		pin.Wipe()
	})
	t.Run("not the client's", func(t *testing.T) {
		s := newStage(t, "pin-plain")
		_, s.place.TTY = terminaltest.New(t)
		away := errors.New("ssh (1) is in the background of its terminal")
		s.place.Check = func() error { return away }
		if _, err := s.open(t.Context()).PIN(t.Context(), Prompt{}); !errors.Is(err, ErrNoPrompt) || !errors.Is(err, away) {
			t.Errorf("%v", err)
		}
	})
	t.Run("not any more", func(t *testing.T) {
		s := newStage(t, "never")
		_, s.place.TTY = terminaltest.New(t)
		away := errors.New("ssh (1) is in the background of its terminal")
		var gone atomic.Bool
		s.place.Check = func() error {
			if gone.Load() {
				return away
			}
			return nil
		}
		d := s.open(t.Context())
		done := make(chan error)
		go func() { _, err := d.PIN(t.Context(), Prompt{}); done <- err }()
		s.hanging(1)
		gone.Store(true)
		if err := <-done; !errors.Is(err, ErrNoPrompt) || !errors.Is(err, away) {
			t.Errorf("%v", err)
		}
		if left := children(t); len(left) > 0 {
			t.Errorf("the prompt is still there: %v", left)
		}
	})
}

func TestAskpassArguments(t *testing.T) {
	for kind, ask := range map[string]func(*Dialogue, Prompt) error{
		"":        func(d *Dialogue, p Prompt) error { pin, err := d.PIN(t.Context(), p); pin.Wipe(); return err },
		"confirm": func(d *Dialogue, p Prompt) error { _, err := d.Confirm(t.Context(), p); return err },
		"none":    func(d *Dialogue, p Prompt) error { return d.Message(t.Context(), p) },
	} {
		s := newStage(t, "askpass-pin")
		s.Askpass, s.place.Askpass = filepath.Join(s.dir, "askpass"), true
		d := s.open(t.Context())
		if err := ask(d, Prompt{Title: "title", Description: "-x\n\x1b%", Error: "wrong", Label: strings.Repeat("ü", 2000)}); err != nil {
			t.Fatalf("%q: %v", kind, err)
		}
		args := s.files("args-")[0]
		if !strings.HasPrefix(args, "title\n-x\nwrong\n\\x1b%\nüü") || len(args) > maxAskpassText || !strings.HasSuffix(args, "ü…") {
			t.Errorf("%q: arguments %q", kind, args)
		}
		env := strings.Split(s.files("env-")[0], "\n")
		if got := slices.ContainsFunc(env, func(v string) bool { return strings.HasPrefix(v, "SSH_ASKPASS_PROMPT=") }); got != (kind != "") {
			t.Errorf("%q: environment %q", kind, env)
		}
		if kind != "" && !containsLine(env, "SSH_ASKPASS_PROMPT="+kind) {
			t.Errorf("%q: environment %q", kind, env)
		}
	}
}

func TestEnvironmentIsMadeForTheProgram(t *testing.T) {
	t.Setenv("P11_SECRET", "of the agent")
	t.Setenv("DISPLAY", ":66")
	s := newStage(t, "pin-plain")
	user := s.place.UserData
	s.place = Place{
		Display: ":7", WaylandDisplay: "wayland-0", XAuthority: "/x", DBusAddress: "unix:path=/bus", RuntimeDir: "/run/user/0",
		TTYType: "xterm", Locale: "de_DE", UserData: user,
	}
	_, s.place.TTY = terminaltest.New(t)
	pin, err := s.open(t.Context()).PIN(t.Context(), Prompt{})
	if err != nil {
		t.Fatal(err)
	}
	pin.Wipe()
	got := strings.Split(s.files("env-")[0], "\n")
	slices.Sort(got)
	want := []string{
		"DBUS_SESSION_BUS_ADDRESS=unix:path=/bus", "DISPLAY=:7", "GPG_TTY=/proc/self/fd/3", "HOME=/nonexistent", "LANG=de_DE",
		"LC_CTYPE=C.UTF-8", "PATH=" + s.dir, "PINENTRY_USER_DATA=" + user, "TERM=xterm", "WAYLAND_DISPLAY=wayland-0",
		"XAUTHORITY=/x", "XDG_RUNTIME_DIR=/run/user/0",
	}
	if !slices.Equal(got, want) {
		t.Errorf("the program got\n%s", strings.Join(got, "\n"))
	}
	if args := s.files("args-")[0]; args != "" {
		t.Errorf("the program got arguments: %q", args)
	}
	if (&Pinentry{}).environment(Place{}) == nil {
		t.Error("with nothing to tell, the program inherits everything")
	}
}

func TestCancelEndsTheProgram(t *testing.T) {
	type call func(context.Context, *Dialogue) error
	calls := map[string]call{
		"PIN":     func(ctx context.Context, d *Dialogue) error { _, err := d.PIN(ctx, Prompt{}); return err },
		"Confirm": func(ctx context.Context, d *Dialogue) error { _, err := d.Confirm(ctx, Prompt{}); return err },
		"Message": func(ctx context.Context, d *Dialogue) error { return d.Message(ctx, Prompt{}) },
	}
	for name, c := range map[string]struct {
		scenario string
		askpass  bool
		fakes    int
	}{
		"waiting":          {"never", false, 1},
		"ignoring SIGTERM": {"stubborn", false, 1},
		"with a child":     {"leaves-child", false, 2},
		"with an orphan":   {"leaves-orphan", false, 2},
		"askpass":          {"askpass-never", true, 1},
	} {
		for kind, call := range calls {
			if c.scenario != "never" && kind != "PIN" {
				continue
			}
			t.Run(name+"/"+kind, func(t *testing.T) {
				if c.scenario != "never" {
					quick(t)
				}
				s := newStage(t, c.scenario)
				if c.askpass {
					s.Askpass, s.place.Askpass = "askpass", true
				}
				d := s.open(t.Context())
				ctx, cancel := context.WithCancel(t.Context())
				done := make(chan error)
				go func() { done <- call(ctx, d) }()
				pids := s.hanging(c.fakes)
				cancel()
				if err := <-done; !errors.Is(err, context.Canceled) {
					t.Errorf("%v", err)
				}
				if left := children(t); len(left) > 0 {
					t.Errorf("when the call returned there was still %v", left)
				}
				for _, pid := range pids {
					if c.scenario == "leaves-orphan" && !gone(pid) {
						// The process has left the group, so the Dialogue does not end it.
						_ = syscall.Kill(pid, syscall.SIGKILL)
						continue
					}
					proctest.Until(t, "the end of the program's child", func() bool { return gone(pid) })
				}
				// The dialogue still works.
				ctx, cancel = context.WithCancel(t.Context())
				go func() { done <- call(ctx, d) }()
				pids = s.hanging(2 * c.fakes)
				cancel()
				if err := <-done; !errors.Is(err, context.Canceled) {
					t.Errorf("the second time: %v", err)
				}
				for _, pid := range pids {
					_ = syscall.Kill(pid, syscall.SIGKILL) // orphans
				}
			})
		}
	}
}

func TestDeadlineAndCause(t *testing.T) {
	s := newStage(t, "never")
	ctx, cancel := context.WithDeadline(t.Context(), time.Now().Add(-time.Second))
	defer cancel()
	if _, err := s.Open(ctx, s.place); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("open: %v", err)
	}
	d := s.open(t.Context())
	if _, err := d.PIN(ctx, Prompt{}); !errors.Is(err, context.DeadlineExceeded) || errors.Is(err, ErrTimeout) {
		t.Errorf("PIN: %v", err)
	}
}

func TestTimeoutIsKeptForThem(t *testing.T) {
	quick(t)
	for _, scenario := range []string{"never", "askpass-never"} {
		s := newStage(t, scenario)
		s.withAskpass(scenario)
		d := s.open(t.Context())
		if pin, err := d.PIN(t.Context(), Prompt{Timeout: time.Nanosecond}); !errors.Is(err, ErrTimeout) || pin != nil {
			t.Errorf("%s: %v", scenario, err)
		}
	}
}

func TestSeconds(t *testing.T) {
	for d, want := range map[time.Duration]int64{
		-1: 0, 0: 0, 1: 1, 500 * time.Millisecond: 1, time.Second: 1, time.Second + 1: 2, time.Minute: 60, 1<<63 - 1: maxSeconds,
	} {
		if got := seconds(d); got != want {
			t.Errorf("%v: %d, want %d", d, got, want)
		}
	}
}

func TestClose(t *testing.T) {
	quick(t)
	for _, scenario := range []string{"never", "stubborn", "ok", "stubborn-late"} {
		t.Run(scenario, func(t *testing.T) {
			s := newStage(t, scenario)
			d := s.open(t.Context())
			done := make(chan error)
			call := func() { _, err := d.PIN(t.Context(), Prompt{}); done <- err }
			switch scenario {
			case "never", "stubborn":
				go call()
				s.hanging(1)
				if err := d.Close(); err != nil {
					t.Error(err)
				}
				if err := <-done; !errors.Is(err, ErrClosed) {
					t.Errorf("the call under way: %v", err)
				}
			case "stubborn-late":
				go call()
				<-done
				go call()
				s.hanging(1)
				_ = d.Close()
				<-done
			}
			_ = d.Close()
			if left := children(t); len(left) > 0 {
				t.Errorf("after Close there was still %v", left)
			}
			go call()
			if err := <-done; !errors.Is(err, ErrClosed) {
				t.Errorf("a call after Close: %v", err)
			}
			if _, err := d.Confirm(t.Context(), Prompt{}); !errors.Is(err, ErrClosed) {
				t.Errorf("another: %v", err)
			}
		})
	}
}

func TestOneAtATime(t *testing.T) {
	s := newStage(t, "never")
	s.place.Display = ":7"
	elsewhere := s.place
	elsewhere.Display = ":8"
	first, second := s.open(t.Context()), s.open(t.Context())
	third, err := s.Open(t.Context(), elsewhere)
	if err != nil {
		t.Fatal(err)
	}
	defer third.Close()

	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	done := make(chan error, 3)
	go func() { done <- first.Message(ctx, Prompt{}) }()
	s.hanging(1)
	go func() { done <- third.Message(ctx, Prompt{}) }()
	s.hanging(2) // another display need not wait

	waiting, giveUp := context.WithCancel(t.Context())
	go func() { done <- second.Message(waiting, Prompt{}) }()
	giveUp()
	if err := <-done; !errors.Is(err, context.Canceled) {
		t.Errorf("the one that waits: %v", err)
	}
	if n := len(s.hanging(2)); n != 2 {
		t.Errorf("%d dialogues were shown", n)
	}
	go func() { done <- second.Message(ctx, Prompt{}) }()
	_ = first.Close()
	s.hanging(3)
	cancel()
	for range 3 {
		<-done
	}
}

func TestNeverTwoAtOnce(t *testing.T) {
	s := newStage(t, "exclusive")
	s.place.WaylandDisplay = "wayland-0"
	done := make(chan error)
	const n = 5
	for range n {
		d := s.open(t.Context())
		go func() {
			_, err := d.Confirm(t.Context(), Prompt{})
			done <- err
		}()
	}
	for range n {
		if err := <-done; err != nil {
			t.Error(err)
		}
	}
}

func TestTurns(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var turns turns
		ctx := t.Context()
		releaseAB, err := turns.wait(ctx, []string{"a", "b"})
		if err != nil {
			t.Fatal(err)
		}
		releaseC, _ := turns.wait(ctx, []string{"c"})
		releaseNone, _ := turns.wait(ctx, nil) // never waits

		got := make(chan string, 2)
		go func() {
			release, _ := turns.wait(ctx, []string{"b", "c"})
			got <- "bc"
			release()
		}()
		synctest.Wait()
		releaseC()
		synctest.Wait()
		if len(got) != 0 {
			t.Fatal("b was had twice")
		}
		// A goroutine that waits for b and c does not keep others from c.
		releaseC, _ = turns.wait(ctx, []string{"c"})
		releaseC()
		releaseAB()
		synctest.Wait()
		if len(got) != 1 {
			t.Fatal("who waited was not served")
		}
		releaseNone()
		if len(turns.taken) != 0 {
			t.Errorf("%d spots are not given back", len(turns.taken))
		}
	})
}

func TestSpotsKnowATerminalByItsNumber(t *testing.T) {
	_, tty := terminaltest.New(t)
	_, another := terminaltest.New(t)
	again, err := os.OpenFile(fmt.Sprintf("/proc/self/fd/%d", tty.Fd()), os.O_RDWR|unix.O_NOCTTY, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer again.Close()
	want := Place{TTY: tty}.spots()
	if got := (Place{TTY: again}).spots(); len(want) != 1 || !slices.Equal(got, want) {
		t.Errorf("%q and %q are the same terminal", got, want)
	}
	if got := (Place{TTY: another}).spots(); slices.Equal(got, want) {
		t.Error("two terminals have one name")
	}
}

func TestLogsHaveNoPIN(t *testing.T) {
	for scenario := range scenarios {
		if !strings.HasPrefix(scenario, "pin-") && !strings.HasPrefix(scenario, "askpass-") {
			continue
		}
		switch scenario {
		case "pin-inverted", "askpass-never":
			continue
		}
		t.Run(scenario, func(t *testing.T) {
			s := newStage(t, scenario)
			s.withAskpass(scenario)
			logged := s.logs()
			d := s.open(t.Context())
			pin, err := d.PIN(t.Context(), Prompt{Description: "what for"})
			pin.Wipe()
			_ = d.Close()
			noSecret(t, "the log", logged())
			noSecret(t, "the error", fmt.Sprint(err))
		})
	}
	s := newStage(t, "pin-plain")
	logged := s.logs()
	pin, _ := s.open(t.Context()).PIN(t.Context(), Prompt{})
	pin.Wipe()
	if logged() != "" {
		t.Errorf("the log has %s", logged())
	}
}

func TestMemoryHasNoPINAfterWipe(t *testing.T) {
	s := newStage(t, "pin-inverted")
	s.logs()
	// The PIN occurs nowhere else in this process, and never in the clear here.
	inverted := []byte(strings.Repeat("\xcf\xce\xcd", 3) + fmt.Sprintf("\x8e\x8d\x8c\x8b%d", os.Getpid()))
	for i := range inverted {
		inverted[i] |= 0x80 // its inverse is ASCII, without need for escapes
		if ^inverted[i] < 0x20 || ^inverted[i] == '%' {
			inverted[i] ^= 0x40
		}
	}
	if err := os.WriteFile(filepath.Join(s.dir, "inverted"), inverted, 0o600); err != nil {
		t.Fatal(err)
	}
	d := s.open(t.Context())
	pin, err := d.PIN(t.Context(), Prompt{})
	if err != nil {
		t.Fatal(err)
	}
	for i, b := range pin.Bytes() {
		if b != ^inverted[i] {
			t.Fatal("not the PIN that was given")
		}
	}
	if n := secrettest.Count(t, inverted); n != secrettest.Found(1) {
		t.Errorf("the process holds the PIN %d times, not once", n)
	}
	pin.Wipe()
	if n := secrettest.Count(t, inverted); n != 0 {
		t.Errorf("the process still holds the PIN %d times", n)
	}
}

func TestProgramInAScript(t *testing.T) {
	// A shell starts the pinentry and waits for it, as on many machines.
	s := newStage(t, "never")
	script := filepath.Join(s.dir, "script")
	if err := os.WriteFile(script, []byte("#!/bin/sh\n"+s.Program+"\nexit $?\n"), 0o755); err != nil {
		t.Fatal(err)
	}
	s.Program = script
	d := s.open(t.Context())
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error)
	go func() { done <- d.Message(ctx, Prompt{}) }()
	pid := s.hanging(1)[0]
	cancel()
	<-done
	proctest.Until(t, "the end of what the script ran", func() bool { return gone(pid) })
}

func TestProgramThatNeverGreets(t *testing.T) {
	s := newStage(t, "orphan")
	quick(t)
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error)
	go func() { _, err := s.Open(ctx, s.place); done <- err }()
	s.hanging(1)
	cancel()
	if err := <-done; !errors.Is(err, context.Canceled) {
		t.Errorf("%v", err)
	}
}
