// Package sandbox takes away from a module process the rights that no PKCS#11 module
// needs. Landlock keeps the module from writing files other than its own. seccomp denies
// system calls by which one process attacks another process or the kernel. The process
// enters the sandbox before it loads the module. The sandbox holds for all threads of the
// process, for later threads of C, and for the programs that they start.
//
// The package reports which parts are in force and which are not. It takes nothing for
// granted, and no part fails silently.
//
// The module may still read files, start programs and use sockets other than abstract
// sockets. A module needs these to reach its daemon, and to ask for a PIN with its own
// dialogue.
//
// So the sandbox limits a module that is broken or taken over. It cannot change the
// person's files and their modes, read the memory of other processes, or stop or starve
// them. But it can still ask another program, over that program's socket, to act for it.
package sandbox

import (
	"errors"
	"runtime"
	"strings"

	"golang.org/x/sys/unix"

	"p11-agent/token/wire"
)

// Options tell Enter what a module may write.
type Options struct {
	// Module is the path of the module's file. A module that the package knows may write
	// its known files.
	Module string
	// InitArgs is the string for the module's C_Initialize.
	InitArgs string
	// Write are more files and directories that the module may write. The paths are
	// absolute.
	Write []string
	// Getenv is os.Getenv, or a test's replacement.
	Getenv func(string) string
}

// Enter confines the process permanently, and reports which parts are in force. If a part
// fails, the report says so, and the process may go on. Call Enter once.
func Enter(o Options) wire.Sandbox {
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	var r wire.Sandbox
	// Without no_new_privs, only root can use Landlock and seccomp. Each thread has its
	// own no_new_privs. seccomp hands it to the other threads with the filter.
	if err := unix.Prctl(unix.PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0); err != nil {
		r.FilesError, r.CallsError = reason(err), reason(err)
		return r
	}
	abi, missing, err := restrictFiles(o)
	r.Files, r.Missing = uint32(abi), missing
	if err != nil {
		r.FilesError = reason(err)
	}
	r.Scoped = scoped(abi)
	if err := restrictCalls(!r.Scoped); err != nil {
		r.CallsError = reason(err)
	} else {
		r.Calls = true
	}
	return r
}

// errUnsupported is the error for a part that the kernel does not have.
var errUnsupported = errors.New("not supported by this kernel")

// reason says in a few words why a part is not in force.
func reason(err error) string {
	if errno, ok := errors.AsType[unix.Errno](err); ok {
		switch errno {
		case unix.ENOSYS, unix.EOPNOTSUPP, unix.EINVAL:
			return errUnsupported.Error()
		}
		return "refused (" + unix.ErrnoName(errno) + ")"
	}
	return strings.ToValidUTF8(err.Error(), "?") // the error may have a path
}
