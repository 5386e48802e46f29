package main

import (
	"bytes"
	"cmp"
	"crypto"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"maps"
	"os"
	"path/filepath"
	"reflect"
	"slices"
	"strings"
	"syscall"
	"time"

	"github.com/pelletier/go-toml/v2"
	"golang.org/x/crypto/ssh"

	"p11-agent/agent"
	"p11-agent/agent/request"
	"p11-agent/cmd/p11-agent/exit"
	"p11-agent/cmd/p11-agent/paths"
	"p11-agent/token"
	"p11-agent/token/pkcs11uri"
	"p11-agent/token/registry"
)

// maxConfig is the most bytes that a configuration file may have.
const maxConfig = 1 << 20

// config is the configuration file, p11-agent.toml.
type config struct {
	file string // empty when there is none

	// Keys is nil when absent, which is not the same as empty.
	Keys         *[]uriValue    `toml:"keys"`
	AllowModules []string       `toml:"allow-modules"`
	Pinentry     pinentryConfig `toml:"pinentry"`
	Modules      []moduleConfig `toml:"module"`
	KeyTables    []keyConfig    `toml:"key"`
	SoftwareKeys *bool          `toml:"software-keys"`
	RemoteTokens bool           `toml:"remote-tokens"`
	Certificates string         `toml:"certificates"`
	Upstream     []string       `toml:"upstream"`
	KnownHosts   []string       `toml:"known-hosts"` // nil: ssh's own
	Sockets      []socketConfig `toml:"socket"`
	TouchNotice  noticeValue    `toml:"touch-notice"`
	ForgetOn     forgetValue    `toml:"forget-on"`

	FailureNotice *bool `toml:"failure-notice"`

	RememberKeys  *bool         `toml:"remember-keys"`
	Absent        string        `toml:"absent"`
	InsertTimeout durationValue `toml:"insert-timeout"`

	Confirm        agent.Confirm `toml:"confirm"`
	ConfirmTimeout durationValue `toml:"confirm-timeout"`
	ConfirmPlace   confirmPlace  `toml:"confirm-place"`

	publicKeys []token.PublicKey // those that KeyTables name
}

type pinentryConfig struct {
	Program string `toml:"program"`
	Grab    *bool  `toml:"grab"`
	// MoveAfter is how long a prompt stays with one client while another one waits.
	MoveAfter durationValue `toml:"move-after"`
}

// moduleConfig adds a module, when it has a path, or changes one of the
// registry.
type moduleConfig struct {
	Name    string            `toml:"name"`
	Path    string            `toml:"path"`
	Enabled *bool             `toml:"enabled"`
	Timeout durationValue     `toml:"timeout"`
	Release releaseValue      `toml:"release"`
	Env     map[string]string `toml:"env"`
	Sandbox *bool             `toml:"sandbox"`
	Write   []string          `toml:"write"`
	// InitArgs is handed to C_Initialize: x-init-reserved of pkcs11.conf(5).
	InitArgs string `toml:"init-args"`
}

// keyConfig attaches a name to the keys that a URI matches, and a public half
// to one whose token shows none.
type keyConfig struct {
	URI    *uriValue       `toml:"uri"`
	Name   string          `toml:"name"`
	Public string          `toml:"public-key"` // a file
	Absent string          `toml:"absent"`
	Allow  *[]request.Kind `toml:"allow"` // nil: the usual

	PINCache    string        `toml:"pin-cache"`
	PINIdle     durationValue `toml:"pin-idle"`
	PINMax      durationValue `toml:"pin-max"`
	PINRemember *bool         `toml:"pin-remember"`
	PINReuse    *bool         `toml:"pin-reuse"`
	PINPad      *bool         `toml:"pin-pad"`
	ForgetOn    *forgetValue  `toml:"forget-on"` // nil: what there is for all keys

	Confirm agent.Confirm `toml:"confirm"`
	Rules   []ruleConfig  `toml:"rule"`
}

// What pin-cache may be.
const (
	cacheNever        = "never"
	cacheUntilRemoval = "until-removal"
)

// What absent may be.
const (
	absentOffer = "offer"
	absentHide  = "hide"
)

func checkAbsent(value string) error {
	switch value {
	case "", absentOffer, absentHide:
		return nil
	}
	return fmt.Errorf("absent is %q, and can be %q or %q", value, absentOffer, absentHide)
}

