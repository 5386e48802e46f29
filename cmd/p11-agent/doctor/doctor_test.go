package doctor

import (
	"encoding/json"
	"errors"
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"p11-agent/cmd/p11-agent/probe"
	"p11-agent/systemd"
	"p11-agent/token"
	"p11-agent/token/pcsc"
	"p11-agent/token/pin"
	"p11-agent/token/tokentest"
	"p11-agent/token/wire"
)

// printed is what a person reads of a report.
func printed(t *testing.T, r *Group) string {
	t.Helper()
	var b strings.Builder
	if err := r.Print(&b, false); err != nil {
		t.Fatal(err)
	}
	return b.String()
}

// wantLines fails the test unless the text has each of the lines.
func wantLines(t *testing.T, text string, lines ...string) {
	t.Helper()
	for _, want := range lines {
		if !strings.Contains("\n"+text, "\n"+want) {
			t.Errorf("no line begins with %q in:\n%s", want, text)
		}
	}
}

var openSC = token.ModuleStatus{Name: "opensc-pkcs11", Path: "/usr/lib/opensc-pkcs11.so", Library: "OpenSC"}

// pcscd hangs up on users that polkit does not let in. The rule that is printed
// is one that polkit takes.
func TestDoctorPolkit(t *testing.T) {
	socket := filepath.Join(tokentest.TempDir(t), "pcscd.comm")
	l, err := net.Listen("unix", socket)
	if err != nil {
		t.Fatal(err)
	}
	done := make(chan struct{})
	go func() {
		defer close(done)
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			_ = c.Close()
		}
	}()
	defer func() { _ = l.Close(); <-done }()
	t.Setenv("PCSCLITE_CSOCK_NAME", socket)
	d := probe.AskPCSCD(t.Context())
	if !errors.Is(d.Err, pcsc.ErrRefused) {
		t.Fatalf("the daemon refuses, and is said to: %v", d.Err)
	}
	for _, uid := range []int{0, 1000} {
		d.UID = uid
		r := new(Group)
		findCards(t.Context(), r, d, []token.ModuleStatus{openSC})
		text := printed(t, r)
		if uid == 0 {
			wantLines(t, text, "problem: pcscd hangs up without an answer", "  next: "+restartStep("pcscd", "pcscd.socket pcscd.service", "; "))
			continue
		}
		wantLines(
			t, text,
			"problem: pcscd refuses you the readers (polkit admits a person at the machine only; sessions of ssh, tmux,",
			"  next: sudo tee /etc/polkit-1/rules.d/30-p11-agent.rules <<'END'",
			`            if ((action.id == "org.debian.pcsc-lite.access_pcsc" ||`,
			`                subject.user == "`+userName()+`") {`,
			"        END",
			"  next: "+restartStep("polkit and pcscd", "polkit pcscd.socket", ""),
		)
	}
}

