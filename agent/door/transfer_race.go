//go:build race

package door

import "syscall"

// transfer is for the race detector, which knows that what is sent on a socket comes
// before what is received there, if these functions do it.
func transfer(trap, fd uintptr, b []byte) (n int, err error) {
	for {
		if trap == syscall.SYS_READ {
			n, err = syscall.Read(int(fd), b)
		} else {
			n, err = syscall.Write(int(fd), b)
		}
		switch err {
		case nil:
			return n, nil
		case syscall.EINTR:
		default:
			return 0, err
		}
	}
}
