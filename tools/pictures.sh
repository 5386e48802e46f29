#!/bin/bash
# Makes the pictures of the prompts in docs/pictures from the real program:
#
#     make pictures
#
# The script runs the demo and keeps its directory. It makes a token there, and lets ssh ask
# for the PIN: in a terminal (tmux and pinentry-curses) and on a display (Xvfb and pinentry-gtk-2).
# "tools/deps.sh check" installs the programs that it needs.
set -euo pipefail
cd "$(dirname "$0")/.."
root=$PWD
sshd=$(PATH=$PATH:/usr/sbin:/sbin command -v sshd)
work=$(mktemp -d)
jobs=()

cleanup() {
	if [ -S "$work/tmux.sock" ]; then tmux -S "$work/tmux.sock" kill-server || true; fi
	for job in "${jobs[@]}"; do kill "$job" 2>/dev/null || true; done
	wait
	rm -rf "$work"
}
trap cleanup EXIT

# wait_for runs a command until it succeeds, for 20 seconds at most.
wait_for() {
	for _ in {1..200}; do
		if "$@"; then return; fi
		sleep 0.1
	done
	echo "pictures: gave up waiting for: $*" >&2
	exit 1
}

TMPDIR=$work "$root/build/p11-agent" demo --keep >"$work/demo.log" || { cat "$work/demo.log" >&2; exit 1; }
. "$work"/p11-demo-*/env.sh # sets HOME, SSH_AUTH_SOCK and others, and changes the directory
host=host.example.org
sed -i "s/^Host demo$/Host $host/; s/HostKeyAlias demo$/HostKeyAlias $host/" ssh_config
sed -i "s/^demo /$host /" home/.ssh/known_hosts
config=home/.config/p11-agent/config.toml
module=$(sed -n '/^name = "softhsm2"/{n;s/^path = "\(.*\)"$/\1/p}' "$config")
softhsm2-util --init-token --free --label Work --pin 123456 --so-pin 12345678 >>pictures.log
pkcs11-tool --module "$module" --token-label Work --login --pin 123456 --keypairgen --key-type EC:prime256v1 --id 01 --label login >>pictures.log 2>&1
sed -i 's/^keys = .*/keys = ["pkcs11:token=Work"]/' "$config"
p11-agent list --public >login.pub
cat login.pub >>authorized_keys
curses=$(command -v pinentry-curses) gtk=$(command -v pinentry-gtk-2)
unset DISPLAY WAYLAND_DISPLAY XDG_RUNTIME_DIR GPG_TTY SSH_ASKPASS DBUS_SESSION_BUS_ADDRESS

"$sshd" -D -E "$PWD/sshd.log" -f "$PWD/sshd_config" &
jobs+=($!)

# start_agent starts the agent with a pinentry, in place of the one that runs.
agent=
start_agent() {
	if [ -n "$agent" ]; then
		kill "$agent"
		wait "$agent" || true
	fi
	sed -i "s|^program = .*|program = \"$1\"|" "$config"
	p11-agent agent -D -a "$SSH_AUTH_SOCK" >>pictures.log 2>&1 </dev/null &
	agent=$!
	jobs+=("$agent")
	wait_for ssh-add -l >list.log 2>&1
}

# The terminal: a shell in tmux, in which "ssh host.example.org" is typed.
start_agent "$curses"
cat >rc <<-RC
	PS1='$ '
	ssh() { command ssh -F ssh_config -i login.pub "\$@"; }
RC
screen() { tmux -S "$work/tmux.sock" "$@"; }
shows() { screen capture-pane -p | grep -q "$1"; }
screen -f /dev/null new-session -d -x 86 -y 22 "bash --rcfile rc -i"
screen set-option -g status off
wait_for shows '^[$]'
screen send-keys "ssh $host"
wait_for shows "ssh $host"
screen capture-pane -e -p >screen
screen send-keys Enter
wait_for shows 'PIN:'
screen capture-pane -e -p >>screen
screen send-keys C-c
wait_for shows '^[$]'
python3 "$root/tools/pictures.py" terminal <screen >"$root/docs/pictures/prompt-terminal.svg"

# The display: its picture is a file, in the format of xwd(1).
start_agent "$gtk"
mkdir fb
mkfifo number
Xvfb -displayfd 3 -screen 0 800x600x24 -fbdir fb -nolisten tcp 3>number 2>xvfb.log &
jobs+=($!)
read -r display <number
export DISPLAY=:$display
screen send-keys "DISPLAY=$DISPLAY ssh $host" Enter
window() { xdotool search --onlyvisible --class pinentry >window 2>/dev/null && [ -s window ]; }
wait_for window
sleep 1 # for the window to be drawn as a whole: X tells nobody when it is
eval "$(xdotool getwindowgeometry --shell "$(tail -n 1 window)")"
python3 "$root/tools/pictures.py" display "$X" "$Y" "$WIDTH" "$HEIGHT" <fb/Xvfb_screen0 >"$root/docs/pictures/prompt-desktop.png"
ls -l "$root/docs/pictures"
