package main_test

import (
	"maps"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"
)

// A row is one row of the table of rooms in docs/ARCHITECTURE.md.
type row struct {
	dir     string
	imports []string // rooms
}

var (
	inBackticks = regexp.MustCompile("`([^`]+)`")
	everywhere  = []string{"pinentry/secret", "pinentry/plain"} // the page says so once
)

func architecture(t *testing.T) string {
	t.Helper()
	text, err := os.ReadFile(filepath.Join(root, "docs", "ARCHITECTURE.md"))
	if err != nil {
		t.Fatal(err)
	}
	return string(text)
}

// rows reads the table of rooms.
func rows(t *testing.T) (all []row) {
	t.Helper()
	_, table, _ := strings.Cut(architecture(t), "\n## Rooms\n")
	table, _, _ = strings.Cut(table, "\n## ")
	for line := range strings.Lines(table) {
		cells := strings.Split(line, "|")
		if len(cells) < 5 || !strings.HasPrefix(cells[1], " `") {
			continue
		}
		r := row{dir: strings.Trim(cells[1], " `")}
		for _, name := range inBackticks.FindAllStringSubmatch(cells[3], -1) {
			if slices.ContainsFunc(rooms, func(r room) bool { return r.dir == name[1] }) {
				r.imports = append(r.imports, name[1])
			}
		}
		all = append(all, r)
	}
	return all
}

// TestTableOfRooms holds the table of the page to the table of the test.
func TestTableOfRooms(t *testing.T) {
	const planned = "agent/p11kit"
	seen := make(map[string]bool)
	for _, written := range rows(t) {
		if seen[written.dir] {
			t.Errorf("%s has two rows in docs/ARCHITECTURE.md", written.dir)
		}
		seen[written.dir] = true
		i := slices.IndexFunc(rooms, func(r room) bool { return r.dir == written.dir })
		switch {
		case written.dir == planned:
		case i < 0:
			t.Errorf("%s has a row in docs/ARCHITECTURE.md and none in rooms_test.go", written.dir)
		case rooms[i].imports != nil:
			var kept []string
			for _, imported := range rooms[i].imports {
				if slices.ContainsFunc(rooms, func(r room) bool { return r.dir == imported }) && !slices.Contains(everywhere, imported) {
					kept = append(kept, imported)
				}
			}
			page := slices.DeleteFunc(slices.Clone(written.imports), func(dir string) bool { return slices.Contains(everywhere, dir) })
			slices.Sort(kept)
			slices.Sort(page)
			if !slices.Equal(kept, page) {
				t.Errorf("%s may import %q by rooms_test.go, and %q by docs/ARCHITECTURE.md", written.dir, kept, page)
			}
		}
	}
	for i, r := range rooms {
		if !seen[r.dir] {
			t.Errorf("%s has no row in docs/ARCHITECTURE.md", r.dir)
		}
		if slices.ContainsFunc(rooms[:i], func(o room) bool { return o.dir == r.dir }) {
			t.Errorf("%s has two rows in rooms_test.go", r.dir)
		}
	}
}

// mostLines is how many lines a package has at most, without blank lines and tests.
const mostLines = 1500

// large are packages with more lines, how many, and why. docs/ARCHITECTURE.md names each.
var large = map[string]int{
	"agent":           3300, // the keyring: its parts share one lock
	"agent/sshagent":  2500, // one protocol
	"cmd/bench":       2300, // one program
	"pinentry":        2300, // one protocol, and the line prompt
	"token":           3400, // store, token, key and healing share the locks of the store
	"token/module":    3800, // one process, around one library
	"token/tokentest": 3560, // one suite and its fakes
	"token/wire":      2000, // one language
}

// TestSizes keeps packages small. "make sizes" prints more.
func TestSizes(t *testing.T) {
	lines := make(map[string]int)
	_, sources := parse(t)
	for _, s := range sources {
		lines[s.dir] += 0
	}
	for dir := range lines {
		names, err := filepath.Glob(filepath.Join(dir, "*.go"))
		if err != nil {
			t.Fatal(err)
		}
		for _, name := range names {
			if strings.HasSuffix(name, "_test.go") {
				continue
			}
			text, err := os.ReadFile(name)
			if err != nil {
				t.Fatal(err)
			}
			for line := range strings.Lines(string(text)) {
				if strings.TrimSpace(line) != "" {
					lines[dir]++
				}
			}
		}
	}
	page := architecture(t)
	for dir, n := range lines {
		name, err := filepath.Rel(root, dir)
		if err != nil {
			t.Fatal(err)
		}
		most, named := large[name]
		if !named {
			most = mostLines
		}
		if n > most {
			t.Errorf("%s has %d lines, of %d at most: see make sizes", name, n, most)
		}
		if named && n <= mostLines {
			t.Errorf("%s has %d lines: it is not large any more", name, n)
		}
	}
	_, sizes, _ := strings.Cut(page, "\n### Sizes\n")
	sizes, _, _ = strings.Cut(sizes, "\n#")
	for _, name := range slices.Sorted(maps.Keys(large)) {
		if !strings.Contains(sizes, "`"+name+"`") {
			t.Errorf("docs/ARCHITECTURE.md, Sizes, does not say why %s is large", name)
		}
	}
}
