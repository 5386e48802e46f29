package module

import (
	"debug/elf"
	"encoding/binary"
	"errors"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"runtime"
	"strconv"
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

// architectures holds the processors that Go programs with C code can run on.
var architectures = map[string]elf.Machine{
	"386": elf.EM_386, "amd64": elf.EM_X86_64, "arm": elf.EM_ARM, "arm64": elf.EM_AARCH64, "loong64": elf.EM_LOONGARCH,
	"ppc64le": elf.EM_PPC64, "riscv64": elf.EM_RISCV, "s390x": elf.EM_S390,
}

// fits tells whether a library is for the processor of this program. The program's file
// has the same information, but the user may not be allowed to read the file.
func fits(f *elf.File) bool {
	machine, known := architectures[runtime.GOARCH]
	class := elf.ELFCLASS64
	if strconv.IntSize == 32 {
		class = elf.ELFCLASS32
	}
	little := binary.NativeEndian.Uint16([]byte{1, 0}) == 1
	// For an unknown processor, the loader reports the error.
	return !known || f.Machine == machine && f.Class == class && (f.ByteOrder == binary.LittleEndian) == little
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
	if !fits(f) {
		kind, ok := machines[f.Machine]
		if !ok {
			kind = f.Machine.String()
		}
		return loadError("%s: it is a %s library, this is %s", path, kind, runtime.GOARCH)
	}
	return nil
}
