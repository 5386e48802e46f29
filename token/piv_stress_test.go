package token_test

import (
	"bytes"
	"context"
	"errors"
	"flag"
	"fmt"
	"math/rand/v2"
	"regexp"
	"runtime/pprof"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"p11-agent/token"
	"p11-agent/token/pin"
	"p11-agent/token/tokentest"
	"p11-agent/token/tokentest/pivcard"
)

var (
	stressTime = flag.Duration("stress", 20*time.Second, "how long TestPIVStress goes on")
	stressSeed = flag.Uint64("stress-seed", 0, "what its chance begins with; 0: the time")
)

// stuck is the longest time for a request. After that, the request counts as one that never ends.
// A signature on a module that hangs takes two minutes, and then the agent tries it again.
const stuck = 4 * time.Minute

// TestPIVStress has eight clients that sign at random times, on two cards in two readers. Their
// keys ask for the PIN once, never or each time. Meanwhile, the test pulls, exchanges, resets and
// slows cards. Answers are wrong, and logins get lost. The test ends pcscd and the module process.
//
// Each signature is right, and each request ends. The agent tries no wrong PIN, and no PIN without
// a prompt for it. At the end, all keys sign. No goroutine and no open file is left
// (tokentest.Store), and no client of pcscd.
//
// The same seed makes the same plan. The scheduler and the readers decide how the plan meets the
// clients.
func TestPIVStress(t *testing.T) {
	seed := *stressSeed
	if seed == 0 {
		seed = uint64(time.Now().UnixNano())
	}
	t.Logf("go test -run ^TestPIVStress$ -stress %v -stress-seed %d", *stressTime, seed)
	w := newPIVWorld(t)
	w.run(seed)
	w.settle()
}

// A pivWorld has two cards, a Store that shows them, and the clients of the Store.
type pivWorld struct {
	*testing.T
	pcscd  *tokentest.PCSCD
	cards  []*pivcard.Card
	where  []int // the slot of each card
	other  *pivcard.Card
	person *tokentest.Person
	store  *token.Store
	keys   []*token.Key // 9A and 9E of both cards, then 9C of the first

	signed, failed atomic.Int64
	hangs          atomic.Int64 // module processes that the agent ended because they did not answer
	mu             sync.Mutex
	reasons        map[string]int // of failures
	longest        time.Duration  // request
}

func newPIVWorld(t *testing.T) *pivWorld {
	w := &pivWorld{T: t, where: []int{0, 2}, reasons: make(map[string]int)}
	module := tokentest.Module(t, "opensc-pkcs11.so")
	w.pcscd = tokentest.StartPCSCD(t, "Virtual One", "Virtual Two")
	quiet := func(string) {} // there are millions of commands
	pins := map[string]string{"one": "Q4829-3", "two": "W7351-9", "other": "E1046-2"}
	card := func(name string, keys map[pivcard.Ref]pivcard.Key) *pivcard.Card {
		return tokentest.NewCard(t, pivcard.Options{Name: name, PIN: pins[name], Keys: keys, Trace: quiet})
	}
	w.cards = []*pivcard.Card{
		card("one", nil), // with a PIN-always key on the card, OpenSC keeps no PIN
		card("two", map[pivcard.Ref]pivcard.Key{pivcard.Authentication: {}, pivcard.CardAuthentication: {}}),
	}
	w.other = card("other", nil)
	for i, c := range w.cards {
		w.pcscd.Insert(w.where[i], c)
	}
	sockets := w.pcscd.Sockets()
	t.Cleanup(func() { // after the Store is closed
		tokentest.Until(t, "pcscd has no clients", func() bool { return w.pcscd.Sockets() <= sockets })
	})
	w.person = &tokentest.Person{ByToken: pins}
	w.store = tokentest.Store(t, token.Options{
		Modules: []token.ModuleSpec{realSpec("opensc", module, w.pcscd.Env()...)}, Command: self, PINs: w.person,
	}, pins["one"], pins["two"])
	for _, k := range []struct {
		label string
		id    byte
	}{{"one", 1}, {"one", 4}, {"two", 1}, {"two", 4}, {"one", 2}} {
		w.keys = append(w.keys, tokentest.Key(t, w.store, k.label, k.id))
	}
	return w
}

