# The whole set-up on Debian 12 with Rust and a C compiler: `make demo` and `make test`.
#
#   make demo      builds, images a real directory, serves it, reads and writes it with real clients
#   make test      packages, lint, every test, doc tests: what CI runs
#   make lint      fmt, clippy with warnings denied, shell syntax, cargo-deny
#   make soak      the long runs: every test with HORCRUX_SOAK=1 (10,000 crash sequences, 50 kills, more power cuts, Ceph, GlusterFS)
#   make fuzz      every fuzz target for FUZZ_SECONDS each (needs a nightly toolchain)
#   make bench     criterion, then benches/*.sh against the rivals
#   make packages  installs missing Debian packages when root, else names them and fails
SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := test
.PHONY: demo test lint soak fuzz bench packages tools rig-selfcheck clean

NEXTEST_VERSION := 0.9.143
DENY_VERSION := 0.20.2
FUZZ_SECONDS ?= 60
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
	cargo test --locked --workspace --doc --quiet
	cargo nextest run --locked --workspace --profile ci

lint: tools
	cargo fmt --all --check
	cargo clippy --locked --workspace --all-targets -- -D warnings
	for script in $$(git ls-files '*.sh' .ci/run); do bash -n "$$script"; done
	tests/deny.sh

soak: tools
	@tests/packages.sh --soak
	HORCRUX_SOAK=1 cargo nextest run --locked --workspace --profile soak

fuzz:
	tests/fuzz.sh $(FUZZ_SECONDS)

bench: packages
	cargo build --release --locked --workspace --bins --examples
	cargo bench --locked --workspace
	benches/compare.sh
	benches/image.sh
	benches/open.sh

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
