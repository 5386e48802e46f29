package main

import (
	"maps"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"p11-agent/cmd/p11-agent/advice"
)

// program puts this program into the PATH of the user.
func (f *freshSystem) program() {
	f.t.Helper()
	copyFile(f.t, buildAgent(f.t), filepath.Join(f.dir, "bin", "p11-agent"), 0o711)
}

// unchanged fails the test if the home directory has changed.
func (f *freshSystem) unchanged(when string, was map[string]string) {
	f.t.Helper()
	now := f.files()
	for path := range maps.Keys(now) {
		if old, there := was[path]; !there || old != now[path] {
			f.t.Errorf("%s, %s is another one than before", when, path)
		}
	}
	if len(now) < len(was) {
		f.t.Errorf("%s, files have gone", when)
	}
}

// interrupted types Ctrl-C, and waits for the end of the command.
func (f *freshSystem) interrupted() {
	f.t.Helper()
	if out, err := f.tmux("send-keys", "C-c"); err != nil {
		f.t.Fatalf("Ctrl-C: %v: %s", err, out)
	}
	if out, status := f.end(); status != 130 {
		f.t.Fatalf("after Ctrl-C it ended with %d:\n%s", status, out)
	}
	for path := range f.files() {
		if strings.Contains(filepath.Base(path), ".p11-agent-") {
			f.t.Errorf("Ctrl-C left %s", path)
		}
	}
}

// fails types a command, and returns its output. It fails the test if the status is not want.
func (f *freshSystem) fails(line string, want int) string {
	f.t.Helper()
	f.begin(line)
	out, status := f.end()
	if status != want {
		f.t.Fatalf("%q ended with %d, want %d:\n%s", line, status, want, out)
	}
	return out
}

func mustHave(t *testing.T, out string, texts ...string) {
	t.Helper()
	for _, text := range texts {
		if !strings.Contains(out, text) {
			t.Errorf("it does not say %q:\n%s", text, out)
		}
	}
}

const (
	askDo    = `  Do this\? \[Y/n\]`
	askHost  = `copy it with ssh-copy-id to this host \(Enter: neither\):`
	askStart = `^The agent\n.*\n.*\n` + askDo
	askLead  = `^ssh\n.*\n.*\n` + askDo
	askSign  = `^git\n(  .*\n)*` + askDo
	askKey   = `  Which one\? \[1\]`
	askFresh = `  New PIN:`
)

// A person can decline and interrupt each step of setup. No step stays half done. setup asks again
// about a declined step, and does not ask about a done step. Without a terminal, and with --print,
// setup changes nothing.
func TestSetup(t *testing.T) {
	f := startFresh(t, os.DirFS(t.TempDir()))
	f.program()
	was := f.files()

	// The user has no key yet, and setup has no terminal.
	plan := []string{"A key", "The agent", "ssh", "The other side", "make a token and a key in files", "~/.config/softhsm2/softhsm2.conf", "Include ~/.config/p11-agent/ssh_config"}
	mustHave(t, f.run("p11-agent setup --print"), plan...)
	for _, line := range []string{"p11-agent setup </dev/null", "yes | p11-agent setup", "p11-agent setup | cat; (exit ${PIPESTATUS[0]})"} {
		out := f.fails(line, 1)
		mustHave(t, out, append(plan, "4 steps are left to do", "there is no terminal to ask at: run p11-agent setup in a terminal")...)
	}
	mustHave(t, f.fails("p11-agent --config x setup", 2), "--config means nothing here")
	f.unchanged("without a terminal", was)

	// list, doctor and setup give the same advice.
	steps := advice.FirstSteps(nil)[1:]
	mustHave(t, f.run("p11-agent list"), "next: "+steps[0], "next: plug in a smart card or a security key")
	mustHave(t, f.fails("p11-agent doctor", 1), "next: "+steps[0], "next: plug in a smart card or a security key")

	// A person declines the first question, and then interrupts it: nothing changes.
	f.begin("p11-agent setup")
	f.answer(askKey, "7")
	f.see(`^Please type a number from 0 to [0-9]\.$`)
	f.answer(askKey, "0")
	mustHave(t, f.fails1(), "no key was chosen, and nothing was changed")
	f.begin("p11-agent setup")
	f.see(askKey + `$`)
	f.interrupted()
	f.unchanged("after Ctrl-C", was)

	// The person interrupts each question in turn.
	f.begin("p11-agent setup")
	f.answer(askKey, f.number("make a token and a key in files"))
	f.see(askStart + `$`)
	f.interrupted()
	f.begin("p11-agent setup")
	f.answer(askKey, f.number("make a token and a key in files"))
	f.answer(askStart, "perhaps")
	f.see(`^Please type y or n\.$`)
	f.answer(askDo, "y")
	f.hidden(askFresh, "")
	mustHave(t, f.fails1(), "no PIN was given: no key was made")
	f.begin("p11-agent setup")
	f.answer(askKey, f.number("make a token and a key in files"))
	f.see(`^The agent\n  done: it answers at ~/`)
	f.hidden(askFresh, storyPIN)
	f.hidden(`The same again, .*:`, "another one")
	f.see(`^  The two are not the same\.$`)
	f.hidden(askFresh, storyPIN)
	f.see(`The same again, .*:\n*\z`)
	f.quiet()
	f.interrupted()
	if out := f.run("p11-agent list"); strings.Contains(out, "pkcs11:token=") {
		t.Errorf("a token was made before its PIN was there:\n%s", out)
	}
	f.begin("p11-agent setup")
	f.answer(askKey, f.number("make a token and a key in files"))
	f.hidden(askFresh, storyPIN)
	f.hidden(`The same again, .*:`, storyPIN)
	f.answer(askLead, "n")
	f.see(`^  left as it is$`)
	f.see(askHost + `$`)
	f.interrupted()
	if _, err := os.Lstat(filepath.Join(f.home, ".ssh")); err == nil {
		t.Error("there is ~/.ssh, which was declined")
	}

	// setup does not ask about done steps, and keeps the old configuration of ssh.
	f.run(`git config --global user.email me@example.org; mkdir -m 700 .ssh dots; printf 'Host other\n    Port 1\n' >dots/config; ln -s ../dots/config .ssh/config`)
	f.begin("p11-agent setup")
	f.see(`^A key\n  done: key "login" on token "login"`)
	f.answer(askLead, "")
	f.see(`^  wrote ~/.ssh/config$`)
	f.answer(askHost, "-oProxyCommand=x")
	f.see(`is no name of a host`)
	f.answer(askHost, "")
	f.answer(askSign, "")
	out, status := f.end()
	if status != 0 {
		t.Fatalf("setup ended with %d:\n%s", status, out)
	}
	mustHave(t, out, "ssh host", "export SSH_AUTH_SOCK="+filepath.Join(f.home, ".local/state/p11-agent/agent.sock"))
	mustHave(t, f.run("cat .ssh/config"), "Include ~/.config/p11-agent/ssh_config", "Host other", "Port 1")
	mustHave(t, f.run("ls -l .ssh/config"), "-> ../dots/config")

	// All steps are done. With and without a terminal, setup changes nothing any more.
	was = f.files()
	for _, line := range []string{"p11-agent setup", "p11-agent setup --print", "p11-agent setup </dev/null"} {
		mustHave(t, f.run(line), "Everything is done.", "done: key ", "done: it answers at ", "done: its configuration names ", "done: it is in ~/.ssh/login.pub", "done: it signs with ~/.ssh/login.pub")
	}
	for path, text := range was {
		if strings.Contains(text, storyPIN) {
			t.Errorf("the PIN is in %s", path)
		}
		if now := f.files()[path]; now != text && !strings.HasSuffix(path, ".log") {
			t.Errorf("the second run changed %s", path)
		}
	}

	// git signs with the key without a PIN, and accepts the signature.
	f.run("export SSH_AUTH_SOCK=$HOME/.local/state/p11-agent/agent.sock; git init -q r; cd r; git config user.name me; git commit -q --allow-empty -m one")
	mustHave(t, f.run("git verify-commit HEAD"), `Good "git" signature for me@example.org`)
	if n := strings.Count(f.files()[filepath.Join(f.home, ".config/git/allowed_signers")], "me@example.org"); n != 1 {
		t.Errorf("%d lines of allowed signers", n)
	}
	f.run("p11-agent status")
}

