package token_test

import (
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"p11-agent/token"
	"p11-agent/token/pcsc"
	"p11-agent/token/readers"
	"p11-agent/token/selection"
	"p11-agent/token/tokentest"
	"p11-agent/token/tokentest/pivcard"
	"p11-agent/token/wire"
)

// A sharer is a Store with a card behind pcscd. It has the parts that other programs need to use
// the same card.
type sharer struct {
	*testing.T
	pcscd  *tokentest.PCSCD
	card   *pivcard.Card
	person *tokentest.Person
	store  *token.Store
	spec   token.ModuleSpec
}

// shared is a module, and a card that other programs use too.
type shared struct {
	name, module string
	yubiKey      bool
	always       bool // a key wants its PIN each time, so OpenSC keeps no PIN
	frail        bool // the module does not select its application again, and needs a new start
}

var sharedModules = []shared{
	{"OpenSC", "opensc-pkcs11.so", false, false, false},
	{"OpenSCKeepsNoPIN", "opensc-pkcs11.so", false, true, false},
	{"Yubico", "libykcs11.so*", true, true, true},
}

func newSharer(t *testing.T, m shared, set func(*token.ModuleSpec)) *sharer {
	t.Helper()
	return newSharerWith(t, m, set, nil)
}

// newSharerWith calls first before it opens the Store.
func newSharerWith(t *testing.T, m shared, set func(*token.ModuleSpec), first func(*sharer)) *sharer {
	t.Helper()
	path := tokentest.Module(t, m.module)
	s := &sharer{T: t, pcscd: tokentest.StartPCSCD(t, "Yubico Virtual"), person: &tokentest.Person{Always: pivPIN}}
	o := pivcard.Options{
		Name: "piv", PIN: pivPIN, YubiKey: m.yubiKey, OpenPGP: true,
		Keys: map[pivcard.Ref]pivcard.Key{pivcard.Authentication: {}},
	}
	if m.always {
		o.Keys[pivcard.Signature] = pivcard.Key{}
	}
	s.card = tokentest.NewCard(t, o)
	s.pcscd.Insert(0, s.card)
	if first != nil {
		first(s)
	}
	spec := realSpec("piv", path, s.pcscd.Env()...)
	if set != nil {
		set(&spec)
	}
	s.spec = spec
	s.store = tokentest.Store(t, token.Options{Modules: []token.ModuleSpec{spec}, Command: self, PINs: s.person}, pivPIN)
	return s
}

// key returns the key that wants its PIN once.
func (s *sharer) key() *token.Key {
	s.Helper()
	label := "piv"
	if s.card.ATR()[1] == 0xfd {
		label = fmt.Sprintf("YubiKey PIV #%d", s.card.Serial())
	}
	return tokentest.Key(s.T, s.store, label, 1)
}

// run runs another program that uses the card.
func (s *sharer) run(ctx context.Context, args ...string) error {
	cmd := exec.CommandContext(ctx, args[0], args[1:]...)
	cmd.Env = append(os.Environ(), s.pcscd.Env()...)
	if out, err := cmd.CombinedOutput(); err != nil {
		return fmt.Errorf("%s: %w\n%s", strings.Join(args, " "), err, out)
	}
	return nil
}

