package selection

import (
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"p11-agent/agent/pattern"
	"p11-agent/token/pin"
	"p11-agent/token/pkcs11uri"
)

func TestParseAllowList(t *testing.T) {
	tests := []struct {
		name, give string
		want       AllowList
	}{
		{"empty", "", nil},
		{"one", "/usr/lib*/**", AllowList{"/usr/lib*/**"}},
		{"two", "/usr/lib/*,/usr/local/lib/*", AllowList{"/usr/lib/*", "/usr/local/lib/*"}},
		{"commas too many", ",,/a,,/b,", AllowList{"/a", "/b"}},
		{"only commas", ",,", nil},
		{"blanks belong to the pattern", "/a b , /c", AllowList{"/a b ", " /c"}},
		{"forbidding", "/usr/lib/*,!*/old.so", AllowList{"/usr/lib/*", "!*/old.so"}},
		{"none", "none", AllowList{"none"}},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			if got := ParseAllowList(tt.give); !slices.Equal(got, tt.want) {
				t.Errorf("got %q, want %q", got, tt.want)
			}
		})
	}
}

func TestDefaultAllowList(t *testing.T) {
	for path, want := range map[string]bool{
		"/usr/lib/softhsm/libsofthsm2.so":       true,
		"/usr/lib/x86_64-linux-gnu/p11.so":      true,
		"/usr/lib64/pkcs11/p11.so":              true,
		"/usr/local/lib/p11.so":                 true,
		"/usr/bin/p11.so":                       false,
		"/tmp/usr/lib/p11.so":                   false,
		"/home/me/usr/lib/p11.so":               false,
		"/opt/vendor/lib/p11.so":                false,
		"/usr/share/usr/lib/p11.so":             false,
		"/usr/local/share/lib/p11.so":           false,
		"/var/lib/p11.so":                       false,
		"/run/user/1000/usr/local/lib/x/p11.so": false,
	} {
		got := slices.ContainsFunc(DefaultAllowList, func(p string) bool { return pattern.Match(p, path) })
		if got != want {
			t.Errorf("%s: allowed %v, want %v", path, got, want)
		}
	}
}

