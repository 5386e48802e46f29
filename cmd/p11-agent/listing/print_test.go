package listing

import (
	"bytes"
	"testing"

	"p11-agent/cmd/p11-agent/status"
)

// Each module is named with what happened to it, where there is something to say
// or with -v.
func TestPrintModules(t *testing.T) {
	l := Listing{Tokens: []Token{}, Modules: []Module{
		{ModuleEntry: status.ModuleEntry{Name: "good"}, Running: true, Waits: true},
		{ModuleEntry: status.ModuleEntry{Name: "polled"}, Running: true},
		{ModuleEntry: status.ModuleEntry{Name: "shaky", Restarts: 1}, Running: true},
		{ModuleEntry: status.ModuleEntry{Name: "bad", Restarts: 3}, Error: "the module process ended: it crashed (segmentation fault)"},
		{ModuleEntry: status.ModuleEntry{Name: "missing"}, Error: "there is no such file"},
	}}
	const (
		shaky = "module shaky: it works; it was started again once; it is asked again and again for cards that come and go\n"
		bad   = "module bad: the module process ended: it crashed (segmentation fault); it was started again 3 times\n" +
			"module missing: there is no such file\n"
		none = "no token is present\n"
	)
	for _, tt := range []struct {
		verbose bool
		want    string
	}{
		{false, none + shaky + bad},
		{true, none + "module good: it works; it tells of cards that come and go\n" +
			"module polled: it works; it is asked again and again for cards that come and go\n" + shaky + bad},
	} {
		var out, stderr bytes.Buffer
		if err := Print(&out, &stderr, l, tt.verbose); err != nil || out.Len() > 0 {
			t.Errorf("%q, %v", out.String(), err)
		}
		if got := stderr.String(); got != tt.want {
			t.Errorf("verbose %v: got\n%s\nwant\n%s", tt.verbose, got, tt.want)
		}
	}
}
