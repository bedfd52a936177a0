# A database runs on the disk: a cluster initialised on the host (pgbench -i) is mounted, started, driven with
# pgbench, stopped, checked page by page; then served again and checked once more.
#
# In: FS; PGBIN; PGUID, the owner of the cluster's files; CLIENTS, SECONDS_RUN; lib.sh's variables. The cluster is the
#     image's top directory or its subdirectory PGSUB.
dev=/dev/nbd0
data=/mnt/fs/${PGSUB:-}
mkdir -p /mnt/fs /mnt/pgrun
chown "$PGUID" /mnt/pgrun
chmod 755 /mnt /mnt/tmp

# As the cluster's owner: PostgreSQL refuses root. A wait that outlives its bound is an error.
pg() { setpriv --reuid "$PGUID" --clear-groups env HOME=/mnt/pgrun PGHOST=/mnt/pgrun timeout $((300 + ${SECONDS_RUN:-10})) "$@"; }
start_postgres() {
    pg "$PGBIN/pg_ctl" -D "$data" -w -t 120 -l /mnt/pgrun/log \
        -o "-k /mnt/pgrun -c listen_addresses= -c shared_buffers=64MB -c max_wal_size=256MB" start >/dev/null ||
        { cat /mnt/pgrun/log; fail "PostgreSQL did not start"; }
    say "PostgreSQL is up"
}
stop_postgres() {
    pg "$PGBIN/pg_ctl" -D "$data" -w -t 120 -m fast stop >/dev/null ||
        { tail -20 /mnt/pgrun/log; fail "PostgreSQL did not stop"; }
    say "PostgreSQL is down"
}
query() { pg psql -U postgres -XAtqc "$1" pgbench; }

# TPC-B's own invariant: every transaction adds one delta to an account, a teller, a branch and the history.
balanced() {
    local sums
    sums=$(query "select (select sum(abalance) from pgbench_accounts) = (select sum(tbalance) from pgbench_tellers)
        and (select sum(tbalance) from pgbench_tellers) = (select sum(bbalance) from pgbench_branches)
        and (select sum(bbalance) from pgbench_branches) = (select coalesce(sum(delta), 0) from pgbench_history)")
    [ "$sums" = t ] || fail "the balances do not add up: $sums"
    say "balances add up"
}

start_server
attach $dev
mount -t "$FS" $dev /mnt/fs
start_postgres
pg pgbench -U postgres -n -c "${CLIENTS:-4}" -j 2 -T "${SECONDS_RUN:-10}" pgbench
balanced
transactions=$(query 'select count(*) from pgbench_history')
[ "$transactions" -gt 0 ] || fail "pgbench committed nothing"
say "$transactions transactions in the history"
pg "$PGBIN/pg_amcheck" -U postgres --install-missing pgbench
say "pg_amcheck: clean"
stop_postgres
pg "$PGBIN/pg_checksums" --check -D "$data"
umount /mnt/fs
fsck_clean $dev "$FS"
detach $dev
stop_server

start_server
attach $dev
mount -t "$FS" $dev /mnt/fs
start_postgres
again=$(query 'select count(*) from pgbench_history')
[ "$again" = "$transactions" ] || fail "$again transactions after serving again, $transactions before"
balanced
stop_postgres
umount /mnt/fs
detach $dev
stop_server
