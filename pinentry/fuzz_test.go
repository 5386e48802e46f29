package pinentry

import (
	"bytes"
	"io"
	"slices"
	"strings"
	"testing"
	"testing/iotest"
	"unicode/utf8"

	"p11-agent/pinentry/plain"
)

var replySeeds = []string{
	"OK", "OK Pleased to meet you", "OKAY", "", " ", "#", "# comment", "S", "S ERROR x 1", "D", "D ", "D 1234", "D  1 ",
	"D %25%0a%0D%zz", "D %", "D %2", "D 12%00", "ERR", "ERR ", "ERR 99", "ERR 83886179 Operation cancelled <Pinentry>",
	"ERR 4294967295 x", "ERR 4294967296 x", "ERR -1", "ERR 1\x1b[2J", "INQUIRE QUALITY 1", "\x00\xff",
}

// FuzzReply checks that no line makes the parser panic. If data is written again, the parser
// reads the same.
func FuzzReply(f *testing.F) {
	if len(replySeeds) < 20 {
		f.Fatal("the seeds are gone")
	}
	for _, s := range replySeeds {
		f.Add([]byte(s))
	}
	f.Fuzz(func(t *testing.T, line []byte) {
		before := bytes.Clone(line)
		r, err := parseReply(line)
		if err != nil {
			return
		}
		switch r.kind {
		case kindData:
			if len(r.data) > len(line) {
				t.Fatalf("%q grew to %q", before, r.data)
			}
			printed := appendEscaped([]byte("D "), string(r.data), 1<<30)
			if bytes.ContainsAny(printed, "\r\n") {
				t.Fatalf("%q does not fit on a line", printed)
			}
			data := bytes.Clone(r.data)
			again, err := parseReply(printed)
			if err != nil || again.kind != kindData || !bytes.Equal(again.data, data) {
				t.Fatalf("%q was %q, and then %q, %v", before, data, again.data, err)
			}
		case kindERR:
			if text := r.err.Error(); text != plain.Line(text) || len(text) > 10*maxErrorText {
				t.Fatalf("%q gives the error %q", before, text)
			}
			if code := r.err.code(); code < 0 || code > 0xffff {
				t.Fatalf("%q has the code %d", before, code)
			}
		}
	})
}

var textSeeds = []string{
	"", "plain", "100%", "a\r\nb\tc", "\x1b[2J", "\xff\xc3", "ü€🔑", "\u202e\u200b\u2028\U000e0001", strings.Repeat("ü%", 1000), "%0A", "\x00",
	strings.Repeat("x", 990), strings.Repeat("x", 991), strings.Repeat("x", 992), strings.Repeat("ü", 495), strings.Repeat("%", 331),
}

// FuzzText writes any text as a line of Assuan. The line is valid UTF-8 and within the
// limit. It reads as the text or as its beginning.
func FuzzText(f *testing.F) {
	if len(textSeeds) < 10 {
		f.Fatal("the seeds are gone")
	}
	for _, s := range textSeeds {
		f.Add(s, true)
		f.Add(s, false)
	}
	f.Fuzz(func(t *testing.T, text string, lines bool) {
		shown := plain.Line(text)
		if lines {
			shown = plain.Lines(text)
		}
		const command = "SETDESC "
		line := appendEscaped([]byte(command), shown, maxLine-1)
		if len(line) >= maxLine || !bytes.HasPrefix(line, []byte(command)) || !utf8.Valid(line) {
			t.Fatalf("%q became %q", text, line)
		}
		for _, c := range line {
			if c < 0x20 || c == 0x7f {
				t.Fatalf("%q became %q", text, line)
			}
		}
		read, err := unescape(line[len(command):])
		if err != nil {
			t.Fatalf("%q became %q: %v", text, line, err)
		}
		if got := string(read); got != shown && (!strings.HasSuffix(got, ellipsis) || !strings.HasPrefix(shown, strings.TrimSuffix(got, ellipsis))) {
			t.Fatalf("%q is read as %q", shown, got)
		}
		if cut := plain.Shorten(shown, maxAskpassText); len(cut) > maxAskpassText || !utf8.ValidString(cut) {
			t.Fatalf("%q is cut to %q", shown, cut)
		}
	})
}

var streamSeeds = []string{
	"", "\n", "\n\n", "OK\n", "OK\r\nD 1\n", "no end", strings.Repeat("x", maxLine-1) + "\nOK\n", strings.Repeat("x", maxLine) + "\n",
	strings.Repeat("x", 5000), strings.Repeat("OK\n", 3000), strings.Repeat(strings.Repeat("y", 700)+"\n", 20), "\r\n\r", "a\x00b\n",
}

// FuzzStream cuts a stream into reads. The lines stay the same, no line is too long, and the
// buffer keeps no bytes of a line.
func FuzzStream(f *testing.F) {
	if len(streamSeeds) < 10 {
		f.Fatal("the seeds are gone")
	}
	for _, s := range streamSeeds {
		f.Add([]byte(s))
	}
	f.Fuzz(func(t *testing.T, stream []byte) {
		whole, wholeErr := readAll(t, bytes.NewReader(stream))
		for _, r := range []io.Reader{
			iotest.OneByteReader(bytes.NewReader(stream)),
			iotest.HalfReader(bytes.NewReader(stream)),
			iotest.DataErrReader(bytes.NewReader(stream)),
		} {
			if lines, err := readAll(t, r); err != wholeErr || !slices.Equal(lines, whole) {
				t.Fatalf("%q, %v in pieces; %q, %v at once", lines, err, whole, wholeErr)
			}
		}
		// The lines that the standard library reads.
		var want []string
		var wantErr error = io.EOF
		for rest := stream; ; {
			line, more, ok := bytes.Cut(rest, []byte("\n"))
			if len(line) >= maxLine {
				wantErr = errLongLine
				break
			}
			if !ok {
				break
			}
			want = append(want, string(bytes.TrimSuffix(line, []byte("\r"))))
			rest = more
		}
		if !slices.Equal(whole, want) || wholeErr != wantErr {
			t.Fatalf("%q, %v; want %q, %v", whole, wholeErr, want, wantErr)
		}
	})
}

func readAll(t *testing.T, r io.Reader) ([]string, error) {
	t.Helper()
	l, err := newLineReader(r)
	if err != nil {
		t.Fatal(err)
	}
	defer l.buf.Wipe()
	var lines []string
	for {
		line, err := l.next()
		if err != nil {
			l.forget()
			for i, b := range l.buf.Buffer() {
				if b != 0 && (i < l.start || i >= l.end) {
					t.Fatalf("byte %d of the buffer is used and not overwritten", i)
				}
			}
			return lines, err
		}
		if len(line) >= maxLine {
			t.Fatalf("a line of %d bytes", len(line))
		}
		lines = append(lines, string(line))
	}
}