// offerAway tells whether a key is offered while its token is away: what its table
// says, or the whole configuration, or else whether keys names it.
func (c *config) offerAway(k request.Key, named bool) bool {
	if key, ok := k.(*token.Key); ok {
		for _, table := range c.KeyTables {
			if table.Absent != "" && key.Matches(table.URI.URI) {
				return table.Absent == absentOffer
			}
		}
	}
	if c.Absent != "" {
		return c.Absent == absentOffer
	}
	return named
}

// knownKeys is what the agent does with the list of keys that it has seen.
func (c *config) knownKeys(otherwise token.KnownKeys) token.KnownKeys {
	if c.RememberKeys != nil && !*c.RememberKeys {
		return token.KnownIgnored
	}
	return otherwise
}

// policy returns what the tables of keys say about PINs, or nil when none says
// anything. Of how long a login lasts the strictest word counts, of everything
// else the first.
func (c *config) policy() func(*token.Key) token.Policy {
	tables := slices.DeleteFunc(slices.Clone(c.KeyTables), func(k keyConfig) bool { return !k.aboutPIN() })
	if len(tables) == 0 && len(c.ForgetOn) == 0 {
		return nil
	}
	return func(k *token.Key) (p token.Policy) {
		var remember, reuse *bool
		own := false // it has a forget-on of its own
		for _, table := range tables {
			if !k.MayMatch(table.URI.URI) {
				continue
			}
			p.Retention = p.Stricter(token.Retention{
				Never: table.PINCache == cacheNever, Idle: table.PINIdle.Duration, Max: table.PINMax.Duration,
			})
			if !k.Matches(table.URI.URI) {
				continue // only a login shows whether the key is the one that is named
			}
			if table.ForgetOn != nil {
				own = true
				p.Retention = p.Stricter(table.ForgetOn.retention())
			}
			remember, reuse, p.Pad = cmp.Or(remember, table.PINRemember), cmp.Or(reuse, table.PINReuse), cmp.Or(p.Pad, table.PINPad)
		}
		if !own {
			p.Retention = p.Stricter(c.ForgetOn.retention())
		}
		p.Reuse = reuse != nil && *reuse
		p.Remember = p.Reuse || remember != nil && *remember
		return p
	}
}

// allows returns what keys sign besides logins and SSH signatures: what the first
// table says that says anything, or else, for the system, the exchanges of sshd.
func (c *config) allows(system bool) func(request.Key) []request.Kind {
	return func(k request.Key) []request.Kind {
		if key, ok := k.(*token.Key); ok {
			for _, table := range c.KeyTables {
				if table.Allow != nil && key.Matches(table.URI.URI) {
					return *table.Allow
				}
			}
		}
		if system {
			return []request.Kind{request.KindHostKey}
		}
		return nil
	}
}

// checkAllow finds kinds that there are not.
func (k keyConfig) checkAllow() error {
	if k.Allow == nil {
		return nil
	}
	for _, kind := range *k.Allow {
		if !slices.Contains(request.Kinds(), kind) {
			return fmt.Errorf("allow of %v has %q, and can have %q (logins and SSH signatures are always allowed)", k.URI, kind, request.Kinds())
		}
	}
	return nil
}

// aboutPIN tells whether the table has any word about the PIN.
func (k keyConfig) aboutPIN() bool {
	return k.PINCache == cacheNever || k.PINIdle.Duration != 0 || k.PINMax.Duration != 0 ||
		k.PINRemember != nil || k.PINReuse != nil || k.PINPad != nil || k.ForgetOn != nil
}

// checkPIN finds words about the PIN that do not go together.
func (k keyConfig) checkPIN() error {
	yes := func(b *bool) bool { return b != nil && *b }
	switch k.PINCache {
	case "", cacheNever, cacheUntilRemoval:
	default:
		return fmt.Errorf("pin-cache of %v is %q, and can be %q or %q", k.URI, k.PINCache, cacheNever, cacheUntilRemoval)
	}
	switch {
	case (yes(k.PINRemember) || yes(k.PINReuse)) && k.PINCache == cacheNever:
		return fmt.Errorf("%v: pin-remember and pin-reuse keep the PIN, and pin-cache = %q forgets it: one of them has to go", k.URI, cacheNever)
	case (yes(k.PINRemember) || yes(k.PINReuse)) && yes(k.PINPad):
		return fmt.Errorf("%v: a PIN that is typed on the reader (pin-pad) cannot be kept (pin-remember, pin-reuse)", k.URI)
	}
	return nil
}

