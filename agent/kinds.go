package agent

import (
	"fmt"
	"slices"

	"p11-agent/agent/request"
)

// A KindError says that a key does not sign this kind of data.
type KindError struct {
	Content request.Content
	Key     string // the comment
}

func (e *KindError) Error() string {
	what := e.Content.String()
	if e.Content.Kind == request.KindUnknown && e.Content.Detail != "" {
		what += " (" + e.Content.Detail + ")"
	}
	return fmt.Sprintf("%s is not signed with this key: if it is meant for that, its [[key]] table has to say allow = [%q]", what, e.Content.Kind)
}

// testProgram is the program for which keys sign data of KindTest.
const testProgram = "ssh-add"

// mayTest returns nil if a connection may ask for signatures of KindTest: it comes from the
// ssh-add of this machine, and belongs to no SSH session.
func mayTest(c *request.Caller) error {
	if c.Forwarded || c.BindFailed || len(c.Binds) > 0 {
		return errBound
	}
	return c.Client().RunsSystemProgram(testProgram)
}

// judged returns the content that counts for this connection. The data of KindTest has only
// a length: it may be the attributes of a CMS signature, filled up to that length. So its
// kind is KindUnknown unless ssh-add sends it.
func judged(c *request.Caller, content request.Content) request.Content {
	if content.Kind != request.KindTest {
		return content
	}
	if err := mayTest(c); err != nil {
		return request.Content{Kind: request.KindUnknown, Detail: "1,024 bytes, which are signed for ssh-add -T of this machine, but " + err.Error()}
	}
	return content
}

// allowed returns nil if a key may sign data of this kind. Each key signs logins, SSH
// signatures and the tests of ssh-add -T. Keys in memory sign any data, as in ssh-agent.
func (g *Guard) allowed(t *request.Target, content request.Content) error {
	switch content.Kind {
	case request.KindLogin, request.KindSignature, request.KindTest:
		return nil
	}
	if len(t.Homes) == 0 {
		return nil
	}
	allow := g.rules.Load().allow
	if allow != nil && slices.ContainsFunc(t.Homes, func(key request.Key) bool {
		kinds := allow(key)
		return slices.Contains(kinds, content.Kind) || slices.Contains(kinds, request.KindUnknown)
	}) {
		return nil
	}
	return &KindError{Content: content, Key: t.Comment}
}
