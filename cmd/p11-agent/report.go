package main

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
	levelDetail  level = iota // well, and of interest to who looks closer
	levelOK                   // well
	levelWarning              // it works, but not as it might be meant to
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

// A finding is one thing that was looked at.
type finding struct {
	level level
	text  string
	// next are the steps that help: what to type, or what to do by hand. A step of
	// several lines is a file or a script.
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

// A report is the findings about one thing. It is used by one goroutine.
type report struct {
	group    string
	findings []*finding
}

func (r *report) add(l level, format string, args ...any) *finding {
	for i, a := range args {
		if err, ok := a.(error); ok {
			// Several errors, a line for each, are to be told from each other in one line.
			args[i] = strings.ReplaceAll(err.Error(), "\n", "; ")
		}
	}
	// What comes from a token, a file or another program must not forge a line.
	f := &finding{level: l, text: plain.Line(fmt.Sprintf(format, args...))}
	r.findings = append(r.findings, f)
	return f
}

func (r *report) detail(format string, args ...any) *finding {
	return r.add(levelDetail, format, args...)
}
func (r *report) ok(format string, args ...any) *finding { return r.add(levelOK, format, args...) }
func (r *report) warn(format string, args ...any) *finding {
	return r.add(levelWarning, format, args...)
}

func (r *report) bad(format string, args ...any) *finding {
	return r.add(levelProblem, format, args...)
}

// count returns how many findings have a level.
func (r *report) count(l level) int {
	n := 0
	for _, f := range r.findings {
		if f.level == l {
			n++
		}
	}
	return n
}

// print writes a line for each finding, and its steps below. Details are for who
// asks for them.
func (r *report) print(out io.Writer, details bool) error {
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

// printReports writes several, each below its name. What is well is left out of
// those that nothing is to be said about.
func printReports(out io.Writer, reports []*report, details bool) error {
	first := true
	for _, r := range reports {
		if !slices.ContainsFunc(r.findings, func(f *finding) bool { return f.level > levelDetail || details }) {
			continue
		}
		gap := "\n"
		if first {
			gap = ""
		}
		first = false
		if _, err := fmt.Fprintf(out, "%s%s\n", gap, output.Paint(out, output.Strong, r.group)); err != nil {
			return err
		}
		if err := r.print(out, details); err != nil {
			return err
		}
	}
	return nil
}

// reportedFinding is what --json prints.
type reportedFinding struct {
	Group string   `json:"group"`
	Level string   `json:"level"` // ok, warning, problem
	Text  string   `json:"text"`
	Next  []string `json:"next,omitempty"`
}

func printReportsJSON(out io.Writer, reports []*report) error {
	all := struct {
		Problems int               `json:"problems"`
		Warnings int               `json:"warnings"`
		Findings []reportedFinding `json:"findings"`
	}{Findings: []reportedFinding{}}
	for _, r := range reports {
		all.Problems += r.count(levelProblem)
		all.Warnings += r.count(levelWarning)
		for _, f := range r.findings {
			all.Findings = append(all.Findings, reportedFinding{Group: r.group, Level: f.level.String(), Text: f.text, Next: f.next})
		}
	}
	e := json.NewEncoder(out)
	e.SetIndent("", "  ")
	e.SetEscapeHTML(false)
	return e.Encode(all)
}

// verdict is the error that says how many problems there are; nil for none.
func verdict(reports ...*report) error {
	problems, warnings := 0, 0
	for _, r := range reports {
		problems += r.count(levelProblem)
		warnings += r.count(levelWarning)
	}
	switch {
	case problems == 0:
		return nil
	case warnings > 0:
		return fmt.Errorf("%s and %s found", output.Count(problems, "problem"), output.Count(warnings, "warning"))
	default:
		return fmt.Errorf("%s found", output.Count(problems, "problem"))
	}
}

// style is the one of findings of a level.
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