// socketConfig adds a socket with rules of its own.
type socketConfig struct {
	Name     string      `toml:"name"`
	Path     string      `toml:"path"`
	Keys     *[]uriValue `toml:"keys"`
	Confirm  bool        `toml:"confirm"`
	ReadOnly *bool       `toml:"read-only"` // nil: if it limits something
}

// path returns where the socket is: beside that of an agent which has a directory
// of its own, own, or else in the one that all know.
func (s socketConfig) path(own string) (string, error) {
	if s.Path != "" {
		return s.Path, nil
	}
	if own != "" {
		return filepath.Join(own, s.Name+".sock"), nil
	}
	if path := paths.RuntimeSocket(s.Name); path != "" {
		return path, nil
	}
	return "", errors.New("XDG_RUNTIME_DIR is not set: give the socket a path")
}

// readOnly tells whether keys can only be used there. A socket that shows some keys, or
// has their use confirmed, is for others, who are to change nothing.
func (s socketConfig) readOnly() bool {
	if s.ReadOnly != nil {
		return *s.ReadOnly
	}
	return s.Keys != nil || s.Confirm
}

// rules returns what the keyring is to keep.
func (s socketConfig) rules() *request.Socket {
	return &request.Socket{Name: s.Name, Only: certainly(s.Keys), Confirm: s.Confirm, ReadOnly: s.readOnly()}
}

// uriValue is a PKCS#11 URI in the configuration.
type uriValue struct{ *pkcs11uri.URI }

func (v *uriValue) UnmarshalText(b []byte) (err error) {
	v.URI, err = pkcs11uri.ParseBytes(b)
	return err
}

// durationValue is a length of time, as "30s" or "2m". It is a struct so that a
// number without a unit is an error: TOML would make nanoseconds of it.
type durationValue struct{ time.Duration }

func (v *durationValue) UnmarshalText(b []byte) error {
	d, err := time.ParseDuration(string(b))
	if err != nil || d <= 0 {
		return errors.New(`a length of time is written as "30s" or "2m"`)
	}
	v.Duration = d
	return nil
}

// releaseNever is what release may be besides a length of time.
const releaseNever = "never"

// releaseValue is when a module lets go of its cards: after a length of time, or
// never.
type releaseValue struct {
	after durationValue
	never bool
}

func (v *releaseValue) UnmarshalText(b []byte) error {
	if v.never = string(b) == releaseNever; v.never {
		return nil
	}
	if err := v.after.UnmarshalText(b); err != nil {
		return fmt.Errorf("%w; this one can also be %q", err, releaseNever)
	}
	return nil
}

// apply tells a module.
func (v releaseValue) apply(spec *token.ModuleSpec) {
	switch {
	case v.never:
		spec.Idle = token.ReleaseNever
	case v.after.Duration > 0:
		spec.Release = v.after.Duration
		spec.Idle = min(spec.Release, token.ReleaseIdle)
	}
}

// configError is a mistake in the configuration file, at a place in it.
type configError struct {
	File      string
	Line, Col int // counted from 1; 0: the whole file
	Text      string
	Advice    string
	Err       error // of the file itself
}

func (e *configError) Unwrap() error { return e.Err }

// unreadable is the error for a configuration file that cannot be read.
func unreadable(file string, err error) error {
	e := &configError{File: file, Text: err.Error(), Err: err}
	if p, ok := errors.AsType[*fs.PathError](err); ok {
		e.Text = p.Err.Error()
	}
	if errors.Is(err, fs.ErrNotExist) {
		e.Advice = "without --config the agent reads ~/.config/p11-agent/config.toml, if it is there"
	}
	return e
}

func (e *configError) Error() string {
	if e.Line == 0 {
		return fmt.Sprintf("%s: %s", e.File, e.Text)
	}
	return fmt.Sprintf("%s:%d:%d: %s", e.File, e.Line, e.Col, e.Text)
}

// Hint says what to do about it.
func (e *configError) Hint() string { return e.Advice }