// What pcscd's answers mean, with and without something plugged in.
func TestDoctorCards(t *testing.T) {
	card := token.ModuleStatus{Name: "opensc-pkcs11", Path: openSC.Path, Library: "OpenSC", Tokens: []token.TokenStatus{{Slot: "Some Reader 00 00"}}}
	soft := token.ModuleStatus{Name: "softhsm2", Path: "/usr/lib/libsofthsm2.so", Library: "SoftHSM", Tokens: []token.TokenStatus{{Slot: "SoftHSM slot"}}}
	refused := &net.OpError{Op: "dial", Err: os.ErrNotExist}
	t.Setenv("PATH", t.TempDir()) // no pkcheck
	start := "  next: sudo pcscd  # systemd does not run here"
	if systemd.Booted() {
		start = "  next: sudo systemctl enable --now pcscd.socket\n"
	}
	for _, tt := range []struct {
		name    string
		d       probe.PCSCD
		modules []token.ModuleStatus
		want    []string
	}{
		{"no daemon, nothing needs it", probe.PCSCD{Err: refused}, []token.ModuleStatus{soft}, []string{"ok: pcscd does not run, and no module needs it"}},
		{"no daemon", probe.PCSCD{Err: refused, Socket: "/run/x"}, []token.ModuleStatus{openSC}, []string{
			"warning: pcscd does not run (no program listens at /run/x), so no smart card and no security key can be seen\n", start,
		}},
		{"no daemon, a key is plugged in", probe.PCSCD{Err: refused, USB: []string{"Yubico YubiKey"}}, []token.ModuleStatus{openSC}, []string{
			"problem: pcscd does not run (no program listens at ), so no smart card and no security key can be seen, and Yubico YubiKey is plugged in\n",
		}},
		{"no driver", probe.PCSCD{USB: []string{"Yubico YubiKey"}}, []token.ModuleStatus{openSC}, []string{
			"problem: Yubico YubiKey is plugged in, and pcscd has no reader: the driver is missing\n", "  next: install the package libccid (Debian's name; Fedora's is pcsc-lite-ccid)\n",
		}},
		{"no reader", probe.PCSCD{}, []token.ModuleStatus{openSC}, []string{"warning: pcscd runs, and no reader or security key is plugged in\n", "  next: plug one in"}},
		{"no reader, other tokens", probe.PCSCD{}, []token.ModuleStatus{openSC, soft}, []string{"ok: pcscd runs, and no reader"}},
		{"other language", probe.PCSCD{Err: pcsc.ErrLanguage}, nil, []string{"problem: pcscd and this program do not agree", "  next: " + restartStep("pcscd", "pcscd.socket pcscd.service", "") + "  # an upgrade"}},
		{"not for us", probe.PCSCD{Err: os.ErrPermission, Socket: "/run/x"}, nil, []string{"problem: pcscd's socket /run/x may not be used by you\n", "  next: ls -l /run/x"}},
		{"a card", probe.PCSCD{Readers: []pcsc.Reader{{Name: "Some Reader 00 00", Card: true}, {Name: "Other 00 00"}}}, []token.ModuleStatus{card}, []string{
			`ok: reader "Some Reader 00 00" has a card`, `ok: reader "Other 00 00" is empty`,
		}},
		{"an unknown card", probe.PCSCD{Readers: []pcsc.Reader{{Name: "Other 00 00", Card: true}}}, []token.ModuleStatus{card}, []string{
			`warning: the card in reader "Other 00 00" is recognised by no module`, "  next: opensc-tool --reader 'Other 00 00' --name",
		}},
		{"no module for cards", probe.PCSCD{Readers: []pcsc.Reader{{Name: "Other 00 00", Card: true}}}, []token.ModuleStatus{soft}, []string{
			`problem: the card in reader "Other 00 00" is seen by no module: none for smart cards is installed`, "  next: install the package opensc-pkcs11",
		}},
		{"kept by an unknown program", probe.PCSCD{Readers: []pcsc.Reader{{Name: "Other 00 00", Card: true, Users: pcsc.Exclusive}}, Socket: "/run/x"}, []token.ModuleStatus{card}, []string{
			`warning: the card in reader "Other 00 00" is kept by another program` + "\n", "  next: sudo fuser -v /run/x",
		}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			r := new(Group)
			findCards(t.Context(), r, tt.d, tt.modules)
			wantLines(t, printed(t, r), tt.want...)
		})
	}
}

// polkit may let a user see readers, and not use the cards in them.
func TestDoctorCardRefused(t *testing.T) {
	dir := t.TempDir()
	script := "#!/bin/sh\n[ \"$2\" = org.debian.pcsc-lite.access_card ] || exit 3\nexit $(cat " + dir + "/status)\n"
	if err := os.WriteFile(filepath.Join(dir, "pkcheck"), []byte(script), 0o700); err != nil {
		t.Fatal(err)
	}
	t.Setenv("PATH", dir+":"+os.Getenv("PATH"))
	for status, want := range map[string]string{
		"0": "warning: the card in reader", "1": "problem: pcscd shows the card in reader", "2": "problem: pcscd shows", "127": "warning: the card in reader",
	} {
		if err := os.WriteFile(filepath.Join(dir, "status"), []byte(status), 0o600); err != nil {
			t.Fatal(err)
		}
		r := new(Group)
		findCards(t.Context(), r, probe.PCSCD{Readers: []pcsc.Reader{{Name: "R", Card: true}}}, []token.ModuleStatus{openSC})
		wantLines(t, printed(t, r), want)
	}
}

