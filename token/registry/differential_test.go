package registry

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"testing"

	"github.com/google/go-cmp/cmp"
)

// p11-kit has the places of its configuration compiled in. So both programs run in their
// own mount namespace, where the test provides those places. The test starts its own
// program again in the namespace (role "namespace"), and once more for each user (role
// "load"). The program in the role "load" takes on the environment that p11-kit gets.

// A machine is one configuration to compare with. Paths of Files are relative to the
// places of the next constants. In contents, STUBS is the directory with the modules, and
// HERE is the machine's own directory.
type machine struct {
	Name   string
	Files  map[string]string // contents
	Links  map[string]string // targets of symbolic links
	Dirs   []string
	Modes  map[string]os.FileMode
	Env    map[string]string
	UID    int
	SetUID bool // run with set-user-ID programs
}

const (
	etc   = "etc"   // /etc/pkcs11
	share = "share" // /usr/share/p11-kit/modules
	home  = "home"  // the user's home directory

	ordinary = 65534 // a user who is not root
)

// An outcome holds the results of both programs on a machine.
type outcome struct {
	P11Kit string // its list of modules
	Failed bool   // its exit status
	Errors string
	Ours   Result
	Trace  string // what ours wrote when it failed
}

// stub is a module that does nothing, successfully.
const stub = `
#include <string.h>
static unsigned long ok(void *p) { return 0; }
static unsigned long no(void) { return 0x54; }
static unsigned long info(char *p) { memset(p, ' ', 82); return 0; }
static unsigned long slots(unsigned char t, unsigned long *l, unsigned long *n) { *n = 0; return 0; }
unsigned long C_GetFunctionList(void *p);
static struct { unsigned char version[2]; void *f[68]; } list = { { 2, 40 } };
unsigned long C_GetFunctionList(void *p) {
	for (int i = 0; i < 68; i++) list.f[i] = no;
	list.f[0] = ok; list.f[1] = ok; list.f[2] = info; list.f[3] = C_GetFunctionList; list.f[4] = slots;
	*(void **)p = &list;
	return 0;
}
`

// stubs holds the names of the copies of stub. p11-kit's module directory has other files
// with the same names.
var stubs = []string{"a.so", "b.so", "c.so", "d.so", "e.so", "f.so", "g.so", "h.so"}

func TestSameAsP11Kit(t *testing.T) {
	base, outcomes, machines, seed := runMachines(t)
	t.Logf("seed %d, %d configurations", seed, len(machines))
	counts := map[string]int{}
	for i, m := range machines {
		o := outcomes[i]
		if o.Trace != "" {
			t.Errorf("%s: our side failed: %s", m.Name, o.Trace)
			continue
		}
		if want, ok := exceptions[m.Name]; ok {
			checkException(t, m, o, want)
			continue
		}
		want, kind := expected(o.Ours)
		counts[kind]++
		got := strings.ReplaceAll(listedBy(o.P11Kit), base, "BASE")
		want = strings.ReplaceAll(want, base, "BASE")
		if diff := cmp.Diff(got, want); diff != "" || o.Failed != (kind != "") {
			t.Errorf("%s: p11-kit(-), we(+), its failure %v, ours %q:\n%s\np11-kit's messages:\n%s\nour warnings: %v\n%+v",
				m.Name, o.Failed, kind, diff, o.Errors, o.Ours.Warnings, m)
		}
	}
	t.Logf("compared: %v", counts)
	// If the programs list nothing anywhere, the test compares nothing.
	full := 0
	for _, o := range outcomes {
		if strings.Count(listedBy(o.P11Kit), "\n") > 1 {
			full++
		}
	}
	if full < len(outcomes)/3 {
		t.Errorf("only %d of %d configurations gave more than one module", full, len(outcomes))
	}
	for name := range exceptions {
		if !slices.ContainsFunc(machines, func(m machine) bool { return m.Name == name }) {
			t.Errorf("no configuration for the exception %q", name)
		}
	}
}