// ExitCode tells that the configuration is wrong.
func (e *configError) ExitCode() int { return exit.CodeUsage }

// loadConfig reads the configuration. file is what --config says; empty: the
// file at its usual place, if there is one.
func loadConfig(file string) (*config, error) {
	optional := file == ""
	if optional {
		file = paths.ConfigFile()
	}
	c := &config{AllowModules: token.DefaultAllowList}
	if file == "" {
		return c, nil
	}
	b, mode, err := readConfig(file)
	if optional && errors.Is(err, fs.ErrNotExist) {
		return c, nil
	}
	if err != nil {
		return nil, err
	}
	defer clear(b) // it may hold a PIN
	c.file = file
	d := toml.NewDecoder(bytes.NewReader(b)).DisallowUnknownFields()
	if err := d.Decode(c); err != nil {
		return nil, explainTOML(file, b, err)
	}
	return c, c.check(mode)
}

// readConfig reads a file that may name programs and libraries to run: nobody
// else may be able to change it.
func readConfig(file string) ([]byte, fs.FileMode, error) {
	f, err := os.OpenFile(file, os.O_RDONLY|syscall.O_NONBLOCK, 0)
	if err != nil {
		return nil, 0, unreadable(file, err)
	}
	defer f.Close()
	st, err := f.Stat()
	if err != nil {
		return nil, 0, unreadable(file, err)
	}
	sys, ok := st.Sys().(*syscall.Stat_t)
	switch {
	case !ok || !st.Mode().IsRegular():
		return nil, 0, &configError{File: file, Text: "the configuration is not a regular file"}
	case sys.Uid != 0 && int(sys.Uid) != os.Geteuid():
		return nil, 0, &configError{
			File: file, Text: fmt.Sprintf("the configuration belongs to user %d", sys.Uid),
			Advice: "only your own files and root's are believed",
		}
	case st.Mode().Perm()&0o022 != 0:
		return nil, 0, &configError{
			File: file, Text: fmt.Sprintf("the configuration can be changed by others (mode %#o)", st.Mode().Perm()),
			Advice: "run: chmod go-w " + file,
		}
	case st.Size() > maxConfig:
		return nil, 0, &configError{File: file, Text: "the configuration is larger than 1 MiB"}
	}
	b := make([]byte, st.Size())
	n, err := f.ReadAt(b, 0)
	if n < len(b) {
		return nil, 0, unreadable(file, err)
	}
	return b, st.Mode(), nil
}

// explainTOML turns the decoder's errors into ours, which quote no value of the file.
// text is the file.
func explainTOML(file string, text []byte, err error) error {
	if strict, ok := errors.AsType[*toml.StrictMissingError](err); ok {
		var all []error
		for _, e := range strict.Errors {
			all = append(all, explainUnknown(file, text, &e))
		}
		return errors.Join(all...)
	}
	if e, ok := errors.AsType[*toml.DecodeError](err); ok {
		line, col := e.Position()
		ce := &configError{File: file, Line: line, Col: col, Text: strings.TrimPrefix(e.Error(), "toml: ")}
		if key := e.Key(); len(key) > 0 && speaksOfGo(ce.Text) {
			ce.Text = fmt.Sprintf("%s has to be %s", strings.Join(key, "."), wanted(key))
		}
		return ce
	}
	return &configError{File: file, Text: err.Error()}
}

// knownKeys returns the keys that the table at path may have.
func knownKeys(t reflect.Type, path []string) []string {
	for t.Kind() == reflect.Pointer || t.Kind() == reflect.Slice {
		t = t.Elem()
	}
	if t.Kind() != reflect.Struct {
		return nil
	}
	var names []string
	for f := range t.Fields() {
		name := f.Tag.Get("toml")
		if name == "" {
			continue
		}
		names = append(names, name)
		if len(path) > 0 && path[0] == name {
			return knownKeys(f.Type, path[1:])
		}
	}
	return names
}

// distance is Levenshtein's.
func distance(a, b string) int {
	row := make([]int, len(b)+1)
	for j := range row {
		row[j] = j
	}
	for i := range len(a) {
		last := row[0]
		row[0] = i + 1
		for j := range len(b) {
			cost := last
			if a[i] != b[j] {
				cost = 1 + min(last, row[j], row[j+1])
			}
			last, row[j+1] = row[j+1], cost
		}
	}
	return row[len(b)]
}

