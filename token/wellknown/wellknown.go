// Package wellknown knows the PKCS#11 modules that many people have: their files, the
// packages of distributions that bring them, and what they need. It recognizes a module by
// the name of its file, and loads nothing. It promises nothing about other modules.
package wellknown

import (
	"path/filepath"
	"strings"
)

// A Kind is a module that many people have.
type Kind int

// The kinds of modules.
const (
	Other        Kind = iota // not a module of the table
	OpenSC                   // smart cards
	YKCS11                   // YubiKeys, by Yubico
	CoolKey                  // smart cards: CoolKey, CAC and PIV
	SoftHSM                  // keys in files
	TPM2                     // the TPM: tpm2-pkcs11
	OpenCryptoki             // IBM's HSMs, TPMs and keys in files
	NSS                      // the databases of Firefox: softokn
	GNOMEKeyring             // GNOME's keyring
	P11Kit                   // other modules, through p11-kit: its proxy, its client
	Spy                      // another module, whose calls pkcs11-spy of OpenSC prints
)

// A module is a row of the table.
type module struct {
	kind           Kind
	files          []string // each a part of the names of its files
	debian, fedora string   // the packages that bring it; empty: installing it helps nothing
	smartCards     bool
}

var table = []module{
	{Spy, []string{"pkcs11-spy"}, "opensc-pkcs11", "opensc", false},
	{OpenSC, []string{"opensc"}, "opensc-pkcs11", "opensc", true},
	{YKCS11, []string{"ykcs11"}, "ykcs11", "yubico-piv-tool", true},
	{CoolKey, []string{"coolkeypk11"}, "coolkey", "coolkey", true},
	{SoftHSM, []string{"softhsm"}, "softhsm2", "softhsm", false},
	{TPM2, []string{"tpm2_pkcs11"}, "libtpm2-pkcs11-1", "tpm2-pkcs11", false},
	{OpenCryptoki, []string{"opencryptoki", "PKCS11_API"}, "opencryptoki", "opencryptoki", false},
	{NSS, []string{"libsoftokn"}, "libnss3", "nss-softokn", false},
	{GNOMEKeyring, []string{"gnome-keyring-pkcs11"}, "", "", false},
	{P11Kit, []string{"p11-kit"}, "", "", false},
}

// KindOf returns the kind of the module in this file. Only the last element of path counts.
func KindOf(path string) Kind {
	name := filepath.Base(path)
	for _, m := range table {
		for _, part := range m.files {
			if strings.Contains(name, part) {
				return m.kind
			}
		}
	}
	return Other
}

func (k Kind) row() module {
	for _, m := range table {
		if m.kind == k {
			return m
		}
	}
	return module{}
}

// SmartCards tells whether the module finds smart cards through pcscd.
func (k Kind) SmartCards() bool { return k.row().smartCards }

// Packages returns the names of the packages that bring the module, in Debian and in
// Fedora. They are empty when no package helps: for Other, and for modules that show what
// the agent uses anyway.
func (k Kind) Packages() (debian, fedora string) {
	m := k.row()
	return m.debian, m.fedora
}

// Sandboxed tells whether the sandbox of a module process lets the module write all that it
// needs. Nothing is known about Other, nor about the module behind Spy.
func (k Kind) Sandboxed() bool { return k != Other && k != Spy }
