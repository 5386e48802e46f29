package bustest

import (
	"fmt"
	"os"
	"slices"
	"sync"
	"time"

	"github.com/godbus/dbus/v5"
)

const (
	login1        = "org.freedesktop.login1"
	login1Path    = "/org/freedesktop/login1"
	login1Manager = login1 + ".Manager"
	login1Session = login1 + ".Session"
)

// A Login1 stands in for systemd-logind.
type Login1 struct {
	bus  *Bus
	conn *dbus.Conn

	mu        sync.Mutex
	sessions  map[dbus.ObjectPath]*session
	asked     []string
	refuse    bool
	refused   int
	held      map[*os.File]bool // this end of the pipe of each inhibitor
	onRelease func()
}

type session struct {
	uid    uint32
	locked bool
}

// Login1 puts the service on the Bus.
func (b *Bus) Login1() *Login1 {
	b.t.Helper()
	l := &Login1{bus: b, sessions: make(map[dbus.ObjectPath]*session), held: make(map[*os.File]bool)}
	l.Start()
	return l
}

// Start starts the service again after the Bus or the service has gone.
func (l *Login1) Start() {
	l.bus.t.Helper()
	c := l.bus.Connect()
	l.mu.Lock()
	l.conn = c
	l.mu.Unlock()
	// The service answers by hand, because it may close a file only after it has sent
	// the answer with the file. It listens before it takes the name: the first calls
	// come as soon as it has the name.
	messages := make(chan *dbus.Message, 100)
	c.Eavesdrop(messages)
	l.bus.t.Cleanup(func() { c.Eavesdrop(nil) })
	request := &dbus.Message{
		Type: dbus.TypeMethodCall,
		Headers: map[dbus.HeaderField]dbus.Variant{
			dbus.FieldDestination: dbus.MakeVariant("org.freedesktop.DBus"),
			dbus.FieldPath:        dbus.MakeVariant(dbus.ObjectPath("/org/freedesktop/DBus")),
			dbus.FieldInterface:   dbus.MakeVariant("org.freedesktop.DBus"),
			dbus.FieldMember:      dbus.MakeVariant("RequestName"),
			dbus.FieldSignature:   dbus.MakeVariant(dbus.SignatureOf("", uint32(0))),
		},
		Body: []any{login1, uint32(dbus.NameFlagDoNotQueue)},
	}
	named := make(chan []any, 1)
	go func() {
		for {
			select {
			case m := <-messages:
				switch {
				case m == nil:
				case m.Type == dbus.TypeMethodCall:
					l.answer(c, m)
				case m.Type == dbus.TypeMethodReply || m.Type == dbus.TypeError:
					named <- m.Body // the only call of this connection
				}
			case <-c.Context().Done():
				return
			}
		}
	}()
	c.Send(request, nil)
	select {
	case got := <-named:
		if len(got) != 1 || got[0] != uint32(dbus.RequestNameReplyPrimaryOwner) {
			l.bus.t.Fatalf("take the name %s: %v", login1, got)
		}
	case <-time.After(patience):
		l.bus.t.Fatalf("take the name %s: the bus does not answer", login1)
	}
}

// Stop ends the service.
func (l *Login1) Stop() {
	l.mu.Lock()
	defer l.mu.Unlock()
	// godbus 5.2.4 closes the channel that its reader may be sending to.
	l.conn.Eavesdrop(nil)
	_ = l.conn.Close() // with its bus it may have gone
}

// A listedSession is a(susso) of ListSessions.
type listedSession struct {
	ID   string
	UID  uint32
	User string
	Seat string
	Path dbus.ObjectPath
}

