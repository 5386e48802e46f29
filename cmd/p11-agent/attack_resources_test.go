package main

import (
	"bytes"
	"crypto/ed25519"
	"crypto/rand"
	"crypto/rsa"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"math/big"
	"net"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"runtime"
	"runtime/debug"
	"slices"
	"strconv"
	"strings"
	"syscall"

	"golang.org/x/crypto/ssh"
)

// These attacks use up connections, memory or processor time of the agent. An attack that keeps
// connections makes the file READY when it has all its connections. A signal ends it.

func init() {
	attacks["idle"] = attackIdle
	attacks["crowd"] = attackCrowd
	attacks["binds"] = attackBinds
	attacks["certificates"] = attackCertificates
	attacks["halves"] = attackHalves
	attacks["rsa"] = attackRSA
	attacks["resident"] = attackResident
}

// An enemy is a connection to the agent.
type enemy struct{ net.Conn }

// connectAgent connects to the agent. It waits for room in the queue of the socket.
func connectAgent() (enemy, error) {
	for {
		conn, err := net.Dial("unix", os.Getenv("SSH_AUTH_SOCK"))
		if !errors.Is(err, syscall.EAGAIN) {
			return enemy{conn}, err
		}
		runtime.Gosched()
	}
}

// ask sends a message, and returns the number of the answer.
func (e enemy) ask(message []byte) (byte, error) {
	if _, err := e.Write(append(binary.BigEndian.AppendUint32(nil, uint32(len(message))), message...)); err != nil {
		return 0, err
	}
	var length [4]byte
	if _, err := io.ReadFull(e, length[:]); err != nil {
		return 0, err
	}
	answer := make([]byte, binary.BigEndian.Uint32(length[:]))
	if _, err := io.ReadFull(e, answer); err != nil {
		return 0, err
	}
	return answer[0], nil
}

// held makes the file, and returns after a signal.
func held(ready string) error {
	end := make(chan os.Signal, 1)
	signal.Notify(end, os.Interrupt, syscall.SIGTERM)
	if err := os.WriteFile(ready, nil, 0o600); err != nil {
		return err
	}
	<-end
	return nil
}

// numbers parses the arguments. The last argument is a file, the others are numbers.
func numbers(args []string, want int) (all []int, file string, err error) {
	if len(args) != want+1 {
		return nil, "", fmt.Errorf("%d arguments, want %d numbers and a file", len(args), want)
	}
	for _, arg := range args[:want] {
		n, err := strconv.Atoi(arg)
		if err != nil {
			return nil, "", err
		}
		all = append(all, n)
	}
	return all, args[want], nil
}

// idle N READY makes N connections. A third of them send nothing. A third list the keys first. A
// third send half a message.
func attackIdle(args []string) error {
	n, ready, err := numbers(args, 1)
	if err != nil {
		return err
	}
	var conns []enemy
	for i := range n[0] {
		conn, err := connectAgent()
		if err != nil {
			return err
		}
		conns = append(conns, conn)
		switch i % 3 {
		case 1:
			_, _ = conn.ask([]byte{11}) // the agent may end the connection first
		case 2:
			_, _ = conn.Write([]byte{0, 0, 1, 0, 13})
		}
	}
	defer runtime.KeepAlive(conns)
	return held(ready)
}

// crowd PROCESSES N READY starts that many processes, which make N connections each. Every second
// process runs its own program, with the name of ssh-add.
func attackCrowd(args []string) error {
	n, ready, err := numbers(args, 2)
	if err != nil {
		return err
	}
	runtime.LockOSThread() // the processes end with this thread
	for i := range n[0] {
		program := "/proc/self/exe"
		if i%2 == 1 {
			program = filepath.Join(filepath.Dir(ready), strconv.Itoa(i), "ssh-add")
			if err := copyProgram(program); err != nil {
				return err
			}
		}
		file := fmt.Sprintf("%s.%d", ready, i)
		cmd := exec.Command(program)
		cmd.Args = []string{"attacker", "idle", strconv.Itoa(n[1]), file}
		cmd.Stderr = os.Stderr
		cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
		if err := cmd.Start(); err != nil {
			return err
		}
		if err := eventually(func() error { _, err := os.Stat(file); return err }); err != nil {
			return err
		}
	}
	return held(ready)
}

