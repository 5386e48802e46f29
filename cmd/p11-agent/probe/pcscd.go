package probe

import (
	"context"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"p11-agent/token/pcsc"
)

// sysUSB is where the kernel lists USB devices.
const sysUSB = "/sys/bus/usb/devices"

// A PCSCD is the state of pcscd and of the readers of this machine.
type PCSCD struct {
	Socket  string
	Readers []pcsc.Reader
	Clients pcsc.Connections // unknown when it is empty
	Err     error            // why pcscd does not tell its readers
	USB     []string         // the names of the readers that are plugged in
	UID     int              // of this process: pcscd admits root always
}

// AskPCSCD asks pcscd for its readers and their users. It touches no card.
func AskPCSCD(ctx context.Context) PCSCD {
	d := PCSCD{Socket: pcsc.Socket(os.Environ()), USB: usbReaders(sysUSB), UID: os.Geteuid()}
	if d.Readers, d.Err = pcsc.Readers(ctx, d.Socket); d.Err == nil {
		d.Clients, _ = pcsc.Clients(ctx, d.Socket) // an error leaves the clients unknown
	}
	return d
}

// usbReaders returns the names of the readers of smart cards on USB. They have an interface
// of class 0x0b (Smart Card; USB, Device Class Definition for CCID). Security keys with a
// smart card have one, too.
func usbReaders(sys string) []string {
	files, err := filepath.Glob(filepath.Join(sys, "*:*", "bInterfaceClass"))
	if err != nil {
		return nil
	}
	var names []string
	for _, file := range files {
		if Line(file) != "0b" {
			continue
		}
		device, _, _ := strings.Cut(filepath.Base(filepath.Dir(file)), ":")
		name := strings.TrimSpace(Line(filepath.Join(sys, device, "manufacturer")) + " " + Line(filepath.Join(sys, device, "product")))
		if name == "" {
			name = "a reader"
		}
		if !slices.Contains(names, name) {
			names = append(names, name)
		}
	}
	return names
}
