//go:build !race

package door

import (
	"syscall"
	"unsafe"
)

// transfer reads or writes b, which is not empty, on a socket that makes nobody wait.
// So the scheduler need not be told: it would wake a thread for each call, to look
// after those that do wait.
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
