package main

import (
	"bytes"
	"encoding"
	"errors"
	"maps"
	"os"
	"os/exec"
	"path/filepath"
	"reflect"
	"regexp"
	"slices"
	"strings"
	"testing"

	"github.com/spf13/cobra"

	"p11-agent/cmd/p11-agent/config"
)

func readDoc(t *testing.T, name string) string {
	t.Helper()
	b, err := os.ReadFile(filepath.Join("..", "..", name))
	if err != nil {
		t.Fatal(err)
	}
	return string(b)
}

// sections returns the sections of a manual, by their headings of both levels.
func sections(manual string) map[string]string {
	all := make(map[string]string)
	headings := regexp.MustCompile(`(?m)^##? (.*)$`)
	at := headings.FindAllStringSubmatchIndex(manual, -1)
	for i, m := range at {
		end := len(manual)
		if i+1 < len(at) {
			end = at[i+1][0]
		}
		all[manual[m[2]:m[3]]] = manual[m[1]:end]
	}
	return all
}

// usageFlag finds the flags in a help text. The help text has no hidden flags.
var usageFlag = regexp.MustCompile(`(?m)^ +(?:-(\w), |    )--([a-z-]+)`)

// manualFlag finds the flags that a section explains.
var manualFlag = regexp.MustCompile(`(?m)^(?:\*-(\w)\*, )?\*--([a-z-]+)\*`)

// Each command has a section in the manual. The section has all flags of the command, and no
// others.
func TestManualHasEveryFlag(t *testing.T) {
	manual := sections(readDoc(t, "docs/p11-agent.1.scd"))
	root := newRootCommand()
	root.InitDefaultCompletionCmd("anything")
	root.InitDefaultVersionFlag()

	flags := 0
	check := func(section string, commands ...*cobra.Command) {
		text, ok := manual[section]
		if !ok {
			t.Errorf("the manual has no section %q", section)
			return
		}
		there := make(map[string]bool)
		for _, c := range commands {
			c.InitDefaultHelpFlag()
			for _, f := range usageFlag.FindAllStringSubmatch(c.LocalFlags().FlagUsages(), -1) {
				if f[2] == "help" && c.HasParent() {
					continue
				}
				flags++
				there[f[2]] = true
				want := "*--" + f[2] + "*"
				if f[1] != "" {
					want = "*-" + f[1] + "*, " + want
				}
				if !strings.Contains(text, "\n"+want) {
					t.Errorf("the manual does not have %s of %q under %q", want, c.CommandPath(), section)
				}
			}
		}
		for _, m := range manualFlag.FindAllStringSubmatch(text, -1) {
			if !there[m[2]] {
				t.Errorf("the manual has --%s under %q, which is no flag", m[2], section)
			}
		}
	}
	check("OPTIONS", root)
	for _, c := range root.Commands() {
		if c.Name() != "help" {
			check(c.Name(), append(c.Commands(), c)...)
		}
	}
	if flags < 15 {
		t.Errorf("only %d flags were looked at", flags)
	}
}

// The help shows each command in a group, and the manual has them in the same order.
func TestManualHasTheOrderOfTheHelp(t *testing.T) {
	manual := readDoc(t, "docs/p11-agent.1.scd")
	var out bytes.Buffer
	root := newRootCommand()
	root.SetOut(&out)
	if err := root.Help(); err != nil {
		t.Fatal(err)
	}
	commands := regexp.MustCompile(`(?m)^  ([a-z]+) {2,}[A-Z][^.\n]*[a-z]$`)
	at := 0
	n := 0
	for _, c := range root.Commands() {
		if c.GroupID == "" || !slices.ContainsFunc(commands.FindAllStringSubmatch(out.String(), -1), func(m []string) bool { return m[1] == c.Name() }) {
			t.Errorf("the help does not have %q in a group, with a line that begins like a sentence and has no full stop:\n%s", c.Name(), &out)
		}
	}
	if strings.Contains(out.String(), "Additional Commands") {
		t.Errorf("the help has commands that are in no group:\n%s", &out)
	}
	for _, m := range commands.FindAllStringSubmatch(out.String(), -1) {
		if m[1] == "help" {
			continue
		}
		n++
		section := strings.Index(manual, "\n## "+m[1]+"\n")
		if section < at {
			t.Errorf("the manual has %q at another place than the help", m[1])
		}
		at = max(at, section)
	}
	if n < 10 {
		t.Errorf("only %d commands were looked at", n)
	}
}

