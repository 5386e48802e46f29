# Build, check and install p11-agent. "make help" lists the targets.

PREFIX     ?= /usr/local
DESTDIR    ?=
FUZZTIME   ?= 10s
STRESSTIME ?= 5m
RACE       ?= -race
TESTFLAGS  ?= -timeout 30m
SKIPS      ?=
BENCH      ?= .
BENCHFLAGS ?=
PROGRAM    ?= build/p11-agent

# What is linked by cgo is the code in token/module, and only there.
export CGO_ENABLED = 1

SHELL       = /bin/bash
.SHELLFLAGS = -eu -o pipefail -c

# The tools are pinned in a go.mod of their own, so that they are no part of the
# program's module graph.
TOOL = go tool -modfile=tools/go.mod

MANPAGES    = $(patsubst docs/%.scd,build/man/%,$(wildcard docs/*.scd))
COMPLETIONS = $(addprefix build/completion/,bash zsh fish)
SOURCES     = go.mod go.sum $(shell find agent cmd/p11-agent pinentry systemd token -name testdata -prune -o -type f ! -name '*_test.go' -print)

.DEFAULT_GOAL = build
.DELETE_ON_ERROR:
# One target after the other, in the order they are named in, whatever -j says:
# building needs what deps installs, and go spreads its work over the processors
# by itself.
.NOTPARALLEL:
.PHONY: help deps deps-demo deps-check build test stress conformance lint sizes vuln check check-fast demo fuzz bench microbench profile pictures install deb rpm packages clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "%-12s%s\n", $$1, $$2 }' Makefile

deps: ## install what build and install need and the machine lacks
	@tools/deps.sh build

deps-demo: ## install what demo needs besides
	@tools/deps.sh demo

deps-check: ## install what check needs besides
	@tools/deps.sh check

# The version is stamped by us: go would ask git itself, and fail where git does
# not trust the owner of the tree (root installing what a user has built). The first
# build takes a minute, so go says what it is at (-v).
#
# A module process runs vendors' code in this program. So it lies at another address
# each time (PIE), and nothing that is called through a table can be changed after
# the start (RELRO with all symbols bound).
#
# -w leaves out DWARF, a fifth of the file, which only debuggers read. The symbols stay:
# perf names functions by them. The traces of a panic need neither.
LDFLAGS = -w -X main.version=$$(tools/version.sh) -bindnow -extldflags=-Wl,-z,relro,-z,noexecstack

build: ## build build/p11-agent, or PROGRAM
	go build -v -trimpath -buildvcs=false -buildmode=pie -ldflags "$(LDFLAGS)" -o '$(PROGRAM)' ./cmd/p11-agent

# The tests run the seeds of the fuzz targets, too. Those that the machine cannot run
# are skipped, and count as failed where SKIPS does not match their reason.
test: ## run the tests under the race detector
	@mkdir -p build
	go run ./cmd/testrun -o build/tests -skips '$(SKIPS)' -- $(RACE) $(TESTFLAGS) ./...

# The test bounds itself by STRESSTIME. What it did is in build/stress.log.
stress: ## sign with smart cards while they are pulled and their daemons killed, for STRESSTIME
	@mkdir -p build
	@go test $(RACE) -count 1 -timeout 0 -v -run '^TestPIVStress$$' ./token -stress $(STRESSTIME) >build/stress.log 2>&1 || \
		{ cat build/stress.log; exit 1; }
	@grep -e '-stress-seed' -e 'signatures,' -e '^--- ' build/stress.log

# docs/CONFORMANCE.md tells what is run, and what differs.
conformance: build ## run OpenSSH's own tests of ssh-agent against ours
	@tools/conformance.sh

# The fake modules of the tests close their connection. A module process ends instead.
lint: ## check the form of the code, and that go.mod is tidy
	@unformatted=$$($(TOOL) gofumpt -l .); \
	if [ -n "$$unformatted" ]; then echo "not as gofumpt writes it:"; echo "$$unformatted"; exit 1; fi
	go vet ./...
	$(TOOL) staticcheck ./...
	@dead=$$($(TOOL) deadcode ./cmd/... && $(TOOL) deadcode -test ./...); \
	dead=$$(grep -v 'ModuleConn\.Close$$' <<<"$$dead" || true); \
	if [ -n "$$dead" ]; then echo "not called by the programs, or by no test either:"; echo "$$dead"; exit 1; fi
	go -C tools test ./...
	go mod verify
	go mod tidy -diff
	go -C tools mod tidy -diff

sizes: ## print what each package holds, and how its files lean on each other
	@go -C tools run ./sizes ..

# Not a part of lint or check: it asks a database on the network, which machines
# that only build may not reach, and its answer changes without a change here.
vuln: ## look for known vulnerabilities in what is called
	$(TOOL) govulncheck ./...

check: deps-check build lint test stress conformance packages ## do all that has to pass before a change goes in: 15 minutes on two processors
	@cat build/tests

# What check-fast leaves out, besides conformance and packages. Tests of BOOT start a whole
# system. Tests of LOAD repeat one thing until the machine is busy: fifty logins at once, a
# hang or a crash at each call of each module, thousands of objects, signatures or lines of log.
# They take a third of the time of all tests. Tests of WAIT wait for tens of seconds, until
# pcscd notices a card or a time limit has passed. With -short, some tests repeat less. lint has
# run go vet.
#
# Most tests wait for other processes rather than work, so more of them run at once than there
# are processors. The two packages that take longest are first.
BOOT = ^(TestUserManager|TestDesk|TestBoot|TestReadme)$$
LOAD = ^(TestPIVStress|TestEveryCall|TestSharingAllTheTime|TestLogoutUnderLoad|TestAttack14ManyTokens|TestBigNamed|TestStress|TestPIVPulls)$$|^TestStories$$/^(big-token|lockout|parallel)$$|^TestAttacks$$/^(08-certificates|10-flood|11-log|13-software-signatures)$$
WAIT = ^(TestBadModules|TestPIVHeals|TestRelease|TestPulledAndModuleHangs)$$|^TestStories$$/^(failure-notice|heal|remote)$$

check-fast: deps-check build lint ## do the part of check to run before each commit
	go run ./cmd/testrun -- -short -vet off -ldflags=-w -timeout 10m -p 4 -parallel 6 -skip '$(BOOT)|$(LOAD)|$(WAIT)' \
		./token ./cmd/p11-agent ./token/module ./cmd/bench ./pinentry ./token/tokentest ./agent/sshagent ./...

demo: deps-demo build ## show the agent at work with a software token
	build/p11-agent demo

fuzz: ## run each fuzz target for FUZZTIME
	@targets=$$(go test -list '^Fuzz' ./... | awk '/^Fuzz/ { name[n++] = $$1 } /^ok/ { while (n > 0) print $$2, name[--n] }'); \
	[ -n "$$targets" ] || { echo "no fuzz target found"; exit 1; }; \
	while read -r package target; do \
		echo "$$package $$target"; \
		go test -run '^$$' -fuzz "^$$target\$$" -fuzztime $(FUZZTIME) -fuzzminimizetime 10x "$$package" </dev/null; \
	done <<<"$$targets"

# docs/PERFORMANCE.md tells what is measured. BENCHFLAGS are the flags of
# cmd/bench, such as -only.
bench: deps-check build ## compare with ssh-agent and the bare token, which takes ten minutes
	go run ./cmd/bench $(BENCHFLAGS)

microbench: ## run the benchmarks of single stages that match BENCH
	go test -run '^$$' -bench '$(BENCH)' -benchmem ./...

profile: build ## tell with perf where agent and module process spend their time while they sign
	go run ./cmd/bench -profile build/perf.data

# The README shows them. Make them again when the words of prompts change.
pictures: deps-check build ## make the pictures in docs/pictures with the built program
	tools/pictures.sh

# It takes what "make build" has left when that is newer than the sources, so
# that "sudo make install" needs no Go.
#
# The kernel lets nobody look into a process, from its first moment on, whose user
# cannot read the program's file: hence its mode.
install: build/p11-agent $(MANPAGES) $(COMPLETIONS) ## install under DESTDIR and PREFIX
	install -D -m 711 build/p11-agent '$(DESTDIR)$(PREFIX)/bin/p11-agent'
	for page in $(MANPAGES); do \
		install -D -m 644 "$$page" "$(DESTDIR)$(PREFIX)/share/man/man$${page##*.}/$${page##*/}"; \
	done
	install -D -m 644 build/completion/bash '$(DESTDIR)$(PREFIX)/share/bash-completion/completions/p11-agent'
	install -D -m 644 build/completion/zsh '$(DESTDIR)$(PREFIX)/share/zsh/site-functions/_p11-agent'
	install -D -m 644 build/completion/fish '$(DESTDIR)$(PREFIX)/share/fish/vendor_completions.d/p11-agent.fish'
	for unit in user/p11-agent.socket user/p11-agent.service system/p11-agent@.socket system/p11-agent@.service; do \
		install -D -m 644 "systemd/units/$$unit" "$(DESTDIR)$(PREFIX)/lib/systemd/$$unit"; \
		sed -i 's|^ExecStart=/usr/bin/|ExecStart=$(PREFIX)/bin/|' "$(DESTDIR)$(PREFIX)/lib/systemd/$$unit"; \
	done
	install -D -m 644 systemd/units/system/sysusers.conf '$(DESTDIR)$(PREFIX)/lib/sysusers.d/p11-agent.conf'
	install -D -m 644 systemd/units/user/environment.conf '$(DESTDIR)$(PREFIX)/share/doc/p11-agent/examples/50-p11-agent.conf'
	install -D -m 644 systemd/units/user/ssh_config '$(DESTDIR)$(PREFIX)/share/doc/p11-agent/examples/ssh_config'

# What both packages hold: what is installed, manuals compressed, licence and
# changelog. The C library has to be as new as the one that was linked with.
build/package: build build/p11-agent
	rm -rf $@
	$(MAKE) install DESTDIR='$(CURDIR)/$@' PREFIX=/usr
	gzip -9n $@/usr/share/man/man*/*
	install -m 644 LICENSE $@/usr/share/doc/p11-agent/copyright
	gzip -9nc CHANGELOG.md >$@/usr/share/doc/p11-agent/changelog.gz

deb: build/package ## make a package for Debian and Ubuntu in build
	$(call package,deb)

rpm: build/package ## make a package for Fedora and its relatives in build
	$(call package,rpm)

package = PACKAGE_VERSION=$$(tools/version.sh --package) PACKAGE_ARCH=$$(go env GOARCH) \
	PACKAGE_GLIBC=$$(grep -aoE 'GLIBC_2\.[0-9]+' build/p11-agent | sort -uV | tail -n 1 | cut -d_ -f2) \
	$(TOOL) nfpm package -f tools/nfpm.yaml -p $(1) -t build/p11-agent.$(1)

packages: deb rpm ## make both packages, install one on a fresh system and use it
	@tools/packages.sh build/p11-agent.deb build/p11-agent.rpm

build/p11-agent: $(SOURCES)
	$(MAKE) build PROGRAM=$@

build/man/%: docs/%.scd
	@mkdir -p $(@D)
	scdoc <$< >$@

build/completion/%: build/p11-agent
	@mkdir -p $(@D)
	build/p11-agent completion $* >$@

clean: ## remove what was built
	rm -rf build
