#!/bin/bash
# Makes a PostgreSQL cluster with checksums and a pgbench database, stopped cleanly: a real data directory to image.
#
#   tests/uml/postgres-cluster.sh DIR SCALE      DIR must not exist; SCALE 1 is about 15 MiB
#
# Run by root, the cluster belongs to the user postgres (or nobody), since PostgreSQL refuses root.
set -euo pipefail
made=$1 scale=$2
[ ! -e "$made" ] || { echo "postgres-cluster.sh: $made exists" >&2; exit 2; }
bin=$(ls -d /usr/lib/postgresql/*/bin | sort -V | tail -1)
# Made where its owner can reach it, then moved: the way to DIR may be closed to everyone but root.
sock=$(mktemp -d)
data=$sock/data
mkdir "$data"
as=()
if [ "$(id -u)" = 0 ]; then
    user=postgres
    id -u "$user" >/dev/null 2>&1 || user=nobody
    chown "$user" "$data" "$sock"
    as=(setpriv --reuid "$user" --clear-groups env "HOME=$sock")
fi
pg() { (cd "$sock" && "${as[@]}" env PGHOST="$sock" "$@"); }
# fsync is off for making it only; the stop syncs nothing, so `sync -f` below does.
stop() { pg "$bin/pg_ctl" -D "$data" -w -m fast stop >/dev/null 2>&1 || true; rm -rf "$sock"; }
trap stop EXIT
pg "$bin/initdb" -D "$data" -U postgres -A trust --data-checksums --no-sync >/dev/null
pg "$bin/pg_ctl" -D "$data" -w -t 120 -l "$sock/log" \
    -o "-k $sock -c listen_addresses= -c fsync=off -c max_wal_size=512MB" start >/dev/null || { cat "$sock/log" >&2; exit 1; }
pg createdb -U postgres pgbench
pg pgbench -U postgres -q -i -s "$scale" pgbench >/dev/null 2>&1
pg "$bin/pg_ctl" -D "$data" -w -t 120 -m fast stop >/dev/null
trap 'rm -rf "$sock"' EXIT
mv "$data" "$made"
sync -f "$made"
