# Installs, uses and removes the package on a fresh system, as root. Run by
# tools/packages.sh.
set -euo pipefail

fail() {
	echo "packages: on the fresh system: $*" >&2
	exit 1
}
has() { case $2 in *"$3"*) ;; *) fail "$1 does not have '$3': $2" ;; esac; }

export DEBIAN_FRONTEND=noninteractive
# No network: what it depends on is what the fresh system was made with.
apt-get -q -y -o Dir::Etc::sourcelist=/dev/null -o Dir::Etc::sourceparts=/dev/null install --no-install-recommends /tmp/p11-agent.deb >/tmp/log 2>&1 || fail "$(cat /tmp/log)"
has "the state of the package" "$(dpkg -s p11-agent)" "Status: install ok installed"
dpkg -V p11-agent
has "the user of the system's agents" "$(id p11-agent)" "p11-agent"
if find /etc -name '*p11-agent*' | grep .; then fail "it has enabled something"; fi
bad=$(find /usr/bin/p11-agent /usr/lib/systemd -name '*p11-agent*' \( ! -user root -o -perm /022 \))
[ -z "$bad" ] || fail "others may write $bad"

XDG_RUNTIME_DIR=/tmp SYSTEMD_LOG_LEVEL=warning systemd-analyze --user verify --recursive-errors=one /usr/lib/systemd/user/p11-agent.{socket,service}
for kind in service socket; do cp /usr/lib/systemd/system/p11-agent@.$kind /tmp/p11-agent@host.$kind; done
SYSTEMD_LOG_LEVEL=warning systemd-analyze --system verify --recursive-errors=one /tmp/p11-agent@host.{socket,service}

# Manuals: systemd-analyze has looked for p11-agent(1) as well.
has "the manual" "$(man -P cat p11-agent 2>&1)" "SSH agent for keys on smart cards, TPMs and HSMs"
has "the manual" "$(man -P cat p11-agent.toml 2>&1)" "pin-source"
gzip -t /usr/share/doc/p11-agent/changelog.gz
has "bash's completion" "$(bash -c '. /usr/share/bash-completion/bash_completion; _completion_loader p11-agent; complete -p p11-agent')" p11-agent
has "the completion" "$(p11-agent __complete ag 2>/dev/null)" agent

useradd -m -s /bin/bash person
cat >/tmp/person.sh <<'PERSON'
set -euo pipefail
cd
has() { case $2 in *"$3"*) ;; *) echo "$1 does not have '$3': $2" >&2; exit 1 ;; esac; }
has "install" "$(p11-agent install --user)" "the units are there already: /usr/lib/systemd/user/p11-agent.socket"
if [ -e .config/systemd ]; then echo "install has hidden the units of the package" >&2; exit 1; fi
has "environment.d" "$(cat .config/environment.d/50-p11-agent.conf)" SSH_AUTH_SOCK
p11-agent uninstall --user >/dev/null 2>&1
mkdir -p .config/softhsm2 .config/p11-agent tokens
echo "directories.tokendir = $HOME/tokens" >.config/softhsm2/softhsm2.conf
softhsm2-util --init-token --free --label work --pin 1234 --so-pin 11111111 >/dev/null
pkcs11-tool --module /usr/lib/softhsm/libsofthsm2.so --token-label work --login --pin 1234 \
	--keypairgen --key-type EC:prime256v1 --id 01 --label login >/dev/null 2>&1
(umask 077 && echo 1234 >pin)
echo "keys = [\"pkcs11:token=work?pin-source=file:$HOME/pin\"]" >.config/p11-agent/config.toml
p11-agent list --public >key.pub
echo text >text
p11-agent agent ssh-keygen -q -Y sign -n test -f key.pub text
printf 'me %s\n' "$(cut -d' ' -f1,2 key.pub)" >signers
has "the signature" "$(ssh-keygen -Y verify -f signers -I me -n test -s text.sig <text)" "Good \"test\" signature for me"
PERSON
setpriv --reuid=person --regid=person --init-groups env HOME=/home/person XDG_RUNTIME_DIR= bash /tmp/person.sh || fail "a user could not use it"

apt-get -q -y -o Dir::Etc::sourcelist=/dev/null -o Dir::Etc::sourceparts=/dev/null purge p11-agent >/tmp/log 2>&1 || fail "$(cat /tmp/log)"
left=$(find /usr /etc /var/lib -name '*p11-agent*' ! -path '/var/lib/dpkg/*' ! -path '/var/lib/apt/*' 2>/dev/null || true)
[ -z "$left" ] || fail "it has left $left"
