package registry

import (
	"bytes"
	"cmp"
	"debug/elf"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"syscall"
)

// client is the library that reaches a module in another process
// (p11-kit/client.c).
const client = "p11-kit-client.so"

// useless are libraries that are never started, why not, and what to do where somebody
// expects them to be.
var useless = []struct{ prefix, reason, advice string }{
	{"p11-kit-trust.so", "it holds trusted certificates, no private keys", ""},
	{"libnssckbi", "it holds trusted certificates, no private keys", ""},
	{"p11-kit-proxy.so", proxied, ""},
	{"libp11-kit.so", proxied, ""}, // p11-kit-proxy.so is a link to it
	{
		client, "the server that it connects to is not named",
		"set P11_KIT_SERVER_ADDRESS, which \"p11-kit server\" prints, in the environment of the agent; or write into its file: server-address: unix:path=/...",
	},
}

const proxied = "it offers the modules that are configured anyway"

// locate finds the library of a module and sets Path and Remote, or Skip.
func (l *loader) locate(m *Module) {
	module, local := m.Settings["module"]
	if remote, ok := m.Settings["remote"]; ok {
		l.locateRemote(m, remote)
		return
	}
	switch {
	case !local:
		m.Skip, m.Broken = "its configuration has neither module: nor remote:", true
		m.Advice = "write module: or remote: into its file"
		return
	case module.Value == "":
		m.Skip = "module: is blank, which switches it off"
		return
	}
	path, err := findLibrary(module.Value, l.ModuleDirs)
	if err != nil {
		m.Skip, m.Broken = err.Error(), true
		return
	}
	m.Path = path
	name := filepath.Base(path)
	target, err := filepath.EvalSymlinks(path)
	if err != nil {
		m.Skip, m.Broken = fmt.Sprintf("%s: %v", path, bare(err)), true
		return
	}
	isClient := name == client || filepath.Base(target) == client
	if address, ok := m.Settings["server-address"]; ok && isClient {
		l.locateRemote(m, address)
		return
	}
	if address := cmp.Or(l.ServerAddresses[m.Name], l.ServerAddress); address != "" && isClient {
		if m.Remote, err = parseRemote(address); err != nil || m.Remote.Address == "" {
			m.Skip, m.Broken = ServerVariable+" must be \"unix:path=/...\" or \"vsock:...\"", true
			m.Advice = "set it to what \"p11-kit server\" prints"
			m.Remote = Remote{}
		}
		return
	}
	for _, u := range useless {
		if strings.HasPrefix(name, u.prefix) || strings.HasPrefix(filepath.Base(target), u.prefix) {
			m.Skip, m.Advice = u.reason, u.advice
			m.Broken = u.reason == proxied || u.advice != ""
			return
		}
	}
	if info, err := os.Stat(path); err == nil {
		if exposed := exposure(info, l.UID); exposed != "" {
			l.warn(path, 0, "%s, and thereby decide which code runs here", exposed)
		}
	}
}

// locateRemote finds the means for a remote module.
func (l *loader) locateRemote(m *Module, s Setting) {
	remote, err := parseRemote(s.Value)
	if err != nil {
		l.warnAt(s, "%v", err)
		m.Skip, m.Broken, m.Advice = err.Error(), true, "put it right in its file"
		return
	}
	m.Remote = remote
	m.Path, err = FindClient(l.ModuleDirs)
	if err != nil {
		m.Skip, m.Broken = err.Error(), true
		return
	}
	if len(remote.Command) > 0 {
		// Making the Bridge would say so, but not to who only reads.
		if err := checkSocketDir(cmp.Or(l.SocketDir, os.TempDir())); err != nil {
			l.warnAt(s, "%v", err)
		}
	}
}

// FindClient returns the path of p11-kit-client.so, the library that speaks
// p11-kit's protocol with a module elsewhere, at the address that the
// environment variable P11_KIT_SERVER_ADDRESS names.
func FindClient(moduleDirs []string) (string, error) {
	path, err := findLibrary(client, moduleDirs)
	if err != nil {
		return "", fmt.Errorf("a remote module needs p11-kit: install the package with %s (Debian: p11-kit-modules, Fedora: p11-kit-server): %w", client, err)
	}
	return path, nil
}

