package token

import (
	"cmp"
	"slices"
	"time"

	"p11-agent/pinentry/plain"
	"p11-agent/token/known"
	"p11-agent/token/pairs"
	"p11-agent/token/signing"
	"p11-agent/token/wire"
)

// A module can lie: it can show other tokens at each look, with endless names and keys, report
// events all the time, and force restarts. Each lie may cost its own keys only. So these constants
// bound what the agent remembers of a module, how often it looks at it, and what it logs.
const (
	// maxTokens is how many tokens of one module the agent remembers, present and absent. An HSM
	// has some hundred partitions at most.
	maxTokens = 256
	// maxKeyBytes and maxModuleKeys bound the keys of all tokens of one module together.
	maxKeyBytes   = 16 << 20
	maxModuleKeys = wire.MaxList
	// maxLook is the most bytes of objects that a look at one module reads. Tokens beyond that keep
	// their old keys.
	maxLook = 4 * wire.MaxReply
	// maxName is the most bytes of a token's label, manufacturer, model or serial number. PKCS#11
	// has 32 bytes (v2.40 section 3.3, CK_TOKEN_INFO), and a byte that is not UTF-8 becomes three.
	maxName = 3 * 32
	// maxDescription is the same for slots and modules, which have 64 bytes (CK_SLOT_INFO,
	// CK_INFO).
	maxDescription = 3 * 64
	// maxMissing is the most paths in a report of a module process that the sandbox lacks.
	maxMissing = 64

	// The pace of looks for the events of a module. Each look may change the list of keys for every
	// client.
	lookBurst, lookEvery = 50, 500 * time.Millisecond
	// The pace of new processes in place of healthy ones.
	renewBurst, renewEvery = 50, 500 * time.Millisecond
	// The pace of writing the list of known keys.
	knownBurst, knownEvery = 20, 10 * time.Second
)

// The list of known keys has room for every label and ID that package pairs accepts.
var _ [known.MaxText - pairs.MaxText]struct{}

// believable reports whether the names of a token have lengths that PKCS#11 allows.
func believable(id wire.TokenID) bool {
	return max(len(id.Label), len(id.Manufacturer), len(id.Model), len(id.Serial)) <= maxName
}

// trim removes from a slot what the agent does not use.
func trim(slot wire.Slot) wire.Slot {
	slot.Description, slot.Manufacturer = plain.Cut(slot.Description, maxDescription), plain.Cut(slot.Manufacturer, maxDescription)
	slot.Mechanisms = slices.Clip(slices.DeleteFunc(slices.Clone(slot.Mechanisms), func(m wire.Mechanism) bool {
		return !signing.Uses(m.Type)
	}))
	return slot
}

// trimHello shortens what a module process says of the module and of itself.
func trimHello(h *wire.HelloReply) {
	h.Manufacturer, h.Description = plain.Cut(h.Manufacturer, maxDescription), plain.Cut(h.Description, maxDescription)
	missing := h.Sandbox.Missing[:min(len(h.Sandbox.Missing), maxMissing)]
	h.Sandbox.Missing = nil
	for _, path := range missing {
		h.Sandbox.Missing = append(h.Sandbox.Missing, plain.Cut(path, known.MaxText))
	}
}

// weight estimates the memory in bytes that keys take.
func weight(all []*pairs.Pair) int {
	n := 0
	for _, p := range all {
		n += p.Weight()
		for _, c := range p.Certificates {
			n += len(c)
		}
	}
	return n
}

// fit returns as many keys of a token as there is room for beside the keys of others, which are
// tokens of the same module. Keys that a configuration or client has named come first. Certificates
// give way to keys, because SSH does not need them.
func (t *Token) fit(all []*pairs.Pair, others []*Token, left *leftOut) []*pairs.Pair {
	keys, bytes := maxModuleKeys, maxKeyBytes
	for _, o := range others {
		if o != t {
			n, size := o.holds()
			keys, bytes = keys-n, bytes-size
		}
	}
	fits := make(map[*pairs.Pair]bool, len(all))
	add := func(p *pairs.Pair) {
		if fits[p] || len(fits) >= keys || p.Weight() > bytes {
			return
		}
		fits[p] = true
		bytes -= p.Weight()
	}
	if len(all) > keys || weight(all) > bytes {
		for _, p := range all {
			if t.isNamed(p) {
				add(p)
			}
		}
	}
	for _, p := range all {
		add(p)
	}
	kept := make([]*pairs.Pair, 0, len(fits))
	for _, p := range all {
		if !fits[p] {
			continue
		}
		kept = append(kept, p)
		for i, c := range p.Certificates {
			if bytes -= len(c); bytes < 0 {
				bytes += len(c)
				left.certificates += len(p.Certificates) - i
				p.Certificates = p.Certificates[:i]
				break
			}
		}
	}
	if left.keys = len(all) - len(kept); left.keys > 0 {
		t.module.log.Warn("module shows more keys than are used", "token", t.ID.Label, "shown", len(all), "used", len(kept))
	}
	return kept
}

// holds returns how many keys the token has, and the memory in bytes that they take.
func (t *Token) holds() (keys, bytes int) {
	t.mu.Lock()
	defer t.mu.Unlock()
	return len(t.keys), t.weight
}

// prune forgets absent tokens: tokens without keys at once, and then those that left first, until
// there is room. Tokens that have their home here go last.
func (m *module) prune() {
	s := m.store
	s.mu.Lock()
	m.mu.Lock()
	pruned := m.surplusLocked(func(t *Token) bool { return s.homes[t.ID] == home{m.identity, true} })
	for _, t := range pruned {
		delete(m.tokens, t.ID)
		m.insertions = max(m.insertions, t.inserts())
		if s.homes[t.ID].module == m.identity {
			delete(s.homes, t.ID)
		}
	}
	m.mu.Unlock()
	s.mu.Unlock()
	for _, t := range pruned {
		t.mu.Lock()
		t.retained.forget()
		t.mu.Unlock()
		t.pins.Close()
	}
}

// surplusLocked returns the tokens to forget. belongs reports whether a token has its lasting home
// here.
func (m *module) surplusLocked(belongs func(*Token) bool) (surplus []*Token) {
	var away []*Token
	keys, bytes := 0, 0 // of absent tokens
	for _, t := range m.tokens {
		if !slices.Contains(m.order, t) && !slices.Contains(m.last, t) && !t.pins.InUse() {
			n, size := t.holds()
			keys, bytes, away = keys+n, bytes+size, append(away, t)
		}
	}
	slices.SortFunc(away, func(a, b *Token) int {
		if x, y := belongs(a), belongs(b); x != y {
			if x {
				return 1
			}
			return -1
		}
		return cmp.Or(a.goneSince().Compare(b.goneSince()), compareIDs(a.ID, b.ID))
	})
	tokens := len(m.tokens)
	for _, t := range away {
		n, size := t.holds()
		if n == 0 && !belongs(t) || tokens > maxTokens || keys > maxModuleKeys/2 || bytes > maxKeyBytes/2 {
			tokens, keys, bytes, surplus = tokens-1, keys-n, bytes-size, append(surplus, t)
		}
	}
	return surplus
}
