# "p11-agent setup" where systemd runs: it has systemd start the agent, which signs with the
# one PIN that was typed. Run by TestSetupUnderSystemd.
set -euo pipefail
PIN=$1

# shellcheck source=common.sh
. ./common.sh
ctl=(systemctl --user) log=(journalctl --user)
export PATH="$HOME/my bin 100%:$PATH"

screen() { tmux -S "$HOME/tmux" capture-pane -p -J -S -; }
shows() { grep -q -- "$1" <<<"$(screen)"; }
# last tells whether the terminal ends with a question.
last() { sed -e '/^ *$/d' <<<"$(screen)" | tail -n 1 | grep -q -- "$1"; }
type_line() {
	if [ -n "$1" ]; then tmux -S "$HOME/tmux" send-keys -l -- "$1"; fi
	tmux -S "$HOME/tmux" send-keys Enter
}
# answer waits for a question, and answers it; hidden does for an answer that is not shown.
answer() {
	eventually last "$1"
	type_line "$2"
}
quiet() { stty -a -F "$tty" | grep -q -- ' -echo '; }
hidden() {
	eventually last "$1"
	eventually quiet
	type_line "$2"
}

step "the conversation"
tmux -S "$HOME/tmux" -f /dev/null new-session -d -x 200 -y 50 bash
tty=$(tmux -S "$HOME/tmux" display-message -p '#{pane_tty}')
has "what it tells" "$(p11-agent setup --print)" "to do: have systemd start it with the first use"
if [ -e .config ] || [ -e .ssh ]; then fail "--print has made something"; fi
type_line 'p11-agent setup; echo setup ends with $?'
eventually last 'Which one? \[1\]'
answer 'Which one? \[1\]' "$(screen | sed -n 's/^ *\([0-9]\)  make a token and a key in files.*/\1/p')"
eventually shows "have systemd start it with the first use, after every login"
answer 'Do this? \[Y/n\]' ''
hidden 'New PIN:' "$PIN"
hidden 'The same again' ''
eventually shows '^ssh$'
answer 'Do this? \[Y/n\]' ''
answer 'ssh-copy-id to this host (Enter: neither):' ''
eventually shows '^setup ends with 0'
is "the socket" "$(systemctl --user is-enabled p11-agent.socket)" enabled
has "ssh's configuration" "$(cat .ssh/config)" "Include ~/.config/p11-agent/ssh_config"
is "leftovers" "$(find . -name '.p11-agent-*')" ""

step "the login"
p11-agent list --public >.ssh/authorized_keys
printf 'box %s\n' "$(cut -d' ' -f1,2 host_key.pub)" >.ssh/known_hosts
is "the word of the host" "$(ssh -o BatchMode=yes -o HostKeyAlias=box -p 2222 127.0.0.1 echo hello </dev/null)" hello
has "the token" "$(p11-agent status)" "logged in"

step "the second run"
p11-agent export --dir ~/.ssh pkcs11: 2>/dev/null
out=$(p11-agent setup </dev/null)
has "the second run" "$out" "done: it answers at /run/user/"
has "the second run" "$out" "Everything is done."
echo "== all is well"
