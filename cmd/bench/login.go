package main

import (
	"bytes"
	"context"
	"encoding/base64"
	"fmt"
	"net"
	"os"
	"os/user"
	"path/filepath"
	"sync"
	"time"
)

const (
	oneByOne = "login one by one"
	together = "login 50 at a time"
	// inARow is how many logins one after the other are one measurement.
	inARow = 5
	// atOnce is how many are under way when many are.
	atOnce = 50
)

func loginNames() []string { return []string{oneByOne, together} }

// measureLogins measures logins from end to end: ssh, the agent, and a real sshd.
func measureLogins(ctx context.Context, b *bench) error {
	t, err := b.signTokens(ctx, p256)
	if err != nil {
		return err
	}
	agents, err := b.launchBoth(ctx, t, module{path: b.softHSM})
	if err != nil {
		return err
	}
	s, err := b.startServer(ctx, agents[ours])
	if err != nil {
		return err
	}
	for _, who := range []int{openSSH, ours} {
		if err := s.configure(agents[who]); err != nil {
			return err
		}
		if err := s.login(ctx, agents[who]); err != nil { // logs in to the token
			return err
		}
	}
	shown := table{{"", "ssh-agent, ms for each", "p11-agent, ms for each", "p11-agent, of ssh-agent's"}}
	for _, row := range []struct {
		name string
		goal string
		n, m int
	}{
		{oneByOne, "login with ssh: time, of that with ssh-agent", inARow, 1},
		{together, "logins with ssh, 50 at a time: time, of that with ssh-agent", b.logins, atOnce},
	} {
		if !b.wants(row.name) {
			continue
		}
		var measure [contestants]func(context.Context) (sample, error)
		for _, who := range []int{openSSH, ours} {
			measure[who] = func(ctx context.Context) (sample, error) { return s.logins(ctx, agents[who], row.n, row.m) }
		}
		r, err := b.contest(ctx, row.name, measure)
		if err != nil {
			return err
		}
		share := r.ratio(ours, openSSH, median)
		shown.add(fmt.Sprintf("%d logins, %d at a time", row.n, row.m), r.of(openSSH, median).String(), r.of(ours, median).String(), share.String())
		b.notSlower(row.goal, share)
	}
	b.show("", shown)
	return nil
}

// server is an sshd.
type server struct {
	b    *bench
	dir  string
	port int
	user string
}

// startServer starts an sshd that lets the key of an agent in, and does nothing
// then.
func (b *bench) startServer(ctx context.Context, a *agent) (s *server, err error) {
	s = &server{b: b}
	if s.dir, err = b.newDir("sshd"); err != nil {
		return nil, err
	}
	u, err := user.Current()
	if err != nil {
		return nil, fmt.Errorf("ssh has to know who logs in: %w", err)
	}
	s.user = u.Username
	if s.port, err = freePort(); err != nil {
		return nil, err
	}
	if err := s.prepare(ctx, a); err != nil {
		return nil, err
	}
	p, err := b.start(s.dir, environment(s.dir, nil), b.programs["sshd"], "-D", "-e", "-f", filepath.Join(s.dir, "sshd_config"))
	if err != nil {
		return nil, err
	}
	return s, poll(ctx, patience, "sshd listens", func() (bool, error) {
		if err := p.failed(); err != nil {
			return false, err
		}
		c, err := net.Dial("tcp", fmt.Sprintf("127.0.0.1:%d", s.port))
		if err != nil {
			return false, err
		}
		return true, c.Close()
	})
}

