package main

import (
	"debug/elf"
	"testing"
)

// The linker leaves out what is never called, unless a method can be called by a
// name that is made up when the program runs, as text/template does: then it keeps
// every exported method of every type, which is a fifth of the program, in the
// memory of the agent and of each module process.
func TestLinked(t *testing.T) {
	f, err := elf.Open(buildAgent(t))
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	symbols, err := f.Symbols()
	if err != nil {
		t.Fatal(err)
	}
	seen := false
	for _, s := range symbols {
		switch s.Name {
		case "main.main":
			seen = true
		case "reflect.Value.MethodByName", "reflect.(*rtype).MethodByName":
			t.Errorf("%s is linked: go build -ldflags=-dumpdep tells what needs it", s.Name)
		}
	}
	if !seen {
		t.Error("the program has no main.main: these are not its symbols")
	}
}
