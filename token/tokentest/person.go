package tokentest

import (
	"context"
	"slices"
	"sync"
	"testing"

	"p11-agent/pinentry/secret"
	"p11-agent/token/pin"
)

// A Person answers what a Store asks, as its fields say. They are set before
// the Person is asked. What was asked is counted.
type Person struct {
	// PINs are typed one after the other; then the Person declines.
	PINs []string
	// Always is typed each time, when it is not empty.
	Always string
	// ByToken is what is typed for the token of a label, instead of the above.
	ByToken map[string]string
	// ByReader is likewise for the reader that a question names, before ByToken.
	ByReader map[string]string
	// Consents is the answer for a last try.
	Consents bool
	// Declines has a notice declined.
	Declines bool
	// Wait, when it is not nil, is waited for before each answer.
	Wait <-chan struct{}

	mu       sync.Mutex
	asked    []pin.Request
	problems []string
	prompts  int
	lastTry  int
	notices  int
	open     int
	most     int
	changed  chan struct{} // closed and replaced when something above changes
}

var _ pin.Asker = (*Person)(nil)

func (p *Person) change(f func()) {
	p.mu.Lock()
	defer p.mu.Unlock()
	f()
	if p.changed != nil {
		close(p.changed)
		p.changed = nil
	}
}

// Ask opens a dialogue.
func (p *Person) Ask(_ context.Context, about pin.Request) (pin.Dialogue, error) {
	p.change(func() {
		p.asked = append(p.asked, about)
		p.open++
		p.most = max(p.most, p.open)
	})
	return &conversation{p: p, about: about}, nil
}

// Asked returns what the dialogues were about.
func (p *Person) Asked() []pin.Request {
	p.mu.Lock()
	defer p.mu.Unlock()
	return slices.Clone(p.asked)
}

// Problems returns what was told of the PINs before, for each question.
func (p *Person) Problems() []string {
	p.mu.Lock()
	defer p.mu.Unlock()
	return slices.Clone(p.problems)
}

// Prompts returns how often a PIN was asked for.
func (p *Person) Prompts() int { return p.count(&p.prompts) }

// LastTries returns how often consent was asked for.
func (p *Person) LastTries() int { return p.count(&p.lastTry) }

// Notices returns how often the PIN was to be typed on the reader.
func (p *Person) Notices() int { return p.count(&p.notices) }

// Open returns how many dialogues are open.
func (p *Person) Open() int { return p.count(&p.open) }

// Most returns how many were open at once.
func (p *Person) Most() int { return p.count(&p.most) }

func (p *Person) count(n *int) int {
	p.mu.Lock()
	defer p.mu.Unlock()
	return *n
}

// Until waits until a condition of the Person's counters holds.
func (p *Person) Until(t testing.TB, condition func() bool) {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	defer cancel()
	for {
		p.mu.Lock()
		if p.changed == nil {
			p.changed = make(chan struct{})
		}
		changed := p.changed
		p.mu.Unlock()
		if condition() {
			return
		}
		select {
		case <-changed:
		case <-ctx.Done():
			t.Fatal("the person was not asked, or did not get rid of a prompt")
		}
	}
}

// conversation is a dialogue with a Person.
type conversation struct {
	p     *Person
	about pin.Request
	once  sync.Once
}

// wait keeps the person busy.
func (c *conversation) wait(ctx context.Context) error {
	if c.p.Wait == nil {
		return ctx.Err()
	}
	select {
	case <-c.p.Wait:
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
}

func (c *conversation) PIN(ctx context.Context, problem string) (*secret.Secret, error) {
	typed := ""
	c.p.change(func() {
		c.p.prompts++
		c.p.problems = append(c.p.problems, problem)
		switch {
		case c.p.ByReader[c.about.Reader] != "":
			typed = c.p.ByReader[c.about.Reader]
		case c.p.ByToken != nil:
			typed = c.p.ByToken[c.about.Token.Label]
		case c.p.Always != "":
			typed = c.p.Always
		case len(c.p.PINs) > 0:
			typed, c.p.PINs = c.p.PINs[0], c.p.PINs[1:]
		}
	})
	if err := c.wait(ctx); err != nil {
		return nil, err
	}
	if typed == "" {
		return nil, pin.ErrCancelled
	}
	return secret.From([]byte(typed))
}

func (c *conversation) LastTry(ctx context.Context, problem string) (bool, error) {
	c.p.change(func() {
		c.p.lastTry++
		c.p.problems = append(c.p.problems, problem)
	})
	return c.p.Consents, c.wait(ctx)
}

func (c *conversation) Notice(ctx context.Context) error {
	c.p.change(func() { c.p.notices++ })
	if c.p.Declines {
		if err := c.wait(ctx); err != nil {
			return err
		}
		return pin.ErrCancelled
	}
	<-ctx.Done()
	return nil
}

func (c *conversation) Close() error {
	c.once.Do(func() { c.p.change(func() { c.p.open-- }) })
	return nil
}