func copyProgram(to string) error {
	b, err := os.ReadFile("/proc/self/exe")
	if err != nil {
		return err
	}
	if err := os.MkdirAll(filepath.Dir(to), 0o700); err != nil {
		return err
	}
	return os.WriteFile(to, b, 0o700) //nolint:gosec // the file is a program
}

// signer makes a key.
func signer() (ssh.Signer, ed25519.PrivateKey, error) {
	_, key, err := ed25519.GenerateKey(rand.Reader)
	if err != nil {
		return nil, nil, err
	}
	s, err := ssh.NewSignerFromKey(key)
	return s, key, err
}

// fatCertificate makes a certificate of about size bytes for a key, with as many principals as fit.
func fatCertificate(key ssh.PublicKey, authority ssh.Signer, kind uint32, size int) (*ssh.Certificate, error) {
	cert := &ssh.Certificate{Key: key, CertType: kind, ValidBefore: ssh.CertTimeInfinity}
	// OpenSSH has this limit for principals.
	for range min(size/5, 256) {
		cert.ValidPrincipals = append(cert.ValidPrincipals, "a")
	}
	if size > 100<<10 {
		cert.ValidPrincipals = strings.Split(strings.Repeat("a ", size/5), " ")
	}
	if rest := size - 512 - 5*len(cert.ValidPrincipals); rest > 0 {
		cert.KeyId = strings.Repeat("k", rest)
	}
	return cert, cert.SignCert(rand.Reader, authority)
}

// bindMessage returns a message that binds a connection to a session. The host signs the session.
func bindMessage(hostKey []byte, host ssh.Signer, session []byte) ([]byte, error) {
	sig, err := host.Sign(rand.Reader, session)
	if err != nil {
		return nil, err
	}
	return append([]byte{27}, ssh.Marshal(struct {
		Name                    string
		Key, Session, Signature []byte
		Forwarding              bool
	}{"session-bind@openssh.com", hostKey, session, ssh.Marshal(sig), true})...), nil
}

// binds N READY makes N connections with 16 binds each, or with as many binds as the agent
// accepts. Each bind has the largest certificate that the agent accepts.
func attackBinds(args []string) error {
	n, ready, err := numbers(args, 1)
	if err != nil {
		return err
	}
	host, _, err := signer()
	if err != nil {
		return err
	}
	var conns []enemy
	taken := make(map[int]int)
	for range n[0] {
		conn, err := connectAgent()
		if err != nil {
			return err
		}
		conns = append(conns, conn)
		done := 0
		for _, size := range []int{240 << 10, 15 << 10, 7 << 10, 3 << 10, 600} {
			cert, err := fatCertificate(host.PublicKey(), host, ssh.HostCert, size)
			if err != nil {
				return err
			}
			for ; done < 16; done++ {
				session := make([]byte, 64)
				_, _ = rand.Read(session) // never fails
				message, err := bindMessage(cert.Marshal(), host, session)
				if err != nil {
					return err
				}
				answer, err := conn.ask(message)
				if err != nil {
					return err
				}
				if answer != 6 {
					break
				}
				taken[size]++
			}
		}
	}
	fmt.Printf("binds by size: %v\n", taken)
	defer runtime.KeepAlive(conns)
	return held(ready)
}

// addMessage returns a message that adds an Ed25519 key with a certificate, a comment and
// destinations.
func addMessage(private ed25519.PrivateKey, cert []byte, destinations int) []byte {
	host, _, _ := signer()
	m := append([]byte{25}, ssh.Marshal(struct {
		Kind            string
		Cert            []byte
		Public, Private []byte
		Comment         string
	}{"ssh-ed25519-cert-v01@openssh.com", cert, private[32:], private, strings.Repeat("c", 4096)})...)
	hop := func(key []byte) []byte {
		if key == nil {
			return make([]byte, 12)
		}
		b := ssh.Marshal(struct {
			User, Host, Reserved string
			Key                  []byte
			CA                   bool
		}{"", "host", "", key, false})
		return b
	}
	var list []byte
	for range destinations {
		d := ssh.Marshal(struct{ From, To, Reserved []byte }{hop(nil), hop(host.PublicKey().Marshal()), nil})
		list = append(list, ssh.Marshal(struct{ B []byte }{d})...)
	}
	if destinations > 0 {
		m = append(m, 255)
		m = append(m, ssh.Marshal(struct {
			Name string
			List []byte
		}{"restrict-destination-v00@openssh.com", list})...)
	}
	return m
}

