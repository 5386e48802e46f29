package knownhosts

import (
	"crypto/rand"
	"crypto/rsa"
	"encoding/base64"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"golang.org/x/crypto/ssh"

	"p11-agent/agent/sshkey/keytest"
	"p11-agent/pinentry/plain"
)

func line(hosts string, key ssh.PublicKey) string {
	return fmt.Sprintf("%s %s %s\n", hosts, key.Type(), base64.StdEncoding.EncodeToString(key.Marshal()))
}

func write(t testing.TB, path, text string) string {
	t.Helper()
	if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	return path
}

func guesses(names ...string) func() []string { return func() []string { return names } }

func TestLookup(t *testing.T) {
	key, other := keytest.New(t).Public, keytest.New(t).Public
	authority := keytest.New(t).Signer
	certify := func(kind uint32, until time.Time, names ...string) *ssh.Certificate {
		c := &ssh.Certificate{Key: key, CertType: kind, ValidPrincipals: names, ValidBefore: uint64(until.Unix())}
		if err := c.SignCert(rand.Reader, authority); err != nil {
			t.Fatal(err)
		}
		return c
	}
	later := time.Now().Add(time.Hour)
	withOption := certify(ssh.HostCert, later, "www.example.org")
	withOption.CriticalOptions = map[string]string{"x": ""}
	if err := withOption.SignCert(rand.Reader, authority); err != nil {
		t.Fatal(err)
	}
	private, err := rsa.GenerateKey(rand.Reader, 2048)
	if err != nil {
		t.Fatal(err)
	}
	rsaAuthority, err := ssh.NewSignerFromKey(private)
	if err != nil {
		t.Fatal(err)
	}
	sha1, err := ssh.NewSignerWithAlgorithms(rsaAuthority.(ssh.AlgorithmSigner), []string{ssh.KeyAlgoRSA})
	if err != nil {
		t.Fatal(err)
	}
	withSHA1 := certify(ssh.HostCert, later, "www.example.org")
	if err := withSHA1.SignCert(rand.Reader, sha1); err != nil {
		t.Fatal(err)
	}
	forged := certify(ssh.HostCert, later, "www.example.org")
	forged.KeyId = "changed"
	for name, test := range map[string]struct {
		file    string
		key     ssh.PublicKey
		guesses []string
		want    Known
	}{
		"a name":                               {line("example.org", key), key, nil, Known{Names: []string{"example.org"}}},
		"several names":                        {line("example.org,192.0.2.1", key), key, nil, Known{Names: []string{"example.org", "192.0.2.1"}}},
		"the one that was typed":               {line("example.org,192.0.2.1", key), key, []string{"192.0.2.1"}, Known{Names: []string{"192.0.2.1", "example.org"}}},
		"several lines":                        {line("a", key) + line("b", other) + line("c", key), key, nil, Known{Names: []string{"a", "c"}}},
		"another key":                          {line("example.org", other), key, []string{"example.org"}, Known{}},
		"a port":                               {line("[example.org]:2222", key), key, nil, Known{Names: []string{"[example.org]:2222"}}},
		"a pattern":                            {line("*.example.org", key), key, nil, Known{Names: []string{"*.example.org"}}},
		"a pattern and its name":               {line("*.example.org", key), key, []string{"www.example.org", "www.example.com"}, Known{Names: []string{"*.example.org"}}},
		"a pattern for any name":               {line("*", key), key, []string{"ssh", "www.example.org"}, Known{Names: []string{"*"}}},
		"the pattern that was said":            {line("a,*.example.com,*.example.org", key), key, []string{"www.example.org"}, Known{Names: []string{"*.example.org", "a", "*.example.com"}}},
		"a name that is excepted":              {line("a,!a,b", key), key, []string{"a"}, Known{Names: []string{"b"}}},
		"nothing but exceptions":               {line("!a,!*.b", key), key, []string{"c"}, Known{}},
		"the likelier guess":                   {line("a,b,c", key), key, []string{"c", "b"}, Known{Names: []string{"c", "b", "a"}}},
		"a hash among names":                   {line("a,|1|"+strings.Repeat("A", 27)+"=|"+strings.Repeat("A", 27)+"=", key), key, nil, Known{Names: []string{"a", "|1|" + strings.Repeat("A", 27) + "=|" + strings.Repeat("A", 27) + "="}}},
		"names behind a hash":                  {line("|1|"+strings.Repeat("A", 27)+"=|"+strings.Repeat("A", 27)+"=,a", key), key, []string{"a"}, Known{}},
		"a pattern that is too long":           {line("a,"+strings.Repeat("b", 1023), key), key, nil, Known{}},
		"not by the pattern":                   {line("*.example.org,!www.example.org", key), key, []string{"www.example.org"}, Known{Names: []string{"*.example.org"}}},
		"revoked":                              {"@revoked " + line("*", key), key, nil, Known{Revoked: true}},
		"an unknown marker":                    {"@odd " + line("example.org", key), key, nil, Known{}},
		"an authority is no host":              {"@cert-authority " + line("example.org", key), key, nil, Known{}},
		"a broken line":                        {"example.org ssh-ed25519 AAAA\n" + line("a", key), key, nil, Known{Names: []string{"a"}}},
		"a comment":                            {"# " + line("example.org", key), key, nil, Known{}},
		"control characters":                   {line("a\x1b[31m,b", key), key, nil, Known{Names: []string{"b"}}},
		"a bidirectional name":                 {line("a\u202eb", key), key, nil, Known{}},
		"nothing":                              {"", key, nil, Known{}},
		"a certificate":                        {"@cert-authority " + line("*.example.org", authority.PublicKey()), certify(ssh.HostCert, later, "www.example.org", "www.example.com"), nil, Known{Names: []string{"www.example.org"}}},
		"a certificate of a user":              {"@cert-authority " + line("*", authority.PublicKey()), certify(ssh.UserCert, later, "www.example.org"), nil, Known{}},
		"a certificate of the past":            {"@cert-authority " + line("*", authority.PublicKey()), certify(ssh.HostCert, time.Now().Add(-time.Hour), "www.example.org"), nil, Known{}},
		"no authority":                         {line("*", authority.PublicKey()), certify(ssh.HostCert, later, "www.example.org"), nil, Known{}},
		"a revoked authority":                  {"@revoked " + line("*", authority.PublicKey()), certify(ssh.HostCert, later, "www.example.org"), nil, Known{Revoked: true}},
		"a certificate without names":          {"@cert-authority " + line("*", authority.PublicKey()), certify(ssh.HostCert, later), []string{"www.example.org"}, Known{}},
		"a certificate for a pattern":          {"@cert-authority " + line("*.example.org,a.example.com", authority.PublicKey()), certify(ssh.HostCert, later, "*.example.org"), []string{"www.example.org"}, Known{Names: []string{"*.example.org"}}},
		"the narrower pattern":                 {"@cert-authority " + line("*.example.org", authority.PublicKey()), certify(ssh.HostCert, later, "w*.example.org", "*"), nil, Known{Names: []string{"w*.example.org", "*.example.org"}}},
		"a name that fits a principal":         {"@cert-authority " + line("a.example.org,b.example.com", authority.PublicKey()), certify(ssh.HostCert, later, "*.example.org"), nil, Known{Names: []string{"a.example.org"}}},
		"patterns apart":                       {"@cert-authority " + line("*.example.com", authority.PublicKey()), certify(ssh.HostCert, later, "*.example.org"), nil, Known{}},
		"a certified port":                     {"@cert-authority " + line("[*.example.org]:2222", authority.PublicKey()), certify(ssh.HostCert, later, "www.example.org"), nil, Known{Names: []string{"[www.example.org]:2222"}}},
		"a pattern with a port":                {"@cert-authority " + line("[*.example.org]:2222", authority.PublicKey()), certify(ssh.HostCert, later, "www.*"), nil, Known{Names: []string{"[www.*]:*"}}},
		"a principal in capitals":              {"@cert-authority " + line("*", authority.PublicKey()), certify(ssh.HostCert, later, "WWW.example.org"), nil, Known{}},
		"an authority for all but a name":      {"@cert-authority " + line("*,!www.example.org", authority.PublicKey()), certify(ssh.HostCert, later, "www.example.org", "a"), nil, Known{Names: []string{"a"}}},
		"a certificate with options":           {"@cert-authority " + line("*", authority.PublicKey()), withOption, nil, Known{}},
		"a certificate with SHA-1":             {"@cert-authority " + line("*", rsaAuthority.PublicKey()), withSHA1, nil, Known{}},
		"a certificate with a wrong signature": {"@cert-authority " + line("*", authority.PublicKey()), forged, nil, Known{}},
		"a revoked certificate":                {"@revoked " + line("*", certify(ssh.HostCert, later, "x")), key, nil, Known{Revoked: true}},
		"a certificate in place of a key":      {line("a", certify(ssh.HostCert, later, "x")), key, nil, Known{}},
		"the key of a certificate":             {line("a", key), certify(ssh.HostCert, later, "www.example.org"), nil, Known{Names: []string{"a"}}},
	} {
		t.Run(name, func(t *testing.T) {
			f := New(write(t, filepath.Join(t.TempDir(), "known_hosts"), test.file))
			if got := f.Lookup(test.key, guesses(test.guesses...)); !slices.Equal(got.Names, test.want.Names) || got.Hashed != test.want.Hashed || got.Revoked != test.want.Revoked {
				t.Errorf("%+v, want %+v", got, test.want)
			}
		})
	}
}

