package notify

import (
	"cmp"
	"context"
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/godbus/dbus/v5"

	"p11-agent/systemd/bus"
)

// The service that shows notifications (Desktop Notifications Specification
// 1.2).
const (
	service     = "org.freedesktop.Notifications"
	servicePath = "/org/freedesktop/Notifications"
)

const (
	// startTimeout is how long the service may take to start and to say what it
	// can do.
	startTimeout = 10 * time.Second
	// showTimeout is how long the service may take to show a notification. Its answer
	// is the number of the notification, which the agent needs to close it.
	showTimeout = 30 * time.Second
	hideTimeout = 3 * time.Second
	// expire is when the service closes a notification by itself. It does so when the
	// agent is killed and cannot close the notification.
	expire = 2 * time.Minute
)

// bubble is a notification on a desktop. It uses the unique name of the service: another service
// that takes its place gives the same numbers to other notifications.
type bubble struct {
	conn    *bus.Conn
	service dbus.BusObject
	owner   string
	markup  bool
	signals chan *dbus.Signal
	closed  chan struct{} // one element
	done    chan struct{} // closed when listen has ended
	shown   chan uint32   // one element: the number of what is shown, 0: nothing
}

func (n *Notifier) connectBus(ctx context.Context) (display, error) {
	address, err := n.opts.Bus()
	if err != nil {
		return nil, err
	}
	c, err := bus.Connect(ctx, address)
	if err != nil {
		return nil, err
	}
	b := &bubble{
		conn: c, signals: make(chan *dbus.Signal), closed: make(chan struct{}, 1),
		done: make(chan struct{}), shown: make(chan uint32, 1),
	}
	b.shown <- 0
	c.Signal(b.signals)
	go b.listen()
	ctx, cancel := context.WithTimeout(ctx, startTimeout)
	defer cancel()
	if err := b.find(ctx); err != nil {
		b.close()
		return nil, fmt.Errorf("find the notification service: %w", err)
	}
	return b, nil
}

// find finds the service and its abilities. The bus starts the service if it does not run.
func (b *bubble) find(ctx context.Context) error {
	var started uint32
	o := b.conn.BusObject()
	// dbus-daemon 1.14 fails for a service that runs without a file that says how to
	// start it. So the next call asks whether the service is there.
	err := o.CallWithContext(ctx, "org.freedesktop.DBus.StartServiceByName", 0, service, uint32(0)).Store(&started)
	if owner := o.CallWithContext(ctx, "org.freedesktop.DBus.GetNameOwner", 0, service).Store(&b.owner); owner != nil {
		return cmp.Or(err, owner)
	}
	b.service = b.conn.Object(b.owner, servicePath)
	if err := b.conn.AddMatchSignalContext(ctx, dbus.WithMatchSender(b.owner), dbus.WithMatchObjectPath(servicePath),
		dbus.WithMatchInterface(service), dbus.WithMatchMember("NotificationClosed")); err != nil {
		return err
	}
	var can []string
	if err := b.call(ctx, "GetCapabilities").Store(&can); err != nil {
		return err
	}
	b.markup = slices.Contains(can, "body-markup")
	return nil
}

func (b *bubble) call(ctx context.Context, method string, args ...any) *dbus.Call {
	return b.service.CallWithContext(ctx, service+"."+method, dbus.FlagNoAutoStart, args...)
}

var escapeMarkup = strings.NewReplacer("&", "&amp;", "<", "&lt;", ">", "&gt;")

func (b *bubble) show(ctx context.Context, title string, lines []string) error {
	ctx, cancel := context.WithTimeout(ctx, showTimeout)
	defer cancel()
	body := strings.Join(lines, "\n")
	if b.markup {
		body = escapeMarkup.Replace(body)
	}
	id := <-b.shown
	hints := map[string]dbus.Variant{"urgency": dbus.MakeVariant(byte(1)), "transient": dbus.MakeVariant(true)}
	err := b.call(ctx, "Notify", "p11-agent", id, "dialog-password", title, body, []string{}, hints,
		int32(expire/time.Millisecond)).Store(&id)
	b.shown <- id
	if err != nil {
		return fmt.Errorf("show a notification: %w", err)
	}
	return nil
}

func (b *bubble) hide(ctx context.Context) {
	id := <-b.shown
	b.shown <- 0
	if id == 0 {
		return
	}
	ctx, cancel := context.WithTimeout(ctx, hideTimeout)
	defer cancel()
	// One that the person has just closed cannot be closed again.
	_ = b.call(ctx, "CloseNotification", id).Err
}

// listen hears when the notification is closed.
func (b *bubble) listen() {
	defer close(b.done)
	for s := range b.signals {
		var id, reason uint32
		if s.Name != service+".NotificationClosed" || dbus.Store(s.Body, &id, &reason) != nil {
			continue
		}
		// Any other sender may say what it wants; owner is set before there is
		// something shown.
		mine := <-b.shown
		if mine == 0 || mine != id || s.Sender != b.owner {
			b.shown <- mine
			continue
		}
		b.shown <- 0
		const byPerson = 2
		if reason == byPerson {
			select {
			case b.closed <- struct{}{}:
			default:
			}
		}
	}
}

func (b *bubble) dismissed() <-chan struct{} { return b.closed }
func (b *bubble) gone() <-chan struct{}      { return b.conn.Context().Done() }

func (b *bubble) close() {
	b.conn.Close() // and with it signals
	<-b.done
}