// certificates N DESTINATIONS adds N keys. Each key has the largest certificate that the agent
// accepts, and so many destinations.
func attackCertificates(args []string) error {
	n, _, err := numbers(append(args, ""), 2)
	if err != nil {
		return err
	}
	authority, _, err := signer()
	if err != nil {
		return err
	}
	conn, err := connectAgent()
	if err != nil {
		return err
	}
	taken, refused := make(map[int]int), 0
	sizes := []int{180 << 10, 15 << 10}
	for range n[0] {
		key, private, err := signer()
		if err != nil {
			return err
		}
		answer := byte(0)
		for len(sizes) > 0 {
			cert, err := fatCertificate(key.PublicKey(), authority, ssh.UserCert, sizes[0])
			if err != nil {
				return err
			}
			if answer, err = conn.ask(addMessage(private, cert.Marshal(), n[1])); err != nil {
				return err
			}
			if answer == 6 || taken[sizes[0]] > 0 || len(sizes) == 1 {
				break
			}
			sizes = sizes[1:]
		}
		if answer == 6 {
			taken[sizes[0]]++
		} else {
			refused++
		}
	}
	fmt.Printf("keys by size of the certificate: %v, refused: %d\n", taken, refused)
	return nil
}

// halves N READY makes N connections. On each connection, it sends the longest message without its
// end.
func attackHalves(args []string) error {
	n, ready, err := numbers(args, 1)
	if err != nil {
		return err
	}
	half := append([]byte{0, 4, 0, 0, 13}, make([]byte, 255<<10)...)
	var conns []enemy
	for range n[0] {
		conn, err := connectAgent()
		if err != nil {
			return err
		}
		conns = append(conns, conn)
		_, _ = conn.Write(half) // the agent may end the connection meanwhile
	}
	defer runtime.KeepAlive(conns)
	return held(ready)
}

// publishedPrime returns the safe prime of RFC 3526 or RFC 7919 of so many bits. A search for a
// safe prime takes minutes. Both have this form, where c is pi or e:
// 2^n - 2^(n-64) - 1 + 2^64 * (floor(2^(n-130) * c) + k).
func publishedPrime(bits uint, pi bool) *big.Int {
	k := map[uint][2]int64{4096: {240904, 5736041}, 8192: {4743158, 10965728}}[bits]
	const guard = 128
	scale := bits - 130 + guard
	c, add := euler(scale), k[1]
	if pi {
		c, add = archimedes(scale), k[0]
	}
	c.Rsh(c, guard)
	c.Add(c, big.NewInt(add)).Lsh(c, 64)
	one := big.NewInt(1)
	c.Add(c, new(big.Int).Lsh(one, bits))
	c.Sub(c, new(big.Int).Lsh(one, bits-64))
	return c.Sub(c, one)
}

// euler returns 2^scale * e, and archimedes 2^scale * pi, within a few units.
func euler(scale uint) *big.Int {
	term := new(big.Int).Lsh(big.NewInt(1), scale)
	sum := new(big.Int).Set(term)
	for i := int64(1); term.Sign() > 0; i++ {
		sum.Add(sum, term.Quo(term, big.NewInt(i)))
	}
	return sum
}

func archimedes(scale uint) *big.Int {
	// Machin: pi = 16 arctan(1/5) - 4 arctan(1/239).
	arctan := func(x int64) *big.Int {
		power := new(big.Int).Quo(new(big.Int).Lsh(big.NewInt(1), scale), big.NewInt(x))
		sum := new(big.Int)
		for i := int64(1); power.Sign() > 0; i += 2 {
			term := new(big.Int).Quo(power, big.NewInt(i))
			if i%4 == 1 {
				sum.Add(sum, term)
			} else {
				sum.Sub(sum, term)
			}
			power.Quo(power, big.NewInt(x*x))
		}
		return sum
	}
	five, other := arctan(5), arctan(239)
	return five.Lsh(five, 4).Sub(five, other.Lsh(other, 2))
}