// Names that ssh-keygen -H has hashed are found by guessing, and by nothing else.
func TestHashed(t *testing.T) {
	if _, err := exec.LookPath("ssh-keygen"); err != nil {
		if os.Getenv("CI") == "true" {
			t.Fatal("this needs ssh-keygen, which CI has to provide")
		}
		t.Skip("this needs ssh-keygen")
	}
	key := keytest.New(t).Public
	file := write(t, filepath.Join(t.TempDir(), "known_hosts"), line("example.org,[example.org]:2222", key)+line("other.example.org", keytest.New(t).Public))
	if out, err := exec.Command("ssh-keygen", "-q", "-H", "-f", file).CombinedOutput(); err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	if b, err := os.ReadFile(file); err != nil || strings.Contains(string(b), "example") {
		t.Fatalf("not hashed (%v): %s", err, b)
	}
	for _, test := range []struct {
		guesses []string
		want    []string
	}{
		{nil, nil},
		{[]string{"other.example.org"}, nil},
		{[]string{"nobody", "Example.ORG"}, []string{"Example.ORG"}},
		{Guesses([]string{"ssh", "-p", "2222", "me@example.org", "ls"}), []string{"example.org", "[example.org]:2222"}},
		{Guesses([]string{"ssh", "-p2222", "example.org"}), []string{"example.org", "[example.org]:2222"}},
		{Guesses([]string{"ssh", "ssh://me@example.org:2222/x"}), []string{"example.org", "[example.org]:2222"}},
	} {
		got := New(file).Lookup(key, guesses(test.guesses...))
		if !slices.Equal(got.Names, test.want) || got.Hashed != (len(test.want) == 0) {
			t.Errorf("guessing %q: %+v, want %q", test.guesses, got, test.want)
		}
	}
	// What was proved once need not be said again, until the file changes.
	f := New(file)
	f.Lookup(key, guesses("example.org"))
	if got := f.Lookup(key, nil); !slices.Equal(got.Names, []string{"example.org"}) {
		t.Errorf("the second time: %+v", got)
	}
	write(t, file, line("another.example.org", key))
	if got := f.Lookup(key, nil); !slices.Equal(got.Names, []string{"another.example.org"}) {
		t.Errorf("when the file has changed: %+v", got)
	}
	if got := New(file).Lookup(keytest.New(t).Public, nil); got.Hashed || got.Names != nil {
		t.Errorf("a key that is not there: %+v", got)
	}
}

