package login1_test

import (
	"strings"

	"github.com/godbus/dbus/v5"
)

// sendTo sends a signal to one connection, whether or not it wants it.
func sendTo(c *dbus.Conn, to, path, name string, body []any) {
	i := strings.LastIndexByte(name, '.')
	m := &dbus.Message{
		Type: dbus.TypeSignal, Flags: dbus.FlagNoReplyExpected, Body: body,
		Headers: map[dbus.HeaderField]dbus.Variant{
			dbus.FieldDestination: dbus.MakeVariant(to),
			dbus.FieldPath:        dbus.MakeVariant(dbus.ObjectPath(path)),
			dbus.FieldInterface:   dbus.MakeVariant(name[:i]),
			dbus.FieldMember:      dbus.MakeVariant(name[i+1:]),
		},
	}
	if len(body) > 0 {
		m.Headers[dbus.FieldSignature] = dbus.MakeVariant(dbus.SignatureOf(body...))
	}
	c.Send(m, nil)
}
