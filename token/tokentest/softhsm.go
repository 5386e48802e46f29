// Package tokentest provides what the tests of tokens need: throw-away SoftHSM
// tokens, and a module that misbehaves on command.
//
// A test whose component is not installed is skipped with the reason, and fails
// where CI=true is in the environment. Nothing here touches the environment of
// the test's own process: what belongs into that of a child is returned.
package tokentest

import (
	_ "embed"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"p11-agent/agent/door/doortest"
)

// PIN and SOPIN are those of a SoftHSM token when nothing else is asked for.
const (
	PIN   = "1234"
	SOPIN = "12345678"
)

// Kinds of keys, as pkcs11-tool calls them.
const (
	RSA2048 = "rsa:2048"
	RSA4096 = "rsa:4096"
	P256    = "EC:prime256v1"
	P384    = "EC:secp384r1"
	P521    = "EC:secp521r1"
	Ed25519 = "EC:edwards25519"
)

// missing ends the test because something is not installed.
func missing(t testing.TB, what string) {
	t.Helper()
	if os.Getenv("CI") == "true" {
		t.Fatalf("%s is not installed", what)
	}
	t.Skipf("%s is not installed", what)
}

// program returns the path of a program.
func program(t testing.TB, name string) string {
	t.Helper()
	path, err := exec.LookPath(name)
	if err != nil {
		missing(t, name)
	}
	return path
}

// Module returns the path of a PKCS#11 module by the name of its file, such as
// "opensc-pkcs11.so", from the directories where distributions put them.
func Module(t testing.TB, file string) string {
	t.Helper()
	for _, pattern := range []string{
		"/usr/lib/softhsm", "/usr/lib/*/softhsm", "/usr/lib64/softhsm", "/usr/local/lib/softhsm",
		"/usr/lib/pkcs11", "/usr/lib/*/pkcs11", "/usr/lib64/pkcs11", "/usr/local/lib/pkcs11",
		"/usr/lib", "/usr/lib/*", "/usr/lib64", "/usr/local/lib",
	} {
		if found, _ := filepath.Glob(filepath.Join(pattern, file)); len(found) > 0 {
			return found[0]
		}
	}
	missing(t, file)
	return ""
}

// TempDir returns a new directory with a path that is short enough for sockets.
// It is removed when the test ends.
func TempDir(t testing.TB) string {
	t.Helper()
	return doortest.Dir(t)
}

// HomeDir returns a new directory that a module may not write by itself: one that is
// not below /tmp or /var/tmp. Its path is short if that of the user's home directory is,
// so that sockets fit below. It is removed when the test ends.
func HomeDir(t testing.TB) string {
	t.Helper()
	places := []string{os.Getenv("HOME"), "/var/lib", "/srv", "."}
	for _, place := range places {
		place, err := filepath.Abs(place)
		if err != nil || strings.HasPrefix(place+"/", "/tmp/") || strings.HasPrefix(place+"/", "/var/tmp/") {
			continue
		}
		dir, err := os.MkdirTemp(place, "home")
		if err != nil {
			continue
		}
		t.Cleanup(func() {
			if err := os.RemoveAll(dir); err != nil {
				t.Error(err)
			}
		})
		return dir
	}
	missing(t, "a directory to write in that is not below /tmp")
	return ""
}

// A SoftHSM is a set of software tokens of its own, which ends with the test.
// Tokens are called by their labels. Every method fails the test on error.
type SoftHSM struct {
	t      testing.TB
	dir    string
	module string
	conf   string
	pins   map[string]string // the user's PIN of each token
}

// NewSoftHSM makes a SoftHSM without tokens. The test is skipped, or fails in
// CI, where softhsm2-util, its module or pkcs11-tool is missing.
func NewSoftHSM(t testing.TB) *SoftHSM {
	t.Helper()
	program(t, "softhsm2-util")
	program(t, "pkcs11-tool")
	h := &SoftHSM{t: t, dir: TempDir(t), module: Module(t, "libsofthsm2.so"), pins: make(map[string]string)}
	tokens := filepath.Join(h.dir, "tokens")
	if err := os.Mkdir(tokens, 0o700); err != nil {
		t.Fatal(err)
	}
	h.conf = filepath.Join(h.dir, "softhsm2.conf")
	conf := fmt.Sprintf("directories.tokendir = %s\nobjectstore.backend = file\nlog.level = ERROR\n", tokens)
	if err := os.WriteFile(h.conf, []byte(conf), 0o600); err != nil {
		t.Fatal(err)
	}
	return h
}

