package logfold

import (
	"os"
	"testing"

	"p11-agent/agent/peer/terminaltest"
)

func TestMain(m *testing.M) { os.Exit(terminaltest.Without(m).Run()) }