func (l *Login1) answer(c *dbus.Conn, m *dbus.Message) {
	header := func(f dbus.HeaderField) string { return fmt.Sprint(m.Headers[f].Value()) }
	reply := &dbus.Message{Type: dbus.TypeMethodReply, Headers: map[dbus.HeaderField]dbus.Variant{
		dbus.FieldDestination: m.Headers[dbus.FieldSender],
		dbus.FieldReplySerial: dbus.MakeVariant(m.Serial()),
	}}
	var give *os.File
	switch member := header(dbus.FieldMember); member {
	case "Inhibit":
		if l.refuses() {
			break
		}
		hold, file, err := os.Pipe()
		if err != nil {
			l.bus.t.Error(err)
			return
		}
		give = file
		l.mu.Lock()
		l.asked = append(l.asked, fmt.Sprintf("%q", m.Body))
		l.held[hold] = true
		l.mu.Unlock()
		go l.watch(hold)
		reply.Body = []any{dbus.UnixFD(file.Fd())}
	case "ListSessions":
		all := []listedSession{}
		l.mu.Lock()
		for path, s := range l.sessions {
			all = append(all, listedSession{"1", s.uid, "user", "seat0", path})
		}
		l.mu.Unlock()
		reply.Body = []any{all}
	case "Get":
		l.mu.Lock()
		s := l.sessions[dbus.ObjectPath(header(dbus.FieldPath))]
		switch {
		case s == nil:
		case m.Body[1] == "User":
			reply.Body = []any{dbus.MakeVariant(struct {
				UID  uint32
				Path dbus.ObjectPath
			}{s.uid, "/org/freedesktop/login1/user/x"})}
		case m.Body[1] == "LockedHint":
			reply.Body = []any{dbus.MakeVariant(s.locked)}
		}
		l.mu.Unlock()
	}
	if reply.Body == nil {
		reply.Type = dbus.TypeError
		reply.Headers[dbus.FieldErrorName] = dbus.MakeVariant("org.freedesktop.DBus.Error.UnknownObject")
		reply.Body = []any{"there is none"}
	}
	reply.Headers[dbus.FieldSignature] = dbus.MakeVariant(dbus.SignatureOf(reply.Body...))
	c.Send(reply, nil)
	if give != nil {
		_ = give.Close()
	}
}

// watch waits until no process holds the other end.
func (l *Login1) watch(hold *os.File) {
	_, _ = hold.Read(make([]byte, 1))
	l.mu.Lock()
	f := l.onRelease
	l.mu.Unlock()
	if f != nil {
		f()
	}
	l.mu.Lock()
	delete(l.held, hold)
	l.mu.Unlock()
	_ = hold.Close()
}

// OnRelease sets a function that Login1 calls each time an inhibitor is released.
func (l *Login1) OnRelease(f func()) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.onRelease = f
}

// Refuse sets whether the service refuses to inhibit sleep.
func (l *Login1) Refuse(yes bool) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.refuse = yes
}

// Refused returns how often the service has refused to inhibit sleep.
func (l *Login1) Refused() int {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.refused
}

func (l *Login1) refuses() bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.refuse {
		l.refused++
	}
	return l.refuse
}

// Held returns how many inhibitors there are now.
func (l *Login1) Held() int {
	l.mu.Lock()
	defer l.mu.Unlock()
	return len(l.held)
}

// Asked returns the arguments of each call of Inhibit.
func (l *Login1) Asked() []string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return slices.Clone(l.asked)
}

// AddSession adds a session of a user.
func (l *Login1) AddSession(name string, uid int, locked bool) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.sessions[sessionPath(name)] = &session{uid: uint32(uid), locked: locked}
}

func sessionPath(name string) dbus.ObjectPath {
	return dbus.ObjectPath(login1Path + "/session/" + name)
}

func (l *Login1) emit(path dbus.ObjectPath, name string, values ...any) {
	l.bus.t.Helper()
	l.mu.Lock()
	c := l.conn
	l.mu.Unlock()
	if err := c.Emit(path, name, values...); err != nil {
		l.bus.t.Error(err)
	}
}

// Sleep says that the machine is about to sleep, or that it has woken up.
func (l *Login1) Sleep(begins bool) { l.emit(login1Path, login1Manager+".PrepareForSleep", begins) }

// Lock asks a session to lock its screen, as "loginctl lock-session" does.
func (l *Login1) Lock(name string) { l.emit(sessionPath(name), login1Session+".Lock") }

// SetLocked sets whether the screen of a session is locked.
func (l *Login1) SetLocked(name string, locked bool) {
	l.mu.Lock()
	l.sessions[sessionPath(name)].locked = locked
	l.mu.Unlock()
	l.emit(sessionPath(name), "org.freedesktop.DBus.Properties.PropertiesChanged", login1Session,
		map[string]dbus.Variant{"LockedHint": dbus.MakeVariant(locked)}, []string{})
}
