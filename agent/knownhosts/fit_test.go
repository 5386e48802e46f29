package knownhosts

import (
	"crypto/hmac"
	"crypto/sha1" //nolint:gosec // what known_hosts uses
	"encoding/base64"
	"fmt"
	"maps"
	"math/rand/v2"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"p11-agent/agent/sshkey/keytest"
)

// hashOf is a name as ssh-keygen -H writes it.
func hashOf(name string) string {
	salt := []byte("twenty bytes of salt")
	mac := hmac.New(sha1.New, salt)
	mac.Write([]byte(name))
	return "|1|" + base64.StdEncoding.EncodeToString(salt) + "|" + base64.StdEncoding.EncodeToString(mac.Sum(nil))
}

func manyNames(n int) string {
	var names []string
	for i := range n {
		names = append(names, fmt.Sprint("name", i))
	}
	return strings.Join(names, ",")
}

func TestFit(t *testing.T) {
	hashed := hashOf("db.example.com")
	for _, test := range []struct {
		hosts    string // of the known_hosts line
		patterns string
		want     Fit
	}{
		// Names of one host.
		{"db.example.com", "db.example.com", Yes},
		{"DB.example.com", "db.EXAMPLE.com", Yes},
		{"db.example.com", "*.example.com", Yes},
		{"db.example.com", "*.example.com,!db.*", No},
		{"db.example.com", "web.example.com", No},
		{"db.example.com,192.0.2.1", "*.example.com", Yes},
		{"db.example.com,192.0.2.1", "*.example.com,!192.*", Maybe},
		{"db.example.com,192.0.2.1", "!192.*", No},
		{"db.example.com", "*", Yes},
		{"db.example.com", "", No},

		// A wildcard proves a set.
		{"*.example.com", "db.example.com", Maybe},
		{"*.example.com", "*.example.com", Yes},
		{"*.EXAMPLE.com", "*.example.COM", Yes},
		{"*.example.com", "*.com", Yes},
		{"*.example.com", "*", Yes},
		{"*.example.com", "*.example.org", No},
		{"*.example.com", "w*.example.com", Maybe},
		{"*.example.com", "*.example.com,!db.example.com", Maybe},
		{"*.example.com", "*.com,!*.org", Yes},
		{"*.example.com", "*.com,!*.example.com", No},
		{"*.example.org,!test.example.org", "*.example.org,!test.example.org", Yes},
		{"*.example.org,!*.test.example.org", "*.example.org,!test.example.org", Maybe},
		{"*.example.org,!t*", "*.example.org,!test.example.org", Yes},
		{"*", "db.example.com", Maybe},
		{"*", "*", Yes},
		{"*", "?*", Yes},
		{"*", "??*", Maybe},
		{"*", "?,??*", Yes},
		{"db?.example.com", "db?.example.com", Yes},
		{"db?.example.com", "db*.example.com", Yes},
		{"db?.example.com", "db1.example.com", Maybe},
		{"db*.example.com", "db?.example.com", Maybe},
		{"[*.example.com]:2222", "*.example.com", No},
		{"[*.example.com]:2222", "[*.example.com]:*", Yes},
		{"[*.example.com]:2222", "*.example.com*", Yes},
		{"*.a,!*", "*", No},
		{"*.a,!*.a", "*.a", No},

		// Every name and every set has to fit where there is one set.
		{"*.example.com,*.example.org", "*.example.com", Maybe},
		{"*.example.com,*.example.org", "*.example.com,*.example.org", Yes},
		{"*.example.com,web.example.org", "*.example.com", Maybe},
		{"web.example.com,*.example.com", "*.example.com", Yes},
		{"*.example.com,192.0.2.1", "*.example.com", Maybe},
		{"*.example.com,192.0.2.1", "*.example.com,192.0.2.*", Yes},
		{"db.example.com\n*.example.com", "db.example.com", Maybe},
		{"db.example.com\n*.example.org", "db.example.com,!*.example.org", Maybe},
		{"*.example.com\n*.example.com,!db.example.com", "*.example.com,!db.example.com", Maybe},

		// Hashes.
		{hashed, "db.example.com", Yes},
		{hashed, "DB.example.com", Yes},
		{hashed, "web.example.com", No},
		{hashed, "*.example.com", No},
		{hashed, "*", Yes},
		{hashed, "*,!db.example.com", No},
		{hashed, "*,!web.example.com", Yes},
		{hashed, "*,!*.org", No},
		{hashed + "\nweb.example.org", "*.example.org", Yes},
		{hashed + "\nweb.example.org", "*.example.org,!db.example.com", Maybe},
		{hashed + "\nweb.example.org", "*.example.org,!test.example.org", Yes},
		{hashed + "\nweb.example.org", "*.example.org,!test.*", Maybe},
		{hashed + "\n*.example.org", "*.example.org", Maybe},
		{hashed + "\n*.example.org", "*.example.org,db.example.com", Yes},

		// Names that are left out.
		{"a.example.org,b\u00e4d", "*.example.org", Yes},
		{"a.example.org,b\u00e4d", "*.example.org,!b", Maybe},
		{"*.example.org,b\u00e4d", "*.example.org", Maybe},
		{manyNames(40), "name*", Yes},
		{manyNames(40), "name*,!name39", Maybe},
		{manyNames(40) + ",*.x", "name*,*.x", Maybe},

		// No names.
		{"", "*", Yes},
		{"", "*,!x", No},
		{"", "*,x", No},
	} {
		t.Run(test.hosts+" in "+test.patterns, func(t *testing.T) {
			key := keytest.New(t).Public
			var file string
			for hosts := range strings.SplitSeq(test.hosts, "\n") {
				if hosts != "" {
					file += line(hosts, key)
				}
			}
			files := New(write(t, filepath.Join(t.TempDir(), "known_hosts"), file))
			patterns := strings.Split(test.patterns, ",")
			k := files.Lookup(key, nil)
			if got := k.Fit(patterns); got != test.want {
				t.Errorf("%v, want %v: %+v", got, test.want, k)
			}
			// What a client says changes nothing, but for a hash.
			said := guesses("ssh", "db.example.com", "test.example.org", "x.a", "name3", "192.0.2.1")
			if k := files.Lookup(key, said); !strings.Contains(test.hosts, "|") && k.Fit(patterns) != test.want {
				t.Errorf("when guessed: %v, want %v: %+v", k.Fit(patterns), test.want, k)
			}
		})
	}
}

