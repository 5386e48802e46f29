package registry

import "strings"

// A PKCS#11 library gets only these variables of the agent's environment: some names, and
// names with some prefixes. Any other variable may be a secret. Neither a vendor's code
// nor the command in a module file may see such a secret.
var (
	passed = map[string]bool{
		"HOME": true, "PATH": true, "USER": true, "LOGNAME": true, "LANG": true, "TZ": true, "TMPDIR": true,
		"SOFTHSM2_CONF": true, "OPENSC_CONF": true,
	}
	passedPrefixes = []string{"LC_", "XDG_", "OPENSC_", "TPM2_PKCS11_", "TPM2TOOLS_", "TSS2_", "PKCS11_", "P11_KIT_", "PCSCLITE_"}
)

// Environment returns the environment for a module process, or for the command of a
// remote module. It holds the permitted variables of environ, then extra. extra is the
// module's own configuration and takes precedence.
//
// The tunables make the C library overwrite memory that it frees, because the PKCS#11
// library makes one more copy of each PIN.
func Environment(environ, extra []string) []string {
	var env []string
	for _, kv := range environ {
		name, _, _ := strings.Cut(kv, "=")
		keep := passed[name]
		for _, p := range passedPrefixes {
			keep = keep || strings.HasPrefix(name, p)
		}
		if keep {
			env = append(env, kv)
		}
	}
	env = append(env, extra...)
	return append(env,
		"GLIBC_TUNABLES=glibc.malloc.perturb=165:glibc.malloc.tcache_count=0",
		"GOTRACEBACK=none",
	)
}
