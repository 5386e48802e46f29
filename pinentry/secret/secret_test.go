package secret_test

import (
	"bytes"
	"crypto/rand"
	"encoding/json"
	"encoding/xml"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"os/exec"
	"strings"
	"sync"
	"testing"
	"unsafe"

	"golang.org/x/sys/unix"

	"p11-agent/agent/peer/terminaltest"
	"p11-agent/pinentry/secret"
	"p11-agent/pinentry/secret/secrettest"
)

// child names a variable. The test runs this program again with it, for steps that would
// spoil other tests.
const child = "P11_SECRET_TEST_CHILD"

func TestMain(m *testing.M) {
	switch os.Getenv(child) {
	case "":
		os.Exit(terminaltest.Without(m).Run())
	case "no-mlock":
		os.Exit(childWithoutMlock())
	case "overrun":
		s, err := secret.New(10)
		if err != nil {
			fmt.Println(err)
			os.Exit(3)
		}
		fmt.Println("inside", peek(s.Buffer(), 9))
		fmt.Println("outside", peek(s.Buffer(), 10))
		os.Exit(0)
	case "underrun-of-guard":
		s, _ := secret.New(10)
		*(*byte)(unsafe.Add(unsafe.Pointer(unsafe.SliceData(s.Buffer())), 10)) = 1
		os.Exit(0)
	}
}

// peek reads without the bounds check of a slice, as C would.
func peek(b []byte, i int) byte {
	return *(*byte)(unsafe.Add(unsafe.Pointer(unsafe.SliceData(b)), i))
}

func rerun(t *testing.T, what string) (string, error) {
	t.Helper()
	cmd := exec.Command("/proc/self/exe")
	cmd.Env = []string{child + "=" + what}
	out, err := cmd.CombinedOutput()
	return string(out), err
}

func childWithoutMlock() int {
	if err := secret.LockError(); err != nil {
		fmt.Println("LockError before the first secret:", err)
		return 1
	}
	if err := unix.Setrlimit(unix.RLIMIT_MEMLOCK, &unix.Rlimit{}); err != nil {
		fmt.Println("setrlimit:", err)
		return 1
	}
	if os.Getuid() == 0 { // root may lock memory above the limit
		if err := unix.Setuid(65534); err != nil {
			fmt.Println("setuid:", err)
			return 1
		}
	}
	s, err := secret.From([]byte("123456"))
	if err != nil {
		fmt.Println("from:", err)
		return 1
	}
	if string(s.Bytes()) != "123456" {
		fmt.Println("the secret does not work")
		return 1
	}
	s.Wipe()
	fmt.Println("LockError:", secret.LockError())
	return 0
}

func TestMlockRefusedIsReported(t *testing.T) {
	out, err := rerun(t, "no-mlock")
	if err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	if !strings.HasPrefix(out, "LockError: lock the memory of a secret: ") {
		t.Errorf("the secret was not locked, and LockError does not say so: %s", out)
	}
}

func TestGuardPage(t *testing.T) {
	for _, what := range []string{"overrun", "underrun-of-guard"} {
		out, err := rerun(t, what)
		exit, ok := errors.AsType[*exec.ExitError](err)
		if !ok || exit.ExitCode() != 2 || !strings.Contains(out, "SIGSEGV") {
			t.Errorf("%s: one byte beyond the secret was reached: %v\n%s", what, err, out)
		}
		if what == "overrun" && !strings.HasPrefix(out, "inside 0\n") {
			t.Errorf("the last byte was not readable:\n%s", out)
		}
	}
}

func TestSizes(t *testing.T) {
	page := os.Getpagesize()
	for _, size := range []int{0, 1, page - 1, page, page + 1, secret.MaxSize} {
		s, err := secret.New(size)
		if err != nil {
			t.Fatalf("New(%d): %v", size, err)
		}
		if len(s.Buffer()) != size || s.Len() != 0 || len(s.Bytes()) != 0 {
			t.Errorf("New(%d) has room for %d and %d bytes in it", size, len(s.Buffer()), s.Len())
		}
		for i := range s.Buffer() {
			s.Buffer()[i] = 0xa5
		}
		s.SetLen(size)
		if s.Len() != size || bytes.IndexByte(s.Bytes(), 0) >= 0 {
			t.Errorf("a secret of %d bytes does not hold them", size)
		}
		s.Wipe()
	}
	for _, size := range []int{-1, secret.MaxSize + 1} {
		if s, err := secret.New(size); err == nil {
			s.Wipe()
			t.Errorf("New(%d) succeeded", size)
		}
	}
}

