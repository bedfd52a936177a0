#!/bin/bash
# cargo-deny: licences, bans and sources always; advisories against the newest database that can be had.
#
# The database lives in a git repository on the internet. Where that is out of reach an older copy is used; where
# there is none, the check of advisories can't be made, and this says so loudly instead of passing quietly.
# HORCRUX_NEED_ADVISORIES=1 makes that an error.
set -euo pipefail
cd "$(dirname "$0")/.."
deny=(cargo deny --log-level error)

"${deny[@]}" check --hide-inclusion-graph licenses bans sources

loud() {
    echo "########################################################################" >&2
    printf '## %s\n' "$@" >&2
    echo "########################################################################" >&2
}
if timeout 120 "${deny[@]}" fetch db >/dev/null 2>&1; then
    "${deny[@]}" check --disable-fetch advisories
elif "${deny[@]}" check --disable-fetch advisories >/dev/null 2>&1; then
    loud "cargo-deny: the advisory database can't be reached; checked against the copy from before: clean"
elif ls "${CARGO_HOME:-$HOME/.cargo}"/advisory-db*/*/.git >/dev/null 2>&1; then
    # A copy is there, so it was the check that failed: show it.
    "${deny[@]}" check --disable-fetch advisories
else
    loud "cargo-deny: ADVISORIES NOT CHECKED: the database can't be reached and there is no copy here" \
        "run 'cargo deny check advisories' where https://github.com/RustSec/advisory-db is reachable"
    [ -z "${HORCRUX_NEED_ADVISORIES:-}" ] || exit 1
fi
