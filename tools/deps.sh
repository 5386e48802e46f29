#!/bin/bash
# Installs what the machine lacks, by apt-get on Debian and Ubuntu, by dnf on Fedora:
#
#     tools/deps.sh [build|demo|check|ci]
#
# Each list has all of those before it: what "make build" and "make install" need,
# which is the default, what "make demo" needs, what "make check" needs, and what
# .ci/run needs. Go is on none: the script only checks it.
#
# It looks for the programs and files themselves, not for packages, so what was
# installed in another way counts. When nothing is missing it changes nothing
# and needs neither network nor root. It starts no service. Where it cannot become
# root, it prints the line that installs what is missing.
set -euo pipefail
cd "$(dirname "$0")/.."
PATH=$PATH:/usr/local/sbin:/usr/sbin:/sbin # sshd, for those who are not root

fail() {
	echo "deps: $*" >&2
	exit 1
}

# What is needed: the first list that has it; a program, or the file whose name fits
# one of the patterns (commas between them); and the packages that bring it. Where a
# distribution has no package (-), the tests do without.
needed() {
	# OpenSC's module opens libpcsclite when it starts, and fails without it.
	# List What                                       Debian              Fedora
	cat <<-'TABLE'
	build  gcc                                             gcc                 gcc
	build  /usr/include/stdio.h                            libc6-dev           glibc-devel
	build  /etc/ssl/certs/ca-certificates.crt,/etc/pki/tls/certs/ca-bundle.crt ca-certificates     ca-certificates
	build  scdoc                                           scdoc               scdoc
	demo   git                                             git                 git
	demo   ssh                                             openssh-client      openssh-clients
	demo   ssh-add                                         openssh-client      openssh-clients
	demo   ssh-keygen                                      openssh-client      openssh
	demo   sshd                                            openssh-server      openssh-server
	demo   softhsm2-util                                   softhsm2            softhsm
	demo   pkcs11-tool                                     opensc              opensc
	demo   pinentry-curses                                 pinentry-curses     /usr/bin/pinentry-curses
	demo   tmux                                            tmux                tmux
	check  pkg-config                                      pkg-config          pkgconf-pkg-config
	check  /usr/lib/*/opensc-pkcs11.so,/usr/lib*/opensc-pkcs11.so,/usr/lib*/pkcs11/opensc-pkcs11.so opensc-pkcs11       opensc
	check  /usr/lib/*/libpcsclite.so.1,/usr/lib*/libpcsclite.so.1 libpcsclite1        pcsc-lite-libs
	check  pcscd                                           pcscd               pcsc-lite
	check  /usr/lib/pcsc/drivers/serial/libifdvpcd.so,/usr/lib*/pcsc/drivers/serial/libifdvpcd.so* vsmartcard-vpcd     -
	check  /usr/lib/*/libykcs11.so.*,/usr/lib*/libykcs11.so.* ykcs11              yubico-piv-tool
	check  swtpm                                           swtpm               swtpm
	check  tpm2-abrmd                                      tpm2-abrmd          tpm2-abrmd
	check  /usr/lib/*/libtss2-tcti-tabrmd.so.0,/usr/lib*/libtss2-tcti-tabrmd.so.0 libtss2-tcti-tabrmd0 tpm2-abrmd
	check  tpm2_getcap                                     tpm2-tools          tpm2-tools
	check  /usr/lib/*/pkcs11/libtpm2_pkcs11.so,/usr/lib*/pkcs11/libtpm2_pkcs11.so libtpm2-pkcs11-1    tpm2-pkcs11
	check  tpm2_ptool                                      libtpm2-pkcs11-tools tpm2-pkcs11-tools
	check  dbus-daemon                                     dbus-daemon         dbus-daemon
	check  /usr/lib/gnupg/scdaemon,/usr/libexec/scdaemon,/usr/lib/gnupg2/scdaemon scdaemon            /usr/libexec/scdaemon
	check  gpg-agent                                       gpg-agent           gnupg2
	check  gpgconf                                         gpgconf             gnupg2
	check  socat                                           socat               socat
	check  p11-kit                                         p11-kit             p11-kit
	check  /usr/lib/*/pkcs11/p11-kit-client.so,/usr/lib*/pkcs11/p11-kit-client.so p11-kit-modules     p11-kit-server
	check  /usr/include/p11-kit-1/p11-kit/p11-kit.h        libp11-kit-dev      p11-kit-devel
	check  /usr/lib/*/pkcs11/libopencryptoki.so,/usr/lib64/pkcs11/libopencryptoki.so libopencryptoki0    opencryptoki-libs
	check  pkcsslotd                                       opencryptoki        opencryptoki
	check  /usr/lib/*/libsoftokn3.so,/usr/lib64/libsoftokn3.so libnss3             nss-softokn
	check  certutil                                        libnss3-tools       nss-tools
	check  /usr/lib/pkcs11/libcoolkeypk11.so               coolkey             -
	check  pinentry-tty                                    pinentry-tty        /usr/bin/pinentry-tty
	check  pinentry-gtk-2                                  pinentry-gtk2       -
	check  pinentry-qt                                     pinentry-qt         /usr/bin/pinentry-qt
	check  Xvfb                                            xvfb                xorg-x11-server-Xvfb
	check  xdotool                                         xdotool             xdotool
	check  zsh                                             zsh                 zsh
	check  fish                                            fish                fish
	check  openssl                                         openssl             openssl
	check  less                                            less                less
	check  setsid                                          util-linux          util-linux
	check  setpriv                                         util-linux          util-linux
	check  unshare                                         util-linux          util-linux
	check  python3                                         python3             python3
	check  ps                                              procps              procps-ng
	check  ip                                              iproute2            iproute
	check  /usr/lib/python3/dist-packages/paramiko,/usr/lib/python3*/site-packages/paramiko python3-paramiko    python3-paramiko
	check  systemd-socket-activate                         systemd             systemd
	check  systemd-nspawn                                  systemd-container   systemd-container
	check  /usr/lib/*/security/pam_systemd.so,/usr/lib*/security/pam_systemd.so libpam-systemd      systemd-pam
	check  /usr/lib/systemd/user/dbus.socket               dbus-user-session   dbus-common
	check  useradd                                         passwd              shadow-utils
	check  rpm                                             rpm                 rpm
	check  debootstrap                                     debootstrap         debootstrap
	check  dbus-daemon                                     dbus                dbus-daemon
	check  /usr/lib/openssh/regress/agent.sh               openssh-tests       -
	check  gdb                                             gdb-minimal         -
	ci     sudo                                            sudo                sudo
	ci     script                                          bsdutils            util-linux-script
	TABLE
}