// neighbours are other programs that use the card. start returns a function that uses the card
// once. right and wrong are the numbers of PINs that the function gives to the card.
var neighbours = []struct {
	name         string
	start        func(s *sharer) func(context.Context) error
	right, wrong int
	fragile      bool // the program fails if another program disturbs it
}{
	{"pkcs11-tool", func(s *sharer) func(context.Context) error {
		dir := s.TempDir()
		in, out := filepath.Join(dir, "in"), filepath.Join(dir, "out")
		digest := sha256.Sum256([]byte("sign me"))
		noError(s.T, os.WriteFile(in, digest[:], 0o600))
		return func(ctx context.Context) error {
			return s.run(ctx, "pkcs11-tool", "--module", tokentest.Module(s.T, "opensc-pkcs11.so"), "--login", "--pin", pivPIN,
				"--sign", "--mechanism", "ECDSA", "--id", "01", "--input-file", in, "--output-file", out)
		}
	}, 1, 0, false},
	{"reset", func(s *sharer) func(context.Context) error {
		return func(ctx context.Context) error { return s.run(ctx, "opensc-tool", "--reset") }
	}, 0, 0, false},
	{"power", func(s *sharer) func(context.Context) error {
		return func(ctx context.Context) error { return s.run(ctx, "opensc-tool", "--reset=cold") }
	}, 0, 0, false},
	{"logout", func(s *sharer) func(context.Context) error {
		return func(ctx context.Context) error { return s.run(ctx, "opensc-tool", "--send-apdu", "0020FF80") }
	}, 0, 0, false},
	{"otherApplication", func(s *sharer) func(context.Context) error {
		return func(ctx context.Context) error {
			return s.run(ctx, "opensc-tool", "--send-apdu", "00A4040008A000000151000000")
		}
	}, 0, 0, false},
	{"gpg", func(s *sharer) func(context.Context) error {
		gpg := s.pcscd.SCDaemon("pcsc-shared")
		return func(context.Context) error {
			before := s.card.Counts().OpenPGP
			// RESET makes scdaemon select its application again, as for a new session.
			for _, command := range []string{"RESET", "SERIALNO openpgp", "GETATTR DISP-NAME"} {
				if answer := gpg.Ask(command); !strings.HasPrefix(answer, "OK") {
					return fmt.Errorf("scdaemon, %s: %q", command, answer)
				}
			}
			if s.card.Counts().OpenPGP == before {
				return errors.New("scdaemon did not read from the card")
			}
			return nil
		}
	}, 0, 0, true},
	{"wrongPIN", func(s *sharer) func(context.Context) error {
		return func(ctx context.Context) error {
			err := s.run(ctx, "pkcs11-tool", "--module", tokentest.Module(s.T, "opensc-pkcs11.so"), "--login", "--pin", "000000", "--list-objects")
			if err == nil || !strings.Contains(err.Error(), "CKR_PIN_INCORRECT") {
				return fmt.Errorf("a wrong PIN: %w", err)
			}
			return nil
		}
	}, 0, 1, false},
}

// TestSharing lets other programs use the card between signatures. Each next signature succeeds,
// with at most one prompt. The other programs succeed too.
func TestSharing(t *testing.T) {
	for _, m := range sharedModules {
		for _, n := range neighbours {
			t.Run(m.name+"/"+n.name, func(t *testing.T) {
				t.Parallel()
				s := newSharer(t, m, nil)
				k := s.key()
				noError(t, tokentest.Sign(t.Context(), k))
				use := n.start(s)
				rounds := 5
				if testing.Short() {
					rounds = 2
				}
				for range rounds {
					idle(t, s.store)
					err := use(t.Context())
					if err != nil && n.fragile {
						// A look of the agent, for an event, came between two commands of the program.
						t.Log(err)
						tokentest.Until(t, "the other program succeeds", func() bool { return use(t.Context()) == nil })
						err = nil
					}
					noError(t, err)
					before := s.person.Prompts()
					noError(t, tokentest.Sign(t.Context(), k))
					if more := s.person.Prompts() - before; more > 1 {
						t.Errorf("%d prompts for one signature", more)
					}
				}
				c := s.card.Counts()
				want(t, "wrong PINs", c.Wrong, rounds*n.wrong)
				t.Logf("numbers: %d prompts, %d PINs by us, %d signatures", s.person.Prompts(), c.Right-rounds*n.right, 1+rounds)
			})
		}
	}
}

