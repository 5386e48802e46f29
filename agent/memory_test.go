package agent

import (
	"fmt"
	"runtime"
	"testing"
	"testing/synctest"
	"time"

	"p11-agent/agent/request"
	"p11-agent/agent/sshkey/keytest"
)

// allocated returns how many bytes f allocates.
func allocated(f func()) int {
	var before, after runtime.MemStats
	runtime.ReadMemStats(&before)
	f()
	runtime.ReadMemStats(&after)
	return int(after.TotalAlloc - before.TotalAlloc)
}

// The cost of adding, finding and removing a key in memory does not depend on the number of
// keys. So eight times as many keys cost some eight times as much.
func TestManySoftwareKeys(t *testing.T) {
	const few, many = 100, 800
	measure := func(n int) (add, remove int) {
		keys := make([]keytest.Key, n)
		for i := range keys {
			keys[i] = keytest.New(t)
		}
		f := newFixture(Options{SoftwareKeys: true}, edKey("pkcs11:token=a"))
		add = allocated(func() {
			for _, k := range keys {
				if err := f.Add(t.Context(), local, addKey(k, request.Constraints{Lifetime: time.Hour})); err != nil {
					t.Fatal(err)
				}
			}
		})
		if list, err := f.List(t.Context(), local); err != nil || len(list.Identities) != n+1 {
			t.Fatalf("%d keys, %v", len(list.Identities), err)
		}
		remove = allocated(func() {
			for _, k := range keys {
				if err := f.Remove(t.Context(), local, k.Public.Marshal()); err != nil {
					t.Fatal(err)
				}
			}
		})
		f.wantList(t, "pkcs11:token=a")
		return add, remove
	}
	add, remove := measure(few)
	addMany, removeMany := measure(many)
	const ratio = 2 * many / few
	if addMany > ratio*add || removeMany > ratio*remove {
		t.Errorf("%d bytes for %d additions, and %d for %d; %d bytes for %d removals, and %d for %d",
			add, few, addMany, many, remove, few, removeMany, many)
	}
}

// Each key in memory goes at the end of its own lifetime. Keys without a lifetime stay.
func TestSoftwareKeysExpire(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := newFixture(Options{SoftwareKeys: true})
		var keys []keytest.Key
		for i, d := range []time.Duration{0, time.Minute, 3 * time.Minute, 2 * time.Minute, request.NoTime} {
			k := keytest.New(t)
			r := addKey(k, request.Constraints{Lifetime: d})
			r.Comment = fmt.Sprint(i)
			if err := f.Add(t.Context(), local, r); err != nil {
				t.Fatal(err)
			}
			keys = append(keys, k)
		}
		synctest.Wait()
		time.Sleep(request.NoTime)
		f.wantList(t, "0", "1", "2", "3")
		time.Sleep(time.Minute)
		if _, err := f.Sign(t.Context(), local, request.Sign{Key: keys[1].Public.Marshal()}); err == nil {
			t.Error("a key signs after its time")
		}
		f.wantList(t, "0", "2", "3")
		time.Sleep(time.Minute)
		f.wantList(t, "0", "2")
		// A key that is added again without a lifetime stays.
		if err := f.Add(t.Context(), local, addKey(keys[2], request.Constraints{})); err != nil {
			t.Fatal(err)
		}
		time.Sleep(time.Hour)
		f.wantList(t, "0", "file")
		if f.software.kept.count != 2 {
			t.Errorf("%d keys are counted", f.software.kept.count)
		}
	})
}
