#!/bin/bash
# Runs benches/cold.py (see its head, and --help) with Debian's python3, as root, after building what it measures.
set -euo pipefail
cd "$(dirname "$0")/.."
tests/packages.sh --bench
tests/object_stores.sh
if [ -z "${HORCRUX_BIN_DIR:-}" ]; then
    cargo build --release --locked --quiet --workspace --bins --examples
fi
exec /usr/bin/python3 -B benches/cold.py "$@"