// tree makes module files, and returns their directory.
//
//	lib/p11.so
//	lib/deep/er/p11.so
//	lib/old.so
//	lib/in.so       -> deep/er/p11.so
//	lib/out.so      -> ../other/p11.so
//	lib/outside     -> ../other
//	lib/dangling.so -> missing.so
//	lib/loop.so     -> loop.so
//	other/p11.so
//	other/in.so     -> ../lib/p11.so
func tree(t *testing.T) string {
	t.Helper()
	dir, err := filepath.EvalSymlinks(t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	for _, file := range []string{"lib/p11.so", "lib/deep/er/p11.so", "lib/old.so", "other/p11.so"} {
		path := filepath.Join(dir, file)
		if err := os.MkdirAll(filepath.Dir(path), 0o700); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(path, nil, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	for link, to := range map[string]string{
		"lib/in.so": "deep/er/p11.so", "lib/out.so": "../other/p11.so", "lib/outside": "../other",
		"lib/dangling.so": "missing.so", "lib/loop.so": "loop.so", "other/in.so": "../lib/p11.so",
	} {
		if err := os.Symlink(to, filepath.Join(dir, link)); err != nil {
			t.Fatal(err)
		}
	}
	return dir
}

func TestAllowListResolve(t *testing.T) {
	dir := tree(t)
	const refused, forbidden, relative = "not in the list", "forbidden", "absolute path"
	tests := []struct {
		name  string
		allow string // DIR stands for the directory
		path  string // with DIR too
		want  string // below the directory; empty: an error
		is    error  // the error, or
		err   string // a part of its text
	}{
		{name: "in the list", allow: "DIR/lib*/**", path: "DIR/lib/p11.so", want: "lib/p11.so"},
		{name: "deep in the list", allow: "DIR/lib*/**", path: "DIR/lib/deep/er/p11.so", want: "lib/deep/er/p11.so"},
		{name: "by its own name", allow: "DIR/lib/p11.so", path: "DIR/lib/p11.so", want: "lib/p11.so"},
		{name: "second pattern", allow: "/nowhere/*,DIR/lib/*", path: "DIR/lib/p11.so", want: "lib/p11.so"},
		{name: "not in the list", allow: "DIR/lib*/**", path: "DIR/other/p11.so", err: refused},
		{name: "pattern of a piece", allow: "DIR/lib", path: "DIR/lib/p11.so", err: refused},
		{name: "empty list", allow: "", path: "DIR/lib/p11.so", err: refused},
		{name: "none", allow: "none", path: "DIR/lib/p11.so", err: refused},
		{name: "all", allow: "*", path: "DIR/other/p11.so", want: "other/p11.so"},
		{name: "blank before the pattern", allow: " DIR/lib/*", path: "DIR/lib/p11.so", err: refused},

		{name: "forbidden after", allow: "DIR/lib/*,!*/old.so", path: "DIR/lib/old.so", err: forbidden},
		{name: "forbidden before", allow: "!*/old.so,DIR/lib/*", path: "DIR/lib/old.so", err: forbidden},
		{name: "beside a forbidden one", allow: "!*/old.so,DIR/lib/*", path: "DIR/lib/p11.so", want: "lib/p11.so"},
		{name: "only forbidding", allow: "!*/old.so", path: "DIR/lib/p11.so", err: refused},
		{name: "forbidding what a link leads to", allow: "DIR/*,!*/other/*", path: "DIR/lib/out.so", err: forbidden},

		{name: "link within", allow: "DIR/lib/*", path: "DIR/lib/in.so", want: "lib/deep/er/p11.so"},
		{name: "link out of it", allow: "DIR/lib/*", path: "DIR/lib/out.so", err: refused},
		{name: "link of a directory out of it", allow: "DIR/lib/*", path: "DIR/lib/outside/p11.so", err: refused},
		{name: "link into it", allow: "DIR/lib/*", path: "DIR/other/in.so", want: "lib/p11.so"},
		{name: "link by its own name", allow: "DIR/lib/in.so", path: "DIR/lib/in.so", err: refused},
		{name: "dangling link", allow: "*", path: "DIR/lib/dangling.so", is: fs.ErrNotExist},
		{name: "link to itself", allow: "*", path: "DIR/lib/loop.so", err: "too many links"},

		{name: "dots within", allow: "DIR/lib/*", path: "DIR/lib/./deep/../p11.so", want: "lib/p11.so"},
		{name: "dots out of it", allow: "DIR/lib/*", path: "DIR/lib/../other/p11.so", err: refused},
		{name: "dots after a link", allow: "DIR/lib/*", path: "DIR/lib/outside/../other/p11.so", err: refused},
		{name: "dots above the root", allow: "DIR/lib/*", path: "/../..DIR/lib/p11.so", want: "lib/p11.so"},
		{name: "slashes", allow: "DIR/lib/*", path: "/DIR//lib///p11.so", want: "lib/p11.so"},
		{name: "relative", allow: "*", path: "lib/p11.so", err: relative},
		{name: "relative with dots", allow: "*", path: "../p11.so", err: relative},
		{name: "empty", allow: "*", path: "", err: relative},

		{name: "missing", allow: "*", path: "DIR/lib/missing.so", is: fs.ErrNotExist},
		{name: "missing directory", allow: "*", path: "DIR/missing/p11.so", is: fs.ErrNotExist},
		{name: "file for a directory", allow: "*", path: "DIR/lib/p11.so/x", is: unix.ENOTDIR},
		{name: "directory", allow: "DIR/lib*", path: "DIR/lib", want: "lib"},
		{name: "zero byte", allow: "*", path: "DIR/lib/p11.so\x00", is: unix.EINVAL},
		{name: "name too long", allow: "*", path: "DIR/" + strings.Repeat("x", 256), is: unix.ENAMETOOLONG},
		{name: "path of many steps", allow: "*", path: "DIR" + strings.Repeat("/lib/..", 5000) + "/" + strings.Repeat("y/", 5000), is: fs.ErrNotExist},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			in := func(s string) string { return strings.ReplaceAll(s, "DIR", dir) }
			got, err := ParseAllowList(in(tt.allow)).Resolve(in(tt.path))
			switch {
			case tt.want != "":
				if err != nil || got != filepath.Join(dir, tt.want) {
					t.Errorf("got %q, %v; want %q", got, err, tt.want)
				}
			case err == nil:
				t.Errorf("got %q", got)
			case tt.is != nil && !errors.Is(err, tt.is):
				t.Errorf("got %v, want %v", err, tt.is)
			case !strings.Contains(err.Error(), tt.err):
				t.Errorf("got %v, want %q", err, tt.err)
			}
			if err != nil && got != "" {
				t.Errorf("got %q with its error", got)
			}
		})
	}
}

func TestParse(t *testing.T) {
	dir := tree(t)
	const pin = "Sesame-4829"
	tests := []struct {
		name     string
		provider string // DIR stands for the directory
		err      string // a part of the error; empty: the provider is right

		path  string // of the Selector, below the directory
		text  string // of the Selector, if it is not that of its path
		broad bool
	}{
		{name: "path", provider: "DIR/lib/p11.so", path: "lib/p11.so", broad: true},
		{name: "path of a link", provider: "DIR/lib/in.so", path: "lib/deep/er/p11.so", broad: true},
		{name: "path outside of the list", provider: "DIR/other/p11.so", err: "not in the list"},
		{name: "link out of the list", provider: "DIR/lib/out.so", err: "not in the list"},
		{name: "directory", provider: "DIR/lib/deep", err: "is a directory"},
		{name: "missing", provider: "DIR/lib/missing.so", err: "no such file"},
		{name: "relative", provider: "lib/p11.so", err: "absolute path"},
		{name: "nothing", provider: "", err: "absolute path"},
		{name: "internal", provider: "internal", err: "absolute path"}, // ssh-sk-helper's
		{name: "garbage", provider: "\xff\xfe\x00\x80", err: "absolute path"},
		{name: "zero byte", provider: "DIR/lib/p11.so\x00/etc", err: "invalid argument"},
		{name: "overlong", provider: "/" + strings.Repeat("x", 5000), err: "name too long"},
		{name: "path like a URI with a PIN", provider: "/pkcs11:?pin-value=" + pin, err: "no such file"},
		{name: "scheme misspelled", provider: "pkcs11;token=card?pin-value=" + pin, err: "absolute path"},

		{name: "label of a token", provider: "card", text: "pkcs11:token=card", broad: true},
		{name: "label with blanks", provider: "PIV Card II", text: "pkcs11:token=PIV%20Card%20II", broad: true},
		{name: "label with a letter that is encoded", provider: "a;b", text: "pkcs11:token=a%3Bb", broad: true},
		{name: "label of 32 bytes", provider: strings.Repeat("x", 32), text: "pkcs11:token=" + strings.Repeat("x", 32), broad: true},
		{name: "label of 33 bytes", provider: strings.Repeat("x", 33), err: "32 bytes"},
		{name: "label with a line break", provider: "card\nother", err: "percent-encode"},
		{name: "attribute without a scheme", provider: "token=" + pin, err: "start with"},
		{name: "mistyped attribute without a scheme", provider: "tokn=" + pin, err: "start with"},
		{name: "label with a PIN", provider: "card?pin-value=" + pin, err: "start with"},
		{name: "label with a mistyped PIN", provider: "card?pin-vlaue=" + pin, err: "start with"},
		{name: "URI after something", provider: " pkcs11:token=card?pin-value=" + pin, err: "start with"},
		{name: "file of a module", provider: "opensc-pkcs11.so", err: "absolute path"},
		{name: "file of a module with a version", provider: "libykcs11.so.2", err: "absolute path"},
		{name: "directory of a client", provider: "~card", err: "absolute path"},

		{name: "scheme alone", provider: "pkcs11:", text: "pkcs11:", broad: true},
		{name: "scheme in capitals", provider: "PKCS11:token=card", text: "pkcs11:token=card", broad: true},
		{name: "token", provider: "pkcs11:token=card", text: "pkcs11:token=card", broad: true},
		{name: "key by ID", provider: "pkcs11:id=%01", text: "pkcs11:id=%01"},
		{name: "key by label", provider: "pkcs11:object=one", text: "pkcs11:object=one"},
		{name: "with a PIN", provider: "pkcs11:token=card?pin-value=" + pin, text: "pkcs11:token=card", broad: true},
		{name: "module name", provider: "pkcs11:?module-name=p11", text: "pkcs11:?module-name=p11", broad: true},
		{name: "module path", provider: "pkcs11:?module-path=DIR/lib/p11.so", path: "lib/p11.so", text: "pkcs11:?module-path=DIR/lib/p11.so", broad: true},
		{name: "module path, escaped", provider: "pkcs11:?module-path=DIR/lib/%70%311.so", path: "lib/p11.so", text: "pkcs11:?module-path=DIR/lib/p11.so", broad: true},
		{name: "module path of a link", provider: "pkcs11:id=%01?module-path=DIR/lib/in.so", path: "lib/deep/er/p11.so", text: "pkcs11:id=%01?module-path=DIR/lib/in.so"},
		{name: "module path of a directory", provider: "pkcs11:?module-path=DIR/lib/deep", text: "pkcs11:?module-path=DIR/lib/deep", broad: true},
		{name: "module path outside of the list", provider: "pkcs11:?module-path=DIR/other/p11.so", err: "not in the list"},
		{name: "module path outside of the list, with a PIN", provider: "pkcs11:token=card?module-path=DIR/other/p11.so&pin-value=" + pin, err: "not in the list"},
		{name: "module path of a link out of the list", provider: "pkcs11:?module-path=DIR/lib/out.so", err: "not in the list"},
		{name: "module path with dots", provider: "pkcs11:?module-path=DIR/lib/../other/p11.so", err: "not in the list"},
		{name: "module path of a directory outside of the list", provider: "pkcs11:?module-path=DIR/other", err: "not in the list"},
		{name: "relative module path", provider: "pkcs11:?module-path=lib/p11.so", err: "absolute path"},
		{name: "missing module path", provider: "pkcs11:?module-path=DIR/lib/missing.so", err: "no such file"},
		{name: "module path with a zero byte", provider: "pkcs11:?module-path=DIR/lib/p11.so%00", err: "module-path"},
		{name: "unknown attribute", provider: "pkcs11:tokne=card?pin-value=" + pin, err: "tokne"},
		{name: "unknown attribute of the query", provider: "pkcs11:token=card?colour=red", text: "pkcs11:token=card", broad: true},
		{name: "PIN in the path", provider: "pkcs11:pin-value=" + pin, err: "pin-value"},
		{name: "zero byte in the URI", provider: "pkcs11:token=a\x00b", err: "token"},
		{name: "not UTF-8", provider: "pkcs11:token=%ff", err: "token"},
		{name: "overlong URI", provider: "pkcs11:token=" + strings.Repeat("x", pkcs11uri.MaxLength), err: "longer than"},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			in := func(s string) string { return strings.ReplaceAll(s, "DIR", dir) }
			provider := []byte(in(tt.provider))
			sel, err := Parse(provider, ParseAllowList(in("DIR/lib/*")))
			if tt.err != "" {
				if err == nil {
					t.Fatalf("got %v", sel)
				}
				if !strings.Contains(err.Error(), tt.err) || strings.Contains(err.Error(), pin) {
					t.Errorf("got %v, want %q", err, tt.err)
				}
				return
			}
			if err != nil {
				t.Fatal(err)
			}
			clear(provider) // the caller wipes it
			path, text := "", in(tt.text)
			if tt.path != "" {
				path = filepath.Join(dir, tt.path)
			}
			if text == "" {
				text = path
			}
			if sel.file != path || sel.String() != text {
				t.Errorf("path %q, text %q; want %q, %q", sel.file, sel.String(), path, text)
			}
			if sel.Broad() != tt.broad {
				t.Errorf("broad %v, want %v", sel.Broad(), tt.broad)
			}
			if (sel.URI() == nil) != (tt.text == "") {
				t.Errorf("URI %v", sel.URI())
			}
			if sel.URI() != nil {
				sel.URI().Wipe()
			}
		})
	}
}

