package main

import (
	"fmt"
	"io"
	"os"

	"github.com/spf13/cobra"

	"p11-agent/pinentry"
)

// A colorMode says when there are colours in what a person reads. It is the value of a
// flag.
type colorMode string

// What --color can be.
const (
	colorAuto   colorMode = "auto"   // on a terminal that has colours
	colorAlways colorMode = "always" // in a pipe and in a file, too
	colorNever  colorMode = "never"
)

var colorModes = []colorMode{colorAuto, colorAlways, colorNever}

// addColorFlag adds --color to a command.
func addColorFlag(cmd *cobra.Command, mode *colorMode) {
	*mode = colorAuto
	cmd.Flags().Var(mode, "color", "print in colours `WHEN`: auto, always or never")
	_ = cmd.RegisterFlagCompletionFunc("color", func(*cobra.Command, []string, string) ([]cobra.Completion, cobra.ShellCompDirective) {
		var all []cobra.Completion
		for _, m := range colorModes {
			all = append(all, string(m))
		}
		return all, cobra.ShellCompDirectiveNoFileComp
	})
}

func (m *colorMode) String() string { return string(*m) }

// Type is how pflag calls the value.
func (*colorMode) Type() string { return "when" }

// Set takes the value of the flag.
func (m *colorMode) Set(s string) error {
	for _, known := range colorModes {
		if s == string(known) {
			*m = known
			return nil
		}
	}
	return fmt.Errorf("it can be %s", quoted(colorModes))
}

// writer returns out, or a writer to it that paint knows to be one for colours. With
// auto, that is a terminal that has them (TERM), unless NO_COLOR says no.
func (m colorMode) writer(out io.Writer) io.Writer {
	if m == colorAlways || m != colorNever && os.Getenv("NO_COLOR") == "" && isTerminal(out) && pinentry.HasColor(os.Getenv("TERM")) {
		return colorWriter{out}
	}
	return out
}

// A colorWriter writes to where colours are wanted.
type colorWriter struct{ io.Writer }

// A style is how a word is printed: parameters of SGR (ECMA-48, 8.3.117).
type style string

// Styles have the usual meanings. What they say is said in words, too.
const (
	styleNone    style = ""
	styleStrong  style = "1"
	styleGood    style = "32"
	styleCaution style = "33"
	styleBad     style = "1;31"
)

// paint returns the text as it is to be written to out. The text is printable already.
func paint(out io.Writer, s style, text string) string {
	if _, ok := out.(colorWriter); !ok || s == styleNone || text == "" {
		return text
	}
	return "\x1b[" + string(s) + "m" + text + "\x1b[0m"
}

// style is the one of findings of a level.
func (l level) style() style {
	switch l {
	case levelProblem:
		return styleBad
	case levelWarning:
		return styleCaution
	default:
		return styleGood
	}
}

// pinStyle is the style of what is said of the tries for a PIN (pinState).
func pinStyle(pin string) style {
	switch pin {
	case "locked", "last":
		return styleBad
	case "low":
		return styleCaution
	}
	return styleNone
}
