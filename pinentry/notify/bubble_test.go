package notify_test

import (
	"log/slog"
	"strings"
	"testing"
	"time"

	"p11-agent/agent/logfold/logtest"
	"p11-agent/agent/peer/proctest"
	"p11-agent/pinentry/notify"
	"p11-agent/systemd/bus"
	"p11-agent/systemd/bus/bustest"
)

// busUsed tells whether a notification is on its way to the bus.
func busUsed() bool {
	return proctest.Count(func(g proctest.Goroutine) bool { return strings.Contains(g.Stack, notify.BubbleMethods()) }) > 0
}

// desk has a Notifier and its bus.
type desk struct {
	*notify.Notifier
	*bustest.Bus
	n   *bustest.Notifications
	log logtest.Buffer
}

func newDesk(t *testing.T, capabilities ...string) *desk {
	t.Helper()
	bustest.NoLeaks(t, proctest.Methods[notify.Notifier]())
	d := &desk{Bus: bustest.Start(t)}
	d.n = d.Notifications(capabilities...)
	d.Notifier = notify.New(notify.Options{
		Title: "Touch it", After: time.Millisecond,
		Bus: func() (string, error) { return d.Address(), nil },
		Log: slog.New(slog.NewTextHandler(&d.log, &slog.HandlerOptions{Level: slog.LevelDebug})),
	})
	t.Cleanup(d.Close)
	return d
}

func (d *desk) use(lines ...string) (done func()) {
	return d.Begin("device", func() []string { return lines })
}

// shown waits until there is a single notification, with this body.
func (d *desk) shown(t *testing.T, body string) (b bustest.Bubble) {
	t.Helper()
	proctest.Until(t, "a notification says "+body, func() bool {
		open := d.n.Open()
		if len(open) > 1 {
			t.Fatalf("%d notifications are shown", len(open))
		}
		if len(open) == 1 {
			b = open[0]
		}
		return len(open) == 1 && b.Body == body
	})
	return b
}

func (d *desk) hidden(t *testing.T) {
	t.Helper()
	proctest.Until(t, "no notification is shown", func() bool { return len(d.n.Open()) == 0 })
}

func TestBubble(t *testing.T) {
	d := newDesk(t, "body", "body-markup")
	one := d.use("Key: <b>work</b> & more", "From: a\x1b]0;x\x07\nb")
	b := d.shown(t, "Key: &lt;b&gt;work&lt;/b&gt; &amp; more\n"+`From: a\x1b]0;x\x07 b`)
	if b.App != "p11-agent" || b.Summary != "Touch it" || b.Replaces != 0 || len(b.Actions) > 0 || b.Expire != 120_000 {
		t.Errorf("it is %+v", b)
	}
	if len(b.Hints) != 2 || b.Hints["urgency"].Value() != byte(1) || b.Hints["transient"].Value() != true {
		t.Errorf("its hints are %v", b.Hints)
	}
	two := d.use("another")
	if b := d.shown(t, b.Body+"\n2 signatures are waiting."); b.Replaces != 1 {
		t.Errorf("it replaces %d", b.Replaces)
	}
	one()
	d.shown(t, "another")
	two()
	d.hidden(t)
	proctest.Until(t, "it was closed", func() bool { return d.n.Closed() == 1 })
}

// The agent sends no markup to a service without "body-markup".
func TestPlainBubble(t *testing.T) {
	d := newDesk(t, "body")
	done := d.use("<b>&amp;")
	d.shown(t, "<b>&amp;")
	done()
	d.hidden(t)
}

// If the service shows a notification long after its signature, the agent closes the
// notification then.
func TestServiceHangs(t *testing.T) {
	d := newDesk(t)
	resume := d.n.Hang()
	d.use("late")()
	done := d.use("late")
	proctest.Until(t, "the bus is used", func() bool { return busUsed() })
	done()
	resume()
	next := d.use("next")
	d.shown(t, "next")
	next()
	d.hidden(t)

	// Close does not wait for a service that hangs.
	defer d.n.Hang()()
	d.use("end")
	proctest.Until(t, "the bus is used", func() bool { return busUsed() })
	d.Close()
}

func TestBusHangs(t *testing.T) {
	d := newDesk(t)
	done := d.use("a")
	d.shown(t, "a")
	d.Hang()
	done()
	d.use("b")()
	d.Close()
	d.Resume()
}

// When the bus is back after its end, the agent shows the next notification.
func TestBusGoes(t *testing.T) {
	d := newDesk(t)
	done := d.use("a")
	d.shown(t, "a")
	d.Kill()
	done()
	gone := d.use("gone")
	proctest.Until(t, "it cannot be shown", func() bool { return strings.Contains(d.log.String(), "no notification is shown") })
	gone()
	d.Bus.Restart()
	d.n.Restart()
	d.n.Dismiss()
	back := d.use("back")
	d.shown(t, "back")
	back()
	d.hidden(t)
}

