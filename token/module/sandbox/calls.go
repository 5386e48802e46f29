//go:build amd64 || arm64

package sandbox

import (
	"errors"
	"os"
	"slices"
	"unsafe"

	"golang.org/x/sys/unix"
)

// denied are the system calls that fail with EPERM. They also fail with EPERM for a
// program without a privilege, so the calling program goes on. callsHere has more.
//
// The filter is here because github.com/elastic/go-seccomp-bpf 1.6 does not suffice. With
// a list of denied calls, it allows every 32-bit call. It has no error except EPERM. It
// takes a thread that did not accept the filter for a success (seccomp(2),
// SECCOMP_FILTER_FLAG_TSYNC).
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
	// The kernel, and the ways into it that attackers use most often.
	unix.SYS_INIT_MODULE, unix.SYS_FINIT_MODULE, unix.SYS_DELETE_MODULE, unix.SYS_KEXEC_LOAD, unix.SYS_KEXEC_FILE_LOAD,
	unix.SYS_BPF, unix.SYS_PERF_EVENT_OPEN, unix.SYS_USERFAULTFD,
	unix.SYS_IO_URING_SETUP, unix.SYS_IO_URING_ENTER, unix.SYS_IO_URING_REGISTER,
	// The machine.
	unix.SYS_REBOOT, unix.SYS_SWAPON, unix.SYS_SWAPOFF, unix.SYS_ACCT, unix.SYS_QUOTACTL, unix.SYS_QUOTACTL_FD,
	unix.SYS_SYSLOG, unix.SYS_VHANGUP, unix.SYS_SETHOSTNAME, unix.SYS_SETDOMAINNAME,
	unix.SYS_SETTIMEOFDAY, unix.SYS_CLOCK_SETTIME, unix.SYS_CLOCK_ADJTIME, unix.SYS_LOOKUP_DCOOKIE, unix.SYS_NFSSERVCTL,
	// Modes, owners, attributes and times of files. Landlock does not cover them, and a
	// filter sees no paths. A file that is open for reading is enough for fchmod, so the
	// forms without a path are denied as well. SoftHSM, OpenSC, ykcs11 and p11-kit
	// make none of these calls. SQLite, and so tpm2-pkcs11, ignores their failure.
	unix.SYS_FCHMOD, unix.SYS_FCHMODAT, unix.SYS_FCHMODAT2, unix.SYS_FCHOWN, unix.SYS_FCHOWNAT, unix.SYS_UTIMENSAT,
	unix.SYS_SETXATTR, unix.SYS_LSETXATTR, unix.SYS_FSETXATTR, unix.SYS_SETXATTRAT,
	unix.SYS_REMOVEXATTR, unix.SYS_LREMOVEXATTR, unix.SYS_FREMOVEXATTR, unix.SYS_REMOVEXATTRAT, unix.SYS_FILE_SETATTR,
}

// controls are the denied requests of ioctl, with their numbers on the processors of
// callsHere.
var controls = []uint32{
	// Attributes of files and subvolumes. As above, a file that is open for reading is
	// enough for these requests (linux/fs.h, linux/fsverity.h, linux/fscrypt.h,
	// linux/btrfs.h).
	unix.FS_IOC_SETFLAGS, 0x40046602 /* of 32 bits */, 0x401c5820 /* FS_IOC_FSSETXATTR */, 0x40087602, 0x40047602, /* FS_IOC_SETVERSION */
	unix.FS_IOC_ENABLE_VERITY, unix.FS_IOC_SET_ENCRYPTION_POLICY,
	0x5000940e /* BTRFS_IOC_SUBVOL_CREATE */, 0x50009418, 0x50009401 /* BTRFS_IOC_SNAP_CREATE */, 0x50009417,
	0x5000940f /* BTRFS_IOC_SNAP_DESTROY */, 0x5000943f, 0x4008941a, /* BTRFS_IOC_SUBVOL_SETFLAGS */
	// Keys that open the user's encrypted files (linux/fscrypt.h).
	0xc0506617 /* FS_IOC_ADD_ENCRYPTION_KEY */, 0xc0406618, /* FS_IOC_REMOVE_ENCRYPTION_KEY */
	// Input to a terminal.
	unix.TIOCSTI, unix.TIOCLINUX,
	// The process that the kernel signals when a file has input.
	0x8901 /* FIOSETOWN */, unix.SIOCSPGRP,
}

// fileControls are the denied requests of fcntl. They set the process and the signal of
// the kernel's notifications. A lease delays other processes that open the file.
var fileControls = []uint32{unix.F_SETOWN, unix.F_SETOWN_EX, unix.F_SETSIG, unix.F_SETLEASE}

// noClone are the denied flags of clone. They make new namespaces, or a child of the
// agent, and the agent does not wait for such a child.
const noClone = unix.CLONE_PARENT | unix.CLONE_NEWNS | unix.CLONE_NEWCGROUP | unix.CLONE_NEWUTS | unix.CLONE_NEWIPC |
	unix.CLONE_NEWUSER | unix.CLONE_NEWPID | unix.CLONE_NEWNET

