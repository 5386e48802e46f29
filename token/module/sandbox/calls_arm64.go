package sandbox

import "golang.org/x/sys/unix"

const (
	auditArch    = unix.AUDIT_ARCH_AARCH64
	foreignCalls = 0 // none have the same architecture
)

// callsHere are denied on this processor only.
var callsHere []uintptr
