package registry

import (
	"bytes"
	"log/slog"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
)

// tree makes a configuration in its own directory. In contents, LIB is a directory with
// files that look like libraries for this machine.
func tree(t *testing.T, files map[string]string) (Options, *bytes.Buffer) {
	t.Helper()
	dir := t.TempDir()
	lib := filepath.Join(dir, "lib")
	for _, name := range []string{"a.so", "b.so", "p11-kit-trust.so", "p11-kit-client.so", "libp11-kit.so.0.3.0", "libnssckbi.so"} {
		write(t, filepath.Join(lib, name), ownHeader(t))
	}
	must(t, os.Symlink("libp11-kit.so.0.3.0", filepath.Join(lib, "p11-kit-proxy.so")))
	must(t, os.Symlink("libp11-kit.so.0.3.0", filepath.Join(lib, "harmless.so")))
	must(t, os.Symlink("a.so", filepath.Join(lib, "link.so")))
	foreign := ownHeader(t)
	foreign[18] ^= 0xff
	write(t, filepath.Join(lib, "foreign.so"), foreign)
	write(t, filepath.Join(lib, "script.so"), []byte("INPUT ( a.so )  # a linker script"))
	write(t, filepath.Join(lib, "short.so"), []byte("\x7fELF"))
	for path, text := range files {
		write(t, filepath.Join(dir, path), []byte(strings.ReplaceAll(text, "LIB", lib)))
	}
	var log bytes.Buffer
	return Options{
		Dirs: Dirs{
			System: filepath.Join(dir, "system"), Admin: filepath.Join(dir, "admin"), User: filepath.Join(dir, "user"),
			GlobalConf: filepath.Join(dir, "global.conf"), UserConf: filepath.Join(dir, "user.conf"),
			ModuleDirs: []string{filepath.Join(dir, "nowhere"), lib},
			UID:        os.Getuid(),
		},
		Program: Program,
		Log:     slog.New(slog.NewTextHandler(&log, &slog.HandlerOptions{Level: slog.LevelDebug})),
	}, &log
}

func ownHeader(t *testing.T) []byte {
	t.Helper()
	f, err := os.Open("/proc/self/exe")
	must(t, err)
	defer f.Close()
	header := make([]byte, 64)
	_, err = f.Read(header)
	must(t, err)
	return header
}

func module(t *testing.T, r Result, name string) Module {
	t.Helper()
	i := slices.IndexFunc(r.Modules, func(m Module) bool { return m.Name == name })
	if i < 0 {
		t.Fatalf("no module %q in %+v", name, r.Modules)
	}
	return r.Modules[i]
}

func TestSkipped(t *testing.T) {
	tests := []struct {
		name, text string
		skip       string // part of the reason; empty for none
	}{
		{"absolute", "module: LIB/a.so", ""},
		{"relative", "module: a.so", ""},
		{"a link", "module: link.so", ""},
		{"for us", "module: a.so\nenable-in: ssh,p11-agent", ""},
		{"not against us", "module: a.so\ndisable-in: firefox", ""},
		{"command", "remote: |p11-kit remote LIB/a.so", ""},
		{"remote wins over module", "module: nowhere.so\nremote: |x", ""},
		{"client of a given server", "module: p11-kit-client.so\nserver-address: unix:path=/run/p11-kit", ""},
		{"not a source of trust", "module: a.so\ntrust-policy: no", ""},

		{"for others", "module: a.so\nenable-in: ssh", "keeps it from p11-agent"},
		{"against us", "module: a.so\ndisable-in: ssh p11-agent", "keeps it from p11-agent"},
		{"no module", "priority: 1", "neither module: nor remote:"},
		{"blank module", "module:", "switches it off"},
		{"missing", "module: LIB/none.so", "lib/none.so: no such file"},
		{"missing for others", "module: none.so\nenable-in: ssh", "keeps it from p11-agent"},
		{"missing source of trust", "module: none.so\ntrust-policy: yes", "none.so: no such"},
		{"missing relative", "module: none.so", "none.so: no such file"},
		{"directory", "module: LIB", "not a regular file"},
		{"device", "module: /dev/null", "not a regular file"},
		{"other architecture", "module: foreign.so", "lib/foreign.so: the library is for another architecture"},
		{"linker script", "module: script.so", "not a shared library"},
		{"cut off", "module: short.so", "not a shared library"},
		{"trust policy", "module: a.so\ntrust-policy: yes", "source of trust"},
		{"trust module", "module: p11-kit-trust.so", "no private keys"},
		{"NSS roots", "module: libnssckbi.so", "no private keys"},
		{"proxy", "module: p11-kit-proxy.so", "configured anyway"},
		{"proxy by another name", "module: harmless.so", "configured anyway"},
		{"client of any server", "module: p11-kit-client.so", "not named"},
		{"client of a bad server", "module: p11-kit-client.so\nserver-address: here", "unix:path=/"},
		{"remote nonsense", "remote: tcp:x", "unix:path=/"},
		{"remote without command", "remote: |", "no command"},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			o, _ := tree(t, map[string]string{"system/m.module": tt.text})
			m := module(t, Load(o), "m")
			if tt.skip == "" && m.Skip != "" || !strings.Contains(m.Skip, tt.skip) {
				t.Errorf("Skip = %q, want %q", m.Skip, tt.skip)
			}
			if m.Skip == "" && !filepath.IsAbs(m.Path) {
				t.Errorf("Path = %q", m.Path)
			}
			// The other reasons for Skip are intended.
			meant := []string{"keeps it from", "switches it off", "source of trust", "no private keys"}
			want := m.Skip != "" && !slices.ContainsFunc(meant, func(s string) bool { return strings.Contains(m.Skip, s) })
			if m.Broken != (want && !strings.Contains(tt.text, "trust-policy")) {
				t.Errorf("Broken = %v, and Skip = %q", m.Broken, m.Skip)
			}
		})
	}
}

