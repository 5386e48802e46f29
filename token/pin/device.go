package pin

import (
	"slices"
	"sync"
	"time"

	"p11-agent/pinentry/secret"
	"p11-agent/pinentry/waiting"
	"p11-agent/token/wire"
)

const (
	// refusalLasts is how long the agent remembers a refused PIN. When a person types that PIN
	// again within this time, the agent says so and does not use up a try.
	refusalLasts = time.Minute
	// maxRefusals bounds the remembered PINs of a token; the oldest go.
	maxRefusals = 2 * maxAttempts
)

// A device is the token itself, for all modules that show it. A login through a second module
// uses the same tries. So modules share the turn to have a PIN tried, and the PINs that
// the token refused. The agent compares PINs with the refused ones and never tries one of them.
type device struct {
	turn chan struct{} // one element: the holder gets a PIN and has it tried
	uses int           // the States that share the device; Devices.mu guards it

	mu      sync.Mutex
	refused []refusal // the oldest first
	timer   *time.Timer
	asked   *waiting.List   // the requests for which a person is asked now; nil: none
	queue   []waiting.Other // the requests that wait for the turn
}

// setAsked notes the requests for which the holder of the turn asks a person; nil: none.
func (d *device) setAsked(list *waiting.List) {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.asked != nil {
		d.asked.SetBeside(nil)
	}
	d.asked = list
	if list != nil {
		list.SetBeside(d.queue)
	}
}

// changeQueue changes the queue.
func (d *device) changeQueue(change func()) {
	d.mu.Lock()
	defer d.mu.Unlock()
	change()
	if d.asked != nil {
		d.asked.SetBeside(d.queue)
	}
}

// A refusal is a PIN that the token refused, in locked memory.
type refusal struct {
	pin    *secret.Secret
	module string // the module that the PIN went through
	tries  Tries  // what the token said of the tries afterwards
}

// Devices has the tokens, each by what it says of itself. Its methods may be called from any
// goroutine.
type Devices struct {
	mu  sync.Mutex // a leaf: under it, only the lock of a device is taken
	all map[wire.TokenID]*device
}

// NewDevices returns an empty Devices.
func NewDevices() *Devices { return &Devices{all: make(map[wire.TokenID]*device)} }

// Open returns the login state of a token through a module. Each State needs one call of
// State.Close.
func (ds *Devices) Open(id wire.TokenID, module string) *State {
	ds.mu.Lock()
	defer ds.mu.Unlock()
	d := ds.all[id]
	if d == nil {
		d = &device{turn: make(chan struct{}, 1)}
		ds.all[id] = d
	}
	d.uses++
	return &State{devices: ds, device: d, token: id, module: module}
}

// drop ends the use of a device by one State.
func (ds *Devices) drop(id wire.TokenID) {
	ds.mu.Lock()
	defer ds.mu.Unlock()
	d := ds.all[id]
	if d.uses--; d.uses == 0 {
		delete(ds.all, id)
		d.forget(anyRefusal)
	}
}

// Wipe forgets every refused PIN.
func (ds *Devices) Wipe() {
	ds.mu.Lock()
	defer ds.mu.Unlock()
	for _, d := range ds.all {
		d.forget(anyRefusal)
	}
}

// Len returns the number of tokens.
func (ds *Devices) Len() int {
	ds.mu.Lock()
	defer ds.mu.Unlock()
	return len(ds.all)
}

// refuse remembers for a while that the token refused a PIN, which stays the caller's.
func (d *device) refuse(pin *secret.Secret, module string, tries Tries) {
	c, err := pin.Clone()
	if err != nil {
		return // the agent does not recognise the PIN; the token refuses it again
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.refused = append(d.refused, refusal{c, module, tries}); len(d.refused) > maxRefusals {
		d.refused[0].pin.Wipe()
		d.refused = d.refused[1:]
	}
	if d.timer != nil {
		d.timer.Stop()
	}
	d.timer = time.AfterFunc(refusalLasts, func() { d.forget(anyRefusal) })
}

// wasRefused tells whether the token refused a PIN a moment ago. tries is what the token says
// now through the module. When tries has changed since the last refusal through that module,
// the PINs refused through it may be right by now. What one module says never makes the agent
// forget a refusal through another module.
func (d *device) wasRefused(pin *secret.Secret, module string, tries Tries) bool {
	d.mu.Lock()
	last := -1
	for i, r := range d.refused {
		if r.module == module {
			last = i
		}
	}
	changed := last >= 0 && d.refused[last].tries != tries
	d.mu.Unlock()
	if changed {
		d.forget(func(r refusal) bool { return r.module == module })
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	return slices.ContainsFunc(d.refused, func(r refusal) bool { return pin.Equal(r.pin) })
}

// forget forgets the refusals that chosen selects.
func (d *device) forget(chosen func(refusal) bool) {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.refused = slices.DeleteFunc(d.refused, func(r refusal) bool {
		if !chosen(r) {
			return false
		}
		r.pin.Wipe()
		return true
	})
	if len(d.refused) == 0 && d.timer != nil {
		d.timer.Stop()
		d.timer = nil
	}
}

func anyRefusal(refusal) bool { return true }
