package request

import "iter"

// Selects tells whether a selection selects a key. A selection that names no single key
// selects only keys that are fit.
func Selects(s Selection, k Key) bool { return s.Match(k) && (k.Unfit() == "" || !s.Broad()) }

// Offers yields the keys that the agent offers by itself, in the order of its list: the
// index of the key, and whether the configuration names that single key. automatic are the
// selections of the configuration; nil selects every key that is fit. A key that several
// selections select comes once for each.
func Offers[K Key](keys []K, automatic []Selection) iter.Seq2[int, bool] {
	return func(yield func(int, bool) bool) {
		if automatic == nil {
			for i, k := range keys {
				if k.Unfit() == "" && !yield(i, false) {
					return
				}
			}
		}
		for _, s := range automatic {
			for i, k := range keys {
				if Selects(s, k) && !yield(i, !s.Broad()) {
					return
				}
			}
		}
	}
}

// Offered tells whether the agent offers a key by itself. automatic is as for [Offers].
func Offered(k Key, automatic []Selection) bool {
	for range Offers([]Key{k}, automatic) {
		return true
	}
	return false
}
