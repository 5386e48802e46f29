package approval

import (
	"testing"
	"time"

	"p11-agent/agent/request"
	"p11-agent/agent/request/requesttest"
)

func TestDecide(t *testing.T) {
	w := requesttest.New(t)
	yes, no := true, false
	git, goodLogin := requesttest.Signature("git"), w.Login("good", true)
	local, fwd := w.Caller("ssh bash", "good"), w.Caller("ssh bash", "evil", "good")
	failed := w.Caller("ssh bash", "good")
	failed.BindFailed, failed.Forwarded = true, true
	unbound := w.Caller("ssh bash")
	// An evil host has signed the identifier of its session with a good one.
	forged := w.Caller("ssh bash", "evil", "evil")
	forged.Binds[1].SessionID = []byte("session other")
	// A forwarded connection that says it is the good host's, for another session.
	stale := w.Caller("ssh bash", "good")

	one := func(r Rule) Policy { return Policy{Confirm: ConfirmAlways, Rules: []Rule{r}} }
	org := []string{"*.example.org", "!test.*"}
	never, deny := ConfirmNever, ConfirmDeny
	for name, test := range map[string]struct {
		a    Policy
		c    *request.Caller
		r    request.Sign
		want Confirm
	}{
		"nothing is said":                  {Policy{}, local, goodLogin, never},
		"nothing is said, forwarded":       {Policy{}, fwd, goodLogin, never},
		"forwarded, and it is":             {Policy{Confirm: ConfirmForwarded}, fwd, goodLogin, ConfirmAlways},
		"forwarded, and it is not":         {Policy{Confirm: ConfirmForwarded}, local, goodLogin, never},
		"forwarded, and a bind has failed": {Policy{Confirm: ConfirmForwarded}, failed, goodLogin, ConfirmAlways},
		"first use":                        {Policy{Confirm: ConfirmFirstUse}, local, goodLogin, ConfirmAlways},
		"an unknown value":                 {Policy{Confirm: "sometimes"}, local, goodLogin, ConfirmAlways},
		"the first rule that matches": {
			Policy{Rules: []Rule{{Purposes: []request.Purpose{request.PurposeGit}, Confirm: never}, {Confirm: deny}, {Confirm: never}}}, local, goodLogin, deny,
		},
		"no rule that matches": {Policy{Confirm: ConfirmAlways, Rules: []Rule{{Purposes: []request.Purpose{request.PurposeGit}, Confirm: never}}}, local, goodLogin, ConfirmAlways},

		"purpose git":                 {one(Rule{Purposes: []request.Purpose{request.PurposeGit}, Confirm: never}), local, git, never},
		"purpose file, for git":       {one(Rule{Purposes: []request.Purpose{request.PurposeFile}, Confirm: never}), local, git, ConfirmAlways},
		"purpose other, for unknown":  {one(Rule{Purposes: []request.Purpose{request.PurposeOther}, Confirm: deny}), local, request.Sign{Content: request.Content{Kind: request.KindUnknown}}, deny},
		"purpose login, for unknown":  {one(Rule{Purposes: []request.Purpose{request.PurposeLogin}, Confirm: never}), local, request.Sign{Content: request.Content{Kind: request.KindUnknown}}, ConfirmAlways},
		"program, the first":          {one(Rule{Programs: []string{"ssh"}, Confirm: deny}), local, git, deny},
		"program, any link":           {one(Rule{Programs: []string{"x", "bash"}, Confirm: deny}), local, git, deny},
		"program, not part of a name": {one(Rule{Programs: []string{"bas", "ssh*"}, Confirm: deny}), local, git, ConfirmAlways},
		"program, none known":         {one(Rule{Programs: []string{""}, Confirm: never}), &request.Caller{}, git, ConfirmAlways},
		"all conditions, one not met": {one(Rule{Programs: []string{"ssh"}, Purposes: []request.Purpose{request.PurposeGit}, Confirm: deny}), local, goodLogin, ConfirmAlways},

		"forwarded = true":                   {one(Rule{Forwarded: &yes, Confirm: never}), fwd, git, never},
		"forwarded = true, for a local one":  {one(Rule{Forwarded: &yes, Confirm: never}), local, git, ConfirmAlways},
		"forwarded = false":                  {one(Rule{Forwarded: &no, Confirm: never}), local, git, never},
		"forwarded = false, for a forwarded": {one(Rule{Forwarded: &no, Confirm: never}), fwd, git, ConfirmAlways},
		"never does not mean forwarded ones": {one(Rule{Purposes: []request.Purpose{request.PurposeGit}, Confirm: never}), fwd, git, ConfirmAlways},
		"deny does":                          {one(Rule{Purposes: []request.Purpose{request.PurposeGit}, Confirm: deny}), fwd, git, deny},
		"nor does program with never":        {one(Rule{Programs: []string{"bash"}, Confirm: never}), fwd, git, ConfirmAlways},

		"host, named by the data":               {one(Rule{Hosts: org, Confirm: never}), local, goodLogin, never},
		"host, named by the data alone":         {one(Rule{Hosts: org, Confirm: never}), unbound, goodLogin, never},
		"host, by the bind":                     {one(Rule{Hosts: org, Confirm: never}), local, w.Login("good", false), never},
		"host, in capitals":                     {one(Rule{Hosts: []string{"OTHER.*"}, Confirm: never}), w.Caller("ssh", "other"), w.Login("other", true), never},
		"host, by its address":                  {one(Rule{Hosts: []string{"192.0.2.?"}, Confirm: never}), local, goodLogin, never},
		"host, excepted":                        {one(Rule{Hosts: org, Confirm: never}), w.Caller("ssh", "test"), w.Login("test", true), ConfirmAlways},
		"host, one of its names excepted":       {one(Rule{Hosts: []string{"*.example.org", "!192.*"}, Confirm: never}), local, goodLogin, ConfirmAlways},
		"host, another":                         {one(Rule{Hosts: org, Confirm: never}), w.Caller("ssh", "evil"), w.Login("evil", true), ConfirmAlways},
		"host, not in known_hosts":              {one(Rule{Hosts: org, Confirm: never}), w.Caller("ssh", "new"), w.Login("new", true), ConfirmAlways},
		"host, hashed":                          {one(Rule{Hosts: org, Confirm: never}), w.Caller("ssh", "hashed"), w.Login("hashed", true), ConfirmAlways},
		"host, revoked":                         {one(Rule{Hosts: org, Confirm: never}), w.Caller("ssh", "revoked"), w.Login("revoked", true), ConfirmAlways},
		"host, not named":                       {one(Rule{Hosts: org, Confirm: never}), unbound, w.Login("good", false), ConfirmAlways},
		"host, a bind of another session":       {one(Rule{Hosts: org, Confirm: never}), stale, w.Login("other", false), ConfirmAlways},
		"host, data and bind differ":            {one(Rule{Hosts: org, Confirm: never}), stale, w.Login("other", true), ConfirmAlways},
		"host, a bind has failed":               {one(Rule{Hosts: org, Confirm: never}), failed, goodLogin, ConfirmAlways},
		"host, no login":                        {one(Rule{Hosts: []string{"*"}, Confirm: never}), local, git, ConfirmAlways},
		"any host, unknown":                     {one(Rule{Hosts: []string{"*"}, Confirm: never}), unbound, w.Login("good", false), never},
		"any host but, unknown":                 {one(Rule{Hosts: []string{"*", "!evil.*"}, Confirm: never}), unbound, w.Login("good", false), ConfirmAlways},
		"any host but, known":                   {one(Rule{Hosts: []string{"*", "!evil.*"}, Confirm: never}), local, goodLogin, never},
		"denied host":                           {one(Rule{Hosts: []string{"evil.*"}, Confirm: deny}), w.Caller("ssh", "evil"), w.Login("evil", true), deny},
		"denied host, behind a good one":        {one(Rule{Hosts: []string{"evil.*"}, Confirm: deny}), w.Caller("ssh", "good", "evil"), w.Login("evil", true), deny},
		"a wildcard, inside":                    {one(Rule{Hosts: []string{"*.org"}, Confirm: never}), w.Caller("ssh", "shared"), w.Login("shared", true), never},
		"a wildcard, one of its hosts":          {one(Rule{Hosts: []string{"db.example.org"}, Confirm: never}), w.Caller("ssh", "shared"), w.Login("shared", true), ConfirmAlways},
		"a wildcard, one of its hosts excepted": {one(Rule{Hosts: []string{"*.example.org", "!test.example.org"}, Confirm: never}), w.Caller("ssh", "shared"), w.Login("shared", true), ConfirmAlways},
		"a wildcard for all":                    {one(Rule{Hosts: org, Confirm: never}), w.Caller("ssh", "any"), w.Login("any", true), ConfirmAlways},
		"a wildcard for all, all permitted":     {one(Rule{Hosts: []string{"*"}, Confirm: never}), w.Caller("ssh", "any"), w.Login("any", true), never},
		"a wildcard, one of its hosts denied":   {one(Rule{Hosts: []string{"db.example.org"}, Confirm: deny}), w.Caller("ssh", "shared"), w.Login("shared", true), deny},
		"a wildcard, another host denied":       {one(Rule{Hosts: []string{"db.example.net"}, Confirm: deny}), w.Caller("ssh", "shared"), w.Login("shared", true), ConfirmAlways},
		"a wildcard, denied before all is permitted": {
			Policy{Rules: []Rule{{Hosts: []string{"db.example.org"}, Confirm: deny}, {Hosts: []string{"*.example.org"}, Confirm: never}}}, w.Caller("ssh", "shared"), w.Login("shared", true), deny,
		},
		"a wildcard, asked about before all is permitted": {
			Policy{Rules: []Rule{{Hosts: []string{"db.example.org"}, Confirm: ConfirmAlways}, {Hosts: []string{"*.example.org"}, Confirm: never}}}, w.Caller("ssh", "shared"), w.Login("shared", true), ConfirmAlways,
		},
		"a wildcard, one is permitted before all is denied": {
			Policy{Rules: []Rule{{Hosts: []string{"db.example.org"}, Confirm: never}, {Confirm: deny}}}, w.Caller("ssh", "shared"), w.Login("shared", true), deny,
		},
		"a wildcard, nothing but a denial": {Policy{Rules: []Rule{{Hosts: []string{"db.example.org"}, Confirm: deny}}}, w.Caller("ssh", "shared"), w.Login("shared", true), deny},
		"forwarded via a wildcard":         {one(Rule{Hosts: []string{"good.*", "hub.example.org"}, Forwarded: &yes, Confirm: never}), w.Caller("ssh", "shared", "good"), goodLogin, ConfirmAlways},
		"forwarded via a wildcard, inside": {one(Rule{Hosts: org[:1], Forwarded: &yes, Confirm: never}), w.Caller("ssh", "shared", "good"), goodLogin, never},
		"denied host, revoked":             {Policy{Rules: []Rule{{Hosts: []string{"gone.*"}, Confirm: deny}}}, w.Caller("ssh", "revoked"), w.Login("revoked", true), deny},
		"denied host, data and bind differ": {
			Policy{Rules: []Rule{{Hosts: []string{"Other.*"}, Confirm: deny}}}, stale, w.Login("other", true), deny,
		},
		"denied host, a bind has failed":         {Policy{Rules: []Rule{{Hosts: []string{"good.*"}, Confirm: deny}}}, failed, goodLogin, deny},
		"a key that cannot be read":              {one(Rule{Hosts: []string{"g*"}, Confirm: never}), unbound, request.Sign{Content: request.Content{Kind: request.KindLogin}, Login: &request.Login{HostKey: []byte("x")}}, ConfirmAlways},
		"forwarded via an evil host":             {one(Rule{Hosts: org, Forwarded: &yes, Confirm: never}), fwd, goodLogin, ConfirmAlways},
		"forwarded via an unknown host":          {one(Rule{Hosts: org, Forwarded: &yes, Confirm: never}), w.Caller("ssh", "new", "good"), goodLogin, ConfirmAlways},
		"forwarded via good hosts":               {one(Rule{Hosts: org, Forwarded: &yes, Confirm: never}), w.Caller("ssh", "other", "good"), goodLogin, never},
		"forwarded via good hosts, not in words": {one(Rule{Hosts: org, Confirm: never}), w.Caller("ssh", "other", "good"), goodLogin, ConfirmAlways},
		"forwarded, the data does not say":       {one(Rule{Hosts: org, Forwarded: &yes, Confirm: never}), w.Caller("ssh", "other", "good"), w.Login("good", false), ConfirmAlways},
		"forwarded, a bind that an evil host has forged": {
			one(Rule{Hosts: []string{"evil.*"}, Forwarded: &yes, Confirm: never}), forged, w.Login("other", false), ConfirmAlways,
		},
		"forwarded, for the forwarded session itself": {one(Rule{Hosts: org, Forwarded: &yes, Confirm: never}), w.Caller("ssh", "good", "-"), goodLogin, ConfirmAlways},
	} {
		t.Run(name, func(t *testing.T) {
			if got := test.a.decide(w.Use(test.c, test.r)); got.confirm != test.want {
				t.Errorf("%q because of %s, want %q", got.confirm, got.why(), test.want)
			}
		})
	}
}

