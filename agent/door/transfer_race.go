//go:build race

package door

import "syscall"

// transfer is for the race detector. With the functions of package syscall, the detector knows that
// sending on a socket comes before receiving.
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