// TestSharingAllTheTime lets other programs use the card during fifty signatures (twenty with
// -short). Each time another program takes the login away, the agent asks a person for the PIN again. Another
// program may disturb libykcs11 2.2 between its login and the signature. The agent does not
// try a login twice, so some signatures of libykcs11 fail.
func TestSharingAllTheTime(t *testing.T) {
	for _, m := range sharedModules {
		for _, n := range neighbours {
			if n.wrong > 0 {
				continue // its wrong PINs would lock the card
			}
			t.Run(m.name+"/"+n.name, func(t *testing.T) {
				t.Parallel()
				s := newSharer(t, m, nil)
				k := s.key()
				use := n.start(s)
				ctx, stop := context.WithCancel(t.Context())
				var times atomic.Int64
				var disturbed int
				once := make(chan struct{}, 1) // the program has used the card once more
				done := make(chan struct{})
				go func() {
					defer close(done)
					for ctx.Err() == nil {
						err := use(t.Context())
						switch {
						case err == nil:
							times.Add(1)
						case n.fragile:
							disturbed++
						default:
							t.Error(err)
						}
						select {
						case once <- struct{}{}:
						default:
						}
					}
				}()
				const together = 5
				// The agent logs in this often for one signature. On a busy machine, another
				// program can end more logins during it.
				const logins = 3
				signatures := 50
				if testing.Short() {
					signatures = 20
				}
				made, lost := 0, 0
				for range signatures / together {
					for range together {
						before := times.Load()
						switch err := tokentest.Sign(t.Context(), k); {
						case err == nil:
							made++
						case m.frail, wire.IsRV(err, wire.CKRUserNotLoggedIn) && times.Load()-before > logins:
							t.Log(err)
							lost++
						default:
							t.Error(err)
						}
					}
					tokentest.Wait(t, once)
				}
				stop()
				tokentest.Wait(t, done)
				if times.Load() == 0 {
					t.Error("the other program never had its way")
				}
				c := s.card.Counts()
				want(t, "wrong PINs", c.Wrong, 0)
				switch { // the scheduler decides how many signatures of a frail module are disturbed
				case m.frail && made == 0:
					t.Error("no signature was made")
				case !m.frail:
					want(t, "signatures", made+lost, signatures)
				}
				tokentest.Until(t, "a signature is made when it is over", func() bool { return tokentest.Sign(t.Context(), k) == nil })
				t.Logf("numbers: the other program %d times, and %d times disturbed; %d prompts, %d PINs by us, %d signatures",
					times.Load(), disturbed, s.person.Prompts(), c.Right-int(times.Load())*n.right, made)
			})
		}
	}
}

// holders are programs that use a reader alone, until the test closes them.
var holders = []struct {
	name  string
	start func(s *sharer) *tokentest.Neighbour
}{
	{"scdaemon", func(s *sharer) *tokentest.Neighbour {
		n := s.pcscd.SCDaemon()
		if answer := n.Ask("SERIALNO openpgp"); answer != "OK" {
			s.Fatalf("scdaemon does not get the card: %q", answer)
		}
		return n
	}},
	{"pcscclient", func(s *sharer) *tokentest.Neighbour {
		n := s.pcscd.Neighbour(tokentest.BuildPCSCClient(s.T), "exclusive")
		want(s.T, "the program says", n.Line(), "ready")
		return n
	}},
}

// release sets the times after which a module releases its cards.
func release(after time.Duration) func(*token.ModuleSpec) {
	return func(spec *token.ModuleSpec) { spec.Release, spec.Idle = after, after }
}

// released waits until the module has released its cards.
func (s *sharer) released() {
	s.Helper()
	tokentest.Until(s.T, "the module lets go of the card", func() bool {
		readers, err := pcsc.Readers(s.Context(), pcsc.Socket(s.pcscd.Env()))
		noError(s.T, err)
		return s.store.Modules()[0].Released && readers[0].Users == 0
	})
}

// longEnough waits until a second agent has released the card. The second agent has the same rules,
// and starts later.
func (s *sharer) longEnough() {
	s.Helper()
	other := tokentest.Store(s.T, token.Options{Modules: []token.ModuleSpec{s.spec}, Command: self}, pivPIN)
	tokentest.Until(s.T, "another agent lets go of the card", func() bool { return other.Modules()[0].Released })
}

