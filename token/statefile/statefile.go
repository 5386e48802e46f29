// Package statefile reads and writes the files that the agent keeps in its state directory.
//
// Read refuses a file that another user can have written. Write replaces a file as a whole,
// so that a reader sees the old content or the new content. What the files hold is decided
// by the packages that use them.
package statefile

import (
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"syscall"

	"github.com/google/renameio/v2"
)

// Read returns the content of a regular file of this user, of at most limit bytes. It fails
// when another user can write the file, and it follows no symbolic link. The error matches
// fs.ErrNotExist when there is no file.
func Read(path string, limit int64) ([]byte, error) {
	f, err := os.OpenFile(path, os.O_RDONLY|syscall.O_NOFOLLOW|syscall.O_NONBLOCK, 0)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	st, err := f.Stat()
	if err != nil {
		return nil, err
	}
	sys, ok := st.Sys().(*syscall.Stat_t)
	switch {
	case !st.Mode().IsRegular():
		return nil, errors.New("not a regular file")
	case !ok || int(sys.Uid) != os.Geteuid():
		return nil, errors.New("the file belongs to another user")
	case st.Mode().Perm()&0o022 != 0:
		return nil, fmt.Errorf("other users can write the file (mode %#o)", st.Mode().Perm())
	}
	b, err := io.ReadAll(io.LimitReader(f, limit+1))
	if err == nil && int64(len(b)) > limit {
		err = fmt.Errorf("the file has more than %d bytes", limit)
	}
	return b, err
}

// Write replaces a file with one that only this user can read (mode 0600). It makes the
// directory of the file when that is missing. After a crash the file has the old content or
// the new content.
func Write(path string, content []byte) error {
	dir := filepath.Dir(path)
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return err
	}
	// The temporary file lies in the same directory: TMPDIR is open to other users.
	f, err := renameio.NewPendingFile(path, renameio.WithTempDir(dir), renameio.WithPermissions(0o600))
	if err != nil {
		return err
	}
	defer f.Cleanup() //nolint:errcheck // it does nothing after the file has been replaced
	if _, err := f.Write(content); err != nil {
		return err
	}
	return f.CloseAtomicallyReplace()
}
