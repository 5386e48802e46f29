package advice

import (
	"cmp"
	"errors"
	"fmt"
	"net"
	"os"
	"os/user"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"p11-agent/cmd/p11-agent/output"
	"p11-agent/token"
	"p11-agent/token/wellknown"
	"p11-agent/token/wire"
)

// InstallModule returns the step that installs the module in this file, or "" when no
// package is known.
func InstallModule(path string) string {
	if debian, fedora := wellknown.KindOf(path).Packages(); debian != "" {
		return Install(debian, fedora)
	}
	return ""
}

// SwitchOff returns the step that has the agent do without a module.
func SwitchOff(module string) string {
	return fmt.Sprintf("to do without the module, write into the configuration:\n[[module]]\nname = %q\nenabled = false", module)
}

// missingLibrary is what dlerror(3) of glibc and musl says of a library that
// another one needs.
var missingLibrary = regexp.MustCompile(`(?:^|: )([^ :/]+\.so[^ :/]*): cannot open shared object file|Error loading shared library ([^ :]+\.so[^ :]*):`)

// StartServer is the step that gives p11-kit-client.so a server.
const StartServer = "start its server: p11-kit server --provider MODULE 'pkcs11:token=NAME'"

// module adds the steps that help against the error of a module. A return value alone says
// little, so module looks at what the module needs.
func (s *steps) module(m token.ModuleStatus) {
	text := m.Err.Error()
	we, _ := errors.AsType[*wire.Error](m.Err)
	kind := wellknown.KindOf(m.Path)
	lib := missingLibrary.FindStringSubmatch(text)
	_, statErr := os.Stat(m.Path)
	switch {
	case errors.Is(statErr, os.ErrNotExist):
		s.add("%s", cmp.Or(InstallModule(m.Path), "set the right path in the [[module]] table, or install what brings the file"))
	case unix.Access(m.Path, unix.R_OK) != nil:
		s.add("sudo chmod a+r %s", output.ShellWord(m.Path))
	case lib != nil:
		name := cmp.Or(lib[1], lib[2])
		if strings.HasPrefix(name, "libpcsclite") {
			s.add("%s", Install("libpcsclite1", "pcsc-lite-libs"))
			return
		}
		s.add("ldd %s | grep 'not found'  # install the packages that bring these libraries", output.ShellWord(m.Path))
	case strings.Contains(text, "wrong ELF class"), strings.Contains(text, "cannot open shared object file: No such file"):
		s.add("install the module for this program's architecture")
	case strings.Contains(text, "; its command \""):
		s.add("run the command after remote: in the module's file by hand, with </dev/null").add("%s", SwitchOff(m.Name))
	case strings.Contains(text, "; its server cannot be reached"):
		s.add("%s", StartServer).add("%s", SwitchOff(m.Name))
	case strings.Contains(text, "did not answer"):
		s.add("if the token is slow, give the module more time in the configuration:\n[[module]]\nname = %q\ntimeout = \"2m\"", m.Name).
			add("%s", SwitchOff(m.Name))
	case kind == wellknown.SoftHSM && we != nil:
		s.softHSM()
	case kind == wellknown.TPM2 && we != nil:
		s.tpm()
	case kind == wellknown.OpenSC && we != nil && we.Function == "C_Initialize":
		s.add("%s", Install("libpcsclite1", "pcsc-lite-libs"))
	case kind == wellknown.CoolKey && we != nil && we.Function == "C_Initialize":
		s.add("systemctl status pcscd.socket  # the module starts only where pcscd answers")
	case kind == wellknown.OpenCryptoki && we != nil:
		s.openCryptoki()
	case kind == wellknown.NSS && we != nil:
		s.add("tell the module where its database is, in the configuration:\n[[module]]\nname = %q\ninit-args = \"configdir='sql:%s/.pki/nssdb'\"", m.Name, os.Getenv("HOME"))
	case kind == wellknown.Spy && strings.Contains(text, "PKCS11SPY"):
		s.add("tell pkcs11-spy which module to watch, in the configuration:\n[[module]]\nname = %q\nenv = { PKCS11SPY = \"/path/to/module.so\" }", m.Name)
	case strings.Contains(text, "no function C_GetFunctionList"):
		s.add("name a PKCS#11 module in path: this file is another library").add("%s", SwitchOff(m.Name))
	case we != nil && we.RV == wire.CKRGeneralError:
		s.add("check that the module finds its own configuration and may read it; if a variable names the file, set it with env in the [[module]] table")
	default:
		s.add("%s", SwitchOff(m.Name))
	}
}

