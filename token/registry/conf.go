package registry

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"strings"
	"syscall"
)

const (
	// maxFile bounds a configuration file. Real ones hold a few hundred bytes.
	maxFile = 64 << 10
	// maxFiles bounds the entries of a configuration directory.
	maxFiles = 1024
)

// space is what isspace(3) takes for white space in the C locale.
const space = " \t\n\v\f\r"

// A field is a line of the form "name: value".
type field struct {
	name, value string
	line        int // counted from 1
}

// A syntaxError says what is wrong with a line. It does not quote the line, because a
// command line in a configuration may hold a PIN.
type syntaxError struct {
	line int
	text string
}

func (e *syntaxError) Error() string { return fmt.Sprintf("line %d: %s", e.line, e.text) }

// parse reads a file of pkcs11.conf(5). If a name occurs more than once, the last line
// counts. Names and values are bytes. parse does not check that they are UTF-8, because
// file names need not be.
func parse(data []byte) ([]field, error) {
	if len(data) > maxFile {
		return nil, fmt.Errorf("larger than %d bytes", maxFile)
	}
	var fields []field
	number := 0
	for raw := range bytes.Lines(data) {
		number++
		if bytes.IndexByte(raw, 0) >= 0 {
			// p11-kit would end the name or the value here.
			return nil, &syntaxError{number, "a zero byte: this is not a text file"}
		}
		// The same lexer of p11-kit reads trust files, and PEM blocks have a meaning
		// there.
		if bytes.HasPrefix(raw, []byte("-----BEGIN ")) {
			return nil, &syntaxError{number, "a PEM block, which has no place in a module configuration"}
		}
		line := strings.Trim(string(raw), space)
		if line == "" || line[0] == '#' {
			continue
		}
		if line[0] == '[' {
			return nil, &syntaxError{number, "a section header, which has no place in a module configuration"}
		}
		name, value, ok := strings.Cut(line, ":")
		if !ok {
			return nil, &syntaxError{number, `no colon: a setting is written "name: value"`}
		}
		fields = append(fields, field{strings.TrimRight(name, space), strings.TrimLeft(value, space), number})
	}
	return fields, nil
}

// readConf opens, reads and parses one configuration file. exposed says which other users
// may change the file.
func readConf(path string, uid int) (fields []field, exposed string, err error) {
	// Without O_NONBLOCK, the open of a named pipe blocks until a program writes to the
	// pipe.
	f, err := os.OpenFile(path, os.O_RDONLY|syscall.O_NONBLOCK|syscall.O_NOCTTY, 0)
	if err != nil {
		return nil, "", bare(err)
	}
	defer f.Close()
	info, err := f.Stat()
	if err != nil {
		return nil, "", bare(err)
	}
	if !info.Mode().IsRegular() {
		return nil, "", errors.New("not a regular file")
	}
	data, err := io.ReadAll(io.LimitReader(f, maxFile+1))
	if err != nil {
		return nil, "", bare(err)
	}
	fields, err = parse(data)
	return fields, exposure(info, uid), err
}

// exposure says why users other than root and uid may change a file. It is empty when no
// other user may. Write access of a group does not count: many systems give each user a
// group and let the group write.
func exposure(info fs.FileInfo, uid int) string {
	if info.Mode().Perm()&0o002 != 0 {
		return "everybody may write to it"
	}
	if st, ok := info.Sys().(*syscall.Stat_t); ok && st.Uid != 0 && int(st.Uid) != uid {
		return fmt.Sprintf("it belongs to user %d", st.Uid)
	}
	return ""
}

// bare drops the operation and the path of an error, because the message shows the path
// already.
func bare(err error) error {
	if e, ok := errors.AsType[*fs.PathError](err); ok {
		return e.Err
	}
	return err
}
