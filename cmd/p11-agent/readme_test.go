package main

import (
	"os"
	"regexp"
	"strings"
	"testing"
)

// readmeBlocks returns the lines of the README that are to be typed, by the titles of
// its sections.
func readmeBlocks(t *testing.T) map[string][]string {
	t.Helper()
	all := make(map[string][]string)
	title := ""
	for line := range strings.Lines(readDoc(t, "README.md")) {
		line = strings.TrimRight(line, "\n")
		if text, ok := strings.CutPrefix(line, "## "); ok {
			title = text
		}
		if text, ok := strings.CutPrefix(line, "    "); ok {
			all[title] = append(all[title], regexp.MustCompile(`\s+#.*`).ReplaceAllString(text, ""))
		}
	}
	return all
}

// A new user types the README, on a fresh system, in a terminal. From zero to the first
// login that is four commands and one PIN.
func TestReadme(t *testing.T) {
	buildAgent(t) // so that the user's build has little to do
	f := startFresh(t, os.DirFS(source(t, "p11-agent")))
	f.run("cd p11-agent")
	blocks := readmeBlocks(t)
	first := blocks["From nothing to the first login"]
	if len(first) == 0 || len(first) > 4 || first[len(first)-1] != "ssh host" {
		t.Fatalf("the README leads to the first login by %q, which is to be four commands that end with ssh host", first)
	}
	pins := 0
	for _, line := range first {
		switch line {
		case "p11-agent setup":
			f.begin(line)
			pins += f.setUp()
			if out, status := f.end(); status != 0 {
				t.Fatalf("setup ended with %d:\n%s", status, out)
			}
		case "ssh host":
			f.begin(line)
			f.answer(`^ready [0-9]+ after 0> ssh host\n(.*\n)*`, "echo $((40 + 2)) is at the host; exit")
			if out, status := f.end(); status != 0 || !strings.Contains(out, "\n42 is at the host\n") || strings.Contains(out, "PIN") {
				t.Fatalf("the login ended with %d:\n%s", status, out)
			}
		default:
			f.run(line)
		}
	}
	if pins > 1 {
		t.Errorf("%d PINs were typed up to the first login", pins)
	}
	t.Logf("%d commands and %d PIN up to the first login", len(first), pins)
}

// setUp answers the questions of setup, and returns how many PINs it typed.
func (f *freshSystem) setUp() (pins int) {
	f.t.Helper()
	const yes = `  Do this\? \[Y/n\]$`
	f.see(`  Which one\? \[1\]$`)
	f.answer(`  Which one\? \[1\]`, f.number(`make a token and a key in files`))
	f.answer(`^The agent\n.*\n.*\n`+yes, "")
	f.hidden(`  New PIN:`, storyPIN)
	pins++
	f.hidden(`  The same again, or Enter if you are sure of it:`, "")
	f.answer(`^ssh\n.*\n.*\n`+yes, "")
	f.answer(`copy it with ssh-copy-id to this host \(Enter: neither\):`, "host")
	f.hidden(`person@host's password:`, f.host)
	f.see(`git config --global user.email you@example.org$`)
	return pins
}
