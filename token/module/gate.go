package module

import "context"

// width is the number of callers that a gate lets through side by side.
const width = 64

// A gate is a lock for many at once or one alone, as sync.RWMutex, of which a
// caller can stop waiting for.
//
// Each caller in it holds a place. One that wants to be alone takes the turn,
// so that two of them do not keep places from each other, and then all places,
// as they come free.
type gate struct {
	turn   chan struct{}
	places chan struct{}
}

func newGate() *gate {
	return &gate{turn: make(chan struct{}, 1), places: make(chan struct{}, width)}
}

// enter lets the caller in beside others, or alone: when everybody has left, and
// nobody else until it has. It is let out by leave.
func (g *gate) enter(ctx context.Context, alone bool) error {
	if !alone {
		return take(ctx, g.places)
	}
	if err := take(ctx, g.turn); err != nil {
		return err
	}
	for n := range width {
		if err := take(ctx, g.places); err != nil {
			for range n {
				<-g.places
			}
			<-g.turn
			return err
		}
	}
	return nil
}

// leave lets a caller out who was let in by enter in the same way.
func (g *gate) leave(alone bool) {
	if !alone {
		<-g.places
		return
	}
	for range width {
		<-g.places
	}
	<-g.turn
}

// take puts one element into c, unless ctx ends first.
func take(ctx context.Context, c chan struct{}) error {
	if err := ctx.Err(); err != nil { // a select would pick either
		return err
	}
	select {
	case c <- struct{}{}:
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
}
