#!/bin/bash
# Runs benches/open.py (see its head, and --help) with Debian's python3, after building what it measures.
set -euo pipefail
cd "$(dirname "$0")/.."
if [ -z "${HORCRUX_BIN_DIR:-}" ]; then
    cargo build --release --locked --quiet --workspace --bins --examples
fi
exec /usr/bin/python3 benches/open.py "$@"