func TestFromWipesItsSource(t *testing.T) {
	b := []byte("123456")
	s, err := secret.From(b)
	if err != nil {
		t.Fatal(err)
	}
	defer s.Wipe()
	if !bytes.Equal(b, make([]byte, 6)) {
		t.Error("the source still holds the secret")
	}
	if string(s.Bytes()) != "123456" {
		t.Error("the secret does not hold its bytes")
	}
	big := bytes.Repeat([]byte{1}, secret.MaxSize+1)
	if _, err := secret.From(big); err == nil || big[0] != 0 || big[secret.MaxSize] != 0 {
		t.Errorf("a source that is too big: %v, first byte %d", err, big[0])
	}
}

func TestBytesCannotGrow(t *testing.T) {
	s, err := secret.New(8)
	if err != nil {
		t.Fatal(err)
	}
	defer s.Wipe()
	copy(s.Buffer(), "1234WXYZ")
	s.SetLen(4)
	if got := string(s.Buffer()); got != "1234\x00\x00\x00\x00" {
		t.Errorf("SetLen left %d bytes of the rest", len(strings.TrimRight(got[4:], "\x00")))
	}
	if cap(s.Bytes()) != 4 {
		t.Error("an append would write into the secret")
	}
	for _, n := range []int{-1, 9} {
		func() {
			defer func() {
				if recover() == nil {
					t.Errorf("SetLen(%d) of 8 did not panic", n)
				}
			}()
			s.SetLen(n)
		}()
	}
}

func TestEqualAndClone(t *testing.T) {
	a, _ := secret.From([]byte("123456"))
	b, _ := secret.From([]byte("123457"))
	c, err := a.Clone()
	if err != nil {
		t.Fatal(err)
	}
	if a.Equal(b) || !a.Equal(c) || a.Equal(nil) {
		t.Error("Equal is wrong")
	}
	a.Wipe()
	if string(c.Bytes()) != "123456" {
		t.Error("the clone went with its original")
	}
	b.Wipe()
	c.Wipe()
}

func TestEmptySecretsWork(t *testing.T) {
	wiped, err := secret.From([]byte("123456"))
	if err != nil {
		t.Fatal(err)
	}
	wiped.Wipe()
	wiped.Wipe()
	for name, s := range map[string]*secret.Secret{"nil": nil, "zero": {}, "wiped": wiped} {
		s.SetLen(0)
		s.Wipe()
		c, err := s.Clone()
		if s.Len() != 0 || len(s.Bytes()) != 0 || len(s.Buffer()) != 0 || !s.Equal(nil) || err != nil || c.Len() != 0 {
			t.Errorf("%s: not an empty secret", name)
		}
		c.Wipe()
		if got := fmt.Sprint(s); got != "[secret]" && s != nil {
			t.Errorf("%s prints as %q", name, got)
		}
	}
}

func TestWipeFromMany(t *testing.T) {
	s, err := secret.From([]byte("123456"))
	if err != nil {
		t.Fatal(err)
	}
	var all sync.WaitGroup
	for range 8 {
		all.Go(s.Wipe)
	}
	all.Wait()
	if s.Len() != 0 {
		t.Error("not wiped")
	}
}

// login is a struct as in real programs, with a secret by value and by pointer.
type login struct {
	User    string
	PIN     *secret.Secret
	Another secret.Secret
	hidden  *secret.Secret
}

func TestNothingPrints(t *testing.T) {
	// The test looks for these bytes in decimal, hexadecimal and base64.
	s, err := secret.From([]byte("hunter2!"))
	if err != nil {
		t.Fatal(err)
	}
	defer s.Wipe()
	giveaways := []string{
		"hunter2!", "unter2", "68756e746572", "68756E746572", "aHVudGVy", "104 117 110", "104,117,110",
		"0x68, 0x75", "68 75 6e", "1101000 1110101", "150 165 156",
	}
	values := map[string]any{
		"pointer": s, "value": *s, "struct": login{"me", s, *s, s}, "pointer to struct": &login{"me", s, *s, s},
		"slice": []*secret.Secret{s}, "map": map[string]secret.Secret{"k": *s}, "interface": []any{s, *s},
		"error": fmt.Errorf("login with %v: %w", s, errors.New("no")),
		"twice": &s,
	}
	var out bytes.Buffer
	check := func(how string) {
		t.Helper()
		for _, g := range giveaways {
			if strings.Contains(out.String(), g) {
				t.Errorf("%s printed %q", how, g)
			}
		}
		out.Reset()
	}
	for name, v := range values {
		for _, verb := range strings.Fields("%v %+v %#v %s %x %X %q %d %b %o %c %U %t %T %p %08x %.3s %!") {
			fmt.Fprintf(&out, verb, v)
			check(name + " under " + verb)
		}
		slog.New(slog.NewTextHandler(&out, nil)).Info("msg", "v", v, slog.Group("g", "v", v))
		check(name + " in a text log")
		slog.New(slog.NewJSONHandler(&out, nil)).Info("msg", "v", v, slog.Group("g", "v", v))
		check(name + " in a JSON log")
		b, _ := json.Marshal(v) // an error is as good as a placeholder
		out.Write(b)
		check(name + " as JSON")
		b, _ = xml.Marshal(v)
		out.Write(b)
		check(name + " as XML")
		fmt.Fprintln(&out, v, errors.Join(fmt.Errorf("%v", v)))
		check(name + " in an error")
	}
	if got := fmt.Sprintf("%s %x", s, s); got != "[secret] [secret]" {
		t.Errorf("printed as %q", got)
	}
	if b, err := json.Marshal(s); err != nil || string(b) != `"[secret]"` {
		t.Errorf("JSON is %s, %v", b, err)
	}
}