// run lets clients sign and disturbs them, until the time is over.
func (w *pivWorld) run(seed uint64) {
	const clients = 8
	stop := make(chan struct{})
	var all sync.WaitGroup
	for i := range clients {
		all.Go(func() { w.client(stop, rand.New(rand.NewPCG(seed, uint64(i)))) })
	}
	all.Go(func() { w.lister(stop) })
	all.Go(func() { w.watch(stop) })
	random := rand.New(rand.NewPCG(seed, clients))
	for end := time.Now().Add(*stressTime); time.Now().Before(end); {
		// The clients do some work between two disturbances. The work may fail.
		more := w.signed.Load() + w.failed.Load() + random.Int64N(50)
		w.until("the clients go on", func() bool { return w.signed.Load()+w.failed.Load() >= more })
		what := w.disturb(random)
		w.Logf("%v: %s", time.Until(end).Round(time.Millisecond), what)
	}
	close(stop)
	ended := make(chan struct{})
	go func() {
		all.Wait()
		close(ended)
	}()
	w.until("every request ends", func() bool {
		select {
		case <-ended:
			return true
		default:
			return false
		}
	})
}

// until waits for a condition. A module that hangs may delay the condition, but not prevent it.
func (w *pivWorld) until(what string, condition func() bool) {
	w.Helper()
	for end := time.Now().Add(stuck); !condition(); time.Sleep(5 * time.Millisecond) {
		if time.Now().After(end) {
			var b bytes.Buffer
			_ = pprof.Lookup("goroutine").WriteTo(&b, 1) // a buffer never fails
			w.Fatalf("it did not happen that %s:\n%s", what, b.String())
		}
	}
}

// client signs until stop is closed.
func (w *pivWorld) client(stop <-chan struct{}, random *rand.Rand) {
	for {
		select {
		case <-stop:
			return
		default:
		}
		k := w.keys[random.IntN(len(w.keys)-1)]
		if random.IntN(20) == 0 {
			k = w.keys[len(w.keys)-1]
		}
		ctx, cancel := context.WithCancel(w.Context())
		if random.IntN(20) == 0 {
			time.AfterFunc(time.Duration(random.IntN(20))*time.Millisecond, cancel) // the client hangs up
		}
		began := time.Now()
		err := tokentest.Sign(ctx, k) // and verify
		cancel()
		w.note(time.Since(began), err)
		if err != nil {
			time.Sleep(time.Duration(random.IntN(20)) * time.Millisecond) // so that the client does not fail all the time
		}
	}
}

// numbers matches the parts that differ in failures of one kind.
var numbers = regexp.MustCompile(`serial [0-9a-f]+|within [0-9a-z.]+`)

func (w *pivWorld) note(took time.Duration, err error) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.longest = max(w.longest, took)
	if err == nil {
		w.signed.Add(1)
		return
	}
	w.failed.Add(1)
	w.reasons[numbers.ReplaceAllString(err.Error(), "…")]++
	if _, ok := errors.AsType[*pin.Error](err); ok {
		w.Errorf("a PIN was refused, or not tried: %v", err)
	}
	if strings.Contains(err.Error(), "the signature is wrong") {
		w.Errorf("a signature that is wrong was handed out: %v", err)
	}
}

// lister does the same as the keyring when clients list keys.
func (w *pivWorld) lister(stop <-chan struct{}) {
	for {
		select {
		case <-stop:
			return
		case <-time.After(100 * time.Millisecond):
		}
		w.store.Poke()
		if len(w.store.Keys()) == 0 {
			ctx, cancel := context.WithTimeout(w.Context(), 500*time.Millisecond)
			_ = w.store.Rescan(ctx)
			cancel()
		}
	}
}

// watch counts the module processes that the agent ended because they did not answer. The pause
// after each such end is longer than the interval of watch.
func (w *pivWorld) watch(stop <-chan struct{}) {
	counted := -1
	for {
		select {
		case <-stop:
			return
		case <-time.After(10 * time.Millisecond):
		}
		m := w.store.Modules()[0]
		if m.Err != nil && strings.Contains(m.Err.Error(), "did not answer within") && m.Restarts != counted {
			counted = m.Restarts
			w.hangs.Add(1)
		}
	}
}