// findLibrary returns the absolute path of a module that this process's kind of
// program can load: the first in dirs when the path is relative.
func findLibrary(module string, dirs []string) (string, error) {
	candidates := []string{module}
	if !filepath.IsAbs(module) {
		if len(dirs) == 0 {
			return "", fmt.Errorf("%s is looked for in p11-kit's module directory, and there is none", module)
		}
		candidates = nil
		for _, dir := range dirs {
			// Not cleaned: x/../y is not y when x is a link.
			candidates = append(candidates, dir+"/"+module)
		}
	}
	var problem error
	for _, path := range candidates {
		err := loadable(path)
		if err == nil {
			return path, nil
		}
		// A file for another architecture says more than one that is missing.
		if problem == nil || errors.Is(problem, os.ErrNotExist) && !errors.Is(err, os.ErrNotExist) {
			problem = fmt.Errorf("%s: %w", path, err)
		}
	}
	return "", problem
}

// elfKind is what two ELF files must have in common to go into one process:
// class, byte order and machine (elf(5): e_ident and e_machine), as they are in the file.
type elfKind [4]byte

// String is as in "64-bit x86_64".
func (k elfKind) String() string {
	bits, order := "32-bit ", binary.ByteOrder(binary.LittleEndian)
	if elf.Class(k[0]) == elf.ELFCLASS64 {
		bits = "64-bit "
	}
	if elf.Data(k[1]) == elf.ELFDATA2MSB {
		order = binary.BigEndian
	}
	machine := elf.Machine(order.Uint16(k[2:]))
	return bits + strings.ToLower(strings.TrimPrefix(machine.String(), "EM_"))
}

// machines are the processors that Go programs with C in them run on.
var machines = map[string]elf.Machine{
	"386": elf.EM_386, "amd64": elf.EM_X86_64, "arm": elf.EM_ARM, "arm64": elf.EM_AARCH64, "loong64": elf.EM_LOONGARCH,
	"ppc64le": elf.EM_PPC64, "riscv64": elf.EM_RISCV, "s390x": elf.EM_S390,
}

// self returns the kind of this program. Its file tells it as well, but may not be one
// that its user can read.
func self() (kind elfKind, known bool) {
	machine, known := machines[runtime.GOARCH]
	class, data := elf.ELFCLASS64, elf.ELFDATA2MSB
	if strconv.IntSize == 32 {
		class = elf.ELFCLASS32
	}
	if binary.NativeEndian.Uint16([]byte{1, 0}) == 1 {
		data = elf.ELFDATA2LSB
	}
	kind[0], kind[1] = byte(class), byte(data)
	binary.NativeEndian.PutUint16(kind[2:], uint16(machine))
	return kind, known
}

// loadable tells why a file cannot be a library for this process.
func loadable(path string) error {
	kind, err := kindOf(path)
	if err != nil {
		return err
	}
	if own, known := self(); known && own != kind {
		return fmt.Errorf("it is for another architecture (%v; this program is %v)", kind, own)
	}
	return nil
}

// kindOf reads the beginning of an ELF file.
func kindOf(path string) (elfKind, error) {
	f, err := os.OpenFile(path, os.O_RDONLY|syscall.O_NONBLOCK|syscall.O_NOCTTY, 0)
	if err != nil {
		return elfKind{}, bare(err)
	}
	defer f.Close()
	if info, err := f.Stat(); err != nil || !info.Mode().IsRegular() {
		return elfKind{}, errors.New("not a regular file")
	}
	var header [20]byte
	_, err = io.ReadFull(f, header[:])
	if err != nil || !bytes.HasPrefix(header[:], []byte("\x7fELF")) {
		return elfKind{}, errors.New("not a shared library")
	}
	return elfKind(slices.Concat(header[4:6], header[18:20])), nil
}
