// Package pivcard is a PIV smart card in software, for tests: the card
// application of NIST SP 800-73-4 part 2, and what Yubico adds to it as far as
// libykcs11 asks for it. With a Slot it sits in a reader of vpcd, the driver of
// virtual readers of the vsmartcard project, so that pcscd and all that is built
// on it take it for a real card.
//
// Unlike a real card it can be told what to do: have its PIN changed behind the
// user's back, be slow, fail at a chosen command, be pulled out and another be
// put in. And it counts what is done to it.
//
// It keeps no secret well and stores nothing. It does not do what tests of an
// SSH agent have no use for: secure messaging, biometry, administration.
package pivcard

import (
	"bytes"
	"context"
	"crypto/x509"
	"fmt"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"
)

// PIN and PUK are those of a card when nothing else is asked for: a YubiKey's.
const (
	PIN = "123456"
	PUK = "12345678"
)

// Options say how a card is made. The zero value is a card with keys in the four
// places of PIV.
type Options struct {
	// Name is the common name in the certificates, which OpenSC makes the token's
	// label.
	Name string
	// Serial is the card's number. Zero: one that no other card of the process has.
	Serial uint32
	// PIN and PUK have up to 8 characters. The tries of both are 3 unless Tries says.
	PIN, PUK string
	Tries    int
	// Keys are the keys on the card; nil: one of the usual kind in each place.
	Keys map[Ref]Key
	// YubiKey has the card answer as a YubiKey 5 does, and say that it is one. Its
	// Signature key then wants a VERIFY since the last use of a key, even when other
	// commands came in between. Other cards want it just before, as the standard says.
	YubiKey bool
	// OpenPGP has it hold that application too, without keys, for GnuPG.
	OpenPGP bool
	// Trace is called with each command and its answer. PINs are left out. It
	// must not call the card.
	Trace func(line string)
}

// Counts says what was done to a card.
type Counts struct {
	Commands                   int // answered, chained ones and GET RESPONSE included
	Selects                    int // of any application
	Right, Wrong, Blocked      int // PINs in VERIFY, by what became of them
	Queries                    int // VERIFY without a PIN
	Signatures, Agreements     int // made
	Refused                    int // uses of a key for want of a PIN
	OpenPGP                    int // objects of the OpenPGP application that were read
	PowerUps, PowerOffs, Reset int
}

// A Command is what a hook is told of a command.
type Command struct{ CLA, INS, P1, P2 byte }

// Instructions, SP 800-73-4 part 2 section 3, and Yubico's.
const (
	Verify              byte = 0x20
	ChangeReferenceData byte = 0x24
	ResetRetryCounter   byte = 0x2C
	GeneralAuthenticate byte = 0x87
	Select              byte = 0xA4
	GetResponse         byte = 0xC0
	GetData             byte = 0xCB
	PutData             byte = 0xDB
	GetMetadata         byte = 0xF7
	GetSerial           byte = 0xF8
	Attest              byte = 0xF9
	GetVersion          byte = 0xFD
)

// A Fault is a command that goes wrong, in one of three ways.
type Fault struct {
	INS     byte
	SW      uint16 // is answered, and nothing done
	Corrupt bool   // the result of GENERAL AUTHENTICATE is well-formed and wrong
	Drop    bool   // there is no answer: the contact is lost, and comes back
}

// A Card is a card. Its methods may be called from any goroutine.
type Card struct {
	serial   uint32
	yubiKey  bool
	hasPGP   bool
	keys     map[Ref]*heldKey
	objects  map[uint32][]byte
	attester *x509.Certificate
	trace    func(string)

	serving sync.Mutex // held for one command or control message; lock order: serving, then mu

	mu       sync.Mutex
	counts   Counts
	pin, puk secretCode
	faults   []Fault
	hook     func(Command)
	each     time.Duration
	private  time.Duration
	events   []string

	// What a loss of power undoes.
	selected bool // PIV
	openPGP  bool // or OpenPGP
	verified bool
	fresh    bool   // a VERIFY was right, and Signature has not been used since
	chain    []byte // the data of a chain's commands so far
	chainOf  *Command
	rest     []byte // of the last answer
	restSW   uint16
}

// A secretCode is a PIN or PUK, padded as in commands.
type secretCode struct {
	value      [8]byte
	left, most int
}

func pad(s string) (b [8]byte, err error) {
	if s == "" || len(s) > len(b) {
		return b, fmt.Errorf("a PIN of %d characters cannot be on the card", len(s))
	}
	copy(b[:], "\xff\xff\xff\xff\xff\xff\xff\xff")
	copy(b[:], s)
	return b, nil
}

var serials atomic.Uint32

