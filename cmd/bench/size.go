package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"time"
)

// sizes are how many keys one token has.
var sizes = []int{100, 1000, 5000}

func sizeName(keys int) string { return fmt.Sprintf("size %d keys", keys) }

func sizeNames() (all []string) {
	for _, keys := range sizes {
		all = append(all, sizeName(keys))
	}
	return all
}

// size is what was measured with one number of keys.
type size struct {
	first, again spread // from the start to the first list, ms
	list         spread // p99, ms
	login        spread // the first signature, with the login, ms
	sign         spread // those after it, median, ms
	agent, child spread // resident, MiB
}

// measureSizes measures start, list, signature and memory with ever more keys. SoftHSM alone
// takes most of the time of start and login: it reads and decrypts a file for each object.
func measureSizes(ctx context.Context, b *bench) error {
	shown := table{{
		"keys", "first start, ms", "start again, ms", "list p99, ms", "login and first signature, ms", "signature, ms", "agent, MiB", "module process, MiB",
	}}
	for _, keys := range sizes {
		if !b.wants(sizeName(keys)) {
			continue
		}
		s, err := b.size(ctx, keys)
		if err != nil {
			return err
		}
		shown.add(fmt.Sprint(keys), s.first.String(), s.again.String(), s.list.String(), s.login.String(), s.sign.String(), s.agent.String(), s.child.String())
	}
	b.show("p11-agent with one token of so many P-256 keys:", shown)
	return nil
}

func (b *bench) size(ctx context.Context, keys int) (s *size, err error) {
	b.say("making a token with %d keys", keys)
	// SoftHSM waits for the disk with each object that it makes.
	dir, err := os.MkdirTemp("/dev/shm", "p11-bench-")
	if err != nil {
		if dir, err = b.newDir("token"); err != nil {
			return nil, err
		}
	}
	defer func() { err = errors.Join(err, os.RemoveAll(dir)) }()
	t, err := b.newTokensIn(ctx, dir)
	if err != nil {
		return nil, err
	}
	if err := b.add(ctx, t, p256, 1, keys); err != nil {
		return nil, err
	}
	a, err := b.newAgent(ours, t, module{path: b.softHSM})
	if err != nil {
		return nil, err
	}
	defer b.stopAll()
	s = new(size)
	for range b.rounds {
		b.say("%s", sizeName(keys))
		if err := os.RemoveAll(a.dir + "/.local"); err != nil {
			return nil, err
		}
		for _, to := range []*spread{&s.first, &s.again} {
			begun := time.Now()
			if err := b.launch(ctx, a); err != nil {
				return nil, err
			}
			to.since(begun)
			if to == &s.first {
				b.stop(a.process)
			}
		}
		begun := time.Now()
		if err := a.sign(ctx, p256); err != nil {
			return nil, err
		}
		s.login.since(begun)
		request, err := a.signRequest(ctx, p256)
		if err != nil {
			return nil, err
		}
		signed, err := b.loadAgent(ctx, a, request, load{threads: 1, length: b.length})
		if err != nil {
			return nil, err
		}
		listed, err := b.loadAgent(ctx, a, listRequest, load{threads: 1, length: b.length})
		if err != nil {
			return nil, err
		}
		agent, child, err := b.idleMemory(ctx, a)
		if err != nil {
			return nil, err
		}
		s.sign, s.list = append(s.sign, signed.median), append(s.list, listed.p99)
		s.agent, s.child = append(s.agent, agent), append(s.child, child)
		b.stop(a.process)
	}
	return s, nil
}

// since adds the milliseconds since a time.
func (s *spread) since(begun time.Time) { *s = append(*s, time.Since(begun).Seconds()*1000) }
