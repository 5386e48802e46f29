package daemon

import (
	"fmt"
	"strconv"
	"strings"
	"time"

	"golang.org/x/crypto/ssh"
)

// The functions of this file read values of ssh-agent's flags, as ssh-agent does.

// Fingerprints returns the function that names a key for people, as ssh-agent's -E does. hash
// is "sha256" or "md5".
func Fingerprints(hash string) (func(ssh.PublicKey) string, error) {
	switch strings.ToLower(hash) {
	case "sha256":
		return ssh.FingerprintSHA256, nil
	case "md5":
		return func(k ssh.PublicKey) string { return "MD5:" + ssh.FingerprintLegacyMD5(k) }, nil
	}
	return nil, fmt.Errorf("unknown fingerprint hash %q: use sha256 or md5", hash)
}

// ParseLifetime reads the time of ssh-agent's -t (sshd_config(5), TIME FORMATS; convtime in
// OpenSSH 10.5's misc.c): numbers with units as in 1h30m, of which one at most is seconds.
// A number without a unit is seconds.
func ParseLifetime(s string) (time.Duration, error) {
	units := map[byte]time.Duration{
		's': time.Second, 'm': time.Minute, 'h': time.Hour, 'd': 24 * time.Hour, 'w': 7 * 24 * time.Hour,
	}
	bad := fmt.Errorf("invalid length of time %q: write seconds, or 1h30m", s)
	if s == "" {
		return 0, bad
	}
	total, seconds := time.Duration(0), false
	for rest := s; rest != ""; {
		n := strings.IndexFunc(rest, func(r rune) bool { return r < '0' || r > '9' })
		digits, unit := rest, time.Second
		if n >= 0 {
			digits = rest[:n]
			var ok bool
			if unit, ok = units[rest[n]|0x20]; !ok {
				return 0, bad
			}
			rest = rest[n+1:]
		} else {
			rest = ""
		}
		v, err := strconv.ParseUint(digits, 10, 31)
		if err != nil || unit == time.Second && seconds {
			return 0, bad
		}
		seconds = seconds || unit == time.Second
		total += time.Duration(v) * unit
		if total < 0 || total > 1<<31*time.Second {
			return 0, bad
		}
	}
	return total, nil
}
