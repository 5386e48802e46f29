package main

import (
	"fmt"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
)

// A readmeLine is an indented line of README.md or docs/GUIDE.md. Most are commands to type.
type readmeLine struct{ section, text string }

// readmeLines returns the lines of both files, in order and without comments.
func readmeLines(t *testing.T) (all []readmeLine) {
	t.Helper()
	section := ""
	for line := range strings.Lines(readDoc(t, "README.md") + readDoc(t, "docs/GUIDE.md")) {
		line = strings.TrimRight(line, "\n")
		if text, ok := strings.CutPrefix(line, "## "); ok {
			section = text
		}
		if text, ok := strings.CutPrefix(line, "    "); ok {
			if text = regexp.MustCompile(`(^|\s+)\s*# .*`).ReplaceAllString(text, ""); text != "" {
				all = append(all, readmeLine{section, text})
			}
		}
	}
	return all
}

// firstLogin is the section of the README that leads to the first login.
const firstLogin = "Install and log in"

// typedElsewhere matches the lines that TestReadme does not type. A comment names the test that
// types the line. A new user needs none of these lines for the first login.
var typedElsewhere = regexp.MustCompile(strings.Join([]string{
	`^make (demo|check)$`,                         // TestDemo and CI
	`^p11-agent install --user --now$`,            // TestRecipes and TestSetupUnderSystemd
	`^p11-agent agent -D$`,                        // the story ssh-add, and others
	`^sudo (apt|usermod) `,                        // they change the machine
	`^M=`, `^pkcs11-tool `, `--init-token --free`, // the story tpm-recipe, TestRecipes
	`^p11-agent generate `,                                // TestRecipes
	`^mkdir -p ~/.config/softhsm2 `, `^echo "directories`, // TestRecipes
	`^journalctl `,                // TestUserManager
	`^ssh-add -h bastion `,        // the story destination
	`^ssh-add ~/.ssh/id_ed25519$`, // the story software
	`^problem: `, `^  next: `,     // the output of doctor
	// The configuration: TestExamplesAreConfigurations.
	`^ *\[`, `^ *[a-z-]+ = `,
}, "|"))

// A new user types the lines of the README and then of the guide, on a fresh system, in a terminal.
// Up to the first login, the user types at most four commands and one PIN.
func TestReadme(t *testing.T) {
	buildAgent(t) // so that the build of the user takes little time
	f := startFresh(t, os.DirFS(source(t, "p11-agent")))
	f.run("cd p11-agent")
	r := &reader{freshSystem: f}
	special := r.special()
	seen := 0
	for _, l := range readmeLines(t) {
		typed, known := special[l.text]
		switch {
		case known:
			typed(l)
		case typedElsewhere.MatchString(l.text):
			continue
		default:
			f.run(l.text)
		}
		if seen++; l.section == firstLogin {
			r.first++
		}
	}
	if seen < 25 {
		t.Errorf("only %d lines of the README and the guide were typed", seen)
	}
	if r.loggedIn == 0 || r.loggedIn > 4 || r.pinsThen > 1 {
		t.Errorf("the first login comes with command %d, after %d PINs: want 4 and 1 at the most", r.loggedIn, r.pinsThen)
	}
	t.Logf("up to the first login: %d commands, %d questions of which %d ask for a PIN", r.loggedIn, r.questions, r.pinsThen)
}

// A reader reads the README, and types its lines.
type reader struct {
	*freshSystem
	first     int // commands of the section that leads to the first login
	questions int // the answered questions up to the first login
	pins      int // the typed PINs
	loggedIn  int // the number of the command of the first login
	pinsThen  int // the typed PINs up to the first login
}

