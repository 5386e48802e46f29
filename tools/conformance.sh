#!/bin/bash
# Runs OpenSSH's own regression scripts for ssh-agent against build/p11-agent:
#
#     tools/conformance.sh [--control] [SCRIPT...]
#
# With --control they run against the real ssh-agent instead, which tells what
# can pass on this machine at all. docs/CONFORMANCE.md has the results and how
# to read them.
#
# Each script runs twice: without XDG_RUNTIME_DIR, and with it.
#
# Each script works in a directory of its own under /tmp and opens no port (sshd
# is started by ssh, and they talk through a pipe), so they run side by side.
# Nothing is installed, no account is made, and the agents see no token but
# those that a script makes. As root, one directory is made: /run/sshd.
set -eu
umask 022
cd "$(dirname "$0")/.."
PATH=$PATH:/usr/local/sbin:/usr/sbin:/sbin # sshd, for those who are not root

regress=/usr/lib/openssh/regress # of Debian's package openssh-tests
limit=200                        # seconds for one script
jobs=3                           # at once: some of them mostly sleep

# The long ones first, so that they are not what is waited for at the end.
scripts=(sshsig agent-restrict agent hostkey-agent agent-timeout agent-subprocess
	agent-pkcs11 agent-ptrace agent-getpeereid)

# What fails here and is to stay so: the reason by script. The same goes into
# docs/CONFORMANCE.md.
declare -A differs=()

# The types of keys that p11-agent does not take, as a pattern: DSA, which OpenSSH
# gave up with version 10, and keys of FIDO devices, which no PKCS#11 module has.
refused='^ssh-dss|^sk-'

fail() {
	echo "conformance: $*" >&2
	exit 1
}

program=$PWD/build/p11-agent
logs=$PWD/build/conformance
control=
if [ "${1-}" = --control ]; then
	control=yes
	program=$(command -v ssh-agent) || fail "there is no ssh-agent"
	logs=$logs-control
	differs=()
	shift
