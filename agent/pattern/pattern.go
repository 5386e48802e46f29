// Package pattern matches texts with the patterns of OpenSSH: names of hosts and users, and
// files of modules. It imports no other room, and every room may import it.
package pattern

// Match tells whether a pattern describes all of s. In a pattern, * stands for any
// characters and ? for one (match_pattern in OpenSSH's match.c; PATTERNS in
// ssh_config(5)). Match compares bytes, and takes time in proportion to the product of
// both lengths.
func Match(pattern, s string) bool {
	star, mark := -1, 0
	p, i := 0, 0
	for i < len(s) {
		switch {
		case p < len(pattern) && pattern[p] == '*':
			star, mark = p, i
			p++
		case p < len(pattern) && (pattern[p] == '?' || pattern[p] == s[i]):
			p++
			i++
		case star >= 0:
			mark++
			p, i = star+1, mark
		default:
			return false
		}
	}
	for p < len(pattern) && pattern[p] == '*' {
		p++
	}
	return p == len(pattern)
}
