// Package registry reads p11-kit's configuration. It tells which PKCS#11 modules this
// machine and this user have, and in which order. It also tells which of them are of use
// to an agent for private keys. The package does not need an installed p11-kit, except
// for modules that p11-kit reaches (remote:).
//
// The rules are those of pkcs11.conf(5) and, where the page is silent, of p11-kit 0.24.1.
// The tests compare with that version. Modules are sorted by falling priority, then by
// name. If several directories have a file of the same name, the settings of the user's
// file come first. Then come the settings in /etc/pkcs11/modules, then those in
// /usr/share/p11-kit/modules. If p11-kit complains about the name of a file, the package
// reads the file and warns, as p11-kit does.
//
// The package differs from p11-kit on purpose:
//
//   - If a file cannot be read or parsed, the package leaves out only that file. If a
//     directory cannot be listed, it leaves out only that directory. In both cases
//     p11-kit offers no module at all. If user-config cannot be read, the package does
//     not use the user's configuration.
//   - A critical module that fails to load stops no other module. Module.Critical tells
//     the caller which modules are critical.
//   - If several entries have the same library and the same x-init-reserved, the package
//     uses the first in the order above. p11-kit uses any of them. If entries differ in
//     x-init-reserved, the package uses all of them, each in its own process. p11-kit
//     uses one of them.
//   - If two files in one directory have the same module name, the alphabetically first
//     file comes first. In p11-kit any of them does. Only bad file names make this
//     possible.
//   - The package lists modules without private keys, but marks them to be skipped. It
//     does the same for p11-kit's own modules that lead back to configured modules. It
//     also skips p11-kit-client.so, unless server-address or P11_KIT_SERVER_ADDRESS names
//     its server.
//   - The package refuses files with a zero byte, files above 64 KiB and special files.
//   - A relative path in XDG_CONFIG_HOME or HOME turns the user's configuration off. It
//     does not depend on the current directory.
//   - A priority beyond 32 bits is the highest or lowest priority. A blank
//     x-init-reserved counts as absent.
//   - managed and log-calls mean nothing here, because every module has its own process
//     with one caller. So the package uses a remote module with "managed: no"; p11-kit
//     leaves it out.
//   - The package does not expand $LIB and similar words in paths. dlopen(3) would expand
//     them.
//   - The command of "remote: |command" may have several blanks between its words. It may
//     not have an unclosed quote.
//
// The package reads files and starts nothing, except that Bridge runs the command of a
// remote module.
package registry

import (
	"cmp"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"log/slog"
	"maps"
	"math"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
)

// Program is the agent's name in enable-in and disable-in.
const Program = "p11-agent"

// Options tell Load what to read, and for which program.
type Options struct {
	Dirs
	// Program is the name that Load looks for in enable-in and disable-in.
	Program string
	// ServerAddresses are the addresses of single modules, by module name. They replace
	// Dirs.ServerAddress.
	ServerAddresses map[string]string
	// SocketDir is the directory for the sockets of bridges, as in BridgeOptions.Dir.
	// Load warns about each remote command whose socket cannot be made there.
	SocketDir string
	// Log takes debug lines about the files that Load reads and the settings that it
	// ignores. nil turns the log off.
	Log *slog.Logger
}

// Result holds the configuration that Load has read. Load does not change it later.
type Result struct {
	// Modules are all configured modules in p11-kit's order, including those to be
	// skipped.
	Modules []Module
	// Warnings are for an administrator, who can act on them.
	Warnings []Warning
	// NoUser says why Load did not use the user's own configuration. Otherwise it is
	// empty.
	NoUser string
}

// A Module is one configured PKCS#11 module.
type Module struct {
	// Name is the file's name without ".module".
	Name string
	// Files are the files that the settings come from, the most important file first.
	Files []string
	// Path is the absolute path of the library to load. For a remote module this is
	// p11-kit-client.so. Path is empty when there is no library.
	Path string
	// Remote tells how to reach a module that is not local.
	Remote Remote
	// Priority orders modules: the highest comes first.
	Priority int
	// Critical is set when the configuration requires that the module works.
	Critical bool
	// InitArgs is for pReserved of C_Initialize (x-init-reserved). Pass it as a
	// zero-terminated string, or pass a null pointer when it is empty.
	InitArgs string
	// Skip says why the module is not to be started. It is empty for a module to start.
	Skip string
	// Broken is set when Skip is the result of a mistake, and no other module offers the
	// tokens of this module. An administrator has to correct its configuration.
	Broken bool
	// Advice says how to correct the configuration. It is empty when the only remedy is
	// to install the library.
	Advice string
	// Settings are all settings of the module, known and unknown.
	Settings map[string]Setting
}

