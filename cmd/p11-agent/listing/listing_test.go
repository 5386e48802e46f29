package listing

import (
	"os"
	"reflect"
	"regexp"
	"slices"
	"strings"
	"testing"

	"p11-agent/agent/peer/terminaltest"
	"p11-agent/cmd/p11-agent/backend"
	"p11-agent/cmd/p11-agent/config"
	"p11-agent/cmd/p11-agent/status"
	"p11-agent/token"
	"p11-agent/token/pkcs11uri"
	"p11-agent/token/selection"
	"p11-agent/token/tokentest"
)

func TestMain(m *testing.M) {
	tokentest.Main()
	os.Exit(terminaltest.Without(m).Run())
}

// modules opens modules of these fakes.
func modules(t *testing.T, fakes ...*tokentest.Fake) *backend.Modules {
	t.Helper()
	o := token.Options{Command: []string{"/proc/self/exe"}}
	for i, f := range fakes {
		o.Modules = append(o.Modules, token.ModuleSpec{Name: []string{"one", "two"}[i], Path: "/nowhere/fake.so", Env: f.Env()})
	}
	return &backend.Modules{Store: tokentest.Store(t, o)}
}

func selector(t *testing.T, uri string) *selection.Selector {
	t.Helper()
	u, err := pkcs11uri.Parse(uri)
	if err != nil {
		t.Fatal(err)
	}
	return selection.New(u)
}

// Collect says of each key whether the agent offers it, and why it does not.
func TestCollect(t *testing.T) {
	f := tokentest.NewFake(t)
	work := f.AddToken("work", tokentest.PIN)
	work.AddKey(tokentest.P256, 1, "login", nil)
	work.AddKey(tokentest.RSA2048, 2, "each", func(k *tokentest.FakeKey) { k.Public, k.Always = true, true })
	work.AddKey(tokentest.P256, 3, "unfit", func(k *tokentest.FakeKey) { k.Public, k.NoSign = true, true })
	f.AddToken("empty", tokentest.PIN)
	b := modules(t, f)
	l := Collect(new(config.File), b, selector(t, "pkcs11:"), false)
	if len(l.Tokens) != 2 || l.Tokens[0].Label != "work" || len(l.Tokens[1].Keys) != 0 || l.Offered != 2 || l.Shown != 2 || l.Empty() {
		t.Fatalf("got %+v", l)
	}
	keys := l.Tokens[0].Keys
	if len(keys) != 3 {
		t.Fatalf("got keys %+v", keys)
	}
	if k := keys[0]; !k.Offered || k.Reason != "" || k.EachUse || k.Bits != 0 || k.Type != "ecdsa-sha2-nistp256" || k.Label != "login" || !strings.HasPrefix(k.PublicKey, k.Type+" ") {
		t.Errorf("got %+v", k)
	}
	if k := keys[1]; !k.Offered || !k.EachUse || k.Bits != 2048 {
		t.Errorf("got %+v", k)
	}
	if k := keys[2]; k.Offered || k.Reason == "" {
		t.Errorf("got %+v", k)
	}
	named := Collect(new(config.File), b, selector(t, "pkcs11:token=work;id=%01"), true)
	if len(named.Tokens) != 1 || len(named.Tokens[0].Keys) != 1 || named.Offered != 2 {
		t.Errorf("a URI selects %+v", named)
	}
	for uri, found := range map[string]bool{"pkcs11:token=work": true, "pkcs11:token=empty": true, "pkcs11:token=wrok": false, "pkcs11:token=work;id=%09": false} {
		if err := CheckNamed(t.Context(), b.Store, selector(t, uri)); (err == nil) != found {
			t.Errorf("%s: got %v", uri, err)
		}
	}
}

// The agent uses a token through one of the modules that show it.
func TestCollectTwice(t *testing.T) {
	one, two := tokentest.NewFake(t), tokentest.NewFake(t)
	card := one.AddToken("card", tokentest.PIN)
	card.AddKey(tokentest.P256, 1, "login", nil)
	two.AddTwin(card).AddKey(tokentest.P256, 1, "login", nil)
	l := Collect(&config.File{}, modules(t, one, two), selector(t, "pkcs11:"), false)
	var reasons []string
	for _, token := range l.Tokens {
		for _, k := range token.Keys {
			if !k.Offered {
				reasons = append(reasons, token.Module+": "+k.Reason)
			}
		}
	}
	if l.Offered != 1 || !slices.Equal(reasons, []string{"two: it is used through the module one"}) {
		t.Errorf("%d are offered, reasons %q", l.Offered, reasons)
	}
}

// members are the names of the members of a type in JSON.
func members(of reflect.Type, names map[string]bool) {
	switch of.Kind() {
	case reflect.Slice, reflect.Pointer:
		members(of.Elem(), names)
	case reflect.Struct:
		if of.PkgPath() == "time" {
			return
		}
		for i := range of.NumField() {
			f := of.Field(i)
			if name, _, _ := strings.Cut(f.Tag.Get("json"), ","); name != "" {
				names[name] = true
			}
			members(f.Type, names)
		}
	}
}

// The manual names each member that status --json and list --json print, and no others.
func TestManual(t *testing.T) {
	text, err := os.ReadFile("../../../docs/p11-agent.1.scd")
	if err != nil {
		t.Fatal(err)
	}
	_, section, _ := strings.Cut(string(text), "\n# JSON\n")
	section, _, _ = strings.Cut(section, "\n# ")
	names := make(map[string]bool)
	members(reflect.TypeFor[status.Report](), names)
	members(reflect.TypeFor[Listing](), names)
	described := make(map[string]bool)
	for _, name := range regexp.MustCompile(`(?:^|[\s(])_([a-z_0-9-]+)_`).FindAllStringSubmatch(section, -1) {
		described[name[1]] = true
	}
	for name := range names {
		if !described[name] {
			t.Errorf("docs/p11-agent.1.scd, JSON, does not describe %s", name)
		}
	}
	values := []string{"ok", "low", "last", "locked", "starting", "running", "released", "failed", "sign", "add", "remove", "remove-all", "lock", "unlock", "login", "logout", "status", "refused", "cancelled"}
	for name := range described {
		if !names[name] && !slices.Contains(values, name) {
			t.Errorf("docs/p11-agent.1.scd, JSON, describes %s, which is no member", name)
		}
	}
}
