package paths

import (
	"fmt"
	"os"
	"strings"
)

// IdentityAgent returns the line of ssh_config(5) that leads ssh to a socket; ssh then ignores SSH_AUTH_SOCK. For a
// socket in the user's runtime directory, the line has %i, the number of the user. A variable would not do: ssh refuses
// the whole file when a variable is not set.
func IdentityAgent(path string) string {
	if dir := fmt.Sprintf("/run/user/%d/", os.Geteuid()); strings.HasPrefix(path, dir) {
		path = "/run/user/%i/" + strings.ReplaceAll(strings.TrimPrefix(path, dir), "%", "%%")
	} else {
		path = strings.ReplaceAll(path, "%", "%%")
	}
	if strings.ContainsAny(path, " \t") {
		path = `"` + path + `"`
	}
	return "IdentityAgent " + path
}
