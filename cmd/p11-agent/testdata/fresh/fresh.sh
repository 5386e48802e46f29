#!/bin/bash
# Opens a terminal on a fresh system, for an ordinary user:
#
#     fresh.sh DIR
#
# It needs neither root nor a network: the user, "person", and the system are in namespaces
# of their own.
# DIR/home is the home directory, DIR/bin is in PATH, DIR/tmux the socket of the terminal, DIR/rc what its
# shell reads. GOROOT, GOCACHE and GOMODCACHE are Go's. Nothing is in the environment,
# in /etc/pkcs11, /etc/softhsm and /run/user; /usr/local has Go alone, and a sudo, as a real one
# does not work here. An sshd serves the host "host" for the user, whose password there is
# in DIR/password. It ends when it is killed, and everything in it.
set -euo pipefail
dir=$1 user=person uid=1000

case ${STAGE:-} in
'')
	STAGE=1 exec unshare --user --map-root-user --mount --net --pid --fork --kill-child --mount-proc bash "$0" "$dir"
	;;
1)
	PATH=$PATH:/usr/sbin:/sbin ip link set lo up
	mkdir -p "$dir/etc" "$dir/go" "$dir/host"
	mount --bind "$GOROOT" "$dir/go"
	mount -t tmpfs tmpfs /usr/local
	mkdir -p /usr/local/bin "$GOROOT"
	mount --bind "$dir/go" "$GOROOT"
	printf '#!/bin/sh\nexec "$@"\n' >/usr/local/bin/sudo
	chmod 755 /usr/local/bin/sudo
	for empty in /etc/pkcs11 /run/user /run/pcscd /etc/ssh/ssh_config.d; do
		if [ -d $empty ]; then mount -t tmpfs tmpfs $empty; fi
	done
	# As Debian's, which ordinary users cannot look into.
	if [ -d /etc/softhsm ]; then mount -t tmpfs -o mode=000 tmpfs /etc/softhsm; fi
	for file in passwd group; do grep -v -e "^$user:" -e ":x:$uid:" /etc/$file >"$dir/etc/$file"; done
	echo "$user:$(openssl passwd -6 -stdin <"$dir/password"):$uid:$uid::$dir/home:/bin/bash" >>"$dir/etc/passwd"
	echo "$user:x:$uid:" >>"$dir/etc/group"
	for file in passwd group; do mount --bind "$dir/etc/$file" /etc/$file; done

	ssh-keygen -q -t ed25519 -N '' -f "$dir/host/key"
	printf 'host %s\n' "$(cut -d' ' -f1,2 "$dir/host/key.pub")" >"$dir/host/known_hosts"
	# An sshd that is not root's cannot give out terminals.
	cat >"$dir/host/sshd_config" <<-END
		ListenAddress 127.0.0.1:2222
		HostKey $dir/host/key
		PidFile none
		StrictModes no
		UsePAM no
		PasswordAuthentication yes
		KbdInteractiveAuthentication no
		PermitTTY no
		PermitUserRC no
		LogLevel VERBOSE
	END
	# The name of the host leads to it.
	cat >"$dir/etc/ssh_config" <<-END
		Host host
		    HostName 127.0.0.1
		    HostKeyAlias host
		    Port 2222
		    GlobalKnownHostsFile $dir/host/known_hosts
		    StrictHostKeyChecking yes
	END
	mount --bind "$dir/etc/ssh_config" /etc/ssh/ssh_config
	STAGE=2 exec unshare --user --map-user=$uid --map-group=$uid bash "$0" "$dir"
	;;
2)
	sshd=$(PATH=$PATH:/usr/sbin:/sbin command -v sshd)
	"$sshd" -D -e -f "$dir/host/sshd_config" 2>"$dir/host/log" &
	env -i -C "$dir/home" HOME="$dir/home" USER=$user LOGNAME=$user SHELL=/bin/bash LANG=C.UTF-8 TERM=xterm-256color \
		PATH="$dir/bin:/usr/local/bin:/usr/bin:/bin:$GOROOT/bin" \
		GOCACHE="$GOCACHE" GOMODCACHE="$GOMODCACHE" GOPROXY=off GOFLAGS=-mod=mod GOTOOLCHAIN=local \
		tmux -S "$dir/tmux" -f /dev/null new-session -d -x 200 -y 60 bash --rcfile "$dir/rc"
	wait
	;;
esac