// names reports whether an error names the program that uses the reader alone, and no other
// program. scdaemon shows its open files to root only. For an ordinary user, the error may also
// name another scdaemon, such as the scdaemon of a test that runs at the same time.
func names(e *readers.InUseError, program string, n *tokentest.Neighbour) bool {
	all := slices.Concat(e.Holders, e.Probably)
	holder := fmt.Sprintf("%s (%d)", program, n.PID)
	others := slices.DeleteFunc(slices.Clone(all), func(s string) bool {
		return s == holder || os.Geteuid() != 0 && strings.HasPrefix(s, "scdaemon (")
	})
	return slices.Contains(all, holder) && len(others) == 0
}

// TestReaderInUse requests a signature while another program uses the reader alone. The agent
// waits for the program. The error names the program if it does not release the reader.
func TestReaderInUse(t *testing.T) {
	tokentest.Parallel(t)
	for _, m := range sharedModules[1:] {
		for _, h := range holders {
			t.Run(m.name+"/"+h.name, func(t *testing.T) {
				s := newSharer(t, m, release(50*time.Millisecond))
				k := s.key()
				s.released()
				n := h.start(s)
				before := s.card.Counts().Commands
				err := tokentest.Sign(t.Context(), k)
				e, ok := errors.AsType[*readers.InUseError](err)
				if !ok {
					t.Fatalf("got %v", err)
				}
				want(t, "reader", e.Reader, "Yubico Virtual 00 00")
				begins := fmt.Sprintf("the reader is in use by another program: %s (%d)", h.name, n.PID)
				if len(e.Probably) > 0 && os.Geteuid() != 0 {
					begins = "the reader is in use by another program, probably scdaemon ("
				}
				if !names(e, h.name, n) || !strings.HasPrefix(err.Error(), begins) {
					t.Errorf("got %q, want it to begin with %q", err, begins)
				}
				want(t, "commands to the card meanwhile", s.card.Counts().Commands, before)
				if keys := s.store.Keys(); len(keys) == 0 || keys[0] != k {
					t.Errorf("the key is not listed any more: %v", keys)
				}
				want(t, "insertions", k.Insertions(), uint64(1))

				ctx, cancel := context.WithCancel(t.Context())
				cancel()
				if err := tokentest.Sign(ctx, k); !errors.Is(err, context.Canceled) {
					t.Errorf("no request waits: %v", err)
				}
				made := make(chan error, 1)
				go func() { made <- tokentest.Sign(t.Context(), k) }()
				n.Close()
				noError(t, <-made)
				want(t, "prompts", s.person.Prompts(), 1)
				want(t, "insertions", k.Insertions(), uint64(1))
			})
		}
	}
}

// TestReaderInUseFirst starts the module while another program uses the reader alone. The key
// shows when the program releases the reader.
func TestReaderInUseFirst(t *testing.T) {
	tokentest.Parallel(t)
	for _, m := range sharedModules[1:] {
		t.Run(m.name, func(t *testing.T) {
			var n *tokentest.Neighbour
			s := newSharerWith(t, m, release(50*time.Millisecond), func(first *sharer) { n = holders[0].start(first) })
			tokentest.Keys(t, s.store, 0)
			sel, err := selection.Parse([]byte("pkcs11:object=none"), nil)
			noError(t, err)
			_, err = s.store.Select(t.Context(), sel)
			if e, ok := errors.AsType[*readers.InUseError](err); !ok || !errors.Is(err, token.ErrNoMatch) || !names(e, "scdaemon", n) {
				t.Errorf("a URI is asked for: %v", err)
			}
			n.Close()
			tokentest.Until(t, "the keys show", func() bool { return len(s.store.Keys()) > 0 })
			noError(t, tokentest.Sign(t.Context(), s.key()))
		})
	}
}

