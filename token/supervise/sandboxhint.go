package supervise

import (
	"errors"
	"strings"

	"golang.org/x/sys/unix"

	"p11-agent/token/wellknown"
	"p11-agent/token/wire"
)

// sandboxHint is the next step for a module that may fail at the start because of its sandbox.
const sandboxHint = "if it needs to write elsewhere: write = [...] or sandbox = false in its [[module]] table"

// fitsSandbox reports whether the sandbox is made for the module. Such a module fails for another reason.
func fitsSandbox(path string) bool {
	return wellknown.KindOf(path).Sandboxed()
}

// maybeSandbox reports whether a module may have failed to start because of its sandbox. Most modules give no reason.
func maybeSandbox(err error) bool {
	e, ok := errors.AsType[*wire.Error](err)
	if !ok {
		return false
	}
	text := strings.ToLower(e.Text)
	return e.Function == "C_Initialize" || strings.Contains(text, unix.EACCES.Error()) || strings.Contains(text, unix.EPERM.Error())
}
