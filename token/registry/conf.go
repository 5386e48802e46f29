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

// A field is one "name: value" line.
type field struct {
	name, value string
	line        int // counted from 1
}

// A syntaxError says what is wrong with a line. It does not quote it: a command
// line in a configuration may hold a PIN.
type syntaxError struct {
	line int
	text string
}

func (e *syntaxError) Error() string { return fmt.Sprintf("line %d: %s", e.line, e.text) }

// parse reads a file of pkcs11.conf(5). The same name may come more than once:
// the last one counts. Names and values are bytes; whether they are UTF-8 is
// not asked, because file names need not be.
func parse(data []byte) ([]field, error) {
	if len(data) > maxFile {
		return nil, fmt.Errorf("larger than %d bytes", maxFile)
	}
	var fields []field
	number := 0
	for raw := range bytes.Lines(data) {
		number++
		if bytes.IndexByte(raw, 0) >= 0 {
			// p11-kit would cut name or value off here.
			return nil, &syntaxError{number, "a zero byte: this is not a text file"}
		}
		// p11-kit's lexer also reads its trust files, where these mean something.
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

// readConf opens, reads and parses one configuration file, and says who else
// may change it.
func readConf(path string, uid int) (fields []field, exposed string, err error) {
	// Without O_NONBLOCK a named pipe would hold us up until somebody writes to it.
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

// exposure says why somebody other than root and uid may change a file, or is
// empty when nobody may. A group that may is left out: many systems give each
// user a group and let it write.
func exposure(info fs.FileInfo, uid int) string {
	if info.Mode().Perm()&0o002 != 0 {
		return "everybody may write to it"
	}
	if st, ok := info.Sys().(*syscall.Stat_t); ok && st.Uid != 0 && int(st.Uid) != uid {
		return fmt.Sprintf("it belongs to user %d", st.Uid)
	}
	return ""
}

// bare drops the operation and the path of an error that is shown behind the
// path anyway.
func bare(err error) error {
	if e, ok := errors.AsType[*fs.PathError](err); ok {
		return e.Err
	}
	return err
}
