package tokentest

import (
	"encoding/binary"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"syscall"
	"testing"
)

// A TPM is one in software, with a store of tokens of its own, which ends with
// the test. Tokens are called by their labels. Every method fails the test on
// error.
//
//	tpm2-pkcs11 ─▶ D-Bus ─▶ tpm2-abrmd ─▶ swtpm
//
// A TPM has room for three keys at once. What swaps them is Linux on a machine
// that has a TPM (/dev/tpmrm0), and here tpm2-abrmd, on a bus that no other
// program uses. All sockets are in the test's directory.
type TPM struct {
	t      testing.TB
	dir    string
	module string
	pins   map[string]string // the user's PIN of each token
	room   int               // for keys, as the resource manager has it

	swtpm, bus, broker *daemon
}

// busConfig is that of a bus for one user, who may do everything.
const busConfig = `<!DOCTYPE busconfig PUBLIC "-//freedesktop//DTD D-Bus Bus Configuration 1.0//EN"
 "http://www.freedesktop.org/standards/dbus/1.0/busconfig.dtd">
<busconfig>
 <type>session</type>
 <listen>unix:path=%s</listen>
 <policy context="default"><allow send_destination="*"/><allow receive_sender="*"/><allow own="*"/></policy>
</busconfig>
`

// NewTPM makes a TPM without tokens. The test is skipped, or fails in CI, where
// a part of it is missing.
func NewTPM(t testing.TB) *TPM {
	t.Helper()
	for _, name := range []string{"swtpm", "dbus-daemon", "tpm2_getcap", "tpm2_ptool", "pkcs11-tool"} {
		program(t, name)
	}
	Module(t, "libtss2-tcti-tabrmd.so.0") // no module, but it lies where they do
	m := &TPM{t: t, dir: TempDir(t), module: Module(t, "libtpm2_pkcs11.so"), pins: make(map[string]string), room: 27}
	for _, d := range []string{"state", "store"} {
		if err := os.Mkdir(m.path(d), 0o700); err != nil {
			t.Fatal(err)
		}
	}
	if err := os.WriteFile(m.path("bus.conf"), fmt.Appendf(nil, busConfig, m.path("bus")), 0o600); err != nil {
		t.Fatal(err)
	}
	m.bus = startDaemon(t, "dbus-daemon", m.dir, nil,
		[]string{"dbus-daemon", "--nofork", "--nopidfile", "--config-file=" + m.path("bus.conf")},
		func() bool { return listens(m.path("bus")) })
	m.start()
	m.Run("tpm2_ptool", "init")
	return m
}

func (m *TPM) path(name string) string { return filepath.Join(m.dir, name) }

func listens(socket string) bool {
	c, err := net.Dial("unix", socket)
	if err != nil {
		return false
	}
	_ = c.Close()
	return true
}

// isBound tells whether a process listens on a socket, without a connection: swtpm serves one
// client after the other.
func isBound(socket string) bool {
	const acceptsConnections = " 00010000 " // __SO_ACCEPTCON in the column Flags
	all, err := os.ReadFile("/proc/net/unix")
	if err != nil {
		return false
	}
	for line := range strings.Lines(string(all)) {
		if strings.HasSuffix(strings.TrimSpace(line), " "+socket) && strings.Contains(line, acceptsConnections) {
			return true
		}
	}
	return false
}

// start has the TPM start as a machine does.
func (m *TPM) start() {
	m.t.Helper()
	m.swtpm = startDaemon(m.t, "swtpm", m.dir, nil, []string{
		"swtpm", "socket", "--tpm2", "--tpmstate", "dir=" + m.path("state"), "--flags", "not-need-init,startup-clear",
		"--server", "type=unixio,path=" + m.path("tpm"), "--ctrl", "type=unixio,path=" + m.path("tpm.ctrl"),
	}, func() bool { return listens(m.path("tpm.ctrl")) && isBound(m.path("tpm")) })
	m.startBroker()
}

func (m *TPM) startBroker() {
	m.t.Helper()
	m.broker = startDaemon(m.t, "tpm2-abrmd", m.dir, m.Env(),
		[]string{abrmdPath(m.t), "--session", "--allow-root", "--max-transients=" + strconv.Itoa(m.room), "--tcti=swtpm:path=" + m.path("tpm")},
		func() bool { _, err := m.try("tpm2_getcap", "properties-fixed"); return err == nil })
}

func abrmdPath(t testing.TB) string {
	t.Helper()
	const usual = "/usr/sbin/tpm2-abrmd" // which others than root may not have in PATH
	if _, err := os.Stat(usual); err == nil {
		return usual
	}
	return program(t, "tpm2-abrmd")
}

