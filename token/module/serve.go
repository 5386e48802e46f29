package module

import (
	"context"
	"errors"
	"fmt"
	"log"
	"os"
	"slices"
	"sync"
	"sync/atomic"

	"p11-agent/token/module/sandbox"
	"p11-agent/token/wire"
)

// maxRequests bounds the requests under way. Fewer of them are in a call of the module.
// The sessions of a token, its gate, and the turn to list slots bound these, and so the
// threads.
const maxRequests = 4096

// A server answers the agent's requests.
//
// One goroutine only reads. So the agent can cancel a request, and the server sees the
// end of the agent, even if the module hangs. Each request has its own goroutine, and so
// has each lane. At the end the process exits without waiting for them.
type server struct {
	conn *wire.ModuleConn
	log  *log.Logger

	greeted atomic.Bool
	lost    atomic.Bool             // the agent knows that this process is of no further use
	awake   atomic.Bool             // a lane waits for a request without sleeping
	lib     atomic.Pointer[library] // nil until the module has been initialised

	// listing has room for one element. The goroutine that lists slots puts it in
	// meanwhile.
	listing chan struct{}
	down    bool // for the holder of listing: C_Finalize has succeeded, and then C_Initialize has failed

	// lock order: polling, then life, then mu

	polling sync.Mutex // held while the process asks the module for changes

	waiter *eventWaiter // set before lib

	life     sync.RWMutex // each request holds it for reading; reinitialize holds it alone
	initArgs string

	mu         sync.Mutex
	requests   map[uint32]context.CancelFunc
	lanes      map[*lane]struct{}
	tokens     map[wire.TokenID]*token
	slots      map[wire.TokenID]uint // where each token was last seen
	placed     map[wire.TokenID]bool // the agent has named the slot in slots
	stays      uint64                // the number of stays of tokens so far
	mechanisms map[wire.TokenID][]wire.Mechanism
	seen       *snapshot // what the agent knows
	leaving    []stay    // tokens that have gone, and are not forgotten yet
	gone       []uint    // slots that have lost their token since, which the agent does not know yet
	fixed      bool      // no token can be plugged into the slots that the agent knows
}

func newServer(conn *wire.ModuleConn, logger *log.Logger) *server {
	return &server{
		conn:       conn,
		log:        logger,
		listing:    make(chan struct{}, 1),
		requests:   make(map[uint32]context.CancelFunc),
		lanes:      make(map[*lane]struct{}),
		tokens:     make(map[wire.TokenID]*token),
		slots:      make(map[wire.TokenID]uint),
		placed:     make(map[wire.TokenID]bool),
		mechanisms: make(map[wire.TokenID][]wire.Mechanism),
	}
}

// serve answers requests until the connection ends. The error is io.EOF when the agent
// has ended the connection.
func (s *server) serve() error {
	for {
		r, err := s.conn.ReadRequest()
		if err != nil {
			return err
		}
		if c, ok := r.Message.(*wire.Cancel); ok {
			s.cancel(c.Request)
			continue
		}
		ctx, cancel := context.WithCancel(context.Background())
		s.mu.Lock()
		_, twice := s.requests[r.ID]
		full := len(s.requests) >= maxRequests
		if !twice && !full {
			s.requests[r.ID] = cancel
		}
		s.mu.Unlock()
		if twice {
			cancel()
			return fmt.Errorf("request %d came twice", r.ID)
		}
		go func() {
			defer cancel()
			if full {
				wipe(r.Message)
				s.answer(r.ID, nil, &wire.Error{Reason: wire.ReasonProtocol, Text: "too many requests at once"})
				return
			}
			reply, err := s.handle(ctx, r)
			s.mu.Lock()
			delete(s.requests, r.ID) // before the agent can use the number again
			s.mu.Unlock()
			s.answer(r.ID, reply, err)
			if o, ok := reply.(*wire.OperateReply); ok {
				clear(o.Result) // it may be a secret
			}
		}()
	}
}

func (s *server) cancel(id uint32) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if cancel, ok := s.requests[id]; ok {
		cancel()
	}
	for l := range s.lanes {
		l.cancelled(id)
	}
}

// wipe overwrites the PIN in a request.
func wipe(m wire.Message) {
	switch m := m.(type) {
	case *wire.Login:
		m.PIN.Wipe()
	case *wire.Operate:
		m.PIN.Wipe()
	case *wire.NewToken:
		m.PIN.Wipe()
	}
}

// answer sends the outcome of a request. If the connection has failed, the reader sees
// its end.
func (s *server) answer(id uint32, reply wire.Message, err error) {
	if err == nil {
		if err = s.conn.WriteReply(id, reply); err == nil {
			return
		}
	}
	if err := s.conn.WriteError(id, asError(err)); err != nil {
		s.log.Printf("answer the agent: %v", err)
	}
}

// asError turns any error into one for the agent.
func asError(err error) *wire.Error {
	e, ok := errors.AsType[*wire.Error](err)
	switch {
	case ok:
		return e
	case errors.Is(err, context.Canceled):
		return &wire.Error{RV: wire.CKRFunctionCanceled, Text: "no client waits for the answer any more"}
	}
	return &wire.Error{Text: err.Error()}
}