// openCryptoki finds out why openCryptoki does not start: its daemon does not run, or the
// user is not in its group. It looks at /etc/group, not at the groups of the process
// (openCryptoki, usr/lib/api/shrd_mem.c).
func (s *steps) openCryptoki() {
	locks := "/var/lock/opencryptoki"
	socket := "/run/pkcsslotd.socket"
	if other := "/run/opencryptoki/pkcsslotd.socket"; unix.Access(other, unix.F_OK) == nil {
		socket = other // of newer versions
	}
	c, err := net.DialTimeout("unix", socket, time.Second)
	switch {
	case err == nil:
		_ = c.Close()
		s.add("%s", joinGroup("pkcs11", locks))
	case errors.Is(err, unix.EACCES), unix.Access(locks, unix.F_OK) == nil && unix.Access(locks, unix.R_OK|unix.X_OK) != nil:
		s.add("%s", joinGroup("pkcs11", locks))
	default:
		s.add("sudo systemctl enable --now pkcsslotd  # openCryptoki's daemon does not run")
	}
}

// softHSM finds out why SoftHSM does not start: it cannot read its configuration or its
// directory of tokens.
func (s *steps) softHSM() {
	variable, named := os.LookupEnv("SOFTHSM2_CONF")
	file := wellknown.SoftHSMConfig(variable, os.Getenv("HOME"))
	own := "mkdir -p ~/.config/softhsm2 ~/.local/share/softhsm2\n" +
		`echo "directories.tokendir = $HOME/.local/share/softhsm2" >~/.config/softhsm2/softhsm2.conf`
	dir, err := wellknown.SoftHSMTokens(file)
	switch {
	case err != nil && named:
		s.add("SOFTHSM2_CONF names %s, which cannot be read (%v): correct or unset the variable", file, errors.Unwrap(err))
	case err != nil:
		s.add("%s", joinGroup("softhsm", file)).add("or use tokens of your own:\n%s", own)
	case dir != "" && unix.Access(dir, unix.F_OK) != nil && os.Geteuid() != 0 && unix.Access(filepath.Dir(dir), unix.X_OK) != nil,
		dir != "" && unix.Access(dir, unix.F_OK) == nil && unix.Access(dir, unix.R_OK|unix.X_OK) != nil:
		s.add("%s", joinGroup("softhsm", dir)).add("or use tokens of your own:\n%s", own)
	case dir != "" && unix.Access(dir, unix.F_OK) != nil:
		s.add("mkdir -p -m 700 %s", output.ShellWord(dir))
	default:
		s.add("softhsm2-util --show-slots  # says more")
	}
}

// tpmDevice is the device through which programs share a TPM.
const tpmDevice = "/dev/tpmrm0"

// tcti returns the name of the TPM that the module uses in place of this machine's own.
func tcti() string { return cmp.Or(os.Getenv("TPM2_PKCS11_TCTI"), os.Getenv("TCTI")) }

// NoTPM tells whether this machine has no TPM, and no variable names another one.
func NoTPM() bool {
	_, err := os.Stat(tpmDevice)
	return errors.Is(err, os.ErrNotExist) && tcti() == ""
}

func (s *steps) tpm() {
	if name := tcti(); name != "" {
		s.add("TPM2_PKCS11_TCTI names %s, which does not answer: start that TPM, or unset the variable to use %s", name, tpmDevice)
		return
	}
	switch err := unix.Access(tpmDevice, unix.R_OK|unix.W_OK); {
	case err == nil:
		s.add("ls -la ~/.tpm2_pkcs11  # where the module keeps keys, unless TPM2_PKCS11_STORE names another directory")
	default:
		s.add("%s", joinGroup("tss", tpmDevice))
	}
}

// joinGroup returns the step that lets this user use the file of a group.
func joinGroup(group, what string) string {
	g, err := user.LookupGroup(group)
	if err != nil {
		return fmt.Sprintf("ls -ld %s  # and ask root for access", output.ShellWord(what))
	}
	if u, err := user.Current(); err == nil {
		ids, _ := u.GroupIds()
		has, _ := os.Getgroups()
		gid, _ := strconv.Atoi(g.Gid)
		if slices.Contains(ids, g.Gid) && !slices.Contains(has, gid) {
			return fmt.Sprintf("log out and in again: since this session began, you have joined the group %s, which may use %s", group, what)
		}
	}
	return fmt.Sprintf("sudo usermod -aG %s \"$USER\"  # the group may use %s; then log out and in again", group, what)
}
