package knownhosts

import (
	"slices"
	"strings"

	"p11-agent/pinentry/plain"
)

// The options of ssh, those without an argument and those with one (OpenSSH 10.5's
// ssh.c, main). OpenSSH 9.2 has the same.
const (
	flagOptions     = "1246ACGKMNTVXYZafgknqstvxy"
	argumentOptions = "BDEFIJLOPQRSWbceilmopw"
)

// Destination returns the names under which an ssh client with these arguments looks
// for its host in known_hosts, the likeliest first. They are what the arguments say of
// the destination, and nothing else in them: neither other options nor the command.
// ssh's configuration may say otherwise. nil: the arguments are not ssh's.
func Destination(arguments []string) []string {
	d, ok := parseDestination(arguments)
	if !ok {
		return nil
	}
	var names []string
	add := func(name string) {
		if name != "" && len(name) <= 255 && plain.PrintsASCII(name) && !slices.Contains(names, name) {
			names = append(names, name)
		}
	}
	add(d.options["hostkeyalias"])
	for _, host := range []string{d.hostName(), d.host} {
		if port := d.options["port"]; host != "" && port != "" && port != "22" {
			add("[" + host + "]:" + port)
		}
		add(host)
	}
	return names
}

// destination is what arguments of ssh say of the host.
type destination struct {
	host    string
	options map[string]string // by their names in small letters; the first one counts
}

// hostName is the name that ssh connects to, with what HostName says of it.
func (d *destination) hostName() string {
	name, ok := d.options["hostname"]
	if !ok {
		return d.host
	}
	name = strings.NewReplacer("%%", "%", "%h", d.host).Replace(name)
	if strings.Contains(name, "%") {
		return ""
	}
	return name
}

func (d *destination) option(name, value string) {
	name = strings.ToLower(name)
	if _, ok := d.options[name]; !ok {
		d.options[name] = strings.ToLower(value)
	}
}

// parseDestination reads the arguments as ssh does: options, the destination, more
// options, and the command. After -- there are no more options.
func parseDestination(arguments []string) (d destination, ok bool) {
	d.options = make(map[string]string)
	if len(arguments) == 0 {
		return d, false
	}
	rest, ended, ok := d.readOptions(arguments[1:])
	if !ok || len(rest) == 0 || !d.readHost(rest[0]) {
		return d, false
	}
	if !ended {
		_, _, ok = d.readOptions(rest[1:])
	}
	return d, ok
}

// readOptions reads options as getopt does, and returns what follows them. ended says
// that -- has ended them.
func (d *destination) readOptions(arguments []string) (rest []string, ended, ok bool) {
	for len(arguments) > 0 {
		word := arguments[0]
		if len(word) < 2 || word[0] != '-' {
			return arguments, false, true
		}
		arguments = arguments[1:]
		if word == "--" {
			return arguments, true, true
		}
		for letters := word[1:]; letters != ""; {
			letter := letters[0]
			letters = letters[1:]
			switch {
			case strings.IndexByte(flagOptions, letter) >= 0:
				continue
			case strings.IndexByte(argumentOptions, letter) < 0:
				return nil, false, false
			}
			value := letters
			if value == "" {
				if len(arguments) == 0 {
					return nil, false, false
				}
				value, arguments = arguments[0], arguments[1:]
			}
			letters = ""
			switch letter {
			case 'p':
				d.option("port", value)
			case 'o':
				d.readConfig(value)
			}
		}
	}
	return nil, false, true
}

// readConfig reads what -o has: a line of ssh_config(5).
func (d *destination) readConfig(line string) {
	line = strings.TrimLeft(line, " \t")
	end := strings.IndexAny(line, " \t=")
	if end < 0 {
		return
	}
	value := strings.TrimSpace(line[end:])
	value = strings.TrimLeft(strings.TrimPrefix(value, "="), " \t")
	if quoted, ok := strings.CutPrefix(value, `"`); ok {
		value, _, _ = strings.Cut(quoted, `"`)
	} else if fields := strings.Fields(value); len(fields) > 0 {
		value = fields[0]
	}
	d.option(line[:end], value)
}

// readHost reads a destination, as host, user@host or ssh://user@host:port
// (OpenSSH's misc.c, parse_uri).
func (d *destination) readHost(word string) bool {
	host, uri := strings.CutPrefix(word, "ssh://")
	if !uri {
		d.host = strings.ToLower(word[strings.LastIndexByte(word, '@')+1:])
		return d.host != ""
	}
	if _, after, ok := strings.Cut(host, "@"); ok {
		host = after
	}
	host, _, _ = strings.Cut(host, "/")
	if inner, ok := strings.CutPrefix(host, "["); ok {
		var after string
		if host, after, ok = strings.Cut(inner, "]"); !ok {
			return false
		}
		if port, ok := strings.CutPrefix(after, ":"); ok && port != "" {
			d.option("port", port)
		}
	} else if name, port, ok := strings.Cut(host, ":"); ok {
		host = name
		if port != "" {
			d.option("port", port)
		}
	}
	d.host = strings.ToLower(host)
	return d.host != ""
}
