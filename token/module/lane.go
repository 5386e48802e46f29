package module

import (
	"context"
	"errors"
	"io"
	"runtime"
	"sync"
	"time"

	"p11-agent/token/wire"
)

// maxOpenLanes bounds the lanes of all tokens, and so the threads that wait for requests.
const maxOpenLanes = 1024

// A lane does operations with one token, one after the other.
type lane struct {
	c *wire.ModuleLane
	t *token

	mu     sync.Mutex
	id     uint32 // of the request under way; 0 between requests
	ctx    context.Context
	cancel context.CancelFunc // of ctx, which lasts until a request is cancelled
}

// acceptLanes serves the lanes that the agent opens, until the agent has gone.
func (s *server) acceptLanes(from *wire.ModuleLanes) {
	for {
		c, id, err := from.Accept()
		if err != nil {
			if !errors.Is(err, io.EOF) {
				s.log.Printf("take a lane of the agent: %v", err)
			}
			return
		}
		l := &lane{c: c, t: s.token(id)}
		s.mu.Lock()
		full := len(s.lanes) >= maxOpenLanes
		if !full {
			s.lanes[l] = struct{}{}
		}
		s.mu.Unlock()
		if full {
			s.log.Print("too many lanes at once")
			_ = c.Close()
			continue
		}
		go s.serveLane(l)
	}
}

// serveLane does operations until the agent closes the lane.
func (s *server) serveLane(l *lane) {
	defer func() {
		s.mu.Lock()
		delete(s.lanes, l)
		s.mu.Unlock()
		_ = l.c.Close()
	}()
	var m wire.Operate
	var reply wire.OperateReply
	room := make([]byte, maxResult)
	var scheduled time.Time
	var took time.Duration // what the last signature took
	for {
		awake := s.stayAwake(took)
		id, err := l.c.ReadRequest(&m, awake)
		if awake > 0 {
			s.awake.Store(false)
		}
		if err == nil {
			ctx, start := l.begin(id), time.Now()
			if reply.Result, err = s.operateOnLane(ctx, l, &m, room); err == nil {
				l.end()
				took = time.Since(start)
				err = l.c.WriteReply(id, &reply)
				if m.Function.Secret() {
					clear(reply.Result)
				}
			} else {
				l.end()
				if s.lost.Load() {
					// The agent must hear of the loss first, on its other connection.
					// Then it ends this process. The request itself is not wrong, so it
					// gets no error.
					select {}
				}
				err = l.c.WriteError(id, asError(err))
			}
		}
		if err != nil {
			if !errors.Is(err, io.EOF) {
				s.log.Printf("answer the agent on a lane: %v", err)
			}
			return
		}
		// A thread may make only system calls for 10 ms. Then the scheduler takes it for
		// a thread that does not let others run, and would check it every 20 µs.
		if now := time.Now(); now.Sub(scheduled) > 5*time.Millisecond {
			runtime.Gosched()
			scheduled = now
		}
	}
}

// awakeFor is how long a thread stays awake for the next request.
const awakeFor = 100 * time.Microsecond

// stayAwake returns how long a lane waits for the next request without going to sleep.
// The lane resets s.awake after the wait. A processor that was put to sleep works at half
// its speed for about this time after it wakes. To wake it takes as long as a fast
// signature. So one lane at a time stays awake after a signature, but no longer than that
// time.
func (s *server) stayAwake(took time.Duration) time.Duration {
	if took == 0 || took > time.Millisecond || processors == 1 || !s.awake.CompareAndSwap(false, true) {
		return 0
	}
	return awakeFor
}

var processors = runtime.NumCPU()

func (s *server) operateOnLane(ctx context.Context, l *lane, m *wire.Operate, room []byte) ([]byte, error) {
	lib := s.lib.Load()
	switch {
	case lib == nil:
		return nil, nonsense("no module is loaded")
	case m.Key.Token != l.t.id:
		return nil, nonsense("the lane is another token's")
	}
	s.life.RLock()
	defer s.life.RUnlock()
	return s.operate(ctx, lib, l.t, m, room)
}

// begin notes which request is under way. It returns the context that ends when the agent
// cancels the request.
func (l *lane) begin(id uint32) context.Context {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.id = id
	if l.ctx == nil || l.ctx.Err() != nil {
		l.ctx, l.cancel = context.WithCancel(context.Background())
	}
	return l.ctx
}

// end notes that no request is under way.
func (l *lane) end() {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.id = 0
}

// underWay tells whether a request is under way.
func (l *lane) underWay() bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.id != 0
}

// cancelled notes that the agent no longer waits for a request, if the request is under
// way. A request that has not arrived yet is not found, and the lane makes its signature
// in vain.
func (l *lane) cancelled(id uint32) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.id == id {
		l.cancel()
	}
}
