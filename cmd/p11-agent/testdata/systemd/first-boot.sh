# The agent of the system is installed, serves sshd's host key, and is kept apart
# from a second one; a user's agent is installed for good. Run by TestBoot.
set -euo pipefail
cd /opt
# shellcheck source=common.sh
. ./common.sh
PIN=sesame-4711
show() { systemctl show -P "$1" "$2"; }

step "install --system wants a configuration before it starts anything"
if p11-agent install --system host --now 2>said; then fail "it started without one"; fi
has "the error" "$(cat said)" "/etc/p11-agent/host.toml"
if [ -e /etc/systemd/system/p11-agent@.service ]; then fail "it wrote units all the same"; fi
p11-agent install --system host
if [ -e /run/p11-agent ]; then fail "something runs"; fi

step "a token of the service's own user"
systemd-sysusers
usermod -aG "$(stat -c %G /var/lib/softhsm/tokens)" p11-agent
as_agent() { runuser -u p11-agent -- "$@"; }
for name in host other; do
	as_agent softhsm2-util --init-token --free --label $name --pin $PIN --so-pin 11111111 >/dev/null
	as_agent pkcs11-tool --module "$(softhsm)" --token-label $name --login --pin $PIN \
		--keypairgen --key-type EC:prime256v1 --id 01 --label $name >/dev/null 2>&1
done

step "the recipe of docs/RECIPES.md, and the same for another agent"
# The last block is sshd's restart, which has a server of its own here.
cd host-keys
is "the blocks of the recipe" "$(echo *)" "1.file 1.text 2.sh 3.file 3.text 4.sh"
is "the files of the recipe" "$(cat 1.file 3.file)" "/etc/p11-agent/host.toml"$'\n'"/etc/ssh/sshd_config"
mkdir -p /etc/p11-agent
sed 's/token=Host/token=host/' 1.text >/etc/p11-agent/host.toml
{ echo 'sudo() { env "$@"; }' && cat 2.sh; } >run.sh
bash -eu run.sh <<<"$PIN"
is "the mode of the PIN" "$(stat -c '%a %U' /etc/p11-agent/host.pin)" "600 root"
cd ..
sed 's/token=host/token=other/' /etc/p11-agent/host.toml >/etc/p11-agent/other.toml
(umask 077 && echo $PIN >/etc/p11-agent/other.pin)
p11-agent install --system other --now
systemctl stop p11-agent@host.service # which the recipe has started

step "the first client, which is root, starts it"
is "the service" "$(show ActiveState p11-agent@host.service)" inactive
is "the mode of the socket" "$(stat -c '%a %U' /run/p11-agent/host.sock)" "600 root"
list() { SSH_AUTH_SOCK=/run/p11-agent/$1.sock timeout 30 ssh-add -L; }
list host >host.pub
is "the keys of host" "$(grep -c . host.pub)" 1
has "the list" "$(cat host.pub)" token=host
has "the list" "$(list other)" token=other
is "the user" "$(ps -o user= -p "$(show MainPID p11-agent@host.service)")" p11-agent
has "the capabilities" "$(cat "/proc/$(show MainPID p11-agent@host.service)/status")" "CapBnd:	0000000000000000"
eventually says p11-agent@host.service "2 keys on 2 tokens"

step "the unit's log names the client"
useradd -m -s /bin/bash person
ssh-keygen -q -t ed25519 -N '' -f stranger
if SSH_AUTH_SOCK=/run/p11-agent/host.sock ssh-add -T stranger.pub 2>/dev/null; then fail "a key that is not there was used"; fi
has "the entry" "$(journalctl -u p11-agent@host.service -o json P11_REQUEST=sign)" '"P11_CLIENT":"ssh-add ('
if journalctl -u 'p11-agent@*' -o export | grep -aq $PIN; then fail "the journal has the PIN"; fi

if journalctl -u 'p11-agent@*' | grep "does not answer itself"; then fail "the watchdog will end it"; fi