// TestTransaction lets another program hold a transaction. Only signatures wait for its end.
func TestTransaction(t *testing.T) {
	tokentest.Parallel(t)
	for _, m := range sharedModules {
		t.Run(m.name, func(t *testing.T) {
			s := newSharer(t, m, nil)
			k := s.key()
			noError(t, tokentest.Sign(t.Context(), k))
			n := s.pcscd.Neighbour(tokentest.BuildPCSCClient(t), "transaction")
			want(t, "the program says", n.Line(), "ready")
			before := s.card.Counts().Signatures
			made := make(chan error, 2)
			for range 2 {
				go func() { made <- tokentest.Sign(t.Context(), k) }()
			}
			ctx, cancel := context.WithTimeout(t.Context(), 300*time.Millisecond)
			defer cancel()
			if err := tokentest.Sign(ctx, k); !errors.Is(err, context.DeadlineExceeded) {
				t.Errorf("in the transaction: %v", err)
			}
			want(t, "signatures", s.card.Counts().Signatures, before)
			n.Close()
			noError(t, <-made)
			noError(t, <-made)
			want(t, "prompts", s.person.Prompts(), 1)
		})
	}
}

// TestRelease has a module that releases the card. So scdaemon gets the card, which it uses alone.
// Then the module takes the card again.
func TestRelease(t *testing.T) {
	for _, m := range sharedModules {
		t.Run(m.name, func(t *testing.T) {
			s := newSharer(t, m, release(50*time.Millisecond))
			k := s.key()
			const rounds = 5
			for n := range rounds {
				noError(t, tokentest.Sign(t.Context(), k))
				s.released()
				gpg := s.pcscd.SCDaemon()
				for _, command := range []string{"SERIALNO openpgp", "GETATTR DISP-NAME"} {
					want(t, "scdaemon, "+command, gpg.Ask(command), "OK")
				}
				gpg.Close()
				want(t, "prompts", s.person.Prompts(), n+1)
			}
			want(t, "insertions", k.Insertions(), uint64(1))
			want(t, "restarts", s.store.Modules()[0].Restarts, 0)
			want(t, "wrong PINs", s.card.Counts().Wrong, 0)

			// The agent still knows the card, and notices that the card leaves and comes back.
			s.released()
			s.pcscd.Remove(0)
			tokentest.Keys(t, s.store, 0)
			s.pcscd.Insert(0, s.card)
			tokentest.Until(t, "the keys show", func() bool { return len(s.store.Keys()) > 0 })
			noError(t, tokentest.Sign(t.Context(), s.key()))
			// A look that the removal disturbs may count the card once more.
			if n := k.Insertions(); n < 2 {
				t.Errorf("%d insertions", n)
			}
		})
	}
}

// Without a configuration, the agent releases a module only while no token is logged in.
func TestReleaseKeepsLogin(t *testing.T) {
	tokentest.Parallel(t)
	s := newSharer(t, sharedModules[1], func(spec *token.ModuleSpec) { spec.Idle = 50 * time.Millisecond })
	s.released()
	k := s.key()
	noError(t, tokentest.Sign(t.Context(), k))
	s.longEnough()
	gpg := s.pcscd.SCDaemon()
	if answer := gpg.Ask("SERIALNO openpgp"); !strings.HasPrefix(answer, "ERR") {
		t.Errorf("during a login, scdaemon says %q", answer)
	}
	want(t, "released", s.store.Modules()[0].Released, false)
	noError(t, tokentest.Sign(t.Context(), k))
	want(t, "prompts", s.person.Prompts(), 1)
	noError(t, s.store.LogoutAll(t.Context()))
	s.released()
	want(t, "scdaemon", gpg.Ask("SERIALNO openpgp"), "OK")
}

// A person answers a prompt late. The agent does not release the module during the prompt.
func TestReleaseWaits(t *testing.T) {
	tokentest.Parallel(t)
	s := newSharer(t, sharedModules[1], release(20*time.Millisecond))
	k := s.key()
	s.released()
	wait := make(chan struct{})
	s.person.Wait = wait
	made := make(chan error, 1)
	go func() { made <- tokentest.Sign(t.Context(), k) }()
	s.person.Until(t, func() bool { return s.person.Prompts() == 1 })
	s.longEnough()
	want(t, "released under the prompt", s.store.Modules()[0].Released, false)
	close(wait)
	noError(t, <-made)
	want(t, "prompts", s.person.Prompts(), 1)
}