// New makes a card.
func New(o Options) (*Card, error) {
	if o.Name == "" {
		o.Name = "PIV card"
	}
	if o.Serial == 0 {
		o.Serial = 10_000_000 + serials.Add(1)
	}
	if o.PIN == "" {
		o.PIN = PIN
	}
	if o.PUK == "" {
		o.PUK = PUK
	}
	if o.Tries == 0 {
		o.Tries = 3
	}
	if o.Tries < 1 || o.Tries > 15 {
		return nil, fmt.Errorf("a status word has no room for %d tries", o.Tries)
	}
	if o.Keys == nil {
		o.Keys = map[Ref]Key{Authentication: {}, Signature: {}, KeyManagement: {}, CardAuthentication: {}}
	}
	c := &Card{
		serial: o.Serial, yubiKey: o.YubiKey, hasPGP: o.OpenPGP, trace: o.Trace,
		keys: make(map[Ref]*heldKey), objects: make(map[uint32][]byte),
	}
	for code, text := range map[*secretCode]string{&c.pin: o.PIN, &c.puk: o.PUK} {
		value, err := pad(text)
		if err != nil {
			return nil, err
		}
		*code = secretCode{value, o.Tries, o.Tries}
	}
	for ref, k := range o.Keys {
		if ref < Authentication && !ref.retired() || ref == 0x9B || ref > CardAuthentication {
			return nil, fmt.Errorf("there is no place %02X for a key", byte(ref))
		}
		made, err := k.make(ref)
		if err != nil {
			return nil, err
		}
		c.keys[ref] = made
	}
	if o.YubiKey {
		made, err := Key{}.make(attestation)
		if err != nil {
			return nil, err
		}
		c.keys[attestation] = made
	}
	return c, c.makeObjects(o)
}

// Serial returns the card's number.
func (c *Card) Serial() uint32 { return c.serial }

// Certificate returns the X.509 certificate of a key, in DER; nil when there is
// none.
func (c *Card) Certificate(r Ref) []byte {
	_, object, _, err := parseTLV(c.objects[r.object()])
	if err != nil {
		return nil
	}
	_, der, _, _ := parseTLV(object)
	return der
}

// Counts returns what was done to the card so far.
func (c *Card) Counts() Counts {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.counts
}

// Events returns a line for each thing that happened to PINs, keys and power.
func (c *Card) Events() []string {
	c.mu.Lock()
	defer c.mu.Unlock()
	return slices.Clone(c.events)
}

func (c *Card) eventLocked(format string, args ...any) {
	c.events = append(c.events, fmt.Sprintf(format, args...))
}

// Tries returns how many tries are left for the PIN.
func (c *Card) Tries() int {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.pin.left
}

// SetPIN gives the card another PIN, and all tries, as another program may do.
// A verified PIN stays verified.
func (c *Card) SetPIN(pin string) error {
	value, err := pad(pin)
	if err != nil {
		return err
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	c.pin.value, c.pin.left = value, c.pin.most
	return nil
}

// SetTries sets how many tries are left for the PIN.
func (c *Card) SetTries(left int) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.pin.left = min(max(left, 0), c.pin.most)
}

// SetDelay makes the card slow: for each command, and for each use of a private
// key in addition. A card that is pulled does not go on waiting.
func (c *Card) SetDelay(each, private time.Duration) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.each, c.private = each, private
}

// SetHook has a function called before each command is answered; it may call the
// card and its Slot. The other side waits for it. nil takes it away.
func (c *Card) SetHook(hook func(Command)) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.hook = hook
}

// Inject has the next commands go wrong, each Fault once: the next of an
// instruction gets the first Fault of it that was injected.
func (c *Card) Inject(faults ...Fault) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.faults = append(c.faults, faults...)
}

// ClearFaults takes back what was injected and has not happened yet.
func (c *Card) ClearFaults() {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.faults = nil
}

// forgetLocked is a loss of power: what was verified and begun is forgotten, SP 800-73-4 part 2
// section 2.3.
func (c *Card) forgetLocked() {
	c.selected, c.openPGP, c.verified, c.fresh = false, false, false, false
	c.chain, c.chainOf, c.rest = nil, nil, nil
}

// PowerOn, PowerOff and Reset do what a reader does to the card's contacts.
func (c *Card) PowerOn() { c.power(&c.counts.PowerUps, "power on") }

// PowerOff is described at PowerOn.
func (c *Card) PowerOff() { c.power(&c.counts.PowerOffs, "power off") }

// Reset is described at PowerOn.
func (c *Card) Reset() { c.power(&c.counts.Reset, "reset") }

func (c *Card) power(count *int, event string) {
	c.serving.Lock()
	defer c.serving.Unlock()
	c.mu.Lock()
	defer c.mu.Unlock()
	*count++
	c.eventLocked("%s", event)
	c.forgetLocked()
}

