package main_test

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"go/ast"
	"go/parser"
	"go/token"
	"io"
	"io/fs"
	"maps"
	"os"
	"os/exec"
	"path"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"
)

// The tests of this file check that the tree follows docs/ARCHITECTURE.md.

const (
	root       = "../.."
	modulePath = "p11-agent"
)

// A room is a directory, with the directories below it that have no row of their own.
type room struct {
	dir string
	// imports are the packages that the code, but not its tests, may import. The code may also
	// import the standard library and packages below the room. imports has rooms as directories,
	// and other packages by their paths. nil means all packages.
	imports []string
	// knows gives the reason of the limit. It ends the message about a broken rule.
	knows string
}

const (
	xssh     = "golang.org/x/crypto/ssh"
	xsys     = "golang.org/x/sys/unix"
	pkcs11   = "github.com/miekg/pkcs11"
	systemd  = "github.com/coreos/go-systemd/v22/"
	landlock = "github.com/landlock-lsm/go-landlock/landlock"
	toml     = "github.com/pelletier/go-toml/v2"
	dbus     = "github.com/godbus/dbus/v5"
	cobra    = "github.com/spf13/cobra"
	renameio = "github.com/google/renameio/v2"
)

// leaf is the room that every room may import.
const leaf = "pinentry/plain"