fi
if [ $# -gt 0 ]; then scripts=("$@"); elif [ -z "$control" ]; then scripts+=(key-types); fi
if [ ! -d "$regress" ] && [ "${CI-}" != true ] && ! command -v apt-get >/dev/null; then
	echo "skip: $regress is missing: only Debian and what comes from it package OpenSSH's scripts"
	exit
fi
for name in "${scripts[@]}"; do
	if [ "$name" = key-types ] && [ -z "$control" ]; then continue; fi
	[ -f "$regress/$name.sh" ] || fail "there is no $regress/$name.sh: make deps-check installs the scripts (package openssh-tests)"
done
[ -x "$program" ] || fail "there is no $program: make build makes it"
ssh=$(command -v ssh) || fail "there is no ssh"
sshd=$(command -v sshd) || fail "there is no sshd"

# Not below TMPDIR: the name of a socket holds 107 bytes, and the scripts'
# own parts take many of them.
scratch=$(mktemp -d /tmp/conform.XXXXXX)

# sweep ends what was started below a directory and is still there: a script that
# fails leaves its agents behind. An agent hides everything but its arguments.
sweep() {
	local dir argv0
	for dir in /proc/[0-9]*; do
		argv0=
		IFS= read -r -d '' argv0 2>/dev/null <"$dir/cmdline" || true
		case $argv0 in
		"$1"/*) kill "${dir#/proc/}" 2>/dev/null || true ;;
		esac
	done
}

clean_up() {
	local -a running
	trap - EXIT
	mapfile -t running < <(jobs -pr)
	if [ ${#running[@]} -gt 0 ]; then
		kill "${running[@]}" 2>/dev/null || true
		wait || true
	fi
	sweep "$scratch"
	rm -rf "$scratch"
}
trap clean_up EXIT
trap 'exit 130' INT
trap 'exit 143' TERM
chmod 755 "$scratch" # scripts that root must not run are run by others

mkdir -p "$logs" "$scratch/bin" "$scratch/regress/misc/sk-dummy"
cp "$regress"/*.sh "$regress"/config.h "$scratch/regress/"
cp "$regress"/misc/sk-dummy/sk-dummy.so "$scratch/regress/misc/sk-dummy/" # plays a FIDO device
if [ -z "$control" ]; then
	# A copy, as others may be kept from where the original is.
	cp "$program" "$scratch/bin/p11-agent"
	program=$scratch/bin/p11-agent
	# The scripts ask ssh which types of keys there are, and try them all. Those that
	# p11-agent refuses are left out, or nothing would be seen of the others; the
	# check below, which asks ssh itself, fails once this is not true any more.
	cat >"$scratch/bin/ssh" <<-END
		#!/bin/sh
		case " \$* " in
		*' -Q key-'*) $ssh "\$@" | grep -Ev '$refused' ;;
		*) exec $ssh "\$@" ;;
		esac
	END
	chmod 755 "$scratch/bin/ssh"
	cat >"$scratch/regress/key-types.sh" <<-'END'
		tid="key types"
		eval `${SSHAGENT} ${EXTRA_AGENT_ARGS} -s` >/dev/null
		for t in ${SSH_KEYTYPES}; do
			taken=no
			${SSHADD} -q $OBJ/$t && taken=yes
			expected=yes
			echo $t | grep -Eq "$REFUSED" && expected=no
			verbose "$t: taken: $taken"
			test $taken = $expected || fail "$t: taken: $taken, expected: $expected"
		done
		${SSHAGENT} -k >/dev/null
	END
fi
# No key of this machine is offered, and none of its modules is started: they
# would look at its cards.
{
	echo 'keys = []'
	for file in /usr/share/p11-kit/modules/*.module /etc/pkcs11/modules/*.module; do
		if [ -e "$file" ]; then basename "$file" .module; fi
	done | sort -u | while read -r name; do
		printf '[[module]]\nname = "%s"\nenabled = false\n' "$name"
	done
} >"$scratch/config.toml"
if [ "$(id -u)" = 0 ]; then
	mkdir -p /run/sshd # Debian's sshd wants it, and the service makes it only when it starts
	# For the one script that wants to become somebody else while it is not root.
	cat >"$scratch/bin/sudo" <<-'END'
		#!/bin/sh
		[ "$1 $2" = '-S -u' ] || exit 127
		user=$3
		shift 3
		exec setpriv --reuid "$user" --regid "$(id -g "$user")" --clear-groups --inh-caps=-all --ambient-caps=-all "$@"
	END
	chmod 755 "$scratch/bin/sudo"
fi

# as runs a script: as whom it wants, and with which SUDO.
as() {
	local name=$1 obj=$2 user=
	local -a prefix=()
	shift 2
	export SUDO=
	case $name in
	agent-ptrace)
		# It would install the agent with a set-group-ID bit, by which the kernel
		# protects any program. Ours has to do without, so it gets none here.
		SUDO=:
		user=nobody
		;;
	agent-getpeereid)
		# It runs ssh-add as nobody, so it is somebody else.
		if [ "$(id -u)" = 0 ] || sudo -n true 2>/dev/null; then SUDO=sudo; fi
		user=daemon
		;;
	esac
	if [ "$(id -u)" = 0 ] && [ -n "$user" ]; then
		chown -R "$user:" "$obj"
		prefix=(setpriv --reuid "$user" --regid "$(id -g "$user")" --clear-groups)
		if [ "$SUDO" = sudo ]; then prefix+=(--inh-caps=+setuid,+setgid --ambient-caps=+setuid,+setgid); fi
	fi
	exec "${prefix[@]}" "$@"
}

# run runs one script in a directory and prints how it went. It fails when that is
# not what was expected. The directory has a number for a name: hostkey-agent
# drops all lines with "hostkey" from files that are full of its name. With a third
# argument, XDG_RUNTIME_DIR is set.
run() {
	local name=$1 obj=$scratch/$2 runtime=${3-} status=0 skipped= part child
	local title=$name${runtime:+ with XDG_RUNTIME_DIR} log=$logs/$name${runtime:+-runtime}.log
	mkdir -p "$obj/home/.config/p11-agent" "$obj/tmp"
	if [ -n "$runtime" ]; then mkdir -m 700 "$obj/run"; fi
	cp "$scratch/config.toml" "$obj/home/.config/p11-agent/"
	ln -s "$program" "$obj/ssh-agent"
	cp "$regress"/{mkdtemp,netcat,setuid-allowed} "$obj/"
	(
		cd "$obj" # agent-restrict writes to a file there without its directory
		unset "${!XDG_@}" "${!SSH_@}" "${!TEST_@}" DISPLAY WAYLAND_DISPLAY CDPATH EGREP SUDO SOFTHSM2_CONF
		if [ -n "$runtime" ]; then export XDG_RUNTIME_DIR=$obj/run; fi
		export HOME=$obj/home TMPDIR=$obj/tmp PATH=$scratch/bin:$PATH SHELL=/bin/sh
		export OBJ=$obj BUILDDIR=$scratch/regress TEST_SHELL=sh TEST_SSH_UNSAFE_PERMISSIONS=1
		TEST_SSH_SSHADD=$(command -v ssh-add) TEST_SSH_SSHKEYGEN=$(command -v ssh-keygen)
		export TEST_SSH_SSHADD TEST_SSH_SSHKEYGEN
		export TEST_SSH_SSH=$ssh REFUSED=$refused
		if [ -z "$control" ] && [ "$name" != key-types ]; then TEST_SSH_SSH=$scratch/bin/ssh; fi
		export TEST_SSH_SSHD=$sshd TEST_SSH_SSHAGENT=$obj/ssh-agent
		# In a session of its own there is no terminal to ask the developer on.
		as "$name" "$obj" setsid timeout -k 5 $limit sh "$scratch/regress/test-exec.sh" "$obj" "$scratch/regress/$name.sh"
	) </dev/null >"$log" 2>&1 &
	child=$!
	trap 'kill $child; wait $child; exit 143' TERM
	wait $child || status=$?
	sweep "$obj"
	skipped=$(sed -n 's/^\(SKIPPED: \)\?[Ss]kipped:\? *//p; s/^SKIPPED: *//p' "$log" | head -n 1)
	# The last that test-exec.sh says. Without it the script has not come to its end.
	if [ $status = 0 ] && [ -z "$skipped" ] && ! grep -q '^ok ' "$log"; then status=1; fi
	if [ $status = 124 ]; then echo "stopped after $limit seconds" >>"$log"; fi
	if [ $status != 0 ]; then
		for part in "$obj"/failed-*.log "$obj"/agent.log "$obj"/home/.local/state/p11-agent/agent.log; do
			[ -f "$part" ] || continue
			echo "==> ${part#"$obj/"} <=="
			cat "$part"
		done >>"$log"
	fi

	if [ -n "$skipped" ]; then
		echo "skip $title: $skipped"
		[ "${CI-}" != true ] # there, nothing that it needs may be missing
	elif [ -n "${differs[$name]-}" ]; then
		if [ $status != 0 ]; then
			echo "differs $title: ${differs[$name]}"
		else
			echo "FAIL $title: it passes, although it is listed as different"
			return 1
		fi
	elif [ $status != 0 ]; then
		echo "FAIL $title: see $log"
		return 1
	elif [ "$name" = key-types ]; then
		echo "differs $title: DSA and FIDO keys are refused, so the other scripts run without them"
	else
		echo "ok $title"
	fi
}

for i in "${!scripts[@]}"; do
	for runtime in '' yes; do
		if [ -n "$runtime" ] && [ -n "$control" ]; then continue; fi # it does not look at the variable
		while [ "$(jobs -pr | wc -l)" -ge $jobs ]; do wait -n || true; done
		{ run "${scripts[i]}" "$i${runtime:+r}" $runtime || touch "$scratch/failed"; } &
	done
done
wait
[ ! -e "$scratch/failed" ]
