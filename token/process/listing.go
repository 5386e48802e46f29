package process

import (
	"context"
	"errors"
	"fmt"

	"p11-agent/token/wire"
)

// objectRoom is the most bytes that an object takes besides its texts and numbers.
const objectRoom = 256

// errEndless ends a module process that lists more than it may.
var errEndless = errors.New("it lists objects without end")

// A Listing holds the objects of a token.
type Listing struct {
	Info    wire.TokenInfo
	Objects []wire.Object
	Size    int  // the memory that Objects takes, in bytes and about
	Cut     bool // the token has more objects
	Long    int  // the certificates whose value is too long and left out
}

// add adds objects. It fails if there are more than a module process may list.
func (l *Listing) add(objects []wire.Object) error {
	l.Objects = append(l.Objects, objects...)
	l.Size += size(objects)
	const most = wire.MaxObjects + wire.MaxNamedObjects
	if len(l.Objects) > most || l.Size > wire.MaxObjectBytes+wire.MaxNamedBytes+objectRoom*most {
		return errEndless
	}
	return nil
}

// Objects has the module process list the objects of a token.
func (p *Process) Objects(ctx context.Context, req *wire.Objects) (*Listing, error) {
	all := new(Listing)
	part := func(f wire.Frame) error {
		part := new(wire.ObjectsPart)
		if err := f.Decode(part); err != nil {
			return err
		}
		if part.First {
			*all = Listing{}
		}
		return all.add(part.Objects)
	}
	reply := new(wire.ObjectsReply)
	if err := p.callParts(ctx, ListTimeout, wire.TypeObjects, req, reply, part); err != nil {
		return nil, err
	}
	if err := all.add(reply.Objects); err != nil {
		p.Kill(fmt.Errorf("its answer made no sense: %w", err))
		return nil, err
	}
	all.Info, all.Cut, all.Long = reply.Info, reply.Cut, int(reply.Long)
	return all, nil
}

// size estimates the memory in bytes that objects take.
func size(objects []wire.Object) int {
	n := 0
	for i := range objects {
		o := &objects[i]
		n += objectRoom + len(o.ID) + len(o.Label) + len(o.Modulus) + len(o.Exponent) + len(o.ECParams) + len(o.ECPoint) + len(o.Value)
	}
	return n
}