// expected returns the list that p11-kit prints if r is right. If p11-kit fails in a way
// that the package's documentation names, expected returns that failure, and an empty
// list.
func expected(r Result) (list, failure string) {
	if strings.HasPrefix(r.NoUser, "it is unknown") {
		return "", "global configuration"
	}
	for _, w := range r.Warnings {
		if strings.Contains(w.Text, "the file is not used") {
			return "", "file"
		}
	}
	var b strings.Builder
	for _, m := range r.Modules {
		module, local := m.Settings["module"]
		_, remote := m.Settings["remote"]
		trust := strings.HasPrefix(m.Skip, "it is a source of trust")
		switch {
		case remote && m.Settings["managed"].Value == "no":
			// Only this package lists the module.
		case m.Skip == "" || trust:
			path := "(null)"
			if local {
				path = module.Value
			}
			fmt.Fprintf(&b, "%s: %s\n", m.Name, path)
		case m.Critical && (local || remote) && !strings.HasPrefix(m.Skip, "enable-in"):
			return "", "critical module"
		}
	}
	return b.String(), ""
}

// listedBy returns the lines of p11-kit list-modules that name modules.
func listedBy(output string) string {
	var b strings.Builder
	for line := range strings.Lines(output) {
		if !strings.HasPrefix(line, " ") {
			b.WriteString(line)
		}
	}
	return b.String()
}

// An exception is a difference that the package's documentation explains.
type exception struct {
	p11kit string // module names, separated by blanks; | stands between what chance decides
	ours   string
}

var exceptions = map[string]exception{
	"broken file":              {"", "a"},
	"broken file of the user":  {"", "a"},
	"dangling link":            {"", "a"},
	"zero byte":                {"a b", "a"},
	"large file":               {"a b", "a"},
	"unreadable system file":   {"", "a"},
	"unreadable system dir":    {"", "a"},
	"broken global file":       {"", "a"},
	"critical and missing":     {"", "b"},
	"trust policy":             {"a b", "a"},
	"same library":             {"a|b", "a"},
	"same library, other args": {"a|b", "a b"},
	"relative XDG_CONFIG_HOME": {"a u", "a"},
	"relative HOME":            {"a u", "a"},
	"large priority":           {"b a", "a b"},
	"dlopen expansion":         {"a b", "a"},
	"remote and not managed":   {"a", "a r"},
	"blanks in command":        {"a|", "a r"}, // it may die, writing to a command that is gone
	"no home directory":        {"", "a"},
}

func checkException(t *testing.T, m machine, o outcome, want exception) {
	t.Helper()
	var theirs, ours []string
	for line := range strings.Lines(listedBy(o.P11Kit)) {
		name, _, _ := strings.Cut(line, ": ")
		theirs = append(theirs, name)
	}
	for _, m := range o.Ours.Modules {
		if m.Skip == "" {
			ours = append(ours, m.Name)
		}
	}
	got := exception{strings.Join(theirs, " "), strings.Join(ours, " ")}
	if got.ours != want.ours || !slices.Contains(strings.Split(want.p11kit, "|"), got.p11kit) {
		t.Errorf("%s: got %+v, want %+v\np11-kit's messages:\n%s\nours: %+v", m.Name, got, want, o.Errors, o.Ours)
	}
}

