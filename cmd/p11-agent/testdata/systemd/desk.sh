# Where a person is asked by an agent that systemd has started, which has no terminal,
# no display and a clean environment; and what the journal has of it. Run by TestDesk.
set -euo pipefail
agent="$HOME/my bin 100%/p11-agent"
work=$1 home=$2 # the PINs

# shellcheck source=common.sh
. ./common.sh
ctl=(systemctl --user) log=(journalctl --user)
mux() { tmux -S "$HOME/tmux" "$@"; }
# shellcheck disable=SC2154
trap 'rc=$?; if [ $rc != 0 ]; then for pane in one two; do mux capture-pane -p -t $pane || true; done; cat sshd.log; fi' EXIT
# types LINE types it into a pane.
types() { mux send-keys -t "$1" "$2" Enter; }
# shows PANE REGEXP waits for a line of a pane.
shows() {
	showing() { mux capture-pane -p -t "$1" | grep -qE -- "$2"; }
	eventually showing "$@"
}
hides() { if mux capture-pane -p -t "$1" | grep -E -- "$2"; then fail "pane $1 shows $2"; fi; }
# wrote FILE TEXT waits until a file has a line.
wrote() {
	written() { grep -qxF -- "$2" "$1" 2>/dev/null; }
	eventually written "$@"
}
# fresh logs out of every token, so that the next use asks.
fresh() { "$agent" logout >/dev/null; }
no_prompt() { ! pgrep -u "$(id -u)" pinentry >/dev/null; }
entries() { journalctl --user -u p11-agent.service -o json P11_REQUEST=sign | wc -l; }
logged() { [ "$(entries)" = "$1" ]; }
# reload has the agent read its configuration again, and waits until it has.
reload() {
	rereads() { journalctl --user -u p11-agent.service -o cat | grep -c '^configuration read again' || true; }
	before=$(rereads)
	reread() { [ "$(rereads)" -gt "$before" ]; }
	systemctl --user reload p11-agent.service
	eventually reread
}

step "two tokens, a server, two panes"
mkdir -p -m 700 .ssh .config/softhsm2 .config/p11-agent tokens
echo "directories.tokendir = $HOME/tokens" >.config/softhsm2/softhsm2.conf
for token in work home; do
	softhsm2-util --init-token --free --label $token --pin "${!token}" --so-pin 11111111 >/dev/null
	pkcs11-tool --module "$(softhsm)" --token-label $token --login --pin "${!token}" \
		--keypairgen --key-type EC:prime256v1 --id 01 --label login >/dev/null 2>&1
done
config=.config/p11-agent/config.toml
printf '[pinentry]\nprogram = "pinentry-curses"\n' >$config
printf 'box %s\n' "$(cat host_key.pub)" >.ssh/known_hosts
cat >.ssh/config <<E
Host box
HostName 127.0.0.1
HostKeyAlias box
Port 2222
StrictHostKeyChecking yes
IdentitiesOnly yes
BatchMode yes
PreferredAuthentications publickey
E
for pane in one two; do mux -f /dev/null new-session -d -s $pane -x 100 -y 30 'env -u TMUX PS1="ready> " bash --norc --noprofile'; done

"$agent" install --user --now >/dev/null
export SSH_AUTH_SOCK=$XDG_RUNTIME_DIR/p11-agent/agent.sock
for pane in one two; do types $pane "export SSH_AUTH_SOCK=$SSH_AUTH_SOCK"; done
keys() { [ "$(ssh-add -L | grep -c 'token=\(work\|home\)')" = 2 ]; }
eventually keys
ssh-add -L >authorized_keys
for token in work home; do grep token=$token authorized_keys >$token.pub; done
pid=$(systemctl --user show -P MainPID p11-agent.service)
is "the terminal of the agent" "$(ps -o tty= -p "$pid")" '?'

step "two logins at once, each asked in its own pane, answered in the other order"
types one 'clear; ssh -i work.pub box echo in work'
shows one 'PIN: __'
types two 'clear; ssh -i home.pub box echo in home'
shows two 'PIN: __'
shows one 'SSH login as person at box \(host verified\)'
shows one 'Token: work '
shows two 'Token: home '
types two "$home"
shows two '^in home$'
shows one 'PIN: __'
types one "$work"
shows one '^in work$'
is "the logins" "$(grep -c 'Accepted publickey' sshd.log)" 2

