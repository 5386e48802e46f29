package main_test

import (
	"fmt"
	"go/ast"
	"go/token"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"testing"
)

// The tests of this file keep the English of the project plain: a sentence names the
// thing that acts, then the verb, then the object.

// A turn is a turn of phrase that makes a sentence hard to read.
type turn struct {
	*regexp.Regexp
	better string
}

// turns lists the turns that documents, comments and messages must not have.
var turns = []turn{
	{regexp.MustCompile(`(?i)\bnobody\b`), `name the thing: "no client", "no prompt"`},
	{regexp.MustCompile(`(?i)\bsomebody\b`), `name the person or program`},
	{regexp.MustCompile(`(?i)\bwh(o|om|at|ich)ever\b`), `"each client that", "any program that"`},
	{regexp.MustCompile(`(?i)\b(that|which|this|it) is none\b`), `"is not a fingerprint hash"`},
	{regexp.MustCompile(`(?i)\bhas had\b`), `use the present tense`},
	{regexp.MustCompile(`(^|[.:;] |\n)Who [a-z]`), `"A client that"`},
	{regexp.MustCompile(`(?i)\bwho (asks|waits|comes|types|uses|connects)\b`), `"the client that asks"`},
	{regexp.MustCompile(`(?i)\bit is [a-z]+ (who|that asks)\b`), `name the thing that acts first`},
	{regexp.MustCompile(`(?i)\bthat one\b`), `say the name of the thing again`},
	{regexp.MustCompile(`(?i)\bof its own accord\b`), `"by itself"`},
	{regexp.MustCompile(`(?i)\bnothing but\b`), `"only"`},
}

// permitted lists the places where a turn may stay, with the reason.
var permitted = []struct{ file, text, reason string }{
	{"cmd/p11-agent/plain_test.go", "", "it lists the turns"},
	{"token/module/library.go", "whatever debug.SetTraceback says", "a preamble of cgo, which is C"},
}

// words are a part of the tree's text.
type words struct {
	file string
	line int
	text string
}

func (w words) String() string { return w.file + ":" + strconv.Itoa(w.line) }

// comments returns the comments of all Go files, and their string literals except
// those of tests.
func comments(t *testing.T) (all []words) {
	fset, sources := parse(t)
	for _, s := range sources {
		name, err := filepath.Rel(root, fset.Position(s.file.Package).Filename)
		if err != nil {
			t.Fatal(err)
		}
		for _, group := range s.file.Comments {
			all = append(all, words{name, fset.Position(group.Pos()).Line, group.Text()})
		}
		if strings.HasSuffix(name, "_test.go") {
			continue
		}
		ast.Inspect(s.file, func(n ast.Node) bool {
			literal, ok := n.(*ast.BasicLit)
			if !ok || literal.Kind != token.STRING {
				return true
			}
			if text, err := strconv.Unquote(literal.Value); err == nil {
				all = append(all, words{name, fset.Position(literal.Pos()).Line, text})
			}
			return true
		})
	}
	return all
}

// documents returns the paragraphs of the documents in plain text: no blocks of code,
// and no tables.
func documents(t *testing.T) (all []words) {
	t.Helper()
	names, err := filepath.Glob(filepath.Join(root, "docs", "*"))
	if err != nil {
		t.Fatal(err)
	}
	for _, name := range append(names, filepath.Join(root, "README.md")) {
		if ext := filepath.Ext(name); ext != ".md" && ext != ".scd" {
			continue
		}
		text, err := os.ReadFile(name)
		if err != nil {
			t.Fatal(err)
		}
		short, err := filepath.Rel(root, name)
		if err != nil {
			t.Fatal(err)
		}
		all = append(all, paragraphs(short, string(text))...)
	}
	return all
}

var (
	fence     = regexp.MustCompile("^\\s*```")
	otherLine = regexp.MustCompile(`^\s*([|#<]|\[[|<>\-]|[<>\-\]|]\s)|^\s*$|^\t*\[`) // tables, headings, HTML, blanks
	listItem  = regexp.MustCompile(`^\s*([-*+]|[0-9]+\.)\s+`)
)

