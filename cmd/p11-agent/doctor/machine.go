package doctor

import (
	"errors"
	"os"
	"syscall"
	"time"

	"golang.org/x/crypto/ssh"
	"golang.org/x/sys/unix"

	"p11-agent/agent/certdir"
	"p11-agent/cmd/p11-agent/config"
	"p11-agent/cmd/p11-agent/output"
	"p11-agent/pinentry/secret"
)

// findCertificates looks at the directory of certificates.
func findCertificates(r *Group, c *config.File, now time.Time) {
	if c.Certificates == "" {
		return
	}
	files, err := certdir.Read(c.Certificates)
	if err != nil {
		r.warn("the directory of certificates cannot be read: %v", err).
			Next("mkdir -p %s  # and put certificates there, or take certificates out of the configuration", output.ShellWord(c.Certificates))
		return
	}
	for _, f := range files {
		if f.Err != nil {
			r.warn("%s cannot be used as a certificate: %v", f.Path, f.Err).Next("ssh-keygen -L -f %s  # says more", output.ShellWord(f.Path))
			continue
		}
		findCertificate(r, f, now)
	}
	if len(files) == 0 {
		r.detail("there are no certificates in %s", c.Certificates)
	}
}

func findCertificate(r *Group, f certdir.File, now time.Time) {
	const layout = "2006-01-02 15:04"
	cert := f.Certificate
	from, to := certificateTime(cert.ValidAfter), certificateTime(cert.ValidBefore)
	renew := "have " + f.Path + " renewed by your certificate authority: the agent uses a new certificate at once"
	switch {
	case now.Before(from):
		r.warn("the certificate %s is not valid before %s", f.Path, from.Format(layout)).
			Next("date  # if the date is wrong, set the clock: sudo timedatectl set-ntp true")
	case cert.ValidBefore != ssh.CertTimeInfinity && !now.Before(to):
		r.warn("the certificate %s has expired, on %s", f.Path, to.Format(layout)).Next("%s", renew)
	case cert.ValidBefore != ssh.CertTimeInfinity && to.Sub(now) < 24*time.Hour:
		r.warn("the certificate %s expires within a day, on %s", f.Path, to.Format(layout)).Next("%s", renew)
	default:
		r.ok("the certificate %s (%s) is valid", f.Path, cert.KeyId)
	}
}

// certificateTime converts a time of a certificate. It cuts times that are too far away.
func certificateTime(seconds uint64) time.Time { return time.Unix(int64(min(seconds, 1<<40)), 0) }

// findMachine looks at what the agent needs of the machine.
func findMachine(r *Group) {
	findClock(r, time.Now(), []string{"/etc/ld.so.cache", "/var/lib/dpkg/status", "/var/lib/rpm/rpmdb.sqlite", "/var/log/wtmp", "/proc/self/exe"})
	if s, err := secret.New(1); err == nil {
		s.Wipe()
	}
	if err := secret.LockError(); err != nil {
		r.warn("PINs may reach the swap space: %v", err).
			Next("raise the limit of locked memory to at least 64 KiB: ulimit -l prints it, and /etc/security/limits.conf sets it (memlock)")
	}
	if err := secret.HideError(); err != nil {
		r.detail("the kernel does not hide PINs from a program that has opened the agent's memory: %v", err)
	}
	findProgramFile(r, "/proc/self/exe", os.Geteuid())
	if abi, _, errno := unix.Syscall(unix.SYS_LANDLOCK_CREATE_RULESET, 0, 0, unix.LANDLOCK_CREATE_RULESET_VERSION); errno == 0 {
		r.detail("the kernel has Landlock, version %d", abi)
	} else {
		r.detail("the kernel has no Landlock")
	}
	if fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0); err == nil {
		fd, err := unix.GetsockoptInt(fds[0], unix.SOL_SOCKET, unix.SO_PEERPIDFD)
		if err == nil {
			_ = unix.Close(fd)
		}
		if errors.Is(err, unix.ENOPROTOOPT) {
			r.detail("the kernel is older than 6.5: the name of a client that ends at once may stay unknown")
		}
		_, _ = unix.Close(fds[0]), unix.Close(fds[1])
	}
}

// findProgramFile warns when the user can read the file of the program and does not own it.
// The kernel then lets other processes of the user look into the program while it starts.
func findProgramFile(r *Group, file string, uid int) {
	st, err := os.Stat(file)
	if err != nil {
		return
	}
	sys, ok := st.Sys().(*syscall.Stat_t)
	if !ok || int(sys.Uid) == uid || uid == 0 || unix.Access(file, unix.R_OK) != nil {
		return // an owner can replace the file, and root can do everything
	}
	path := file
	if real, err := os.Readlink(file); err == nil {
		path = real
	}
	r.warn("other programs of yours can look into the agent while it starts, as you can read the file %s", path).
		Next("sudo chmod 711 %s", output.ShellWord(path))
}

// earliest is a time before the first release of this program.
var earliest = time.Date(2026, 1, 1, 0, 0, 0, 0, time.UTC)

// findClock warns when the clock is wrong, because certificates depend on it. Files that
// change with each upgrade, start or login must not be newer than the clock.
func findClock(r *Group, now time.Time, files []string) {
	const set = "sudo timedatectl set-ntp true  # or: sudo date -s 'YYYY-MM-DD hh:mm'"
	if now.Before(earliest) || now.Year() > earliest.Year()+50 {
		r.warn("the clock says %s, which is wrong: certificates seem to have expired, or not to be valid yet", now.Format("2006-01-02")).Next("%s", set)
		return
	}
	for _, file := range files {
		if st, err := os.Stat(file); err == nil && st.ModTime().Sub(now) > time.Hour {
			r.warn("the clock says %s, and %s was changed later, on %s: the clock is behind", now.Format("2006-01-02 15:04"), file, st.ModTime().Format("2006-01-02 15:04")).Next("%s", set)
			return
		}
	}
	r.detail("the clock says %s", now.Format("2006-01-02 15:04"))
}