// prepare writes the files of the server.
func (s *server) prepare(ctx context.Context, a *agent) error {
	key, err := a.key(ctx, p256)
	if err != nil {
		return err
	}
	host := filepath.Join(s.dir, "host_key")
	keygen := command(ctx, environment(s.dir, nil), s.b.programs["ssh-keygen"], "-q", "-t", "ed25519", "-N", "", "-C", "", "-f", host)
	if said, err := keygen.CombinedOutput(); err != nil {
		return fmt.Errorf("ssh-keygen: %w\n%s", err, said)
	}
	public, err := os.ReadFile(host + ".pub")
	if err != nil {
		return err
	}
	pam := "no"
	if os.Geteuid() == 0 {
		// Debian's sshd does not start without it, and it is the start of its service
		// that makes it. Others may use it by now, so it stays.
		if err := os.MkdirAll("/run/sshd", 0o755); err != nil {
			return err
		}
		if rootLocked() {
			pam = "yes" // without PAM, sshd refuses a user whose password is locked
		}
	}
	for name, content := range map[string]string{
		"key.pub":     fmt.Sprintf("%s %s\n", p256.blob, base64.StdEncoding.EncodeToString(key)),
		"known_hosts": fmt.Sprintf("[127.0.0.1]:%d %s\n", s.port, bytes.TrimSpace(public)),
		"sshd_config": fmt.Sprintf(`ListenAddress 127.0.0.1:%d
HostKey %s
AuthorizedKeysFile %s/key.pub
AuthenticationMethods publickey
AllowUsers %s
PermitRootLogin prohibit-password
# The directory is in /tmp, which everybody may write to.
StrictModes no
UsePAM %s
PidFile none
PrintMotd no
PrintLastLog no
MaxStartups %d
LogLevel ERROR
SetEnv HOME=%s
ForceCommand exit 0
`, s.port, host, s.dir, s.user, pam, 2*atOnce, s.dir),
	} {
		if err := os.WriteFile(filepath.Join(s.dir, name), []byte(content), 0o600); err != nil {
			return err
		}
	}
	return nil
}

// freePort returns a port on which no program listens at this moment.
func freePort() (int, error) {
	l, err := net.ListenTCP("tcp", &net.TCPAddr{IP: net.IPv4(127, 0, 0, 1)})
	if err != nil {
		return 0, fmt.Errorf("find a free port: %w", err)
	}
	port := l.Addr().(*net.TCPAddr).Port //nolint:forcetypeassert // that of a TCP listener
	return port, l.Close()
}

// rootLocked tells whether root's password is locked in the way that sshd looks for.
func rootLocked() bool {
	b, err := os.ReadFile("/etc/shadow")
	if err != nil {
		return false
	}
	defer clear(b)
	return bytes.HasPrefix(b, []byte("root:!")) || bytes.Contains(b, []byte("\nroot:!"))
}

func (s *server) configFile(a *agent) string { return filepath.Join(s.dir, names[a.who]+".conf") }

// configure writes the configuration of an ssh that uses this agent.
func (s *server) configure(a *agent) error {
	return os.WriteFile(s.configFile(a), fmt.Appendf(nil, `Host bench
    HostName 127.0.0.1
    Port %d
    User %s
    IdentityAgent %s
    IdentityFile %s/key.pub
    IdentitiesOnly yes
    UserKnownHostsFile %s/known_hosts
    StrictHostKeyChecking yes
    BatchMode yes
`, s.port, s.user, a.socket, s.dir, s.dir), 0o600)
}

// login logs in once. Goroutines may do so at the same time.
func (s *server) login(ctx context.Context, a *agent) error {
	ctx, cancel := context.WithTimeout(ctx, time.Minute)
	defer cancel()
	cmd := command(ctx, environment(s.dir, nil), s.b.programs["ssh"], "-T", "-F", s.configFile(a), "bench")
	if said, err := cmd.CombinedOutput(); err != nil {
		return fmt.Errorf("log in with %s: %w\n%s%s", names[a.who], err, said, a.logged())
	}
	return nil
}

// logins logs in n times, at most so many at a time. The sample has the time for
// each, which is a part of the whole time.
func (s *server) logins(ctx context.Context, a *agent, n, atATime int) (sample, error) {
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	places := make(chan struct{}, atATime)
	var all sync.WaitGroup
	begun := time.Now()
	for range n {
		places <- struct{}{}
		if ctx.Err() != nil {
			break
		}
		all.Go(func() {
			defer func() { <-places }()
			if err := s.login(ctx, a); err != nil {
				cancel(err)
			}
		})
	}
	all.Wait()
	each := time.Since(begun).Seconds() * 1000 / float64(n)
	return sample{median: each}, context.Cause(ctx)
}