// namedMachines are cases that random machines rarely show.
func namedMachines() []machine {
	const a, b = "module: STUBS/a.so\n", "module: STUBS/b.so\n"
	const user = home + "/.config/pkcs11/"
	remote := "remote: |/usr/libexec/p11-kit/p11-kit-remote STUBS/c.so\n"
	ms := []machine{
		{Name: "nothing at all"},
		{Name: "one file in each place", Files: map[string]string{share + "/a.module": a, etc + "/modules/b.module": b, user + "modules/c.module": "module: STUBS/c.so"}},
		{Name: "setting by setting", Files: map[string]string{
			share + "/a.module": a + "priority: 1\n", share + "/b.module": b,
			etc + "/modules/a.module": "priority: -1\n", user + "modules/a.module": "priority: 7\n",
		}},
		{Name: "switched off by the user", Files: map[string]string{share + "/a.module": a, share + "/b.module": b, user + "modules/a.module": "module:\n"}},
		{Name: "blank and critical elsewhere", Files: map[string]string{share + "/a.module": a + "critical: yes", user + "modules/a.module": "module:\ncritical: no\n"}},
		{Name: "relative", Files: map[string]string{share + "/a.module": "module: a.so", share + "/b.module": "module: sub/../b.so", share + "/c.module": "module: ./c.so"}, UID: ordinary},
		{Name: "root has no user configuration", UID: 0, Files: map[string]string{
			share + "/a.module": a, user + "modules/u.module": b, user + "pkcs11.conf": "user-config: only",
		}},
		{Name: "root and user-config only", UID: 0, Files: map[string]string{share + "/a.module": a, user + "modules/u.module": b, etc + "/pkcs11.conf": "user-config: only"}},
		{Name: "set-user-ID", SetUID: true, Files: map[string]string{share + "/a.module": a, user + "modules/u.module": b}},
		{Name: "forbidden by the environment", Env: map[string]string{"P11_KIT_NO_USER_CONFIG": "1"}, Files: map[string]string{share + "/a.module": a, user + "modules/u.module": b}},
		{Name: "forbidden by an empty variable", Env: map[string]string{"P11_KIT_NO_USER_CONFIG": ""}, Files: map[string]string{share + "/a.module": a, user + "modules/u.module": b}},
		{Name: "HOME from the user database", Env: map[string]string{"HOME": "-"}, Files: map[string]string{share + "/a.module": a, user + "modules/u.module": b}},
		{Name: "empty HOME", Env: map[string]string{"HOME": ""}, Files: map[string]string{share + "/a.module": a, user + "modules/u.module": b}},
		{Name: "no home directory", UID: 4711, Env: map[string]string{"HOME": "-"}, Files: map[string]string{share + "/a.module": a}},
		{Name: "HOME does not exist", Env: map[string]string{"HOME": "/nowhere"}, Files: map[string]string{share + "/a.module": a}},
		{Name: "XDG_CONFIG_HOME", Env: map[string]string{"XDG_CONFIG_HOME": "HERE/xdg"}, Files: map[string]string{share + "/a.module": a, user + "modules/u.module": b, "xdg/pkcs11/modules/x.module": "module: STUBS/c.so"}},
		{Name: "empty XDG_CONFIG_HOME", Env: map[string]string{"XDG_CONFIG_HOME": ""}, Files: map[string]string{share + "/a.module": a, user + "modules/u.module": b}},
		{Name: "relative XDG_CONFIG_HOME", Env: map[string]string{"XDG_CONFIG_HOME": home + "/.config"}, Files: map[string]string{share + "/a.module": a, user + "modules/u.module": b}},
		{Name: "relative HOME", Env: map[string]string{"HOME": home}, Files: map[string]string{share + "/a.module": a, user + "modules/u.module": b}},
		{Name: "user-config none", Files: map[string]string{share + "/a.module": a, user + "modules/u.module": b, etc + "/pkcs11.conf": "user-config: none", user + "pkcs11.conf": "user-config: merge"}},
		{Name: "user turns himself off", Files: map[string]string{share + "/a.module": a, user + "modules/u.module": b, user + "pkcs11.conf": "user-config: none"}},
		{Name: "user alone", Files: map[string]string{share + "/a.module": a, user + "modules/u.module": b, user + "pkcs11.conf": "user-config: only"}},
		{Name: "user alone, old word", Files: map[string]string{share + "/a.module": a, user + "modules/u.module": b, user + "pkcs11.conf": "user-config: override"}},
		{Name: "user merges what the system calls only", Files: map[string]string{share + "/a.module": a, user + "modules/u.module": b, etc + "/pkcs11.conf": "user-config: only", user + "pkcs11.conf": "user-config: merge"}},
		{Name: "blank user-config", Files: map[string]string{share + "/a.module": a, etc + "/pkcs11.conf": "user-config:"}},
		{Name: "bad file names", Files: map[string]string{
			share + "/a.module~": a, share + "/b": b, share + "/.c.module": "module: STUBS/c.so", share + "/d e.module": "module: STUBS/d.so",
			share + "/.module": "module: STUBS/e.so", share + "/f,.module": "module: STUBS/f.so", share + "/-g.module": "module: STUBS/g.so", share + "/h\xe4.module": "module: STUBS/h.so",
		}},
		{Name: "good file names", Files: map[string]string{share + "/A-_.9.module": a, share + "/9.module": b, share + "/c.module.module": "module: STUBS/c.so"}},
		{Name: "directory in between", Dirs: []string{share + "/x.module", user + "modules/y.module"}, Files: map[string]string{share + "/a.module": a}},
		{Name: "file in place of the directory", Files: map[string]string{share + "/a.module": a, etc + "/modules": "x", user + "modules": "x"}},
		{Name: "links", Files: map[string]string{share + "/a.module": a, "elsewhere/b": b}, Links: map[string]string{share + "/b.module": "../elsewhere/b"}},
		{Name: "masked with /dev/null", Files: map[string]string{share + "/a.module": a}, Links: map[string]string{user + "modules/a.module": "/dev/null"}},
		{Name: "unreadable user file", Files: map[string]string{share + "/a.module": a, user + "modules/a.module": "module:", user + "modules/u.module": b}, Modes: map[string]os.FileMode{user + "modules/a.module": 0}},
		{Name: "unreadable user directory", Files: map[string]string{share + "/a.module": a, user + "modules/u.module": b}, Modes: map[string]os.FileMode{user + "modules": 0}},
		{Name: "unreadable user configuration", Files: map[string]string{share + "/a.module": a, user + "modules/u.module": b, user + "pkcs11.conf": "user-config: only"}, Modes: map[string]os.FileMode{user + "pkcs11.conf": 0}},
		{Name: "unreadable system file", Files: map[string]string{share + "/a.module": a, share + "/b.module": b}, Modes: map[string]os.FileMode{share + "/b.module": 0}},
		{Name: "unreadable system dir", Files: map[string]string{share + "/a.module": a, etc + "/modules/b.module": b}, Modes: map[string]os.FileMode{etc + "/modules": 0}},
		{Name: "broken file", Files: map[string]string{share + "/a.module": a, etc + "/modules/b.module": b + "oops"}},
		{Name: "broken file of the user", Files: map[string]string{share + "/a.module": a, user + "modules/a.module": "[x]\nmodule:\n"}},
		{Name: "broken global file", Files: map[string]string{share + "/a.module": a, user + "modules/b.module": b, etc + "/pkcs11.conf": "oops"}},
		{Name: "dangling link", Files: map[string]string{share + "/a.module": a}, Links: map[string]string{share + "/b.module": "nowhere"}},
		{Name: "zero byte", Files: map[string]string{share + "/a.module": a, share + "/b.module": b + "x: \x00"}},
		{Name: "large file", Files: map[string]string{share + "/a.module": a, share + "/b.module": b + strings.Repeat("#\n", maxFile/2)}},
		{Name: "critical and missing", Files: map[string]string{share + "/a.module": "module: STUBS/none.so\ncritical: yes", share + "/b.module": b}},
		{Name: "critical and switched off here", Files: map[string]string{share + "/a.module": "module: STUBS/none.so\ncritical: yes\ndisable-in: p11-kit", share + "/b.module": b}},
		{Name: "critical without a module", Files: map[string]string{share + "/a.module": "critical: yes", share + "/b.module": b}},
		{Name: "trust policy", Files: map[string]string{share + "/a.module": a, share + "/b.module": b + "trust-policy: yes"}},
		{Name: "same library", Files: map[string]string{share + "/a.module": a, share + "/b.module": a}},
		{Name: "same library, other args", Files: map[string]string{share + "/a.module": a + "x-init-reserved: 1", share + "/b.module": a + "x-init-reserved: 2"}},
		{Name: "large priority", Files: map[string]string{share + "/a.module": a + "priority: 4294967295", share + "/b.module": b}},
		{Name: "odd priorities", Files: map[string]string{
			share + "/a.module": a + "priority: 5x", share + "/b.module": b + "priority: +6", share + "/c.module": "module: STUBS/c.so\npriority: high",
			share + "/d.module": "module: STUBS/d.so\npriority: -", share + "/e.module": "module: STUBS/e.so\npriority: 0x10", share + "/f.module": "module: STUBS/f.so\npriority:", share + "/g.module": "module: STUBS/g.so\npriority: -2147483648",
		}},
		{Name: "dlopen expansion", Files: map[string]string{share + "/a.module": a, share + "/b.module": "module: STUBS/$LIB/b.so"}},
		{Name: "remote", Files: map[string]string{share + "/a.module": a, share + "/r.module": remote, share + "/s.module": b + "remote: |/usr/libexec/p11-kit/p11-kit-remote STUBS/d.so\n"}},
		{Name: "remote and critical", Files: map[string]string{share + "/a.module": a, share + "/r.module": remote + "critical: yes"}},
		{Name: "remote and not managed", Files: map[string]string{share + "/a.module": a, share + "/r.module": remote + "managed: no"}},
		{Name: "blanks in command", Files: map[string]string{share + "/a.module": a, share + "/r.module": strings.Replace(remote, "|", "|  ", 1)}},
		{Name: "remote of no known kind", Files: map[string]string{share + "/a.module": a, share + "/r.module": b + "remote: tcp:127.0.0.1"}},
		{Name: "no remote command", Files: map[string]string{share + "/a.module": a, share + "/r.module": b + "remote: |"}},
		{Name: "blank remote", Files: map[string]string{share + "/a.module": a, share + "/r.module": b + "remote:"}},
		{Name: "no remote command, critical", Files: map[string]string{share + "/a.module": a, share + "/r.module": b + "remote: |\ncritical: yes"}},
	}
	for i := range ms {
		if ms[i].UID == 0 && !strings.HasPrefix(ms[i].Name, "root") {
			ms[i].UID = ordinary
		}
	}
	return ms
}

