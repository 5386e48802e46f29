package bounds

import (
	"log/slog"
	"slices"
	"strings"
	"testing"
	"time"

	"p11-agent/token/wire"
)

func token(label string) wire.TokenID { return wire.TokenID{Label: label} }

// TestLook checks the bounds of a look at a module that lies.
func TestLook(t *testing.T) {
	var log strings.Builder
	l := NewLook(MaxTokens+3, slog.New(slog.NewTextHandler(&log, nil)))
	if l.Admit(&wire.Slot{Token: token(strings.Repeat("x", maxName+1))}) {
		t.Error("a token with a long name is used")
	}
	slot := wire.Slot{
		Token: token("card"), Description: strings.Repeat("x", maxDescription+1),
		Mechanisms: []wire.Mechanism{{Type: wire.CKMECDSA}, {Type: 0x8000_0001}, {Type: wire.CKMECDSA}},
	}
	if !l.Admit(&slot) || len(slot.Description) > maxDescription || len(slot.Mechanisms) != 1 {
		t.Errorf("the slot is %+v", slot)
	}
	for range MaxTokens - 1 {
		if !l.Admit(&wire.Slot{}) {
			t.Fatal("a token within the bound is not used")
		}
	}
	for range 2 {
		if l.Admit(&wire.Slot{}) {
			t.Error("a token beyond the bound is used")
		}
	}
	if !l.MayRead(token("a")) {
		t.Error("the first token is not read")
	}
	l.Read(maxLook + 1)
	if l.MayRead(token("b")) {
		t.Error("a token is read beyond the bound")
	}
	got := strings.Join(l.LeftOut(), "\n")
	for _, want := range []string{"2 tokens: 256", "the objects of 1 token: 64 MiB"} {
		if !strings.Contains(got, want) {
			t.Errorf("%q is not told:\n%s", want, got)
		}
	}
	if n := strings.Count(log.String(), "\n"); n != 3 {
		t.Errorf("%d lines are logged:\n%s", n, log.String())
	}
	if got := NewLook(1, nil).LeftOut(); len(got) > 0 {
		t.Errorf("nothing is left out, and told is %q", got)
	}
}

func TestTrimHello(t *testing.T) {
	h := wire.HelloReply{Description: strings.Repeat("x", maxDescription+1)}
	for range maxMissing + 1 {
		h.Sandbox.Missing = append(h.Sandbox.Missing, strings.Repeat("/x", maxPath))
	}
	TrimHello(&h)
	if len(h.Description) > maxDescription || len(h.Sandbox.Missing) != maxMissing || len(h.Sandbox.Missing[0]) > maxPath {
		t.Errorf("%d bytes, %d paths of %d bytes", len(h.Description), len(h.Sandbox.Missing), len(h.Sandbox.Missing[0]))
	}
}

// TestSurplus checks which absent tokens are forgotten.
func TestSurplus(t *testing.T) {
	at := func(minutes int) time.Time { return time.Unix(int64(60*minutes), 0) }
	one := Size{Keys: 1, KeyBytes: 1000}
	for _, tt := range []struct {
		name   string
		absent []Absent
		tokens int
		want   []string
	}{
		{"there is room", []Absent{{ID: token("a"), Size: one}, {ID: token("b"), Size: one}}, 2, nil},
		{"no keys", []Absent{{ID: token("a")}, {ID: token("b"), Home: true}}, 2, []string{"a"}},
		{"too many tokens", []Absent{{ID: token("late"), Size: one, Left: at(2)}, {ID: token("early"), Size: one, Left: at(1)}}, MaxTokens + 1, []string{"early"}},
		{"the home goes last", []Absent{{ID: token("home"), Size: one, Left: at(1), Home: true}, {ID: token("guest"), Size: one, Left: at(2)}}, MaxTokens + 1, []string{"guest"}},
		{"too many keys", []Absent{{ID: token("a"), Size: Size{Keys: MaxKeys/2 + 1}}, {ID: token("b"), Size: one}}, 2, []string{"a"}},
		{"too many bytes", []Absent{{ID: token("a"), Size: one}, {ID: token("b"), Size: Size{1, MaxKeyBytes / 2, 0}}}, 2, []string{"a"}},
		{"too many bytes of no key", []Absent{{ID: token("a"), Size: Size{1, 1, MaxOtherBytes / 2}}, {ID: token("b"), Size: Size{1, 1, 1}}}, 2, []string{"a"}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			var got []string
			for _, id := range Surplus(tt.absent, tt.tokens) {
				got = append(got, id.Label)
			}
			if !slices.Equal(got, tt.want) {
				t.Errorf("%q are forgotten, want %q", got, tt.want)
			}
		})
	}
}
