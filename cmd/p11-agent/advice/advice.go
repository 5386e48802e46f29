// Package advice tells a person what to do next: which package to install, how to start
// what a module needs, how to unlock a PIN, how to make a first key.
//
// A step is a line to type, or a sentence. A step of several lines is a file or a script.
// Package advice looks at this machine, so that a step fits, and changes nothing. It does
// not decide what is wrong: that is the business of package doctor.
package advice

import (
	"errors"
	"fmt"
	"os/exec"
	"slices"
	"strings"

	"p11-agent/cmd/p11-agent/output"
	"p11-agent/token"
	"p11-agent/token/wellknown"
)

// steps collects steps.
type steps []string

// add adds a step, unless it is empty.
func (s *steps) add(format string, args ...any) *steps {
	text := format
	if len(args) > 0 {
		text = fmt.Sprintf(format, args...)
	}
	if text != "" {
		*s = append(*s, text)
	}
	return s
}

// Module returns the steps that help against the error of a module.
func Module(m token.ModuleStatus) []string {
	var s steps
	s.module(m)
	return s
}

// Trouble returns why a module does not work, in the module's words where it has any, and
// the steps that help. It returns nothing for a module that works.
func Trouble(m token.ModuleStatus) (reason string, next []string) {
	switch {
	case m.Err == nil:
		return "", nil
	case LacksTPM(m.Path):
		return "there is no TPM on this machine", nil
	}
	return m.Err.Error(), Module(m)
}

// Failure returns the steps that help against an error of a module.
func Failure(e *token.ModuleError) []string {
	_, next := Trouble(token.ModuleStatus{Name: e.Module, Path: e.Path, Err: e.Err})
	return next
}

// LacksTPM tells whether path is the module for TPMs, and this machine has no TPM. The
// module comes with a package that many people have for another reason.
func LacksTPM(path string) bool { return wellknown.KindOf(path) == wellknown.TPM2 && NoTPM() }

// WithoutTPM leaves out of several errors that the machine has no TPM. It returns all errors
// when there is no other one.
func WithoutTPM(all []error) []error {
	some := slices.DeleteFunc(slices.Clone(all), func(err error) bool {
		m, ok := errors.AsType[*token.ModuleError](err)
		return ok && LacksTPM(m.Path)
	})
	if len(some) == 0 {
		return all
	}
	return some
}

// Install returns the step that installs a package, which has one name in Debian and one in
// Fedora.
func Install(debian, fedora string) string {
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

// FirstSteps returns what a person without a key does next.
func FirstSteps(modules []token.ModuleStatus) []string {
	plug := "plug in a smart card or a security key"
	if !slices.ContainsFunc(modules, func(m token.ModuleStatus) bool { return wellknown.KindOf(m.Path).SmartCards() }) {
		plug += ", for which a module is needed: " + Install("opensc-pkcs11", "opensc")
	}
	return []string{plug, setup}
}

// setup is the step for a newcomer.
const setup = "p11-agent setup  # makes a token and a key where there are none, and leads to the first login"

// Unlock returns the step that unlocks the PIN of a token.
func Unlock(m token.ModuleStatus, t token.TokenStatus) string {
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

// FirstToken returns the step that makes a token for a module that works and has none, or
// "" for smart cards and unknown modules.
func FirstToken(m token.ModuleStatus) string {
	switch wellknown.KindOf(m.Path) {
	case wellknown.SoftHSM:
		return "softhsm2-util --init-token --free --label NAME"
	case wellknown.TPM2:
		return fmt.Sprintf("pkcs11-tool --module %s --init-token --slot-index 0 --label NAME", output.ShellWord(m.Path))
	}
	return ""
}

// FirstKey returns the step that makes a key on a token without keys.
func FirstKey(m token.ModuleStatus, t token.TokenStatus) string {
	if t.ID.Manufacturer == "piv_II" {
		return "ykman piv keys generate 9a pub.pem  # on a YubiKey; it needs a certificate as well, see ykman piv certificates generate"
	}
	return fmt.Sprintf("pkcs11-tool --module %s --token-label %s --login --keypairgen --key-type EC:prime256v1 --id 01 --label login --usage-sign", output.ShellWord(m.Path), output.ShellWord(t.ID.Label))
}
