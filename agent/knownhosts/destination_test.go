package knownhosts

import (
	"os"
	"os/exec"
	"slices"
	"strings"
	"testing"

	"p11-agent/pinentry/plain"
)

var destinations = []struct {
	arguments []string // after ssh
	want      []string
}{
	{[]string{"web1", "echo", "db.example.com"}, []string{"web1"}},
	{[]string{"web1", "ssh", "db.example.com"}, []string{"web1"}},
	{[]string{"me@Web1"}, []string{"web1"}},
	{[]string{"me@db.example.com@web1"}, []string{"web1"}},
	{[]string{"-l", "db.example.com", "web1"}, []string{"web1"}},
	{[]string{"-ldb.example.com", "web1"}, []string{"web1"}},
	{[]string{"-l", "", "web1"}, []string{"web1"}},
	{[]string{"web1", "-l", "db.example.com", "db.example.com"}, []string{"web1"}},
	{[]string{"-J", "db.example.com", "web1"}, []string{"web1"}},
	{[]string{"-W", "db.example.com:22", "web1"}, []string{"web1"}},
	{[]string{"-L", "8080:db.example.com:80", "-R", "1:db.example.com:2", "-D", "1080", "-w", "0:0", "web1"}, []string{"web1"}},
	{[]string{"-o", "ProxyJump=db.example.com", "-o", "SendEnv=db.example.com", "web1"}, []string{"web1"}},
	{[]string{"-oProxyCommand=nc db.example.com 22", "web1"}, []string{"web1"}},
	{[]string{"-b", "127.0.0.1", "-c", "aes128-ctr", "-m", "hmac-sha2-256", "-e", "none", "-S", "none", "-i", "/dev/null", "web1"}, []string{"web1"}},
	{[]string{"-NTqC4v", "web1"}, []string{"web1"}},
	{[]string{"-Tp2222", "web1"}, []string{"[web1]:2222", "web1"}},
	{[]string{"-p", "2222", "web1"}, []string{"[web1]:2222", "web1"}},
	{[]string{"-p", "22", "web1"}, []string{"web1"}},
	{[]string{"web1", "-p", "2222"}, []string{"[web1]:2222", "web1"}},
	{[]string{"-p", "2222", "-o", "Port=3333", "web1"}, []string{"[web1]:2222", "web1"}},
	{[]string{"-oport = 3333", "-p", "2222", "web1"}, []string{"[web1]:3333", "web1"}},
	{[]string{"web1", "--", "-p", "2222"}, []string{"web1"}},
	{[]string{"--", "web1", "-p", "2222"}, []string{"web1"}},
	{[]string{"web1:2222"}, []string{"web1:2222"}},
	{[]string{"ssh://me@web1:2222"}, []string{"[web1]:2222", "web1"}},
	{[]string{"ssh://me@web1:2222/"}, []string{"[web1]:2222", "web1"}},
	{[]string{"ssh://web1"}, []string{"web1"}},
	{[]string{"ssh://[::1]:2222"}, []string{"[::1]:2222", "::1"}},
	{[]string{"-p", "3333", "ssh://me@web1:2222"}, []string{"[web1]:3333", "web1"}},
	{[]string{"-o", "HostName=web1.example.com", "web1"}, []string{"web1.example.com", "web1"}},
	{[]string{"-o", "hostname web1.example.com", "-o", "HostName=db.example.com", "web1"}, []string{"web1.example.com", "web1"}},
	{[]string{"-o", `HostName "web1.example.com"`, "web1"}, []string{"web1.example.com", "web1"}},
	{[]string{"-o", "HostName=%h.example.com", "-p", "2222", "web1"}, []string{"[web1.example.com]:2222", "web1.example.com", "[web1]:2222", "web1"}},
	{[]string{"-o", "HostKeyAlias=Alias", "-p", "2222", "web1"}, []string{"alias", "[web1]:2222", "web1"}},
	{[]string{"::1"}, []string{"::1"}},
	{nil, nil},
	{[]string{"-p"}, nil},
	{[]string{"-p", "2222"}, nil},
	{[]string{"-"}, []string{"-"}},
	{[]string{"-%", "web1"}, nil},
	{[]string{"-T", "--", ""}, nil},
	{[]string{"we\x1b[31mb1"}, nil},
}

func TestDestination(t *testing.T) {
	for _, test := range destinations {
		if got := Destination(append([]string{"ssh"}, test.arguments...)); !slices.Equal(got, test.want) {
			t.Errorf("%q: %q, want %q", test.arguments, got, test.want)
		}
	}
	if got := Destination(nil); got != nil {
		t.Errorf("of nothing: %q", got)
	}
}

// TestDestinationOfSSH asks ssh what it makes of the same arguments.
func TestDestinationOfSSH(t *testing.T) {
	ssh, err := exec.LookPath("ssh")
	if err != nil {
		if os.Getenv("CI") == "true" {
			t.Fatal("this needs ssh, which CI has to provide")
		}
		t.Skip("this needs ssh")
	}
	asked := 0
	for _, test := range destinations {
		cmd := exec.Command(ssh, append([]string{"-G", "-F", "none"}, test.arguments...)...)
		cmd.Env = []string{"HOME=" + t.TempDir()}
		out, err := cmd.Output()
		if err != nil || test.want == nil {
			continue // ssh does not take them, or they name no host
		}
		asked++
		said := make(map[string]string)
		for line := range strings.Lines(string(out)) {
			name, value, _ := strings.Cut(strings.TrimSpace(line), " ")
			said[name] = value
		}
		name := said["hostname"]
		switch {
		case said["hostkeyalias"] != "":
			name = said["hostkeyalias"]
		case said["port"] != "22":
			name = "[" + name + "]:" + said["port"]
		}
		got := Destination(append([]string{"ssh"}, test.arguments...))
		if len(got) == 0 || got[0] != strings.ToLower(name) {
			t.Errorf("%q: %q, but ssh looks for %q", test.arguments, got, name)
		}
	}
	if asked < 25 {
		t.Errorf("ssh took only %d", asked)
	}
}

// FuzzDestination: for any arguments, names can be shown, and each is in an argument
// except for capitals and the port.
func FuzzDestination(f *testing.F) {
	for _, test := range destinations {
		f.Add(strings.Join(test.arguments, "\x00"))
	}
	f.Fuzz(func(t *testing.T, arguments string) {
		names := Destination(append([]string{"ssh"}, strings.Split(arguments, "\x00")...))
		if len(names) > 5 {
			t.Errorf("%d names", len(names))
		}
		for _, n := range names {
			if !plain.PrintsASCII(n) || n == "" {
				t.Errorf("name %q", n)
			}
		}
	})
}
