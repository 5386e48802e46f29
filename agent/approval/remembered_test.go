package approval

import (
	"fmt"
	"maps"
	"slices"
	"testing"
	"testing/synctest"
	"time"

	"p11-agent/agent/request"
	"p11-agent/agent/request/requesttest"
)

// sameness gives different names to different uses.
func TestSameness(t *testing.T) {
	w := requesttest.New(t)
	root := w.Caller("ssh git bash", "good")
	same := func(a, b request.Sign) bool {
		x, _ := sameness(w.Use(root, a), "id")
		y, _ := sameness(w.Use(root, b), "id")
		return x == y
	}
	if same(requesttest.Signature("git"), requesttest.Signature("file")) || !same(requesttest.Signature("git"), requesttest.Signature("git")) {
		t.Error("namespaces are not told apart")
	}
	via := func(hosts ...string) string {
		name, _ := sameness(w.Use(w.Caller("ssh", hosts...), requesttest.Signature("git")), "id")
		return name
	}
	if via("evil", "-") == via("other", "-") || via("evil", "other", "-") == via("other", "evil", "-") || via("evil", "-") == via("-") {
		t.Error("ways are not told apart")
	}
	a, b := requesttest.Signature("gi"), requesttest.Signature("git")
	a.Content.Detail = "t"
	if same(a, b) {
		t.Error("texts run into each other")
	}
}

// The number of remembered answers is bounded. The oldest answer goes first.
func TestApprovalsAreBounded(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var a remembered
		local := new(request.Caller)
		id := &request.Target{ID: "id"}
		a.keep("short", id, &request.Use{Caller: local}, Remember(15*time.Minute), 0)
		for i := range maxRemembered + 10 {
			time.Sleep(time.Second)
			a.keep(fmt.Sprint(i), id, &request.Use{Caller: local}, UntilLock, 0)
		}
		if len(a.kept) != maxRemembered {
			t.Errorf("%d are remembered", len(a.kept))
		}
		if a.has("short", id) || a.has("0", id) || !a.has(fmt.Sprint(maxRemembered+9), id) || !a.has("500", id) {
			t.Errorf("the wrong ones were forgotten: %v", slices.Sorted(maps.Keys(a.kept))[:10])
		}
	})
}

// A yes does not last longer if a person sets the clock, or if the clock stands still.
func TestApprovalClock(t *testing.T) {
	const m = time.Minute
	for name, test := range map[string]struct {
		lasts         Remember
		running, wall time.Duration
		over          bool
	}{
		"a while ago":          {Remember(15 * time.Minute), 14 * m, 14 * m, false},
		"long ago":             {Remember(15 * time.Minute), 15 * m, 15 * m, true},
		"the machine slept":    {Remember(15 * time.Minute), m, 15 * m, true},
		"the clock was set":    {Remember(15 * time.Minute), 15 * m, m, true},
		"before it was given":  {Remember(15 * time.Minute), m, -m, true},
		"until lock":           {UntilLock, 1000 * time.Hour, 1000 * time.Hour, false},
		"until lock, set back": {UntilLock, m, -m, false},
	} {
		if test.lasts.over(test.running, test.wall) != test.over {
			t.Errorf("%s: over is %t", name, !test.over)
		}
	}
}