// bigKey makes an RSA key of this many bits.
func bigKey(bits uint) (*rsa.PrivateKey, error) {
	p, q := publishedPrime(bits/2, true), publishedPrime(bits/2, false)
	if p.BitLen() != int(bits/2) || !p.ProbablyPrime(1) || !q.ProbablyPrime(1) {
		return nil, errors.New("these are no primes")
	}
	one := big.NewInt(1)
	phi := new(big.Int).Mul(new(big.Int).Sub(p, one), new(big.Int).Sub(q, one))
	key := &rsa.PrivateKey{
		PublicKey: rsa.PublicKey{N: new(big.Int).Mul(p, q), E: 65537},
		Primes:    []*big.Int{p, q},
	}
	key.D = new(big.Int).ModInverse(big.NewInt(65537), phi)
	return key, nil
}

// rsa BITS FORWARDED N READY adds an RSA key of that many bits. If FORWARDED is 1, it adds the key
// over a forwarded connection. Then it requests a signature of the key on each of N forwarded
// connections.
func attackRSA(args []string) error {
	n, ready, err := numbers(args, 3)
	if err != nil {
		return err
	}
	key, err := bigKey(uint(n[0]))
	if err != nil {
		return err
	}
	host, _, err := signer()
	if err != nil {
		return err
	}
	forwarded := func() (enemy, error) {
		conn, err := connectAgent()
		if err != nil {
			return conn, err
		}
		message, err := bindMessage(host.PublicKey().Marshal(), host, []byte("session"))
		if err != nil {
			return conn, err
		}
		answer, err := conn.ask(message)
		if err == nil && answer != 6 {
			err = errors.New("the connection could not be bound")
		}
		return conn, err
	}
	adds, err := connectAgent()
	if n[1] == 1 {
		adds, err = forwarded()
	}
	if err != nil {
		return err
	}
	iqmp := new(big.Int).ModInverse(key.Primes[1], key.Primes[0])
	answer, err := adds.ask(append([]byte{17}, ssh.Marshal(struct {
		Kind                string
		N, E, D, IQMP, P, Q *big.Int
		Comment             string
	}{"ssh-rsa", key.N, big.NewInt(65537), key.D, iqmp, key.Primes[0], key.Primes[1], "big"})...))
	if err != nil {
		return err
	}
	if answer != 6 {
		return fmt.Errorf("the key is refused")
	}
	public, err := ssh.NewPublicKey(&key.PublicKey)
	if err != nil {
		return err
	}
	request := append([]byte{13}, ssh.Marshal(struct {
		Key, Data []byte
		Flags     uint32
	}{public.Marshal(), []byte("data"), 2})...)
	request = append(binary.BigEndian.AppendUint32(nil, uint32(len(request))), request...)
	var conns []enemy
	for range n[2] {
		conn, err := forwarded()
		if err != nil {
			return err
		}
		conns = append(conns, conn)
		if _, err := conn.Write(bytes.Repeat(request, 4)); err != nil {
			return err
		}
	}
	defer runtime.KeepAlive(conns)
	return held(ready)
}

// resident MIB fails if the agent uses more memory than that. The race detector takes
// up to ten times as much (https://go.dev/doc/articles/race_detector).
func attackResident(args []string) error {
	limit, err := strconv.Atoi(args[0])
	if err != nil {
		return err
	}
	if info, ok := debug.ReadBuildInfo(); ok && slices.Contains(info.Settings, debug.BuildSetting{Key: "-race", Value: "true"}) {
		limit *= 10
	}
	return eventually(func() error {
		b, err := os.ReadFile(fmt.Sprintf("/proc/%s/status", os.Getenv("SSH_AGENT_PID")))
		if err != nil {
			return err
		}
		for line := range strings.Lines(string(b)) {
			if value, ok := strings.CutPrefix(line, "VmRSS:"); ok {
				kib, err := strconv.Atoi(strings.Fields(value)[0])
				if err == nil && kib > limit<<10 {
					err = fmt.Errorf("the agent has %d MiB of memory, and is to have %d MiB at the most", kib>>10, limit)
				}
				fmt.Printf("%d MiB\n", kib>>10)
				return err
			}
		}
		return errors.New("the kernel does not tell")
	})
}
