// Package sandbox takes from a module process what no PKCS#11 module needs: to
// write files other than its own (Landlock), and system calls by which one
// process gets at another or at the kernel (seccomp). It is called before the
// module is loaded, for all threads of the process, those of C that come later,
// and the programs that they start.
//
// It promises to tell what is in force and what is not: nothing is taken for
// granted, and nothing is best effort in silence.
//
// Reading files stays free, and so do starting programs and sockets other than abstract
// ones: a module reaches its daemon by them, and asks for a PIN with a dialogue of its own.
// So this keeps a module that is broken or taken over from changing the person's files
// and their modes, from reading the memory of other processes, and from stopping or
// starving them. It does not keep it from asking another program, over that one's
// socket, to do something for it.
package sandbox

import (
	"errors"
	"runtime"
	"strings"

	"golang.org/x/sys/unix"

	"p11-agent/token/wire"
)

// Options say what a module may write.
type Options struct {
	// Module is the path of the module's file. Of what modules are known to write,
	// each gets its own.
	Module string
	// InitArgs are what the module is started with.
	InitArgs string
	// Write are more files and directories, absolute.
	Write []string
	// Getenv is os.Getenv, or what tests put in its place.
	Getenv func(string) string
}

// Enter confines the process for good, and tells how far that went. What fails
// is in the report: the process may go on. It is to be called once.
func Enter(o Options) wire.Sandbox {
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	var r wire.Sandbox
	// Without it neither of the two can be had by those who are not root. Each
	// thread has its own: seccomp hands it to the others with the filter.
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

// errUnsupported is why something is not in force that the kernel does not have.
var errUnsupported = errors.New("not supported by this kernel")

// reason says in a few words why something is not in force.
func reason(err error) string {
	if errno, ok := errors.AsType[unix.Errno](err); ok {
		switch errno {
		case unix.ENOSYS, unix.EOPNOTSUPP, unix.EINVAL:
			return errUnsupported.Error()
		}
		return "refused (" + unix.ErrnoName(errno) + ")"
	}
	return strings.ToValidUTF8(err.Error(), "?") // it may have a path
}
