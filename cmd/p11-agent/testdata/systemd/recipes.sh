# What docs/RECIPES.md has to be typed, typed by a new user in a terminal. Each recipe
# is in a directory of its own: N.sh is to be typed, N.text is a file called as
# N.file says. Run by TestRecipes.
set -euo pipefail
PIN=$1

# shellcheck source=common.sh
. ./common.sh
ctl=(systemctl --user) log=(journalctl --user)
export PATH="$HOME/my bin 100%:$PATH"
export SSH_AUTH_SOCK=$XDG_RUNTIME_DIR/p11-agent/agent.sock

screen() { tmux -S "$HOME/tmux" capture-pane -p; }
shows() { grep -q -- "$1" <<<"$(screen)"; }
wait_for() {
	local end=$((SECONDS + patience))
	while ! shows "$1"; do
		if [ $SECONDS -ge $end ]; then fail "the terminal never shows '$1': $(screen)"; fi
		sleep .1
	done
}
# answer waits for a question that shows nothing of its answer, and types it. What is
# typed before the terminal is ready for it may be thrown away.
quiet() { stty -a -F "$tty" | grep -q -- ' -echo '; }
answer() {
	wait_for "$1"
	eventually quiet
	tmux -S "$HOME/tmux" send-keys -l -- "$2"
	tmux -S "$HOME/tmux" send-keys Enter
}
# pin does the same for a PIN that pinentry asks for.
pin() {
	wait_for "$1"
	answer "PIN: __" "$PIN"
}
n=0
# typed runs a block in the terminal, with what differs here replaced by a sed
# script; done_typing waits for its end.
typed() {
	n=$((n + 1))
	sed -e 's/NAME/demo/g; s/^ssh host\.example\.org$/& true/; s/deploy@/person@/' -e "${2:-}" "$1" >block-$n.sh
	grep -q . block-$n.sh || fail "there is nothing to type in $1"
	tmux -S "$HOME/tmux" send-keys -l -- "clear; cd $PWD; bash -eu block-$n.sh; echo block $n ends with \$?; cd"
	tmux -S "$HOME/tmux" send-keys Enter
}
done_typing() {
	wait_for "^block $n ends with"
	shows "^block $n ends with 0" || fail "block $n fails: $(screen)"
}
# files puts those of a recipe in their places, in front of what is there.
files() {
	local at name
	for at in "$1"/*.file; do
		name=$(cat "$at")
		case $name in '~/'*) name=$HOME/${name#'~/'} ;; *) fail "$name is no file of this user" ;; esac
		mkdir -p -m 700 "$(dirname "$name")"
		touch "$name"
		{ sed -e 's/NAME/demo/g' -e "${2:-}" "${at%.file}.text" && cat "$name"; } >new
		mv new "$name"
	done
}

step "a terminal, and names of the server"
tmux -S "$HOME/tmux" -f /dev/null new-session -d -x 150 -y 50 bash
tty=$(tmux -S "$HOME/tmux" display-message -p '#{pane_tty}')
mkdir -p .config/p11-agent
printf '[pinentry]\nprogram = "%s"\n' "$(command -v pinentry-curses)" >.config/p11-agent/config.toml
# Names that lead to the server, for ssh. They are no part of ~/.ssh yet, which a new user lacks.
where() {
	printf 'Host host.example.org hub inner\n\tHostName 127.0.0.1\n\tPort 2222\n\tHostKeyAlias box\n\tStrictHostKeyChecking yes\n'
}
printf 'box %s\n' "$(cut -d' ' -f1,2 host_key.pub)" >box

step "what comes first"
typed first/1.sh 's/^p11-agent doctor.*/p11-agent doctor || true/'
done_typing
has "doctor" "$(p11-agent doctor 2>&1 || true)" "ok: p11-agent.socket listens"

step "SoftHSM"
typed softhsm/1.sh
answer "enter SO PIN: *$" 11111111
answer "reenter SO PIN: *$" 11111111
answer "enter user PIN: *$" "$PIN"
answer "reenter user PIN: *$" "$PIN"
pin "Key: login, pkcs11:token=demo"
done_typing
wait_for '^ssh-ed25519 .* login$'

# What runs already has to notice the key, which takes it a moment.
lists() { ssh-add -L >keys.pub; }
eventually lists

step "what comes last"
typed first/2.sh 's|^ssh .*|cp ~/keys.pub ~/.ssh/authorized_keys; cp ~/box ~/.ssh/known_hosts; { . ~/where \&\& cat ~/.ssh/config; } >~/new; mv ~/new ~/.ssh/config\n&|'
{ declare -f where && echo where; } >where
pin "For: SSH login as person at box (host verified)"
done_typing
grep -q "Accepted publickey for person .* ED25519" sshd.log || fail "it was another key: $(cat sshd.log)"
is "the keys that were exported" "$(echo .ssh/*.pub)" .ssh/login.pub

step "git"
git init -q repo
git config --global user.name Person
git config --global user.email me@example.org
cd repo
typed ../git/1.sh 's/^git commit -S/& --allow-empty -m first/; s/^git log/git --no-pager log/'
done_typing
wait_for 'Good "git" signature for me@example.org with ED25519 key'
is "the list of signers" "$(grep -c . ~/.config/git/allowed_signers)" 1
typed ../git/2.sh 's|$| >line|'
done_typing
cmp line ~/.config/git/allowed_signers
typed /dev/stdin <<<'git rebase -f --root'
done_typing
cd ..

step "git, with questions"
cp .config/p11-agent/config.toml plain.toml
files git
has "check" "$(p11-agent check 2>&1)" "ok: configuration"
systemctl --user reload p11-agent
cd repo
typed /dev/stdin <<<'git rebase -f --root; git commit -q --allow-empty -m second'
wait_for "Allow the use of this key"
wait_for "For: git"
tmux -S "$HOME/tmux" send-keys Enter
done_typing
cd ..
cp plain.toml .config/p11-agent/config.toml

step "forwarding"
files forwarding
# A display is what no user of a terminal has: a program says yes, and keeps what it was asked.
cat >pinentry <<-'PINENTRY'
	#!/bin/bash
	echo OK ready
	while read -r command rest; do
		case $command in
		SETDESC) printf '%b\n' "${rest//%/\\x}" >>~/asked ;;
		GETPIN) echo "ERR 83886179 cancelled" && continue ;;
		esac
		echo OK
		if [ "$command" = BYE ]; then exit; fi
	done
