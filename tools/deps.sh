#!/bin/bash
# Installs what building and testing needs and this machine lacks, by apt-get on
# Debian and Ubuntu, by dnf on Fedora. Go is not among it: it is only checked.
#
# It looks for the programs and files themselves, not for packages, so what was
# installed in another way counts. When nothing is missing it changes nothing
# and needs neither network nor root. No service is started.
set -euo pipefail
cd "$(dirname "$0")/.."
PATH=$PATH:/usr/local/sbin:/usr/sbin:/sbin # sshd, for those who are not root

fail() {
	echo "deps: $*" >&2
	exit 1
}

# What is needed, and the packages that bring it: a program, or the file whose
# name fits one of the patterns (commas between them). Where a distribution has no
# package (-), the tests do without.
needed() {
	# OpenSC's module opens libpcsclite when it starts, and fails without it.
	# What                                          Debian              Fedora
	cat <<-'TABLE'
	gcc                                             gcc                 gcc
	/usr/include/stdio.h                            libc6-dev           glibc-devel
	pkg-config                                      pkg-config          pkgconf-pkg-config
	/etc/ssl/certs/ca-certificates.crt,/etc/pki/tls/certs/ca-bundle.crt ca-certificates ca-certificates
	git                                             git                 git
	ssh                                             openssh-client      openssh-clients
	ssh-add                                         openssh-client      openssh-clients
	ssh-keygen                                      openssh-client      openssh
	sshd                                            openssh-server      openssh-server
	softhsm2-util                                   softhsm2            softhsm
	pkcs11-tool                                     opensc              opensc
	/usr/lib/*/opensc-pkcs11.so,/usr/lib*/opensc-pkcs11.so,/usr/lib*/pkcs11/opensc-pkcs11.so opensc-pkcs11 opensc
	/usr/lib/*/libpcsclite.so.1,/usr/lib*/libpcsclite.so.1 libpcsclite1 pcsc-lite-libs
	pcscd                                           pcscd               pcsc-lite
	/usr/lib/pcsc/drivers/serial/libifdvpcd.so,/usr/lib*/pcsc/drivers/serial/libifdvpcd.so* vsmartcard-vpcd -
	/usr/lib/*/libykcs11.so.*,/usr/lib*/libykcs11.so.* ykcs11           yubico-piv-tool
	swtpm                                           swtpm               swtpm
	tpm2-abrmd                                      tpm2-abrmd          tpm2-abrmd
	/usr/lib/*/libtss2-tcti-tabrmd.so.0,/usr/lib*/libtss2-tcti-tabrmd.so.0 libtss2-tcti-tabrmd0 tpm2-abrmd
	tpm2_getcap                                     tpm2-tools          tpm2-tools
	/usr/lib/*/pkcs11/libtpm2_pkcs11.so,/usr/lib*/pkcs11/libtpm2_pkcs11.so libtpm2-pkcs11-1 tpm2-pkcs11
	tpm2_ptool                                      libtpm2-pkcs11-tools tpm2-pkcs11-tools
	dbus-daemon                                     dbus-daemon         dbus-daemon
	/usr/lib/gnupg/scdaemon,/usr/libexec/scdaemon,/usr/lib/gnupg2/scdaemon scdaemon /usr/libexec/scdaemon
	gpg-agent                                       gpg-agent           gnupg2
	gpgconf                                         gpgconf             gnupg2
	socat                                           socat               socat
	p11-kit                                         p11-kit             p11-kit
	/usr/lib/*/pkcs11/p11-kit-client.so,/usr/lib*/pkcs11/p11-kit-client.so p11-kit-modules p11-kit-server
	/usr/include/p11-kit-1/p11-kit/p11-kit.h        libp11-kit-dev      p11-kit-devel
	pinentry-curses                                 pinentry-curses     /usr/bin/pinentry-curses
	pinentry-tty                                    pinentry-tty        /usr/bin/pinentry-tty
	pinentry-gtk-2                                  pinentry-gtk2       -
	pinentry-qt                                     pinentry-qt         /usr/bin/pinentry-qt
	Xvfb                                            xvfb                xorg-x11-server-Xvfb
	xdotool                                         xdotool             xdotool
	less                                            less                less
	setsid                                          util-linux          util-linux
	tmux                                            tmux                tmux
	scdoc                                           scdoc               scdoc
	setpriv                                         util-linux          util-linux
	unshare                                         util-linux          util-linux
	setsid                                          util-linux          util-linux
	python3                                         python3             python3
	ps                                              procps              procps-ng
	ip                                              iproute2            iproute
	/usr/lib/python3/dist-packages/paramiko,/usr/lib/python3*/site-packages/paramiko python3-paramiko python3-paramiko
	systemd-socket-activate                         systemd             systemd
	systemd-nspawn                                  systemd-container   systemd-container
	/usr/lib/*/security/pam_systemd.so,/usr/lib*/security/pam_systemd.so libpam-systemd systemd-pam
	/usr/lib/systemd/user/dbus.socket               dbus-user-session   dbus-common
	useradd                                         passwd              shadow-utils
	rpm                                             rpm                 rpm
	debootstrap                                     debootstrap         debootstrap
	dbus-daemon                                     dbus                dbus-daemon
	/usr/lib/openssh/regress/agent.sh               openssh-tests       -
	gdb                                             gdb-minimal         -
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

# missing prints column $1 (0: what it is, 1: Debian, 2: Fedora) of what is not
# there and could be, each once.
missing() {
	local row
	needed | while read -r -a row; do
		if [ "${row[$column]}" != - ] && ! present "${row[0]}"; then echo "${row[$1]}"; fi
	done | sort -u
}

as_root() {
	if [ "$(id -u)" = 0 ]; then "$@"; else sudo "$@"; fi
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

column=0
if command -v apt-get >/dev/null; then
	column=1
elif command -v dnf >/dev/null; then
	column=2
fi

check_go
what=$(missing 0)
if [ -z "$what" ]; then exit; fi
echo "deps: missing: ${what//$'\n'/ }"

if [ $column = 0 ]; then
	fail "neither apt-get nor dnf is here: install what is missing by your own means"
fi
mapfile -t packages < <(missing $column)
if [ "$(id -u)" != 0 ] && ! command -v sudo >/dev/null; then
	fail "root has to install: ${packages[*]}"
fi
echo "deps: installing: ${packages[*]}"
sshd_was=$(command -v sshd || true)
pcscd_was=$(command -v pcscd || true)
abrmd_was=$(command -v tpm2-abrmd || true)
vpcd=/etc/reader.conf.d/vpcd
vpcd_was=
if [ -e $vpcd ]; then vpcd_was=yes; fi

if [ $column = 1 ]; then
	forbid_services
	apt=(env DEBIAN_FRONTEND=noninteractive apt-get -q -y -o DPkg::Lock::Timeout=300)
	# A source that is down must not stop us when the packages are elsewhere.
	as_root "${apt[@]}" update || echo "deps: apt-get update had errors, going on" >&2
	as_root "${apt[@]}" install --no-install-recommends "${packages[@]}"
else
	as_root dnf -q -y install --setopt=install_weak_deps=False "${packages[@]}"
fi

# A machine that had no such server is not to get one at its next boot either.
switch_off() {
	local what=$1 unit
	shift
	if [ ! -d /run/systemd/system ]; then return; fi
	for unit; do
		as_root systemctl disable --now "$unit" >/dev/null 2>&1 || true # most have but one of them
	done
	echo "deps: $what is installed for the tests only: its service is switched off"
}
if [ -z "$sshd_was" ]; then switch_off sshd ssh.service ssh.socket sshd.service; fi
if [ -z "$pcscd_was" ]; then switch_off pcscd pcscd.socket pcscd.service; fi
# D-Bus starts it, too, for whoever uses a TPM: that would take the machine's own
# away from the kernel's resource manager.
if [ -z "$abrmd_was" ]; then
	switch_off tpm2-abrmd tpm2-abrmd.service
	if [ -d /run/systemd/system ]; then as_root systemctl mask tpm2-abrmd.service >/dev/null 2>&1 || true; fi
fi

# The virtual readers are for the tests' own pcscd. In the machine's they would
# listen to the network.
if [ -z "$vpcd_was" ] && [ -e $vpcd ]; then
	as_root sed -i 's/^[^#]/# &/' $vpcd
	echo "deps: vpcd is installed for the tests only: its readers in $vpcd are switched off"
fi

what=$(missing 0)
if [ -n "$what" ]; then fail "still missing after the installation: ${what//$'\n'/ }"; fi
