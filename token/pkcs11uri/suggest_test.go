package pkcs11uri

import "testing"

func TestNearest(t *testing.T) {
	for _, tt := range []struct {
		name string
		all  []string
		want string
	}{
		{"wrok", []string{"home", "work"}, "work"},
		{"WORK", []string{"work"}, "work"},
		{"bank", []string{"work", "home"}, ""},
		{"work", nil, ""},
	} {
		if got := Nearest(tt.name, tt.all); got != tt.want {
			t.Errorf("%q of %q: got %q, want %q", tt.name, tt.all, got, tt.want)
		}
	}
}