// rooms is the import table of docs/ARCHITECTURE.md.
var rooms = []room{
	{"cmd/p11-agent", nil, "it wires every room"},
	{
		"cmd/p11-agent/backend",
		[]string{
			"agent", "agent/request", "cmd/p11-agent/config", "cmd/p11-agent/paths", "cmd/p11-agent/status",
			"pinentry/plain", "pinentry/secret", "token", "token/pin", "token/registry", "token/selection", "token/wire",
		},
		"modules run without prompts, and without the SSH protocol",
	},
	{
		"cmd/p11-agent/advice",
		[]string{"cmd/p11-agent/output", "token", "token/wellknown", "token/wire", xsys},
		"it says what helps: what is wrong is found elsewhere",
	},
	{
		"cmd/p11-agent/doctor",
		[]string{
			"agent/certdir", "agent/peer", "cmd/p11-agent/advice", "cmd/p11-agent/backend", "cmd/p11-agent/config", "cmd/p11-agent/exit", "cmd/p11-agent/named",
			"cmd/p11-agent/output", "cmd/p11-agent/paths", "cmd/p11-agent/probe", "cmd/p11-agent/prompt", "cmd/p11-agent/files", "cmd/p11-agent/status", "pinentry", "pinentry/secret", "systemd", "systemd/install",
			"token", "token/pcsc", "token/pin", "token/pkcs11uri", "token/registry", "token/selection", "token/wellknown", "token/wire", xssh, xssh + "/agent", xsys,
		},
		"it finds out what is wrong, and asks for nothing",
	},
	{
		"cmd/p11-agent/probe",
		[]string{"agent/peer", "cmd/p11-agent/paths", "pinentry/procstat", "token/pcsc", xssh + "/agent"},
		"it asks, and does not judge",
	},
	{"cmd/p11-agent/exit", []string{}, "a leaf: an exit code is decided without knowing the command"},
	{"cmd/p11-agent/paths", []string{xsys}, "a leaf: where files are is decided without reading them"},
	{
		"cmd/p11-agent/completion",
		[]string{"cmd/p11-agent/backend", "cmd/p11-agent/config", "cmd/p11-agent/status", cobra, "pinentry/plain", "token/pkcs11uri"},
		"a completion is quick, and asks no person",
	},
	{
		"cmd/p11-agent/config",
		[]string{
			"agent/approval", "agent/request", "cmd/p11-agent/exit", "cmd/p11-agent/output", "cmd/p11-agent/paths",
			"token", "token/objects", "token/pin", "token/pkcs11uri", "token/registry", "token/retention", "token/selection", xssh, toml,
		},
		"it says what the file means, and does nothing of it",
	},
	{
		"cmd/p11-agent/control",
		[]string{"agent/sshagent", "cmd/p11-agent/exit", "cmd/p11-agent/named", "cmd/p11-agent/output", "cmd/p11-agent/prompt", "cmd/p11-agent/status", "pinentry/plain", "pinentry/secret", "token/module/undumpable", "token/wire"},
		"a person at a terminal controls an agent that runs already",
	},
	{
		"cmd/p11-agent/daemon",
		[]string{"agent", "agent/approval", "agent/audit", "agent/certdir", "agent/door", "agent/knownhosts", "agent/logfold", "agent/peer", "agent/request", "agent/sshagent", "cmd/p11-agent/advice", "cmd/p11-agent/backend", "cmd/p11-agent/config", "cmd/p11-agent/exit", "cmd/p11-agent/output", "cmd/p11-agent/paths", "cmd/p11-agent/prompt", "cmd/p11-agent/status", xssh, xsys, "pinentry/notify", "pinentry/secret", "systemd", "systemd/bus", "systemd/login1", "token", "token/known", "token/module/undumpable", "token/pin", "token/retention", "token/selection"},
		"the running agent wires rooms, and knows no command",
	},
	{"cmd/p11-agent/demo", []string{"cmd/p11-agent/output", "token/registry", "token/wellknown"}, "it runs the program as a user would, by its command line"},
	{
		"cmd/p11-agent/export",
		[]string{
			"agent/certdir", "agent/request", "cmd/p11-agent/config", "cmd/p11-agent/exit", "cmd/p11-agent/files", "cmd/p11-agent/named",
			"cmd/p11-agent/output", "cmd/p11-agent/paths", "token", "token/pkcs11uri", "token/selection", xssh, xsys,
		},
		"public keys are exported without an agent and without a prompt",
	},
	{"cmd/p11-agent/files", []string{renameio}, "a leaf: what the files hold is decided elsewhere"},
	{
		"cmd/p11-agent/listing",
		[]string{"cmd/p11-agent/advice", "cmd/p11-agent/backend", "cmd/p11-agent/config", "cmd/p11-agent/named", "cmd/p11-agent/output", "cmd/p11-agent/status", xssh, "pinentry/plain", "token", "token/pkcs11uri", "token/selection"},
		"tokens and keys are listed without a running agent",
	},
	{"cmd/p11-agent/named", []string{"cmd/p11-agent/exit", "cmd/p11-agent/output", "token", "token/pkcs11uri"}, "it reads names, and knows no command"},
	{
		"cmd/p11-agent/newkey",
		[]string{"agent/peer", "agent/request", "cmd/p11-agent/exit", "cmd/p11-agent/named", "cmd/p11-agent/output", "pinentry/secret", "token", "token/keygen", "token/pkcs11uri", "token/wire", xssh},
		"a key is made without an agent and without a configuration",
	},
	{"cmd/p11-agent/output", []string{"pinentry", "systemd", cobra, xsys}, "it prints for every command, and knows none of them"},
	{
		"cmd/p11-agent/prompt",
		[]string{
			"agent/approval", "agent/peer", "agent/request", "cmd/p11-agent/config", "cmd/p11-agent/exit", "cmd/p11-agent/output",
			"pinentry", "pinentry/plain", "pinentry/secret", "pinentry/waiting", "systemd/environment",
			"token", "token/module/undumpable", "token/pin", "token/pkcs11uri", "token/wire", xsys,
		},
		"it asks persons, and decides nothing about keys",
	},
	{
		"cmd/p11-agent/setup",
		[]string{"cmd/p11-agent/advice", "cmd/p11-agent/backend", "cmd/p11-agent/config", "cmd/p11-agent/control", "cmd/p11-agent/doctor", "cmd/p11-agent/exit", "cmd/p11-agent/export", "cmd/p11-agent/files", "cmd/p11-agent/newkey", "cmd/p11-agent/output", "cmd/p11-agent/paths", "cmd/p11-agent/probe", "cmd/p11-agent/prompt", "cmd/p11-agent/status", xssh, "pinentry/plain", "pinentry/secret", "systemd", "systemd/install", "token", "token/keygen", "token/pin", "token/pkcs11uri", "token/registry", "token/wellknown", "token/wire"},
		"a conversation about the first login knows no flags",
	},
	{
		"cmd/p11-agent/status",
		[]string{"agent", "agent/audit", "agent/request", "agent/sshagent", "cmd/p11-agent/output", "cmd/p11-agent/paths", "pinentry/plain", "token", "token/module/undumpable", "token/pin", "token/pkcs11uri", "token/wire"},
		"it tells what is, and does not know what helps",
	},
	{"cmd/bench", []string{"pinentry/procstat"}, "it measures the program from outside"},
	{"cmd/testrun", []string{}, "it knows tests by their names only"},
	{
		"agent",
		[]string{"agent/joined", "agent/approval", "agent/audit", "agent/certdir", "agent/knownhosts", "agent/pattern", "agent/peer", "agent/request", "agent/sshkey", "pinentry/secret", "pinentry/waiting", xssh},
		"the keyring knows neither PKCS#11 nor a wire format",
	},
	{
		"agent/approval",
		[]string{"agent/knownhosts", "agent/peer", "agent/request", "pinentry", "pinentry/waiting", xssh},
		"whether a key may be used is decided without the key",
	},
	{"agent/audit", []string{"agent/approval", "agent/peer", "agent/request"}, "it tells what was asked and answered, and decides nothing"},
	{"agent/certdir", []string{"agent/sshkey", xssh}, "it reads files: which certificates count is decided by the keyring"},
	{"agent/pattern", []string{}, "a leaf: it matches texts"},
	{"agent/joined", []string{}, "a leaf: it joins errors of any room"},
	{"agent/logfold", []string{}, "a leaf: it folds the lines of any room"},
	{"agent/knownhosts", []string{"agent/pattern", xssh}, "it reads files"},
	{"agent/peer", []string{"pinentry/procstat", xsys}, "the process at the other end of a socket is found without the agent"},
	{
		"agent/request",
		[]string{"agent/knownhosts", "agent/pattern", "agent/peer", "agent/sshkey", "pinentry/secret", xssh},
		"a request is described in the same words at every door",
	},
	{"agent/door", []string{"agent/peer", xsys}, "connections are accepted without a protocol in mind"},
	{
		"agent/sshagent",
		[]string{"agent", "agent/door", "agent/request", "agent/sshkey", "pinentry/secret", xssh, xsys},
		"a door decodes and encodes: it knows neither tokens nor prompts",
	},
	{"agent/sshkey", []string{xssh}, "a leaf: which keys OpenSSH reads"},
	{"pinentry", []string{"pinentry/secret", xsys}, "asking a person knows neither tokens nor SSH"},
	{"pinentry/notify", []string{"pinentry", "systemd/bus", dbus}, "telling a person knows neither tokens nor SSH"},
	{leaf, []string{}, "a leaf: text is made safe to show without knowing where it comes from"},
	{"pinentry/procstat", []string{xsys}, "a leaf: it reads one file of /proc"},
	{"pinentry/secret", []string{xsys}, "a leaf that every room may use"},
	{"pinentry/waiting", []string{}, "a leaf: what is waited for is decided elsewhere"},
	{"systemd", []string{systemd + "activation", systemd + "daemon", systemd + "journal"}, "it knows nothing of the rest"},
	{"systemd/bus", []string{dbus}, "a leaf: it connects to a bus, whatever is said there"},
	{"systemd/environment", []string{"systemd/bus", dbus}, "what the environment is good for is decided elsewhere"},
	{"systemd/install", []string{"systemd", renameio}, "it writes files and runs systemctl: which agent that is for is decided elsewhere"},
	{"systemd/login1", []string{"systemd/bus", dbus}, "what logind says is acted on elsewhere"},
	{
		"token",
		[]string{
			"agent/joined", "agent/logfold",
			"token/login", "token/bounds", "token/card", "token/homes", "token/keygen", "token/objects", "token/usage", "token/known", "token/pace", "token/pairs", "token/pcsc", "token/pin", "token/pkcs11uri", "token/process", "token/readers", "token/registry", "token/operation", "token/pinsource", "token/retention", "token/selection",
			"token/statefile", "token/supervise", "token/wire",
			"pinentry/secret", "pinentry/waiting",
		},
		"tokens know neither the SSH protocol nor prompts, and modules run in another process",
	},
	{
		"token/module",
		[]string{"token/elffile", "token/module/sandbox", "token/pcsc", "token/wire", "pinentry/procstat", "pinentry/secret", pkcs11, xsys},
		"the module process knows no PIN policy, no configuration and no network",
	},
	{"token/module/undumpable", []string{xsys}, "it runs before everything else"},
	{
		"token/module/sandbox",
		[]string{"token/wellknown", "token/wire", xsys, landlock, landlock + "/syscall"},
		"it is in force before there is a module, and knows none of its calls",
	},
	{"token/elffile", []string{}, "a leaf: it reads the beginning of a file"},
	{"token/known", []string{"token/pace", "token/pairs", "token/statefile", "token/wire"}, "the list of seen keys is a file: what becomes of its entries is decided elsewhere"},
	{"token/keygen", []string{"token/pairs", "token/wire"}, "a new key is described without a token at hand"},
	{
		"token/pin",
		[]string{"token/pkcs11uri", "token/statefile", "token/wire", "pinentry/secret", "pinentry/waiting"},
		"a PIN is got and tried without knowing keys or module processes",
	},
	{"token/pinsource", []string{"token/card", "token/homes", "token/pin", "token/pkcs11uri", "token/statefile", "token/wire", "pinentry/secret"}, "a PIN is for one token: which tokens are there is found out elsewhere"},
	{"token/homes", []string{"token/pkcs11uri", "token/wire"}, "which module gets a PIN is decided without a token at hand"},
	{"token/statefile", []string{renameio}, "a leaf: what the files hold is decided elsewhere"},
	{"token/pace", []string{}, "a leaf: it counts, and knows nothing of what happens"},
	{"token/bounds", []string{"token/operation", "token/wire", "pinentry/plain"}, "what is kept of a module is bounded without a module at hand"},
	{"token/card", []string{"token/pairs", "token/pcsc", "token/process", "token/readers", "token/wire"}, "cards are compared by what a look found: logins and PINs are forgotten elsewhere"},
	{"token/login", []string{"token/process"}, "what is known of a login is kept without a token at hand"},
	{"token/objects", []string{"token/bounds", "token/pairs", "token/pkcs11uri", "token/wire"}, "what a look found is kept without a token at hand"},
	{"token/pairs", []string{"token/wire"}, "key pairs are made of objects without a token at hand"},
	{"token/pcsc", []string{"pinentry/procstat", xsys}, "the users of a reader are found without a module, and without touching a card"},
	{"token/pkcs11uri", []string{"token/wire", "pinentry/secret"}, "a URI is read and matched without a token at hand"},
	{
		"token/process",
		[]string{"token/pace", "token/pcsc", "token/wire", "pinentry/plain", xsys},
		"it carries requests to one module, and knows neither tokens nor PIN policy",
	},
	{"token/readers", []string{"token/pcsc", "token/wire"}, "readers are known from pcscd: what a card means is decided elsewhere"},
	{"token/registry", []string{"token/elffile", "token/pkcs11uri", xsys}, "which modules there are is found out without loading one"},
	{"token/retention", []string{}, "a deadline is kept without knowing what ends"},
	{"token/selection", []string{"agent/pattern", "token/pin", "token/pkcs11uri"}, "names are read and compared without a token at hand"},
	{"token/operation", []string{"token/wire"}, "an operation is described without a token at hand"},
	{
		"token/supervise",
		[]string{"token/bounds", "token/pace", "token/process", "token/readers", "token/wellknown", "token/wire", "pinentry/plain", xsys},
		"it keeps a process running, and knows neither tokens nor PINs",
	},
	{
		"token/tokentest",
		[]string{"token", "token/operation", "token/pin", "token/pkcs11uri", "token/registry", "token/wire", "pinentry/secret", xsys},
		"a fake stands where a token stands, and knows no more than one",
	},
	{"token/usage", []string{"token/process"}, "uses are counted without a token at hand"},
	{"token/wellknown", []string{}, "a module is recognized by its file: it is loaded elsewhere"},
	{"token/wire", []string{"pinentry/secret", xsys}, "a leaf: both ends of the connection with a module process share it"},
}

