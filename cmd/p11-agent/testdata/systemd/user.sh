# The life of the agent under "systemd --user", from install to uninstall. The
# program is at a path that has to be quoted. Run by TestUserManager.
set -euo pipefail
agent="$HOME/my bin 100%/p11-agent"
PIN=$1

# shellcheck source=common.sh
. ./common.sh
ctl=(systemctl --user) log=(journalctl --user)
show() { systemctl --user show -P "$1" "${2:-p11-agent.service}"; }
lists() { has "the list" "$(timeout 30 ssh-add -l)" "$1"; }
sign() { timeout 60 ssh-keygen -q -Y sign -n test -f key.pub text </dev/null; }

step "a token"
mkdir -p .config/softhsm2 .config/p11-agent tokens
echo "directories.tokendir = $HOME/tokens" >.config/softhsm2/softhsm2.conf
softhsm2-util --init-token --free --label work --pin "$PIN" --so-pin 11111111 >/dev/null
pkcs11-tool --module "$(softhsm)" --token-label work --login --pin "$PIN" \
	--keypairgen --key-type EC:prime256v1 --id 01 --label login >/dev/null 2>&1
(umask 077 && printf '%s\n' "$PIN" >pin)
config=.config/p11-agent/config.toml
echo "keys = [\"pkcs11:token=work?pin-source=file:$HOME/pin\"]" >$config
echo text >text

step "install: nothing runs, and the socket is there for its user alone"
"$agent" install --user --now
is "the mode of the directory" "$(stat -c %a "$XDG_RUNTIME_DIR/p11-agent")" 700
is "the mode of the socket" "$(stat -c %a "$XDG_RUNTIME_DIR/p11-agent/agent.sock")" 600
is "the service" "$(show ActiveState)" inactive
has "the manager's environment" "$(systemctl --user show-environment)" "SSH_AUTH_SOCK=$XDG_RUNTIME_DIR/p11-agent/agent.sock"
export SSH_AUTH_SOCK=$XDG_RUNTIME_DIR/p11-agent/agent.sock
SYSTEMD_LOG_LEVEL=warning systemd-analyze --user verify --man=no --recursive-errors=one p11-agent.service

step "the first client starts it and is answered"
lists token=work
active() { [ "$(show ActiveState)" = active ]; } # clients are answered a moment before systemd has heard
eventually active
is "LimitCORE" "$(show LimitCORE)" 0
ssh-add -L >key.pub
eventually test "$(ssh-add -L | wc -l)" = 1
eventually says p11-agent.service 'Status: "1 key on 1 token; '
sign
rm text.sig
logged_in() { case $(show StatusText) in "1 key on 1 token, logged in to 1; "*) ;; *) return 1 ;; esac; }
eventually logged_in
eventually says p11-agent.service 'Status: "1 key on 1 token, logged in to 1; '

step "ssh asks it whatever SSH_AUTH_SOCK says, with the line that install has said"
mkdir -p -m 700 .ssh
echo 'Include ~/.config/p11-agent/ssh_config' >.ssh/config
has "ssh" "$(SSH_AUTH_SOCK=/nowhere ssh -G somewhere)" "identityagent /run/user/$(id -u)/p11-agent/agent.sock"

step "a crash: clients wait until it is back"
crash() { # and be gone, before systemd starts it again
	local pid
	pid=$(show MainPID)
	kill -SEGV "$pid"
	ended() { ! kill -0 "$pid" 2>/dev/null; }
	eventually ended
}
crash
lists token=work
is "the restarts" "$(show NRestarts)" 1

step "ten crashes in a row"
for _ in $(seq 10); do
	crash
	lists token=work
done
is "the restarts" "$(show NRestarts)" 11
is "the socket" "$(show ActiveState p11-agent.socket)" active
sign
rm text.sig

step "reload: what was changed counts"
sed -i "1s/.*/keys = [\"pkcs11:token=work\"]/" $config
printf '[[key]]\nuri = "pkcs11:token=work?pin-source=file:%s/pin"\nname = "renamed"\n' "$HOME" >>$config
pid=$(show MainPID)
systemctl --user reload p11-agent.service
eventually sh -c 'ssh-add -l | grep -q renamed'
is "the process" "$(show MainPID)" "$pid"
eventually active # and again

step "a configuration that is broken ends nothing for good"
mv $config good
echo 'keyz = []' >$config
systemctl --user restart p11-agent.service || true
before=$(show NRestarts)
timeout 120 ssh-add -l >waited &
client=$!
restarted() { [ "$(show NRestarts)" -gt $((before + 2)) ]; }
eventually restarted
mv good $config
wait $client || fail "who waited was not answered"
grep -q renamed waited
is "the socket" "$(show ActiveState p11-agent.socket)" active

