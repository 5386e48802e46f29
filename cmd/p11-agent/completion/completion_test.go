package completion

import (
	"bytes"
	"slices"
	"strings"
	"testing"

	"p11-agent/cmd/p11-agent/status"
)

func TestDescribe(t *testing.T) {
	tokens := []status.Token{
		{TokenEntry: status.TokenEntry{URI: "pkcs11:token=work;serial=1", Label: "work", Serial: "1"}, Keys: []string{"pkcs11:token=work;serial=1;id=%01"}},
		{TokenEntry: status.TokenEntry{URI: "pkcs11:token=a%3Ab;serial=2", Label: "a:b\nc", Serial: "2"}},
	}
	const (
		work, key = "pkcs11:token=work;serial=1\twork (serial 1)", "pkcs11:token=work;serial=1;id=%01\tkey on work (serial 1)"
		other     = "pkcs11:token=a%3Ab;serial=2\ta:b c (serial 2)"
	)
	for _, tt := range []struct {
		name  string
		keys  bool
		given []string
		typed string
		want  []string
	}{
		{"tokens", false, nil, "", []string{work, other}},
		{"tokens and keys", true, nil, "", []string{work, other, key}},
		{"the beginning of a URI", true, nil, "pkcs11:token=w", []string{work, key}},
		{"a label", true, nil, "wo", []string{"work\tthe token"}},
		{"given already", true, []string{"pkcs11:token=work;serial=1"}, "pkcs11:token=w", []string{key}},
		{"no such token", true, nil, "x", nil},
	} {
		t.Run(tt.name, func(t *testing.T) {
			if got := describe(tokens, tt.keys, tt.given, tt.typed); !slices.Equal(got, tt.want) {
				t.Errorf("got %q, want %q", got, tt.want)
			}
		})
	}
}

// Each shell has a script, which asks the program for completions.
func TestPrint(t *testing.T) {
	for _, shell := range Shells {
		var with, without bytes.Buffer
		if err := Print(&with, shell, false); err != nil {
			t.Fatal(err)
		}
		if err := Print(&without, shell, true); err != nil {
			t.Fatal(err)
		}
		if !strings.Contains(with.String(), "__complete ") || strings.Contains(with.String(), "__completeNoDesc") {
			t.Errorf("%s does not ask for descriptions", shell)
		}
		if !strings.Contains(without.String(), "__completeNoDesc ") || strings.Contains(without.String(), "__complete ") {
			t.Errorf("%s asks for descriptions", shell)
		}
	}
	if err := Print(new(bytes.Buffer), "tcsh", false); err == nil {
		t.Error("there is a script for tcsh")
	}
}
