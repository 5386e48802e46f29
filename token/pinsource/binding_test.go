package pinsource

import (
	"encoding/json"
	"reflect"
	"testing"
)

// FuzzBindings reads files of bindings. What can be read is written in the same way again.
func FuzzBindings(f *testing.F) {
	f.Add([]byte(`{"version":1,"bindings":[{"uri":"pkcs11:token=card","module":"m","label":"card","serial":"1","manufacturer":"","model":""}]}`))
	f.Add([]byte(`{"version":2}`))
	f.Add([]byte(`{"version":1}{`))
	f.Fuzz(func(t *testing.T, b []byte) {
		all, err := parseBindings(b)
		if err != nil {
			return
		}
		text, err := json.Marshal(bindingsText{bindingsVersion, all})
		if err != nil {
			t.Fatal(err)
		}
		again, err := parseBindings(text)
		if err != nil || len(again) != len(all) || len(all) > 0 && !reflect.DeepEqual(again, all) {
			t.Fatalf("%+v became %+v: %v", all, again, err)
		}
	})
}
