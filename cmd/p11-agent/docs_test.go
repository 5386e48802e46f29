package main

import (
	"bytes"
	"os"
	"os/exec"
	"path/filepath"
	"reflect"
	"regexp"
	"strings"
	"testing"

	"github.com/spf13/cobra"
)

func readDoc(t *testing.T, name string) string {
	t.Helper()
	b, err := os.ReadFile(filepath.Join("..", "..", name))
	if err != nil {
		t.Fatal(err)
	}
	return string(b)
}

// Every command and every flag is in the manual.
func TestManualHasEveryFlag(t *testing.T) {
	manual := readDoc(t, "docs/p11-agent.1.scd")
	flag := regexp.MustCompile(`(?m)^ +(?:-(\w), |    )--([a-z-]+)`)
	flags := 0
	var look func(c *cobra.Command)
	look = func(c *cobra.Command) {
		c.InitDefaultHelpFlag()
		if c.HasParent() && !c.Parent().HasParent() && c.Name() != "help" && !strings.Contains(manual, "\n## "+c.Name()+"\n") {
			t.Errorf("the manual does not have the command %q", c.Name())
		}
		for _, f := range flag.FindAllStringSubmatch(c.Flags().FlagUsages()+c.PersistentFlags().FlagUsages(), -1) {
			flags++
			want := "*--" + f[2] + "*"
			if f[1] != "" {
				want = "*-" + f[1] + "*, " + want
			}
			if !strings.Contains(manual, want) {
				t.Errorf("the manual does not have %s of %q", want, c.CommandPath())
			}
		}
		for _, sub := range c.Commands() {
			look(sub)
		}
	}
	root := newRootCommand()
	root.InitDefaultCompletionCmd()
	root.InitDefaultVersionFlag()
	look(root)
	if flags < 12 {
		t.Errorf("only %d flags were looked at", flags)
	}
}

// Every key of the configuration is in its manual.
func TestManualHasEveryKey(t *testing.T) {
	manual := readDoc(t, "docs/p11-agent.toml.5.scd")
	keys := 0
	var look func(r reflect.Type)
	look = func(r reflect.Type) {
		for r.Kind() == reflect.Pointer || r.Kind() == reflect.Slice {
			r = r.Elem()
		}
		if r.Kind() != reflect.Struct {
			return
		}
		for f := range r.Fields() {
			name := f.Tag.Get("toml")
			if name == "" {
				continue
			}
			keys++
			if !strings.Contains(manual, "*"+name+"* =") && !strings.Contains(manual, "["+name+"]") {
				t.Errorf("the manual does not have the key %q", name)
			}
			look(f.Type)
		}
	}
	look(reflect.TypeFor[config]())
	if keys < 10 {
		t.Errorf("only %d keys were looked at", keys)
	}
}

// The manuals are built without a complaint.
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
		if out, err := cmd.CombinedOutput(); err != nil || !bytes.Contains(out, []byte(".TH")) {
			t.Errorf("%s: %v\n%s", page, err, out)
		}
	}
}

// What README and manual give as configuration is one.
func TestExamplesAreConfigurations(t *testing.T) {
	blocks := regexp.MustCompile("(?s)\n```\n(.*?)\n```").FindAllStringSubmatch(readDoc(t, "docs/p11-agent.toml.5.scd"), -1)
	examples := map[string]string{}
	for _, b := range blocks {
		examples["the manual"] = b[1]
	}
	if len(blocks) != 1 {
		t.Errorf("%d examples in the manual", len(blocks))
	}
	readme := readDoc(t, "README.md")
	for _, block := range strings.Split(readme, "\n\n") {
		if strings.HasPrefix(block, "    keys = ") || strings.HasPrefix(block, "    [[") {
			examples[block] = regexp.MustCompile(`(?m)^ {4}`).ReplaceAllString(block, "")
		}
	}
	if len(examples) < 4 {
		t.Errorf("only %d examples", len(examples))
	}
	for name, text := range examples {
		file := filepath.Join(t.TempDir(), "config.toml")
		if err := os.WriteFile(file, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
		if _, err := loadConfig(file); err != nil {
			t.Errorf("%s: %v", name, err)
		}
	}
	for _, command := range []string{"make demo", "make check"} {
		if !strings.Contains(readme, command) {
			t.Errorf("the README does not show %q", command)
		}
	}
}