// fails1 waits for the end of a command. It fails the test if the status is not 1.
func (f *freshSystem) fails1() string {
	f.t.Helper()
	out, status := f.end()
	if status != 1 {
		f.t.Fatalf("it ended with %d:\n%s", status, out)
	}
	return out
}

// setup makes a key on a present token, with the PIN of the token. After a wrong PIN, it asks again
// if the person agrees. It tries the PIN on no other token.
func TestSetupOnAToken(t *testing.T) {
	f := startFresh(t, os.DirFS(t.TempDir()))
	f.program()
	f.run(`mkdir -p .config/softhsm2 tokens; echo "directories.tokendir = $HOME/tokens" >.config/softhsm2/softhsm2.conf`)
	f.run("softhsm2-util --init-token --free --label mine --pin 471147 --so-pin 11111111")
	f.begin("p11-agent setup")
	f.answer(askKey, f.number(`make a key on token "mine"`))
	f.answer(askStart, "")
	f.hidden(`  PIN:`, "wrong-1")
	f.see(`error: .*the PIN is wrong`)
	f.answer(`  Type the PIN again\? \[y/N\]`, "y")
	f.hidden(`  PIN:`, "471147")
	f.see(`^  made key "login" on token "mine"`)
	f.see(`^  logged the agent in: `)
	f.answer(askLead, "")
	f.answer(askHost, "host")
	f.hidden(`person@host's password:`, f.host)
	if out, status := f.end(); status != 0 {
		t.Fatalf("setup ended with %d:\n%s", status, out)
	}
	f.run("ssh host true </dev/null")
	print := strings.Fields(f.run("ssh-keygen -lf .ssh/login.pub | tail -n 1"))
	for i, word := range print {
		if strings.HasPrefix(word, "SHA256:") {
			if all := f.logins(); len(all) != 1 || all[0] != word {
				t.Errorf("sshd let in %q, want the key %q once", all, print[i])
			}
		}
	}
	// If the token has a key, setup uses the key, and asks no question about it.
	f.run(`rm -r .ssh .config/p11-agent; softhsm2-util --show-slots | grep -c Label`)
	f.begin("p11-agent setup")
	f.see(`^A key\n  done: key "login" on token "mine"`)
	f.answer(askLead, "n")
	f.answer(askHost, "")
	if out, status := f.end(); status != 0 {
		t.Fatalf("setup ended with %d:\n%s", status, out)
	}
}

// If systemd runs, systemd starts the agent.
func TestSetupUnderSystemd(t *testing.T) {
	needPrivileges(t, "softhsm2-util", "ssh", "tmux")
	if out := userManager(t, "setup.sh", storyPIN); !strings.HasSuffix(out, "== all is well\n") {
		t.Errorf("the script did not get to its end:\n%s", out)
	}
}
