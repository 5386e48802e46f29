package probe

import (
	"context"
	"strings"
)

// A Unit has the properties of a unit of systemd, by their names. An unknown unit has none.
type Unit map[string]string

// Units asks the user's service manager for the state of units, and returns them by their
// names. The error says why systemctl does not run. When systemctl runs and fails, the
// Output says why.
func Units(ctx context.Context, names ...string) (map[string]Unit, Output, error) {
	args := []string{"--user", "show", "--property=Id,LoadState,ActiveState,SubState,UnitFileState,FragmentPath,DropInPaths,Result"}
	out, err := Run(ctx, "systemctl", append(args, names...)...)
	return parseUnits(out.Out), out, err
}

// parseUnits reads the output of systemctl show: blocks of NAME=VALUE, with a blank line
// between them.
func parseUnits(text string) map[string]Unit {
	units := make(map[string]Unit)
	for block := range strings.SplitSeq(text, "\n\n") {
		u := make(Unit)
		for l := range strings.Lines(block) {
			if name, value, ok := strings.Cut(strings.TrimSuffix(l, "\n"), "="); ok {
				u[name] = value
			}
		}
		if u["Id"] != "" {
			units[u["Id"]] = u
		}
	}
	return units
}

// ManagerEnvironment returns the environment that the user's service manager gives to units.
// ok is false when the service manager does not tell.
func ManagerEnvironment(ctx context.Context) (environment map[string]string, ok bool) {
	s, err := Run(ctx, "systemctl", "--user", "show-environment")
	if err != nil || s.Status != nil {
		return nil, false
	}
	environment = make(map[string]string)
	for l := range strings.Lines(s.Out) {
		if name, value, ok := strings.Cut(strings.TrimSpace(l), "="); ok {
			environment[name] = value
		}
	}
	return environment, true
}