func TestWipeLeavesNoCopy(t *testing.T) {
	inverted := make([]byte, 24)
	_, _ = rand.Read(inverted)
	s, err := secret.New(len(inverted))
	if err != nil {
		t.Fatal(err)
	}
	for i, b := range inverted {
		s.Buffer()[i] = ^b
	}
	s.SetLen(len(inverted))
	plain := bytes.Clone(s.Bytes())
	if n := secrettest.Count(t, inverted); n == 0 {
		t.Fatal("a copy is not found while it is there: the search is no good")
	}
	secret.Wipe(plain)
	if n := secrettest.Count(t, inverted); n != secrettest.Found(1) {
		t.Errorf("%d copies are found of the secret, want %d", n, secrettest.Found(1))
	}
	c, err := s.Clone()
	if err != nil {
		t.Fatal(err)
	}
	_ = fmt.Sprint(s, s.Equal(c))
	s.Wipe()
	if n := secrettest.Count(t, inverted); n != secrettest.Found(1) {
		t.Errorf("%d copies are left, not the clone alone", n)
	}
	c.Wipe()
	if n := secrettest.Count(t, inverted); n != 0 {
		t.Errorf("%d copies are left in the process", n)
	}
}

// Another process may open /proc/PID/mem before this process forbids it. Then it may read
// for ever. It must not read a secret in this way or in another.
func TestSecretIsHidden(t *testing.T) {
	mem, err := os.Open("/proc/self/mem")
	if err != nil {
		t.Fatal(err)
	}
	defer mem.Close()
	s, err := secret.From([]byte("123456"))
	if err != nil {
		t.Fatal(err)
	}
	defer s.Wipe()
	if errors.Is(secret.HideError(), unix.ENOSYS) {
		t.Skip(secret.HideError())
	}
	if err := secret.HideError(); err != nil {
		t.Fatal(err)
	}
	address := func(b []byte) uintptr { return uintptr(unsafe.Pointer(unsafe.SliceData(b))) }
	plain := []byte("654321")
	for _, tt := range []struct {
		name string
		read func(b []byte) error
	}{
		{"/proc/PID/mem", func(b []byte) error {
			_, err := mem.ReadAt(make([]byte, len(b)), int64(address(b)))
			return err
		}},
		{"process_vm_readv", func(b []byte) error {
			local := make([]byte, len(b))
			_, err := unix.ProcessVMReadv(os.Getpid(), []unix.Iovec{{Base: &local[0], Len: uint64(len(local))}}, []unix.RemoteIovec{{Base: address(b), Len: len(b)}}, 0)
			return err
		}},
	} {
		if err := tt.read(plain); err != nil {
			t.Errorf("%s of a plain slice: %v: the test is no good", tt.name, err)
		}
		if err := tt.read(s.Bytes()); err == nil {
			t.Errorf("%s reads the secret", tt.name)
		}
	}
	// The memory itself works.
	r, w, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	defer w.Close()
	if _, err := w.Write(s.Bytes()); err != nil {
		t.Errorf("write: %v", err)
	}
	if _, err := r.Read(s.Buffer()); err != nil || string(s.Bytes()) != "123456" {
		t.Errorf("read: %v", err)
	}
}

// A machine does not hibernate while there is secret memory. So the package keeps none.
func TestNothingIsKept(t *testing.T) {
	s, err := secret.New(8)
	if err != nil {
		t.Fatal(err)
	}
	s.Wipe()
	maps, err := os.ReadFile("/proc/self/maps")
	if err != nil {
		t.Fatal(err)
	}
	if bytes.Contains(maps, []byte("secretmem")) {
		t.Errorf("secret memory is kept:\n%s", maps)
	}
}
