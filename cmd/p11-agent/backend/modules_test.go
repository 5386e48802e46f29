package backend

import (
	"log/slog"
	"slices"
	"testing"

	"p11-agent/cmd/p11-agent/config"
	"p11-agent/token"
	"p11-agent/token/registry"
)

// The modules of the configuration come first. A table replaces, changes or switches off a
// module of the registry.
func TestPlan(t *testing.T) {
	off := false
	c := &config.File{Modules: []config.ModuleTable{
		{Name: "own", Path: "/own.so"},
		{Name: "replaced", Path: "/mine.so"},
		{Name: "changed", InitArgs: "here"},
		{Name: "off", Enabled: &off},
		{Name: "off with a path", Path: "/off.so", Enabled: &off},
		{Name: "client", Path: "/p11-kit-client.so"},
	}}
	p := newPlan(c, registry.Result{Modules: []registry.Module{
		{Name: "replaced", Path: "/theirs.so"},
		{Name: "changed", Path: "/changed.so", InitArgs: "there"},
		{Name: "off", Path: "/off.so"},
		{Name: "skipped", Path: "/skipped.so", Skip: "a trust module"},
		{Name: "remote", Path: "/p11-kit-client.so", Remote: registry.Remote{Address: "unix:path=/run/server"}},
	}}, slog.New(slog.DiscardHandler))
	var got []string
	specs := make(map[string]token.ModuleSpec)
	for _, s := range p.specs {
		got = append(got, s.Name+" "+s.Path)
		specs[s.Name] = s
	}
	if want := []string{
		"own /own.so", "replaced /mine.so", "client /p11-kit-client.so", "changed /changed.so", "remote /p11-kit-client.so",
	}; !slices.Equal(got, want) {
		t.Errorf("starts %q, want %q", got, want)
	}
	var skipped []string
	for _, m := range p.skipped {
		skipped = append(skipped, m.Name)
	}
	if want := []string{"off", "skipped"}; !slices.Equal(skipped, want) {
		t.Errorf("skips %q, want %q", skipped, want)
	}
	if got := specs["changed"].InitArgs; got != "here" {
		t.Errorf("init-args %q: the table has another value", got)
	}
	if s := specs["remote"]; !s.Poll || s.Empty == nil || !slices.Equal(s.Env, []string{registry.ServerVariable + "=unix:path=/run/server"}) {
		t.Errorf("the remote module starts with %+v", s)
	}
	if specs["client"].Cause == nil || specs["own"].Cause != nil {
		t.Error("only p11-kit-client.so explains a failure by the state of the server")
	}
}