// ruleTable begins a rule in a configuration.
const ruleTable = "[[key]]\nuri = \"pkcs11:id=%01\"\n[[key.rule]]"

// manualKey finds the keys that a section explains.
var manualKey = regexp.MustCompile(`(?m)^\*([a-z-]+)\* = `)

// The manual of the configuration has each key, with a type and a right example. It has no other
// keys.
func TestManualHasEveryKey(t *testing.T) {
	home := t.TempDir() // with the file of an example
	t.Setenv("HOME", home)
	if err := os.CopyFS(filepath.Join(home, ".ssh"), os.DirFS("testdata/ssh")); err != nil {
		t.Fatal(err)
	}
	manual := sections(readDoc(t, "docs/p11-agent.toml.5.scd"))
	keys := 0
	check := func(section, table string, r reflect.Type) {
		text, ok := manual[section]
		if !ok {
			t.Errorf("the manual has no section %q", section)
			return
		}
		explained := make(map[string]string)
		at := manualKey.FindAllStringSubmatchIndex(text, -1)
		for i, m := range at {
			end := len(text)
			if i+1 < len(at) {
				end = at[i+1][0]
			}
			explained[text[m[2]:m[3]]] = text[m[0]:end]
		}
		for _, key := range config.KnownKeys(r, nil) {
			about, ok := explained[key]
			delete(explained, key)
			if isTable(r, key) {
				continue // the key has its own section
			}
			keys++
			example := regexp.MustCompile(`(?m)^Example: _(.*)_$`).FindStringSubmatch(about)
			if !ok || !strings.Contains(about, "\n\tType: ") || example == nil {
				t.Errorf("the manual does not have the key %q under %q, with its type and an example", key, section)
				continue
			}
			toml := table + "\n" + strings.ReplaceAll(example[1], `\*`, "*") + "\n"
			if !strings.HasPrefix(example[1], key+" = ") {
				t.Errorf("the example of %q is about something else: %s", key, toml)
			}
			if table == "[[module]]" && key != "path" && key != "name" {
				toml += "name = \"other\"\n"
			}
			if table == "[[socket]]" && key != "name" {
				toml += "name = \"other\"\n"
			}
			if table == "[[key]]" && key != "uri" {
				toml += "uri = \"pkcs11:id=%01\"\n"
			}
			if table == ruleTable && key != "confirm" {
				toml += "confirm = \"always\"\n"
			}
			parses(t, toml)
		}
		for key := range explained {
			t.Errorf("the manual has the key %q under %q, and the program has no such key", key, section)
		}
	}
	check("SELECTION", "", reflect.TypeFor[config.File]())
	tables := map[string]reflect.Type{
		"pinentry": reflect.TypeFor[config.PinentryTable](),
		"module":   reflect.TypeFor[config.ModuleTable](),
		"key":      reflect.TypeFor[config.KeyTable](),
		"socket":   reflect.TypeFor[config.SocketTable](),
	}
	for _, name := range config.KnownKeys(reflect.TypeFor[config.File](), nil) {
		switch {
		case !isTable(reflect.TypeFor[config.File](), name):
		case name == "pinentry":
			check("[pinentry]", "[pinentry]", tables[name])
		case tables[name] != nil:
			check("[["+name+"]]", "[["+name+"]]", tables[name])
		default:
			t.Errorf("no test looks whether the manual has the keys of %q", name)
		}
	}
	check("[[key.rule]]", ruleTable, reflect.TypeFor[config.RuleTable]())
	if keys < 10 {
		t.Errorf("only %d keys were looked at", keys)
	}
}

