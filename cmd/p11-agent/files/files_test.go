package files

import (
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"
)

// A line is put before what is there; the mode of the file and a link to it stay.
func TestPrepend(t *testing.T) {
	dir := t.TempDir()
	file, link := filepath.Join(dir, "real"), filepath.Join(dir, "config")
	read := func() string {
		t.Helper()
		b, err := os.ReadFile(file)
		if err != nil {
			t.Fatal(err)
		}
		return string(b)
	}
	if err := Prepend(file, "Include a\n\n"); err != nil || read() != "Include a\n\n" {
		t.Errorf("a new file: %v, %q", err, read())
	}
	if st, err := os.Stat(file); err != nil || st.Mode() != 0o600 {
		t.Errorf("the mode of a new file: %v, %v", st.Mode(), err)
	}
	if err := os.WriteFile(file, []byte("Host x"), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.Chmod(file, 0o640); err != nil {
		t.Fatal(err)
	}
	if err := os.Symlink("real", link); err != nil {
		t.Fatal(err)
	}
	if err := Prepend(link, "Include a\n\n"); err != nil || read() != "Include a\n\nHost x" {
		t.Errorf("by a link: %v, %q", err, read())
	}
	if st, err := os.Lstat(link); err != nil || st.Mode().Type() != os.ModeSymlink {
		t.Errorf("the link is gone: %v, %v", st, err)
	}
	if st, err := os.Stat(file); err != nil || st.Mode() != 0o640 {
		t.Errorf("the mode is %v now, %v", st.Mode(), err)
	}
	// Nothing is made of what is no file.
	if err := os.Symlink("nowhere", filepath.Join(dir, "broken")); err != nil {
		t.Fatal(err)
	}
	for name, file := range map[string]string{"a directory": dir, "a link to nothing": filepath.Join(dir, "broken")} {
		if err := Prepend(file, "Include a\n"); err == nil {
			t.Errorf("%s was replaced", name)
		}
	}
	if err := os.Truncate(file, maxText+1); err != nil {
		t.Fatal(err)
	}
	if err := Prepend(file, "Include a\n"); err == nil || !strings.Contains(err.Error(), "stays as it is") {
		t.Errorf("a large file: %v", err)
	}
	if left, _ := filepath.Glob(filepath.Join(dir, ".*")); left != nil {
		t.Errorf("left behind: %q", left)
	}
}

// A file that comes in the meantime is not replaced either.
func TestCreate(t *testing.T) {
	file := filepath.Join(t.TempDir(), "x.pub")
	for _, tt := range []struct {
		text  string
		force bool
		want  error
		left  string
	}{{"one", false, nil, "one"}, {"two", false, os.ErrExist, "one"}, {"three", true, nil, "three"}} {
		write := Create
		if tt.force {
			write = Overwrite
		}
		if err := write(file, []byte(tt.text), 0o644); !errors.Is(err, tt.want) {
			t.Errorf("%s: got %v, want %v", tt.text, err, tt.want)
		}
		b, err := os.ReadFile(file)
		if err != nil || string(b) != tt.left {
			t.Errorf("%s: the file has %q, %v", tt.text, b, err)
		}
	}
	if left, err := filepath.Glob(filepath.Join(filepath.Dir(file), ".*")); err != nil || len(left) > 0 {
		t.Errorf("left: %q, %v", left, err)
	}
}