// disturb makes a random disturbance, and undoes it.
func (w *pivWorld) disturb(random *rand.Rand) string {
	pause := func(most int) time.Duration {
		d := time.Duration(random.IntN(most)) * time.Millisecond
		time.Sleep(d)
		return d
	}
	i := random.IntN(len(w.cards))
	c := w.cards[i]
	switch n := random.IntN(100); {
	case n < 25:
		w.pcscd.Remove(w.where[i])
		d := pause(1500)
		was := w.where[i]
		w.where[i] ^= random.IntN(2) // the other slot of the reader
		w.pcscd.Insert(w.where[i], c)
		return fmt.Sprintf("card %d out of slot %d for %v, and into slot %d", i, was, d, w.where[i])
	case n < 28:
		w.pcscd.Pull(w.where[i]) // OpenSC 0.23 may hang after this
		w.pcscd.Insert(w.where[i], c)
		return fmt.Sprintf("card %d pulled out of slot %d", i, w.where[i])
	case n < 45:
		w.pcscd.Remove(w.where[i])
		w.pcscd.Insert(w.where[i], w.other)
		d := pause(3000)
		w.pcscd.Remove(w.where[i])
		w.pcscd.Insert(w.where[i], c)
		return fmt.Sprintf("another card in place of %d for %v", i, d)
	case n < 57:
		w.pcscd.ResetCard(w.where[i])
		return fmt.Sprintf("card %d reset by another program", i)
	case n < 60:
		c.Reset() // without an event
		return fmt.Sprintf("card %d loses its power", i)
	case n < 67:
		each, private := time.Duration(random.IntN(5))*time.Millisecond, time.Duration(random.IntN(300))*time.Millisecond
		c.SetDelay(each, private)
		d := pause(3000)
		c.SetDelay(0, 0)
		return fmt.Sprintf("card %d slow for %v: %v a command, %v a signature", i, d, each, private)
	case n < 72:
		w.pcscd.Restart()
		return "pcscd restarted"
	case n < 77:
		w.pcscd.Kill()
		w.pcscd.Start()
		return "pcscd killed"
	case n < 80:
		w.pcscd.Stop()
		d := pause(2000)
		w.pcscd.Start()
		return fmt.Sprintf("pcscd stopped for %v", d)
	case n < 85:
		if pid := w.store.Modules()[0].PID; pid != 0 {
			_ = unix.Kill(pid, unix.SIGKILL) // the process may have ended
		}
		return "module process killed"
	case n < 92:
		err := w.store.LogoutAll(w.Context())
		return fmt.Sprintf("logged out (%v)", err)
	case n < 96:
		c.Inject(pivcard.Fault{INS: pivcard.GeneralAuthenticate, Corrupt: true})
		return fmt.Sprintf("card %d signs wrongly, once", i)
	default:
		c.Inject(pivcard.Fault{INS: pivcard.GeneralAuthenticate, SW: 0x6F00})
		return fmt.Sprintf("card %d fails, once", i)
	}
}

// settle checks that all keys sign again, and checks the counts.
func (w *pivWorld) settle() {
	for _, c := range w.cards {
		c.ClearFaults()
	}
	for _, k := range w.keys {
		var err error
		w.until(k.URI()+" signs again", func() bool {
			err = tokentest.Sign(w.Context(), k)
			return err == nil
		})
	}
	// If the agent has lost the count of logins, it asks for no PIN here, or for two.
	noError(w.T, w.store.LogoutAll(w.Context()))
	for i, k := range []*token.Key{w.keys[0], w.keys[2]} {
		prompts, right := w.person.Prompts(), w.cards[i].Counts().Right
		noError(w.T, tokentest.Sign(w.Context(), k))
		noError(w.T, tokentest.Sign(w.Context(), k))
		want(w.T, "prompts after a logout", w.person.Prompts()-prompts, 1)
		want(w.T, "PINs given after a logout", w.cards[i].Counts().Right-right, 1)
	}

	right := 0
	for i, c := range append(w.cards, w.other) {
		n := c.Counts()
		right += n.Right
		want(w.T, fmt.Sprintf("wrong PINs of card %d", i), n.Wrong+n.Blocked, 0)
	}
	want(w.T, "PINs given to the unused card", w.other.Counts().Right, 0)
	// A prompt accounts for one PIN given to the card. It accounts for two if the key asks each
	// time and shows only after a login. If a card has no such key, OpenSC keeps the PIN, and
	// gives it itself after each loss of power.
	may := make(map[string]int)
	for _, about := range w.person.Asked() {
		may[about.Token.Label]++
		if about.EachUse {
			may[about.Token.Label]++
		}
	}
	two := w.cards[1].Counts()
	may["two"] += two.PowerUps + two.Reset
	for i, label := range []string{"one", "two"} {
		if n := w.cards[i].Counts().Right; n > may[label] {
			w.Errorf("card %q was given %d PINs, and %d prompts and losses of power account for %d", label, n, w.person.Prompts(), may[label])
		}
	}
	want(w.T, "open dialogues", w.person.Open(), 0)
	if w.signed.Load() == 0 {
		w.Error("nothing was signed")
	}
	w.Logf("%d signatures, %d failures, %d prompts, %d PINs given, %d starts of the module, %d because it did not answer; the longest request took %v",
		w.signed.Load(), w.failed.Load(), w.person.Prompts(), right, w.store.Modules()[0].Restarts+1, w.hangs.Load(), w.longest.Round(time.Millisecond))
	for reason, n := range w.reasons {
		w.Logf("%6d times: %s", n, reason)
	}
}