// What the flags of a token mean, and what is typed next.
func TestDoctorTokens(t *testing.T) {
	const usual = wire.CKFLoginRequired | wire.CKFUserPINInitialized
	for _, tt := range []struct {
		name   string
		module string
		token  token.TokenStatus
		want   []string
	}{
		{"no PIN set", "/m.so", token.TokenStatus{Flags: wire.CKFLoginRequired}, []string{
			`problem: no PIN was ever set for token "it's" (serial 1)`, `  next: pkcs11-tool --module /m.so --token-label 'it'\''s' --login --login-type so --init-pin`,
		}},
		{"to be changed", "/m.so", token.TokenStatus{Flags: usual | wire.CKFUserPINToBeChanged}, []string{
			`warning: token "it's" (serial 1) wants a new PIN`, "  next: pkcs11-tool --module /m.so --token-label 'it'\\''s' --login --change-pin",
		}},
		{"locked", "/m.so", token.TokenStatus{Flags: usual, Tries: pin.TriesNone}, []string{
			"problem: the PIN of token", "  next: pkcs11-tool --module /m.so --token-label 'it'\\''s' --login --login-type so --init-pin",
		}},
		{"locked card", "/opensc-pkcs11.so", token.TokenStatus{Flags: usual, Tries: pin.TriesNone}, []string{"problem: ", "  next: pkcs15-tool --unblock-pin "}},
		{"locked YubiKey", "/libykcs11.so.2", token.TokenStatus{Flags: usual, Tries: pin.TriesNone}, []string{"problem: ", "  next: ykman piv access unblock-pin "}},
		{"locked TPM", "/libtpm2_pkcs11.so", token.TokenStatus{Flags: usual, Tries: pin.TriesNone}, []string{"problem: ", "  next: wait, as a TPM forgets wrong PINs with time, or: tpm2_dictionarylockout --clear-lockout"}},
		{"no keys", "/m.so", token.TokenStatus{Flags: usual}, []string{`ok: token "it's" (serial 1): 0 keys`, "  next: pkcs11-tool --module /m.so --token-label 'it'\\''s' --login --keypairgen"}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			tt.token.ID = wire.TokenID{Label: "it's", Serial: "1"}
			r := new(Group)
			findTokens(r, []token.ModuleStatus{{Path: tt.module, Tokens: []token.TokenStatus{tt.token}}})
			wantLines(t, printed(t, r), tt.want...)
		})
	}
}

// Text of a module or a file stays on its line.
func TestReportIsNotForged(t *testing.T) {
	r := &Group{Name: "g"}
	r.bad("module %s: %v", "x", "first\nok: all is well\x1b[2J").Next("%s", "one\ntwo\x07")
	want := `problem: module x: first ok: all is well\x1b[2J` + "\n  next: one\n        two\\x07\n"
	if got := printed(t, r); got != want {
		t.Errorf("got %q, want %q", got, want)
	}
	var b strings.Builder
	if err := (Groups{r}).PrintJSON(&b); err != nil {
		t.Fatal(err)
	}
	var all struct {
		Problems int
		Findings []struct {
			Group, Level, Text string
			Next               []string
		}
	}
	if err := json.Unmarshal([]byte(b.String()), &all); err != nil || all.Problems != 1 || len(all.Findings) != 1 || all.Findings[0].Level != "problem" || len(all.Findings[0].Next) != 1 {
		t.Errorf("got %+v, %v", all, err)
	}
}

func TestDoctorClock(t *testing.T) {
	file := filepath.Join(t.TempDir(), "status")
	if err := os.WriteFile(file, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	now := time.Date(2030, 5, 6, 7, 8, 0, 0, time.UTC)
	if err := os.Chtimes(file, now, now); err != nil {
		t.Fatal(err)
	}
	for _, tt := range []struct {
		name string
		now  time.Time
		want string
	}{
		{"well", now.Add(time.Hour), ""},
		{"a little behind, as with another time zone's file", now.Add(-30 * time.Minute), ""},
		{"behind", now.Add(-48 * time.Hour), "warning: the clock says 2030-05-04 07:08, and " + file + " was changed later"},
		{"never set", time.Unix(0, 0), "warning: the clock says 1970-01-01, which is wrong"},
		{"far ahead", now.AddDate(100, 0, 0), "warning: the clock says 2130-05-06, which is wrong"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			r := new(Group)
			findClock(r, tt.now, []string{"/no/such/file", file})
			text := printed(t, r)
			if tt.want == "" && text != "" || !strings.HasPrefix(text, tt.want) || tt.want != "" && !strings.Contains(text, "\n  next: sudo timedatectl set-ntp true") {
				t.Errorf("got %q, want %q", text, tt.want)
			}
		})
	}
}

func TestDoctorProgramFile(t *testing.T) {
	file := filepath.Join(t.TempDir(), "program")
	if err := os.WriteFile(file, nil, 0o755); err != nil {
		t.Fatal(err)
	}
	owner := os.Geteuid()
	for _, tt := range []struct {
		name string
		uid  int
		want string
	}{
		{"the owner", owner, ""},
		{"root", 0, ""},
		{"another user", owner + 1, "warning: other programs of yours can look into the agent while it starts"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			r := new(Group)
			findProgramFile(r, file, tt.uid)
			if text := printed(t, r); tt.want == "" && text != "" || !strings.HasPrefix(text, tt.want) {
				t.Errorf("got %q, want %q", text, tt.want)
			}
		})
	}
}
