package peer

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"syscall"

	"golang.org/x/sys/unix"

	"p11-agent/pinentry/plain"
	"p11-agent/pinentry/procstat"
)

// terminalPrograms are the files of programs that make terminals for people. Such a program starts
// the leader of the session on a terminal, and passes on what a person types.
var terminalPrograms = nameSet(
	// logins
	"login", "sshd", "sshd-session", "su", "sudo", "runuser", "mosh-server",
	// multiplexers
	"tmux", "screen", "zellij", "dtach", "abduco",
	// windows
	"xterm", "urxvt", "rxvt", "st", "alacritty", "kitty", "foot", "wezterm-gui", "ghostty",
	"gnome-terminal-server", "kgx", "ptyxis-agent", "konsole", "yakuake", "xfce4-terminal", "mate-terminal",
	"lxterminal", "qterminal", "tilix",
)

func nameSet(names ...string) map[string]bool {
	set := make(map[string]bool, len(names))
	for _, name := range names {
		set[name] = true
	}
	return set
}

// Established returns nil if the terminal was there before the process. Then an older process leads
// the session there. Root has started that leader, or a program of terminalPrograms that root has
// installed, such as tmux, sshd or a window. A console and a serial line need the older leader
// only. Otherwise the error says why the process may have made the terminal itself, and so could
// press the keys there.
//
// This is not a proof. A program of the same user can start tmux, and can type into the tmux of the
// person. But a process cannot open a pseudo-terminal for its own children.
func (t *Terminal) Established() error {
	s, err := t.of.stat()
	if err != nil {
		return err
	}
	_, at, ok := t.of.member(s, t.rdev)
	if !ok {
		return fmt.Errorf("%s has left its terminal", t.of.who)
	}
	leader, ok := procstat.Of(at.Session)
	switch {
	case !ok || leader.Session != at.Session || ttyDevice(leader.TTY) != t.rdev:
		return fmt.Errorf("no process leads the session on the terminal of %s", t.of.who)
	case at.Session == t.of.pid:
		return fmt.Errorf("%s leads the session on its terminal itself, and so can have made the terminal", t.of.who)
	case leader.Start > s.Start:
		return fmt.Errorf("the session on the terminal of %s is younger than the process", t.of.who)
	case t.rdev.major < majorPts || t.rdev.major > lastMajorPts:
		return nil // a terminal of the kernel: no process types into it
	}
	maker, ok := parentOf(at.Session, leader)
	if !ok || leader.Parent <= 1 {
		return fmt.Errorf("the program that made the terminal of %s has ended, or cannot be seen", t.of.who)
	}
	if err := vouches(leader.Parent, maker, os.Geteuid()); err != nil {
		return fmt.Errorf("the terminal of %s: %w", t.of.who, err)
	}
	// The data, read by a number, belongs to the process only if it is still the same.
	if again, ok := procstat.Of(leader.Parent); !ok || again.Start != maker.Start {
		return fmt.Errorf("the program that made the terminal of %s has ended, or cannot be seen", t.of.who)
	}
	return nil
}

// vouches returns nil if a process that has started the leader of a session makes terminals for
// people. The error says why the process may be any program. uid is the agent's.
func vouches(pid int, s procstat.Stat, uid int) error {
	ids, err := readIDs(pid)
	if err != nil {
		return err
	}
	shown := plain.Program(s.Name, maxName)
	if uid != 0 && ids.isRoot() {
		return nil // the administrator's: sshd, login, su, sudo
	}
	if ids.uid[1] != uint32(uid) {
		return fmt.Errorf("made by %s (%d), a process of another user", shown, pid)
	}
	path, err := os.Readlink(procFile(pid, "exe"))
	switch {
	case errors.Is(err, os.ErrPermission):
		return vouchesHidden(pid, s, ids, uid)
	case err != nil:
		return fmt.Errorf("the program that made it has ended (%d)", pid)
	}
	shown = plain.Program(filepath.Base(path), maxName)
	switch {
	case !terminalPrograms[filepath.Base(path)]:
		return fmt.Errorf("made by %s (%d), which is not a known terminal program", shown, pid)
	case !installed(procFile(pid, "exe")) || !installed(filepath.Dir(path)):
		return fmt.Errorf("made by %s (%d), which root has not installed", shown, pid)
	}
	return nil
}

// vouchesHidden does the same as vouches, for a process that the kernel hides. Two kinds of
// hidden processes make terminals. One is the part of sshd that has become the user: a child
// of a process of root. The other is a program with the set-group-ID bit, as screen may have.
func vouchesHidden(pid int, s procstat.Stat, ids ids, uid int) error {
	if parent, ok := parentOf(pid, s); ok && s.Parent > 1 && uid != 0 {
		if of, err := readIDs(s.Parent); err == nil && of.isRoot() && parent.Start <= s.Start {
			return nil
		}
	}
	if ids.gid[1] != ids.gid[0] && terminalPrograms[string(s.Name)] {
		return nil
	}
	return fmt.Errorf("made by %s (%d), about which the kernel shows nothing", plain.Program(s.Name, maxName), pid)
}

// installed tells whether a file belongs to root and only root may change it.
func installed(path string) bool {
	st, err := os.Stat(path)
	if err != nil {
		return false
	}
	sys, ok := st.Sys().(*syscall.Stat_t)
	return ok && sys.Uid == 0 && st.Mode().Perm()&0o022 == 0
}

// ids are the real, effective, saved and filesystem ids of a process.
type ids struct{ uid, gid [4]uint32 }

// isRoot tells whether all user ids are root's. A program with the set-user-ID bit that a user has
// started has the user's real id.
func (i ids) isRoot() bool { return i.uid == [4]uint32{} }

// readIDs reads the ids of a process (proc_pid_status(5)). The owner of a directory in /proc would
// not do: it is root if the process is not dumpable.
func readIDs(pid int) (ids, error) {
	fd, err := unix.Open(procFile(pid, "status"), unix.O_RDONLY|unix.O_CLOEXEC, 0)
	if err != nil {
		return ids{}, fmt.Errorf("the program that made it has ended (%d)", pid)
	}
	defer unix.Close(fd) //nolint:errcheck // nothing was written
	// The wanted lines are among the first ten. The line with the name is the longest.
	buf := scratch.Get().(*[unix.PathMax]byte)
	defer scratch.Put(buf)
	n, err := unix.Read(fd, buf[:])
	if err != nil {
		return ids{}, fmt.Errorf("process %d cannot be looked at: %w", pid, err)
	}
	i, ok := parseIDs(buf[:n])
	if !ok {
		return ids{}, fmt.Errorf("process %d cannot be looked at", pid)
	}
	return i, nil
}

// parseIDs finds the lines Uid and Gid. A name cannot pass for such a line: the kernel writes a
// line end in a name as \n, with a backslash.
func parseIDs(status []byte) (i ids, ok bool) {
	found := 0
	for line := range bytes.Lines(status) {
		name, rest, _ := bytes.Cut(line, []byte(":"))
		var into *[4]uint32
		switch string(name) {
		case "Uid":
			into = &i.uid
		case "Gid":
			into = &i.gid
		default:
			continue
		}
		fields := bytes.Fields(rest)
		if len(fields) != len(into) {
			return ids{}, false
		}
		for n, field := range fields {
			id, err := strconv.ParseUint(string(field), 10, 32)
			if err != nil {
				return ids{}, false
			}
			into[n] = uint32(id)
		}
		found++
	}
	return i, found == 2
}
