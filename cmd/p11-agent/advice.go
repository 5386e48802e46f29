package main

import (
	"cmp"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
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

// installStep is how a package is installed here: by the name that Debian has for
// it, or Fedora.
func installStep(debian, fedora string) string {
	if _, err := exec.LookPath("apt-get"); err == nil {
		return "sudo apt install " + debian
	}
	if _, err := exec.LookPath("dnf"); err == nil {
		return "sudo dnf install " + fedora
	}
	if debian == fedora {
		return "install the package " + debian
	}
	return fmt.Sprintf("install the package %s (Debian's name; Fedora's is %s)", debian, fedora)
}

// moduleInstall is how to get the file of a module that many have, or nothing.
func moduleInstall(path string) string {
	if debian, fedora := wellknown.KindOf(path).Packages(); debian != "" {
		return installStep(debian, fedora)
	}
	return ""
}

// switchOff has the agent do without a module.
func switchOff(module string) string {
	return fmt.Sprintf("to do without it, write into the configuration:\n[[module]]\nname = %q\nenabled = false", module)
}

// missingLibrary is what dlerror(3) of glibc and musl says of a library that
// another one needs.
var missingLibrary = regexp.MustCompile(`(?:^|: )([^ :/]+\.so[^ :/]*): cannot open shared object file|Error loading shared library ([^ :]+\.so[^ :]*):`)

// startServer is how p11-kit-client.so gets a server.
const startServer = "start its server: p11-kit server --provider MODULE 'pkcs11:token=NAME'"

// adviseModule adds what helps against what a module says. A return value alone
// says little: what the module needs is looked at here.
func adviseModule(f *finding, m token.ModuleStatus) {
	text := m.Err.Error()
	we, _ := errors.AsType[*wire.Error](m.Err)
	kind := wellknown.KindOf(m.Path)
	lib := missingLibrary.FindStringSubmatch(text)
	_, statErr := os.Stat(m.Path)
	switch {
	case errors.Is(statErr, os.ErrNotExist):
		f.Next("%s", cmp.Or(moduleInstall(m.Path), "set the right path in the [[module]] table, or install what brings the file"))
	case unix.Access(m.Path, unix.R_OK) != nil:
		f.Next("sudo chmod a+r %s", output.ShellWord(m.Path))
	case lib != nil:
		name := cmp.Or(lib[1], lib[2])
		if strings.HasPrefix(name, "libpcsclite") {
			f.Next("%s", installStep("libpcsclite1", "pcsc-lite-libs"))
			return
		}
		f.Next("ldd %s | grep 'not found'  # install the packages that bring these libraries", output.ShellWord(m.Path))
	case strings.Contains(text, "wrong ELF class"), strings.Contains(text, "cannot open shared object file: No such file"):
		f.Next("install the module for this program's architecture")
	case strings.Contains(text, "; its command \""):
		f.Next("try the command of remote: in the module's file by itself, with </dev/null behind it").Next("%s", switchOff(m.Name))
	case strings.Contains(text, "; its server cannot be reached"):
		f.Next("%s", startServer).Next("%s", switchOff(m.Name))
	case strings.Contains(text, "did not answer"):
		f.Next("if its token is slow, give it more time in the configuration:\n[[module]]\nname = %q\ntimeout = \"2m\"", m.Name).
			Next("%s", switchOff(m.Name))
	case kind == wellknown.SoftHSM && we != nil:
		adviseSoftHSM(f)
	case kind == wellknown.TPM2 && we != nil:
		adviseTPM(f)
	case kind == wellknown.OpenSC && we != nil && we.Function == "C_Initialize":
		f.Next("%s", installStep("libpcsclite1", "pcsc-lite-libs"))
	case kind == wellknown.CoolKey && we != nil && we.Function == "C_Initialize":
		f.Next("systemctl status pcscd.socket  # the module starts only where pcscd answers")
	case kind == wellknown.OpenCryptoki && we != nil:
		adviseOpenCryptoki(f)
	case kind == wellknown.NSS && we != nil:
		f.Next("tell the module where its database is, in the configuration:\n[[module]]\nname = %q\ninit-args = \"configdir='sql:%s/.pki/nssdb'\"", m.Name, os.Getenv("HOME"))
	case kind == wellknown.Spy && strings.Contains(text, "PKCS11SPY"):
		f.Next("tell it which module it is to watch, in the configuration:\n[[module]]\nname = %q\nenv = { PKCS11SPY = \"/path/to/module.so\" }", m.Name)
	case strings.Contains(text, "no function C_GetFunctionList"):
		f.Next("name a PKCS#11 module in path: this file is another library").Next("%s", switchOff(m.Name))
	case we != nil && we.RV == wire.CKRGeneralError:
		f.Next("look whether the module finds its own configuration and may read it, and which variable names that: set it with env in its [[module]] table")
	default:
		f.Next("%s", switchOff(m.Name))
	}
}

// adviseOpenCryptoki finds out why openCryptoki does not start: its daemon does not run,
// or the user is not in its group. /etc/group counts, not what the process has (openCryptoki,
// usr/lib/api/shrd_mem.c).
func adviseOpenCryptoki(f *finding) {
	locks := "/var/lock/opencryptoki"
	socket := "/run/pkcsslotd.socket"
	if other := "/run/opencryptoki/pkcsslotd.socket"; unix.Access(other, unix.F_OK) == nil {
		socket = other // of newer versions
	}
	c, err := net.DialTimeout("unix", socket, time.Second)
	switch {
	case err == nil:
		_ = c.Close()
		f.Next("%s", joinGroup("pkcs11", locks))
	case errors.Is(err, unix.EACCES), unix.Access(locks, unix.F_OK) == nil && unix.Access(locks, unix.R_OK|unix.X_OK) != nil:
		f.Next("%s", joinGroup("pkcs11", locks))
	default:
		f.Next("sudo systemctl enable --now pkcsslotd  # openCryptoki's daemon does not run")
	}
}

// adviseSoftHSM finds out why SoftHSM does not start: it cannot read its
// configuration or its directory of tokens.
func adviseSoftHSM(f *finding) {
	variable, named := os.LookupEnv("SOFTHSM2_CONF")
	file := wellknown.SoftHSMConfig(variable, os.Getenv("HOME"))
	own := "mkdir -p ~/.config/softhsm2 ~/.local/share/softhsm2\n" +
		`echo "directories.tokendir = $HOME/.local/share/softhsm2" >~/.config/softhsm2/softhsm2.conf`
	dir, err := wellknown.SoftHSMTokens(file)
	switch {
	case err != nil && named:
		f.Next("SOFTHSM2_CONF names %s, which cannot be read (%v): set it right, or unset it", file, errors.Unwrap(err))
	case err != nil:
		f.Next("%s", joinGroup("softhsm", file)).Next("or use tokens of your own:\n%s", own)
	case dir != "" && unix.Access(dir, unix.F_OK) != nil && os.Geteuid() != 0 && unix.Access(filepath.Dir(dir), unix.X_OK) != nil,
		dir != "" && unix.Access(dir, unix.F_OK) == nil && unix.Access(dir, unix.R_OK|unix.X_OK) != nil:
		f.Next("%s", joinGroup("softhsm", dir)).Next("or use tokens of your own:\n%s", own)
	case dir != "" && unix.Access(dir, unix.F_OK) != nil:
		f.Next("mkdir -p -m 700 %s", output.ShellWord(dir))
	default:
		f.Next("softhsm2-util --show-slots  # says more")
	}
}

// tpmDevice is how programs share a TPM.
const tpmDevice = "/dev/tpmrm0"

// tcti names the TPM to the module, where it is not this machine's own.
func tcti() string { return cmp.Or(os.Getenv("TPM2_PKCS11_TCTI"), os.Getenv("TCTI")) }

func noTPM() bool {
	_, err := os.Stat(tpmDevice)
	return errors.Is(err, os.ErrNotExist) && tcti() == ""
}

func adviseTPM(f *finding) {
	if name := tcti(); name != "" {
		f.Next("TPM2_PKCS11_TCTI names %s, which does not answer: start it, or unset the variable to use %s", name, tpmDevice)
		return
	}
	switch err := unix.Access(tpmDevice, unix.R_OK|unix.W_OK); {
	case err == nil:
		f.Next("ls -la ~/.tpm2_pkcs11  # where it keeps its keys, unless TPM2_PKCS11_STORE says otherwise")
	default:
		f.Next("%s", joinGroup("tss", tpmDevice))
	}
}

// joinGroup lets this user at what a group may use.
func joinGroup(group, what string) string {
	g, err := user.LookupGroup(group)
	if err != nil {
		return fmt.Sprintf("ls -ld %s  # and have root let you in", output.ShellWord(what))
	}
	if u, err := user.Current(); err == nil {
		ids, _ := u.GroupIds()
		has, _ := os.Getgroups()
		gid, _ := strconv.Atoi(g.Gid)
		if slices.Contains(ids, g.Gid) && !slices.Contains(has, gid) {
			return fmt.Sprintf("log out and in again: you have joined the group %s, which may use %s, since this session began", group, what)
		}
	}
	return fmt.Sprintf("sudo usermod -aG %s \"$USER\"  # it may use %s; then log out and in again", group, what)
}

// unlockStep is how to get a locked PIN back.
func unlockStep(m token.ModuleStatus, t token.TokenStatus) string {
	so := fmt.Sprintf("pkcs11-tool --module %s --token-label %s --login --login-type so --init-pin", output.ShellWord(m.Path), output.ShellWord(t.ID.Label))
	switch kind := wellknown.KindOf(m.Path); {
	case kind == wellknown.YKCS11, kind == wellknown.OpenSC && strings.Contains(t.Slot, "Yubi") && t.ID.Manufacturer == "piv_II":
		return "ykman piv access unblock-pin  # asks for the PUK and for a new PIN"
	case kind == wellknown.OpenSC:
		return "pkcs15-tool --unblock-pin  # asks for the PUK and for a new PIN"
	case kind == wellknown.TPM2:
		return "wait, as a TPM forgets wrong PINs with time, or: tpm2_dictionarylockout --clear-lockout"
	default:
		return so + "  # asks for the SO PIN and for a new PIN"
	}
}

// firstToken is how to get a token where a module that works has none. Smart cards
// are looked at elsewhere.
func firstToken(m token.ModuleStatus) string {
	switch wellknown.KindOf(m.Path) {
	case wellknown.SoftHSM:
		return "softhsm2-util --init-token --free --label NAME"
	case wellknown.TPM2:
		return fmt.Sprintf("pkcs11-tool --module %s --init-token --slot-index 0 --label NAME", output.ShellWord(m.Path))
	}
	return ""
}

// firstKey is how to get a key onto a token without any.
func firstKey(m token.ModuleStatus, t token.TokenStatus) string {
	if t.ID.Manufacturer == "piv_II" {
		return "ykman piv keys generate 9a pub.pem  # on a YubiKey; it needs a certificate as well, see ykman piv certificates generate"
	}
	return fmt.Sprintf("pkcs11-tool --module %s --token-label %s --login --keypairgen --key-type EC:prime256v1 --id 01 --label login --usage-sign", output.ShellWord(m.Path), output.ShellWord(t.ID.Label))
}
