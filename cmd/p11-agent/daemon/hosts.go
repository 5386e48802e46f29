package daemon

import (
	"os"
	"path/filepath"
	"slices"
	"strings"

	"p11-agent/agent/knownhosts"
	"p11-agent/agent/peer"
	"p11-agent/agent/request"
	"p11-agent/cmd/p11-agent/config"

	"golang.org/x/crypto/ssh"
)

// hosts gives names to host keys by ssh's known_hosts files.
type hosts struct {
	files  *knownhosts.Files
	config string // of the ssh client: its words are guesses at names
}

// HostName returns the names of a host key in the files. If ssh asks, the first guess at a name is the destination among
// its arguments. The other guesses are the words of its configuration.
func (h *hosts) HostName(key ssh.PublicKey, p peer.Peer) request.HostName {
	return h.files.Lookup(key, func() []string {
		var guesses []string
		if len(p.Chain) > 0 && p.Chain[0].Name == "ssh" {
			guesses = knownhosts.Destination(p.Arguments())
		}
		if h.config == "" {
			return guesses
		}
		// The configuration may have the port of the destination.
		words := slices.DeleteFunc(slices.Clone(guesses), func(g string) bool { return strings.Contains(g, "]:") })
		return append(guesses, knownhosts.Guesses(append(words, knownhosts.ConfigWords(h.config)...))...)
	})
}

var _ request.HostNamer = (*hosts)(nil)

// newHosts uses the files that the configuration names, or else the files of ssh.
func newHosts(c *config.File) *hosts {
	home := os.Getenv("HOME")
	own := func(name string) string { return filepath.Join(home, ".ssh", name) }
	paths := c.KnownHosts
	if paths == nil {
		paths = []string{"/etc/ssh/ssh_known_hosts", "/etc/ssh/ssh_known_hosts2"}
		if filepath.IsAbs(home) {
			paths = append([]string{own("known_hosts"), own("known_hosts2")}, paths...)
		}
	}
	h := &hosts{files: knownhosts.New(paths...)}
	if filepath.IsAbs(home) {
		h.config = own("config")
	}
	return h
}
