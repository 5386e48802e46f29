//go:build !race

package door

import (
	"syscall"
	"unsafe"
)

// transfer reads or writes b, which is not empty, on a non-blocking socket. A system call by way of
// the Go scheduler would wake another thread each time. RawSyscall does not tell the scheduler.
func transfer(trap, fd uintptr, b []byte) (int, error) {
	for {
		n, _, errno := syscall.RawSyscall(trap, fd, uintptr(unsafe.Pointer(&b[0])), uintptr(len(b)))
		switch errno {
		case 0:
			return int(n), nil
		case syscall.EINTR:
		default:
			return 0, errno
		}
	}
}