// randomMachine makes a random configuration.
func randomMachine(r *rand.Rand, number int) machine {
	pick := func(from ...string) string { return from[r.IntN(len(from))] }
	chance := func(percent int) bool { return r.IntN(100) < percent }
	m := machine{
		Name:  fmt.Sprintf("random %d", number),
		Files: map[string]string{},
		Env:   map[string]string{},
		UID:   ordinary,
	}
	if chance(15) {
		m.UID = 0
	}
	if chance(10) {
		m.Env["P11_KIT_NO_USER_CONFIG"] = pick("", "1")
	}
	config := home + "/.config"
	switch {
	case chance(25):
		config = "xdg"
		m.Env["XDG_CONFIG_HOME"] = "HERE/xdg"
	case chance(10):
		m.Env["XDG_CONFIG_HOME"] = ""
	case chance(10):
		m.Env["HOME"] = pick("", "-")
	}
	for _, path := range []string{etc + "/pkcs11.conf", config + "/pkcs11/pkcs11.conf"} {
		if chance(35) {
			word := pick("none", "merge", "merge", "only", "only", "override")
			if chance(4) {
				word = pick("", "yes", "Merge", "none # off")
			}
			m.Files[path] = "# global\nuser-config: " + word + "\n"
		}
	}
	// Each name has its own library. Otherwise chance decides which of several names
	// p11-kit gives to one library.
	names := []string{"a", "b", "c", "d", "e.x", "F", "g-1", "h_2"}
	files := make([]string, len(names))
	for i, name := range names {
		files[i] = name + ".module"
		if chance(8) {
			files[i] = name + pick("", ".module~", ".conf", " .module", ".module.bak")
		}
	}
	places := []string{share, etc + "/modules", config + "/pkcs11/modules"}
	if chance(20) {
		places = append(places, home+"/.config/pkcs11/modules")
	}
	for _, place := range places {
		for i, file := range files {
			if chance(45) {
				m.Files[place+"/"+file] = randomFile(r, stubs[i])
			}
		}
	}
	return m
}

