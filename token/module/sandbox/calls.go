//go:build amd64 || arm64

package sandbox

import (
	"errors"
	"unsafe"

	"golang.org/x/sys/unix"
)

// denied are the system calls that fail with EPERM, as they do for many who lack
// a privilege: what it is that calls them goes on. callsHere has more.
//
// This is written here and not left to github.com/elastic/go-seccomp-bpf: in
// version 1.6 of that, a list of what is denied lets everything through that a
// 32-bit call asks for, there is no error but EPERM, and a thread that did not
// take the filter (seccomp(2), SECCOMP_FILTER_FLAG_TSYNC) counts as success.
var denied = []uintptr{
	// Other processes.
	unix.SYS_PTRACE, unix.SYS_PROCESS_VM_READV, unix.SYS_PROCESS_VM_WRITEV, unix.SYS_PROCESS_MADVISE,
	unix.SYS_PIDFD_GETFD, unix.SYS_KCMP,
	// The keys that the kernel keeps for the user.
	unix.SYS_KEYCTL, unix.SYS_ADD_KEY, unix.SYS_REQUEST_KEY,
	// The tree of files, and files without a path in it.
	unix.SYS_MOUNT, unix.SYS_UMOUNT2, unix.SYS_PIVOT_ROOT, unix.SYS_CHROOT, unix.SYS_OPEN_TREE, unix.SYS_MOVE_MOUNT,
	unix.SYS_FSOPEN, unix.SYS_FSCONFIG, unix.SYS_FSMOUNT, unix.SYS_FSPICK, unix.SYS_MOUNT_SETATTR,
	unix.SYS_OPEN_BY_HANDLE_AT, unix.SYS_FANOTIFY_INIT,
	unix.SYS_UNSHARE, unix.SYS_SETNS,
	// The kernel, and the ways into it that were found open most often.
	unix.SYS_INIT_MODULE, unix.SYS_FINIT_MODULE, unix.SYS_DELETE_MODULE, unix.SYS_KEXEC_LOAD, unix.SYS_KEXEC_FILE_LOAD,
	unix.SYS_BPF, unix.SYS_PERF_EVENT_OPEN, unix.SYS_USERFAULTFD,
	unix.SYS_IO_URING_SETUP, unix.SYS_IO_URING_ENTER, unix.SYS_IO_URING_REGISTER,
	// The machine.
	unix.SYS_REBOOT, unix.SYS_SWAPON, unix.SYS_SWAPOFF, unix.SYS_ACCT, unix.SYS_QUOTACTL, unix.SYS_QUOTACTL_FD,
	unix.SYS_SYSLOG, unix.SYS_VHANGUP, unix.SYS_SETHOSTNAME, unix.SYS_SETDOMAINNAME,
	unix.SYS_SETTIMEOFDAY, unix.SYS_CLOCK_SETTIME, unix.SYS_CLOCK_ADJTIME, unix.SYS_LOOKUP_DCOOKIE, unix.SYS_NFSSERVCTL,
}

// namespaces are the flags of clone that make new ones.
const namespaces = unix.CLONE_NEWNS | unix.CLONE_NEWCGROUP | unix.CLONE_NEWUTS | unix.CLONE_NEWIPC |
	unix.CLONE_NEWUSER | unix.CLONE_NEWPID | unix.CLONE_NEWNET

// Where struct seccomp_data (linux/seccomp.h) has what is asked for. Arguments
// have 64 bits; of the flags of clone the lower half counts, which comes first on
// the processors of callsHere.
const (
	dataCall  = 0
	dataArch  = 4
	dataFirst = 16
)

// restrictCalls denies system calls to all threads.
func restrictCalls() error {
	return install(program())
}

// program is the filter.
func program() []unix.SockFilter {
	p := []unix.SockFilter{
		load(dataArch),
		jump(unix.BPF_JEQ, auditArch, 1, 0),
		answer(unix.EPERM), // calls of 32-bit programs: numbers mean something else there
		load(dataCall),
	}
	if foreignCalls != 0 {
		p = append(p, jump(unix.BPF_JGE, foreignCalls, 0, 1), answer(unix.EPERM))
	}
	for _, list := range [][]uintptr{denied, callsHere} {
		for _, call := range list {
			p = append(p, jump(unix.BPF_JEQ, uint32(call), 0, 1), answer(unix.EPERM))
		}
	}
	return append(p,
		// Its flags are in memory, where a filter cannot see them. C libraries take
		// this answer for that of an old kernel, and call clone.
		jump(unix.BPF_JEQ, unix.SYS_CLONE3, 0, 1), answer(unix.ENOSYS),
		jump(unix.BPF_JEQ, unix.SYS_CLONE, 0, 3),
		load(dataFirst),
		jump(unix.BPF_JSET, namespaces, 0, 1), answer(unix.EPERM),
		unix.SockFilter{Code: unix.BPF_RET | unix.BPF_K, K: unix.SECCOMP_RET_ALLOW},
	)
}

func load(offset uint32) unix.SockFilter {
	return unix.SockFilter{Code: unix.BPF_LD | unix.BPF_W | unix.BPF_ABS, K: offset}
}

func jump(test uint16, k uint32, yes, no uint8) unix.SockFilter {
	return unix.SockFilter{Code: unix.BPF_JMP | test | unix.BPF_K, Jt: yes, Jf: no, K: k}
}

func answer(errno unix.Errno) unix.SockFilter {
	return unix.SockFilter{Code: unix.BPF_RET | unix.BPF_K, K: unix.SECCOMP_RET_ERRNO | uint32(errno)}
}

// install puts a filter before the system calls of all threads. The calling
// thread has no_new_privs, and hands that on.
func install(p []unix.SockFilter) error {
	prog := unix.SockFprog{Len: uint16(len(p)), Filter: &p[0]}
	r, _, errno := unix.Syscall(unix.SYS_SECCOMP, unix.SECCOMP_SET_MODE_FILTER, unix.SECCOMP_FILTER_FLAG_TSYNC, uintptr(unsafe.Pointer(&prog)))
	switch {
	case errno != 0:
		return errno
	case r != 0:
		return errors.New("refused by one of the threads")
	}
	return nil
}
