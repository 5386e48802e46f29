// Package registry reads p11-kit's configuration: which PKCS#11 modules this
// machine and this user have, in which order, and which of them are of use to
// an agent for private keys. It needs no p11-kit to be installed, except for
// modules that are reached through one (remote:).
//
// The rules are those of pkcs11.conf(5) and, where the page is silent, of
// p11-kit 0.24.1, with which the tests compare. Modules are sorted by falling
// priority, then by name. A file of the user's comes before one of the same
// name in /etc/pkcs11/modules, and that before one in
// /usr/share/p11-kit/modules, setting by setting. Names of files that p11-kit
// complains about are read all the same, with a warning, as it does.
//
// It differs from p11-kit on purpose:
//
//   - A file that cannot be read or parsed costs that file, and a directory that
//     cannot be listed that directory; p11-kit then offers no module at all.
//     When it is unknown what user-config says, the user's configuration is not
//     used.
//   - A critical module that cannot be loaded takes no other with it: whoever
//     starts the modules is told which are critical.
//   - Of several entries for the same library and the same x-init-reserved, the
//     first in the order above is used; in p11-kit it is any. Entries that
//     differ in x-init-reserved are all used, each in a process of its own; in
//     p11-kit one of them is.
//   - Of two files in one directory with the same module name (only possible
//     with bad file names), the alphabetically first comes first; in p11-kit it
//     is any.
//   - Modules without private keys, and p11-kit's own modules that would lead
//     back to modules we have already, are listed but marked to be skipped. So is
//     p11-kit-client.so, unless server-address or P11_KIT_SERVER_ADDRESS names its
//     server.
//   - Files with a zero byte, files above 64 KiB and special files are refused.
//   - Relative paths in XDG_CONFIG_HOME or HOME switch the user's configuration
//     off instead of depending on the current directory.
//   - A priority beyond 32 bits is the highest or lowest there is. A blank
//     x-init-reserved is none.
//   - managed and log-calls mean nothing here: every module has a process of
//     its own with one caller. So a remote module with "managed: no" is used;
//     p11-kit leaves it out.
//   - $LIB and its kin are not expanded in paths (dlopen(3) would do so).
//   - The command of "remote: |command" may have several blanks between its
//     words, and may not have an unclosed quote.
//
// It reads files and starts nothing, except for Bridge, which runs the command
// of a remote module.
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

// Program is the name that enable-in and disable-in know the agent by.
const Program = "p11-agent"

// Options tell Load what to read, and for whom.
type Options struct {
	Dirs
	// Program is looked for in enable-in and disable-in.
	Program string
	// ServerAddresses are those of single modules, by name, instead of
	// Dirs.ServerAddress.
	ServerAddresses map[string]string
	// SocketDir is where bridges are to make their sockets, as BridgeOptions.Dir:
	// there is a warning for each remote command that can have none.
	SocketDir string
	// Log takes debug lines: what was read, and settings that mean nothing to
	// us. nil is for none.
	Log *slog.Logger
}

// Result is what the configuration says. It is a value: nobody changes it later.
type Result struct {
	// Modules are all that are configured, in p11-kit's order, those to be
	// skipped too.
	Modules []Module
	// Warnings are for an administrator to act on.
	Warnings []Warning
	// NoUser says why the user's own configuration was not used, or is empty.
	NoUser string
}

// A Module is one configured PKCS#11 module.
type Module struct {
	// Name is the file's name without ".module".
	Name string
	// Files are those the settings come from, the most important first.
	Files []string
	// Path is the absolute path of the library to load: for a remote module
	// that of p11-kit-client.so. It is empty when there is none.
	Path string
	// Remote tells how to reach the module when it is not local.
	Remote Remote
	// Priority orders modules: the highest comes first.
	Priority int
	// Critical is set when the configuration demands that the module work.
	Critical bool
	// InitArgs is to be C_Initialize's pReserved, a zero-terminated string,
	// or a null pointer when it is empty (x-init-reserved).
	InitArgs string
	// Skip says why the module is not to be started, or is empty when it is.
	Skip string
	// Broken is set where nobody can have meant it to be skipped, and its tokens are
	// not there through another module: its configuration has to be put right.
	Broken bool
	// Advice says how, where it is not to install the library.
	Advice string
	// Settings are all of the module's, known and unknown.
	Settings map[string]Setting
}