// randomFile makes a random module file.
func randomFile(r *rand.Rand, library string) string {
	pick := func(from ...string) string { return from[r.IntN(len(from))] }
	chance := func(percent int) bool { return r.IntN(100) < percent }
	var lines []string
	add := func(name string, values ...string) {
		colon := pick(": ", ":", " : ", "\t:\t", ":  ", "\v:\f")
		lines = append(lines, pick("", "", " ", "\t", "\r")+name+colon+pick(values...)+pick("", "", " ", "\t", "\r"))
	}
	if chance(75) {
		add("module", "STUBS/"+library, "STUBS/"+library, "STUBS/"+library, library)
	}
	if chance(8) {
		add("module", "", "STUBS/missing.so", "missing.so", "STUBS", "STUBS/"+library+" # not a comment")
	}
	if chance(8) {
		add("module", "STUBS/"+library)
	}
	if chance(3) {
		add("remote", "|/usr/libexec/p11-kit/p11-kit-remote STUBS/"+library, "|\"/usr/libexec/p11-kit/p11-kit-remote\" 'STUBS/"+library+"'", "|", "tcp:x")
	}
	programs := []string{
		"p11-kit", "p11-agent", "p11-kit,firefox", "firefox p11-kit", "firefox,\tp11-kit\tx", "p11-kit2", "xp11-kit", "p11-kit-proxy",
		"xp11-kit p11-kit", "p11-kit2,p11-kit", "", ",", "p11-kit,", "P11-KIT", "p11-kitp11-kit", "p11-kit;x",
	}
	if chance(20) {
		add("enable-in", programs...)
	}
	if chance(20) {
		add("disable-in", programs...)
	}
	if chance(40) {
		add("priority", "0", "1", "-1", "10", "2", "9", "007", "+3", " 4", "5 6", "x", "-", "--1", "1e3", "-2147483648", "2147483647")
	}
	if chance(6) {
		add("critical", "yes", "no", "true", "YES", "")
	}
	if chance(15) {
		add("trust-policy", "yes", "no", "1")
	}
	if chance(15) {
		add("managed", "yes", "no", "true")
	}
	if chance(10) {
		add("log-calls", "no", "0")
	}
	if chance(10) {
		add("x-init-reserved", "", "a b=c")
	}
	if chance(20) {
		add(pick("x-unknown", "", "two words", "MODULE", "-----begin"), "", "x: y", "# z")
	}
	if chance(20) {
		lines = append(lines, pick("# module: STUBS/h.so", "  # :", "#", "", " \t"))
	}
	r.Shuffle(len(lines), func(i, j int) { lines[i], lines[j] = lines[j], lines[i] })
	if chance(1) {
		lines = append(lines, pick("module", "[section]", "[", "-----BEGIN X-----", "]"))
	}
	return strings.Join(lines, pick("\n", "\n", "\n\n", "\r\n")) + pick("", "\n")
}

