package peer

import (
	"errors"
	"fmt"
	"path/filepath"

	"golang.org/x/sys/unix"

	"p11-agent/pinentry/plain"
)

// systemDirs are the directories of a system's programs: those of the file system hierarchy, and of
// NixOS.
var systemDirs = []string{"/usr/bin", "/usr/local/bin", "/bin", "/run/current-system/sw/bin"}

// RunsSystemProgram returns nil if the process runs the installed program of that name: a file in
// systemDirs that only root may change. The process must live in the namespaces of this process,
// and not in those of a sandbox or container.
//
// It knows the program's file, not what the process does. Another program of the same user
// can start that file with a library of its own (LD_PRELOAD) or trace it (ptrace). It can
// also connect before it runs that file (execve).
func (p Peer) RunsSystemProgram(name string) error {
	if p.Program == (Program{}) {
		return errors.New("the program of the process that asks cannot be seen")
	}
	if !isSystemProgram(name, p.Program) {
		return fmt.Errorf("the request comes from %s, which is not the %s of the system", plain.Program(filepath.Base(p.Program.Path), maxName), name)
	}
	pr, err := p.open()
	if err != nil {
		return err
	}
	defer pr.close()
	for _, kind := range []string{"user", "mnt", "pid"} {
		ours, err := namespace("/proc/self/ns/" + kind)
		if err != nil {
			return err
		}
		if theirs, err := namespace(procFile(pr.pid, "ns/"+kind)); err != nil || theirs != ours {
			return fmt.Errorf("%s is in a sandbox or container", pr.who)
		}
	}
	// The data belongs to the process only if the process lived all the while.
	if programOf(pr.pid) != p.Program {
		return fmt.Errorf("%s runs another program meanwhile", pr.who)
	}
	return pr.same()
}

// isSystemProgram tells whether a file is the program of that name in one of systemDirs.
// The result is true only if root alone may change the file and its directory.
func isSystemProgram(name string, file Program) bool {
	for _, dir := range systemDirs {
		var st unix.Stat_t
		if unix.Stat(filepath.Join(dir, name), &st) == nil &&
			uint64(st.Dev) == file.Dev && st.Ino == file.Ino && rootsOwn(&st) &&
			unix.Stat(dir, &st) == nil && rootsOwn(&st) {
			return true
		}
	}
	return false
}

// rootsOwn tells whether only root may write a file.
func rootsOwn(st *unix.Stat_t) bool { return st.Uid == 0 && st.Mode&0o022 == 0 }

// namespace returns the device and inode that identify a namespace.
func namespace(link string) (id [2]uint64, err error) {
	var st unix.Stat_t
	if err := unix.Stat(link, &st); err != nil {
		return id, fmt.Errorf("the namespaces of a process cannot be seen: %w", err)
	}
	return [2]uint64{uint64(st.Dev), st.Ino}, nil
}
