#!/bin/bash
# Runs every fuzz target for a while: tests/fuzz.sh SECONDS. A finding is left in nbd-proto/fuzz/artifacts.
set -euo pipefail
cd "$(dirname "$0")/../nbd-proto"
seconds=${1:-60}
[ -d fuzz ] || { echo "fuzz.sh: no nbd-proto/fuzz" >&2; exit 1; }
cargo +nightly --version >/dev/null 2>&1 ||
    { echo "fuzz.sh: needs a nightly toolchain: rustup toolchain install nightly --profile minimal" >&2; exit 1; }
command -v cargo-fuzz >/dev/null || cargo install --locked cargo-fuzz
targets=$(cargo +nightly fuzz list)
for target in $targets; do
    echo "fuzz: $target for $seconds s"
    cargo +nightly fuzz run "$target" -- -max_total_time="$seconds" -max_len=8192 -rss_limit_mb=1024 -timeout=10
done
echo "fuzz: $(wc -w <<<"$targets") targets, nothing found"