// TestDecideRemember checks how long a plain yes counts.
func TestDecideRemember(t *testing.T) {
	w := requesttest.New(t)
	u := w.Use(w.Caller("ssh"), requesttest.Signature("git"))
	for name, test := range map[string]struct {
		a    Policy
		want Remember
	}{
		"always":                    {Policy{Confirm: ConfirmAlways}, Once},
		"first use":                 {Policy{Confirm: ConfirmFirstUse}, UntilLock},
		"a rule":                    {Policy{Rules: []Rule{{Confirm: ConfirmAlways, Remember: 5}}}, 5},
		"a rule for the first use":  {Policy{Rules: []Rule{{Confirm: ConfirmFirstUse}}}, UntilLock},
		"a rule with both of these": {Policy{Rules: []Rule{{Confirm: ConfirmFirstUse, Remember: 5}}}, 5},
	} {
		if got := test.a.decide(u); got.plain != test.want || got.confirm != ConfirmAlways {
			t.Errorf("%s: %+v, want %v", name, got, test.want)
		}
	}
	for text, r := range map[string]Remember{"once": Once, "until lock": UntilLock, "for 15m": Remember(15 * time.Minute), "for 1h": Remember(time.Hour), "for 1m30s": Remember(90 * time.Second)} {
		if r.String() != text {
			t.Errorf("%q, want %q", r, text)
		}
	}
}