PINENTRY
chmod 755 pinentry
sed -i "s|^program = .*|program = \"$HOME/pinentry\"|" .config/p11-agent/config.toml
typed forwarding/3.sh
done_typing
eventually test -S "$XDG_RUNTIME_DIR/p11-agent/forward.sock"
typed /dev/stdin <<<"p11-agent login"
answer "^PIN: *$" "$PIN"
done_typing
typed /dev/stdin <<'TYPED'
ssh hub 'ssh-add -L && ssh-add -D; ssh-keygen -q -Y sign -n file -f keys.pub box && ssh -o HostKeyAlias=box -p 2222 127.0.0.1 echo in' >out
TYPED
done_typing
has "what the other side sees" "$(cat out)" "token=demo;"
has "what the other side sees" "$(tail -n 1 out)" in
has "the questions" "$(cat asked)" "box"
is "the questions" "$(grep -c "Allow the use of this key" asked)" 2
has "the log" "$(journalctl --user -u p11-agent)" "read-only"

step "CI"
mkdir -p ci
(umask 077 && printf '%s\n' "$PIN" >ci/pin)
rm .config/p11-agent/config.toml
files ci "s|/etc/ci/pin|$HOME/ci/pin|"
(. ./where && echo 'IdentityFile none') >.ssh/config
printf '#!/bin/sh\necho deployed >>done\n' >deploy
chmod 755 deploy
git init -q --bare there.git
git -C repo remote add origin "person@host.example.org:there.git"
unset SSH_AUTH_SOCK
git -C repo push -q --set-upstream origin HEAD:main 2>said && fail "it has got in without an agent"
cd repo
block=$(sed 's/deploy@/person@/' ../ci/*.sh)
job() { GIT_CONFIG_COUNT=1 GIT_CONFIG_KEY_0=remote.origin.push GIT_CONFIG_VALUE_0=HEAD:$1 bash -euc "$block" </dev/null >"../$1" 2>&1; }
job one & # two at once
one=$!
job two || fail "$(cat ../two)"
wait $one || fail "$(cat ../one)"
cd ..
is "what was deployed" "$(grep -c deployed done)" 2
is "what was pushed" "$(git -C there.git rev-parse one two | uniq)" "$(git -C repo rev-parse HEAD)"
gone() { ! ls -d "$XDG_RUNTIME_DIR"/p11-agent-* 2>/dev/null; }
eventually gone
if journalctl --user -o export | grep -aq "$PIN"; then fail "the journal has the PIN"; fi

echo "== all is well"