// A file that others can change, or that is not a regular file, tells nothing.
func TestNotBelieved(t *testing.T) {
	key := keytest.New(t).Public
	dir := t.TempDir()
	file := write(t, filepath.Join(dir, "known_hosts"), line("example.org", key))
	if err := os.Chmod(file, 0o666); err != nil {
		t.Fatal(err)
	}
	if got := New(file, dir, filepath.Join(dir, "missing"), os.DevNull).Lookup(key, nil); got.Names != nil {
		t.Errorf("%+v", got)
	}
	if os.Geteuid() != 0 {
		return
	}
	if err := os.Chmod(file, 0o600); err != nil {
		t.Fatal(err)
	}
	if got := New(file).Lookup(key, nil); len(got.Names) != 1 {
		t.Fatalf("own file: %+v", got)
	}
	if err := os.Chown(file, 65534, 65534); err != nil {
		t.Fatal(err)
	}
	if got := New(file).Lookup(key, nil); got.Names != nil {
		t.Errorf("the file of another user: %+v", got)
	}
}

// A change of a file counts at once: ssh writes the name of a new host there just
// before it logs in.
func TestChange(t *testing.T) {
	key := keytest.New(t).Public
	file := filepath.Join(t.TempDir(), "known_hosts")
	f := New(file)
	if got := f.Lookup(key, nil); got.Names != nil {
		t.Fatalf("%+v", got)
	}
	for _, text := range []string{line("example.org", key), line("example.org,192.0.2.1", key), line("example.org", keytest.New(t).Public), ""} {
		write(t, file, text)
		if got, want := f.Lookup(key, nil), New(file).Lookup(key, nil); !slices.Equal(got.Names, want.Names) {
			t.Errorf("%+v, want %+v", got, want)
		}
	}
}

