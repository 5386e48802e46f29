package request

import (
	"fmt"
	"slices"
	"testing"
)

type offeredKey struct {
	Key
	name, unfit string
}

func (k offeredKey) Unfit() string { return k.unfit }

type names struct {
	Selection
	names []string
	broad bool
}

func (n names) Match(k Key) bool { return slices.Contains(n.names, k.(offeredKey).name) }

func (n names) Broad() bool { return n.broad }

// Which keys are offered, and in which order.
func TestOffers(t *testing.T) {
	keys := []offeredKey{{name: "a"}, {name: "b", unfit: "it only decrypts"}, {name: "c"}}
	for name, test := range map[string]struct {
		automatic []Selection
		want      string
	}{
		"everything that is fit": {nil, "[a false][c false]"},
		"nothing":                {[]Selection{}, ""},
		"in the order of the configuration": {
			[]Selection{names{names: []string{"c"}}, names{names: []string{"a", "b", "c"}, broad: true}}, "[c true][a false][c false]",
		},
		"unfit, and named": {[]Selection{names{names: []string{"b"}}}, "[b true]"},
	} {
		got := ""
		for i, alone := range Offers(keys, test.automatic) {
			got += fmt.Sprintf("[%s %t]", keys[i].name, alone)
		}
		if got != test.want {
			t.Errorf("%s: %s, want %s", name, got, test.want)
		}
		if got := Offered(keys[0], test.automatic); got != (test.automatic == nil || len(test.automatic) == 2) {
			t.Errorf("%s: a is offered: %t", name, got)
		}
	}
}