present() {
	local pattern file
	case $1 in
	/*)
		for pattern in ${1//,/ }; do
			for file in $pattern; do
				if [ -e "$file" ]; then return; fi
			done
		done
		return 1
		;;
	*) command -v "$1" >/dev/null ;;
	esac
}

# missing prints column $1 (1: what it is, 2: Debian, 3: Fedora) of what is not
# there and could be, each once.
missing() {
	local row
	needed | while read -r -a row; do
		if [[ " $lists " = *" ${row[0]} "* ]] && [ "${row[$column]}" != - ] && ! present "${row[1]}"; then echo "${row[$1]}"; fi
	done | sort -u
}

as_root() {
	if [ "$(id -u)" = 0 ]; then "$@"; else sudo "$@"; fi
}

# can_be_root tells whether as_root works. On a terminal, sudo may ask for a password.
can_be_root() {
	if [ "$(id -u)" = 0 ]; then return; fi
	command -v sudo >/dev/null || return 1
	if sudo -n true 2>/dev/null; then return; fi
	[ -t 0 ] && sudo -p "deps: sudo needs the password of %p: " true
}

# line_to_paste prints the command that installs the packages of its arguments.
line_to_paste() {
	local line="apt-get install --no-install-recommends $*"
	if [ $column = 3 ]; then line="dnf install --setopt=install_weak_deps=False $*"; fi
	if command -v sudo >/dev/null; then echo "sudo $line"; else echo "su -c '$line'"; fi
}

check_go() {
	local want said
	want=$(sed -n 's/^go //p' go.mod)
	command -v go >/dev/null || fail "Go is missing: install Go $want or newer and put its bin directory into PATH"
	# go knows best whether it can do with go.mod, or can get a toolchain that does.
	said=$(go list -m 2>&1) || fail "Go $want or newer is needed, and this one refuses: $said"
}

# Packages must not start what they bring: the tests start their own, on ports
# of their own. Debian's way to say so is this file. One that is there already
# is the administrator's, and stays.
policy=/usr/sbin/policy-rc.d
forbid_services() {
	if [ -e "$policy" ]; then return; fi
	trap 'as_root rm -f "$policy"' EXIT
	# shellcheck disable=SC2016 # $1 is for the shell that as_root starts
	as_root sh -c 'printf "#!/bin/sh\n# Left behind by an installation that was killed: remove it.\nexit 101\n" >"$1" && chmod 755 "$1"' sh "$policy"
}

list=${1-build} lists=
for name in build demo check ci; do
	lists+=" $name"
	if [ "$name" = "$list" ]; then break; fi
done
[ "$name" = "$list" ] || fail "there is no list \"$list\": say build, demo, check or ci"

column=1
if command -v apt-get >/dev/null; then
	column=2
elif command -v dnf >/dev/null; then
	column=3
fi

check_go
what=$(missing 1)
if [ -z "$what" ]; then exit; fi
echo "deps: missing: ${what//$'\n'/ }"

if [ $column = 1 ]; then
	fail "neither apt-get nor dnf is here: install what is missing by your own means"
fi
mapfile -t packages < <(missing $column)
if ! can_be_root; then
	case " ${packages[*]} " in
	*' openssh-server '*) echo "deps: openssh-server starts a server that others can connect to: stop it with \"systemctl disable --now ssh\"" ;;
	esac
	printf 'deps: only root can install packages: paste this line, then run make again\n\n    %s\n\n' "$(line_to_paste "${packages[@]}")"
	exit 1
fi
echo "deps: installing, which takes a minute or two: ${packages[*]}"
sshd_was=$(command -v sshd || true)
pcscd_was=$(command -v pcscd || true)
abrmd_was=$(command -v tpm2-abrmd || true)
pkcsslotd_was=$(command -v pkcsslotd || true)
vpcd=/etc/reader.conf.d/vpcd
vpcd_was=
if [ -e $vpcd ]; then vpcd_was=yes; fi

if [ $column = 2 ]; then
	forbid_services
	apt=(env DEBIAN_FRONTEND=noninteractive apt-get -q -y -o DPkg::Lock::Timeout=300)
	# A source that is down must not stop us when the packages are elsewhere.
	as_root "${apt[@]}" update || echo "deps: apt-get update had errors, going on" >&2
	as_root "${apt[@]}" install --no-install-recommends "${packages[@]}"
else
	as_root dnf -q -y install --setopt=install_weak_deps=False "${packages[@]}"
fi

# A machine that had no such server is not to get one at its next boot either.
# switch_off switches off the units of a program that the installation has brought:
# the program, where it was before, its units.
switch_off() {
	local what=$1 was=$2 unit
	shift 2
	if [ -n "$was" ] || ! command -v "$what" >/dev/null || [ ! -d /run/systemd/system ]; then return; fi
	for unit; do
		as_root systemctl disable --now "$unit" >/dev/null 2>&1 || true # most have but one of them
	done
	echo "deps: $what is installed for the demo and the tests only: its service is switched off"
}
switch_off sshd "$sshd_was" ssh.service ssh.socket sshd.service
switch_off pcscd "$pcscd_was" pcscd.socket pcscd.service
switch_off tpm2-abrmd "$abrmd_was" tpm2-abrmd.service
switch_off pkcsslotd "$pkcsslotd_was" pkcsslotd.service
# D-Bus starts tpm2-abrmd, too, for any program that uses a TPM: that would take the
# machine's own away from the kernel's resource manager.
if [ -z "$abrmd_was" ] && command -v tpm2-abrmd >/dev/null && [ -d /run/systemd/system ]; then
	as_root systemctl mask tpm2-abrmd.service >/dev/null 2>&1 || true
fi

# The virtual readers are for the tests' own pcscd. In the machine's they would
# listen to the network.
if [ -z "$vpcd_was" ] && [ -e $vpcd ]; then
	as_root sed -i 's/^[^#]/# &/' $vpcd
	echo "deps: vpcd is installed for the tests only: its readers in $vpcd are switched off"
fi

what=$(missing 1)
if [ -n "$what" ]; then fail "still missing after the installation: ${what//$'\n'/ }"; fi