// isTable reports whether the value of a key is a table or an array of tables.
func isTable(r reflect.Type, key string) bool {
	for f := range r.Fields() {
		if f.Tag.Get("toml") != key {
			continue
		}
		t := f.Type
		for t.Kind() == reflect.Pointer || t.Kind() == reflect.Slice {
			t = t.Elem()
		}
		return t.Kind() == reflect.Struct && !reflect.PointerTo(t).Implements(reflect.TypeFor[encoding.TextUnmarshaler]())
	}
	return false
}

// parses fails the test if a text is not a configuration.
func parses(t *testing.T, text string) {
	t.Helper()
	file := filepath.Join(t.TempDir(), "config.toml")
	if err := os.WriteFile(file, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := config.Load(file); err != nil {
		t.Errorf("%v, in:\n%s", err, text)
	}
}

// scdoc builds the manuals without a warning.
func TestManualsAreBuilt(t *testing.T) {
	scdoc, err := exec.LookPath("scdoc")
	if err != nil {
		if os.Getenv("CI") == "true" {
			t.Fatal("scdoc is not installed")
		}
		t.Skip("scdoc is not installed")
	}
	pages, err := filepath.Glob("../../docs/*.scd")
	if err != nil || len(pages) != 2 {
		t.Fatalf("manuals: %q, %v", pages, err)
	}
	for _, page := range pages {
		b, err := os.ReadFile(page)
		if err != nil {
			t.Fatal(err)
		}
		cmd := exec.Command(scdoc)
		cmd.Stdin = bytes.NewReader(b)
		var out, complaints bytes.Buffer
		cmd.Stdout, cmd.Stderr = &out, &complaints
		if err := cmd.Run(); err != nil || complaints.Len() > 0 || !bytes.Contains(out.Bytes(), []byte(".TH")) {
			t.Errorf("%s: %v\n%s", page, err, &complaints)
		}
	}
}

// The whole configurations in the guide and in the manual are right.
func TestExamplesAreConfigurations(t *testing.T) {
	blocks := regexp.MustCompile("(?s)\n```\n(.*?)\n```").FindAllStringSubmatch(readDoc(t, "docs/p11-agent.toml.5.scd"), -1)
	if len(blocks) != 2 {
		t.Errorf("%d examples in the manual", len(blocks))
	}
	for _, b := range blocks {
		parses(t, b[1])
	}
	n := 0
	for block := range strings.SplitSeq(readDoc(t, "docs/GUIDE.md"), "\n\n") {
		if strings.HasPrefix(block, "    keys = ") || strings.HasPrefix(block, "    confirm = ") || strings.HasPrefix(block, "    [") {
			n++
			parses(t, regexp.MustCompile(`(?m)^ {4}`).ReplaceAllString(block, ""))
		}
	}
	if n < 3 {
		t.Errorf("only %d examples in the guide", n)
	}
}

// pagesForPeople are documents that name commands, flags and keys of the configuration. The
// manuals are not in the list.
var pagesForPeople = []string{"README.md", "CHANGELOG.md", "docs/GUIDE.md", "docs/RECIPES.md", "docs/SECURITY.md", "docs/CARDS.md"}

// findCommand returns the command of a command line, or an error.
func findCommand(line string) (c *cobra.Command, args []string, err error) {
	root := newRootCommand()
	root.InitDefaultCompletionCmd("anything")
	c, args, err = root.Find(strings.Fields(strings.NewReplacer("'", "", `"`, "").Replace(line)))
	if err == nil && c == root {
		err = errors.New("it has no command")
	}
	return c, args, err
}

// Command lines of p11-agent in documents have only commands, flags and arguments that p11-agent
// accepts.
func TestCommandLinesAreRight(t *testing.T) {
	readme := readDoc(t, "README.md")
	for _, command := range []string{"make demo", "make check"} {
		if !strings.Contains(readme, "\n    "+command+" ") {
			t.Errorf("the README does not show %q", command)
		}
	}
	line := regexp.MustCompile(`(?m)^(?: {4}|\t)(?:.*[ (/])?p11-agent ([^#>&|)\n+]+)`)
	span := regexp.MustCompile("`p11-agent ([^`>&|]+)`")
	seen := make(map[string]bool)
	for _, name := range append(pagesForPeople, "docs/p11-agent.1.scd", "docs/p11-agent.toml.5.scd") {
		text := readDoc(t, name)
		for _, m := range slices.Concat(line.FindAllStringSubmatch(text, -1), span.FindAllStringSubmatch(text, -1)) {
			if strings.HasSuffix(name, ".scd") && strings.ContainsAny(m[1], "*_") {
				continue // prose of a manual
			}
			if strings.TrimSpace(m[1]) == "" {
				continue // a unit of systemd
			}
			c, args, err := findCommand(m[1])
			if err != nil {
				t.Errorf("%s: p11-agent %s: %v", name, m[1], err)
				continue
			}
			seen[c.Name()] = true
			if err := c.ParseFlags(args); err != nil {
				t.Errorf("%s: p11-agent %s: %v", name, m[1], err)
			} else if err := c.ValidateArgs(c.Flags().Args()); err != nil && strings.HasPrefix(m[0], " ") {
				t.Errorf("%s: p11-agent %s: %v", name, m[1], err)
			}
		}
	}
	if got, want := slices.Sorted(maps.Keys(seen)), []string{"agent", "check", "demo", "doctor", "export", "generate", "install", "list", "login", "logout", "setup", "status", "uninstall"}; !slices.Equal(got, want) {
		t.Errorf("command lines show %q, want %q", got, want)
	}
}

// notOurs are words of documents that look like flags and keys of p11-agent, but belong to other
// programs.
var notOurs = []string{
	"pcsc-shared", "known-keys", "pin-source", "pin-value", "go-seccomp-bpf", "opensc-pkcs11", "host-key", "ssh-agent", "ssh-add", "sc-hsm-tool",
	"pkcs11-tool", "tpm2-abrmd", "tpm2-pkcs11", "ssh-keygen", "--protect", "git-config", "ssh-tpm-keygen",
}

// Each word that documents use as a flag, a key or a table of the configuration exists. Each value
// that documents give to a key is a valid value.
func TestWordsOfDocumentsAreRight(t *testing.T) {
	keys, tables := make(map[string]bool), make(map[string]bool)
	for table, r := range map[string]reflect.Type{
		"": reflect.TypeFor[config.File](), "[[module]]": reflect.TypeFor[config.ModuleTable](), "[[key]]": reflect.TypeFor[config.KeyTable](),
		"[[key.rule]]": reflect.TypeFor[config.RuleTable](), "[[socket]]": reflect.TypeFor[config.SocketTable](), "[pinentry]": reflect.TypeFor[config.PinentryTable](),
	} {
		tables[table] = true
		for _, key := range config.KnownKeys(r, nil) {
			keys[key] = true
		}
	}
	isFlag := func(word string) bool {
		name, ok := strings.CutPrefix(word, "--")
		return ok && slices.ContainsFunc(append(newRootCommand().Commands(), newRootCommand()), func(c *cobra.Command) bool {
			c.InitDefaultHelpFlag()
			return c.Flags().Lookup(name) != nil || c.PersistentFlags().Lookup(name) != nil
		})
	}
	// The tables that a key may be in, with the other keys that the tables need.
	starts := []string{
		"", "[[key]]\n", "[[key]]\nuri = \"pkcs11:id=%01\"\n", "[[module]]\nname = \"other\"\n", "[[socket]]\nname = \"other\"\n",
		ruleTable + "\n", ruleTable + "\nconfirm = \"always\"\n",
	}
	isSet := regexp.MustCompile(`^([a-z-]+) = (.*)$`)
	isWord := regexp.MustCompile(`^(--)?[a-z]+(-[a-z]+)+$|^--[a-z]+$`)
	seen := 0
	for _, name := range pagesForPeople {
		text := regexp.MustCompile(`(?m)^ {4}.*$`).ReplaceAllString(readDoc(t, name), "")
		for _, m := range regexp.MustCompile("`([^`]+)`").FindAllStringSubmatch(text, -1) {
			word := strings.NewReplacer("\n", " ", "...", "").Replace(m[1])
			switch set := isSet.FindStringSubmatch(word); {
			case set != nil:
				seen++
				ok := false
				for _, start := range starts {
					file := filepath.Join(t.TempDir(), "config.toml")
					if err := os.WriteFile(file, []byte(start+word+"\n"), 0o600); err != nil {
						t.Fatal(err)
					}
					_, err := config.Load(file)
					ok = ok || err == nil
				}
				if !ok {
					t.Errorf("%s: %s is right in no table of the configuration", name, word)
				}
			case strings.HasPrefix(word, "["):
				seen++
				if !tables[word] {
					t.Errorf("%s: the configuration has no table %s", name, word)
				}
			case isWord.MatchString(word) && !slices.Contains(notOurs, word):
				seen++
				if !keys[word] && !isFlag(word) {
					t.Errorf("%s: %q is neither a flag nor a key of the configuration", name, word)
				}
			}
		}
	}
	if seen < 50 {
		t.Errorf("only %d words were looked at", seen)
	}
}

// All configurations of the recipes are right, also those that no other test uses.
func TestRecipesAreConfigurations(t *testing.T) {
	n := 0
	for title, blocks := range recipes(t) {
		for _, b := range blocks {
			if strings.HasSuffix(b.file, ".toml") {
				n++
				parses(t, b.text)
			} else if b.file == "" && strings.Contains(b.text, " = [") {
				t.Errorf("%q has a configuration without the name of its file:\n%s", title, b.text)
			}
		}
	}
	if n < 6 {
		t.Errorf("only %d configurations in the recipes", n)
	}
}

// slug returns the anchor of a heading, as GitHub makes it.
func slug(heading string) string {
	return strings.ReplaceAll(regexp.MustCompile(`[^a-z0-9_ -]`).ReplaceAllString(strings.ToLower(heading), ""), " ", "-")
}

// Each link of a document leads to a file and a heading of the tree. Pictures are small.
func TestLinksLeadSomewhere(t *testing.T) {
	names, err := filepath.Glob("../../docs/*.md")
	if err != nil {
		t.Fatal(err)
	}
	links := 0
	for _, name := range append(names, "../../README.md") {
		for _, m := range regexp.MustCompile(`\]\(([^)#:]*)(?:#([^)]+))?\)`).FindAllStringSubmatch(readDoc(t, strings.TrimPrefix(name, "../../")), -1) {
			links++
			target := name
			if m[1] != "" {
				target = filepath.Join(filepath.Dir(name), m[1])
			}
			info, err := os.Stat(target)
			if err != nil {
				t.Errorf("%s: %v", name, err)
				continue
			}
			if strings.Contains(target, "/pictures/") && info.Size() > 60_000 {
				t.Errorf("%s has %d bytes, 60,000 at most", target, info.Size())
			}
			if m[2] == "" {
				continue
			}
			found := false
			for _, heading := range regexp.MustCompile(`(?m)^#+ (.*)$`).FindAllStringSubmatch(readDoc(t, strings.TrimPrefix(target, "../../")), -1) {
				found = found || slug(heading[1]) == m[2]
			}
			if !found {
				t.Errorf("%s: %s has no heading for the anchor %q", name, target, m[2])
			}
		}
	}
	if links < 15 {
		t.Errorf("only %d links were followed", links)
	}
}