// These are offsets in struct seccomp_data (linux/seccomp.h). Arguments have 64 bits. Of
// the arguments that the filter checks, the kernel uses the lower half. The lower half
// comes first on the processors of callsHere.
const (
	dataCall  = 0
	dataArch  = 4
	dataFirst = 16
)

// restrictCalls denies system calls to all threads. If signals is set, it also denies
// calls that send signals to other processes.
func restrictCalls(signals bool) error {
	return install(program(uint32(os.Getpid()), signals))
}

// program returns the filter for the process with the number own.
//
// The programs that this process starts have other numbers. On themselves they can use
// the calls that take 0 for their own number. If signals is set, they cannot send
// signals: when such a process calls abort, the C library ends it in another way.
func program(own uint32, signals bool) []unix.SockFilter {
	p := []unix.SockFilter{
		load(dataArch),
		jump(unix.BPF_JEQ, auditArch, 1, 0),
		answer(unix.EPERM), // a call of a 32-bit program: its numbers have other meanings
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
	p = append(p,
		// The flags of clone3 are in memory, where a filter cannot see them. C libraries
		// take ENOSYS for the answer of an old kernel, and call clone.
		jump(unix.BPF_JEQ, unix.SYS_CLONE3, 0, 1), answer(unix.ENOSYS),
		jump(unix.BPF_JEQ, unix.SYS_CLONE, 0, 4),
		load(dataFirst),
		jump(unix.BPF_JSET, noClone, 0, 1), answer(unix.EPERM),
		allow,
	)
	self := []uint32{0, own}
	var rules [][]unix.SockFilter
	for _, call := range []uintptr{
		unix.SYS_PRLIMIT64, unix.SYS_SCHED_SETAFFINITY, unix.SYS_SCHED_SETSCHEDULER, unix.SYS_SCHED_SETPARAM,
		unix.SYS_SCHED_SETATTR, unix.SYS_MIGRATE_PAGES, unix.SYS_MOVE_PAGES,
	} {
		rules = append(rules, only(call, argument{0, self}))
	}
	const ioprioWhoProcess = 1
	rules = append(rules,
		only(unix.SYS_SETPRIORITY, argument{0, []uint32{unix.PRIO_PROCESS}}, argument{1, self}),
		only(unix.SYS_IOPRIO_SET, argument{0, []uint32{ioprioWhoProcess}}, argument{1, self}),
		except(unix.SYS_IOCTL, argument{1, controls}),
		except(unix.SYS_FCNTL, argument{1, fileControls}),
	)
	if signals {
		// The process leads its own group. The group has only processes that it has
		// started.
		rules = append(rules,
			only(unix.SYS_KILL, argument{0, []uint32{0, own, -own}}),
			only(unix.SYS_TGKILL, argument{0, []uint32{own}}),
			only(unix.SYS_RT_SIGQUEUEINFO, argument{0, []uint32{own}}),
			only(unix.SYS_RT_TGSIGQUEUEINFO, argument{0, []uint32{own}}),
			only(unix.SYS_TKILL, argument{0, nil}),
			only(unix.SYS_PIDFD_SEND_SIGNAL, argument{0, nil}),
		)
	}
	return append(slices.Concat(append([][]unix.SockFilter{p}, rules...)...), allow)
}

// An argument is the index of a system call's argument, counted from 0, and values for
// it.
type argument struct {
	index  uint32
	values []uint32
}

var allow = unix.SockFilter{Code: unix.BPF_RET | unix.BPF_K, K: unix.SECCOMP_RET_ALLOW}

// only returns a rule that allows a call when each of the arguments has one of its
// values.
func only(call uintptr, args ...argument) (rule []unix.SockFilter) {
	for _, a := range args {
		rule = append(rule, load(dataFirst+8*a.index))
		for i, v := range a.values {
			rule = append(rule, jump(unix.BPF_JEQ, v, uint8(len(a.values)-i), 0))
		}
		rule = append(rule, answer(unix.EPERM))
	}
	return when(call, append(rule, allow))
}

// except returns a rule that allows a call unless the argument has one of the values.
func except(call uintptr, a argument) []unix.SockFilter {
	rule := []unix.SockFilter{load(dataFirst + 8*a.index)}
	for i, v := range a.values {
		rule = append(rule, jump(unix.BPF_JEQ, v, uint8(len(a.values)-i), 0))
	}
	return when(call, append(rule, allow, answer(unix.EPERM)))
}

// when applies a rule to one call only. The rule decides about the call.
func when(call uintptr, rule []unix.SockFilter) []unix.SockFilter {
	return append([]unix.SockFilter{jump(unix.BPF_JEQ, uint32(call), 0, uint8(len(rule)))}, rule...)
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

// install puts a filter before the system calls of all threads. The calling thread has
// no_new_privs, and the kernel hands no_new_privs to the other threads.
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
