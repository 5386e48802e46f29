package module

import (
	"debug/elf" // the constants
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"runtime"

	"p11-agent/token/elffile"
)

// machines holds the common names of processors.
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

// checkFile finds errors that the dynamic loader describes badly: a missing file, a file
// that is no library, and a library for another computer. A file without these errors may
// still fail to load.
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
	kind, what, err := elffile.Read(path)
	if err != nil && !errors.Is(err, elffile.ErrNotELF) {
		return loadError("%s: %v", path, err)
	}
	if err != nil || what != elf.ET_DYN {
		return loadError("%s: it is not a shared library", path)
	}
	// For an unknown processor, the loader reports the error.
	if own, known := elffile.Own(); known && own != kind {
		name, ok := machines[kind.Machine]
		if !ok {
			name = kind.Machine.String()
		}
		return loadError("%s: it is a %s library, this is %s", path, name, runtime.GOARCH)
	}
	return nil
}
