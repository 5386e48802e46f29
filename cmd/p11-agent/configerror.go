package main

import (
	"bytes"
	"fmt"
	"reflect"
	"regexp"
	"slices"
	"strings"

	"github.com/pelletier/go-toml/v2"
)

// explainUnknown makes an error of a key that its table does not have. text is the file.
func explainUnknown(file string, text []byte, e *toml.DecodeError) *configError {
	line, col := e.Position()
	key := e.Key()
	ce := &configError{File: file, Line: line, Col: col, Text: fmt.Sprintf("unknown key %q", strings.Join(key, "."))}
	if len(key) == 0 {
		return ce
	}
	name, table := key[len(key)-1], key[:len(key)-1]
	ce.Text = fmt.Sprintf("unknown key %q", name)
	root := reflect.TypeFor[config]()
	elsewhere := tablesWith(root, nil, name)
	switch near := nearest(name, knownKeys(root, table)); {
	case len(table) > 0 && slices.Contains(knownKeys(root, nil), name):
		ce.Advice = fmt.Sprintf("%q belongs above the first table%s: what stands below %s belongs to that table", name, firstTable(text), tableHead(root, table))
	case len(elsewhere) > 0:
		ce.Advice = fmt.Sprintf("%q belongs into a table %s", name, strings.Join(elsewhere, " or "))
	case near != "":
		ce.Advice = fmt.Sprintf("did you mean %q?", near)
	}
	return ce
}

var tableLine = regexp.MustCompile(`(?m)^[ \t]*(\[{1,2}[A-Za-z"'].*)$`)

// firstTable says where the first table of a file begins.
func firstTable(text []byte) string {
	at := tableLine.FindIndex(text)
	if at == nil {
		return ""
	}
	return fmt.Sprintf(", which begins in line %d", 1+bytes.Count(text[:at[0]], []byte("\n")))
}

// tableHead writes the head of a table.
func tableHead(root reflect.Type, path []string) string {
	if t := typeOf(root, path); t != nil && t.Kind() == reflect.Slice {
		return "[[" + strings.Join(path, ".") + "]]"
	}
	return "[" + strings.Join(path, ".") + "]"
}

// tablesWith returns the heads of the tables that have a key of this name.
func tablesWith(root reflect.Type, path []string, name string) (heads []string) {
	table := typeOf(root, path)
	for table.Kind() == reflect.Pointer || table.Kind() == reflect.Slice {
		table = table.Elem()
	}
	for f := range table.Fields() {
		key := f.Tag.Get("toml")
		if key == name && len(path) > 0 {
			heads = append(heads, tableHead(root, path))
		}
		if key != "" && holdsTables(f.Type) {
			heads = append(heads, tablesWith(root, append(slices.Clone(path), key), name)...)
		}
	}
	return heads
}

// holdsTables tells whether a type is that of a table, or of a list of tables.
func holdsTables(t reflect.Type) bool {
	for t.Kind() == reflect.Pointer || t.Kind() == reflect.Slice {
		t = t.Elem()
	}
	return t.Kind() == reflect.Struct && !isText(t)
}

// isText tells whether values of a type are written as texts.
func isText(t reflect.Type) bool {
	return reflect.PointerTo(t).Implements(reflect.TypeFor[interface{ UnmarshalText(b []byte) error }]()) || t.Kind() == reflect.String
}

// typeOf returns the type of the key at a path; nil: there is no such key.
func typeOf(t reflect.Type, path []string) reflect.Type {
	for t.Kind() == reflect.Pointer {
		t = t.Elem()
	}
	if len(path) == 0 {
		return t
	}
	for t.Kind() == reflect.Slice {
		t = t.Elem()
	}
	switch t.Kind() {
	case reflect.Map:
		return typeOf(t.Elem(), path[1:])
	case reflect.Struct:
		for f := range t.Fields() {
			if f.Tag.Get("toml") == path[0] {
				return typeOf(f.Type, path[1:])
			}
		}
	}
	return nil
}

// wanted says how the value of a key is written.
func wanted(path []string) string {
	t := typeOf(reflect.TypeFor[config](), path)
	if t == nil || len(path) == 0 {
		return "another kind of value"
	}
	name := path[len(path)-1]
	switch {
	case t == reflect.TypeFor[uriValue]():
		return `a pkcs11: URI in quotes, such as "pkcs11:token=Work"`
	case t == reflect.TypeFor[[]uriValue]():
		return fmt.Sprintf(`a list of pkcs11: URIs, such as %s = ["pkcs11:token=Work"]`, name)
	case t == reflect.TypeFor[durationValue](), t == reflect.TypeFor[releaseValue](), t == reflect.TypeFor[noticeValue]():
		return fmt.Sprintf(`a length of time in quotes, such as %s = "30s"`, name)
	case isText(t):
		return fmt.Sprintf(`a text in quotes, such as %s = "..."`, name)
	case t.Kind() == reflect.Bool:
		return fmt.Sprintf(`true or false, without quotes: %s = true`, name)
	case t.Kind() == reflect.Map:
		return fmt.Sprintf(`a table of texts, such as %s = { NAME = "value" }`, name)
	case holdsTables(t):
		return "a table, which begins with the line " + tableHead(reflect.TypeFor[config](), path)
	case t.Kind() == reflect.Slice && isText(t.Elem()):
		return fmt.Sprintf(`a list of texts, such as %s = ["..."]`, name)
	}
	return "another kind of value"
}

// needRestart returns the keys and tables that differ from those of an old configuration
// and count when the agent starts.
func (c *config) needRestart(old *config) (changed []string) {
	if old == nil {
		return nil
	}
	for _, k := range []struct {
		name     string
		now, was any
	}{
		{"[[module]]", c.Modules, old.Modules},
		{"[[socket]]", c.Sockets, old.Sockets},
		{"allow-modules", c.AllowModules, old.AllowModules},
		{"certificates", c.Certificates, old.Certificates},
		{"insert-timeout", c.InsertTimeout, old.InsertTimeout},
		{"known-hosts", c.KnownHosts, old.KnownHosts},
		{"remember-keys", c.RememberKeys, old.RememberKeys},
		{"remote-tokens", c.RemoteTokens, old.RemoteTokens},
		{"software-keys", c.SoftwareKeys, old.SoftwareKeys},
		{"upstream", c.Upstream, old.Upstream},
	} {
		if !reflect.DeepEqual(k.now, k.was) {
			changed = append(changed, k.name)
		}
	}
	return changed
}

// speaksOfGo tells whether an error of the decoder is about the program's types.
func speaksOfGo(text string) bool {
	for _, word := range []string{"struct", "main.", "agent.", "cannot store", "cannot decode"} {
		if strings.Contains(text, word) {
			return true
		}
	}
	return false
}