// ATR returns the answer to reset, ISO/IEC 7816-3 section 8.
func (c *Card) ATR() []byte {
	if c.yubiKey {
		return []byte("\x3b\xfd\x13\x00\x00\x81\x31\xfe\x15\x80\x73\xc0\x21\xc0\x57\x59\x75\x62\x69\x4b\x65\x79\x40")
	}
	// T=0 and T=1, and historical bytes that mean nothing.
	atr := append([]byte{0x3b, 0x87, 0x80, 0x01}, "PIVcard"...)
	check := byte(0)
	for _, b := range atr[1:] {
		check ^= b
	}
	return append(atr, check)
}

// Transmit answers a command APDU. The answer is nil when the card gives none:
// after a Fault, or because ctx has ended.
func (c *Card) Transmit(ctx context.Context, apdu []byte) []byte {
	c.serving.Lock()
	defer c.serving.Unlock()
	cmd, ok := parseCommand(apdu)
	if !ok {
		return appendSW(nil, swLength)
	}
	about := Command{cmd.cla, cmd.ins, cmd.p1, cmd.p2}
	c.mu.Lock()
	c.counts.Commands++
	hook, delay := c.hook, c.each
	if cmd.ins == GeneralAuthenticate && cmd.cla&chained == 0 {
		delay += c.private
	}
	c.mu.Unlock()
	if hook != nil {
		hook(about)
	}
	if delay > 0 {
		timer := time.NewTimer(delay)
		defer timer.Stop()
		select {
		case <-timer.C:
		case <-ctx.Done():
		}
	}
	if ctx.Err() != nil {
		return nil
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	answer := c.answerLocked(cmd, about)
	if c.trace != nil {
		c.trace(traceLine(cmd, answer))
	}
	return answer
}

func appendSW(b []byte, sw uint16) []byte { return append(b, byte(sw>>8), byte(sw)) }

func traceLine(c command, answer []byte) string {
	var b strings.Builder
	fmt.Fprintf(&b, "%02X%02X%02X%02X ", c.cla, c.ins, c.p1, c.p2)
	if c.ins == Verify || c.ins == ChangeReferenceData || c.ins == ResetRetryCounter {
		fmt.Fprintf(&b, "[%d bytes]", len(c.data))
	} else {
		fmt.Fprintf(&b, "%X", c.data)
	}
	fmt.Fprintf(&b, " -> %X", answer)
	return b.String()
}

// answerLocked joins the commands of a chain, and cuts the answer into what the
// other side has room for (ISO/IEC 7816-4 sections 5.1.1.1 and 11.1.1).
func (c *Card) answerLocked(cmd command, about Command) []byte {
	if cmd.cla&^chained != 0 { // channels and secure messaging
		return appendSW(nil, swClass)
	}
	if cmd.ins == GetResponse {
		if len(c.rest) == 0 {
			return appendSW(nil, swConditions)
		}
		return c.cutLocked(cmd.le)
	}
	c.rest = nil
	link := about
	link.CLA = 0
	if c.chainOf != nil && *c.chainOf != link {
		c.chain, c.chainOf = nil, nil
		return appendSW(nil, swEndOfChain)
	}
	if len(c.chain)+len(cmd.data) > maxChained {
		c.chain, c.chainOf = nil, nil
		return appendSW(nil, swLength)
	}
	cmd.data = slices.Concat(c.chain, cmd.data)
	if cmd.cla&chained != 0 {
		c.chain, c.chainOf = cmd.data, &link
		return appendSW(nil, swOK)
	}
	c.chain, c.chainOf = nil, nil

	corrupt := false
	if i := slices.IndexFunc(c.faults, func(f Fault) bool { return f.INS == cmd.ins }); i >= 0 {
		f := c.faults[i]
		c.faults = slices.Delete(c.faults, i, i+1)
		c.eventLocked("fault at %02X", cmd.ins)
		if f.Drop {
			return nil
		}
		if f.SW != 0 {
			return appendSW(nil, f.SW)
		}
		corrupt = f.Corrupt
	}
	fresh := c.fresh
	data, sw := c.executeLocked(cmd, corrupt)
	if fresh && !c.yubiKey && cmd.ins != Verify {
		c.fresh = false // it was not just before
	}
	c.rest, c.restSW = data, sw
	return c.cutLocked(cmd.le)
}

func (c *Card) cutLocked(le int) []byte {
	n := min(le, len(c.rest))
	part := bytes.Clone(c.rest[:n])
	if c.rest = c.rest[n:]; len(c.rest) == 0 {
		return appendSW(part, c.restSW)
	}
	more := len(c.rest)
	if more > 0xff {
		more = 0 // 256 or more
	}
	return appendSW(part, swMore|uint16(more))
}
