package registry

import (
	"cmp"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"

	"p11-agent/token/elffile"
)

// client is the library that reaches a module in another process (p11-kit/client.c).
const client = "p11-kit-client.so"

// useless holds libraries that are never started, and why. advice tells a user who
// expects the library what to do.
var useless = []struct{ prefix, reason, advice string }{
	{"p11-kit-trust.so", "it holds trusted certificates, no private keys", ""},
	{"libnssckbi", "it holds trusted certificates, no private keys", ""},
	{"p11-kit-proxy.so", proxied, ""},
	{"libp11-kit.so", proxied, ""}, // p11-kit-proxy.so is a link to it
	{
		client, "the server that it connects to is not named",
		"set P11_KIT_SERVER_ADDRESS, which \"p11-kit server\" prints, in the environment of the agent; or write into its file: server-address: unix:path=/...",
	},
}

const proxied = "it offers the modules that are configured anyway"

// locate finds the library of a module. It sets Path and Remote, or Skip.
func (l *loader) locate(m *Module) {
	module, local := m.Settings["module"]
	if remote, ok := m.Settings["remote"]; ok {
		l.locateRemote(m, remote)
		return
	}
	switch {
	case !local:
		m.Skip, m.Broken = "its configuration has neither module: nor remote:", true
		m.Advice = "write module: or remote: into its file"
		return
	case module.Value == "":
		m.Skip = "module: is blank, which switches it off"
		return
	}
	path, err := findLibrary(module.Value, l.ModuleDirs)
	if err != nil {
		m.Skip, m.Broken = err.Error(), true
		return
	}
	m.Path = path
	name := filepath.Base(path)
	target, err := filepath.EvalSymlinks(path)
	if err != nil {
		m.Skip, m.Broken = fmt.Sprintf("%s: %v", path, bare(err)), true
		return
	}
	isClient := name == client || filepath.Base(target) == client
	if address, ok := m.Settings["server-address"]; ok && isClient {
		l.locateRemote(m, address)
		return
	}
	if address := cmp.Or(l.ServerAddresses[m.Name], l.ServerAddress); address != "" && isClient {
		if m.Remote, err = parseRemote(address); err != nil || m.Remote.Address == "" {
			m.Skip, m.Broken = ServerVariable+" must be \"unix:path=/...\" or \"vsock:...\"", true
			m.Advice = "set it to what \"p11-kit server\" prints"
			m.Remote = Remote{}
		}
		return
	}
	for _, u := range useless {
		if strings.HasPrefix(name, u.prefix) || strings.HasPrefix(filepath.Base(target), u.prefix) {
			m.Skip, m.Advice = u.reason, u.advice
			m.Broken = u.reason == proxied || u.advice != ""
			return
		}
	}
	if info, err := os.Stat(path); err == nil {
		if exposed := exposure(info, l.UID); exposed != "" {
			l.warn(path, 0, "%s, and thereby decide which code runs here", exposed)
		}
	}
}

// locateRemote finds the client library and the server of a remote module.
func (l *loader) locateRemote(m *Module, s Setting) {
	remote, err := parseRemote(s.Value)
	if err != nil {
		l.warnAt(s, "%v", err)
		m.Skip, m.Broken, m.Advice = err.Error(), true, "put it right in its file"
		return
	}
	m.Remote = remote
	m.Path, err = FindClient(l.ModuleDirs)
	if err != nil {
		m.Skip, m.Broken = err.Error(), true
		return
	}
	if len(remote.Command) > 0 {
		// NewBridge reports this, too, but a program that only reads the configuration
		// makes no Bridge.
		if err := checkSocketDir(cmp.Or(l.SocketDir, os.TempDir())); err != nil {
			l.warnAt(s, "%v", err)
		}
	}
}

// FindClient returns the path of p11-kit-client.so. This library speaks p11-kit's
// protocol with a module in another process. It finds the module at the address in the
// environment variable P11_KIT_SERVER_ADDRESS.
func FindClient(moduleDirs []string) (string, error) {
	path, err := findLibrary(client, moduleDirs)
	if err != nil {
		return "", fmt.Errorf("a remote module needs p11-kit: install the package with %s (Debian: p11-kit-modules, Fedora: p11-kit-server): %w", client, err)
	}
	return path, nil
}

// findLibrary returns the absolute path of a module that this process can load. If the
// path is relative, it returns the first such file in dirs.
func findLibrary(module string, dirs []string) (string, error) {
	candidates := []string{module}
	if !filepath.IsAbs(module) {
		if len(dirs) == 0 {
			return "", fmt.Errorf("%s is looked for in p11-kit's module directory, and there is none", module)
		}
		candidates = nil
		for _, dir := range dirs {
			// The path is not cleaned: x/../y is not y when x is a link.
			candidates = append(candidates, dir+"/"+module)
		}
	}
	var problem error
	for _, path := range candidates {
		err := loadable(path)
		if err == nil {
			return path, nil
		}
		// An error about another architecture tells more than an error about a missing
		// file.
		if problem == nil || errors.Is(problem, os.ErrNotExist) && !errors.Is(err, os.ErrNotExist) {
			problem = fmt.Errorf("%s: %w", path, err)
		}
	}
	return "", problem
}

// loadable returns an error that says why this process cannot load a file as a library.
func loadable(path string) error {
	kind, _, err := elffile.Read(path)
	if err != nil {
		return bare(err)
	}
	if own, known := elffile.Own(); known && own != kind {
		return fmt.Errorf("the library is for another architecture (%v; this program is %v)", kind, own)
	}
	return nil
}
