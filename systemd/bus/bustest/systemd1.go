package bustest

import "github.com/godbus/dbus/v5"

// manager1 stands in for the service manager of a user.
type manager1 struct{ env []string }

// Get answers org.freedesktop.DBus.Properties.Get.
func (m manager1) Get(_, property string) (dbus.Variant, *dbus.Error) {
	if property != "Environment" {
		return dbus.Variant{}, dbus.NewError("org.freedesktop.DBus.Error.UnknownProperty", nil)
	}
	return dbus.MakeVariant(m.env), nil
}

// Systemd1 puts a user's service manager on the Bus. It has only this environment, and
// replaces an earlier service manager.
func (b *Bus) Systemd1(env ...string) {
	b.t.Helper()
	const name = "org.freedesktop.systemd1"
	c := b.Connect()
	if err := c.Export(manager1{env}, "/org/freedesktop/systemd1", "org.freedesktop.DBus.Properties"); err != nil {
		b.t.Fatal(err)
	}
	reply, err := c.RequestName(name, dbus.NameFlagReplaceExisting|dbus.NameFlagAllowReplacement)
	if err != nil || reply != dbus.RequestNameReplyPrimaryOwner {
		b.t.Fatalf("own %s: %v, %v", name, reply, err)
	}
}
