package systemd

import (
	"io/fs"
	"maps"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"p11-agent/agent/door/doortest"
)

// directives returns the settings of one section of a unit file, by their names.
func directives(t *testing.T, text, section string) map[string][]string {
	t.Helper()
	found := make(map[string][]string)
	in := ""
	for line := range strings.SplitSeq(text, "\n") {
		switch name, value, ok := strings.Cut(line, "="); {
		case line == "", strings.HasPrefix(line, "#"):
		case strings.HasPrefix(line, "["):
			in = strings.Trim(line, "[]")
		case !ok:
			t.Errorf("no directive: %q", line)
		case in == section:
			found[name] = append(found[name], value)
		}
	}
	if len(found) == 0 {
		t.Errorf("there is no section %q", section)
	}
	return found
}

// userDirectives are the directives that a unit of a user may have in [Service]. The test
// forbids all others until their effect there is known. Many need namespaces or
// capabilities. For these, depending on its version, systemd ignores the directive, fails
// to start the service, or makes a user namespace. In a user namespace, the agent cannot
// read the environment of its clients.
var userDirectives = []string{
	"Type", "ExecStart", "ExecReload", "SyslogIdentifier", "Restart", "RestartSec", "KillMode", "WatchdogSec", "WatchdogSignal",
	"Environment", "LimitCORE", "UMask", "NoNewPrivileges", "LockPersonality", "RestrictRealtime", "RestrictSUIDSGID", "RestrictNamespaces",
	"MemoryDenyWriteExecute", "SystemCallArchitectures", "RestrictAddressFamilies", "SystemCallFilter", "SystemCallErrorNumber",
}

// forbidden returns the directives of [Service] that a unit of a user may not have.
func forbidden(t *testing.T, text string) (found []string) {
	for name := range directives(t, text, "Service") {
		if !slices.Contains(userDirectives, name) {
			found = append(found, name)
		}
	}
	slices.Sort(found)
	return found
}

func shipped(t *testing.T, name, program string) string {
	t.Helper()
	text, err := Shipped(name, program)
	if err != nil {
		t.Fatal(err)
	}
	return string(text)
}

func TestUserServiceHasNoNamespaces(t *testing.T) {
	text := shipped(t, UserService, "")
	if found := forbidden(t, text); len(found) > 0 {
		t.Errorf("the unit has %q: see userDirectives", found)
	}
	// The loop adds each forbidden directive to the unit.
	for _, name := range []string{"PrivateTmp", "ProtectSystem", "ProtectHostname", "ReadWritePaths", "CapabilityBoundingSet", "PrivateUsers"} {
		worse := strings.Replace(text, "UMask=", name+"=yes\nUMask=", 1)
		if got := forbidden(t, worse); !slices.Equal(got, []string{name}) {
			t.Errorf("with %s it is said to have %q", name, got)
		}
	}
}

// Both services need the directives that protect secrets, that let clients wait for the
// agent, and that let the agent confine itself.
func TestServicesHaveWhatTheyNeed(t *testing.T) {
	want := map[string]string{
		"Type":            "notify",
		"Restart":         "on-failure",
		"WatchdogSignal":  "SIGKILL",
		"Environment":     "GOTRACEBACK=none",
		"LimitCORE":       "0",
		"KillMode":        "mixed",
		"NoNewPrivileges": "yes",
		// Before systemd 254, @system-service does not have the last five.
		"SystemCallFilter":        "@system-service seccomp landlock_create_ruleset landlock_add_rule landlock_restrict_self memfd_secret",
		"RestrictAddressFamilies": "AF_UNIX AF_INET AF_INET6 AF_NETLINK",
	}
	for _, name := range []string{UserService, SystemService} {
		text := shipped(t, name, "")
		service := directives(t, text, "Service")
		for directive, value := range want {
			if got := service[directive]; !slices.Equal(got, []string{value}) {
				t.Errorf("%s: %s is %q, want %q", name, directive, got, value)
			}
		}
		if got := directives(t, text, "Unit")["StartLimitIntervalSec"]; !slices.Equal(got, []string{"0"}) {
			t.Errorf("%s: StartLimitIntervalSec is %q: ten crashes would end the socket", name, got)
		}
	}
	for name, want := range map[string]map[string]string{
		UserSocket:   {"ListenStream": "%t/p11-agent/agent.sock", "SocketMode": "0600", "DirectoryMode": "0700", "RemoveOnStop": "yes", "FileDescriptorName": "agent"},
		SystemSocket: {"ListenStream": "/run/p11-agent/%i.sock", "SocketMode": "0600", "SocketUser": "root", "RemoveOnStop": "yes", "FileDescriptorName": "agent"},
	} {
		socket := directives(t, shipped(t, name, ""), "Socket")
		for directive, value := range want {
			if got := socket[directive]; !slices.Equal(got, []string{value}) {
				t.Errorf("%s: %s is %q, want %q", name, directive, got, value)
			}
		}
	}
}

