# What the scripts that run under systemd have in common.
ctl=(systemctl) log=(journalctl)

fail() {
	echo "FAIL: $*" >&2
	"${ctl[@]}" --no-pager status 'p11-agent*' >&2 || true
	"${log[@]}" --no-pager -n 50 >&2 || true
	exit 1
}
step() { echo "== $*"; }
# eventually waits for a condition, as long as the tests in Go do.
patience=180
eventually() {
	local end=$((SECONDS + patience))
	while ! "$@"; do
		if [ $SECONDS -ge $end ]; then fail "it never came true: $*"; fi
		sleep .1
	done
}
is() { if [ "$2" != "$3" ]; then fail "$1 is '$2', not '$3'"; fi; }
has() { case $2 in *"$3"*) ;; *) fail "$1 does not have '$3': $2" ;; esac; }
# says tells whether systemd shows this text with a unit. It learns of changes a moment
# later than clients do.
says() { case $("${ctl[@]}" status "$1") in *"$2"*) ;; *) return 1 ;; esac; }
# softhsm prints where SoftHSM's module is.
softhsm() { ls /usr/lib/softhsm/libsofthsm2.so /usr/lib64/pkcs11/libsofthsm2.so 2>/dev/null | head -n 1; }