// listed is the output of go list for a package.
type listed struct {
	ImportPath   string
	Name         string
	Doc          string
	Standard     bool
	Imports      []string
	TestImports  []string
	XTestImports []string
	CgoFiles     []string
	Deps         []string
}

// dir returns the directory of a package. ours means that the package belongs to this module.
func (p listed) dir() (dir string, ours bool) { return strings.CutPrefix(p.ImportPath, modulePath+"/") }

// list returns all packages of this module, and the packages that they need, from go list.
func list(t *testing.T) []listed {
	t.Helper()
	cmd := exec.Command("go", "list", "-deps", "-json=ImportPath,Name,Doc,Standard,Imports,TestImports,XTestImports,CgoFiles,Deps", "./...")
	cmd.Dir = root
	var stderr bytes.Buffer
	cmd.Stderr = &stderr
	out, err := cmd.Output()
	if err != nil {
		t.Fatalf("go list: %v\n%s", err, &stderr)
	}
	var packages []listed
	for d := json.NewDecoder(bytes.NewReader(out)); ; {
		var p listed
		switch err := d.Decode(&p); {
		case errors.Is(err, io.EOF):
			return packages
		case err != nil:
			t.Fatal(err)
		}
		packages = append(packages, p)
	}
}

// under reports whether path is dir, or below dir.
func under(path, dir string) bool { return path == dir || strings.HasPrefix(path, dir+"/") }