// special returns the lines that ask questions, and the lines that need a thing that a fresh system
// lacks.
func (r *reader) special() map[string]func(readmeLine) {
	return map[string]func(readmeLine){
		"p11-agent setup": r.setup,
		"ssh host":        r.login,
		"Include ~/.config/p11-agent/ssh_config": func(l readmeLine) {
			if text := r.files()[filepath.Join(r.home, ".ssh/config")]; !strings.HasPrefix(text, l.text+"\n") {
				r.t.Errorf("~/.ssh/config does not begin as the README has it: %q", text)
			}
		},
		`eval "$(p11-agent agent -s)"`: func(l readmeLine) {
			r.run(l.text)
			r.run("p11-agent agent -k")
			r.run(r.export())
		},
		"p11-agent agent git push": func(l readmeLine) {
			r.run("git config --global user.email me@example.org; git config --global user.name me; git config --global push.autoSetupRemote true")
			r.run("git init -q --bare ~/there; git init -q ~/here; cd ~/here; git remote add origin host:there; git commit -q --allow-empty -m one")
			r.run(l.text)
			r.run("git --git-dir ~/there log --oneline --all | grep one")
		},
		"p11-agent doctor": func(l readmeLine) {
			r.begin(l.text)
			if out, _ := r.end(); !strings.Contains(out, "lists 1 key") {
				r.t.Errorf("doctor says: %s", out)
			}
		},
		"ssh-add -s 'pkcs11:token=login;id=%01'":   r.passphrase,
		"ssh-add -c -t 1h -s 'pkcs11:token=login'": r.passphrase,
		"p11-agent login pkcs11:token=login":       r.logInByHand,
		"git commit -S":                            func(l readmeLine) { r.run(l.text + " --allow-empty -m two") },
		"git log --show-signature":                 func(l readmeLine) { r.shows(l.text, `Good "git" signature for me@example.org`) },
		"p11-agent export --git 'pkcs11:token=login;id=%01' | sh": func(l readmeLine) {
			// An earlier line made the key ask for confirmation, and this line undoes that. A
			// person must approve it, at a display or at a terminal that root made. Here is
			// neither, so a new agent starts, as on another day.
			r.run(`kill $(p11-agent status --json | sed -n 's/^ *"pid": \([0-9]*\),$/\1/p' | head -n 1); while [ -e "$SSH_AUTH_SOCK" ]; do sleep .1; done`)
			r.run(`p11-agent agent -s -a "$SSH_AUTH_SOCK" >/dev/null 2>&1 || :`)
			r.run("ssh-add -l")
			r.logInByHand(readmeLine{text: "p11-agent login pkcs11:token=login"})
			r.run(l.text)
		},
		"ssh-add -x": func(l readmeLine) {
			r.begin(l.text)
			r.hidden("Enter lock password:", "lock")
			r.hidden("Again:", "lock")
			if out, status := r.end(); status != 0 {
				r.t.Errorf("%s ended with %d: %s", l.text, status, out)
			}
		},
	}
}

// shows types a command, and fails the test if the output lacks a text.
func (r *reader) shows(line, text string) {
	r.t.Helper()
	if out := r.run(line); !strings.Contains(out, text) {
		r.t.Errorf("%s does not show %q: %s", line, text, out)
	}
}

// export returns the line for the shell that setup prints.
func (r *reader) export() string {
	return strings.TrimSpace(regexp.MustCompile(`(?m)^ *export SSH_AUTH_SOCK=.*$`).FindString(r.screen()))
}

// setup answers the questions of setup.
func (r *reader) setup(l readmeLine) {
	if l.section != firstLogin {
		r.t.Errorf("setup is typed under %q", l.section)
	}
	r.begin(l.text)
	r.answer(askKey, r.number(`make a token and a key in files`))
	r.answer(askStart, "")
	r.hidden(askFresh, storyPIN)
	r.pins++
	r.hidden(`  The same again, or Enter if you are sure of it:`, "")
	r.answer(askLead, "")
	r.answer(askHost, "host")
	r.hidden(`person@host's password:`, r.host)
	r.questions = 7
	out, status := r.end()
	if status != 0 {
		r.t.Fatalf("setup ended with %d:\n%s", status, out)
	}
	mustHave(r.t, out, "git config --global user.email you@example.org")
}

// login types a login. The login asks no question.
func (r *reader) login(l readmeLine) {
	before := len(r.logins())
	r.begin(l.text)
	// The session has begun when it reports that it got no terminal.
	r.answer(fmt.Sprintf(`^ready %d after .*\n(.*\n)*PTY allocation request failed.*`, r.commands), "echo $((40 + 2)) is at the host; exit")
	out, status := r.end()
	if status != 0 || !strings.Contains(out, "\n42 is at the host\n") || strings.Contains(out, "PIN") {
		r.t.Fatalf("the login ended with %d:\n%s", status, out)
	}
	if all := r.logins(); len(all) != before+1 {
		r.t.Errorf("sshd has let in %q", all)
	}
	if r.loggedIn == 0 {
		r.loggedIn, r.pinsThen = r.first+1, r.pins
		r.run(r.export()) // setup says that ssh-add and git need it
	}
}

// passphrase presses Enter when ssh-add asks for a passphrase.
func (r *reader) passphrase(l readmeLine) {
	r.begin(l.text)
	r.hidden("Enter passphrase for PKCS#11:", "")
	if out, status := r.end(); status != 0 {
		r.t.Errorf("%s ended with %d: %s", l.text, status, out)
	}
}

// logInByHand types the PIN.
func (r *reader) logInByHand(l readmeLine) {
	r.begin(l.text)
	begun := fmt.Sprintf(`^ready %d after .*\n(.*\n)*`, r.commands)
	text := r.see(begun + `(PIN:|(already )?logged in to )`)
	if !regexp.MustCompile(`(?m)` + begun + `.*logged in to `).MatchString(text) {
		r.hidden(`PIN:`, storyPIN)
	}
	if out, status := r.end(); status != 0 {
		r.t.Errorf("%s ended with %d: %s", l.text, status, out)
	}
}