// check finds what the syntax does not show.
func (c *config) check(mode fs.FileMode) error {
	bad := func(format string, args ...any) error {
		return &configError{File: c.file, Text: fmt.Sprintf(format, args...)}
	}
	for _, u := range c.uris() {
		if err := token.CheckPIN(u); err != nil {
			return &configError{
				File: c.file, Text: fmt.Sprintf("the PIN of %v would be tried on any token", u),
				Advice: "add the token attribute to the URI, and the serial attribute where several tokens have one label",
			}
		}
		if u.PIN() != nil && mode.Perm()&0o077 != 0 {
			return &configError{
				File: c.file, Text: fmt.Sprintf("it holds a pin-value and can be read by others (mode %#o)", mode.Perm()),
				Advice: "run: chmod 600 " + c.file + ", or better name a file with pin-source",
			}
		}
		if names := u.Unrecognized(); len(names) > 0 {
			e := &configError{File: c.file, Text: fmt.Sprintf("%v has the unknown attribute %q, so it would match nothing", u, names[0])}
			if s := pkcs11uri.Suggest(names[0]); s != "" {
				e.Advice = fmt.Sprintf("did you mean %q?", s)
			}
			return e
		}
	}
	var wrong []error
	for _, err := range []error{c.TouchNotice.check(), c.ForgetOn.check()} {
		if err != nil {
			wrong = append(wrong, bad("%v", err))
		}
	}
	if len(wrong) > 0 {
		return errors.Join(wrong...)
	}
	for i, k := range c.KeyTables {
		if k.URI == nil {
			return bad("[[key]] table %d has no uri", i+1)
		}
		if err := cmp.Or(k.checkPIN(), checkAbsent(k.Absent), k.checkAllow()); err != nil {
			return bad("%v", err)
		}
		if k.ForgetOn != nil {
			if err := k.ForgetOn.check(); err != nil {
				return bad("%v: %v", k.URI, err)
			}
		}
		if k.Public == "" {
			continue
		}
		pub, err := readPublicKey(k.Public)
		p := token.PublicKey{URI: k.URI.URI, Key: pub}
		if err == nil {
			err = token.CheckPublicKey(p)
		}
		if err != nil {
			return bad("public-key of %v: %v", k.URI, err)
		}
		c.publicKeys = append(c.publicKeys, p)
	}
	if c.Certificates = paths.ExpandHome(c.Certificates); c.Certificates != "" && !filepath.IsAbs(c.Certificates) {
		return bad("certificates: %q is not an absolute path", c.Certificates)
	}
	for i, path := range c.KnownHosts {
		if c.KnownHosts[i] = paths.ExpandHome(path); !filepath.IsAbs(c.KnownHosts[i]) {
			return bad("known-hosts: %q is not an absolute path", path)
		}
	}
	for i, path := range c.Upstream {
		if c.Upstream[i] = paths.ExpandHome(path); !filepath.IsAbs(c.Upstream[i]) {
			return bad("upstream: %q is not an absolute path", path)
		}
	}
	if err := cmp.Or(c.checkSockets(), checkAbsent(c.Absent)); err != nil {
		return bad("%v", err)
	}
	if err := c.checkApproval(); err != nil {
		return asConfigError(c.file, err)
	}
	if p := c.Pinentry.Program; strings.Contains(p, "/") && !filepath.IsAbs(p) {
		return bad("pinentry.program %q is neither an absolute path nor a name", p)
	}
	seen := make(map[string]bool)
	for i, m := range c.Modules {
		switch {
		case m.Name == "" && m.Path == "":
			return bad("[[module]] table %d has neither path nor name", i+1)
		case m.Path != "" && !filepath.IsAbs(m.Path):
			return bad("module path %q is not absolute", m.Path)
		case seen[m.name()]:
			return bad("module %q is configured twice", m.name())
		}
		seen[m.name()] = true
		for j, path := range m.Write {
			if m.Write[j] = paths.ExpandHome(path); !filepath.IsAbs(m.Write[j]) || strings.Contains(path, "\x00") {
				return bad("module %q: write has %q, which is no absolute path", m.name(), path)
			}
		}
		if len(m.Write) > 0 && m.Sandbox != nil && !*m.Sandbox {
			return bad("module %q: without a sandbox everything can be written: one of write and sandbox = false has to go", m.name())
		}
		if strings.Contains(m.InitArgs, "\x00") {
			return bad("module %q: init-args has a NUL", m.name())
		}
		for name := range m.Env {
			if name == "" || strings.ContainsAny(name, "=\x00") {
				return bad("module %q: %q cannot be the name of an environment variable", m.name(), name)
			}
		}
	}
	return nil
}