// roomOf returns the innermost room that a directory is in.
func roomOf(dir string) (r room, ok bool) {
	for _, candidate := range rooms {
		if under(dir, candidate.dir) && (!ok || len(candidate.dir) > len(r.dir)) {
			r, ok = candidate, true
		}
	}
	return r, ok
}

// may reports whether a package in the room may import another package of this module, or a package
// that is not of the standard library.
func (r room) may(imported string) bool {
	if r.imports == nil {
		return true
	}
	dir, ours := strings.CutPrefix(imported, modulePath+"/")
	if !ours {
		return slices.Contains(r.imports, imported)
	}
	to, _ := roomOf(dir)
	return to.dir == r.dir || to.dir == leaf || slices.Contains(r.imports, to.dir)
}

// forTests reports whether a package exists for tests.
func forTests(importPath string) bool {
	return importPath == "testing" || strings.HasPrefix(importPath, modulePath+"/") && strings.HasSuffix(importPath, "test")
}

// terminaltest is the package that runs tests without a controlling terminal.
const terminaltest = modulePath + "/agent/peer/terminaltest"

// startsPrograms reports whether the tests of a package start programs, directly or through a
// package for tests.
func (p listed) startsPrograms() bool {
	return slices.ContainsFunc(slices.Concat(p.TestImports, p.XTestImports), func(imported string) bool {
		return imported == "os/exec" || imported != "testing" && imported != p.ImportPath && forTests(imported)
	})
}

