package card

import (
	"sync"
	"time"
)

// Visits counts how often a token has come, and knows when it left. Methods may be called from any goroutine. Its lock
// comes after all others.
type Visits struct {
	mu    sync.Mutex
	count uint64
	left  time.Time
}

// Restore sets what is known from earlier.
func (v *Visits) Restore(count uint64, left time.Time) {
	v.mu.Lock()
	defer v.mu.Unlock()
	v.count, v.left = count, left
}

// Come notes that the token has come.
func (v *Visits) Come() {
	v.mu.Lock()
	defer v.mu.Unlock()
	v.count++
}

// Leave notes that the token has left.
func (v *Visits) Leave() {
	v.mu.Lock()
	defer v.mu.Unlock()
	v.left = time.Now()
}

// Count returns how often the token has come.
func (v *Visits) Count() uint64 {
	v.mu.Lock()
	defer v.mu.Unlock()
	return v.count
}

// Left returns when the token left last, or zero.
func (v *Visits) Left() time.Time {
	v.mu.Lock()
	defer v.mu.Unlock()
	return v.left
}
