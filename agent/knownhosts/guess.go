package knownhosts

import (
	"io"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"

	"p11-agent/pinentry/plain"
)

const (
	maxWords  = 2048 // of a text that are taken for names
	maxPorts  = 8
	maxConfig = 1 << 20 // bytes of a configuration file
)

// Guesses returns what may be names of hosts among the words of ssh's configuration.
// Hosts with a port of their own are known as [host]:port, so the numbers among the
// words are tried as ports.
func Guesses(words []string) []string {
	var hosts, ports []string
	add := func(list *[]string, s string) {
		if s != "" && plain.PrintsASCII(s) && len(s) <= 255 && !slices.Contains(*list, s) {
			*list = append(*list, s)
		}
	}
	for _, w := range words[:min(len(words), maxWords)] {
		w = strings.Trim(strings.ToLower(w), `"'`)
		if _, rest, ok := strings.Cut(w, "://"); ok { // ssh://user@host:port/path
			w, _, _ = strings.Cut(rest, "/")
		}
		if _, value, ok := strings.Cut(w, "="); ok { // Host=name
			w = value
		}
		if i := strings.LastIndexByte(w, '@'); i >= 0 {
			w = w[i+1:]
		}
		port := strings.TrimLeft(w, "-p")
		if port != "" && len(port) <= 5 && strings.Trim(port, "0123456789") == "" {
			if len(ports) < maxPorts {
				add(&ports, port)
			}
			continue
		}
		if strings.HasPrefix(w, "-") || strings.ContainsAny(w, "*?!") {
			continue
		}
		if host, rest, ok := strings.Cut(w, ":"); ok && !strings.Contains(rest, ":") { // host:path, host:port
			if !strings.Contains(host, "/") {
				add(&hosts, host)
			}
			if rest != "" && len(rest) <= 5 && strings.Trim(rest, "0123456789") == "" && len(ports) < maxPorts {
				add(&ports, rest)
			}
			continue
		}
		if !strings.Contains(w, "/") {
			add(&hosts, strings.Trim(w, "[]"))
		}
	}
	all := slices.Clone(hosts)
	for _, p := range ports {
		for _, h := range hosts {
			if len(all) >= maxGuesses {
				return all
			}
			all = append(all, "["+h+"]:"+p)
		}
	}
	return all
}

// ConfigWords returns the words of an ssh configuration (ssh_config(5)) and of
// those beside it in config.d.
func ConfigWords(file string) (words []string) {
	files := []string{file}
	more, _ := filepath.Glob(filepath.Join(filepath.Dir(file), "config.d", "*")) // the pattern is right
	for _, file := range append(files, more[:min(len(more), 32)]...) {
		f, err := os.OpenFile(file, os.O_RDONLY|syscall.O_NONBLOCK, 0)
		if err != nil {
			continue
		}
		if st, err := f.Stat(); err == nil && st.Mode().IsRegular() {
			b, _ := io.ReadAll(io.LimitReader(f, maxConfig))
			words = append(words, strings.Fields(string(b))...)
		}
		_ = f.Close()
	}
	return words
}
