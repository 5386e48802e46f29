package peer

import (
	"errors"
	"fmt"
	"path/filepath"

	"golang.org/x/sys/unix"

	"p11-agent/pinentry/plain"
)

// systemDirs are where systems have their programs: those of the file system
// hierarchy, and NixOS's.
var systemDirs = []string{"/usr/bin", "/usr/local/bin", "/bin", "/run/current-system/sw/bin"}

// RunsSystemProgram tells whether the process runs the program of that name that the
// administrator has installed: the very file that systemDirs have, which root alone may
// change, and not in a namespace of another kind than this process is in, as sandboxes
// and containers make them. nil: it does.
//
// It is the program's file that is known, and not what the process does. Another
// program of the same user can start that file with a library of its own in it
// (LD_PRELOAD), trace it (ptrace), or connect before it runs it (execve).
func (p Peer) RunsSystemProgram(name string) error {
	if p.Program == (Program{}) {
		return errors.New("the program of the process that asks cannot be seen")
	}
	if !isSystemProgram(name, p.Program) {
		return fmt.Errorf("it comes from %s, which is not the %s of the system", plain.Program(filepath.Base(p.Program.Path), maxName), name)
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
	// What was read is the process's own only if it has been there all the while.
	if programOf(pr.pid) != p.Program {
		return fmt.Errorf("%s runs another program meanwhile", pr.who)
	}
	return pr.same()
}

// isSystemProgram tells whether a file is the program of that name in one of
// systemDirs, and whether root alone may change the file and its directory.
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

// rootsOwn tells whether root alone may write a file.
func rootsOwn(st *unix.Stat_t) bool { return st.Uid == 0 && st.Mode&0o022 == 0 }

// namespace identifies a namespace.
func namespace(link string) (id [2]uint64, err error) {
	var st unix.Stat_t
	if err := unix.Stat(link, &st); err != nil {
		return id, fmt.Errorf("the namespaces of a process cannot be seen: %w", err)
	}
	return [2]uint64{uint64(st.Dev), st.Ino}, nil
}