// commandMachines make p11-kit split command lines.
func commandMachines() []machine {
	var ms []machine
	for _, c := range commands {
		ms = append(ms, machine{
			Name:  "command " + c.name,
			UID:   ordinary,
			Files: map[string]string{share + "/r.module": "remote: |" + strings.Replace(c.line, "CMD", "HERE/show", 1), "out": ""},
			Modes: map[string]os.FileMode{"out": 0o666},
		})
	}
	return ms
}

func TestSplitCommandSameAsP11Kit(t *testing.T) {
	base, outcomes := runInNamespace(t, commandMachines())
	for i, c := range commands {
		got, err := os.ReadFile(filepath.Join(base, strconv.Itoa(i), "out"))
		must(t, err)
		if want := strings.Join(c.want, "\n") + "\n"; string(got) != want {
			t.Errorf("%s: p11-kit made %q of %q, we %q\n%s", c.name, got, c.line, want, outcomes[i].Errors)
		}
	}
}

func runMachines(t *testing.T) (base string, outcomes []outcome, machines []machine, seed uint64) {
	t.Helper()
	seed = 20240607
	if s := os.Getenv("P11_REGISTRY_SEED"); s != "" {
		var err error
		seed, err = strconv.ParseUint(s, 10, 64)
		must(t, err)
	}
	machines = namedMachines()
	r := rand.New(rand.NewPCG(seed, 0))
	for n := range 250 {
		machines = append(machines, randomMachine(r, n))
	}
	base, outcomes = runInNamespace(t, machines)
	return base, outcomes, machines, seed
}

// runInNamespace builds the machines and runs both programs on them.
func runInNamespace(t *testing.T, machines []machine) (base string, outcomes []outcome) {
	t.Helper()
	need(t, os.Getuid() == 0, "root, for a mount namespace")
	_, err := exec.LookPath("p11-kit")
	need(t, err == nil, "p11-kit")
	gcc, err := exec.LookPath("gcc")
	need(t, err == nil, "gcc")
	clientPath, err := FindClient(moduleDirs())
	need(t, err == nil, "p11-kit-client.so")

	base, err = os.MkdirTemp("", "p11")
	must(t, err)
	t.Cleanup(func() { os.RemoveAll(base) })
	must(t, os.Chmod(base, 0o755))

	compile := exec.Command(gcc, "-shared", "-fPIC", "-o", base+"/stub", "-x", "c", "-")
	compile.Stdin = strings.NewReader(stub)
	if out, err := compile.CombinedOutput(); err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	library, err := os.ReadFile(base + "/stub")
	must(t, err)
	for _, name := range stubs {
		write(t, filepath.Join(base, "stubs", name), library)
		write(t, filepath.Join(base, "relative", name), library)
	}
	must(t, os.MkdirAll(filepath.Join(base, "relative/sub"), 0o755))
	must(t, copyFile(clientPath, filepath.Join(base, "relative", client)))
	for _, lib := range []string{"lib", "lib64", "lib/x86_64-linux-gnu", "lib/aarch64-linux-gnu"} {
		write(t, filepath.Join(base, "stubs", lib, "b.so"), library)
	}
	for i, m := range machines {
		m.build(t, base, i)
	}
	plan, err := json.Marshal(machines)
	must(t, err)
	write(t, filepath.Join(base, "plan"), plan)

	self, err := os.Executable()
	must(t, err)
	cmd := exec.Command(self)
	cmd.Env = append(os.Environ(), roleVariable+"=namespace", "BASE="+base, "RELATIVE="+filepath.Dir(clientPath))
	cmd.SysProcAttr = &syscall.SysProcAttr{Unshareflags: syscall.CLONE_NEWNS, Pdeathsig: syscall.SIGKILL}
	var stderr bytes.Buffer
	cmd.Stderr = &stderr
	out, err := cmd.Output()
	need(t, !errors.Is(err, syscall.EPERM), "the right to make a mount namespace")
	if err != nil {
		t.Fatalf("in the namespace: %v\n%s", err, &stderr)
	}
	must(t, json.Unmarshal(out, &outcomes))
	if len(outcomes) != len(machines) {
		t.Fatalf("%d outcomes of %d", len(outcomes), len(machines))
	}
	return base, outcomes
}

