package output

import "fmt"

// A Shell is the syntax in which a shell sets variables of the environment.
type Shell struct{ export, unset string }

// The shells that ssh-agent prints commands for.
var (
	Bourne = Shell{export: "%[1]s=%[2]s; export %[1]s;\n", unset: "unset %s;\n"}
	CShell = Shell{export: "setenv %s %s;\n", unset: "unsetenv %s;\n"}
)

// Export returns the command that sets a variable for the shell and its programs.
func (s Shell) Export(name, value string) string {
	return fmt.Sprintf(s.export, name, ShellWord(value))
}

// Unset returns the command that removes a variable.
func (s Shell) Unset(name string) string { return fmt.Sprintf(s.unset, name) }