// A new process of the service numbers notifications anew. There the agent's number
// belongs to another program.
func TestServiceRestarts(t *testing.T) {
	d := newDesk(t)
	one := d.use("a")
	d.shown(t, "a")
	d.n.Restart()
	one()
	proctest.Until(t, "it is not shown any more", func() bool {
		return proctest.Count(func(g proctest.Goroutine) bool { return g.Runs(notify.Show) }) == 0
	})
	if open := d.n.Open(); len(open) != 1 {
		t.Errorf("%d notifications of another program are left", len(open))
	}
	two := d.use("b")
	proctest.Until(t, "it is shown", func() bool { return len(d.n.All()) == 2 })
	d.n.Restart()
	three := d.use("c")
	proctest.Until(t, "it is shown anew", func() bool { return len(d.n.All()) >= 3 })
	two()
	three()
	proctest.Until(t, "that is closed", func() bool { return len(d.n.Open()) == 1 })
	if open := d.n.Open(); open[0].App != "another program" {
		t.Errorf("%+v is left", open)
	}
	for _, b := range d.n.All() {
		if b.Replaces != 0 && !strings.Contains(b.Body, "b\n") {
			t.Errorf("%+v replaces a notification of another program", b)
		}
	}
}

// When a person closes a notification, the agent does not show it again. A signal from a
// program other than the service does not count.
func TestDismissedByPerson(t *testing.T) {
	d := newDesk(t)
	one := d.use("a")
	d.shown(t, "a")
	liar := d.Connect()
	var names []string
	if err := liar.BusObject().Call("org.freedesktop.DBus.ListNames", 0).Store(&names); err != nil {
		t.Fatal(err)
	}
	for _, name := range names { // to each by its name, which needs no match
		if strings.HasPrefix(name, ":") {
			bustest.SendTo(liar, name, "/org/freedesktop/Notifications", "org.freedesktop.Notifications.NotificationClosed", []any{uint32(1), uint32(2)})
		}
	}
	if err := liar.BusObject().Call("org.freedesktop.DBus.GetId", 0).Err; err != nil { // comes after those
		t.Fatal(err)
	}
	two := d.use("b")
	d.shown(t, "a\n2 signatures are waiting.")
	d.n.Dismiss()
	proctest.Until(t, "it is heard", func() bool { return strings.Contains(d.log.String(), "a person has closed the notification") })
	two()
	one()
	three := d.use("c")
	d.shown(t, "c")
	three()
	d.hidden(t)
}

func TestNoNotificationServer(t *testing.T) {
	for name, address := range map[string]func(d *desk) (string, error){
		"no bus":     func(*desk) (string, error) { return "", bus.ErrNone },
		"no service": func(d *desk) (string, error) { return d.Address(), nil },
		"no address": func(*desk) (string, error) { return "autolaunch:", nil },
	} {
		t.Run(name, func(t *testing.T) {
			bustest.NoLeaks(t, proctest.Methods[notify.Notifier]())
			d := &desk{Bus: bustest.Start(t)}
			d.Notifier = notify.New(notify.Options{
				After: time.Millisecond, Bus: func() (string, error) { return address(d) },
				Log: slog.New(slog.NewTextHandler(&d.log, &slog.HandlerOptions{Level: slog.LevelDebug})),
			})
			defer d.Close()
			for range 2 {
				done := d.use("a")
				proctest.Until(t, "it is said", func() bool { return strings.Contains(d.log.String(), "no notification is shown") })
				done()
			}
			if s := d.log.String(); strings.Contains(s, "level=INFO") || strings.Contains(s, "level=WARN") {
				t.Errorf("it is not silent: %s", s)
			}
		})
	}
}

// Tell shows a failure once, besides the notification of tokens at work.
func TestTell(t *testing.T) {
	d := newDesk(t, "body", "body-markup")
	done := d.use("at work")
	d.shown(t, "at work")
	for range 10 {
		d.Tell("reason", "refused\x1b", []string{"Key: <b>", "a\x07"})
	}
	proctest.Until(t, "it is told", func() bool { return len(d.n.Open()) == 2 })
	b := d.n.Open()[1]
	if b.Summary != `refused\x1b` || b.Body != `Key: &lt;b&gt;`+"\n"+`a\x07` || b.Replaces != 0 {
		t.Errorf("it is %+v", b)
	}
	for _, key := range []string{"1", "2", "3", "4"} {
		d.Tell(key, "more", nil)
	}
	proctest.Until(t, "no more than three are told", func() bool { return len(d.n.Open()) == 4 })
	done()
	proctest.Until(t, "what was waited for is done", func() bool { return len(d.n.Open()) == 3 })
	d.n.Dismiss()
	proctest.Until(t, "what the person has closed makes room", func() bool {
		d.Tell("one more", "more", nil)
		return len(d.n.Open()) == 1
	})
	d.Close()
	if open := d.n.Open(); len(open) != 0 {
		t.Errorf("%+v is left at the end", open)
	}
	d.Tell("late", "late", nil)
	if n := len(d.n.All()); n != 5 {
		t.Errorf("%d were shown", n)
	}
}
