package registry

import "strings"

// What a PKCS#11 library may see of the agent's environment: names, and how
// other names may begin. Everything else may be a secret that is no business of
// a vendor's code, or of a command that somebody put into a module file.
var (
	passed = map[string]bool{
		"HOME": true, "PATH": true, "USER": true, "LOGNAME": true, "LANG": true, "TZ": true, "TMPDIR": true,
		"SOFTHSM2_CONF": true, "OPENSC_CONF": true,
	}
	passedPrefixes = []string{"LC_", "XDG_", "OPENSC_", "TPM2_PKCS11_", "TPM2TOOLS_", "TSS2_", "PKCS11_", "P11_KIT_", "PCSCLITE_"}
)

// Environment returns the environment for a module process, or the command of a
// remote module: what may be seen of environ, then extra, which is the module's
// own configuration and wins. The tunables have the C library overwrite what is
// freed, as the PKCS#11 library copies each PIN once more.
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