// Load offers p11-kit-client.so if a setting or a variable names its server.
func TestServerAddress(t *testing.T) {
	const bad, unnamed = `P11_KIT_SERVER_ADDRESS must be`, "not named"
	for _, tt := range []struct {
		name, text       string
		everywhere, here string // addresses of the environment, and of the module
		address, skip    string
	}{
		{"of the environment", "module: p11-kit-client.so", "unix:path=/e", "", "unix:path=/e", ""},
		{"of the module", "module: p11-kit-client.so", "unix:path=/e", "unix:path=/m", "unix:path=/m", ""},
		{"of the file", "module: p11-kit-client.so\nserver-address: unix:path=/f", "unix:path=/e", "unix:path=/m", "unix:path=/f", ""},
		{"of a link", "module: client-link.so", "vsock:cid=2;port=1", "", "vsock:cid=2;port=1", ""},
		{"of none", "module: p11-kit-client.so", "", "", "", unnamed},
		{"nonsense", "module: p11-kit-client.so", "here", "", "", bad},
		{"a command", "module: p11-kit-client.so", "|true", "", "", bad},
		{"of others", "module: a.so", "unix:path=/e", "unix:path=/m", "", ""},
		{"of a proxy", "module: p11-kit-proxy.so", "unix:path=/e", "", "", "configured anyway"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			o, _ := tree(t, map[string]string{"system/m.module": tt.text})
			must(t, os.Symlink("p11-kit-client.so", filepath.Join(o.ModuleDirs[1], "client-link.so")))
			o.ServerAddress, o.ServerAddresses = tt.everywhere, map[string]string{"m": tt.here}
			m := module(t, Load(o), "m")
			if m.Remote.Address != tt.address || m.Remote.Command != nil || (m.Skip == "") != (tt.skip == "") || !strings.Contains(m.Skip, tt.skip) {
				t.Errorf("%+v", m)
			}
			if m.Broken != (m.Skip != "") {
				t.Errorf("Broken = %v", m.Broken)
			}
		})
	}
	d := DefaultDirs(func(name string) (string, bool) { return "unix:path=/x", name == ServerVariable }, 0)
	if d.ServerAddress != "unix:path=/x" {
		t.Errorf("%+v", d)
	}
}

