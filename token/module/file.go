package module

import (
	"debug/elf"
	"errors"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"runtime"
)

// machines are the names that people know processors by.
var machines = map[elf.Machine]string{
	elf.EM_386:       "32-bit x86",
	elf.EM_X86_64:    "64-bit x86",
	elf.EM_ARM:       "32-bit ARM",
	elf.EM_AARCH64:   "64-bit ARM",
	elf.EM_RISCV:     "RISC-V",
	elf.EM_PPC64:     "64-bit PowerPC",
	elf.EM_S390:      "IBM Z",
	elf.EM_LOONGARCH: "LoongArch",
}

// checkFile finds out what the dynamic loader would put in words that help
// nobody: a file that is missing, no library, or one for another computer. What
// it lets pass may still fail to load.
func checkFile(path string) error {
	if !filepath.IsAbs(path) {
		return loadError("%s: its path must be absolute", path)
	}
	info, err := os.Stat(path) // through symbolic links, as the loader does
	switch {
	case errors.Is(err, fs.ErrNotExist):
		return loadError("%s: there is no such file", path)
	case err != nil:
		return loadError("%s: %v", path, err)
	case !info.Mode().IsRegular():
		return loadError("%s: it is no regular file", path)
	}
	f, err := elf.Open(path)
	if _, ok := errors.AsType[*elf.FormatError](err); ok || errors.Is(err, io.EOF) || errors.Is(err, io.ErrUnexpectedEOF) {
		return loadError("%s: it is not a shared library", path)
	}
	if err != nil {
		return loadError("%s: %v", path, err)
	}
	defer f.Close()
	if f.Type != elf.ET_DYN {
		return loadError("%s: it is not a shared library", path)
	}
	// This program's own file is of the kind that can be loaded.
	self, err := elf.Open("/proc/self/exe")
	if err != nil {
		return nil // no /proc in a sandbox: the loader will tell
	}
	defer self.Close()
	if f.Machine != self.Machine || f.Class != self.Class || f.Data != self.Data {
		kind, ok := machines[f.Machine]
		if !ok {
			kind = f.Machine.String()
		}
		return loadError("%s: it is a %s library, this is %s", path, kind, runtime.GOARCH)
	}
	return nil
}