// A module works only after a new start, again and again. The pause before the start does not grow.
func TestStartedAnewAgainAndAgain(t *testing.T) {
	p := &tokentest.Person{Always: rightPIN}
	b := newBench(t, p, nil)
	var mu sync.Mutex
	left := 0
	b.fake.Intercept(func(_ context.Context, proc *tokentest.FakeProcess, r wire.Request) bool {
		mu.Lock()
		defer mu.Unlock()
		if r.Type != wire.TypeOperate || left == 0 {
			return false
		}
		left--
		proc.Fail(r, &wire.Error{Function: "C_Sign", RV: wire.CKRDeviceError})
		return true
	})
	b.mustSign()
	const times = 8
	for range times {
		mu.Lock()
		left = 2
		mu.Unlock()
		b.mustSign()
	}
	want(t, "prompts", p.Prompts(), 1+times)
	want(t, "processes", b.fake.Started(), 1+times)
}

// OpenSC 0.23 sends nothing to a PIV card at C_Logout, so the PIN stays verified for each program.
// When the module releases the card, pcscd cuts the power of the card. Then the card forgets that
// the PIN was verified.
func TestReleaseMakesTheCardForget(t *testing.T) {
	tokentest.Parallel(t)
	module := tokentest.Module(t, "opensc-pkcs11.so")
	p := tokentest.StartPCSCD(t)
	card := tokentest.NewCard(t, pivcard.Options{Name: "piv", PIN: pivPIN})
	p.Insert(0, card)
	spec := realSpec("opensc", module, p.Env()...)
	release(50 * time.Millisecond)(&spec)
	spec.Release = 0 // not while the token is logged in
	person := &tokentest.Person{Always: pivPIN}
	s := tokentest.Store(t, token.Options{Modules: []token.ModuleSpec{spec}, Command: self, PINs: person}, pivPIN)
	noError(t, tokentest.Sign(t.Context(), tokentest.Key(t, s, "piv", 1)))
	before := card.Counts().PowerOffs
	noError(t, s.LogoutAll(t.Context()))
	tokentest.Until(t, "the card is without power", func() bool { return card.Counts().PowerOffs > before })
	noError(t, tokentest.Sign(t.Context(), tokentest.Key(t, s, "piv", 1)))
	want(t, "prompts", person.Prompts(), 2)
	want(t, "right PINs", card.Counts().Right, 2)
}

// The agent keeps a remembered PIN when it releases the card. So it asks only once.
func TestReleaseRemembers(t *testing.T) {
	tokentest.Parallel(t)
	module := tokentest.Module(t, "opensc-pkcs11.so")
	p := tokentest.StartPCSCD(t)
	card := tokentest.NewCard(t, pivcard.Options{Name: "piv", PIN: pivPIN})
	p.Insert(0, card)
	spec := realSpec("opensc", module, p.Env()...)
	release(50 * time.Millisecond)(&spec)
	person := &tokentest.Person{Always: pivPIN}
	s := tokentest.Store(t, token.Options{
		Modules: []token.ModuleSpec{spec}, Command: self, PINs: person,
		Policy: func(*token.Key) token.Policy { return token.Policy{Remember: true} },
	}, pivPIN)
	for range 3 {
		noError(t, tokentest.Sign(t.Context(), tokentest.Key(t, s, "piv", 1)))
		tokentest.Until(t, "the card is let go", func() bool { return s.Modules()[0].Released })
	}
	want(t, "prompts", person.Prompts(), 1)
	want(t, "right PINs", card.Counts().Right, 3)
	// LogoutAll still makes the agent forget the PIN.
	noError(t, s.LogoutAll(t.Context()))
	noError(t, tokentest.Sign(t.Context(), tokentest.Key(t, s, "piv", 1)))
	want(t, "prompts", person.Prompts(), 2)
}