// A Setting is a value and its place in a file.
type Setting struct {
	Value string
	File  string
	Line  int // counted from 1
}

// A Warning describes a probable mistake in the configuration.
type Warning struct {
	File string // or directory; empty for the environment
	Line int    // counted from 1; 0 is for the whole file
	Text string
}

// String returns the warning in the form of a compiler's warning.
func (w Warning) String() string {
	switch {
	case w.File == "":
		return w.Text
	case w.Line == 0:
		return fmt.Sprintf("%s: %s", w.File, w.Text)
	}
	return fmt.Sprintf("%s:%d: %s", w.File, w.Line, w.Text)
}

// Load reads the configuration. It always returns all that it could read. Any goroutine
// may call it at any time.
func Load(o Options) Result {
	if o.Log == nil {
		o.Log = slog.New(slog.DiscardHandler)
	}
	l := &loader{Options: o, drafts: map[string]*draft{}}
	mode := l.userConfig()
	if mode != userNone {
		l.directory(o.User)
	}
	if mode != userOnly {
		l.directory(o.Admin)
		l.directory(o.System)
	}
	return Result{Modules: l.modules(), Warnings: l.warnings, NoUser: l.noUser}
}

// userMode tells how the loader uses the user's configuration.
type userMode int

const (
	userNone userMode = iota
	userMerge
	userOnly
)

// A loader holds the state of one Load.
type loader struct {
	Options
	drafts   map[string]*draft // by module name
	warnings []Warning
	noUser   string
}

// A draft is a module while the loader still reads its files.
type draft struct {
	files    []string
	settings map[string]Setting
}

func (l *loader) warn(file string, line int, format string, args ...any) {
	l.warnings = append(l.warnings, Warning{file, line, fmt.Sprintf(format, args...)})
}

// warnAt adds a warning about a setting, with the setting's place.
func (l *loader) warnAt(s Setting, format string, args ...any) {
	l.warn(s.File, s.Line, format, args...)
}

// userConfig reads the global configuration and decides whether the user's own counts.
// The system's configuration may forbid it, and the user's own may turn it off.
func (l *loader) userConfig() userMode {
	mode, err := l.global(l.GlobalConf, userMerge)
	if err != nil && !missing(err) {
		l.noUser = "it is unknown whether " + l.GlobalConf + " allows it"
		return userNone
	}
	if mode == userNone {
		l.noUser = l.GlobalConf + " says user-config: none"
		return userNone
	}
	if l.NoUser != "" {
		l.noUser = l.NoUser
		if l.NoUserMistake {
			l.warn("", 0, "the user's own modules are not used: %s", l.NoUser)
		}
		return userNone
	}
	mode, err = l.global(l.UserConf, mode)
	// The system may keep a confined program out of the user's directories. Then p11-kit
	// uses the system's setting, too.
	if err != nil && !missing(err) && !errors.Is(err, fs.ErrPermission) {
		l.noUser = "it is unknown whether " + l.UserConf + " allows it"
		return userNone
	}
	if mode == userNone {
		l.noUser = l.UserConf + " says user-config: none"
	}
	return mode
}

// global reads user-config from a global configuration file. Without the setting, or
// without the file, the mode is preset. If the file exists but cannot be used, global has
// already warned.
func (l *loader) global(path string, preset userMode) (userMode, error) {
	fields, err := l.read(path)
	if err != nil {
		return preset, err
	}
	setting, ok := fields["user-config"]
	if !ok {
		return preset, nil
	}
	switch setting.Value {
	case "none":
		return userNone, nil
	case "merge":
		return userMerge, nil
	case "only", "override": // the second is not in the manual
		return userOnly, nil
	}
	err = fmt.Errorf("user-config must be none, merge or only, not %q", setting.Value)
	l.warnAt(setting, "%v", err)
	return preset, err
}