func write(t *testing.T, path string, data []byte) {
	t.Helper()
	must(t, os.MkdirAll(filepath.Dir(path), 0o755))
	must(t, os.WriteFile(path, data, 0o644))
}

func (m machine) build(t *testing.T, base string, number int) {
	t.Helper()
	here := filepath.Join(base, strconv.Itoa(number))
	for _, dir := range append([]string{etc, share, home}, m.Dirs...) {
		must(t, os.MkdirAll(filepath.Join(here, dir), 0o755))
	}
	for path, text := range m.Files {
		text = strings.NewReplacer("STUBS", filepath.Join(base, "stubs"), "HERE", here).Replace(text)
		write(t, filepath.Join(here, path), []byte(text))
	}
	for path, target := range m.Links {
		path = filepath.Join(here, path)
		must(t, os.MkdirAll(filepath.Dir(path), 0o755))
		must(t, os.Symlink(target, path))
	}
	for path, mode := range m.Modes {
		must(t, os.Chmod(filepath.Join(here, path), mode))
	}
	show := filepath.Join(here, "show")
	must(t, os.WriteFile(show, []byte("#!/bin/sh\nexec >"+here+"/out\nprintf '%s\\n' \"$@\"\n"), 0o755))
}

// namespaceMain makes the places that p11-kit reads, in this process's own mount
// namespace. Then it runs both programs on every machine.
func namespaceMain() int {
	base := os.Getenv("BASE")
	check := func(err error) {
		if err != nil {
			panic(err)
		}
	}
	check(syscall.Mount("", "/", "", syscall.MS_REC|syscall.MS_PRIVATE, ""))
	for _, dir := range []string{"/etc", "/usr/share/p11-kit"} {
		check(syscall.Mount("tmpfs", dir, "tmpfs", 0, "mode=755"))
	}
	check(syscall.Mount(filepath.Join(base, "relative"), os.Getenv("RELATIVE"), "", syscall.MS_BIND, ""))
	// Mount options may turn set-user-ID off. The programs need a place without that
	// option.
	check(syscall.Mount("tmpfs", "/mnt", "tmpfs", 0, "mode=755"))
	p11kit, err := exec.LookPath("p11-kit")
	check(err)
	self, err := os.Executable()
	check(err)
	for dir, mode := range map[string]os.FileMode{"/mnt/plain": 0o755, "/mnt/setuid": 0o755 | os.ModeSetuid} {
		check(os.Mkdir(dir, 0o755))
		for name, from := range map[string]string{"p11-kit": p11kit, "load": self} {
			to := filepath.Join(dir, name)
			check(copyFile(from, to))
			check(os.Chown(to, 1, -1))
			check(os.Chmod(to, mode))
		}
	}
	data, err := os.ReadFile(filepath.Join(base, "plan"))
	check(err)
	var machines []machine
	check(json.Unmarshal(data, &machines))
	users := fmt.Sprintf("root:x:0:0::/etc/home:/bin/sh\nordinary:x:%d:%d::/etc/home:/bin/sh\n", ordinary, ordinary)
	check(os.WriteFile("/etc/passwd", []byte(users), 0o644))
	outcomes := make([]outcome, len(machines))
	programs := programs{loadings: map[string]*loading{}}
	for i, m := range machines {
		here := filepath.Join(base, strconv.Itoa(i))
		for place, part := range map[string]string{"/etc/pkcs11": etc, "/usr/share/p11-kit/modules": share, "/etc/home": home} {
			if i > 0 {
				check(os.Remove(place))
			}
			check(os.Symlink(filepath.Join(here, part), place))
		}
		outcomes[i] = programs.run(m, here)
	}
	check(programs.end())
	check(json.NewEncoder(os.Stdout).Encode(outcomes))
	return 0
}

