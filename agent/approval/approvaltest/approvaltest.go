// Package approvaltest plays the person who is asked whether a key may be used. It is for tests.
package approvaltest

import (
	"context"
	"sync"

	"p11-agent/agent/approval"
	"p11-agent/pinentry/waiting"
)

// A Person has an answer for each question. Any goroutine may ask.
type Person struct {
	// Give returns the answer to the nth question.
	Give func(ctx context.Context, r approval.Question, n int) (approval.Answer, error)

	mu    sync.Mutex
	asked []approval.Question
	again bool
	open  int
	most  int
}

var _ approval.Confirmer = (*Person)(nil)

// Says returns a person who gives the same answer to each question.
func Says(a approval.Answer) *Person {
	return &Person{Give: func(context.Context, approval.Question, int) (approval.Answer, error) { return a, nil }}
}

// Confirm asks on behalf of the requests that wait, as a prompt does.
func (p *Person) Confirm(ctx context.Context, r approval.Question) (answer approval.Answer, err error) {
	err = r.Asking.Ask(ctx, waiting.Question{Ask: func(ctx context.Context) (err error) {
		answer, err = p.confirm(ctx, r)
		return err
	}})
	return answer, err
}

func (p *Person) confirm(ctx context.Context, r approval.Question) (approval.Answer, error) {
	p.mu.Lock()
	p.asked = append(p.asked, r)
	p.again = r.Asking.Again()
	n := len(p.asked)
	p.open++
	p.most = max(p.most, p.open)
	p.mu.Unlock()
	defer func() {
		p.mu.Lock()
		p.open--
		p.mu.Unlock()
	}()
	return p.Give(ctx, r, n)
}

// Asked returns the questions.
func (p *Person) Asked() []approval.Question {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.asked
}

// Count returns the number of questions.
func (p *Person) Count() int { return len(p.Asked()) }

// Again tells whether the last question offered "no to everything from here".
func (p *Person) Again() bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.again
}

// Open returns how many questions are open.
func (p *Person) Open() int {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.open
}

// Most returns how many questions were open at once.
func (p *Person) Most() int {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.most
}