// read reads a file into settings. It warns about mistakes in the file, but not about a
// missing file.
func (l *loader) read(path string) (map[string]Setting, error) {
	fields, exposed, err := readConf(path, l.UID)
	if missing(err) {
		return nil, err
	}
	if exposed != "" {
		l.warn(path, 0, "%s, and thereby decide which code runs here", exposed)
	}
	if err != nil {
		if e, ok := errors.AsType[*syntaxError](err); ok {
			l.warn(path, e.line, "%s; the file is not used", e.text)
		} else {
			l.warn(path, 0, "the file cannot be used: %v", err)
		}
		return nil, err
	}
	l.Log.Debug("read PKCS#11 configuration", "file", path)
	settings := make(map[string]Setting, len(fields))
	for _, f := range fields {
		settings[f.name] = Setting{f.value, path, f.line}
	}
	return settings, nil
}

// directory reads the modules of one directory. Settings from a more important directory
// stay.
func (l *loader) directory(path string) {
	names, err := l.list(path)
	if err != nil {
		if !missing(err) {
			l.warn(path, 0, "the directory cannot be used: %v", err)
		}
		return
	}
	for _, name := range names {
		file := filepath.Join(path, name)
		info, err := os.Stat(file)
		if err == nil && info.IsDir() {
			l.Log.Debug("directory among PKCS#11 modules passed over", "directory", file)
			continue
		}
		module, ok := moduleName(name)
		if !ok {
			l.warn(file, 0, "names of module files are letters, digits, _, - and ., begin with a letter or a digit and end in .module; other files will be ignored by future versions of p11-kit: rename it, or remove it")
		}
		settings, err := l.read(file)
		if err != nil {
			if missing(err) {
				l.warn(file, 0, "the file cannot be used: %v", err)
			}
			continue
		}
		d := l.drafts[module]
		if d == nil {
			d = &draft{settings: map[string]Setting{}}
			l.drafts[module] = d
		}
		d.files = append(d.files, file)
		for key, setting := range settings {
			if _, ok := d.settings[key]; !ok {
				d.settings[key] = setting
			}
		}
	}
}

// list returns the sorted names in a directory.
func (l *loader) list(path string) ([]string, error) {
	// With O_DIRECTORY, the open does not block on a named pipe.
	dir, err := os.OpenFile(path, os.O_RDONLY|syscall.O_DIRECTORY, 0)
	if err != nil {
		return nil, bare(err)
	}
	defer dir.Close()
	if info, err := dir.Stat(); err == nil {
		if exposed := exposure(info, l.UID); exposed != "" {
			l.warn(path, 0, "%s, and thereby decide which code runs here", exposed)
		}
	}
	names, err := dir.Readdirnames(maxFiles + 1)
	if len(names) > maxFiles {
		return nil, fmt.Errorf("more than %d files", maxFiles)
	}
	if err != nil && !errors.Is(err, io.EOF) {
		return nil, bare(err)
	}
	slices.Sort(names)
	return names, nil
}

// moduleName returns the name of the module that the file configures. If pkcs11.conf(5)
// does not allow the name of the file, moduleName returns the whole name and false.
func moduleName(file string) (name string, ok bool) {
	for i := range len(file) {
		c := file[i]
		alnum := c >= '0' && c <= '9' || c >= 'a' && c <= 'z' || c >= 'A' && c <= 'Z'
		if !alnum && (i == 0 || !strings.ContainsRune("_-.", rune(c))) {
			return file, false
		}
	}
	return strings.CutSuffix(file, ".module")
}

// modules turns the drafts into modules.
func (l *loader) modules() []Module {
	var modules []Module
	for _, name := range slices.Sorted(maps.Keys(l.drafts)) {
		modules = append(modules, l.module(name, l.drafts[name]))
	}
	slices.SortStableFunc(modules, func(a, b Module) int {
		return cmp.Or(-cmp.Compare(a.Priority, b.Priority), cmp.Compare(a.Name, b.Name))
	})
	skipDuplicates(modules)
	for _, m := range modules {
		if m.Skip != "" {
			l.Log.Debug("PKCS#11 module skipped", "module", m.Name, "reason", m.Skip)
		}
	}
	return modules
}

