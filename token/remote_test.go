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

// remoteKinds are the kinds of keys that the protocol of p11-kit supports. p11-kit 0.24.1 drops the
// mechanism of Ed25519 (p11-kit issue 776).
var remoteKinds = []string{tokentest.RSA2048, tokentest.P256, tokentest.P384, tokentest.P521}

// TestRemote runs the suite on a SoftHSM behind the protocol of p11-kit, like an HSM in the
// network. Each module process has its own "p11-kit remote".
func TestRemote(t *testing.T) {
	tokentest.Parallel(t)
	h, keys := remoteToken(t)
	tokentest.Run(t, func(t *testing.T) tokentest.Subject {
		spec, _ := remoteSpec(t, h)
		return tokentest.Subject{
			Spec: spec, Command: self, Token: "far", PIN: "Sesame-4829", Keys: keys,
			NoDerive: true, // p11-kit 0.24 passes on no CKM_ECDH1_DERIVE
		}
	})
}

// remoteToken returns a SoftHSM with the token "far", which has a key of each kind.
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

// TestRemoteHeals ends the connection of a Store that is logged in. The next signature succeeds,
// with one more prompt.
func TestRemoteHeals(t *testing.T) {
	tokentest.Parallel(t)
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

// remoteSpec returns the module that reaches a SoftHSM through a command. pid returns the process
// of the last command.
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