// homeKey is a key of a token that is not used.
type homeKey struct {
	request.Key
	_ int // each has an address of its own
}

// For a key on two tokens, the stricter policy counts.
func TestStrictestHomeCounts(t *testing.T) {
	one, two := &homeKey{}, &homeKey{}
	w := requesttest.New(t)
	for name, test := range map[string]struct {
		one, two, want Confirm
		remember       Remember
	}{
		"never and always":     {ConfirmNever, ConfirmAlways, ConfirmAlways, Once},
		"always and never":     {ConfirmAlways, ConfirmNever, ConfirmAlways, Once},
		"always and deny":      {ConfirmAlways, ConfirmDeny, ConfirmDeny, Once},
		"deny and never":       {ConfirmDeny, ConfirmNever, ConfirmDeny, Once},
		"first use and always": {ConfirmFirstUse, ConfirmAlways, ConfirmAlways, Once},
		"always and first use": {ConfirmAlways, ConfirmFirstUse, ConfirmAlways, Once},
	} {
		policy := func(k request.Key) Policy {
			c := test.one
			if k == request.Key(two) {
				c = test.two
			}
			return Policy{Rules: []Rule{{Confirm: c}}}
		}
		d := decide(w.Use(w.Caller("ssh"), requesttest.Signature("git")), &request.Target{Homes: []request.Key{one, two}}, policy)
		if d.confirm != test.want || d.plain != test.remember {
			t.Errorf("%s: %+v", name, d)
		}
	}
}