// paragraphs returns the paragraphs of a document in Markdown or for scdoc. An item of
// a list is a paragraph.
func paragraphs(file, text string) (all []words) {
	var now words
	end := func() {
		if now.text != "" {
			all = append(all, now)
		}
		now = words{}
	}
	code := false
	for n, line := range strings.Split(text, "\n") {
		if fence.MatchString(line) {
			code = !code
			end()
			continue
		}
		if code {
			continue
		}
		if strings.HasSuffix(file, ".md") && now.text == "" && strings.HasPrefix(line, "    ") {
			continue // a block of code
		}
		item := listItem.MatchString(line)
		if item || otherLine.MatchString(line) {
			end()
			if !item {
				continue
			}
			line = listItem.ReplaceAllString(line, "")
		}
		if now.text == "" {
			now = words{file: file, line: n + 1}
		} else {
			now.text += " "
		}
		now.text += strings.TrimSuffix(strings.TrimSpace(line), "++")
		if strings.HasSuffix(line, "++") { // scdoc breaks the line here
			end()
		}
	}
	end()
	return all
}

// stories returns the comments of the stories and scripts in testdata. Lines without another
// line between them are one comment.
func stories(t *testing.T) (all []words) {
	t.Helper()
	var names []string
	for _, pattern := range []string{"testdata/*/*.txtar", "testdata/*/*.sh"} {
		found, err := filepath.Glob(pattern)
		if err != nil {
			t.Fatal(err)
		}
		names = append(names, found...)
	}
	for _, name := range names {
		text, err := os.ReadFile(name)
		if err != nil {
			t.Fatal(err)
		}
		open := false
		for n, line := range strings.Split(string(text), "\n") {
			comment, ok := strings.CutPrefix(line, "# ")
			switch {
			case ok && open:
				all[len(all)-1].text += "\n" + comment
			case ok:
				all = append(all, words{filepath.Join("cmd/p11-agent", name), n + 1, comment})
			}
			open = ok
		}
	}
	return all
}

// judge fails a test for the findings in each directory.
func judge(t *testing.T, findings map[string][]string) {
	t.Helper()
	for dir, all := range findings {
		t.Errorf("%s:\n%s", dir, strings.Join(all, "\n"))
	}
}

func isPermitted(w words) bool {
	for _, p := range permitted {
		if p.file == w.file && strings.Contains(w.text, p.text) {
			return true
		}
	}
	return false
}

func TestPlainTurns(t *testing.T) {
	all := slices.Concat(comments(t), documents(t), stories(t))
	findings := make(map[string][]string)
	for _, w := range all {
		if isPermitted(w) {
			continue
		}
		for _, turn := range turns {
			if found := turn.FindString(w.text); found != "" {
				dir := filepath.Dir(w.file)
				findings[dir] = append(findings[dir], fmt.Sprintf("%v: %q: %s", w, strings.TrimSpace(found), turn.better))
			}
		}
	}
	judge(t, findings)
	for _, p := range permitted {
		if !slices.ContainsFunc(all, func(w words) bool { return w.file == p.file && strings.Contains(w.text, p.text) }) {
			t.Errorf("%s: the exception for %q is not needed", p.file, p.text)
		}
	}
}

// vague matches the beginnings that no error may have.
var vague = regexp.MustCompile(`^(it|that|this|they) (is|are|was|were|has|have|does|did|cannot|may)\b`)