// TestRelate compares relate with its definition, over all texts of some bytes that
// are not too long.
func TestRelate(t *testing.T) {
	var texts []string
	for from, n := 0, 0; n < 7; n++ {
		if n == 0 {
			texts = []string{""}
			continue
		}
		end := len(texts)
		for _, text := range texts[from:end] {
			for _, c := range "abc" { // no pattern has c
				texts = append(texts, text+string(c))
			}
		}
		from = end
	}
	texts = texts[1:]
	r := rand.New(rand.NewPCG(1, 2))
	pattern := func() string {
		var b strings.Builder
		for range r.IntN(4) {
			b.WriteByte("ab?*"[r.IntN(4)])
		}
		return b.String()
	}
	list := func() (all []string) {
		for range 1 + r.IntN(2) {
			all = append(all, pattern())
		}
		for range r.IntN(3) {
			all = append(all, "!"+pattern())
		}
		return all
	}
	counts := make(map[[2]bool]int)
	for range 2000 {
		all := [][]string{list()}
		if r.IntN(3) == 0 {
			all = append(all, list())
		}
		in := list()
		some, others := false, false
		for _, text := range texts {
			if slices.ContainsFunc(all, func(l []string) bool { return !match(l, text) }) {
				continue
			}
			if match(in, text) {
				some = true
			} else {
				others = true
			}
		}
		within, overlaps := relate(all, in)
		if want := some && !others; within != want || overlaps != some {
			t.Fatalf("%q and %q: within %v, overlaps %v, want %v, %v", all, in, within, overlaps, want, some)
		}
		counts[[2]bool{within, overlaps}]++
	}
	if len(counts) != 3 || slices.Min(slices.Collect(maps.Values(counts))) < 100 {
		t.Errorf("the lists are too much alike: %v", counts)
	}
}

