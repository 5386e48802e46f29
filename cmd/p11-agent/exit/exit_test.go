package exit

import (
	"errors"
	"fmt"
	"testing"
)

func TestCode(t *testing.T) {
	wrong := errors.New("wrong")
	for _, test := range []struct {
		err  error
		want int
	}{
		{nil, CodeOK},
		{wrong, CodeFailure},
		{Usage(wrong), CodeUsage},
		{fmt.Errorf("list: %w", WithHint(Usage(wrong), "read the manual")), CodeUsage},
		{Status(130), 130},
		{errors.Join(Status(CodeFailure), Usage(wrong)), CodeFailure},
	} {
		if got := Code(test.err); got != test.want {
			t.Errorf("Code(%v) = %d, want %d", test.err, got, test.want)
		}
	}
}

func TestEach(t *testing.T) {
	one, two := errors.New("one"), errors.New("two")
	all := Each(WithHint(errors.Join(one, two), "next"))
	if len(all) != 2 || all[0] != one || !errors.Is(all[1], two) || Hint(all[0]) != "" || Hint(all[1]) != "next" {
		t.Errorf("got %q", all)
	}
	if all := Each(fmt.Errorf("read: %w, %w", one, two)); len(all) != 1 {
		t.Errorf("an error with a text of its own is taken apart: %q", all)
	}
}
