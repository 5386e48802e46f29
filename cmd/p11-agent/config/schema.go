package config

import (
	"fmt"
	"reflect"
	"slices"
	"strings"
)

// KnownKeys returns the keys that the table at path may have, in the struct t.
func KnownKeys(t reflect.Type, path []string) []string {
	for t.Kind() == reflect.Pointer || t.Kind() == reflect.Slice {
		t = t.Elem()
	}
	if t.Kind() != reflect.Struct {
		return nil
	}
	var names []string
	for f := range t.Fields() {
		name := f.Tag.Get("toml")
		if name == "" {
			continue
		}
		names = append(names, name)
		if len(path) > 0 && path[0] == name {
			return KnownKeys(f.Type, path[1:])
		}
	}
	return names
}

// tableHead returns the line that begins a table: [pinentry], or [[key]].
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

// holdsTables tells whether t is the type of a table or of a list of tables.
func holdsTables(t reflect.Type) bool {
	for t.Kind() == reflect.Pointer || t.Kind() == reflect.Slice {
		t = t.Elem()
	}
	return t.Kind() == reflect.Struct && !isText(t)
}

// isText tells whether a value of type t is a string in the file.
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

// wanted returns how to write the value of a key, for an error.
func wanted(path []string) string {
	t := typeOf(reflect.TypeFor[File](), path)
	if t == nil || len(path) == 0 {
		return "another kind of value"
	}
	name := path[len(path)-1]
	switch {
	case t == reflect.TypeFor[KeyURI]():
		return `a pkcs11: URI in quotes, such as "pkcs11:token=Work"`
	case t == reflect.TypeFor[[]KeyURI]():
		return fmt.Sprintf(`a list of pkcs11: URIs, such as %s = ["pkcs11:token=Work"]`, name)
	case t == reflect.TypeFor[Duration](), t == reflect.TypeFor[ReleaseAfter](), t == reflect.TypeFor[NoticeAfter]():
		return fmt.Sprintf(`a length of time in quotes, such as %s = "30s"`, name)
	case isText(t):
		return fmt.Sprintf(`a text in quotes, such as %s = "..."`, name)
	case t.Kind() == reflect.Bool:
		return fmt.Sprintf(`true or false, without quotes: %s = true`, name)
	case t.Kind() == reflect.Map:
		return fmt.Sprintf(`a table of texts, such as %s = { NAME = "value" }`, name)
	case holdsTables(t):
		return "a table, which begins with the line " + tableHead(reflect.TypeFor[File](), path)
	case t.Kind() == reflect.Slice && isText(t.Elem()):
		return fmt.Sprintf(`a list of texts, such as %s = ["..."]`, name)
	}
	return "another kind of value"
}