// nonsense returns the error for a request that the agent should not make.
func nonsense(why string) error {
	return &wire.Error{Reason: wire.ReasonProtocol, Text: why}
}

// handle carries out a request.
func (s *server) handle(ctx context.Context, r wire.Request) (wire.Message, error) {
	defer wipe(r.Message)
	if m, ok := r.Message.(*wire.Hello); ok {
		return s.hello(m)
	}
	lib := s.lib.Load()
	if lib == nil {
		return nil, nonsense("no module is loaded")
	}
	if m, ok := r.Message.(*wire.Slots); ok {
		return s.listSlots(ctx, lib, m)
	}
	s.life.RLock()
	defer s.life.RUnlock()
	switch m := r.Message.(type) {
	case *wire.NewToken:
		return s.newToken(ctx, lib, m)
	case *wire.Objects:
		return s.listObjects(ctx, lib, m, func(part *wire.ObjectsPart) error { return s.conn.WritePart(r.ID, part) })
	case *wire.Token:
		if r.Type == wire.TypeLogout {
			return s.logout(ctx, lib, s.token(m.Token))
		}
		return s.state(ctx, lib, s.token(m.Token))
	case *wire.Login:
		return s.login(ctx, lib, s.token(m.Token), m)
	case *wire.Generate:
		return s.generate(ctx, lib, s.token(m.Token), m)
	case *wire.Operate:
		result, err := s.operate(ctx, lib, s.token(m.Key.Token), m, nil)
		if err != nil {
			return nil, err
		}
		return &wire.OperateReply{Result: result}, nil
	default:
		return nil, fmt.Errorf("%T is not known here", m)
	}
}

// hello loads the module.
func (s *server) hello(m *wire.Hello) (wire.Message, error) {
	if m.Version != wire.Version {
		return nil, nonsense("p11-agent was replaced while it ran: restart it")
	}
	if s.greeted.Swap(true) {
		return nil, nonsense("a module was asked for already")
	}
	if err := checkFile(m.Path); err != nil {
		return nil, err
	}
	confined := wire.Sandbox{Off: true}
	limits := sandbox.Options{Module: m.Path, InitArgs: m.InitArgs, Write: m.Write, Getenv: os.Getenv}
	files := sandbox.Own(limits)
	if !m.Unconfined {
		// The sandbox confines every thread, including later ones.
		confined = sandbox.Enter(limits)
	}
	lib, err := load(m.Path)
	if err != nil {
		return nil, err
	}
	if err := lib.initialize(m.InitArgs); err != nil {
		return nil, err
	}
	if !m.Unconfined && !slices.Equal(files, sandbox.Own(limits)) {
		// A person has just configured the module. The sandbox keeps the module from its files.
		return nil, errors.New("the configuration of the module has changed while the module was loaded")
	}
	info, err := lib.info()
	if err != nil {
		return nil, err
	}
	if err := s.watch(lib, m.Poll); err != nil {
		return nil, err
	}
	s.initArgs = m.InitArgs // no goroutine reads it before lib is set
	s.lib.Store(lib)
	waits, _ := s.waiter.waits()
	return &wire.HelloReply{
		Version:      wire.Version,
		Manufacturer: text(info.ManufacturerID, maxText),
		Description:  text(info.LibraryDescription, maxText),
		Library:      uint32(info.LibraryVersion.Major)<<8 | uint32(info.LibraryVersion.Minor),
		Cryptoki:     uint32(info.CryptokiVersion.Major)<<8 | uint32(info.CryptokiVersion.Minor),
		Waits:        waits,
		Sandbox:      confined,
	}, nil
}

// token returns the record of a token. A new record holds only the token's name.
func (s *server) token(id wire.TokenID) *token {
	s.mu.Lock()
	defer s.mu.Unlock()
	t, ok := s.tokens[id]
	if !ok {
		t = newToken(id)
		s.tokens[id] = t
	}
	return t
}

// find returns the presence of a token.
func (s *server) find(ctx context.Context, lib *library, t *token) (*presence, error) {
	if p := t.present(); p != nil {
		return p, nil
	}
	p, err := t.find(ctx, lib, func() (where place) {
		s.mu.Lock()
		defer s.mu.Unlock()
		where.slot, where.known = s.slots[t.id]
		where.only = s.placed[t.id]
		s.stays++
		where.stay = s.stays
		return where
	})
	if code(err) == wire.CKRSessionCount && lib.closed.Load() {
		// No session is left for the first session of the token. The module may not free
		// closed sessions. A new process has all of them.
		s.lose(&wire.Error{Function: "C_OpenSession", Text: "the module has no session left"})
	}
	return p, err
}

// state returns the state of a token.
func (s *server) state(ctx context.Context, lib *library, t *token) (wire.Message, error) {
	if err := t.gate.enter(ctx, false); err != nil {
		return nil, err
	}
	defer t.gate.leave(false)
	p, err := s.find(ctx, lib, t)
	if err != nil {
		return nil, err
	}
	return t.report(p)
}

// report makes the answer with the state of a token.
func (t *token) report(p *presence) (wire.Message, error) {
	info, err := p.info()
	if err != nil {
		t.failed(p, 0, err)
		return nil, err
	}
	return &wire.TokenReply{Info: info}, nil
}