step "status tells of the sandbox that the unit leaves to modules"
has "the status" "$("$agent" status)" 'softhsm2'
"$agent" status >said
grep -qE '^ *softhsm2 .*sandbox: files[, a-z]* \(landlock [0-9]+\), system calls[ a-z]* \(seccomp\)' said || fail "$(cat said)"
filters() { sed -n 's/^Seccomp_filters:\t*//p' "/proc/$1/status"; }
modules=0
for module in $(pgrep -P "$pid" -f module-process); do
	if [ "$(filters "$module")" -le "$(filters "$pid")" ] || [ "$(filters "$pid")" = 0 ]; then fail "module $module has no filter of its own, or the unit none"; fi
	modules=$((modules + 1))
done
if [ $modules = 0 ]; then fail "there are no module processes"; fi

step "a forwarded request is asked for nowhere, and login answers for it"
fresh
cat >remote.sh <<'E'
cd "$HOME"
(
	echo letter | ssh-keygen -q -Y sign -n file -f home.pub
	echo "status $?" >asked
	until [ -e go ]; do sleep .05; done
	echo letter | ssh-keygen -q -Y sign -n file -f home.pub
	echo "status $?" >again
) &
stty -echo
echo listening
head -n 1 >got
E
types one 'clear; ssh -A -t -i work.pub box bash remote.sh'
shows one 'PIN: __'
types one "$work"
shows one '^listening'
wrote asked 'status 255'
hides one 'PIN|Token: home'
mux resize-window -t two -x 450 -y 50
types two "clear; '$agent' status"
shows two 'token=home;id=%01  because log in to token "home": there is no way to ask here\. To give the PIN in a terminal, run: p11-agent login .*the request was forwarded'
types two "clear; '$agent' login pkcs11:token=home; echo status \$?"
shows two '^PIN: *$'
types two "$home"
shows two '^status 0$'
mux resize-window -t two -x 100 -y 30
touch go
wrote again 'status 0'
types one 'all of this line'
wrote got 'all of this line'

step "a client in the background of less: no prompt, and less has all that is typed"
fresh
echo 'a line to read' >text
types one "clear; { ssh-add -T work.pub; echo \"status \$?\" >background; } & less text"
shows one '^text \(END\)'
wrote background 'status 1'
no_prompt || fail "there is a prompt"
hides one PIN
mux send-keys -t one q

step "Ctrl-C takes the prompt away, and the shell has its terminal back"
types one 'clear; stty -a >before; ssh-add -T work.pub'
shows one 'PIN: __'
mux send-keys -t one C-c
eventually no_prompt
types one 'stty -a >after'
types one 'clear; echo abc def ghi'
shows one '^abc def ghi$'
cmp before after

step "a restart takes the prompt away, and leaves the terminal as it was"
types one 'clear; ssh-add -T work.pub; echo over'
shows one 'PIN: __'
systemctl --user restart p11-agent.service
shows one '^over$'
no_prompt || fail "there is a prompt"
rm after
types one 'stty -a >after'
types one 'clear; echo abc def ghi'
shows one '^abc def ghi$'
cmp before after
eventually keys

step "a crash takes the prompt away, so that the shell has what is typed next"
# What the terminal is like then depends on who is first: pinentry, which gives it
# back, or the shell, which keeps what it finds.
for signal in SEGV KILL; do
	mux respawn-pane -k -t one
	types one "export SSH_AUTH_SOCK=$SSH_AUTH_SOCK; clear; ssh-add -T work.pub"
	shows one 'PIN: __'
	kill -$signal "$(systemctl --user show -P MainPID p11-agent.service)"
	eventually no_prompt
	# shellcheck disable=SC2016
	types one 'echo typed$((40 + 2))'
	shows one 'typed42'
	eventually keys
done
mux respawn-pane -k -t one
types one "export SSH_AUTH_SOCK=$SSH_AUTH_SOCK"

step "a client of a service, without a terminal: refused at once"
if systemd-run --user --quiet --collect --wait -p WorkingDirectory="$HOME" -E SSH_AUTH_SOCK="$SSH_AUTH_SOCK" ssh-add -T home.pub; then fail "it was signed"; fi

