package main

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"
)

// The agents that are measured, in the order of tables.
const (
	bare    = iota // C_SignInit and C_Sign in a loop
	openSSH        // ssh-agent and its helper
	ours           // p11-agent and its module process
	relay          // a program in C that has another one sign, and does nothing else
	contestants
)

var names = [contestants]string{"bare", "ssh-agent", "p11-agent", "relay"}

// A module is what an agent gets its keys from.
type module struct {
	path string
	env  []string // what it needs beside that of the tokens
	hang string   // the file that makes it hang, if there is one
	// ask is a program. When it is not empty, a person has to be asked before the
	// first signature, by way of it: by p11-agent for the PIN, with pinentry, and by
	// ssh-agent, which has the PIN, for a confirmation.
	ask string
}

// agent is an agent, which may not be running.
type agent struct {
	who    int
	dir    string
	socket string
	env    []string
	tokens *tokens
	module module
	under  []string // the program that starts it, if there is one
	*process
}

// newAgent makes the home of an agent.
func (b *bench) newAgent(who int, t *tokens, m module) (*agent, error) {
	dir, err := b.newDir("home")
	if err != nil {
		return nil, err
	}
	a := &agent{who: who, dir: dir, socket: filepath.Join(dir, "s"), tokens: t, module: m}
	a.env = environment(dir, append(t.env(), m.env...))
	if who == openSSH {
		a.env = append(a.env, "SSH_AUTH_SOCK="+a.socket, "SSH_ASKPASS_REQUIRE=force", "SSH_ASKPASS="+m.ask)
		return a, nil
	}
	config := filepath.Join(dir, ".config", "p11-agent")
	if err := os.MkdirAll(config, 0o700); err != nil {
		return nil, err
	}
	if err := os.WriteFile(filepath.Join(dir, "pin"), []byte(tokenPIN+"\n"), 0o600); err != nil {
		return nil, err
	}
	return a, os.WriteFile(filepath.Join(config, "config.toml"), []byte(a.config()), 0o600)
}

// config is p11-agent's configuration: this module alone, although the machine may
// have others.
func (a *agent) config() string {
	var c strings.Builder
	uri := "pkcs11:token=" + tokenLabel
	if a.module.ask == "" {
		uri += "?pin-source=file:" + filepath.Join(a.dir, "pin")
	}
	fmt.Fprintf(&c, "keys = [%q]\n", uri)
	if a.module.ask != "" {
		fmt.Fprintf(&c, "[pinentry]\nprogram = %q\n", a.module.ask)
	}
	// This name takes the place of the registered one.
	const name = "softhsm2"
	fmt.Fprintf(&c, "[[module]]\nname = %q\npath = %q\n", name, a.module.path)
	if len(a.module.env) > 0 {
		c.WriteString("[module.env]\n")
		for _, kv := range a.module.env {
			variable, value, _ := strings.Cut(kv, "=")
			fmt.Fprintf(&c, "%s = %q\n", variable, value)
		}
	}
	for _, dir := range []string{"/usr/share/p11-kit/modules", "/etc/pkcs11/modules"} {
		// The pattern is one: Glob fails on malformed ones only.
		files, _ := filepath.Glob(filepath.Join(dir, "*.module"))
		for _, file := range files {
			if other := strings.TrimSuffix(filepath.Base(file), ".module"); other != name {
				fmt.Fprintf(&c, "[[module]]\nname = %q\nenabled = false\n", other)
			}
		}
	}
	return c.String()
}

// sureToBeListed is how many keys an answer of an agent has room for in any case.
const sureToBeListed = 1000

// launch starts an agent and waits until it lists all its keys. It may be launched
// again after it was stopped.
func (b *bench) launch(ctx context.Context, a *agent) (err error) {
	argv := []string{b.programs["p11-agent"], "agent", "-D", "-a", a.socket}
	if a.who == openSSH {
		argv = []string{b.programs["ssh-agent"], "-D", "-a", a.socket, "-P", a.module.path}
	}
	argv = slices.Concat(a.under, argv)
	if a.process, err = b.start(a.dir, a.env, argv[0], argv[1:]...); err != nil {
		return err
	}
	if a.who == openSSH {
		if err := a.wait(ctx, "it listens", func() (bool, error) { return a.listens() }); err != nil {
			return err
		}
		if err := b.sshAdd(ctx, a); err != nil {
			return err
		}
	}
	want := min(len(a.tokens.keys), sureToBeListed)
	if a.who == openSSH {
		want = 1 // ssh-add has waited for all, and it may not know some kinds
	}
	return a.wait(ctx, "all keys are listed", func() (bool, error) {
		keys, err := a.keys(ctx)
		return len(keys) >= want, err
	})
}

// launchNew makes an agent and launches it.
func (b *bench) launchNew(ctx context.Context, who int, t *tokens, m module) (*agent, error) {
	a, err := b.newAgent(who, t, m)
	if err != nil {
		return nil, err
	}
	return a, b.launch(ctx, a)
}

// wait waits for what an agent is to do.
func (a *agent) wait(ctx context.Context, what string, done func() (bool, error)) error {
	return poll(ctx, time.Minute, names[a.who]+": "+what, func() (bool, error) {
		if err := a.failed(); err != nil {
			return false, err
		}
		return done()
	})
}

func (a *agent) listens() (bool, error) {
	c, err := net.Dial("unix", a.socket)
	if err != nil {
		return false, err
	}
	return true, c.Close()
}

