package output

import (
	"fmt"
	"io"
	"strings"

	"p11-agent/pinentry/plain"
)

// Steps writes the next steps for a person, each behind a word. Further lines of a step are
// indented like the first.
func Steps(w io.Writer, word string, steps []string) {
	for _, step := range steps {
		before := word
		for i, line := range strings.Split(strings.TrimSuffix(plain.Lines(step), "\n"), "\n") {
			if i > 0 {
				before = strings.Repeat(" ", len(word))
			}
			fmt.Fprintf(w, "%s%s\n", before, line)
		}
	}
}