// Env returns the variables that a process needs to use these tokens, to be
// added to those it has.
func (m *TPM) Env() []string {
	const tcti = "tabrmd:bus_type=session"
	return []string{
		"DBUS_SESSION_BUS_ADDRESS=unix:path=" + m.path("bus"),
		"TPM2_PKCS11_STORE=" + m.path("store"), "TPM2_PKCS11_TCTI=" + tcti, "TPM2TOOLS_TCTI=" + tcti,
	}
}

// Module returns the path of the module.
func (m *TPM) Module() string { return m.module }

// Run runs a program with these tokens and returns what it printed.
func (m *TPM) Run(name string, args ...string) string {
	m.t.Helper()
	out, err := m.try(name, args...)
	if err != nil {
		m.t.Fatalf("%s %s: %v\n%s", name, strings.Join(args, " "), err, out)
	}
	return out
}

func (m *TPM) try(name string, args ...string) (string, error) {
	cmd := exec.Command(name, args...)
	cmd.Env = append(os.Environ(), m.Env()...)
	out, err := cmd.CombinedOutput()
	return string(out), err
}

// AddToken makes a token with a label of its own. An empty pin stands for PIN.
func (m *TPM) AddToken(label, pin string) {
	m.t.Helper()
	if pin == "" {
		pin = PIN
	}
	m.Run("tpm2_ptool", "addtoken", "--pid=1", "--label="+label, "--userpin="+pin, "--sopin="+SOPIN)
	m.pins[label] = pin
}

// GenerateKey makes a key pair of a kind, such as P256, on a token. id is in
// hexadecimal. Extra arguments go to pkcs11-tool.
func (m *TPM) GenerateKey(token, kind, id, label string, extra ...string) {
	m.t.Helper()
	m.Run("pkcs11-tool", append([]string{
		"--module", m.module, "--token-label", token, "--login", "--pin", m.pins[token],
		"--keypairgen", "--key-type", kind, "--id", id, "--label", label,
	}, extra...)...)
}

var lockoutCounter = regexp.MustCompile(`TPM2_PT_LOCKOUT_COUNTER: 0x([0-9A-Fa-f]+)`)

// Wrong returns how many wrong PINs the TPM holds against all its tokens
// together. The third one locks them.
func (m *TPM) Wrong() int {
	m.t.Helper()
	out := m.Run("tpm2_getcap", "properties-variable")
	found := lockoutCounter.FindStringSubmatch(out)
	if found == nil {
		m.t.Fatalf("no counter in %s", out)
	}
	n, err := strconv.ParseInt(found[1], 16, 32)
	if err != nil {
		m.t.Fatal(err)
	}
	return int(n)
}

// Forgive forgets the wrong PINs, as the TPM itself does with time.
func (m *TPM) Forgive() {
	m.t.Helper()
	m.Run("tpm2_dictionarylockout", "--clear-lockout")
}

// RestartBroker stops the resource manager and starts it again.
func (m *TPM) RestartBroker() {
	m.t.Helper()
	m.broker.end(syscall.SIGTERM)
	m.startBroker()
}

// Limit leaves a program room for about n keys: for 3, as Linux does, and not for
// the many of tpm2-abrmd.
func (m *TPM) Limit(n int) {
	m.t.Helper()
	m.room = n
	m.RestartBroker()
}

// Restart does to the TPM what a machine does that is shut down and started,
// with the resource manager. (A TPM that is not told of the end takes that for an
// attack: swtpm 0.7 counts each cut of the power as a wrong PIN.)
func (m *TPM) Restart() {
	m.t.Helper()
	m.Run("tpm2_shutdown", "--clear")
	m.broker.end(syscall.SIGTERM)
	m.swtpm.end(syscall.SIGKILL)
	m.start()
}

// Sleep does to the TPM what a machine does that sleeps and wakes up. The
// resource manager is not told.
func (m *TPM) Sleep() {
	m.t.Helper()
	m.power()
}

// Reset is Sleep, after which the TPM takes nothing back that others have kept
// for it: neither keys nor sessions.
func (m *TPM) Reset() {
	m.t.Helper()
	m.power("--clear")
}

// power has the TPM end and start again, and tells it to keep its state unless
// extra says otherwise.
func (m *TPM) power(extra ...string) {
	m.t.Helper()
	m.Run("tpm2_shutdown", extra...)
	c, err := net.Dial("unix", m.path("tpm.ctrl"))
	if err != nil {
		m.t.Fatal(err)
	}
	defer c.Close()
	const cmdInit = 2 // swtpm_ioctls(3), with no flags
	command := binary.BigEndian.AppendUint32(binary.BigEndian.AppendUint32(nil, cmdInit), 0)
	var result [4]byte
	if _, err := c.Write(command); err != nil {
		m.t.Fatal(err)
	}
	if _, err := io.ReadFull(c, result[:]); err != nil || result != [4]byte{} {
		m.t.Fatalf("start the TPM again: %x, %v", result, err)
	}
	m.Run("tpm2_startup", extra...)
}
