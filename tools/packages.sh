#!/bin/bash
# Proves that the packages work:
#
#     tools/packages.sh DEB RPM
#
# The first is installed on a fresh minimal Debian, which is kept in build for the
# next time, used there by an ordinary user, and removed again. Of the other it is
# seen that rpm takes it, what is in it, and that its program runs here: that it
# can be installed on Fedora is not proved.
#
# As root, with namespaces: nothing of this machine is changed.
set -euo pipefail
cd "$(dirname "$0")/.."

fail() {
	echo "packages: $*" >&2
	exit 1
}
# lacks says what cannot be done here. In CI everything can be.
lacks() {
	if [ "${CI-}" = true ]; then fail "$*"; fi
	echo "packages: skipped: $*"
	exit
}

if [ -n "${STAGE-}" ]; then # in namespaces of its own
	base=$1 deb=$2
	work=$(mktemp -d)
	mount -t tmpfs tmpfs "$work"
	mkdir "$work"/{upper,work,root}
	root=$work/root
	mount -t overlay overlay -o "lowerdir=$base,upperdir=$work/upper,workdir=$work/work" "$root"
	mount -t proc proc "$root/proc"
	mount -t tmpfs tmpfs "$root/run"
	for dev in null zero full random urandom tty; do
		[ -e "$root/dev/$dev" ] || : >"$root/dev/$dev"
		mount --bind /dev/$dev "$root/dev/$dev"
	done
	cp "$deb" "$root/tmp/p11-agent.deb"
	printf '#!/bin/sh\nexit 101\n' >"$root/usr/sbin/policy-rc.d"
	chmod 755 "$root/usr/sbin/policy-rc.d"
	cp tools/package/fresh-system.sh "$root/tmp/"
	rc=0
	env -i PATH=/usr/sbin:/usr/bin:/sbin:/bin HOME=/root LANG=C.UTF-8 TERM=dumb chroot "$root" bash /tmp/fresh-system.sh || rc=$?
	umount -R "$work"
	rmdir "$work"
	exit $rc
fi

deb=$PWD/$1 rpm=$PWD/$2

# Versions are compared as they should be, by both.
order=(unreleased+abc1234-dirty 1.2.0-rc.1 1.2.0-rc.1-3-gabc1234 1.2.0-rc.2 1.2.0 1.2.0-3-gabc1234 1.2.0-20-gabc1234-dirty 1.2.1 1.10.0)
for i in $(seq $((${#order[@]} - 1))); do
	older=$(tools/version.sh --package "${order[i - 1]}") newer=$(tools/version.sh --package "${order[i]}")
	if command -v dpkg >/dev/null && ! dpkg --compare-versions "$older-1" lt "$newer-1"; then fail "dpkg takes $older for newer than $newer"; fi
	if command -v rpm >/dev/null && [ "$(rpm --eval "%{lua:print(rpm.vercmp('$older', '$newer'))}")" != -1 ]; then fail "rpm takes $older for newer than $newer"; fi
done

# The rpm.
[ "$(id -u)" = 0 ] || lacks "only root can install packages, if elsewhere"
command -v rpm >/dev/null || lacks "rpm is not installed"
files=$(rpm -qlp "$rpm")
for file in /usr/bin/p11-agent /usr/lib/systemd/user/p11-agent.socket /usr/lib/systemd/system/p11-agent@.service \
	/usr/share/man/man1/p11-agent.1.gz /usr/share/man/man5/p11-agent.toml.5.gz /usr/share/bash-completion/completions/p11-agent; do
	grep -qxF $file <<<"$files" || fail "the rpm lacks $file"
done
rpm -K --nosignature "$rpm" >/dev/null || fail "rpm -K finds the rpm broken"
elsewhere=$(mktemp -d)
trap 'rm -rf "$elsewhere"' EXIT
# In a root of its own there is nothing that it depends on, nor a shell.
there() { rpm --root "$elsewhere" --dbpath /var/lib/rpm --force-debian "$@"; }
there -i --nodeps --noscripts "$rpm" || fail "rpm does not install the rpm"
there -V --nodeps --noscripts p11-agent || fail "what rpm has installed is not what is in the rpm"
[ "$("$elsewhere/usr/bin/p11-agent" version)" = "p11-agent $(tools/version.sh)" ] || fail "the rpm has another program"
there -e --nodeps --noscripts p11-agent
left=$(find "$elsewhere" -name '*p11-agent*')
[ -z "$left" ] || fail "removed, the rpm has left $left"
echo "packages: rpm: $(grep -c . <<<"$files") files, and its program runs"

# The deb.
command -v debootstrap >/dev/null || lacks "debootstrap is not installed"
unshare --mount --pid --fork mount -t tmpfs tmpfs /mnt 2>/dev/null || lacks "namespaces with mounts of their own cannot be made here"
# shellcheck source=/dev/null
. /etc/os-release
[ "$ID" = debian ] || lacks "the fresh system is Debian's, and this is $ID"
# What the package does not need and the proof does.
with=systemd,softhsm2,opensc,opensc-pkcs11,p11-kit,openssh-client,man-db,bash-completion
base=$PWD/build/fresh-$VERSION_CODENAME
mirror=$({ cat /etc/apt/sources.list /etc/apt/sources.list.d/*.{list,sources} 2>/dev/null || true; } |
	sed -nE 's/^URIs: *(http[^ ]*\/debian)\/? *$/\1/p; s/^deb (\[[^]]*\] )?(http[^ ]*\/debian)\/? .*/\2/p' | sed -n 1p)
if [ ! -e "$base/complete" ]; then
	rm -rf "$base"
	mkdir -p "$base"
	debootstrap --variant=minbase --include=$with "$VERSION_CODENAME" "$base" ${mirror:+"$mirror"} >"$base.log" 2>&1 ||
		lacks "a fresh system cannot be made: $(tail -n 3 "$base.log")"
	chroot "$base" apt-get clean
	touch "$base/complete"
fi
STAGE=1 unshare --mount --propagation private --pid --fork --kill-child bash "$0" "$base" "$deb"
echo "packages: deb: installed on a fresh Debian $VERSION_CODENAME, used and removed"