// Env returns the variables that a process needs to use these tokens, to be
// added to those it has.
func (h *SoftHSM) Env() []string { return []string{"SOFTHSM2_CONF=" + h.conf} }

// Module returns the path of SoftHSM's module.
func (h *SoftHSM) Module() string { return h.module }

// Dir returns the directory that holds everything. Files may be put there.
func (h *SoftHSM) Dir() string { return h.dir }

// Run runs a program with these tokens and returns what it printed.
func (h *SoftHSM) Run(name string, args ...string) string {
	h.t.Helper()
	out, err := h.try(name, args...)
	if err != nil {
		h.t.Fatalf("%s %s: %v\n%s", name, strings.Join(args, " "), err, out)
	}
	return out
}

func (h *SoftHSM) try(name string, args ...string) (string, error) {
	h.t.Helper()
	cmd := exec.Command(program(h.t, name), args...)
	cmd.Env = append(os.Environ(), h.Env()...)
	out, err := cmd.CombinedOutput()
	return string(out), err
}

// tool runs pkcs11-tool on a token.
func (h *SoftHSM) tool(token string, args ...string) string {
	h.t.Helper()
	return h.Run("pkcs11-tool", append([]string{"--module", h.module, "--token-label", token}, args...)...)
}

// login is what pkcs11-tool needs to log in to a token.
func (h *SoftHSM) login(token string, args ...string) []string {
	h.t.Helper()
	pin, ok := h.pins[token]
	if !ok {
		h.t.Fatalf("there is no token %q", token)
	}
	return append([]string{"--login", "--pin", pin}, args...)
}

// AddToken makes a token with a label of its own. An empty pin stands for PIN.
func (h *SoftHSM) AddToken(label, pin string) {
	h.t.Helper()
	if pin == "" {
		pin = PIN
	}
	h.Run("softhsm2-util", "--init-token", "--free", "--label", label, "--pin", pin, "--so-pin", SOPIN)
	h.pins[label] = pin
}

// rsa4096 is a key for tests only. To generate one takes three seconds of a processor.
//
//go:embed testdata/rsa4096.pem
var rsa4096 []byte

// GenerateKey makes a key pair of a kind, such as P256, on a token. id is in
// hexadecimal. Extra arguments go to pkcs11-tool. The key of kind RSA4096 is always
// the same one, unless there are extra arguments.
func (h *SoftHSM) GenerateKey(token, kind, id, label string, extra ...string) {
	h.t.Helper()
	if kind == RSA4096 && len(extra) == 0 {
		h.ImportKey(token, id, label, rsa4096)
		return
	}
	args := h.login(token, "--keypairgen", "--key-type", kind, "--id", id, "--label", label)
	h.tool(token, append(args, extra...)...)
}

// DeletePublic removes a public key and leaves its private key. id is in
// hexadecimal.
func (h *SoftHSM) DeletePublic(token, id string) {
	h.t.Helper()
	h.tool(token, h.login(token, "--delete-object", "--type", "pubkey", "--id", id)...)
}

// DeletePrivate removes a private key and leaves its public key. id is in
// hexadecimal.
func (h *SoftHSM) DeletePrivate(token, id string) {
	h.t.Helper()
	h.tool(token, h.login(token, "--delete-object", "--type", "privkey", "--id", id)...)
}

// ImportCertificate puts an X.509 certificate, in DER, on a token. id is in
// hexadecimal; empty: it has none.
func (h *SoftHSM) ImportCertificate(token, id, label string, der []byte) {
	h.t.Helper()
	f, err := os.CreateTemp(h.dir, "cert*.der")
	if err != nil {
		h.t.Fatal(err)
	}
	defer f.Close()
	if _, err := f.Write(der); err != nil {
		h.t.Fatal(err)
	}
	args := h.login(token, "--write-object", f.Name(), "--type", "cert", "--label", label)
	if id != "" {
		args = append(args, "--id", id)
	}
	h.tool(token, args...)
}

// ImportKey puts a private key, as PKCS#8 in PEM, on a token, with its public half.
// id is in hexadecimal.
func (h *SoftHSM) ImportKey(token, id, label string, pkcs8PEM []byte) {
	h.t.Helper()
	f, err := os.CreateTemp(h.dir, "key*.pem")
	if err != nil {
		h.t.Fatal(err)
	}
	defer f.Close()
	if _, err := f.Write(pkcs8PEM); err != nil {
		h.t.Fatal(err)
	}
	h.Run("softhsm2-util", "--import", f.Name(), "--token", token, "--pin", h.pins[token], "--id", id, "--label", label)
}
