package doctor

import (
	"encoding/json"
	"fmt"
	"io"
	"slices"
	"strings"

	"p11-agent/cmd/p11-agent/output"
	"p11-agent/pinentry/plain"
)

// A level says how bad a finding is.
type level int

// From the best to the worst.
const (
	levelDetail  level = iota // well, and shown only when details are wanted
	levelOK                   // well
	levelWarning              // it works, and perhaps not as intended
	levelProblem              // it does not work
)

func (l level) String() string {
	switch l {
	case levelWarning:
		return "warning"
	case levelProblem:
		return "problem"
	default:
		return "ok"
	}
}

// A finding is one result of a check.
type finding struct {
	level level
	text  string
	// next are the steps that help, as in package advice.
	next []string
}

// Next adds a step.
func (f *finding) Next(format string, args ...any) *finding {
	text := format
	if len(args) > 0 {
		text = fmt.Sprintf(format, args...)
	}
	if text != "" {
		f.next = append(f.next, text)
	}
	return f
}

// Steps adds steps as they are.
func (f *finding) Steps(steps []string) *finding {
	f.next = append(f.next, steps...)
	return f
}

// A Group is what one check finds. One goroutine uses it at a time.
type Group struct {
	Name     string
	findings []*finding
}

// Groups are what several checks find, in the order in which a person should read them.
type Groups []*Group

func (r *Group) add(l level, format string, args ...any) *finding {
	for i, a := range args {
		if err, ok := a.(error); ok {
			// Several errors come with a line for each. They go on one line here.
			args[i] = strings.ReplaceAll(err.Error(), "\n", "; ")
		}
	}
	// Text of a token, a file or another program must not forge a line.
	f := &finding{level: l, text: plain.Line(fmt.Sprintf(format, args...))}
	r.findings = append(r.findings, f)
	return f
}

func (r *Group) detail(format string, args ...any) *finding {
	return r.add(levelDetail, format, args...)
}
func (r *Group) ok(format string, args ...any) *finding { return r.add(levelOK, format, args...) }
func (r *Group) warn(format string, args ...any) *finding {
	return r.add(levelWarning, format, args...)
}

func (r *Group) bad(format string, args ...any) *finding {
	return r.add(levelProblem, format, args...)
}

// Print writes a line for each finding, and the next steps below it. It leaves out details
// unless they are wanted.
func (r *Group) Print(out io.Writer, details bool) error {
	var b strings.Builder
	for _, f := range r.findings {
		if f.level == levelDetail && !details {
			continue
		}
		fmt.Fprintf(&b, "%s: %s\n", output.Paint(out, f.level.style(), f.level.String()), f.text)
		for _, step := range f.next {
			for i, line := range strings.Split(strings.TrimSuffix(plain.Lines(step), "\n"), "\n") {
				b.WriteString([]string{"  " + output.Paint(out, output.Strong, "next") + ": ", "        "}[min(i, 1)] + line + "\n")
			}
		}
	}
	_, err := io.WriteString(out, b.String())
	return err
}

// Print writes each group below its name. It leaves out groups without findings to show.
func (all Groups) Print(out io.Writer, details bool) error {
	gap := ""
	for _, r := range all {
		if !slices.ContainsFunc(r.findings, func(f *finding) bool { return f.level > levelDetail || details }) {
			continue
		}
		if _, err := fmt.Fprintf(out, "%s%s\n", gap, output.Paint(out, output.Strong, r.Name)); err != nil {
			return err
		}
		if err := r.Print(out, details); err != nil {
			return err
		}
		gap = "\n"
	}
	return nil
}

// jsonFinding is a finding in JSON. Its members keep their names and meaning.
type jsonFinding struct {
	Group string   `json:"group"`
	Level string   `json:"level"` // ok, warning, problem
	Text  string   `json:"text"`
	Next  []string `json:"next,omitempty"`
}

// PrintJSON writes all findings, details too.
func (all Groups) PrintJSON(out io.Writer) error {
	printed := struct {
		Problems int           `json:"problems"`
		Warnings int           `json:"warnings"`
		Findings []jsonFinding `json:"findings"`
	}{all.count(levelProblem), all.count(levelWarning), []jsonFinding{}}
	for _, r := range all {
		for _, f := range r.findings {
			printed.Findings = append(printed.Findings, jsonFinding{Group: r.Name, Level: f.level.String(), Text: f.text, Next: f.next})
		}
	}
	e := json.NewEncoder(out)
	e.SetIndent("", "  ")
	e.SetEscapeHTML(false)
	return e.Encode(printed)
}

// Err returns an error that counts the problems, or nil when there are none.
func (all Groups) Err() error {
	problems, warnings := all.count(levelProblem), all.count(levelWarning)
	switch {
	case problems == 0:
		return nil
	case warnings > 0:
		return fmt.Errorf("%s and %s found", output.Count(problems, "problem"), output.Count(warnings, "warning"))
	default:
		return fmt.Errorf("%s found", output.Count(problems, "problem"))
	}
}

// count returns the number of findings of a level.
func (all Groups) count(l level) (n int) {
	for _, r := range all {
		for _, f := range r.findings {
			if f.level == l {
				n++
			}
		}
	}
	return n
}

// style returns the style for findings of a level.
func (l level) style() output.Style {
	switch l {
	case levelProblem:
		return output.Bad
	case levelWarning:
		return output.Caution
	default:
		return output.Good
	}
}
