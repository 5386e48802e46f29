package paths

import (
	"cmp"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// AgentSocket returns where the agent listens. flag is the path of the flag -a. Without it
// the agent takes the socket of the runtime directory. It takes a private socket where the
// runtime directory is not usable, and for each agent of a command: a user may run several
// at once, beside the agent that all other programs use. warn is told why the socket is
// not in the runtime directory.
func AgentSocket(flag string, command bool, warn func(error)) (string, error) {
	if flag != "" {
		return filepath.Abs(flag)
	}
	dir := os.Getenv("XDG_RUNTIME_DIR")
	if dir == "" || command || usableRuntimeDir(dir) != nil {
		return PrivateSocket(warn)
	}
	return socketIn(dir, AgentName), nil
}

// SetupSocket returns where setup lets the agent of this user listen.
func SetupSocket() string {
	if os.Getenv("XDG_RUNTIME_DIR") != "" {
		if path, err := AgentSocket("", false, func(error) {}); err == nil {
			return path
		}
	}
	return cmp.Or(StateSocket(), UserSocket())
}

// usableRuntimeDir returns why the agent cannot use a runtime directory. su and sudo leave
// the directory of another user in the environment.
func usableRuntimeDir(dir string) error {
	st, err := os.Stat(dir)
	if err != nil {
		return fmt.Errorf("XDG_RUNTIME_DIR: %w", err)
	}
	if sys, ok := st.Sys().(*syscall.Stat_t); !ok || !st.IsDir() || int(sys.Uid) != os.Geteuid() || !filepath.IsAbs(dir) {
		return fmt.Errorf("XDG_RUNTIME_DIR: %s is not a directory of this user", dir)
	}
	if err := unix.Access(dir, unix.W_OK|unix.X_OK); err != nil {
		return fmt.Errorf("XDG_RUNTIME_DIR: write to %s: %w", dir, err)
	}
	return nil
}

// PrivateSocket makes a private directory and returns the path of a socket in it. The
// directory is in the runtime directory, or in the state directory, or in the directory
// for temporary files. ssh-agent used the last one before OpenSSH 10.1. There a module
// process may write: it can replace the socket by its own. warn is told why the socket is
// not in the runtime directory.
func PrivateSocket(warn func(error)) (string, error) {
	if dir := os.Getenv("XDG_RUNTIME_DIR"); dir != "" {
		err := usableRuntimeDir(dir)
		if err == nil {
			return newSocketDir(dir, runtimePrefix)
		}
		warn(fmt.Errorf("%w: the agent takes another directory for its socket", err))
	}
	state := StateDir()
	err := errors.New("neither XDG_STATE_HOME nor HOME is set")
	if state != "" {
		if err = os.MkdirAll(state, 0o700); err == nil {
			prefix := statePrefix + hostTag() + "-"
			removeStale(filepath.Join(state, prefix+"*"), time.Now())
			var path string
			if path, err = newSocketDir(state, prefix); err == nil {
				return path, nil
			}
		}
	}
	path, tempErr := newSocketDir(os.TempDir(), runtimePrefix)
	if tempErr != nil {
		return "", fmt.Errorf("make a directory for the socket: %w: name another place with -a", errors.Join(err, tempErr))
	}
	warn(fmt.Errorf("make a directory for the socket: %w: it is in %s now, where a module could put a socket of its own in that place", err, filepath.Dir(path)))
	return path, nil
}

// newSocketDir makes a private directory for a socket, and returns the path of the socket.
func newSocketDir(in, prefix string) (string, error) {
	dir, err := os.MkdirTemp(in, prefix)
	return filepath.Join(dir, AgentName+"."+strconv.Itoa(os.Getpid())), err
}

// hostTag stands for this host in the name of a directory. The home directory may be on a
// network file system, where the sockets of other hosts look abandoned.
func hostTag() string {
	name, err := os.Hostname()
	if err != nil {
		name = "localhost"
	}
	sum := sha256.Sum256([]byte(name))
	return hex.EncodeToString(sum[:3])
}

// staleAfter is how old an abandoned directory is at least: the directory of an agent that
// starts has no socket that answers.
const staleAfter = time.Hour

// removeStale removes the directories in the state directory whose agents were killed. The
// system removes the runtime directory itself.
func removeStale(pattern string, now time.Time) {
	dirs, _ := filepath.Glob(pattern)
	for _, dir := range dirs {
		st, err := os.Lstat(dir)
		if err != nil || !st.IsDir() || now.Sub(st.ModTime()) < staleAfter {
			continue
		}
		sockets, err := os.ReadDir(dir)
		if err != nil || slices.ContainsFunc(sockets, func(e os.DirEntry) bool { return !abandoned(filepath.Join(dir, e.Name())) }) {
			continue
		}
		for _, e := range sockets {
			_ = os.Remove(filepath.Join(dir, e.Name())) // a socket that stays keeps the directory
		}
		_ = os.Remove(dir)
	}
}

// abandoned tells whether a path is a socket without a listener.
func abandoned(path string) bool {
	st, err := os.Lstat(path)
	if err != nil || st.Mode().Type() != os.ModeSocket {
		return false
	}
	c, err := net.Dial("unix", path)
	if err == nil {
		_ = c.Close()
	}
	return errors.Is(err, syscall.ECONNREFUSED)
}

// PrivateDir returns the directory that PrivateSocket made for this socket, or "".
func PrivateDir(socket string) string {
	dir := filepath.Dir(socket)
	name := filepath.Base(dir)
	if strings.HasPrefix(name, runtimePrefix) || strings.HasPrefix(name, statePrefix) && filepath.Dir(dir) == StateDir() {
		return dir
	}
	return ""
}

// The first letters of the directories that PrivateSocket makes, in the runtime directory
// and in the state directory. The second is short, as the path of a socket must be.
const (
	runtimePrefix = directory + "-"
	statePrefix   = "s-"
)

// RemovePrivateDir removes the directory that PrivateSocket made for this socket, once it
// is empty.
func RemovePrivateDir(socket string) {
	if dir := PrivateDir(socket); dir != "" {
		// Remove fails on a directory with files in it: such a directory stays.
		_ = os.Remove(dir)
	}
}