step "no other user comes in"
if runuser -u person -- env SSH_AUTH_SOCK=/run/p11-agent/host.sock ssh-add -l 2>said; then fail "another user was served"; fi
has "the error" "$(cat said)" "Permission denied"

step "sshd has its host key there"
mkdir -p /run/sshd
install -d -m 700 -o person -g person ~person/.ssh
ssh-keygen -q -t ed25519 -N '' -f me
install -m 600 -o person -g person me.pub ~person/.ssh/authorized_keys
usermod -p '*' person
cat >sshd_config <<-CONFIG
	Port 2222
	ListenAddress 127.0.0.1
	PidFile /run/test-sshd.pid
	UsePAM no
CONFIG
cat host-keys/3.text >>sshd_config
printf '[127.0.0.1]:2222 %s\n' "$(cut -d' ' -f1,2 host.pub)" >known_hosts
printf '[Service]\nExecStart=%s -D -f /opt/sshd_config\nRuntimeDirectory=sshd\n' "$(command -v sshd)" >/etc/systemd/system/test-sshd.service
systemctl daemon-reload
systemctl start test-sshd.service
login() { ssh -F none -i me -o IdentitiesOnly=yes -o UserKnownHostsFile=known_hosts -o StrictHostKeyChecking=yes -o BatchMode=yes -p 2222 person@127.0.0.1 "$@"; }
eventually login true
is "what the login says" "$(login echo in)" in
eventually says p11-agent@host.service "logged in to 1"

step "what one instance does is not the other's"
is "the state" "$(cd /var/lib/p11-agent && echo *)" "host other"
systemctl stop p11-agent@other.socket
if [ -e /run/p11-agent/other.sock ]; then fail "the socket is left over"; fi
list host >/dev/null
systemctl start p11-agent@other.socket
kill -KILL "$(show MainPID p11-agent@host.service)"
is "what the login says" "$(login echo in)" in
list other >/dev/null

step "systemd's own measure of how confined the service is"
systemd-analyze security --no-pager p11-agent@host.service | tail -n 1
systemd-analyze security --threshold=30 --no-pager p11-agent@host.service >/dev/null || fail "it is less confined than it was"

step "a user's agent, for good"
cat >as-user.sh <<-'USER'
	set -eu
	mkdir -p .config/softhsm2 tokens
	echo "directories.tokendir = $HOME/tokens" >.config/softhsm2/softhsm2.conf
	softhsm2-util --init-token --free --label mine --pin 1234 --so-pin 11111111 >/dev/null
	pkcs11-tool --module "$1" --token-label mine --login --pin 1234 --keypairgen --key-type EC:prime256v1 --id 01 --label mine >/dev/null 2>&1
	p11-agent install --user --now
	SSH_AUTH_SOCK=$XDG_RUNTIME_DIR/p11-agent/agent.sock ssh-add -l
USER
# Debian 13 has one that sets the variable as well; here is one everywhere.
cat >/etc/systemd/user/ssh-agent.socket <<-'UNIT'
	[Socket]
	ListenStream=%t/rival
	ExecStartPost=systemctl --user set-environment SSH_AUTH_SOCK=%t/rival
	Service=rival.service
	[Install]
	WantedBy=sockets.target
UNIT
printf '[Service]\nExecStart=/bin/true\n' >/etc/systemd/user/rival.service
systemctl --global -q enable ssh-agent.socket
loginctl enable-linger person
session() { systemd-run -q --pipe --wait --uid=person -p PAMName=login -p WorkingDirectory=~person "$@"; }
session bash -s "$(softhsm)" <as-user.sh >said 2>&1 || fail "$(cat said)"
has "the list" "$(cat said)" token=mine
has "what install says" "$(cat said)" "mask --now"
has "what install says" "$(cat said)" "ssh-agent.socket"
if p11-agent install --user 2>said; then fail "root took itself for a user"; fi
sync
echo "== all is well"