// What takes too long is not answered, and the answer permits nothing.
func TestRelateIsBounded(t *testing.T) {
	hard := "*a" + strings.Repeat("?", 60) + "b*"
	if within, overlaps := relate([][]string{{hard}}, []string{"*a" + strings.Repeat("?", 59) + "b*", "*c" + strings.Repeat("?", 50) + "d*"}); within || !overlaps {
		t.Errorf("within %v, overlaps %v", within, overlaps)
	}
	if within, overlaps := relate([][]string{{"a*"}}, []string{"a" + strings.Repeat("*x", maxPlaces)}); within || !overlaps {
		t.Errorf("of a long pattern: within %v, overlaps %v", within, overlaps)
	}
	if got := (Known{Names: []string{hard}}).Fit([]string{"*" + strings.Repeat("?b", 60) + "*", "!*" + strings.Repeat("a?", 60)}); got != Maybe {
		t.Errorf("it fits: %v", got)
	}
}

// FuzzFit looks for patterns that mean what they must not.
func FuzzFit(f *testing.F) {
	for _, seed := range [][2]string{
		{"*.example.org", "a.example.org"},
		{"*", "x"},
		{"!a", "a"},
		{"a?c", "abc"},
		{"*.example.org !test.*", "test.example.org"},
		{"*.example.org !test.*", "*.example.org"},
		{"[::1]:22", "[::1]:22"},
		{"**?**", "xx"},
		{"", ""},
		{"*a*b*c*", "xaxbxcx"},
		{"EXAMPLE", "example"},
		{"* !*", "x"},
	} {
		f.Add(seed[0], seed[1])
	}
	f.Fuzz(func(t *testing.T, list, name string) {
		patterns := strings.Split(list, " ")
		if strings.ContainsFunc(list+name, func(r rune) bool { return r >= 0x80 }) {
			return
		}
		fit := func(patterns []string, names ...string) Fit { return Known{Names: names}.Fit(patterns) }
		if got := fit(patterns); got == Maybe || got == Yes && list != "*" {
			t.Errorf("%q mean an unknown host: %v", patterns, got)
		}
		got := fit(patterns, name)
		if got > No && !slices.ContainsFunc(patterns, func(p string) bool { return !strings.HasPrefix(p, "!") }) {
			t.Errorf("%q mean %q", patterns, name)
		}
		if got != fit(patterns, strings.ToUpper(name)) {
			t.Errorf("%q: capitals of %q make a difference", patterns, name)
		}
		if fit(append(slices.Clone(patterns), "!*"), name) == Yes {
			t.Errorf("%q without any name mean %q", patterns, name)
		}
		if got > fit(append(slices.Clone(patterns), "*"), name) {
			t.Errorf("%q mean %q, but not with one more", patterns, name)
		}
		if fit(patterns, name, "other") > max(got, fit(patterns, "other")) {
			t.Errorf("%q mean two names of which they mean none", patterns)
		}
		if wild(name) && got == Yes && len(name) < 64 {
			// Then they mean each name of the set.
			for _, by := range []string{"", "x", "a.b"} {
				one := strings.ReplaceAll(strings.ReplaceAll(name, "*", by), "?", "z")
				if one != "" && fit(patterns, one) != Yes {
					t.Errorf("%q mean %q, but not %q", patterns, name, one)
				}
			}
		}
	})
}

// TestManyPatterns has a configuration and a known_hosts file of unusual size.
func TestManyPatterns(t *testing.T) {
	var patterns []string
	for i := range 60 {
		patterns = append(patterns, fmt.Sprintf("*.region%d.example.org", i))
	}
	if got := (Known{Names: []string{"w*.region7.example.org"}}).Fit(patterns); got != Yes {
		t.Errorf("it fits: %v", got)
	}
	if got := (Known{Names: []string{"w*.example.org"}}).Fit(patterns); got != Maybe {
		t.Errorf("it fits: %v", got)
	}
}
