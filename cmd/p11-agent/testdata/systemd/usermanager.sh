#!/bin/bash
# Runs a script as an ordinary user under a real "systemd --user" with a journal:
#
#     usermanager.sh DIR SCRIPT [ARG...]
#
# As root. The user, "person", and all that is started are in namespaces of their
# own and gone at the end; nothing of the machine is changed, and its network is not
# to be seen. DIR is mounted at /home/person and handed to the user. An sshd runs
# with the configuration that is there, writes sshd.log, and has host_key.pub. The exit status is the script's.
set -eu
user=person uid=12345

if [ -z "${STAGE:-}" ]; then
	# Its own cgroup, made while the machine's hierarchy is in sight, and removed
	# when all processes are gone.
	tree=$(mktemp -d)
	mount -t cgroup2 cgroup2 "$tree"
	group=$tree/p11-test-$$
	mkdir "$group"
	rc=0
	STAGE=1 GROUP=$group unshare --mount --propagation private --net --pid --fork --mount-proc --kill-child bash "$0" "$@" || rc=$?
	for _ in $(seq 50); do
		if find "$group" -depth -type d -exec rmdir {} + 2>/dev/null; then break; fi
		sleep .1 # the kernel is still at it
	done
	umount "$tree"
	rmdir "$tree"
	exit $rc
fi
if [ "$STAGE" = 1 ]; then
	echo $$ >"$GROUP/cgroup.procs"
	STAGE=2 exec unshare --cgroup bash "$0" "$@"
fi

home=$1
shift
ip link set lo up
mount -t cgroup2 cgroup2 /sys/fs/cgroup
cd /sys/fs/cgroup

# The user, and a machine-id where there is none.
mkdir -p /run/systemd /run/log /run/user
for dir in /run/systemd /run/log /run/user /var/log /root; do mount -t tmpfs -o mode=755 tmpfs $dir; done
for file in passwd group shadow; do cp -p /etc/$file /run/systemd/$file; done
echo "$user:x:$uid:$uid::/home/$user:/bin/bash" >>/run/systemd/passwd
echo "$user:x:$uid:" >>/run/systemd/group
echo "$user:*:19000:0:99999:7:::" >>/run/systemd/shadow
for file in passwd group shadow; do mount --bind /run/systemd/$file /etc/$file; done
if [ ! -s /etc/machine-id ]; then
	tr -d - </proc/sys/kernel/random/uuid >/run/systemd/machine-id
	touch /etc/machine-id
	mount --bind /run/systemd/machine-id /etc/machine-id
fi
mount --bind "$home" /mnt
mount -t tmpfs -o mode=755 tmpfs /home
mount -t tmpfs -o mode=1777 tmpfs /tmp
mkdir /home/$user
mount --move /mnt /home/$user
chown -R $uid:$uid /home/$user

# journald and loginctl read the name of the cgroup.
own=user.slice/user-$uid.slice/user@$uid.service
mkdir -p init.scope system.slice/systemd-journald.service $own
echo $$ >init.scope/cgroup.procs
chown $uid:$uid $own $own/cgroup.{procs,threads,subtree_control}

# unit-root is where services with namespaces of their own are put together.
mkdir -p /run/systemd/{system,journal,unit-root,journald.conf.d} "/var/log/journal/$(cat /etc/machine-id)"
printf '[Journal]\nStorage=persistent\nReadKMsg=no\nAudit=no\nForwardToSyslog=no\nRateLimitIntervalSec=0\n' >/run/systemd/journald.conf.d/test.conf
: >/run/systemd/journal/flushed
install -d -m 700 -o $uid -g $uid /run/user/$uid
(
	echo $BASHPID >system.slice/systemd-journald.service/cgroup.procs
	exec /lib/systemd/systemd-journald
) 2>/dev/null &
for _ in $(seq 100); do
	if [ -S /run/systemd/journal/stdout ]; then break; fi
	sleep .1
done

# An sshd that does not run as root gives no client a terminal.
if [ -e /run/utmp ]; then mount --bind /dev/null /run/utmp; fi
mkdir -p /run/sshd
ssh-keygen -q -t ed25519 -N '' -f /run/systemd/host_key
cp /run/systemd/host_key.pub /home/$user
$(command -v sshd || echo /usr/sbin/sshd) -D -e -f /home/$user/sshd_config 2>/home/$user/sshd.log &
for _ in $(seq 100); do
	if grep -q 'Server listening' /home/$user/sshd.log; then break; fi
	sleep .1
done

(
	echo $BASHPID >$own/cgroup.procs
	exec setpriv --reuid=$uid --regid=$uid --init-groups env -i -C /home/$user \
		HOME=/home/$user USER=$user LOGNAME=$user SHELL=/bin/bash LANG=C.UTF-8 TERM=xterm PATH=/usr/local/bin:/usr/bin:/bin:/usr/sbin:/sbin \
		XDG_RUNTIME_DIR=/run/user/$uid DBUS_SESSION_BUS_ADDRESS=unix:path=/run/user/$uid/bus bash -c '
			/lib/systemd/systemd --user --log-target=journal &
			manager=$!
			for _ in $(seq 200); do
				case $(systemctl --user is-system-running 2>/dev/null) in running | degraded) break ;; esac
				sleep .05
			done
			rc=0
			bash "$@" || rc=$?
			kill $manager
			wait $manager || true
			exit $rc' usermanager "$@"
)