step "a display that the manager has come to know is asked at"
printf '[pinentry]\nprogram = "pinentry-gtk-2"\n' >$config
systemctl --user restart p11-agent.service
eventually keys
Xvfb -displayfd 7 -screen 0 800x600x24 -nolisten tcp 7>display 2>xvfb.log &
numbered() { grep -q . display; }
eventually numbered
display=:$(cat display)
systemctl --user set-environment "DISPLAY=$display"
systemd-run --user --quiet --collect --wait -p WorkingDirectory="$HOME" -E SSH_AUTH_SOCK="$SSH_AUTH_SOCK" -p UnsetEnvironment=DISPLAY ssh-add -T home.pub &
client=$!
export DISPLAY=$display
focused() { [ "$(xdotool getwindowfocus getwindowname 2>/dev/null)" = p11-agent ]; }
eventually focused
xdotool type "$home"
xdotool key Return
wait $client || fail "it was not signed"
unset DISPLAY
systemctl --user unset-environment DISPLAY

step "reload: other rules for confirmation count"
printf 'confirm = "always"\n[pinentry]\nprogram = "pinentry-curses"\n' >$config
systemctl --user restart p11-agent.service
eventually keys
printf 'confirm = "always"\n[pinentry]\nprogram = "pinentry-curses"\n[[key]]\nuri = "pkcs11:token=work"\nconfirm = "never"\n' >$config
reload
types one "clear; ssh-add -T work.pub; echo status \$?"
shows one 'Enter the PIN of token'
types one "$work"
shows one '^status 0$'
printf 'confirm = "never"\n[pinentry]\nprogram = "pinentry-curses"\n[[key]]\nuri = "pkcs11:token=work"\nconfirm = "always"\n' >$config
reload
types one "clear; ssh-add -T work.pub; echo status \$?"
shows one 'Allow the use of this key of token'
mux send-keys -t one Tab Tab Enter
shows one '^status 1$'

step "the journal has one entry for each of these requests, and no PIN"
eventually logged 12
cat >journal.py <<'E'
import json, re, sys

want = [ # key, kind, host, result, reason
	("home", "login", "box", "ok", None),
	("work", "login", "box", "ok", None),
	("work", "login", "box", "ok", None),
	("home", "signature", None, "refused", "there is no way to ask here.*p11-agent login .pkcs11:token=home.*the request was forwarded, and what is typed there goes to the other host"),
	("home", "signature", None, "ok", None),
	("work", "test", None, "refused", r"is in the background of its terminal"),
	("work", "test", None, "cancelled", "the client hung up"),
	("work", "test", None, "cancelled", "."), # by the restart; a crash says nothing
	("home", "test", None, "refused", r"the client.s terminal: ssh-add \(\d+\) has no terminal; the user.s service manager has no display;"),
	("home", "test", None, "ok", None),
	("work", "test", None, "ok", None),
	("work", "test", None, "refused", "the use of the key was not confirmed"),
]
got = [json.loads(line) for line in sys.stdin]
assert len(got) == len(want), [e["MESSAGE"] for e in got]
for e, (key, kind, host, result, reason) in zip(got, want):
	assert e["P11_REQUEST"] == "sign" and e["P11_KEY"].startswith("SHA256:"), e
	assert e["P11_URI"].startswith("pkcs11:token=" + key), e
	assert (e["P11_KIND"], e["P11_RESULT"]) == (kind, result), e
	if host:
		assert (e["P11_HOST"], e["P11_USER"]) == (host, "person"), e
	assert re.search(reason, e["P11_REASON"]) if reason else "P11_REASON" not in e, (e, reason)
assert [e["P11_FORWARDED"] for e in got].count("true") == 2, got
assert all(e["P11_VIA"] == "box" for e in got if e["P11_FORWARDED"] == "true"), got
E
journalctl --user -u p11-agent.service -o json P11_REQUEST=sign >requests
python3 journal.py <requests
journalctl --user -o export --no-pager >journal
for text in "$work" "$home"; do
	if grep -aqF -- "$text" journal; then fail "the journal has a PIN: $(grep -aF -- "$text" journal | head -n 3)"; fi
done
mux kill-server
echo "== all is well"
