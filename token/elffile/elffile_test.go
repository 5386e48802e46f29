package elffile

import (
	"debug/elf"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"testing/iotest"
)

// header returns the beginning of an ELF file.
func header(class elf.Class, data elf.Data, rest string) string {
	return elf.ELFMAG + string([]byte{byte(class), byte(data)}) + strings.Repeat("\x00", 10) + rest
}

func TestParse(t *testing.T) {
	for _, tt := range []struct {
		name, file string
		want       Kind
		text       string
		kind       elf.Type
		err        error
	}{
		{"x86-64", header(elf.ELFCLASS64, elf.ELFDATA2LSB, "\x03\x00\x3e\x00more"), Kind{elf.ELFCLASS64, elf.ELFDATA2LSB, elf.EM_X86_64}, "64-bit x86_64", elf.ET_DYN, nil},
		{"IBM Z", header(elf.ELFCLASS64, elf.ELFDATA2MSB, "\x00\x03\x00\x16"), Kind{elf.ELFCLASS64, elf.ELFDATA2MSB, elf.EM_S390}, "64-bit s390", elf.ET_DYN, nil},
		{"a program", header(elf.ELFCLASS32, elf.ELFDATA2LSB, "\x02\x00\x03\x00"), Kind{elf.ELFCLASS32, elf.ELFDATA2LSB, elf.EM_386}, "32-bit 386", elf.ET_EXEC, nil},
		{"empty", "", Kind{}, "", 0, ErrNotELF},
		{"cut off", elf.ELFMAG, Kind{}, "", 0, ErrNotELF},
		{"a linker script", "INPUT ( a.so )  # a linker script", Kind{}, "", 0, ErrNotELF},
	} {
		t.Run(tt.name, func(t *testing.T) {
			got, kind, err := parse(iotest.OneByteReader(strings.NewReader(tt.file)))
			if got != tt.want || kind != tt.kind || !errors.Is(err, tt.err) {
				t.Errorf("got %v, %v, %v", got, kind, err)
			}
			if err == nil && got.String() != tt.text {
				t.Errorf("got %q, want %q", got, tt.text)
			}
		})
	}
	broken := errors.New("broken")
	if _, _, err := parse(iotest.ErrReader(broken)); !errors.Is(err, broken) {
		t.Errorf("got %v", err)
	}
}

// The program of the test has the kind that Own returns, and debug/elf agrees.
func TestOwn(t *testing.T) {
	own, known := Own()
	if !known {
		t.Skip("the processor is not in the table")
	}
	got, kind, err := Read("/proc/self/exe")
	if err != nil || got != own {
		t.Errorf("got %v, %v; want %v", got, err, own)
	}
	f, err := elf.Open("/proc/self/exe")
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if want := (Kind{f.Class, f.Data, f.Machine}); got != want || kind != f.Type {
		t.Errorf("debug/elf reads %v, %v", want, f.Type)
	}
}

func TestRead(t *testing.T) {
	dir := t.TempDir()
	if _, _, err := Read(dir); !errors.Is(err, ErrNotRegular) {
		t.Errorf("a directory: %v", err)
	}
	if _, _, err := Read(filepath.Join(dir, "none")); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("a missing file: %v", err)
	}
}