// TestPlainErrors reads the first arguments of errors.New and fmt.Errorf.
func TestPlainErrors(t *testing.T) {
	fset, sources := parse(t)
	findings := make(map[string][]string)
	for _, s := range sources {
		name, err := filepath.Rel(root, fset.Position(s.file.Package).Filename)
		if err != nil {
			t.Fatal(err)
		}
		if strings.HasSuffix(name, "_test.go") {
			continue
		}
		ast.Inspect(s.file, func(n ast.Node) bool {
			call, ok := n.(*ast.CallExpr)
			if !ok || len(call.Args) == 0 {
				return true
			}
			fun, ok := call.Fun.(*ast.SelectorExpr)
			if !ok || fun.Sel.Name != "Errorf" && fun.Sel.Name != "New" {
				return true
			}
			literal, ok := call.Args[0].(*ast.BasicLit)
			if !ok {
				return true
			}
			if text, err := strconv.Unquote(literal.Value); err == nil && vague.MatchString(text) {
				dir := filepath.Dir(name)
				findings[dir] = append(findings[dir], fmt.Sprintf("%s:%d: %q: name the thing that failed", name, fset.Position(call.Pos()).Line, text))
			}
			return true
		})
	}
	judge(t, findings)
}

// mostWords is the most words in a sentence of README, guide and manuals.
const mostWords = 25

var (
	sentenceEnd = regexp.MustCompile(`[.!?:;]["')*_]*(\s|$)`)
	abbreviated = strings.NewReplacer("e.g.", "eg", "i.e.", "ie", "vs.", "vs")
	wordless    = regexp.MustCompile(`^[^\pL\pN]+$`)
)

// sentences returns the sentences of a paragraph. A colon or a semicolon ends one, too.
func sentences(text string) []string { return sentenceEnd.Split(abbreviated.Replace(text), -1) }

var (
	code    = regexp.MustCompile("`[^`]*`")
	address = regexp.MustCompile(`\]\([^)]*\)`)
	// marked is text that a manual sets in bold or underlined.
	marked = regexp.MustCompile(`_[^_]+_|\*[^*]+\*`)
)

// countWords counts the words of a sentence. Text in backticks counts as one word. The
// address of a link, and marked text, count as none.
func countWords(sentence string) (n int) {
	sentence = code.ReplaceAllString(sentence, "code")
	sentence = address.ReplaceAllString(sentence, "]")
	sentence = marked.ReplaceAllString(sentence, "*")
	for _, word := range strings.Fields(sentence) {
		if !wordless.MatchString(word) {
			n++
		}
	}
	return n
}

func TestPlainSentences(t *testing.T) {
	findings := make(map[string][]string)
	for _, w := range documents(t) {
		if w.file != "README.md" && w.file != "docs/GUIDE.md" && filepath.Ext(w.file) != ".scd" {
			continue
		}
		for _, sentence := range sentences(w.text) {
			if n := countWords(sentence); n > mostWords {
				dir := filepath.Dir(w.file)
				findings[dir] = append(findings[dir], fmt.Sprintf("%v: a sentence of %d words, of %d at most: %s", w, n, mostWords, sentence))
			}
		}
	}
	judge(t, findings)
}

// TestPlainNotices breaks each rule, and expects a finding.
func TestPlainNotices(t *testing.T) {
	const text = "# A heading that is none\n\nOne sentence. Another one:\nwith `code that is long` in it.\n\n- an item\n  of two lines\n\n```\ncode. nobody\n```\n| a | table |\n"
	var got []string
	for _, w := range paragraphs("f", text) {
		got = append(got, fmt.Sprint(w, " ", w.text))
	}
	want := []string{"f:3 One sentence. Another one: with `code that is long` in it.", "f:6 an item of two lines"}
	if !slices.Equal(got, want) {
		t.Errorf("got %q, want %q", got, want)
	}
	if n := countWords("With `three words here` and [a link](https://example.org/a) - there"); n != 6 {
		t.Errorf("got %d words", n)
	}
	for _, bad := range []string{"Nobody knows.", "This is so for whoever asks.", "It fails. Who asks waits.", "a hash that is none"} {
		if !slices.ContainsFunc(turns, func(t turn) bool { return t.MatchString(bad) }) {
			t.Errorf("%q passes", bad)
		}
	}
	if !vague.MatchString("it is another user") || vague.MatchString("the client is another user") {
		t.Error("errors that begin with a pronoun")
	}
}
