package probe

import (
	"context"
	"errors"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

// A program that does not come back costs its time and no more, and takes what it
// has started along.
func TestRunEnds(t *testing.T) {
	ctx, cancel := context.WithCancel(t.Context())
	dir := t.TempDir()
	fifo := filepath.Join(dir, "fifo")
	if err := exec.Command("mkfifo", fifo).Run(); err != nil {
		t.Fatal(err)
	}
	ended := make(chan error, 1)
	go func() {
		// Opened when the program's child has it open, too, and at its end when all have
		// gone.
		f, err := os.Open(fifo)
		if err == nil {
			cancel()
			_, err = io.Copy(io.Discard, f)
		}
		ended <- err
	}()
	if _, err := Run(ctx, "sh", "-c", "sleep 100 >"+fifo+" & wait"); err == nil || !strings.Contains(err.Error(), "does not answer") {
		t.Errorf("got %v", err)
	}
	select {
	case err := <-ended:
		if err != nil {
			t.Error(err)
		}
	case <-time.After(30 * time.Second):
		t.Fatal("what it has started goes on")
	}
	s, err := Run(t.Context(), "sh", "-c", "head -c 3000000 /dev/zero; echo oh >&2; exit 3")
	if err != nil || s.Status == nil || len(s.Out) != maxOutput || s.Err != "oh" {
		t.Errorf("%d bytes, %q, %v, %v", len(s.Out), s.Err, s.Status, err)
	}
	if _, err := Run(t.Context(), "no-such-program-anywhere"); !errors.Is(err, exec.ErrNotFound) {
		t.Errorf("got %v", err)
	}
}

// An agent is called old when the program was installed after its start.
func TestStartedBefore(t *testing.T) {
	started, ok := startOf(os.Getpid())
	if age := time.Since(started); !ok || age < -2*time.Second || age > time.Hour {
		t.Errorf("this process was started %v ago (%v)", age, ok)
	}
	if startedBefore(os.Getpid(), "/proc/self/exe") || startedBefore(os.Getpid(), "/no/such/file") || startedBefore(0, "/proc/self/exe") {
		t.Error("this process is older than its program, or what is not there is")
	}
	if now := time.Now(); older(now, now.Add(2*time.Second)) || older(now.Add(time.Hour), now) || !older(now, now.Add(time.Hour)) {
		t.Error("wrong about which is older")
	}
}

func TestUSBReaders(t *testing.T) {
	dir := t.TempDir()
	for file, text := range map[string]string{
		"1-1/manufacturer": "Yubico\n", "1-1/product": "YubiKey OTP+FIDO+CCID\n",
		"1-1:1.0/bInterfaceClass": "03\n", "1-1:1.2/bInterfaceClass": "0b\n",
		"1-2:1.0/bInterfaceClass": "0b\n", "1-3:1.0/bInterfaceClass": "08\n", "1-3/product": "Stick\n",
	} {
		file = filepath.Join(dir, file)
		if err := errors.Join(os.MkdirAll(filepath.Dir(file), 0o700), os.WriteFile(file, []byte(text), 0o600)); err != nil {
			t.Fatal(err)
		}
	}
	if got := strings.Join(usbReaders(dir), "; "); got != "Yubico YubiKey OTP+FIDO+CCID; a reader" {
		t.Errorf("got %q", got)
	}
}

// systemctl tells of units and of the environment, or fails.
func TestUnits(t *testing.T) {
	dir := t.TempDir()
	script := func(text string) {
		t.Helper()
		if err := os.WriteFile(filepath.Join(dir, "systemctl"), []byte("#!/bin/sh\n"+text), 0o700); err != nil {
			t.Fatal(err)
		}
	}
	t.Setenv("PATH", dir)
	if _, _, err := Units(t.Context(), "a.socket"); !errors.Is(err, exec.ErrNotFound) {
		t.Errorf("without systemctl: %v", err)
	}
	if _, ok := ManagerEnvironment(t.Context()); ok {
		t.Error("there is an environment without systemctl")
	}
	script(`case $2 in
show) printf 'Id=%s\nLoadState=loaded\n\nId=%s\nLoadState=not-found\n' "$4" "$5";;
show-environment) printf 'A=1\nDISPLAY=:0=x\nnonsense\n';;
esac`)
	units, s, err := Units(t.Context(), "a.socket", "b.service")
	if err != nil || s.Status != nil || len(units) != 2 || units["a.socket"]["LoadState"] != "loaded" || units["b.service"]["LoadState"] != "not-found" {
		t.Errorf("got %q, %v, %v", units, s.Status, err)
	}
	if environment, ok := ManagerEnvironment(t.Context()); !ok || len(environment) != 2 || environment["DISPLAY"] != ":0=x" {
		t.Errorf("got %q, %v", environment, ok)
	}
	script("echo no bus >&2; exit 1")
	if units, s, err := Units(t.Context(), "a.socket"); err != nil || s.Status == nil || s.Err != "no bus" || len(units) != 0 {
		t.Errorf("a service manager that cannot be reached: %q, %v, %v", units, s, err)
	}
	if _, ok := ManagerEnvironment(t.Context()); ok {
		t.Error("the environment is known")
	}
}

func FuzzUnits(f *testing.F) {
	const seed = "Result=success\nId=a.socket\nDropInPaths=/x=y /z\n\nId=b.service\nLoadState=loaded\n"
	units := parseUnits(seed)
	if len(units) != 2 || units["a.socket"]["DropInPaths"] != "/x=y /z" || units["b.service"]["LoadState"] != "loaded" {
		f.Fatalf("got %q", units)
	}
	for _, s := range []string{"", seed, "\n\n\n", "Id=\n\nId", "Id=x\nId=y"} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, text string) {
		for name, u := range parseUnits(text) {
			if name == "" || u["Id"] != name {
				t.Errorf("%q: %q", name, u)
			}
		}
	})
}
