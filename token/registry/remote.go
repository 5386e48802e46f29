package registry

import (
	"errors"
	"strings"
)

// Remote tells how to reach a module in another process. One of the fields is set. For a
// module of this machine, no field is set.
type Remote struct {
	// Command is a program and its arguments. The program speaks p11-kit's protocol on
	// its standard input and output. A Bridge runs it.
	Command []string
	// Address is a value for the environment variable P11_KIT_SERVER_ADDRESS.
	Address string
}

func (r Remote) isSet() bool { return len(r.Command) > 0 || r.Address != "" }

// parseRemote reads the value of remote: (p11-kit 0.24.1, p11-kit/rpc-transport.c). Its
// errors do not quote the value, because the value may hold a PIN.
func parseRemote(s string) (Remote, error) {
	if line, ok := strings.CutPrefix(s, "|"); ok {
		command, err := splitCommand(line)
		return Remote{Command: command}, err
	}
	if strings.HasPrefix(s, "unix:path=/") || strings.HasPrefix(s, "vsock:") {
		return Remote{Address: s}, nil
	}
	return Remote{}, errors.New(`remote must be "|command", "unix:path=/..." or "vsock:..."`)
}

// splitCommand splits a command line into words as p11-kit does (common/argv.c), without
// a shell. Both kinds of quotes keep a word together. In quotes, a backslash escapes the
// closing quote. Elsewhere the backslash and the next character both stay, so a blank
// after a backslash does not end the word.
func splitCommand(line string) ([]string, error) {
	var (
		words []string
		word  []byte
		open  bool // a word has begun, maybe an empty one in quotes
		quote byte // 0 outside of quotes
	)
	for i := 0; i < len(line); i++ {
		c := line[i]
		switch {
		case quote != 0 && c == quote:
			quote = 0
		case c == '\\':
			if i++; i == len(line) {
				return nil, errors.New("the command of remote ends in a backslash")
			}
			if line[i] != quote {
				word = append(word, '\\')
			}
			word = append(word, line[i])
			open = true
		case quote != 0:
			word = append(word, c)
		case c == '\'' || c == '"':
			quote, open = c, true
		case strings.IndexByte(space, c) >= 0:
			if open {
				words = append(words, string(word))
			}
			word, open = word[:0], false
		default:
			word = append(word, c)
			open = true
		}
	}
	if quote != 0 {
		return nil, errors.New("the command of remote has a quote that is not closed")
	}
	if open {
		words = append(words, string(word))
	}
	if len(words) == 0 || words[0] == "" {
		return nil, errors.New("remote has no command behind the |")
	}
	return words, nil
}