func TestModule(t *testing.T) {
	o, log := tree(t, map[string]string{
		"system/a.module": "module: a.so\npriority: 3\ncritical: yes\n",
		"admin/a.module":  "# mine\nx-init-reserved: slots=2 x\nmanaged: no\nx-colour: octarine",
		"user/a.module":   "priority: -7",
		"system/r.module": "remote: |ssh card p11-kit remote 'm x.so'",
		"system/u.module": "remote: unix:path=/run/x",
	})
	r := Load(o)
	if len(r.Warnings) != 0 || r.NoUser != "" {
		t.Errorf("warnings %v, NoUser %q", r.Warnings, r.NoUser)
	}
	lib := o.ModuleDirs[1]
	system, admin, user := filepath.Join(o.System, "a.module"), filepath.Join(o.Admin, "a.module"), filepath.Join(o.User, "a.module")
	want := []Module{
		{
			Name: "r", Files: []string{filepath.Join(o.System, "r.module")}, Path: lib + "/p11-kit-client.so",
			Remote:   Remote{Command: []string{"ssh", "card", "p11-kit", "remote", "m x.so"}},
			Settings: map[string]Setting{"remote": {"|ssh card p11-kit remote 'm x.so'", filepath.Join(o.System, "r.module"), 1}},
		},
		{
			Name: "u", Files: []string{filepath.Join(o.System, "u.module")}, Path: lib + "/p11-kit-client.so",
			Remote:   Remote{Address: "unix:path=/run/x"},
			Settings: map[string]Setting{"remote": {"unix:path=/run/x", filepath.Join(o.System, "u.module"), 1}},
		},
		{
			Name: "a", Files: []string{user, admin, system}, Path: lib + "/a.so",
			Priority: -7, Critical: true, InitArgs: "slots=2 x",
			Settings: map[string]Setting{
				"module": {"a.so", system, 1}, "critical": {"yes", system, 3}, "priority": {"-7", user, 1},
				"x-init-reserved": {"slots=2 x", admin, 2}, "managed": {"no", admin, 3}, "x-colour": {"octarine", admin, 4},
			},
		},
	}
	if diff := cmp.Diff(want, r.Modules); diff != "" {
		t.Error(diff)
	}
	for _, s := range []string{"setting=x-colour", "setting=managed", "line=4"} {
		if !strings.Contains(log.String(), s) {
			t.Errorf("no %s in the log:\n%s", s, log)
		}
	}
	if strings.Contains(log.String(), "octarine") {
		t.Errorf("the log quotes a value:\n%s", log)
	}
}

func TestWarnings(t *testing.T) {
	tests := []struct {
		name  string
		files map[string]string
		want  string // of the first warning, without the directory
	}{
		{"bad boolean", map[string]string{"system/a.module": "module: a.so\ncritical: true"}, "system/a.module:2: critical must be yes or no: taken as no"},
		{"bad priority", map[string]string{"system/a.module": "priority: high\nmodule: a.so"}, "system/a.module:1: priority must be a whole number of at most 32 bits: taken as 0"},
		{"both lists", map[string]string{"system/a.module": "module: a.so\nenable-in: p11-agent\ndisable-in: x"}, "system/a.module:3: disable-in has no effect beside enable-in"},
		{"no colon", map[string]string{"admin/a.module": "module: a.so\n\noops"}, `admin/a.module:3: no colon: a setting is written "name: value"; the file is not used`},
		{"bad remote", map[string]string{"user/a.module": "remote: x"}, `user/a.module:1: remote must be "|command", "unix:path=/..." or "vsock:..."`},
		{"user-config", map[string]string{"global.conf": "#\nuser-config: onyl"}, `global.conf:2: user-config must be none, merge or only, not "onyl"`},
		{"directory in place of the global file", map[string]string{"global.conf/x": ""}, "global.conf: the file cannot be used: not a regular file"},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			o, _ := tree(t, tt.files)
			var got []string
			for _, w := range Load(o).Warnings {
				got = append(got, strings.TrimPrefix(w.String(), filepath.Dir(o.System)+"/"))
			}
			if diff := cmp.Diff([]string{tt.want}, got); diff != "" {
				t.Error(diff)
			}
		})
	}
}

func TestOneBadFileCostsItself(t *testing.T) {
	o, _ := tree(t, map[string]string{
		"system/a.module":     "module: a.so",
		"admin/a.module":      "priority: 9\noops",
		"system/b.module":     "module: b.so",
		"system/zero.module":  "module: a.so\x00",
		"system/large.module": strings.Repeat("#", maxFile+1),
	})
	must(t, os.Symlink("/dev/zero", filepath.Join(o.System, "device.module")))
	must(t, os.Symlink("gone", filepath.Join(o.System, "dangling.module")))
	must(t, os.Mkdir(filepath.Join(o.System, "dir.module"), 0o755))
	r := Load(o)
	var names []string
	for _, m := range r.Modules {
		names = append(names, m.Name)
		if m.Priority != 0 || m.Skip != "" {
			t.Errorf("%+v", m)
		}
	}
	if diff := cmp.Diff([]string{"a", "b"}, names); diff != "" {
		t.Error(diff)
	}
	if len(r.Warnings) != 5 {
		t.Errorf("warnings: %v", r.Warnings)
	}
}