// A client that may be on another machine names the label of a token. The client gets the same as
// for the URI of the token.
func TestParseRemoteLabel(t *testing.T) {
	for _, label := range []string{"card", "PIV Card II", "internal", "x/p11.so", "p11.so", "card?pin-source=/etc/passwd", "card?pin-value=1234", ""} {
		uri := (&pkcs11uri.URI{Token: &label}).String()
		sel, err := ParseRemote([]byte(label))
		if err != nil {
			if strings.Contains(err.Error(), "1234") {
				t.Errorf("%q: %v", label, err)
			}
			continue
		}
		want, err := ParseRemote([]byte(uri))
		if err != nil {
			t.Errorf("%q is %v, and its URI is refused: %v", label, sel, err)
			continue
		}
		if sel.String() != want.String() || sel.file != "" || sel.URI().PIN() != nil || sel.URI().PINSource != nil || sel.All() {
			t.Errorf("%q selects %v, and its URI %v", label, sel, want)
		}
	}
}

// A client may not name a command for the PIN. The agent runs no command and starts no module.
func TestParsePINCommand(t *testing.T) {
	for _, text := range []string{
		"pkcs11:token=card?pin-source=|/usr/bin/touch%20x",
		"pkcs11:token=card?pin-source=%7C/usr/bin/touch%20x",
		"pkcs11:token=card?pin-source=credential:card",
	} {
		sel, err := Parse([]byte(text), nil)
		if err == nil || strings.Contains(err.Error(), "touch") {
			t.Errorf("%v, %v", sel, err)
		}
		u, err := pkcs11uri.Parse(text)
		if err != nil {
			t.Fatal(err)
		}
		if err := pin.CheckClientURI(u); err == nil || strings.Contains(err.Error(), "touch") {
			t.Errorf("a client names the source of a PIN: %v", err)
		}
	}
	if sel, err := Parse([]byte("pkcs11:?pin-source=|touch"), nil); err == nil {
		t.Errorf("a command that is no absolute path gives %v", sel)
	}
}
