package supervise

import (
	"net"
	"os"
	"strings"
	"testing"

	"p11-agent/agent/peer/terminaltest"
	"p11-agent/token/wire"
)

// fakeModule is the variable that makes this program a fake module process. It has words that say how the process
// behaves.
const fakeModule = "P11_TEST_SUPERVISED"

func TestMain(m *testing.M) {
	if how, fake := os.LookupEnv(fakeModule); fake {
		os.Exit(serveFake(how))
	}
	os.Exit(terminaltest.Without(m).Run())
}

// longText is the length of a text that is too long to keep.
const longText = 1000

// serveFake is a module without a token. It lists no slots, which "pcsc" says come from pcscd. A request for new tokens
// has the process replaced, if how is "renews". "broken" does not start, and "one-at-a-time" does so only if it polls.
func serveFake(how string) int {
	is := func(word string) bool { return strings.Contains(how, word) }
	c, err := net.FileConn(os.NewFile(wire.FD, "agent"))
	if err != nil {
		return 2
	}
	conn := wire.NewModuleConn(c)
	for {
		r, err := conn.ReadRequest()
		if err != nil {
			return 0
		}
		switch m := r.Message.(type) {
		case *wire.Hello:
			if is("broken") {
				err = conn.WriteError(r.ID, &wire.Error{Reason: wire.ReasonLoad, Text: "not this file"})
				break
			}
			if is("one-at-a-time") && !m.Poll {
				err = conn.WriteError(r.ID, &wire.Error{Reason: wire.ReasonOneAtATime})
				break
			}
			err = conn.WriteReply(r.ID, &wire.HelloReply{Version: wire.Version, Description: strings.Repeat("x", longText)})
		case *wire.Slots:
			if is("renews") && m.Reinitialize {
				err = conn.WriteLost(&wire.Error{Reason: wire.ReasonRenew})
				break
			}
			err = conn.WriteReply(r.ID, &wire.SlotsReply{PCSC: is("pcsc")})
		}
		if err != nil {
			return 3
		}
	}
}
