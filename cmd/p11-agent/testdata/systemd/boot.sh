#!/bin/bash
# Boots this machine's own system in a container, with systemd as its first
# process, and runs a script in it as root, for each script once:
#
#     boot.sh DIR SCRIPT...
#
# As root. DIR is copied to /opt in the container, and SCRIPT is the name of a file
# in it. What is changed is in memory, lasts from one boot to the next, and is gone
# at the end. The exit status is that of the first script that fails. Where ROOT is
# set, the system in that directory is booted in place of the machine's own, such as
# one of another release that debootstrap has made.
set -eu
if [ -z "${STAGE:-}" ]; then STAGE=1 exec unshare --mount --propagation private bash "$0" "$@"; fi

files=$1
shift
mount -t cgroup2 cgroup2 /sys/fs/cgroup
group=/sys/fs/cgroup/p11-boot-$$
mkdir "$group"
echo $$ >"$group/cgroup.procs"
scratch=$(mktemp -d)
mount -t tmpfs tmpfs "$scratch"
mkdir "$scratch"/{upper,work,root,out}
mount -t overlay overlay -o "lowerdir=${ROOT:-/},upperdir=$scratch/upper,workdir=$scratch/work" "$scratch/root"
mount -t tmpfs tmpfs /run/systemd # nspawn's own state stays off the machine's /run
root=$scratch/root
: >"$root/etc/machine-id"
rm -f "$root/var/lib/dbus/machine-id"
cp -r "$files"/* "$root/opt/"
install -m 755 "$files/p11-agent" "$root/usr/bin/p11-agent"
# Of the machine's own services none is of use.
for unit in ssh.service ssh.socket pcscd.service pcscd.socket tpm2-abrmd.service; do ln -sf /dev/null "$root/etc/systemd/system/$unit"; done
cat >"$root/etc/systemd/system/test.service" <<-'UNIT'
	[Unit]
	Requires=dbus.socket systemd-logind.service
	After=basic.target systemd-logind.service dbus.socket
	SuccessAction=exit
	FailureAction=exit
	[Service]
	Type=oneshot
	WorkingDirectory=/opt
	ExecStart=/bin/bash /opt/script
	StandardOutput=append:/out/log
	StandardError=append:/out/log
	TimeoutStartSec=300
UNIT
printf '[Unit]\nRequires=basic.target test.service\nWants=multi-user.target\nAllowIsolate=yes\n' >"$root/etc/systemd/system/test.target"

rc=0
for script; do
	cp "$files/$script" "$root/opt/script"
	# nspawn refuses what the agent and its units need; a machine does not.
	systemd-nspawn -q --register=no --keep-unit --private-network -D "$root" -M p11-test --console=pipe --bind="$scratch/out:/out" \
		--capability=CAP_IPC_LOCK --system-call-filter='@memlock landlock_create_ruleset landlock_add_rule landlock_restrict_self memfd_secret' \
		-b systemd.unit=test.target quiet systemd.show_status=no </dev/null >"$scratch/console" 2>&1 || rc=$?
	if [ $rc != 0 ]; then break; fi
done
if [ -e "$scratch/out/log" ]; then cat "$scratch/out/log"; else cat "$scratch/console"; fi
echo $$ >/sys/fs/cgroup/cgroup.procs
for _ in $(seq 50); do
	if find "$group" -depth -type d -exec rmdir {} + 2>/dev/null; then break; fi
	sleep .1 # the kernel is still at it
done
umount -R "$scratch" && rmdir "$scratch"
exit $rc
