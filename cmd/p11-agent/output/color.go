// Package output prints for a person: in colours where the terminal has them, with paths below "~" and
// words that a shell reads back as they are. It promises that a pipe and a file get no colours unless
// the flag --color asks for them. The commands decide what they print.
package output

import (
	"fmt"
	"io"
	"os"

	"github.com/spf13/cobra"

	"p11-agent/pinentry"
)

// A Color says when a command prints in colours. It is the value of the flag --color.
type Color string

// The values of --color.
const (
	Auto   Color = "auto"   // on a terminal with colours
	Always Color = "always" // also in a pipe and in a file
	Never  Color = "never"
)

var colors = []Color{Auto, Always, Never}

// AddColorFlag adds the flag --color to a command. The default of mode is [Auto].
func AddColorFlag(cmd *cobra.Command, mode *Color) {
	*mode = Auto
	cmd.Flags().Var(mode, "color", "print in colours `WHEN`: auto, always or never")
	_ = cmd.RegisterFlagCompletionFunc("color", func(*cobra.Command, []string, string) ([]cobra.Completion, cobra.ShellCompDirective) {
		var all []cobra.Completion
		for _, m := range colors {
			all = append(all, string(m))
		}
		return all, cobra.ShellCompDirectiveNoFileComp
	})
}

// String returns the value of the flag.
func (m *Color) String() string { return string(*m) }

// Type returns the name that pflag has for the value.
func (*Color) Type() string { return "when" }

// Set takes the value of the flag.
func (m *Color) Set(s string) error {
	for _, known := range colors {
		if s == string(known) {
			*m = known
			return nil
		}
	}
	return fmt.Errorf("use %s", OneOf(colors))
}

// Writer returns out, wrapped for [Paint] when colours are wanted. [Auto] wants them on a terminal
// whose TERM has colours, unless NO_COLOR is set (https://no-color.org).
func (m Color) Writer(out io.Writer) io.Writer {
	if m == Always || m != Never && os.Getenv("NO_COLOR") == "" && IsTerminal(out) && pinentry.HasColor(os.Getenv("TERM")) {
		return colored{out}
	}
	return out
}

// colored is a writer to which [Paint] writes in colours.
type colored struct{ io.Writer }

// A Style is the look of a word: parameters of SGR (ECMA-48, 8.3.117).
type Style string

// The styles have their usual meanings. A colour never says more than the words beside it.
const (
	None    Style = ""
	Strong  Style = "1"
	Good    Style = "32"
	Caution Style = "33"
	Bad     Style = "1;31"
)

// Paint returns the text with the style, if out comes from [Color.Writer] and has colours. The text must be
// printable: Paint removes no control characters.
func Paint(out io.Writer, s Style, text string) string {
	if _, ok := out.(colored); !ok || s == None || text == "" {
		return text
	}
	return "\x1b[" + string(s) + "m" + text + "\x1b[0m"
}