step "the watchdog leaves an agent alone whose modules hang"
mkdir -p .config/systemd/user/p11-agent.service.d
printf '[Service]\nWatchdogSec=2s\n' >.config/systemd/user/p11-agent.service.d/test.conf
systemctl --user daemon-reload
systemctl --user restart p11-agent.service
lists renamed
pid=$(show MainPID)
# The agent lists the keys that it remembers before its modules have started.
started() { modules=$(pgrep -P "$pid" -f module-process | tr '\n' ' ') && [ -n "$modules" ]; }
eventually started
# shellcheck disable=SC2086
kill -STOP $modules
sign 2>/dev/null &
signer=$!
last=
for _ in $(seq 8); do # each beat of the watchdog takes a third of its time
	beat() { [ "$(show WatchdogTimestampMonotonic)" != "$last" ]; }
	eventually beat
	last=$(show WatchdogTimestampMonotonic)
done
lists renamed
is "the process" "$(show MainPID)" "$pid"
# shellcheck disable=SC2086
kill -CONT $modules
wait $signer || fail "who waited for the module was not served"
rm text.sig

step "the watchdog replaces an agent that hangs"
kill -STOP "$pid"
replaced() { [ "$(show MainPID)" != "$pid" ] && [ "$(show MainPID)" != 0 ]; }
eventually replaced
lists renamed
has "the journal" "$(journalctl --user -u p11-agent.service --no-pager)" "Watchdog timeout"

step "the journal has the fields of a request that was refused"
ssh-keygen -q -t ed25519 -N '' -f other
if ssh-add -T other.pub 2>/dev/null; then fail "a key that is not there was used"; fi
entry=$(journalctl --user -u p11-agent.service -o json P11_REQUEST=sign | tail -n 1)
has "the entry" "$entry" '"SYSLOG_IDENTIFIER":"p11-agent"'
has "the entry" "$entry" '"PRIORITY":"4"'
has "the entry" "$entry" '"MESSAGE":"request refused request=sign '
has "the entry" "$entry" '"P11_REASON":"the agent has no such key"'
has "the entry" "$entry" '"P11_FORWARDED":"false"'
has "the entry" "$entry" '"P11_CLIENT":"ssh-add ('

step "the journal has no secret, no trace and nothing for a shell"
journalctl --user -o export --no-pager >journal
for text in "$PIN" 'goroutine ' 'rip ' 'SSH_AUTH_SOCK='; do
	if grep -aqF -- "$text" journal; then fail "the journal has '$text': $(grep -aF -- "$text" journal | head -n 3)"; fi
done
if [ -n "$(find / -xdev \( -path /proc -o -path /sys \) -prune -o -name 'core*' -newer text -user "$(id -u)" -print 2>/dev/null)" ]; then fail "there is a core file"; fi

step "stopped, it comes with the next client; without its socket it ends"
systemctl --user stop p11-agent.service
is "the socket" "$(show ActiveState p11-agent.socket)" active
lists renamed
systemctl --user stop p11-agent.socket
is "the service" "$(show ActiveState)" inactive
if [ -e "$SSH_AUTH_SOCK" ]; then fail "the socket is left over"; fi
systemctl --user start p11-agent.socket
lists renamed

step "an upgrade restarts the agent, even when systemd cannot enable it"
eventually active
pid=$(show MainPID)
wants=.config/systemd/user/sockets.target.wants
mv $wants wants
touch $wants # no directory
mkdir new
cp "$agent" new/p11-agent
if new/p11-agent install --user --now >said 2>&1; then fail "the socket is enabled"; fi
has "the error" "$(cat said)" "p11-agent: error: systemctl --user enable --now p11-agent.socket: "
has "the program" "$(show ExecStart)" "$HOME/new/p11-agent"
restarted() { active && [ "$(show MainPID)" != "$pid" ]; }
eventually restarted
lists renamed
rm $wants
mv wants $wants
"$agent" install --user --now >/dev/null
lists renamed

step "an agent of one's own keeps its socket"
systemctl --user disable --now p11-agent.socket
eval "$("$agent" agent -s)" >/dev/null
if "$agent" install --user --now 2>said; then fail "its socket was taken"; fi
has "the error" "$(cat said)" "end it first"
eval "$("$agent" agent -k -s)" >/dev/null
export SSH_AUTH_SOCK=$XDG_RUNTIME_DIR/p11-agent/agent.sock
gone() { ! test -S "$SSH_AUTH_SOCK"; }
eventually gone
"$agent" install --user --now >/dev/null
lists renamed

step "uninstall"
"$agent" uninstall --user
if [ -e "$SSH_AUTH_SOCK" ]; then fail "the socket is left over"; fi
is "the socket unit" "$(show LoadState p11-agent.socket)" not-found
if systemctl --user is-enabled p11-agent.socket 2>/dev/null; then fail "it is still enabled"; fi
is "what is left" "$(find .config/systemd .config/environment.d .config/p11-agent -name '*.socket' -o -name '*.service' -o -name '50-*' -o -name ssh_config)" ""
if systemctl --user show-environment | grep p11-agent; then fail "SSH_AUTH_SOCK still leads to it"; fi
test -s $config
if pgrep -u "$(id -u)" p11-agent >/dev/null; then fail "a process is left over"; fi
echo "== all is well"
