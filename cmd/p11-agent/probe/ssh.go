package probe

import (
	"cmp"
	"context"
	"fmt"
	"strings"
)

// An SSH is the configuration of ssh for a host that has no block of its own.
type SSH struct {
	Version  string // as ssh -V prints it; empty: ssh is not installed
	Err      error  // ssh refuses its configuration
	Agent    string // IdentityAgent
	Provider string // PKCS11Provider
	Only     bool   // IdentitiesOnly
	Files    []string
}

// AnyHost is a name that no host has (RFC 2606). The settings for it count for all hosts.
const AnyHost = "any-host.invalid"

// ReadSSH asks ssh for its version and its configuration.
func ReadSSH(ctx context.Context) SSH {
	var s SSH
	v, err := Run(ctx, "ssh", "-V")
	if err != nil {
		s.Err = err
		return s
	}
	s.Version = firstLine(cmp.Or(v.Err, v.Out))
	g, err := Run(ctx, "ssh", "-G", AnyHost)
	switch {
	case err != nil:
		s.Err = err
	case g.Status != nil:
		s.Err = fmt.Errorf("ssh does not take its configuration: %s", g.Err)
	}
	for l := range strings.Lines(g.Out) {
		key, value, _ := strings.Cut(strings.TrimSpace(l), " ")
		switch key {
		case "identityagent":
			s.Agent = value
		case "pkcs11provider":
			s.Provider = value
		case "identitiesonly":
			s.Only = value == "yes"
		case "identityfile":
			s.Files = append(s.Files, value)
		}
	}
	return s
}

func firstLine(s string) string {
	l, _, _ := strings.Cut(s, "\n")
	return l
}
