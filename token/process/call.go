package process

import (
	"context"
	"errors"
	"fmt"
	"net"
	"time"

	"p11-agent/token/wire"
)

// Call makes one request and waits for its answer. When ctx ends first, Call returns its error and tells the module
// process. A module that does not answer within timeout ends, even after Call has returned.
//
// The error is the module's *wire.Error, the error of ctx, or [ErrGone] with the reason why the process ended.
func (p *Process) Call(ctx context.Context, timeout time.Duration, t wire.Type, req, reply wire.Message) error {
	return p.request(ctx, false, timeout, t, req, reply, nil)
}

// CallThrough is Call for a request that the module process undoes when ctx ends. It returns after that.
func (p *Process) CallThrough(ctx context.Context, timeout time.Duration, t wire.Type, req, reply wire.Message) error {
	return p.request(ctx, true, timeout, t, req, reply, nil)
}

// callParts is Call for an answer in parts. Each part gives the module the whole timeout again. part gets one part
// after the other, and must not block. After an error of callParts, part may still be called.
func (p *Process) callParts(ctx context.Context, timeout time.Duration, t wire.Type, req, reply wire.Message, part func(wire.Frame) error) error {
	return p.request(ctx, false, timeout, t, req, reply, part)
}

func (p *Process) request(ctx context.Context, through bool, timeout time.Duration, t wire.Type, req, reply wire.Message, part func(wire.Frame) error) error {
	if err := ctx.Err(); err != nil {
		return err
	}
	long := t == wire.TypeGenerate || t == wire.TypeNewToken
	switch {
	case long:
		timeout = max(timeout, p.timeout)
	case p.timeout != 0:
		timeout = p.timeout
	}
	w := &pending{
		answer: make(chan wire.Frame, 1), timeout: timeout, since: time.Now(), long: long, part: part,
		secret: p.output != nil && confidential(req),
	}
	mark := p.output.mark()
	p.mu.Lock()
	if p.err != nil {
		p.mu.Unlock()
		return p.ended(ctx)
	}
	w.queue = p.queueLocked(tokenOf(req))
	id := p.numberLocked()
	p.addLocked(id, w)
	p.mu.Unlock()
	if w.secret {
		p.output.beginSecret() // read ends it
	}

	if err := p.conn.WriteRequest(id, t, req); err != nil {
		p.mu.Lock()
		if p.waiting[id] == w {
			delete(p.waiting, id)
			if w.secret {
				defer p.output.endSecret()
			}
		}
		p.mu.Unlock()
		if _, ok := errors.AsType[*net.OpError](err); !ok {
			return err // the request was not sent
		}
		// The process has ended, or has closed its socket and is of no use. Its end gives the reason.
		_ = p.cmd.Process.Kill()
		return p.ended(ctx)
	}
	select {
	case f, ok := <-w.answer:
		if !ok {
			return p.ended(ctx)
		}
		return p.output.explain(f.Decode(reply), mark)
	case <-ctx.Done():
		// The entry stays, and a late answer finds it. If the connection fails now, read notices as well.
		tell := make(chan struct{})
		wipe := func() {
			if o, ok := req.(*wire.Operate); ok && o.Function.Secret() {
				f := <-w.answer // which comes within the timeout, or the process ends
				f.Wipe()
			}
		}
		p.mu.Lock()
		late := p.err == nil && p.waiting[id] == w
		if late {
			cancel := p.numberLocked()
			p.sending.Go(func() {
				_ = p.conn.WriteRequest(cancel, wire.TypeCancel, &wire.Cancel{Request: id})
				close(tell)
				wipe()
			})
		} else {
			close(tell)
		}
		p.mu.Unlock()
		if !late {
			wipe() // the answer, or the end, is there
		}
		if !through {
			return ctx.Err()
		}
		<-tell
		f, ok := <-w.answer // within the timeout
		if !ok {
			return p.ended(context.WithoutCancel(ctx))
		}
		return p.output.explain(f.Decode(reply), mark)
	}
}

// tokenOf returns the token that a request is about, and the zero ID for a request about the module.
func tokenOf(req wire.Message) wire.TokenID {
	switch r := req.(type) {
	case *wire.Objects:
		return r.Token
	case *wire.Token:
		return r.Token
	case *wire.Login:
		return r.Token
	case *wire.Operate:
		return r.Key.Token
	case *wire.Generate:
		return r.Token
	}
	return wire.TokenID{}
}

// confidential reports whether what the module prints during a request may be secret: a PIN, or what it decrypts.
func confidential(req wire.Message) bool {
	switch r := req.(type) {
	case *wire.Login:
		return r.PIN.Len() > 0
	case *wire.Operate:
		return r.PIN.Len() > 0 || r.Function.Secret()
	case *wire.NewToken:
		return r.PIN.Len() > 0
	}
	return false
}

// numberLocked returns the next request number.
func (p *Process) numberLocked() uint32 {
	p.next++
	if p.next == 0 {
		p.next = 1
	}
	return p.next
}

// ended returns the error of a request whose process has ended. It waits until Wait has returned, because the exit
// status says more than the end of the connection.
func (p *Process) ended(ctx context.Context) error {
	select {
	case <-p.done:
	case <-ctx.Done(): // a process that is stuck in the kernel does not end
		return ctx.Err()
	}
	err := p.Err()
	if !errors.Is(err, ErrGone) {
		err = fmt.Errorf("%w: %w", ErrGone, err)
	}
	return err
}