// brokenRules returns messages about packages that break rules, with the reasons.
func brokenRules(packages []listed) (broken []string) {
	all := make(map[string]listed)
	for _, p := range packages {
		all[p.ImportPath] = p
	}
	for _, p := range packages {
		dir, ours := p.dir()
		if !ours {
			continue
		}
		complain := func(format string, args ...any) {
			broken = append(broken, p.ImportPath+" "+fmt.Sprintf(format, args...))
		}
		r, ok := roomOf(dir)
		if !ok {
			complain("is in no room: draw it in docs/ARCHITECTURE.md and in rooms_test.go")
			continue
		}
		for _, imported := range p.Imports {
			if forTests(p.ImportPath) && forTests(imported) {
				continue
			}
			if !all[imported].Standard && imported != "C" && !r.may(imported) {
				complain("imports %s: %s", imported, r.knows)
			}
			if imported == modulePath+"/token/module" && r.dir != "cmd/p11-agent" {
				complain("imports %s: the agent never runs a module's code, it starts a process that does", imported)
			}
			if forTests(imported) && !forTests(p.ImportPath) {
				complain("imports %s: that is for tests", imported)
			}
		}
		if p.startsPrograms() && p.ImportPath != terminaltest && !slices.Contains(slices.Concat(p.TestImports, p.XTestImports), terminaltest) {
			complain("starts programs in its tests, which may ask on the developer's terminal: TestMain has to run the tests by terminaltest.Without")
		}
		if under(r.dir, "token/module") {
			continue
		}
		const foreign = "only the module process runs foreign code"
		if len(p.CgoFiles) > 0 {
			complain("imports C (%s): %s", p.CgoFiles[0], foreign)
		}
		if slices.Contains(slices.Concat(p.Imports, p.TestImports, p.XTestImports), pkcs11) {
			complain("imports %s: only token/module speaks PKCS#11", pkcs11)
		}
		if r.dir == "cmd/p11-agent" {
			continue // the program contains the agent and the module process
		}
		for _, dep := range p.Deps {
			if dep == modulePath+"/token/module/undumpable" && under(r.dir, "cmd/p11-agent") {
				continue // each process of the program runs these few lines of C
			}
			if d := all[dep]; !d.Standard && len(d.CgoFiles) > 0 {
				complain("needs %s, which imports C: %s", dep, foreign)
			}
		}
	}
	return broken
}

func TestRooms(t *testing.T) {
	packages := list(t)
	for _, broken := range brokenRules(packages) {
		t.Error(broken)
	}
	for _, r := range rooms {
		if !slices.ContainsFunc(packages, func(p listed) bool { return p.ImportPath == modulePath+"/"+r.dir }) {
			t.Errorf("%s: a room without a package", r.dir)
		}
	}
	for _, p := range packages {
		// A package that imports C depends on this one without naming it.
		if p.ImportPath == "runtime/cgo" {
			return
		}
	}
	t.Error("go list was made to leave cgo out (CGO_ENABLED=0): the rules about C were not checked")
}

