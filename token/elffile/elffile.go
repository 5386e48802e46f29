// Package elffile reads for which computer a shared library is: the beginning of an ELF file
// (elf(5)). It loads nothing, and promises nothing about the rest of the file.
//
// debug/elf reads whole files. It would bring the decompression of debug information into the
// program.
package elffile

import (
	"bytes"
	"debug/elf" // the constants
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"os"
	"runtime"
	"strconv"
	"strings"
	"syscall"
)

// ErrNotELF says that a file is not an ELF file.
var ErrNotELF = errors.New("not a shared library")

// ErrNotRegular says that a path does not name a regular file.
var ErrNotRegular = errors.New("not a regular file")

// A Kind holds the properties that two ELF files must share to go into one process: class,
// byte order and machine.
type Kind struct {
	Class   elf.Class
	Data    elf.Data
	Machine elf.Machine
}

// String returns text such as "64-bit x86_64".
func (k Kind) String() string {
	bits := "32-bit "
	if k.Class == elf.ELFCLASS64 {
		bits = "64-bit "
	}
	return bits + strings.ToLower(strings.TrimPrefix(k.Machine.String(), "EM_"))
}

// machines are the processors that Go programs with C code can run on.
var machines = map[string]elf.Machine{
	"386": elf.EM_386, "amd64": elf.EM_X86_64, "arm": elf.EM_ARM, "arm64": elf.EM_AARCH64, "loong64": elf.EM_LOONGARCH,
	"ppc64le": elf.EM_PPC64, "riscv64": elf.EM_RISCV, "s390x": elf.EM_S390,
}

// Own returns the Kind of this program. The program's file has the same information, but the
// user may not be allowed to read the file. known is false for a processor that is not in
// the table.
func Own() (own Kind, known bool) {
	own = Kind{Class: elf.ELFCLASS64, Data: elf.ELFDATA2MSB}
	own.Machine, known = machines[runtime.GOARCH]
	if strconv.IntSize == 32 {
		own.Class = elf.ELFCLASS32
	}
	if binary.NativeEndian.Uint16([]byte{1, 0}) == 1 {
		own.Data = elf.ELFDATA2LSB
	}
	return own, known
}

// Read reads the beginning of a file. It waits for no pipe and no device. The error is
// ErrNotELF, ErrNotRegular, or that of the system, with the path.
func Read(path string) (k Kind, t elf.Type, err error) {
	f, err := os.OpenFile(path, os.O_RDONLY|syscall.O_NONBLOCK|syscall.O_NOCTTY, 0)
	if err != nil {
		return k, t, err
	}
	defer f.Close()
	if info, err := f.Stat(); err != nil || !info.Mode().IsRegular() {
		return k, t, ErrNotRegular
	}
	return parse(f)
}

// parse reads e_ident, e_type and e_machine.
func parse(r io.Reader) (k Kind, t elf.Type, err error) {
	var header [20]byte
	switch _, err := io.ReadFull(r, header[:]); {
	case errors.Is(err, io.EOF), errors.Is(err, io.ErrUnexpectedEOF):
		return k, t, ErrNotELF
	case err != nil:
		return k, t, fmt.Errorf("read the beginning of the file: %w", err)
	}
	if !bytes.HasPrefix(header[:], []byte(elf.ELFMAG)) {
		return k, t, ErrNotELF
	}
	k.Class, k.Data = elf.Class(header[elf.EI_CLASS]), elf.Data(header[elf.EI_DATA])
	order := binary.ByteOrder(binary.LittleEndian)
	if k.Data == elf.ELFDATA2MSB {
		order = binary.BigEndian
	}
	k.Machine = elf.Machine(order.Uint16(header[18:]))
	return k, elf.Type(order.Uint16(header[16:])), nil
}
