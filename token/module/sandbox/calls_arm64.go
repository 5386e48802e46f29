package sandbox

import "golang.org/x/sys/unix"

const (
	auditArch    = unix.AUDIT_ARCH_AARCH64
	foreignCalls = 0 // this architecture has none
)

// callsHere are denied on this processor only.
var callsHere []uintptr