// A request asks a loader to read the machine that is in place.
type request struct {
	Dir string
	Env []string
}

// A loading is a process of the role "load".
type loading struct {
	cmd      *exec.Cmd
	requests *json.Encoder
	results  *json.Decoder
	close    func() error // lets it end
}

// programs runs p11-kit, and this test program once for each user.
type programs struct {
	loadings map[string]*loading
}

// prepare makes the command that runs a program as the machine's user.
func (m machine) prepare(program string, args ...string) *exec.Cmd {
	dir := "/mnt/plain/"
	if m.SetUID {
		dir = "/mnt/setuid/"
	}
	cmd := exec.Command(dir+program, args...)
	cmd.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: uint32(m.UID), Gid: uint32(m.UID)}}
	return cmd
}

// run runs p11-kit, and then this package, on one machine.
func (p *programs) run(m machine, here string) (o outcome) {
	env := []string{"PATH=/usr/bin:/bin"}
	if _, ok := m.Env["HOME"]; !ok {
		env = append(env, "HOME="+filepath.Join(here, home))
	}
	for name, value := range m.Env {
		if value != "-" {
			env = append(env, name+"="+strings.ReplaceAll(value, "HERE", here))
		}
	}
	var stdout, stderr strings.Builder
	cmd := m.prepare("p11-kit", "list-modules")
	cmd.Env, cmd.Dir = env, here
	cmd.Stdout, cmd.Stderr = &stdout, &stderr
	o.Failed = cmd.Run() != nil
	o.P11Kit, o.Errors = stdout.String(), stderr.String()

	l, err := p.loading(m)
	if err == nil {
		err = l.requests.Encode(request{here, env})
	}
	if err == nil {
		err = l.results.Decode(&o.Ours)
	}
	if err != nil {
		o.Trace = err.Error()
	}
	return o
}

// loading returns the process for machines of this machine's user.
func (p *programs) loading(m machine) (*loading, error) {
	key := fmt.Sprint(m.UID, m.SetUID)
	if l := p.loadings[key]; l != nil {
		return l, nil
	}
	cmd := m.prepare("load")
	cmd.Env = []string{roleVariable + "=load"}
	cmd.Stderr = os.Stderr
	in, err := cmd.StdinPipe()
	if err != nil {
		return nil, err
	}
	out, err := cmd.StdoutPipe()
	if err != nil {
		return nil, err
	}
	if err := cmd.Start(); err != nil {
		return nil, err
	}
	l := &loading{cmd, json.NewEncoder(in), json.NewDecoder(out), in.Close}
	p.loadings[key] = l
	return l, nil
}

// end makes the processes end.
func (p *programs) end() error {
	var errs []error
	for _, l := range p.loadings {
		errs = append(errs, l.close(), l.cmd.Wait())
	}
	return errors.Join(errs...)
}

// loadMain prints what this package finds, in the form of p11-kit's own program.
func loadMain() int {
	requests, results := json.NewDecoder(os.Stdin), json.NewEncoder(os.Stdout)
	for {
		var r request
		err := requests.Decode(&r)
		if errors.Is(err, io.EOF) {
			return 0
		}
		if err == nil {
			err = os.Chdir(r.Dir)
		}
		os.Clearenv()
		for _, variable := range r.Env {
			name, value, _ := strings.Cut(variable, "=")
			err = errors.Join(err, os.Setenv(name, value))
		}
		if err == nil {
			err = results.Encode(Load(Options{Dirs: DefaultDirs(os.LookupEnv, os.Getuid()), Program: "p11-kit"}))
		}
		if err != nil {
			fmt.Fprintln(os.Stderr, err)
			return 1
		}
	}
}

func copyFile(from, to string) error {
	in, err := os.Open(from)
	if err != nil {
		return err
	}
	defer in.Close()
	out, err := os.OpenFile(to, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o755)
	if err != nil {
		return err
	}
	_, err = io.Copy(out, in)
	return errors.Join(err, out.Close())
}