// sshAdd gives ssh-agent the keys and the PIN.
func (b *bench) sshAdd(ctx context.Context, a *agent) error {
	askpass := filepath.Join(a.dir, "askpass")
	if err := os.WriteFile(askpass, []byte("#!/bin/sh\necho "+tokenPIN+"\n"), 0o700); err != nil {
		return err
	}
	args := []string{"-s", a.module.path}
	if a.module.ask != "" {
		args = append([]string{"-c"}, args...)
	}
	cmd := command(ctx, append(a.env[:len(a.env):len(a.env)], "SSH_ASKPASS="+askpass), b.programs["ssh-add"], args...)
	if said, err := cmd.CombinedOutput(); err != nil {
		return fmt.Errorf("ssh-add: %w\n%s", err, said)
	}
	return nil
}

// patience is how long a program may take to start, or to answer one request. On a
// busy machine it takes long.
const patience = time.Minute

// maxAnswer bounds an answer of an agent.
const maxAnswer = 1 << 20

// send connects to the agent and sends it a request.
func (a *agent) send(ctx context.Context, request []byte) (net.Conn, error) {
	c, err := new(net.Dialer).DialContext(ctx, "unix", a.socket)
	if err != nil {
		return nil, err
	}
	if _, err := c.Write(request); err != nil {
		return nil, errors.Join(err, c.Close())
	}
	return c, nil
}

// receive reads an answer.
func receive(c net.Conn, deadline time.Time) ([]byte, error) {
	if err := c.SetReadDeadline(deadline); err != nil {
		return nil, err
	}
	var length [4]byte
	if _, err := io.ReadFull(c, length[:]); err != nil {
		return nil, err
	}
	n := binary.BigEndian.Uint32(length[:])
	if n == 0 || n > maxAnswer {
		return nil, fmt.Errorf("the agent answers with %d bytes", n)
	}
	answer := make([]byte, n)
	_, err := io.ReadFull(c, answer)
	return answer, err
}

// ask sends a request and returns the answer.
func (a *agent) ask(ctx context.Context, request []byte, patience time.Duration) ([]byte, error) {
	c, err := a.send(ctx, request)
	if err != nil {
		return nil, err
	}
	defer c.Close()
	return receive(c, time.Now().Add(patience))
}

// listRequest is SSH_AGENTC_REQUEST_IDENTITIES.
var listRequest = []byte{0, 0, 0, 1, 11}

// keys returns the public keys that the agent lists.
func (a *agent) keys(ctx context.Context) (blobs [][]byte, err error) {
	answer, err := a.ask(ctx, listRequest, patience)
	if err != nil {
		return nil, err
	}
	if answer[0] != 12 || len(answer) < 5 {
		return nil, fmt.Errorf("%s answers %d to a request to list", names[a.who], answer[0])
	}
	for rest := answer[5:]; len(rest) > 0; {
		var blob []byte
		if blob, rest, err = cut(rest); err != nil {
			return nil, err
		}
		blobs = append(blobs, blob)
		if _, rest, err = cut(rest); err != nil { // the comment
			return nil, err
		}
	}
	return blobs, nil
}

// cut takes a string of RFC 4251 from the front.
func cut(b []byte) (s, rest []byte, err error) {
	if len(b) < 4 || uint32(len(b)-4) < binary.BigEndian.Uint32(b) {
		return nil, nil, errors.New("the list of keys is cut short")
	}
	n := 4 + int(binary.BigEndian.Uint32(b))
	return b[4:n], b[n:], nil
}

// errNoKey is that an agent does not offer a key of some kind.
var errNoKey = errors.New("it offers no such key")

// key returns the public key of a kind.
func (a *agent) key(ctx context.Context, k *kind) ([]byte, error) {
	blobs, err := a.keys(ctx)
	if err != nil {
		return nil, err
	}
	for _, blob := range blobs {
		if name, _, err := cut(blob); err == nil && string(name) == k.blob && (k.bits == 0 || len(blob)/128 == k.bits/1024) {
			return blob, nil
		}
	}
	return nil, fmt.Errorf("%s, %s: %w", names[a.who], k.name, errNoKey)
}

// signRequest returns SSH_AGENTC_SIGN_REQUEST for a key of a kind.
func (a *agent) signRequest(ctx context.Context, k *kind) ([]byte, error) {
	key, err := a.key(ctx, k)
	if err != nil {
		return nil, err
	}
	m := text([]byte{0, 0, 0, 0, 13}, string(key))
	m = text(m, string(toSign()))
	m = binary.BigEndian.AppendUint32(m, k.flags)
	binary.BigEndian.PutUint32(m, uint32(len(m)-4))
	return m, nil
}

// sign makes one signature: the first one logs in.
func (a *agent) sign(ctx context.Context, k *kind) error {
	request, err := a.signRequest(ctx, k)
	if err != nil {
		return err
	}
	answer, err := a.ask(ctx, request, patience)
	if err != nil {
		return fmt.Errorf("%s: sign: %w", names[a.who], err)
	}
	if answer[0] != 14 {
		return fmt.Errorf("%s answers %d to a request to sign, see its log:\n%s", names[a.who], answer[0], a.logged())
	}
	return nil
}

// logged returns the end of the log.
func (a *agent) logged() string {
	said, _ := os.ReadFile(a.log) // may be missing
	return string(said[max(0, len(said)-2000):])
}
