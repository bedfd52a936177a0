# A database is committed while it works: every few seconds, its filesystem frozen for a moment; each version, mounted elsewhere,
# starts, checks out, and holds what was acknowledged before its freeze and nothing that was begun after.
#
# In: HORCRUX_CLI, HORCRUX_NBD, REPO with the image AMCC, a stopped cluster; PGBIN; PGUID, the owner of its files; COMMITS, how many.
export HORCRUX_STATE_DIR=$STATE HORCRUX_AUTHOR=tests
cli() { "$HORCRUX_CLI" "$@"; }
run=/mnt/pgrun
mkdir -p /mnt/fs /mnt/at $run
chown "$PGUID" $run
chmod 755 /mnt /mnt/tmp

pg() { setpriv --reuid "$PGUID" --clear-groups env HOME=$run PGHOST=$run timeout 900 "$@"; }
start_postgres() {
    pg "$PGBIN/pg_ctl" -D "$1" -w -t 120 -l $run/log \
        -o "-k $run -c listen_addresses= -c shared_buffers=32MB -c max_wal_size=256MB" start >/dev/null ||
        { cat $run/log; fail "PostgreSQL did not start on $1"; }
}
stop_postgres() {
    pg "$PGBIN/pg_ctl" -D "$1" -w -t 120 -m fast stop >/dev/null || { tail -20 $run/log; fail "PostgreSQL did not stop"; }
}
query() { pg psql -U postgres -XAtqc "$1" pgbench; }
field() { cli status db --json | tr -d ' ",' | sed -n "s/^$1://p"; }
all_made() { [ "$(field being_made)" = 0 ]; }

# One row after the other: its number is added to `begun` before it is asked for, and to `acked` once it is answered. The longest wait is in `longest`, in microseconds.
mark() {
    local n=0 longest=0 began took
    coproc SQL { pg psql -U postgres -XAtq pgbench; }
    while [ ! -e $run/stop ]; do
        n=$((n + 1))
        echo $n >>$run/begun
        began=${EPOCHREALTIME/./}
        echo "insert into marks values ($n) returning n;" >&"${SQL[1]}"
        read -r -t 120 _ <&"${SQL[0]}" || { echo "mark $n was not answered" >$run/lost; break; }
        took=$((${EPOCHREALTIME/./} - began))
        echo $n >>$run/acked
        # What was before is not counted: the first row waits for its connection.
        [ ! -e $run/again ] || { longest=0; echo 0 >$run/longest; rm $run/again; continue; }
        [ $took -le $longest ] || { longest=$took; echo $longest >$run/longest; }
    done
    echo "\\q" >&"${SQL[1]}"
}

"$HORCRUX_NBD" serve >>"$UML_OUT/server.log" 2>&1 &
server_pid=$!
wait_until "the daemon's answer" cli status
cli volume create db --access "$REPO" --name AMCC
cli mount db /mnt/fs
start_postgres /mnt/fs
query "create table marks (n bigint primary key)"
: >$run/acked
mark &
marker=$!
pg pgbench -U postgres -n -c 2 -j 1 -T $((COMMITS * 4 + 6)) pgbench >$run/bench 2>&1 &
bench=$!
started() { [ -s $run/acked ]; }
wait_until "the first row" started
touch $run/again
for commit in $(seq "$COMMITS"); do
    sleep 3
    before=$(tail -n 1 $run/acked)
    cli commit -m "version $commit" db
    after=$(tail -n 1 $run/begun)
    echo "$before $after" >$run/bounds.$commit
    say "commit $commit: from $before acknowledged to $after begun"
done
wait $bench || { cat $run/bench; fail "pgbench failed"; }
grep -E "failed transactions: 0" $run/bench || { cat $run/bench; fail "transactions failed"; }
touch $run/stop
wait $marker
[ ! -e $run/lost ] || fail "$(cat $run/lost)"
longest=$(cat $run/longest)
say "longest wait for one row: $longest us"
wait_until "all commits to be made" all_made
stop_postgres /mnt/fs
cli umount db
no_errors "after the commits"
[ "$(field ahead)" = "$COMMITS" ] || fail "$(field ahead) commits, not $COMMITS"
cli log db | grep -c "^commit"

for commit in $(seq "$COMMITS"); do
    cli clone db at
    cli checkout at "HEAD~$((COMMITS - commit))" --force
    cli mount at /mnt/at
    start_postgres /mnt/at
    read -r before after <$run/bounds.$commit
    found=$(query "select count(*), coalesce(max(n), 0) from marks")
    rows=${found%|*} highest=${found#*|}
    [ "$rows" = "$highest" ] || fail "version $commit has $rows marks up to $highest"
    [ "$highest" -ge "$before" ] || fail "version $commit ends with $highest, and $before was acknowledged before"
    [ "$highest" -le "$after" ] || fail "version $commit ends with $highest, and $after was the last that was begun"
    pg "$PGBIN/pg_amcheck" -U postgres --install-missing pgbench
    say "version $commit: $highest marks, pg_amcheck: clean"
    stop_postgres /mnt/at
    cli umount at
    cli volume rm --force at
done
[ "$longest" -lt "${STALL_US:-500000}" ] || fail "the longest stall was $longest us"
kill -TERM $server_pid
wait $server_pid || fail "the daemon did not end well"
say "every version holds what it should"