// TestRoomsNotice breaks each rule, and expects a message.
func TestRoomsNotice(t *testing.T) {
	standard := []listed{{ImportPath: "testing", Standard: true}, {ImportPath: "net", Standard: true, CgoFiles: []string{"cgo.go"}}}
	sys := listed{ImportPath: xsys}
	for _, test := range []struct {
		name     string
		packages []listed
		want     string
	}{
		{"nothing wrong", []listed{sys, {ImportPath: "p11-agent/agent/peer", Imports: []string{"net", xsys}, Deps: []string{"net", xsys}}}, ""},
		{"inside the room", []listed{{ImportPath: "p11-agent/pinentry/assuan"}, {ImportPath: "p11-agent/pinentry", Imports: []string{"p11-agent/pinentry/assuan"}}}, ""},
		{"testing in a test package", []listed{{ImportPath: "p11-agent/token/tokentest", Imports: []string{"testing"}}}, ""},
		{"new room", []listed{{ImportPath: "p11-agent/utils"}}, "p11-agent/utils is in no room"},
		{"door to tokens", []listed{{ImportPath: "p11-agent/agent/sshagent", Imports: []string{"p11-agent/token"}}}, "imports p11-agent/token: a door decodes"},
		{"keyring to its door", []listed{{ImportPath: "p11-agent/agent", Imports: []string{"p11-agent/agent/sshagent"}}}, "imports p11-agent/agent/sshagent: the keyring knows neither"},
		{"tokens to the SSH protocol", []listed{{ImportPath: xssh}, {ImportPath: "p11-agent/token", Imports: []string{xssh}}}, "imports golang.org/x/crypto/ssh: tokens know neither"},
		{"below a package that is allowed", []listed{{ImportPath: "p11-agent/agent", Imports: []string{xssh + "/agent"}}}, "imports golang.org/x/crypto/ssh/agent: the keyring"},
		{"below a room, into it from outside", []listed{{ImportPath: "p11-agent/systemd/units", Imports: []string{"p11-agent/agent"}}}, "imports p11-agent/agent: it knows nothing"},
		{"module in the agent", []listed{{ImportPath: "p11-agent/token", Imports: []string{"p11-agent/token/module"}}}, "the agent never runs a module's code"},
		{"PKCS#11 in the agent", []listed{{ImportPath: "p11-agent/cmd/p11-agent", Imports: []string{pkcs11}}}, "only token/module speaks PKCS#11"},
		{"PKCS#11 in a test", []listed{{ImportPath: "p11-agent/token", XTestImports: []string{pkcs11}}}, "only token/module speaks PKCS#11"},
		{"C in the agent", []listed{{ImportPath: "p11-agent/agent/peer", Imports: []string{"C"}, CgoFiles: []string{"peer.go"}}}, "imports C (peer.go)"},
		{"C further down", []listed{
			{ImportPath: xsys, CgoFiles: []string{"x.go"}},
			{ImportPath: "p11-agent/agent/peer", Imports: []string{xsys}, Deps: []string{xsys}},
		}, "needs golang.org/x/sys/unix, which imports C"},
		{"testing in the program", []listed{{ImportPath: "p11-agent/cmd/p11-agent", Imports: []string{"testing"}}}, "imports testing: that is for tests"},
		{"tests with a terminal", []listed{{ImportPath: "p11-agent/agent/peer", XTestImports: []string{"os/exec"}}}, "by terminaltest.Without"},
		{"tests with a terminal and a fake", []listed{{ImportPath: "p11-agent/token", TestImports: []string{"p11-agent/token/tokentest"}}}, "by terminaltest.Without"},
		{"tests without a terminal", []listed{{ImportPath: "p11-agent/token", TestImports: []string{"os/exec"}, XTestImports: []string{terminaltest}}}, ""},
		{"fake in the program", []listed{{ImportPath: "p11-agent/cmd/p11-agent", Imports: []string{"p11-agent/token/tokentest"}}}, "imports p11-agent/token/tokentest: that is for tests"},
	} {
		t.Run(test.name, func(t *testing.T) {
			broken := strings.Join(brokenRules(slices.Concat(standard, test.packages)), "\n")
			if (broken == "") != (test.want == "") || !strings.Contains(broken, test.want) {
				t.Errorf("got %q, want %q", broken, test.want)
			}
		})
	}
}