// Users for services have homes like /dev/null.
func TestNothingIsWhereAFileIs(t *testing.T) {
	o, _ := tree(t, map[string]string{"system/a.module": "module: a.so", "file": ""})
	file := filepath.Join(filepath.Dir(o.System), "file")
	o.User, o.UserConf, o.Admin = filepath.Join(file, "modules"), filepath.Join(file, "pkcs11.conf"), file
	r := Load(o)
	if len(r.Modules) != 1 || len(r.Warnings) != 0 || r.NoUser != "" {
		t.Errorf("%+v", r)
	}
}

func TestTooManyFilesCostTheirDirectory(t *testing.T) {
	files := map[string]string{"admin/a.module": "module: a.so"}
	o, _ := tree(t, files)
	must(t, os.Mkdir(o.System, 0o755))
	for i := range maxFiles + 1 {
		must(t, os.Symlink("x", filepath.Join(o.System, strings.Repeat("x", 1+i%200)+string(rune('a'+i/200))+".module")))
	}
	r := Load(o)
	if len(r.Modules) != 1 || len(r.Warnings) != 1 || r.Warnings[0].File != o.System {
		t.Errorf("%d modules, warnings %v", len(r.Modules), r.Warnings)
	}
}

func TestOthersMayWrite(t *testing.T) {
	o, _ := tree(t, map[string]string{"system/a.module": "module: a.so", "admin/b.module": "module: b.so", "user/c.module": "priority: 1"})
	lib := o.ModuleDirs[1]
	for _, path := range []string{filepath.Join(o.System, "a.module"), o.Admin, filepath.Join(lib, "b.so")} {
		must(t, os.Chmod(path, 0o777))
	}
	var got []string
	for _, w := range Load(o).Warnings {
		if !strings.Contains(w.Text, "everybody may write") {
			t.Errorf("warning %v", w)
		}
		got = append(got, w.File)
	}
	slices.Sort(got)
	want := []string{o.Admin, filepath.Join(lib, "b.so"), filepath.Join(o.System, "a.module")}
	slices.Sort(want)
	if diff := cmp.Diff(want, got); diff != "" {
		t.Error(diff)
	}

	need(t, os.Getuid() == 0, "root, to give files away")
	o, _ = tree(t, map[string]string{"system/a.module": "module: a.so"})
	must(t, os.Chown(filepath.Join(o.System, "a.module"), ordinary, -1))
	r := Load(o)
	if len(r.Warnings) != 1 || !strings.Contains(r.Warnings[0].Text, "belongs to user 65534") {
		t.Errorf("warnings: %v", r.Warnings)
	}
	o.UID = ordinary
	if r := Load(o); len(r.Warnings) != 0 {
		t.Errorf("warnings about one's own files: %v", r.Warnings)
	}
}

func TestDuplicates(t *testing.T) {
	o, _ := tree(t, map[string]string{
		"system/a.module":     "module: a.so",
		"system/b.module":     "module: LIB/link.so\npriority: 1",
		"system/c.module":     "module: LIB/../lib/a.so\nx-init-reserved: x",
		"system/d.module":     "module: a.so\ntrust-policy: yes\npriority: 2",
		"system/r.module":     "remote: |x",
		"system/s.module":     "remote: |x",
		"system/broken~":      "module: b.so",
		"system/broken":       "module: b.so\npriority: -1",
		"system/again.module": "module: b.so",
	})
	got := map[string]bool{}
	for _, m := range Load(o).Modules {
		got[m.Name] = m.Skip == ""
		if m.Name == "a" && m.Skip != `it is the same library as module "b"` {
			t.Errorf("Skip = %q", m.Skip)
		}
	}
	want := map[string]bool{"a": false, "b": true, "c": true, "d": false, "r": true, "s": true, "again": true, "broken": false, "broken~": false}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Error(diff)
	}
}

