# The whole set-up on Debian 12 with Rust and a C compiler: `make demo` and `make test`.
#
#   make demo      builds, images a real directory, serves it, reads and writes it with real clients
#   make test      packages, lint, every test, doc tests: what CI runs
#   make lint      fmt, clippy with warnings denied, shell syntax, cargo-deny
#   make soak      the long runs: every test with HORCRUX_SOAK=1 (10,000 crash sequences, 50 kills, more power cuts, Ceph, GlusterFS)
#   make fuzz      every fuzz target for FUZZ_SECONDS each (needs a nightly toolchain)
#   make bench     criterion, then benches/*.sh against the rivals
#   make install   builds and installs programs, units, man pages and completions below DESTDIR/PREFIX
#   make deb       the same as a Debian package, in target/debian
#   make plugin    Docker's managed plugin, in target/plugin
#   make packages  installs missing Debian packages when root, else names them and fails
SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := test
.PHONY: demo test lint soak fuzz bench packages tools rig-selfcheck clean manual install deb plugin

NEXTEST_VERSION := 0.9.143
DENY_VERSION := 0.20.2
DEB_VERSION := 3.8.0
FUZZ_SECONDS ?= 60
# What is packaged: `release`, or `dev` to try the packaging itself.
PROFILE ?= release
BUILT := target/$(if $(filter dev,$(PROFILE)),debug,$(PROFILE))
PROGRAMS := horcrux-nbd horcrux-cli horcrux-dv
PREFIX ?= /usr/local
DESTDIR ?=
UNITS := horcrux-nbd.service horcrux-dv.service horcrux-dv.socket
# Debian keeps mkfs and insmod where a user's PATH does not look; cargo installs beside cargo.
export PATH := $(PATH):$(HOME)/.cargo/bin:/usr/local/sbin:/usr/sbin:/sbin
# The tools of the tests are built once for short runs: without this, building them takes longer than the tests.
INSTALL := CARGO_PROFILE_RELEASE_OPT_LEVEL=1 CARGO_PROFILE_RELEASE_LTO=off CARGO_PROFILE_RELEASE_CODEGEN_UNITS=16 \
	cargo install --locked

demo: packages
	cargo build --release --locked --workspace --bins
	tests/demo.sh

test: packages tools lint
	cargo build --locked --workspace --bins
	$(MAKE) --no-print-directory deb PROFILE=dev
	cargo test --locked --workspace --doc --quiet
	cargo nextest run --locked --workspace --profile ci

lint: tools
	cargo fmt --all --check
	cargo clippy --locked --workspace --all-targets -- -D warnings
	for script in $$(git ls-files '*.sh' .ci/run); do bash -n "$$script"; done
	tests/deny.sh

soak: tools
	@tests/packages.sh --soak
	cargo build --locked --workspace --bins
	$(MAKE) --no-print-directory deb PROFILE=dev
	HORCRUX_SOAK=1 cargo nextest run --locked --workspace --profile soak

fuzz:
	tests/fuzz.sh $(FUZZ_SECONDS)

bench: packages
	cargo build --release --locked --workspace --bins --examples
	cargo bench --locked --workspace
	benches/compare.sh
	benches/image.sh
	benches/open.sh

manual:
	cargo build --profile $(PROFILE) --locked --workspace --bins
	rm -rf target/manual
	$(BUILT)/horcrux-cli manual target/manual
	$(BUILT)/horcrux-nbd manual target/manual
	$(BUILT)/horcrux-dv --manual target/manual
	gzip -9n target/manual/man/*.1

# The units name the programs where they are installed.
install: manual
	install -d $(DESTDIR)$(PREFIX)/bin $(DESTDIR)$(PREFIX)/share/man/man1 $(DESTDIR)/etc/modules-load.d $(DESTDIR)/etc/modprobe.d \
		$(DESTDIR)/etc/systemd/system $(DESTDIR)$(PREFIX)/share/bash-completion/completions \
		$(DESTDIR)$(PREFIX)/share/zsh/site-functions $(DESTDIR)$(PREFIX)/share/fish/vendor_completions.d
	install -m 755 $(addprefix $(BUILT)/,$(PROGRAMS) git-horcrux) $(DESTDIR)$(PREFIX)/bin
	install -m 644 target/manual/man/*.1.gz $(DESTDIR)$(PREFIX)/share/man/man1
	for program in $(PROGRAMS); do \
		install -m 644 target/manual/bash/$$program.bash $(DESTDIR)$(PREFIX)/share/bash-completion/completions/$$program; \
	done
	install -m 644 target/manual/zsh/_horcrux-* $(DESTDIR)$(PREFIX)/share/zsh/site-functions
	install -m 644 target/manual/fish/*.fish $(DESTDIR)$(PREFIX)/share/fish/vendor_completions.d
	for unit in $(UNITS); do \
		sed 's|/usr/bin/horcrux|$(PREFIX)/bin/horcrux|' plugin/systemd/$$unit >$(DESTDIR)/etc/systemd/system/$$unit; \
	done
	install -m 644 plugin/systemd/modules-load.conf $(DESTDIR)/etc/modules-load.d/horcrux.conf
	install -m 644 plugin/systemd/modprobe.conf $(DESTDIR)/etc/modprobe.d/horcrux.conf

deb: manual
	@command -v cargo-deb >/dev/null || $(INSTALL) cargo-deb --version $(DEB_VERSION)
	cargo deb --no-build $(if $(filter dev,$(PROFILE)),--fast,--strip) --profile $(PROFILE) -p horcrux

plugin:
	cargo build --profile $(PROFILE) --locked -p horcrux -p horcrux-dv --bins
	plugin/managed/build.sh $(BUILT) target/plugin

packages:
	@tests/packages.sh

tools: packages
	@tests/object_stores.sh
	@command -v cargo-nextest >/dev/null || $(INSTALL) cargo-nextest --version $(NEXTEST_VERSION)
	@command -v cargo-deny >/dev/null || $(INSTALL) cargo-deny --version $(DENY_VERSION)

# Proves the User Mode Linux rig with nbdkit in the product's place.
rig-selfcheck: packages
	tests/uml/selfcheck.sh

clean:
	cargo clean
