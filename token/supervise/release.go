package supervise

import (
	"cmp"
	"context"
	"errors"
	"time"

	"p11-agent/token/process"
	"p11-agent/token/readers"
)

// A module for smart cards keeps a connection to each card from its first look until C_Finalize.
// Neither C_CloseSession nor C_CloseAllSessions ends the connection (measured with OpenSC 0.23 and
// libykcs11 2.2). Other programs may share the card meanwhile. A program that wants the card alone
// is refused, as GnuPG's scdaemon, which always does. So the agent ends the process of an unused
// module. It starts the process again for a request, or when a card comes or goes. pcscd reports
// that.

const (
	// ReleaseIdle is how long the agent keeps an unused module without a login.
	ReleaseIdle = 30 * time.Second
	// ReleaseNever is an Options.Idle that keeps the cards for ever.
	ReleaseNever = time.Duration(-1)
	// releaseBound is the time to log out of the tokens of the module.
	releaseBound = 5 * time.Second
	// releaseWatch is how often the agent asks pcscd for cards meanwhile.
	releaseWatch = time.Second
)

// errReleased ends a process that no request has needed for a while.
var errReleased = errors.New("the agent released its cards")

// releaseAfter returns how long the module must be idle, and whether it may be released at all.
func (s *Supervisor) releaseAfter(p *process.Process) (idle time.Duration, ok bool) {
	if !s.opts.Readers.Used() {
		return 0, false
	}
	if s.host.LoggedIn(p) {
		return s.opts.Release, s.opts.Release > 0
	}
	idle = cmp.Or(s.opts.Idle, ReleaseIdle)
	return idle, idle > 0
}

// releaseCheck returns when to look again whether the module can be released.
func (s *Supervisor) releaseCheck() time.Duration {
	check := ReleaseIdle
	for _, d := range []time.Duration{s.opts.Release, s.opts.Idle} {
		if d > 0 {
			check = min(check, d)
		}
	}
	return max(check, time.Millisecond)
}

// release ends the process with every login after it was unused for long enough. It returns a watch of the readers from
// just before. If the process goes on, release returns nil and when to call it again.
func (s *Supervisor) release(ctx context.Context, p *process.Process) (watch *readers.Watch, again time.Duration) {
	idle, ok := s.releaseAfter(p)
	if !ok {
		return nil, s.releaseCheck()
	}
	s.mu.Lock()
	left := idle - min(time.Since(s.lastUse), time.Since(s.lastLook))
	busy := s.users > 0
	s.mu.Unlock()
	switch {
	case busy:
		return nil, s.releaseCheck()
	case left > 0:
		return nil, left
	}
	watch, err := s.opts.Readers.Watch(ctx)
	if err != nil { // the agent would not learn of new cards, or of a free reader
		if errors.Is(err, readers.ErrMissed) {
			p.Notify()
		}
		return nil, s.releaseCheck()
	}
	if !s.park() {
		watch.Close()
		return nil, idle
	}
	// Kill ends a module that hangs.
	bounded, cancel := context.WithTimeout(ctx, releaseBound)
	defer cancel()
	s.host.LogOut(bounded, p)
	p.Kill(errReleased)
	s.log.Debug("released the cards until a request needs them")
	return watch, 0
}

// park takes the process away from requests, unless one needs it.
func (s *Supervisor) park() (parked bool) {
	s.change(func() {
		if parked = s.users == 0; parked {
			drain(s.needed) // from a request that met the start after an earlier release
			s.proc, s.err, s.released = nil, nil, true
		}
	})
	return parked
}

// rest waits until a request needs the released module. due are the requests for a look.
func (s *Supervisor) rest(ctx context.Context, watch *readers.Watch) (due []*lookup) {
	defer watch.Close()
	tick := time.NewTicker(releaseWatch)
	defer tick.Stop()
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-s.needed:
			return nil
		case l := <-s.wanted:
			return []*lookup{l}
		case <-tick.C:
			if watch.Changed(ctx) {
				return nil
			}
		}
	}
}