// known holds the settings of pkcs11.conf(5) and those of newer versions.
var known = []string{
	"module", "remote", "server-address", "enable-in", "disable-in", "priority", "critical",
	"trust-policy", "x-init-reserved",
}

func (l *loader) module(name string, d *draft) Module {
	for _, key := range slices.Sorted(maps.Keys(d.settings)) {
		if !slices.Contains(known, key) {
			s := d.settings[key]
			l.Log.Debug("setting of a PKCS#11 module ignored", "setting", key, "file", s.File, "line", s.Line)
		}
	}
	m := Module{
		Name:     name,
		Files:    d.files,
		Priority: l.priority(d.settings),
		Critical: l.boolean(d.settings, "critical"),
		InitArgs: d.settings["x-init-reserved"].Value,
		Settings: d.settings,
	}
	trust := l.boolean(d.settings, "trust-policy")
	enabled := l.enabled(d.settings)
	l.locate(&m)
	switch {
	case !enabled:
		m.Broken, m.Advice = false, ""
		m.Skip = fmt.Sprintf("enable-in or disable-in keeps it from %s", l.Program)
	case trust && m.Skip != "":
		m.Broken, m.Advice = false, "" // no user expects its keys here
	case trust:
		m.Skip = "it is a source of trust (trust-policy: yes), not of private keys"
	}
	return m
}

// enabled tells whether enable-in and disable-in allow the program to use a module.
func (l *loader) enabled(settings map[string]Setting) bool {
	enable, only := settings["enable-in"]
	disable, not := settings["disable-in"]
	if only && not {
		l.warnAt(disable, "disable-in has no effect beside enable-in")
	}
	switch {
	case only:
		return listed(enable.Value, l.Program)
	case not:
		return !listed(disable.Value, l.Program)
	}
	return true
}

// listed tells whether a list, separated by commas or white space, holds a word.
func listed(list, word string) bool {
	return slices.Contains(strings.FieldsFunc(list, func(r rune) bool {
		return r == ',' || strings.ContainsRune(space, r)
	}), word)
}

// boolean reads a setting that is yes or no. Any other value means no.
func (l *loader) boolean(settings map[string]Setting, key string) bool {
	s, ok := settings[key]
	if ok && s.Value != "yes" && s.Value != "no" {
		l.warnAt(s, "%s must be yes or no: taken as no", key)
	}
	return s.Value == "yes"
}

// priority reads a number as atoi(3) does. atoi uses the digits at the start of a wrong
// value, and so does priority, but priority also warns.
func (l *loader) priority(settings map[string]Setting) int {
	s, ok := settings["priority"]
	if !ok {
		return 0
	}
	end := 0
	for end < len(s.Value) && (s.Value[end] >= '0' && s.Value[end] <= '9' || end == 0 && strings.ContainsRune("+-", rune(s.Value[0]))) {
		end++
	}
	n, err := strconv.ParseInt(s.Value[:end], 10, 64)
	if errors.Is(err, strconv.ErrSyntax) {
		n = 0
	}
	// ParseInt returns the nearest number that fits, and so does priority.
	nearest := min(max(n, math.MinInt32), math.MaxInt32)
	if err != nil || end != len(s.Value) || nearest != n {
		l.warnAt(s, "priority must be a whole number of at most 32 bits: taken as %d", nearest)
	}
	return int(nearest)
}

// skipDuplicates marks every module that is the same as an earlier one.
func skipDuplicates(modules []Module) {
	type seen struct {
		info     fs.FileInfo
		initArgs string
		name     string
	}
	var first []seen
	for i := range modules {
		m := &modules[i]
		if m.Skip != "" || m.Remote.isSet() {
			continue
		}
		info, err := os.Stat(m.Path)
		if err != nil {
			continue // removed a moment ago: loading it will report that
		}
		same := slices.IndexFunc(first, func(s seen) bool {
			return s.initArgs == m.InitArgs && os.SameFile(s.info, info)
		})
		if same >= 0 {
			m.Skip = fmt.Sprintf("it is the same library as module %q", first[same].name)
			continue
		}
		first = append(first, seen{info, m.InitArgs, m.Name})
	}
}

// missing tells whether an error means that a file does not exist.
func missing(err error) bool {
	return errors.Is(err, fs.ErrNotExist) || errors.Is(err, syscall.ENOTDIR)
}