func TestGuesses(t *testing.T) {
	for _, test := range []struct {
		words []string
		want  []string
	}{
		{[]string{"ssh", "-o", "SendEnv=GIT_PROTOCOL", "git@github.com", "git-receive-pack 'a/b.git'"}, []string{"ssh", "git_protocol", "github.com"}},
		{[]string{"scp", "a", "me@host:dir/file"}, []string{"scp", "a", "host"}},
		{[]string{"Host", "*.example.org", "HostName", "10.0.0.1", "Port", "22"}, []string{"host", "hostname", "10.0.0.1", "[host]:22", "[hostname]:22", "[10.0.0.1]:22"}},
		{[]string{"rsync://host/x", "fe80::1", "[fe80::2]"}, []string{"host", "fe80::1", "fe80::2"}},
	} {
		got := Guesses(test.words)
		for _, want := range test.want {
			if !slices.Contains(got, want) && want != "port" {
				t.Errorf("%q: %q is not in %q", test.words, want, got)
			}
		}
	}
	many := make([]string, 10*maxWords)
	for i := range many {
		many[i] = fmt.Sprintf("host%d", i)
	}
	if n := len(Guesses(append([]string{"1", "2", "3", "4", "5", "6", "7", "8", "9", "10"}, many...))); n > maxGuesses {
		t.Errorf("%d guesses", n)
	}
}

func TestConfigWords(t *testing.T) {
	dir := t.TempDir()
	file := write(t, filepath.Join(dir, "config"), "Host a\n\tHostName b.example.org\nInclude config.d/*\n")
	if err := os.Mkdir(filepath.Join(dir, "config.d"), 0o700); err != nil {
		t.Fatal(err)
	}
	write(t, filepath.Join(dir, "config.d", "more"), "HostName=c.example.org\n")
	got := Guesses(ConfigWords(file))
	for _, want := range []string{"a", "b.example.org", "c.example.org"} {
		if !slices.Contains(got, want) {
			t.Errorf("%q is not in %q", want, got)
		}
	}
	if got := ConfigWords(filepath.Join(t.TempDir(), "config")); got != nil {
		t.Errorf("%q come from nowhere", got)
	}
}

// FuzzParse: for any content of a file, names are printable and few, and each is in the
// file or was guessed.
func FuzzParse(f *testing.F) {
	key := keytest.New(f).Public
	for _, hosts := range []string{"a", "*.b,!c", "|1|AAAA|BBBB", "@revoked d", "@cert-authority *", "[e]:22,f", strings.Repeat("g,", 100) + "h"} {
		f.Add([]byte(line(hosts, key)), "guess")
	}
	f.Fuzz(func(t *testing.T, file []byte, guess string) {
		entries := make(map[string][]entry)
		parse(file, entries)
		fs := &Files{entries: entries, proved: make(map[string]string)}
		got := fs.Lookup(key, guesses(guess))
		if len(got.Names) > maxNames {
			t.Errorf("%d names", len(got.Names))
		}
		for _, n := range got.Names {
			if !plain.PrintsASCII(n) || n != guess && !strings.Contains(string(file), n) {
				t.Errorf("name %q", n)
			}
		}
	})
}
