// Command sizes prints what the packages of a Go module hold: lines of code and
// tests, exported names, the share of comments, and how the files of a package lean
// on each other.
//
// It counts the module in the directory that is its argument. A file leans on another
// file of its package when it uses a name that the other file declares. The last
// column counts the arrows between files, and how many of them run back: these are
// the fewest arrows found whose removal leaves an order in which a reader can take
// the files.
package main

import (
	"errors"
	"fmt"
	"go/ast"
	"go/scanner"
	"go/token"
	"go/types"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"text/tabwriter"

	"golang.org/x/tools/go/packages"
)

func main() {
	if err := run(os.Args[1:]); err != nil {
		fmt.Fprintln(os.Stderr, "sizes:", err)
		os.Exit(1)
	}
}

func run(args []string) error {
	if len(args) != 1 {
		return errors.New("name the directory of one module")
	}
	all, err := packages.Load(&packages.Config{
		Dir:  args[0],
		Mode: packages.NeedName | packages.NeedFiles | packages.NeedSyntax | packages.NeedTypes | packages.NeedTypesInfo | packages.NeedImports | packages.NeedDeps,
	}, "./...")
	if err != nil {
		return fmt.Errorf("load the packages: %w", err)
	}
	if n := packages.PrintErrors(all); n > 0 {
		return fmt.Errorf("%d errors in the packages", n)
	}
	out := tabwriter.NewWriter(os.Stdout, 0, 0, 2, ' ', tabwriter.AlignRight)
	fmt.Fprintln(out, "lines\ttests\texported\tcomments\tarrows\tback\t  package\t")
	slices.SortFunc(all, func(a, b *packages.Package) int { return strings.Compare(a.PkgPath, b.PkgPath) })
	var sum size
	for _, p := range all {
		s, err := measure(p)
		if err != nil {
			return err
		}
		sum.add(s)
		s.print(out, p.PkgPath)
	}
	sum.print(out, "together")
	return out.Flush()
}

// A size is what one package holds.
type size struct {
	lines, tests    int // without blank lines
	comments        int // lines, among the first ones
	exported        int // functions, methods, types, variables and constants
	arrows, against int // between files
}

func (s *size) add(o size) {
	s.lines, s.tests, s.comments = s.lines+o.lines, s.tests+o.tests, s.comments+o.comments
	s.exported, s.arrows, s.against = s.exported+o.exported, s.arrows+o.arrows, s.against+o.against
}

func (s size) print(out *tabwriter.Writer, name string) {
	fmt.Fprintf(out, "%d\t%d\t%d\t%d %%\t%d\t%d\t  %s\t\n", s.lines, s.tests, s.exported, 100*s.comments/max(s.lines, 1), s.arrows, s.against, name)
}

// measure counts the files of a package, its tests as well.
func measure(p *packages.Package) (s size, err error) {
	if len(p.GoFiles) == 0 {
		return s, nil
	}
	names, err := filepath.Glob(filepath.Join(filepath.Dir(p.GoFiles[0]), "*.go"))
	if err != nil {
		return s, err
	}
	for _, name := range names {
		text, err := os.ReadFile(name)
		if err != nil {
			return s, err
		}
		lines, comments := count(text)
		if strings.HasSuffix(name, "_test.go") {
			s.tests += lines
			continue
		}
		s.lines += lines
		s.comments += comments
	}
	s.exported = exported(p.Types)
	arrows := lean(p)
	for _, to := range arrows {
		s.arrows += len(to)
	}
	s.against = back(arrows)
	return s, nil
}

// count returns how many lines of a file are not blank, and how many of these hold
// only a comment.
func count(text []byte) (lines, comments int) {
	var s scanner.Scanner
	fset := token.NewFileSet()
	file := fset.AddFile("", fset.Base(), len(text))
	s.Init(file, text, nil, scanner.ScanComments)
	code, comment := make(map[int]bool), make(map[int]bool)
	for {
		pos, tok, literal := s.Scan()
		if tok == token.EOF {
			break
		}
		if tok == token.SEMICOLON && literal == "\n" {
			continue
		}
		on := code
		if tok == token.COMMENT {
			on = comment
		}
		first := file.Line(pos)
		for n := range strings.Count(literal, "\n") + 1 {
			on[first+n] = true
		}
	}
	for line := range comment {
		if !code[line] {
			comments++
		}
	}
	return len(code) + comments, comments
}

// exported counts the exported names of a package and the exported methods of its
// exported types.
func exported(p *types.Package) (n int) {
	for _, name := range p.Scope().Names() {
		o := p.Scope().Lookup(name)
		if !o.Exported() {
			continue
		}
		n++
		if named, ok := o.Type().(*types.Named); ok {
			if _, isType := o.(*types.TypeName); isType {
				for m := range named.Methods() {
					if m.Exported() {
						n++
					}
				}
			}
		}
	}
	return n
}

// lean returns for each file of a package the files that it leans on.
func lean(p *packages.Package) map[string]map[string]bool {
	arrows := make(map[string]map[string]bool)
	for _, file := range p.Syntax {
		from := p.Fset.Position(file.Package).Filename
		if arrows[from] == nil {
			arrows[from] = make(map[string]bool)
		}
		ast.Inspect(file, func(n ast.Node) bool {
			id, ok := n.(*ast.Ident)
			if !ok {
				return true
			}
			o := p.TypesInfo.Uses[id]
			if o == nil || o.Pkg() != p.Types || o.Parent() != nil && o.Parent() != p.Types.Scope() {
				return true // of another package, or local
			}
			if to := p.Fset.Position(o.Pos()).Filename; to != from {
				arrows[from][to] = true
			}
			return true
		})
	}
	return arrows
}

// back counts the arrows that run back in an order of the files. It takes away the
// files on which no other one leans, or which lean on no other one. When there is no
// such file, it takes the one with the largest surplus of arrows that go out (Eades,
// Lin and Smyth, 1993).
func back(arrows map[string]map[string]bool) (n int) {
	left := slices.Sorted(maps.Keys(arrows))
	place := make(map[string]int)
	first, last := 0, len(left)
	degrees := func(file string) (in, out int) {
		for _, other := range left {
			if arrows[other][file] {
				in++
			}
			if arrows[file][other] {
				out++
			}
		}
		return in, out
	}
	for len(left) > 0 {
		next, surplus, sink := "", 0, false
		for _, file := range left {
			in, out := degrees(file)
			if out == 0 {
				next, sink = file, true
				break
			}
			if in == 0 {
				out = len(arrows) + 1
			}
			if next == "" || out-in > surplus {
				next, surplus = file, out-in
			}
		}
		if sink {
			last--
			place[next] = last
		} else {
			place[next] = first
			first++
		}
		left = slices.DeleteFunc(left, func(file string) bool { return file == next })
	}
	for from, all := range arrows {
		for to := range all {
			if place[to] < place[from] {
				n++
			}
		}
	}
	return n
}
