package pinentry

import (
	"context"
	"errors"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"
)

const refusal = "ERR 536871187 Unknown IPC command <User defined source 1>\n" // of GnuPG's pinentry

// commandScenarios are pinentry programs that do not answer a command, or refuse it.
func commandScenarios() {
	for _, command := range []string{
		"SETTITLE", "SETDESC", "SETPROMPT", "SETERROR", "SETOK", "SETCANCEL", "SETNOTOK", "SETTIMEOUT", "RESET", "MESSAGE",
	} {
		// The question itself sends RESET.
		scenarios["silent-"+command] = scenario{
			ask: func(f *fake) { f.say("ERR 83886246 A locale function failed <Pinentry>\n") },
			other: func(f *fake, word, _ string) bool {
				if word == command {
					f.hang()
				}
				return false
			},
		}
		for name, answer := range map[string]string{
			"refused-": refusal, "cancelled-": "ERR 83886179 Operation cancelled <Pinentry>\n", "timeout-": "ERR 83886142 Timeout <Pinentry>\n",
		} {
			scenarios[name+command] = scenario{
				ask:   func(f *fake) { f.say("D pin%d\nOK\n", f.asks) },
				other: func(f *fake, word, _ string) bool { return word == command && f.sayOK(answer) },
			}
		}
	}
	scenarios["refused-third"] = scenario{
		ask: func(f *fake) { f.say("ERR 83886194 Not confirmed <Pinentry>\n") },
		other: func(f *fake, word, _ string) bool {
			switch word {
			case "GETINFO":
				return f.sayOK("D curses\nOK\n")
			case "SETNOTOK":
				return f.sayOK(refusal)
			}
			return false
		},
	}
	scenarios["locale-refused"] = scenario{
		ask:   func(f *fake) { f.say("ERR 83886246 A locale function failed <Pinentry>\n") },
		other: func(f *fake, word, _ string) bool { return word == "RESET" && f.sayOK(refusal) },
	}
	// The program asks once, and a second one does not start.
	scenarios["only-once"] = scenario{
		start: func(f *fake) {
			if err := os.Mkdir(filepath.Join(f.dir, "started"), 0o700); err != nil {
				f.die("the display is gone\n")
			}
		},
		ask:   func(f *fake) { f.say("D pin%d\nOK\n", f.asks) },
		other: func(f *fake, word, _ string) bool { return word == "RESET" && f.sayOK(refusal) },
	}
	scenarios["no-message"] = scenario{ask: func(f *fake) {
		if !f.one {
			f.say(refusal)
			return
		}
		f.say("OK\n")
	}}
}

// impatient shortens the time that a program may take for a command. A program that is slow
// on a busy machine then counts as silent.
func impatient(t *testing.T) {
	t.Helper()
	testOnlyPatience = 500 * time.Millisecond
	t.Cleanup(func() { testOnlyPatience = 0 })
}

var wholePrompt = Prompt{
	Title: "p11-agent", Description: "what is wanted\nmore", Label: "PIN:", Error: "Wrong PIN.", OK: "_Yes", Cancel: "_No", Other: "_Other",
}

// The Dialogue gives up a pinentry that does not answer a command: no person delays the
// answer.
func TestSilentCommands(t *testing.T) {
	quick(t)
	impatient(t)
	for _, command := range []string{"SETTITLE", "SETDESC", "SETPROMPT", "SETERROR", "SETOK", "SETCANCEL", "SETTIMEOUT", "RESET"} {
		t.Run(command, func(t *testing.T) {
			s := newStage(t, "silent-"+command)
			s.place.Locale = "xx_YY.utf8"
			ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
			defer cancel()
			_, err := s.open(ctx).PIN(ctx, wholePrompt)
			if !errors.Is(err, ErrNoPrompt) || !errors.Is(err, errSilent) {
				t.Errorf("got %v", err)
			}
			if left := children(t); len(left) > 0 {
				t.Errorf("the program is still there: %v", left)
			}
		})
	}
}

// A pinentry may refuse commands that a dialogue can do without. The person still gets all
// that the answer needs.
func TestRefusedCommands(t *testing.T) {
	for _, command := range []string{"SETTITLE", "SETPROMPT", "SETERROR", "SETOK", "SETCANCEL", "SETNOTOK", "SETTIMEOUT", "RESET"} {
		t.Run(command, func(t *testing.T) {
			s := newStage(t, "refused-"+command)
			d := s.open(t.Context())
			for range 2 {
				pin, err := d.PIN(t.Context(), wholePrompt)
				if err != nil {
					t.Fatal(err)
				}
				pin.Wipe()
			}
			if heard := s.files("log-"); command == "SETERROR" && !strings.Contains(heard[0], "\nSETDESC what is wanted%0AWrong PIN.%0Amore\n") {
				t.Errorf("the error is not in the description: %q", heard)
			}
		})
	}
	s := newStage(t, "refused-third")
	if choice, err := s.open(t.Context()).Choose(t.Context(), wholePrompt); choice != ChoiceCancel || err != nil {
		t.Errorf("no, to a program that has refused the third button: %v, %v", choice, err)
	}
}

// A person answers the question, and no command before it.
func TestAnswersBeforeTheQuestion(t *testing.T) {
	for _, answer := range []string{"refused-", "cancelled-", "timeout-"} {
		s := newStage(t, answer+"SETDESC")
		_, err := s.open(t.Context()).PIN(t.Context(), wholePrompt)
		if !errors.Is(err, ErrNoPrompt) || errors.Is(err, ErrCancelled) || errors.Is(err, ErrTimeout) || !strings.Contains(err.Error(), "SETDESC") {
			t.Errorf("%s: %v", answer, err)
		}
	}
}

func TestFirstReasonStays(t *testing.T) {
	t.Run("of the locale", func(t *testing.T) {
		s := newStage(t, "locale-refused")
		s.place.Locale = "xx_YY.utf8"
		_, err := s.open(t.Context()).PIN(t.Context(), wholePrompt)
		if !errors.Is(err, ErrNoPrompt) || !strings.Contains(err.Error(), "A locale function failed") || !strings.Contains(err.Error(), "Unknown IPC command") {
			t.Errorf("got %v", err)
		}
	})
	s := newStage(t, "only-once")
	d := s.open(t.Context())
	pin, err := d.PIN(t.Context(), wholePrompt)
	if err != nil {
		t.Fatal(err)
	}
	pin.Wipe()
	_, err = d.PIN(t.Context(), wholePrompt)
	if !errors.Is(err, ErrNoPrompt) || !strings.Contains(err.Error(), "Unknown IPC command") || !strings.Contains(err.Error(), "the display is gone") {
		t.Errorf("got %v", err)
	}
}

func TestWithoutMessage(t *testing.T) {
	s := newStage(t, "no-message")
	if err := s.open(t.Context()).Message(t.Context(), Prompt{Description: "look"}); err != nil {
		t.Fatal(err)
	}
	if heard := s.heard(); !slices.Contains(heard, "CONFIRM --one-button") {
		t.Errorf("heard %q", heard)
	}
}

func TestWithError(t *testing.T) {
	for _, p := range []struct{ description, problem, want string }{
		{"a\nb\nc", "", "a\nb\nc"},
		{"a\nb\nc", "wrong", "a\nwrong\nb\nc"},
		{"a", "wrong", "a\nwrong"},
		{"a\n", "wrong", "a\nwrong\n"},
		{"", "wrong", "wrong"},
	} {
		if got := (&Prompt{Description: p.description, Error: p.problem}).withError(); got != p.want {
			t.Errorf("%q and %q: %q", p.description, p.problem, got)
		}
	}
}
