package agent

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
)

const (
	maxCertificateFiles = 1024
	maxCertificateSize  = 64 << 10
)

// A CertificateDir is a directory of certificates, in files that end in .pub as
// ssh-keygen writes them. It is looked at again whenever keys are listed, so that
// a renewed certificate counts at once. Methods may be called from any goroutine.
type CertificateDir struct {
	path string
	log  *slog.Logger
	now  atomic.Pointer[certificates]

	mu    sync.Mutex // held while the directory is read: nobody waits for it
	files map[string]certificateFile
}

// certificates is what was in the directory at one time.
type certificates struct {
	generation uint64
	all        []*ssh.Certificate // in the order of their files' names
}

type certificateFile struct {
	size  int64
	mtime time.Time
	inode uint64
	cert  *ssh.Certificate // nil: none is in it
}

// NewCertificateDir returns the certificates in a directory, which need not be
// there yet.
func NewCertificateDir(path string, log *slog.Logger) *CertificateDir {
	d := &CertificateDir{path: path, log: log, files: make(map[string]certificateFile)}
	d.now.Store(new(certificates))
	d.look()
	return d
}

// generation changes when the certificates do; look sees to that.
func (d *CertificateDir) generation() uint64 {
	if d == nil {
		return 0
	}
	return d.now.Load().generation
}

func (d *CertificateDir) certificates() []*ssh.Certificate {
	if d == nil {
		return nil
	}
	return d.now.Load().all
}

// look reads what has changed. Who comes while another one reads goes on with
// what was there before.
func (d *CertificateDir) look() {
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
	files := make(map[string]certificateFile)
	for _, e := range entries {
		if !strings.HasSuffix(e.Name(), ".pub") {
			continue
		}
		if len(files) == maxCertificateFiles {
			d.log.Warn("not all certificates are read", "directory", d.path, "limit", maxCertificateFiles)
			break
		}
		path := filepath.Join(d.path, e.Name())
		st, err := os.Stat(path)
		if err != nil {
			continue // it has just gone
		}
		f := certificateFile{size: st.Size(), mtime: st.ModTime()}
		if sys, ok := st.Sys().(*syscall.Stat_t); ok {
			f.inode = sys.Ino
		}
		if old, ok := d.files[e.Name()]; ok && old.size == f.size && old.mtime.Equal(f.mtime) && old.inode == f.inode {
			f.cert = old.cert
		} else if f.cert, err = readCertificate(path); err != nil {
			d.log.Warn("certificate cannot be used", "file", path, "reason", err)
		}
		files[e.Name()] = f
	}
	if maps.Equal(files, d.files) {
		return
	}
	d.files = files
	next := &certificates{generation: d.now.Load().generation + 1}
	for _, name := range slices.Sorted(maps.Keys(files)) {
		if c := files[name].cert; c != nil {
			next.all = append(next.all, c)
		}
	}
	d.now.Store(next)
}

// readCertificate returns nil without an error for a plain public key.
func readCertificate(path string) (*ssh.Certificate, error) {
	f, err := os.OpenFile(path, os.O_RDONLY|syscall.O_NONBLOCK, 0)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	if st, err := f.Stat(); err != nil || !st.Mode().IsRegular() {
		return nil, errors.Join(errors.New("it is not a regular file"), err)
	}
	b, err := io.ReadAll(io.LimitReader(f, maxCertificateSize+1))
	if err != nil {
		return nil, err
	}
	if len(b) > maxCertificateSize {
		return nil, fmt.Errorf("it is longer than %d bytes", maxCertificateSize)
	}
	key, _, _, _, err := ssh.ParseAuthorizedKey(b)
	if err != nil {
		return nil, errors.New("it is no OpenSSH public key")
	}
	cert, ok := key.(*ssh.Certificate)
	if !ok {
		return nil, nil
	}
	if err := Readable(cert); err != nil {
		return nil, err
	}
	return cert, nil
}

// A CertificateFile is a file of a directory of certificates.
type CertificateFile struct {
	Path string
	// Certificate is nil when Err says why it cannot be used.
	Certificate *ssh.Certificate
	Err         error
}

// ReadCertificates reads the directory as a CertificateDir does, once, and tells
// of each file with a certificate and of each that cannot be read, by their names.
// The error is that of the directory.
func ReadCertificates(dir string) ([]CertificateFile, error) {
	entries, err := os.ReadDir(dir)
	if err != nil {
		return nil, err
	}
	var all []CertificateFile
	for _, e := range entries {
		if !strings.HasSuffix(e.Name(), ".pub") || len(all) == maxCertificateFiles {
			continue
		}
		f := CertificateFile{Path: filepath.Join(dir, e.Name())}
		if f.Certificate, f.Err = readCertificate(f.Path); f.Certificate != nil || f.Err != nil {
			all = append(all, f)
		}
	}
	return all, nil
}

// valid tells whether a certificate counts now, and when that changes; zero:
// never.
func valid(cert *ssh.Certificate, now time.Time) (bool, time.Time) {
	const forever = uint64(ssh.CertTimeInfinity)
	at := uint64(max(0, now.Unix()))
	switch {
	case at < cert.ValidAfter:
		return false, unixTime(cert.ValidAfter)
	case at >= cert.ValidBefore && cert.ValidBefore != forever:
		return false, time.Time{}
	default:
		return true, unixTime(cert.ValidBefore)
	}
}

// unixTime is zero for times that do not come.
func unixTime(seconds uint64) time.Time {
	if seconds > 1<<40 {
		return time.Time{}
	}
	return time.Unix(int64(seconds), 0)
}
