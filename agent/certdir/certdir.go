// Package certdir reads a directory of OpenSSH certificates, and reads it again when a
// file has changed. The keyring decides which of the certificates count.
package certdir

import (
	"errors"
	"fmt"
	"io"
	"io/fs"
	"log/slog"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"golang.org/x/crypto/ssh"

	"p11-agent/agent/sshkey"
)

const (
	maxFiles = 1024
	maxSize  = 64 << 10
)

// A Dir is a directory of certificates, in files that end in .pub as ssh-keygen writes
// them. Look reads it again, so that a renewed certificate counts at once. All methods
// may be called from any goroutine. A nil Dir has no certificates.
type Dir struct {
	path string
	log  *slog.Logger
	now  atomic.Pointer[snapshot]

	mu    sync.Mutex // held while the directory is read; no caller waits for it
	files map[string]file
}

// A snapshot is the content of the directory at one time.
type snapshot struct {
	generation uint64
	all        []*ssh.Certificate // in the order of their files' names
}

type file struct {
	size  int64
	mtime time.Time
	inode uint64
	cert  *ssh.Certificate // nil: the file has none
}

// New returns the certificates in a directory, which may be missing.
func New(path string, log *slog.Logger) *Dir {
	d := &Dir{path: path, log: log, files: make(map[string]file)}
	d.now.Store(new(snapshot))
	d.Look()
	return d
}

// Generation changes whenever Look finds other certificates.
func (d *Dir) Generation() uint64 {
	if d == nil {
		return 0
	}
	return d.now.Load().generation
}

// Certificates returns the certificates that Look found last, in the order of their
// files' names.
func (d *Dir) Certificates() []*ssh.Certificate {
	if d == nil {
		return nil
	}
	return d.now.Load().all
}

// Look reads what has changed. It returns at once while another goroutine reads.
func (d *Dir) Look() {
	if d == nil || !d.mu.TryLock() {
		return
	}
	defer d.mu.Unlock()
	entries, err := os.ReadDir(d.path)
	if err != nil {
		if !errors.Is(err, fs.ErrNotExist) && len(d.files) > 0 {
			d.log.Warn("certificates cannot be looked for", "reason", err)
		}
		entries = nil
	}
	files := make(map[string]file)
	for _, e := range entries {
		if !strings.HasSuffix(e.Name(), ".pub") {
			continue
		}
		if len(files) == maxFiles {
			d.log.Warn("not all certificates are read", "directory", d.path, "limit", maxFiles)
			break
		}
		path := filepath.Join(d.path, e.Name())
		st, err := os.Stat(path)
		if err != nil {
			continue // the file has just gone
		}
		f := file{size: st.Size(), mtime: st.ModTime()}
		if sys, ok := st.Sys().(*syscall.Stat_t); ok {
			f.inode = sys.Ino
		}
		if old, ok := d.files[e.Name()]; ok && old.size == f.size && old.mtime.Equal(f.mtime) && old.inode == f.inode {
			f.cert = old.cert
		} else if f.cert, err = read(path); err != nil {
			d.log.Warn("certificate cannot be used", "file", path, "reason", err)
		}
		files[e.Name()] = f
	}
	if maps.Equal(files, d.files) {
		return
	}
	d.files = files
	next := &snapshot{generation: d.now.Load().generation + 1}
	for _, name := range slices.Sorted(maps.Keys(files)) {
		if c := files[name].cert; c != nil {
			next.all = append(next.all, c)
		}
	}
	d.now.Store(next)
}

// read returns nil without an error for a plain public key.
func read(path string) (*ssh.Certificate, error) {
	f, err := os.OpenFile(path, os.O_RDONLY|syscall.O_NONBLOCK, 0)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	if st, err := f.Stat(); err != nil || !st.Mode().IsRegular() {
		return nil, errors.Join(errors.New("not a regular file"), err)
	}
	b, err := io.ReadAll(io.LimitReader(f, maxSize+1))
	if err != nil {
		return nil, err
	}
	if len(b) > maxSize {
		return nil, fmt.Errorf("longer than %d bytes", maxSize)
	}
	key, _, _, _, err := ssh.ParseAuthorizedKey(b)
	if err != nil {
		return nil, errors.New("not an OpenSSH public key")
	}
	cert, ok := key.(*ssh.Certificate)
	if !ok {
		return nil, nil
	}
	if err := sshkey.Readable(cert); err != nil {
		return nil, err
	}
	return cert, nil
}

// A File is a file of a directory of certificates.
type File struct {
	Path string
	// Certificate is nil if Err says why it cannot be used.
	Certificate *ssh.Certificate
	Err         error
}

// Read reads a directory once, as a Dir does. It returns each file that has a
// certificate and each that cannot be read, in the order of their names. The error is
// that of the directory.
func Read(dir string) ([]File, error) {
	entries, err := os.ReadDir(dir)
	if err != nil {
		return nil, err
	}
	var all []File
	for _, e := range entries {
		if !strings.HasSuffix(e.Name(), ".pub") || len(all) == maxFiles {
			continue
		}
		f := File{Path: filepath.Join(dir, e.Name())}
		if f.Certificate, f.Err = read(f.Path); f.Certificate != nil || f.Err != nil {
			all = append(all, f)
		}
	}
	return all, nil
}
