package certdir

import (
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/crypto/ssh"

	"p11-agent/agent/sshkey/keytest"
)

// A directory that grows without end costs no more than its limit.
func TestCertificateDirLimit(t *testing.T) {
	k, ca := keytest.New(t), keytest.New(t)
	dir := t.TempDir()
	text := ssh.MarshalAuthorizedKey(k.Certificate(t, ca, ssh.UserCert, nil))
	for i := range maxFiles + 5 {
		if err := os.WriteFile(filepath.Join(dir, fmt.Sprintf("%d.pub", i)), text, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	log := new(strings.Builder)
	d := New(dir, slog.New(slog.NewTextHandler(log, nil)))
	if n := len(d.Certificates()); n != maxFiles || !strings.Contains(log.String(), "not all certificates") {
		t.Errorf("%d certificates, the log has %s", n, log)
	}
}
