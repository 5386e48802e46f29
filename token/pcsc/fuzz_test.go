package pcsc

import (
	"bytes"
	"encoding/binary"
	"testing"
	"unicode/utf8"

	"golang.org/x/sys/unix"
)

func FuzzReaders(f *testing.F) {
	empty := make([]byte, maxReaders*stateSize)
	one := bytes.Clone(empty)
	copy(one, "Some Reader 00 00")
	binary.NativeEndian.PutUint32(one[nameSize:], 3)
	binary.NativeEndian.PutUint32(one[nameSize+4:], 0x34)
	binary.NativeEndian.PutUint32(one[nameSize+8:], 0xffffffff)
	if readers, err := parseReaders(one); err != nil || len(readers) != 1 ||
		readers[0] != (Reader{Name: "Some Reader 00 00", Card: true, Users: Exclusive, Events: 3}) {
		f.Fatalf("got %+v, %v", readers, err)
	}
	for _, seed := range [][]byte{nil, empty, one, bytes.Repeat([]byte{0xff}, len(empty)), empty[1:]} {
		f.Add(seed)
	}
	f.Fuzz(func(t *testing.T, b []byte) {
		readers, err := parseReaders(b)
		if err != nil && readers != nil {
			t.Error("readers beside an error")
		}
		if len(readers) > maxReaders {
			t.Errorf("%d readers", len(readers))
		}
		for _, r := range readers {
			if r.Name == "" || len(r.Name) >= nameSize || !utf8.ValidString(r.Name) || r.Users < Exclusive {
				t.Errorf("a reader %+v", r)
			}
		}
	})
}

func FuzzDiag(f *testing.F) {
	attribute := func(kind uint16, values ...uint32) []byte {
		b := binary.NativeEndian.AppendUint16(nil, uint16(unix.SizeofNlAttr+4*len(values)))
		b = binary.NativeEndian.AppendUint16(b, kind)
		for _, v := range values {
			b = binary.NativeEndian.AppendUint32(b, v)
		}
		return b
	}
	message := func(kind uint16, body []byte) []byte {
		b := binary.NativeEndian.AppendUint32(nil, uint32(unix.SizeofNlMsghdr+len(body)))
		b = binary.NativeEndian.AppendUint16(b, kind)
		return append(append(b, make([]byte, unix.SizeofNlMsghdr-6)...), body...)
	}
	file := vfs{dev: unix.Mkdev(8, 1), ino: 77}
	socket := func(dev, ino, peer uint32) []byte {
		body := append(make([]byte, diagMessageSize), attribute(diagVFS, ino, dev)...)
		return message(unix.SOCK_DIAG_BY_FAMILY, append(body, attribute(diagPeer, peer)...))
	}
	const dev = 8<<20 | 1
	list := bytes.Join([][]byte{socket(dev, 77, 5), socket(dev, 78, 6), socket(dev+1, 77, 7), socket(dev, 77, 0), socket(dev, 77, 8)}, nil)
	peers := make(map[uint32]bool)
	if done, err := parseDiag(list, file, peers); done || err != nil || len(peers) != 2 || !peers[5] || !peers[8] {
		f.Fatalf("got %v, %v, %v", peers, done, err)
	}
	if done, err := parseDiag(message(unix.NLMSG_DONE, make([]byte, 4)), file, peers); !done || err != nil {
		f.Fatalf("the end: %v, %v", done, err)
	}
	for _, seed := range [][]byte{
		nil, list, list[:len(list)-3], message(unix.NLMSG_DONE, nil), message(unix.NLMSG_ERROR, nil),
		message(unix.NLMSG_ERROR, []byte{0xff, 0xff, 0xff, 0xff}), make([]byte, 64),
	} {
		f.Add(seed)
	}
	f.Fuzz(func(t *testing.T, b []byte) {
		peers := make(map[uint32]bool)
		_, _ = parseDiag(b, file, peers)
		if len(peers) > len(b)/diagMessageSize || peers[0] {
			t.Errorf("%d peers in %d bytes", len(peers), len(b))
		}
	})
}
