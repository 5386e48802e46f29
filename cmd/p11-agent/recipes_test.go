package main

import (
	"fmt"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"testing"

	"github.com/rogpeppe/go-internal/testscript"
)

// A recipeBlock is a block of code of docs/RECIPES.md: the lines of a file, or lines to type.
type recipeBlock struct {
	file string // begins with "~/" or "/"; empty for lines to type
	text string
}

// recipeFile is the first line of a block that is a file.
var recipeFile = regexp.MustCompile(`^# ((?:~|/etc)/[^ \n]+)\n`)

// recipes returns the blocks of docs/RECIPES.md in order, by the title of their section. Blocks
// before the first section have the title "".
func recipes(t testing.TB) map[string][]recipeBlock {
	t.Helper()
	b, err := os.ReadFile(filepath.Join("..", "..", "docs", "RECIPES.md"))
	if err != nil {
		t.Fatal(err)
	}
	all := make(map[string][]recipeBlock)
	title := ""
	for paragraph := range strings.SplitSeq(string(b), "\n\n") {
		if t, ok := strings.CutPrefix(paragraph, "## "); ok {
			title = t
			continue
		}
		if !strings.HasPrefix(paragraph, "    ") {
			continue
		}
		text := strings.TrimRight(regexp.MustCompile(`(?m)^ {4}`).ReplaceAllString(paragraph, ""), "\n") + "\n"
		block := recipeBlock{text: text}
		switch m := recipeFile.FindStringSubmatch(text); {
		case m != nil:
			block.file = m[1]
		case strings.HasPrefix(text, "["):
			block.file = "~/.config/p11-agent/config.toml" // the content shows which file it is
		}
		all[title] = append(all[title], block)
	}
	return all
}

// elsewhere matches the commands that the tests do not type. Their packages are installed, or their
// device is missing, or they would change the machine.
var elsewhere = regexp.MustCompile(`(?m)^(sudo (apt|usermod|systemctl)|ykman|nitropy|sc-hsm-tool) .*\n`)

// writeRecipe writes the blocks of a section into files, for a script that runs them in order.
// DIR/N.sh has lines to type. DIR/N.text has the text of a file, and DIR/N.file has its name.
func writeRecipe(t testing.TB, title, dir string) {
	t.Helper()
	blocks := recipes(t)[title]
	if len(blocks) == 0 {
		t.Fatalf("docs/RECIPES.md has no section %q with something to type", title)
	}
	if err := os.MkdirAll(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	for i, b := range blocks {
		files := map[string]string{"sh": elsewhere.ReplaceAllString(b.text, "")}
		if b.file != "" {
			files = map[string]string{"text": b.text, "file": b.file + "\n"}
		}
		for kind, text := range files {
			if err := os.WriteFile(filepath.Join(dir, fmt.Sprintf("%d.%s", i+1, kind)), []byte(text), 0o644); err != nil {
				t.Fatal(err)
			}
		}
	}
}

// writeRecipes writes several sections into directories of dir. titles maps the names of the
// directories to the sections.
func writeRecipes(t testing.TB, dir string, titles map[string]string) {
	t.Helper()
	for name, title := range titles {
		writeRecipe(t, title, filepath.Join(dir, name))
	}
}

// A new user can type the recipes in a terminal, with a pinentry in the terminal, under a real user
// manager, and with a login to a real sshd.
func TestRecipes(t *testing.T) {
	needPrivileges(t, "softhsm2-util", "ssh", "ssh-add", "ssh-keygen", "sshd", "git", "tmux", "pinentry-curses", "pgrep")
	blocks := t.TempDir()
	writeRecipes(t, blocks, map[string]string{
		"first": "", "softhsm": "SoftHSM", "git": "git", "forwarding": "Forwarding", "ci": "CI and other machines without people",
	})
	if out := userManagerWith(t, blocks, "recipes.sh", storyPIN); !strings.HasSuffix(out, "== all is well\n") {
		t.Errorf("the script did not get to its end:\n%s", out)
	}
}

// A test runs each section of the page, or elsewhere names the commands that no test runs. Other
// sections have only commands of p11-agent and ssh-add.
func TestEveryRecipeIsRun(t *testing.T) {
	run := []string{"", "SoftHSM", "git", "Forwarding", "CI and other machines without people", "Host keys of sshd", "A TPM"}
	all := recipes(t)
	for _, title := range run {
		if len(all[title]) == 0 {
			t.Errorf("docs/RECIPES.md has no section %q any more", title)
		}
		delete(all, title)
	}
	if len(all) == 0 {
		t.Error("no section is left to be looked at")
	}
	ours := regexp.MustCompile(`^(p11-agent|ssh-add) `)
	for title, blocks := range all {
		for _, b := range blocks {
			if b.file != "" {
				continue
			}
			for line := range strings.Lines(elsewhere.ReplaceAllString(b.text, "")) {
				if !ours.MatchString(line) {
					t.Errorf("no script runs the line of %q: %s", title, line)
				}
			}
		}
	}
}

// writeRecipeForStory is the command recipe. It writes the blocks of a section into files of a
// directory, like writeRecipe.
func writeRecipeForStory(ts *testscript.TestScript, neg bool, args []string) {
	noNegation(ts, neg, len(args) == 2, "recipe SECTION DIR")
	writeRecipe(storyOf(ts).t, args[0], ts.MkAbs(args[1]))
}