// A Setting is a value and where it was found.
type Setting struct {
	Value string
	File  string
	Line  int // counted from 1
}

// A Warning is something about the configuration that is probably not as it was
// meant to be.
type Warning struct {
	File string // or directory; empty for the environment
	Line int    // counted from 1; 0 is for the whole file
	Text string
}

// String returns the warning as compilers print theirs.
func (w Warning) String() string {
	switch {
	case w.File == "":
		return w.Text
	case w.Line == 0:
		return fmt.Sprintf("%s: %s", w.File, w.Text)
	}
	return fmt.Sprintf("%s:%d: %s", w.File, w.Line, w.Text)
}

// Load reads the configuration. It always comes back with what could be read.
// It may be called at any time, from any goroutine.
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

// userMode is what is done with the user's configuration.
type userMode int

const (
	userNone userMode = iota
	userMerge
	userOnly
)

// A loader is one Load under way.
type loader struct {
	Options
	drafts   map[string]*draft // by module name
	warnings []Warning
	noUser   string
}

// A draft is a module whose files are still being read.
type draft struct {
	files    []string
	settings map[string]Setting
}

func (l *loader) warn(file string, line int, format string, args ...any) {
	l.warnings = append(l.warnings, Warning{file, line, fmt.Sprintf(format, args...)})
}

// warnAt warns about a setting, at its place.
func (l *loader) warnAt(s Setting, format string, args ...any) {
	l.warn(s.File, s.Line, format, args...)
}

// userConfig reads the global configuration and decides whether the user's own
// counts. The system's may forbid it, and the user's own may turn it off again.
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
	// Confined programs may be kept out of the user's directories: p11-kit
	// goes on with the system's word, too.
	if err != nil && !missing(err) && !errors.Is(err, fs.ErrPermission) {
		l.noUser = "it is unknown whether " + l.UserConf + " allows it"
		return userNone
	}
	if mode == userNone {
		l.noUser = l.UserConf + " says user-config: none"
	}
	return mode
}

// global reads user-config from a global configuration file. Without the
// setting, or the file, the mode is preset; a file that is not missing and yet
// cannot be used has been warned about.
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

// read reads a file into settings, warning about what is wrong with it unless
// it is missing.
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

// directory reads the modules of one directory. What is known already, from a
// more important one, stays.
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
			l.warn(file, 0, "names of module files are letters, digits, _, - and ., begin with a letter or a digit and end in .module; other files will be ignored by future versions of p11-kit: rename it, or remove it when it is none")
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

// list returns the names in a directory, sorted.
func (l *loader) list(path string) ([]string, error) {
	// O_DIRECTORY: a named pipe in its place must not hold us up.
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

// moduleName returns the name of the module that a file of this name
// configures. Files with other names than pkcs11.conf(5) allows keep theirs
// whole.
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

// modules makes modules of the drafts.
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

// known are the settings of pkcs11.conf(5) and those of newer versions.
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
		m.Broken, m.Advice = false, "" // nobody misses it here
	case trust:
		m.Skip = "it is a source of trust (trust-policy: yes), not of private keys"
	}
	return m
}

// enabled tells whether enable-in and disable-in let the program have a module.
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

// boolean reads a setting that is yes or no, and no when it is anything else.
func (l *loader) boolean(settings map[string]Setting, key string) bool {
	s, ok := settings[key]
	if ok && s.Value != "yes" && s.Value != "no" {
		l.warnAt(s, "%s must be yes or no: taken as no", key)
	}
	return s.Value == "yes"
}

// priority reads a number as atoi(3) does, which makes the best of what it is
// given, but says so.
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
	// ParseInt gives the nearest number it can hold, and so do we.
	nearest := min(max(n, math.MinInt32), math.MaxInt32)
	if err != nil || end != len(s.Value) || nearest != n {
		l.warnAt(s, "priority must be a whole number of at most 32 bits: taken as %d", nearest)
	}
	return int(nearest)
}

// skipDuplicates marks every module but the first of those that are the same.
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
			continue // gone since a moment ago: loading it will say so
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

// missing tells whether an error says that a file is not there.
func missing(err error) bool {
	return errors.Is(err, fs.ErrNotExist) || errors.Is(err, syscall.ENOTDIR)
}
