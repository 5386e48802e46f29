package module

import "context"

// width is the number of callers that a gate lets through side by side.
const width = 64

// A gate is a lock that many callers share or one caller has alone, as sync.RWMutex is. A
// caller can stop waiting for a gate.
//
// Each caller inside holds a place. A caller that wants to be alone first takes the turn,
// and then all places as they become free. The turn prevents two such callers from taking
// places from each other.
type gate struct {
	turn   chan struct{}
	places chan struct{}
}

func newGate() *gate {
	return &gate{turn: make(chan struct{}, 1), places: make(chan struct{}, width)}
}

// enter lets the caller in beside others, or alone. To be alone, the caller waits until
// all others have left, and no other caller enters until it leaves. The caller leaves
// with leave.
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

// leave lets a caller out. alone has the same value as in the caller's enter.
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
	if err := ctx.Err(); err != nil { // a select may pick either case
		return err
	}
	select {
	case c <- struct{}{}:
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
}
