package registry

import (
	"bytes"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"github.com/google/go-cmp/cmp"
)

func TestParse(t *testing.T) {
	tests := []struct {
		name string
		in   string
		want []field
		line int // of the syntax error
	}{
		{"empty", "", nil, 0},
		{"one setting", "module: a.so\n", []field{{"module", "a.so", 1}}, 0},
		{"no final newline", "module: a.so", []field{{"module", "a.so", 1}}, 0},
		{"carriage returns", "module: a.so\r\ncritical: yes\r\n", []field{{"module", "a.so", 1}, {"critical", "yes", 2}}, 0},
		{"every kind of white space", " \t\v\f\rmodule \t:\v\f a.so \r\v\n", []field{{"module", "a.so", 1}}, 0},
		{"no white space", "module:a.so", []field{{"module", "a.so", 1}}, 0},
		{"comments and blank lines count", "# one\n\n \t # two\nmodule: a.so", []field{{"module", "a.so", 4}}, 0},
		{"a comment behind a value is part of it", "module: a.so # b", []field{{"module", "a.so # b", 1}}, 0},
		{"a value with colons", "remote: |a:b: c", []field{{"remote", "|a:b: c", 1}}, 0},
		{"no continuation lines", "module: a\\\nb: c", []field{{"module", `a\`, 1}, {"b", "c", 2}}, 0},
		{"blank value", "module:\n", []field{{"module", "", 1}}, 0},
		{"blank name", ": x\n", []field{{"", "x", 1}}, 0},
		{"a name with blanks", "my  module : x\n", []field{{"my  module", "x", 1}}, 0},
		{"twice", "module: a\nmodule: b\n", []field{{"module", "a", 1}, {"module", "b", 2}}, 0},
		{"other encodings", "module: \xe4\xff.so", []field{{"module", "\xe4\xff.so", 1}}, 0},
		{"byte order mark belongs to the name", "\ufeffmodule: a", []field{{"\ufeffmodule", "a", 1}}, 0},
		{"dashes behind a blank", " -----BEGIN x: y", []field{{"-----BEGIN x", "y", 1}}, 0},

		{"no colon", "module: a\nmodule", nil, 2},
		{"section", "\n\n [p11-kit-object-v1]\n", nil, 3},
		{"half a section", "[", nil, 1},
		{"a section that looks like a setting", "[a: b", nil, 1},
		{"PEM", "-----BEGIN CERTIFICATE-----\n-----END CERTIFICATE-----\n", nil, 1},
		{"PEM that looks like a setting", "-----BEGIN a: b\n", nil, 1},
		{"zero byte", "module: a\nmod\x00ule: b", nil, 2},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			got, err := parse([]byte(tt.in))
			if tt.line != 0 {
				if e, ok := errors.AsType[*syntaxError](err); !ok || e.line != tt.line {
					t.Fatalf("parse: %v, want an error in line %d", err, tt.line)
				}
				return
			}
			if err != nil {
				t.Fatal(err)
			}
			if diff := cmp.Diff(tt.want, got, cmp.AllowUnexported(field{})); diff != "" {
				t.Error(diff)
			}
		})
	}
}

func TestParseErrorKeepsSecrets(t *testing.T) {
	_, err := parse([]byte("pin-value=123456"))
	if err == nil || strings.Contains(err.Error(), "123456") {
		t.Errorf("err = %v", err)
	}
}

func TestReadConfRefusesOtherThanFiles(t *testing.T) {
	dir := t.TempDir()
	large := filepath.Join(dir, "large")
	must(t, os.WriteFile(large, bytes.Repeat([]byte("#\n"), maxFile/2+1), 0o644))
	largest := filepath.Join(dir, "largest")
	must(t, os.WriteFile(largest, bytes.Repeat([]byte("#\n"), maxFile/2), 0o644))
	pipe := filepath.Join(dir, "pipe")
	must(t, syscall.Mkfifo(pipe, 0o644))

	if _, _, err := readConf(largest, os.Getuid()); err != nil {
		t.Errorf("a file of the largest size: %v", err)
	}
	for _, path := range []string{large, pipe, dir, "/dev/zero", filepath.Join(dir, "missing")} {
		if _, _, err := readConf(path, os.Getuid()); err == nil {
			t.Errorf("%s was read", path)
		}
	}
}

// format prints fields so that parse reads them again. The blank in front keeps dashes
// from starting a PEM block.
func format(fields []field) []byte {
	var b bytes.Buffer
	for _, f := range fields {
		b.WriteString(" " + f.name + ": " + f.value + "\n")
	}
	return b.Bytes()
}

func FuzzParse(f *testing.F) {
	seeds := []string{
		"", "module: a.so\n", "# c\r\n\r\nmodule : /x y.so \r\nremote:|ssh h p11-kit remote m\n", ":\n", "::", "a:b:c",
		" -----BEGIN x: y", "-----BEGIN X", "[s]", "module", "\x00", "\xff\xfe: \xfd", "a\v:\fb\n\n", "#", "enable-in: a,b c",
	}
	if len(seeds) == 0 {
		f.Fatal("no seeds")
	}
	for _, s := range seeds {
		f.Add([]byte(s))
	}
	shipped, err := filepath.Glob("/usr/share/p11-kit/modules/*.module")
	if err != nil {
		f.Fatal(err)
	}
	for _, path := range shipped {
		data, err := os.ReadFile(path)
		if err != nil {
			f.Fatal(err)
		}
		f.Add(data)
	}
	f.Fuzz(func(t *testing.T, data []byte) {
		first, err := parse(data)
		if err != nil {
			return
		}
		printed := format(first)
		if len(printed) > maxFile {
			return
		}
		second, err := parse(printed)
		if err != nil {
			t.Fatalf("%q became %q: %v", data, printed, err)
		}
		for i := range first {
			if strings.Trim(first[i].name, space) != first[i].name || strings.Trim(first[i].value, space) != first[i].value {
				t.Errorf("white space in %+v", first[i])
			}
			first[i].line = i + 1
		}
		if diff := cmp.Diff(first, second, cmp.AllowUnexported(field{})); diff != "" {
			t.Error(diff)
		}
	})
}

func must(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}
