package daemon

import (
	"crypto/ed25519"
	"os/exec"
	"strconv"
	"strings"
	"testing"
	"time"

	"golang.org/x/crypto/ssh"
)

// Times are those of sshd_config(5), TIME FORMATS.
func TestParseLifetime(t *testing.T) {
	for text, want := range map[string]time.Duration{
		"0": 0, "90": 90 * time.Second, "90s": 90 * time.Second, "10m": 10 * time.Minute, "1h30m": 90 * time.Minute, "1H30M": 90 * time.Minute,
		"2d": 48 * time.Hour, "1w2d": 9 * 24 * time.Hour, "1h30": time.Hour + 30*time.Second, "2147483648s": -1,
	} {
		got, err := ParseLifetime(text)
		if want < 0 {
			if err == nil {
				t.Errorf("%q is %v", text, got)
			}
			continue
		}
		if err != nil || got != want {
			t.Errorf("%q: got %v, %v; want %v", text, got, err, want)
		}
	}
	for _, text := range []string{"", "never", "h", "1x", "-1", "1s1s", "1s1", "1 h", "1.5h", "99999w", "9999999999"} {
		if got, err := ParseLifetime(text); err == nil || !strings.Contains(err.Error(), strconv.Quote(text)) {
			t.Errorf("%q: got %v, %v", text, got, err)
		}
	}
}

func TestFingerprints(t *testing.T) {
	pub, err := ssh.NewPublicKey(ed25519.PublicKey(make([]byte, ed25519.PublicKeySize)))
	if err != nil {
		t.Fatal(err)
	}
	for hash, want := range map[string]string{"sha256": ssh.FingerprintSHA256(pub), "SHA256": ssh.FingerprintSHA256(pub), "md5": "MD5:" + ssh.FingerprintLegacyMD5(pub)} {
		name, err := Fingerprints(hash)
		if err != nil || name(pub) != want {
			t.Errorf("%s: %v", hash, err)
		}
	}
	if _, err := Fingerprints("sha1"); err == nil || err.Error() != `unknown fingerprint hash "sha1": use sha256 or md5` {
		t.Errorf("got %v", err)
	}
}

// EndNamed ends one process, and no group of processes.
func TestEndNamed(t *testing.T) {
	for pid, want := range map[string]string{
		"": "no agent to end: SSH_AGENT_PID is not set", "x": `no agent to end: SSH_AGENT_PID is "x", not the ID of a process`,
		"0": `no agent to end: SSH_AGENT_PID is "0", not the ID of a process`, "-5": `no agent to end: SSH_AGENT_PID is "-5", not the ID of a process`,
		"1": `no agent to end: SSH_AGENT_PID is "1", not the ID of a process`,
	} {
		t.Setenv("SSH_AGENT_PID", pid)
		if got, err := EndNamed(); err == nil || err.Error() != want || got != 0 {
			t.Errorf("%q: got %d, %v; want %s", pid, got, err, want)
		}
	}
	cmd := exec.Command("sleep", "60")
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Setenv("SSH_AGENT_PID", strconv.Itoa(cmd.Process.Pid))
	if got, err := EndNamed(); err != nil || got != cmd.Process.Pid {
		t.Errorf("got %d, %v", got, err)
		_ = cmd.Process.Kill()
	}
	if err := cmd.Wait(); err == nil || err.Error() != "signal: terminated" {
		t.Errorf("the process ends with %v", err)
	}
	if _, err := EndNamed(); err == nil || !strings.HasPrefix(err.Error(), "end the agent with process ID "+strconv.Itoa(cmd.Process.Pid)+": ") {
		t.Errorf("after its end: got %v", err)
	}
}