func TestSameNameInOneDirectory(t *testing.T) {
	o, _ := tree(t, map[string]string{
		"system/a":        "module: a.so\npriority: 1",
		"system/a.module": "module: b.so\npriority: 2\ncritical: yes",
	})
	r := Load(o)
	m := module(t, r, "a")
	if len(r.Modules) != 1 || m.Priority != 1 || !m.Critical || filepath.Base(m.Path) != "a.so" {
		t.Errorf("%+v", r.Modules)
	}
}

// Load warns about mistakes in the environment. It does not warn about settings that may
// be intended, or about a mistake that it has already reported.
func TestNoUserMistake(t *testing.T) {
	for _, tt := range []struct {
		name    string
		mistake bool
		want    string // all warnings
	}{
		{"meant", false, ""},
		{"mistaken", true, "the user's own modules are not used: HOME is odd"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			o, _ := tree(t, map[string]string{"user/b.module": "module: b.so"})
			o.NoUser, o.NoUserMistake = "HOME is odd", tt.mistake
			r := Load(o)
			var got []string
			for _, w := range r.Warnings {
				got = append(got, w.String())
			}
			if strings.Join(got, "\n") != tt.want || r.NoUser != o.NoUser {
				t.Errorf("warnings %q, NoUser = %q", got, r.NoUser)
			}
		})
	}
}

// Load warns if no Bridge can be made, once for each module that needs a Bridge. So a
// program that only reads the configuration knows it, too.
func TestNoPlaceForSockets(t *testing.T) {
	files := map[string]string{
		"system/a.module": "module: a.so",
		"system/r.module": "priority: 1\nremote: |x",
		"system/u.module": "remote: unix:path=/run/x",
	}
	o, _ := tree(t, files)
	if r := Load(o); len(r.Warnings) != 0 {
		t.Errorf("warnings %v", r.Warnings)
	}
	o.SocketDir = filepath.Join(o.System, "nowhere")
	r := Load(o)
	if len(r.Warnings) != 1 || r.Warnings[0].File != filepath.Join(o.System, "r.module") || r.Warnings[0].Line != 2 ||
		!strings.Contains(r.Warnings[0].Text, o.SocketDir+": no such file or directory: set TMPDIR") {
		t.Errorf("warnings %v", r.Warnings)
	}
	module(t, r, "a")
}

func TestNoUser(t *testing.T) {
	files := map[string]string{"system/a.module": "module: a.so", "user/b.module": "module: b.so"}
	with := func(path, text string) map[string]string {
		m := maps.Clone(files)
		m[path] = text
		return m
	}
	tests := []struct {
		name   string
		files  map[string]string
		reason string // why the directories say that there is no user
		want   string // in Result.NoUser; empty if the user's modules count
	}{
		{"by default", files, "", ""},
		{"directories say so", files, "root has none", "root has none"},
		{"directories say so, whatever the user wants", with("user.conf", "user-config: only"), "root has none", "root has none"},
		{"the system forbids it", with("global.conf", "user-config: none"), "", "global.conf says"},
		{"the user turns it off", with("user.conf", "user-config: none"), "", "user.conf says"},
		{"the system's word is unreadable", with("global.conf", "oops"), "", "it is unknown whether"},
		{"the system's word is unknown", with("global.conf", "user-config: yes"), "", "it is unknown whether"},
		{"the user's word is unreadable", with("user.conf", "oops"), "", "it is unknown whether"},
		{"the user's word is unknown", with("user.conf", "user-config: None"), "", "it is unknown whether"},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			o, _ := tree(t, tt.files)
			o.NoUser = tt.reason
			r := Load(o)
			user := slices.ContainsFunc(r.Modules, func(m Module) bool { return m.Name == "b" })
			if user != (tt.want == "") || !strings.Contains(r.NoUser, tt.want) || tt.want == "" && r.NoUser != "" {
				t.Errorf("user's modules %v, NoUser = %q, want %q", user, r.NoUser, tt.want)
			}
			module(t, r, "a")
		})
	}
}

func TestLoadsThisMachine(t *testing.T) {
	_, err := os.Stat("/usr/share/p11-kit/modules/softhsm2.module")
	need(t, err == nil, "the package softhsm2")
	r := Load(Options{Dirs: DefaultDirs(os.LookupEnv, os.Getuid()), Program: Program})
	if m := module(t, r, "softhsm2"); m.Skip != "" || m.Path == "" {
		t.Errorf("%+v", m)
	}
	if m := module(t, r, "p11-kit-trust"); m.Skip == "" {
		t.Errorf("%+v", m)
	}
}
