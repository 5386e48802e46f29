# After a boot everything is there before the first login, and goes with uninstall.
# Run by TestBoot.
set -euo pipefail
cd /opt
# shellcheck source=common.sh
. ./common.sh

step "the sockets are there, and nothing runs"
uid=$(id -u person)
manager() { systemctl is-active --quiet "user@$uid.service"; }
eventually manager
eventually test -S "/run/user/$uid/p11-agent/agent.sock"
# From systemd 256 on a user's manager counts as a session, too.
is "sessions" "$(loginctl --no-legend list-sessions | grep -v manager || true)" ""
test -S /run/p11-agent/host.sock
test -S /run/p11-agent/other.sock
if pgrep -x p11-agent >/dev/null; then fail "an agent runs that no client has asked"; fi

step "the variable is the agent's, though another sets it, too"
test -S "/run/user/$uid/rival"
has "the manager's environment" "$(systemctl --user -M person@ show-environment)" "SSH_AUTH_SOCK=/run/user/$uid/p11-agent/agent.sock"

step "a job without a session uses the user's agent"
has "the list" "$(runuser -u person -- env SSH_AUTH_SOCK="/run/user/$uid/p11-agent/agent.sock" timeout 30 ssh-add -l)" token=mine

step "sshd has its host key"
systemctl start test-sshd.service
login() { ssh -F none -i me -o IdentitiesOnly=yes -o UserKnownHostsFile=known_hosts -o StrictHostKeyChecking=yes -o BatchMode=yes -p 2222 person@127.0.0.1 "$@"; }
eventually login true

step "uninstall --system"
p11-agent uninstall --system host
if [ -e /run/p11-agent/host.sock ]; then fail "the socket is left over"; fi
has "what is left" "$(SSH_AUTH_SOCK=/run/p11-agent/other.sock ssh-add -l)" token=other
p11-agent uninstall --system other
is "what is left" "$(find /etc/systemd /etc/sysusers.d /run/p11-agent -mindepth 1 \( -name '*p11-agent*' -o -name '*.sock' \))" ""
test -s /etc/p11-agent/host.toml
echo "== all is well"