// checkSockets finds mistakes in the tables of sockets.
func (c *config) checkSockets() error {
	names, taken := make(map[string]bool), make(map[string]bool)
	for i := range c.Sockets {
		s := &c.Sockets[i]
		s.Path = paths.ExpandHome(s.Path)
		switch {
		case s.Name == "":
			return fmt.Errorf("[[socket]] table %d has no name", i+1)
		case strings.ContainsAny(s.Name, "/\x00") || s.Name[0] == '.' || s.Name == "agent":
			return fmt.Errorf("[[socket]]: %q cannot be the name of a socket", s.Name)
		case names[s.Name] || s.Path != "" && taken[s.Path]:
			return fmt.Errorf("[[socket]]: %q is there twice", s.Name)
		case s.Path != "" && !filepath.IsAbs(s.Path):
			return fmt.Errorf("[[socket]]: the path %q is not absolute", s.Path)
		}
		names[s.Name], taken[s.Path] = true, true
	}
	return nil
}

// readPublicKey reads a file such as ssh-keygen writes: one line, of type, base64
// and comment.
func readPublicKey(file string) (crypto.PublicKey, error) {
	file = paths.ExpandHome(file)
	if !filepath.IsAbs(file) {
		return nil, fmt.Errorf("%q is not an absolute path", file)
	}
	f, err := os.OpenFile(file, os.O_RDONLY|syscall.O_NONBLOCK, 0)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	b, err := io.ReadAll(io.LimitReader(f, 64<<10))
	if err != nil {
		return nil, err
	}
	key, _, _, _, err := ssh.ParseAuthorizedKey(b)
	if err != nil {
		return nil, fmt.Errorf("%s is no OpenSSH public key", file)
	}
	if cert, ok := key.(*ssh.Certificate); ok {
		key = cert.Key
	}
	public, ok := key.(ssh.CryptoPublicKey)
	if !ok {
		return nil, fmt.Errorf("%s holds a key of type %s, which no token can sign with", file, key.Type())
	}
	return public.CryptoPublicKey(), nil
}

func (m moduleConfig) name() string { return cmp.Or(m.Name, filepath.Base(m.Path)) }

// confine tells a module's process what the module may do, and the module how to start.
func (m moduleConfig) confine(spec *token.ModuleSpec) {
	spec.InitArgs = cmp.Or(m.InitArgs, spec.InitArgs)
	spec.Unconfined = m.Sandbox != nil && !*m.Sandbox
	spec.Write = m.Write
}

func (m moduleConfig) environ() []string {
	var env []string
	for _, name := range slices.Sorted(maps.Keys(m.Env)) {
		env = append(env, name+"="+m.Env[name])
	}
	return env
}

// serverAddresses returns where p11-kit-client.so is to connect to, by the name of the
// module, as far as the environments of modules say so.
func (c *config) serverAddresses() map[string]string {
	all := make(map[string]string)
	for _, m := range c.Modules {
		all[m.name()] = m.Env[registry.ServerVariable]
	}
	return all
}

// uris returns every URI of the configuration.
func (c *config) uris() []*pkcs11uri.URI {
	var all []*pkcs11uri.URI
	lists := []*[]uriValue{c.Keys}
	for _, s := range c.Sockets {
		lists = append(lists, s.Keys)
	}
	for _, list := range lists {
		if list != nil {
			for _, u := range *list {
				all = append(all, u.URI)
			}
		}
	}
	for _, k := range c.KeyTables {
		if k.URI != nil {
			all = append(all, k.URI.URI)
		}
	}
	return all
}

// sources returns the URIs that say where a PIN comes from.
func (c *config) sources() []*pkcs11uri.URI {
	return slices.DeleteFunc(c.uris(), func(u *pkcs11uri.URI) bool { return u.PIN() == nil && u.PINSource == nil })
}