func TestPackageDocs(t *testing.T) {
	for _, p := range list(t) {
		if _, ours := p.dir(); !ours {
			continue
		}
		want := "Package " + p.Name + " "
		if p.Name == "main" {
			want = "Command " + path.Base(p.ImportPath) + " "
		}
		if !strings.HasPrefix(p.Doc, want) {
			t.Errorf("%s: its documentation does not begin with %q: %q", p.ImportPath, want, p.Doc)
		}
	}
}

func TestTopLevel(t *testing.T) {
	allowed := []string{
		"cmd", "agent", "token", "pinentry", "systemd", "docs", "tools",
		"Makefile", "README.md", "LICENSE", "CHANGELOG.md", "go.mod", "go.sum",
		"build", // the output of make; git ignores it
	}
	entries, err := os.ReadDir(root)
	if err != nil {
		t.Fatal(err)
	}
	for _, e := range entries {
		if name := e.Name(); !strings.HasPrefix(name, ".") && !slices.Contains(allowed, name) {
			t.Errorf("%s: it belongs into one of the rooms", name)
		}
	}
}

// A source is a parsed file of the tree.
type source struct {
	dir  string
	file *ast.File
}

// parse parses all Go files of the tree.
func parse(t *testing.T) (*token.FileSet, []source) {
	t.Helper()
	fset := token.NewFileSet()
	var sources []source
	err := filepath.WalkDir(root, func(name string, e fs.DirEntry, err error) error {
		switch {
		case err != nil:
			return err
		case e.IsDir() && (e.Name() == "testdata" || e.Name() == "build" || strings.HasPrefix(e.Name(), ".") && e.Name() != ".."):
			return fs.SkipDir
		case e.IsDir() || !strings.HasSuffix(name, ".go"):
			return nil
		}
		file, err := parser.ParseFile(fset, name, nil, parser.SkipObjectResolution|parser.ParseComments)
		if err != nil {
			return err
		}
		sources = append(sources, source{filepath.Dir(name), file})
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	return fset, sources
}

// fuzzParameter returns the name of the *testing.F parameter of a function. ok is false if the
// function has no such parameter.
func fuzzParameter(f *ast.FuncDecl) (name string, ok bool) {
	for _, field := range f.Type.Params.List {
		star, isPointer := field.Type.(*ast.StarExpr)
		if !isPointer {
			continue
		}
		if s, isSelector := star.X.(*ast.SelectorExpr); isSelector && s.Sel.Name == "F" && len(field.Names) == 1 {
			return field.Names[0].Name, true
		}
	}
	return "", false
}

// unseeded returns the names of the fuzz targets without a seed, and the number of all targets. A
// target adds its seeds itself, or through a function of its package that gets its F, or has them
// in testdata.
func unseeded(sources []source) (names []string, targets int) {
	type function struct{ dir, name string }
	adds := make(map[function]bool)
	calls := make(map[function][]function)
	for _, s := range sources {
		for _, d := range s.file.Decls {
			f, ok := d.(*ast.FuncDecl)
			if !ok || f.Body == nil {
				continue
			}
			parameter, ok := fuzzParameter(f)
			if !ok {
				continue
			}
			this := function{s.dir, f.Name.Name}
			ast.Inspect(f.Body, func(n ast.Node) bool {
				call, ok := n.(*ast.CallExpr)
				if !ok {
					return true
				}
				isF := func(e ast.Expr) bool {
					id, ok := e.(*ast.Ident)
					return ok && id.Name == parameter
				}
				switch fun := call.Fun.(type) {
				case *ast.SelectorExpr:
					if isF(fun.X) && fun.Sel.Name == "Add" {
						adds[this] = true
					}
				case *ast.Ident:
					if slices.ContainsFunc(call.Args, isF) {
						calls[this] = append(calls[this], function{s.dir, fun.Name})
					}
				}
				return true
			})
			if strings.HasPrefix(f.Name.Name, "Fuzz") {
				targets++
				calls[this] = append(calls[this], this)
			}
		}
	}
	for f, called := range calls {
		if !strings.HasPrefix(f.name, "Fuzz") || slices.ContainsFunc(called, func(c function) bool { return adds[c] }) {
			continue
		}
		if files, _ := os.ReadDir(filepath.Join(f.dir, "testdata", "fuzz", f.name)); len(files) == 0 {
			names = append(names, filepath.Join(f.dir, f.name))
		}
	}
	slices.Sort(names)
	return names, targets
}

func TestFuzzSeeds(t *testing.T) {
	_, sources := parse(t)
	names, targets := unseeded(sources)
	if targets == 0 {
		t.Error("no fuzz target found in the whole tree")
	}
	for _, name := range names {
		t.Errorf("%s has no seed: it passes on nothing", name)
	}
}

// reasonless returns the places that skip a test without a reason.
func reasonless(sources []source) (places []token.Pos) {
	for _, s := range sources {
		ast.Inspect(s.file, func(n ast.Node) bool {
			call, ok := n.(*ast.CallExpr)
			if !ok {
				return true
			}
			fun, ok := call.Fun.(*ast.SelectorExpr)
			if !ok {
				return true
			}
			switch fun.Sel.Name {
			case "SkipNow":
				places = append(places, call.Pos())
			case "Skip", "Skipf":
				if len(call.Args) == 0 || isBlank(call.Args[0]) {
					places = append(places, call.Pos())
				}
			}
			return true
		})
	}
	return places
}

// isBlank reports whether an expression is a string literal without words.
func isBlank(e ast.Expr) bool {
	l, ok := e.(*ast.BasicLit)
	if !ok || l.Kind != token.STRING {
		return false
	}
	text, err := strconv.Unquote(l.Value)
	return err == nil && strings.TrimSpace(text) == ""
}

func TestSkipsHaveReasons(t *testing.T) {
	fset, sources := parse(t)
	for _, pos := range reasonless(sources) {
		t.Errorf("%v: a test is skipped without a word about what is missing", fset.Position(pos))
	}
}

func TestTreeChecksNotice(t *testing.T) {
	file, err := parser.ParseFile(token.NewFileSet(), "x_test.go", `package x
import "testing"
func FuzzEmpty(f *testing.F)   { f.Fuzz(func(t *testing.T, b []byte) {}) }
func FuzzOther(f *testing.F)   { help(f) }
func FuzzAdds(f *testing.F)    { for _, s := range seeds { f.Add(s) } }
func FuzzHelped(f *testing.F)  { seed(1, f) }
func seed(n int, f *testing.F) { f.Add(n) }
func help(f *testing.F)        { f.Helper() }
func TestNow(t *testing.T)     { t.SkipNow() }
func TestNothing(t *testing.T) { t.Skip() }
func TestBlank(t *testing.T)   { t.Skipf(" ") }
func TestWord(t *testing.T)    { t.Skip("no card"); t.Skip(reason) }
`, parser.SkipObjectResolution)
	if err != nil {
		t.Fatal(err)
	}
	sources := []source{{"x", file}}
	names, targets := unseeded(sources)
	if want := []string{"x/FuzzEmpty", "x/FuzzOther"}; targets != 4 || !slices.Equal(names, want) {
		t.Errorf("of %d targets %q have no seed, want %q of 4", targets, names, want)
	}
	if got := reasonless(sources); len(got) != 3 {
		t.Errorf("%d skips without a reason, want 3", len(got))
	}
}

func TestDependenciesAreExplained(t *testing.T) {
	cmd := exec.Command("go", "mod", "edit", "-json")
	cmd.Dir = root
	out, err := cmd.Output()
	if err != nil {
		t.Fatal(err)
	}
	var mod struct{ Require []struct{ Path string } }
	if err := json.Unmarshal(out, &mod); err != nil {
		t.Fatal(err)
	}
	direct := make(map[string]bool)
	for _, p := range list(t) {
		if _, ours := p.dir(); !ours {
			continue
		}
		for _, imported := range slices.Concat(p.Imports, p.TestImports, p.XTestImports) {
			for _, r := range mod.Require {
				if under(imported, r.Path) {
					direct[r.Path] = true
				}
			}
		}
	}
	if len(direct) == 0 {
		t.Error("no dependency found")
	}

	text, err := os.ReadFile(filepath.Join(root, "docs", "ARCHITECTURE.md"))
	if err != nil {
		t.Fatal(err)
	}
	for _, module := range slices.Sorted(maps.Keys(direct)) {
		row := func(line string) bool { return strings.HasPrefix(line, "|") && strings.Contains(line, "`"+module+"`") }
		if !slices.ContainsFunc(strings.Split(string(text), "\n"), row) {
			t.Errorf("%s: docs/ARCHITECTURE.md has no row that says why it is needed", module)
		}
	}
}
