package token_test

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"testing"

	"golang.org/x/sys/unix"

	"p11-agent/token"
	"p11-agent/token/registry"
	"p11-agent/token/tokentest"
)

// remoteKinds are those that p11-kit's protocol carries: 0.24.1 drops the
// mechanism of Ed25519 (p11-kit issue 776).
var remoteKinds = []string{tokentest.RSA2048, tokentest.P256, tokentest.P384, tokentest.P521}

// TestRemote runs the suite on a SoftHSM behind p11-kit's protocol, as an HSM in
// the network is: each module process has a "p11-kit remote" for itself.
func TestRemote(t *testing.T) {
	h, keys := remoteToken(t)
	tokentest.Run(t, func(t *testing.T) tokentest.Subject {
		spec, _ := remoteSpec(t, h)
		return tokentest.Subject{
			Spec: spec, Command: self, Token: "far", PIN: "Sesame-4829", Keys: keys,
		}
	})
}

// remoteToken is a SoftHSM with the token "far", which has a key of each kind.
func remoteToken(t *testing.T) (*tokentest.SoftHSM, map[string]byte) {
	t.Helper()
	h := tokentest.NewSoftHSM(t)
	h.AddToken("far", "Sesame-4829")
	keys := make(map[string]byte)
	for _, kind := range remoteKinds {
		keys[kind] = allKinds[kind]
		h.GenerateKey("far", kind, fmt.Sprintf("%02x", keys[kind]), "key "+kind)
	}
	return h, keys
}

// TestRemoteHeals has the connection end under a Store that is logged in. The next
// signature is made, and a person is asked once more.
func TestRemoteHeals(t *testing.T) {
	h, _ := remoteToken(t)
	spec, pid := remoteSpec(t, h)
	person := &tokentest.Person{Always: "Sesame-4829"}
	s := tokentest.Store(t, token.Options{Modules: []token.ModuleSpec{spec}, Command: self, PINs: person}, "Sesame-4829")
	k := tokentest.Key(t, s, "far", allKinds[tokentest.P256])
	for n := range 3 {
		if err := tokentest.Sign(t.Context(), k); err != nil {
			t.Fatalf("after %d times: %v", n, err)
		}
		want(t, "prompts", person.Prompts(), n+1)
		noError(t, unix.Kill(pid(), unix.SIGKILL))
	}
}

// remoteSpec is the module that reaches a SoftHSM by a command. pid tells the
// process of the command that was started last.
func remoteSpec(t *testing.T, h *tokentest.SoftHSM) (spec token.ModuleSpec, pid func() int) {
	t.Helper()
	client := tokentest.Module(t, "p11-kit-client.so")
	file := filepath.Join(tokentest.TempDir(t), "pid")
	b, err := registry.NewBridge(registry.BridgeOptions{
		Command: []string{"sh", "-c", `echo $$ >"$1" && exec p11-kit remote "$2"`, "sh", file, h.Module()},
		Env:     registry.Environment(os.Environ(), h.Env()), Stderr: t.Output(),
	})
	noError(t, err)
	pid = func() int {
		text, err := os.ReadFile(file)
		noError(t, err)
		n, err := strconv.Atoi(strings.TrimSpace(string(text)))
		noError(t, err)
		return n
	}
	ctx, cancel := context.WithCancel(context.Background())
	var served sync.WaitGroup
	served.Go(func() {
		if err := b.Serve(ctx); err != nil {
			t.Error(err)
		}
	})
	t.Cleanup(func() {
		cancel()
		served.Wait()
	})
	return realSpec("far", client, "P11_KIT_SERVER_ADDRESS="+b.Address()), pid
}
