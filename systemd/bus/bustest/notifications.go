package bustest

import (
	"maps"
	"slices"
	"sync"

	"github.com/godbus/dbus/v5"
)

const (
	notifications     = "org.freedesktop.Notifications"
	notificationsPath = "/org/freedesktop/Notifications"
)

// A Bubble has the arguments of a request to show a notification.
type Bubble struct {
	App      string
	Replaces uint32
	Icon     string
	Summary  string
	Body     string
	Actions  []string
	Hints    map[string]dbus.Variant
	Expire   int32
}

// Notifications stands in for the service that shows notifications on a desktop. It only
// records them.
type Notifications struct {
	bus  *Bus
	conn *dbus.Conn

	mu           sync.Mutex
	capabilities []string
	hang         chan struct{} // nil: it answers
	next         uint32
	open         map[uint32]Bubble
	all          []Bubble
	closed       int // notifications that their clients have closed
}

// Notifications puts the service on the Bus. The service reports the capabilities, such as
// "body-markup".
func (b *Bus) Notifications(capabilities ...string) *Notifications {
	b.t.Helper()
	n := &Notifications{bus: b, capabilities: capabilities, open: make(map[uint32]Bubble)}
	n.start()
	return n
}

func (n *Notifications) start() {
	n.bus.t.Helper()
	c := n.bus.Connect()
	if err := c.ExportMethodTable(map[string]any{
		"GetCapabilities": func() ([]string, *dbus.Error) {
			n.wait()
			n.mu.Lock()
			defer n.mu.Unlock()
			return slices.Clone(n.capabilities), nil
		},
		"Notify":            n.notify,
		"CloseNotification": n.closeNotification,
	}, notificationsPath, notifications); err != nil {
		n.bus.t.Fatal(err)
	}
	n.mu.Lock()
	n.conn = c
	n.mu.Unlock()
	n.bus.own(c, notifications)
}

func (n *Notifications) wait() {
	n.mu.Lock()
	hang := n.hang
	n.mu.Unlock()
	if hang != nil {
		<-hang
	}
}

func (n *Notifications) notify(app string, replaces uint32, icon, summary, body string, actions []string, hints map[string]dbus.Variant, expire int32) (uint32, *dbus.Error) {
	n.wait()
	n.mu.Lock()
	defer n.mu.Unlock()
	id := replaces
	if id == 0 {
		n.next++
		id = n.next
	}
	b := Bubble{app, replaces, icon, summary, body, actions, hints, expire}
	n.open[id] = b
	n.all = append(n.all, b)
	return id, nil
}

func (n *Notifications) closeNotification(id uint32) *dbus.Error {
	n.wait()
	n.mu.Lock()
	_, ok := n.open[id]
	delete(n.open, id)
	if ok {
		n.closed++
	}
	c := n.conn
	n.mu.Unlock()
	if !ok {
		return dbus.NewError("org.freedesktop.DBus.Error.InvalidArgs", []any{"no such notification"})
	}
	n.emitClosed(c, id, 3)
	return nil
}

func (n *Notifications) emitClosed(c *dbus.Conn, id, reason uint32) {
	_ = c.Emit(notificationsPath, notifications+".NotificationClosed", id, reason) // it may have lost its bus
}

// Open returns the notifications that are shown, the oldest first.
func (n *Notifications) Open() []Bubble {
	n.mu.Lock()
	defer n.mu.Unlock()
	var all []Bubble
	for _, id := range slices.Sorted(maps.Keys(n.open)) {
		all = append(all, n.open[id])
	}
	return all
}

// All returns every notification that clients have asked for, with replacements.
func (n *Notifications) All() []Bubble {
	n.mu.Lock()
	defer n.mu.Unlock()
	return slices.Clone(n.all)
}

// Closed returns how many notifications their clients have closed.
func (n *Notifications) Closed() int {
	n.mu.Lock()
	defer n.mu.Unlock()
	return n.closed
}

// Dismiss closes all notifications, as a person may do.
func (n *Notifications) Dismiss() {
	n.mu.Lock()
	open := n.open
	n.open = make(map[uint32]Bubble)
	c := n.conn
	n.mu.Unlock()
	for id := range open {
		n.emitClosed(c, id, 2)
	}
}

// Hang makes the service stop answering. It answers again after a call of resume.
func (n *Notifications) Hang() (resume func()) {
	n.mu.Lock()
	defer n.mu.Unlock()
	hang := make(chan struct{})
	n.hang = hang
	return sync.OnceFunc(func() {
		n.mu.Lock()
		n.hang = nil
		n.mu.Unlock()
		close(hang)
	})
}

// Restart does what a new process of the service does. It drops all notifications and
// numbers new ones from 1. Number 1 is a notification of another program.
func (n *Notifications) Restart() {
	n.bus.t.Helper()
	n.mu.Lock()
	c := n.conn
	n.open = map[uint32]Bubble{1: {App: "another program"}}
	n.next = 1
	n.mu.Unlock()
	_ = c.Close() // the connection may have ended with its bus
	n.start()
}