// odd is a path with all characters that are allowed and have a meaning in a unit file.
const odd = `/bin/a b%h$HOME${x};#é`

// Every file is shipped, and those that start the agent start the one they are
// told to.
func TestShipped(t *testing.T) {
	constants := []string{UserSocket, UserService, Environment, SSHConfig, SystemSocket, SystemService, Sysusers}
	var files []string
	if err := fs.WalkDir(units, "units", func(path string, d fs.DirEntry, err error) error {
		if err == nil && !d.IsDir() {
			files = append(files, strings.TrimPrefix(path, "units/"))
		}
		return err
	}); err != nil {
		t.Fatal(err)
	}
	slices.Sort(constants)
	slices.Sort(files)
	if !slices.Equal(constants, files) {
		t.Errorf("there are %q, and constants for %q", files, constants)
	}
	for _, test := range []struct{ program, want string }{
		{"", "/usr/bin/p11-agent agent -D"},
		{"/usr/bin/p11-agent", "/usr/bin/p11-agent agent -D"},
		{"/opt/p11_1.0+x/p11-agent", "/opt/p11_1.0+x/p11-agent agent -D"},
		{odd, `"/bin/a b%%h$HOME${x};#é" agent -D`},
	} {
		if got := directives(t, shipped(t, UserService, test.program), "Service")["ExecStart"]; !slices.Equal(got, []string{test.want}) {
			t.Errorf("%q is started by %q, want %q", test.program, got, test.want)
		}
	}
	for _, program := range []string{"p11-agent", "./p11-agent", "/usr/../bin/p11-agent", "/bin/a\nExecStart=/bin/b", "/bin/\xff", `/bin/"`, "/bin/'", `/bin/\`} {
		if text, err := Shipped(UserService, program); err == nil {
			t.Errorf("%q is taken:\n%s", program, text)
		}
	}
	if _, err := Shipped("user/other", ""); err == nil {
		t.Error("a file that is not there was shipped")
	}
}

// systemd itself finds nothing wrong with the units.
func TestVerify(t *testing.T) {
	analyze, err := exec.LookPath("systemd-analyze")
	if err != nil {
		if os.Getenv("CI") == "true" {
			t.Fatal("systemd-analyze is not installed")
		}
		t.Skip("systemd-analyze is not installed")
	}
	dir := doortest.Dir(t)
	program := filepath.Join(dir, odd)
	if err := os.MkdirAll(filepath.Dir(program), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(program, []byte("#!/bin/true\n"), 0o755); err != nil {
		t.Fatal(err)
	}
	verify := func(manager string, files map[string]string) (string, error) {
		units, err := os.MkdirTemp(dir, "units")
		if err != nil {
			t.Fatal(err)
		}
		args := []string{"verify", manager, "--man=no", "--recursive-errors=one"}
		for _, name := range slices.Sorted(maps.Keys(files)) {
			file := filepath.Join(units, strings.Replace(filepath.Base(name), "@", "@host", 1))
			if err := os.WriteFile(file, []byte(files[name]), 0o644); err != nil {
				t.Fatal(err)
			}
			args = append(args, file)
		}
		cmd := exec.Command(analyze, args...)
		cmd.Env = append(os.Environ(), "XDG_RUNTIME_DIR="+dir, "SYSTEMD_LOG_COLOR=0")
		out, err := cmd.CombinedOutput()
		return string(out), err
	}
	for manager, names := range map[string][]string{"--user": {UserSocket, UserService}, "--system": {SystemSocket, SystemService}} {
		t.Run(manager, func(t *testing.T) {
			files := make(map[string]string)
			for _, name := range names {
				files[name] = shipped(t, name, program)
			}
			if out, err := verify(manager, files); err != nil || out != "" {
				t.Errorf("%v\n%s", err, out)
			}
			// It does look at what is there.
			service := names[1]
			files[service] = strings.Replace(files[service], "[Service]\n", "[Service]\nRestrictNamespace=yes\n", 1)
			if out, err := verify(manager, files); err == nil || !strings.Contains(out, "RestrictNamespace") {
				t.Errorf("a directive that does not exist: %v\n%s", err, out)
			}
			files[service] = shipped(t, service, filepath.Join(dir, "absent"))
			if out, err := verify(manager, files); err == nil {
				t.Errorf("a program that does not exist: %v\n%s", err, out)
			}
		})
	}
}
