# The story of the README: a PostgreSQL directory and a home full of attachments are imaged, one to SeaweedFS and one over SSH, and used by containers. Old option names too.
#
# In: WEED; PG, a cluster's directory, of the user PGUID; PGBIN; HOME_DIR, the home, and its MANIFEST; what docker-lib.sh needs.
# A container's programs are the host's: /usr is mounted into it.
export AWS_ACCESS_KEY_ID=AKIDSTORY AWS_SECRET_ACCESS_KEY=story-5ecret AWS_EC2_METADATA_DISABLED=true HOME=/mnt/root-home
start_stores() {
    mkdir -p /mnt/weed /mnt/remote "$HOME/.ssh" /run/sshd
    chmod 700 "$HOME" "$HOME/.ssh"
    cat >/mnt/weed/s3.json <<-JSON
	{"identities":[{"name":"h","credentials":[{"accessKey":"$AWS_ACCESS_KEY_ID","secretKey":"$AWS_SECRET_ACCESS_KEY"}],
	 "actions":["Admin","Read","Write","List","Tagging"]}]}
	JSON
    "$WEED" server -dir=/mnt/weed -ip=127.0.0.1 -ip.bind=127.0.0.1 -s3 -s3.port=8333 -s3.config=/mnt/weed/s3.json -volume.max=20 -master.volumeSizeLimitMB=64 \
        -master.telemetry=false -s3.port.iceberg=0 -s3.port.lance=0 >"$UML_OUT/weed.log" 2>&1 &
    weed_pid=$!
    ssh-keygen -q -t ed25519 -N '' -f /mnt/host_key
    ssh-keygen -q -t ed25519 -N '' -f "$HOME/.ssh/id_ed25519"
    echo "[127.0.0.1]:2222 $(cut -d' ' -f1,2 /mnt/host_key.pub)" >"$HOME/.ssh/known_hosts"
    printf '%s\n' 'ListenAddress 127.0.0.1:2222' 'HostKey /mnt/host_key' "AuthorizedKeysFile $HOME/.ssh/id_ed25519.pub" 'StrictModes no' 'UsePAM no' 'UseDNS no' \
        'PidFile none' 'PasswordAuthentication no' 'PermitRootLogin yes' 'Subsystem sftp internal-sftp' >/mnt/sshd_config
    /usr/sbin/sshd -D -E /mnt/sshd.log -f /mnt/sshd_config &
    sshd_pid=$!
    takes_a_bucket() { curl -sS --max-time 10 --fail --aws-sigv4 aws:amz:us-east-1:s3 --user "$AWS_ACCESS_KEY_ID:$AWS_SECRET_ACCESS_KEY" -X PUT http://127.0.0.1:8333/volumes; }
    wait_until "SeaweedFS to take a bucket" takes_a_bucket
    say "SeaweedFS and sshd are up"
}
WAIT_S=120
start_stores
pg_repo=minio://127.0.0.1:8333/volumes/repo home_repo=scp://root@127.0.0.1:2222/mnt/remote/repo
REPO=none
. "${UML_LIB%/*}/docker-lib.sh"
start_all

cli image-from-dir --size 1G prod "$PG" "$pg_repo"
cli generate -s 4M --size 1G jira "$HOME_DIR" "$home_repo"
say "both are imaged"

docker volume create -d horcrux-nbd -o name=prod -o access="$pg_repo" pgdata >/dev/null
docker volume create -d horcrux-nbd -o --name=jira -o --access="$home_repo" home >/dev/null
refused "no image 'prd'" docker volume create -d horcrux-nbd -o name=prd -o access="$pg_repo" v3
refused "no branch, tag or commit 'v9' in prod; it has: main" docker volume create -d horcrux-nbd -o name=prod -o access="$pg_repo" -o version=v9 v3
# Docker takes a second create of its own volume for done, whatever its options; who asks the driver is told.
driver Create "{\"Name\": \"pgdata\", \"Opts\": {\"name\": \"jira\", \"access\": \"$home_repo\"}}" | grep -q "there is a volume pgdata already, with " ||
    fail "a volume was made twice"

# The host's programs in a container, as the cluster's owner.
on_host() { docker run --network none -v /usr:/usr:ro "$@"; }
start_db() {
    on_host -d --name db --user "$PGUID" -v pgdata:/data -e LC_ALL=C.UTF-8 tools "$PGBIN/postgres" -D /data -k /tmp -c listen_addresses= -c shared_buffers=32MB >/dev/null
    wait_until "PostgreSQL to answer" query 'select 1'
}
query() { docker exec --user "$PGUID" db "$PGBIN/psql" -h /tmp -U postgres -XAtqc "$1" pgbench; }
before=$(date +%s%N)
start_db
say "a container with a cold database answers after $((($(date +%s%N) - before) / 1000000)) ms"
[ "$(query 'select count(*) from pgbench_accounts')" = 100000 ] || fail "rows are missing"
query 'create table story as select g from generate_series(1, 1000) g'
docker volume inspect -f '{{json .Status}}' pgdata

on_host -d --name jira -v home:/data tools sh -c 'while :; do sleep 1; done' >/dev/null
# hostfs, where the guest has the home from, knows whole seconds only.
tree check --ignore mtime_ns "$MANIFEST" "$(docker volume inspect -f '{{.Mountpoint}}' home)"
docker cp "$PG/PG_VERSION" jira:/data/attached
[ "$(docker exec jira cat /data/attached)" = "$(cat "$PG/PG_VERSION")" ] || fail "the container does not see what was copied in"
docker cp jira:/data/attached /mnt/out
cmp /mnt/out "$PG/PG_VERSION"
say "both are used and changed"

# A restart of each: the containers do not notice.
end_it "$server_pid" KILL
start_daemon
end_it "$driver_pid" TERM
start_driver
[ "$(query 'select count(*) from story')" = 1000 ] || fail "the table is lost"
docker stop -t 60 db >/dev/null
docker rm db >/dev/null
docker restart -t 5 jira >/dev/null
docker exec jira test -s /data/attached || fail "what was copied in is lost"
start_db
[ "$(query 'select count(*) from story')" = 1000 ] || fail "the table is lost"
no_errors "after the restarts"
say "each was restarted"

# With stores that are 200 ms away, a cold disk of 1 TiB is mounted within 5 s all the same.
is_open() { : <>"/dev/tcp/127.0.0.1/$1"; }
# far PORT PORT_BEHIND_THE_LINE URL_BEHIND_THE_LINE DIR
far() {
    local took
    sleep 600 | "$FAULT_PROXY" --listen "127.0.0.1:$2" --to "127.0.0.1:$1" --rtt-ms 200 >/dev/null &
    wait_until "the line" is_open "$2"
    cli image-from-dir --size 1T "far$1" "$4" "${3/:$2/:$1}" >/dev/null
    driver Create "{\"Name\": \"far$1\", \"Opts\": {\"name\": \"far$1\", \"access\": \"$3\"}}" | grep -q '"Err":""' || fail "it was not made"
    took=$(date +%s%N)
    driver Mount "{\"Name\": \"far$1\", \"ID\": \"a\"}" | grep -q '"Err":""' || fail "it was not mounted"
    took=$((($(date +%s%N) - took) / 1000000))
    say "mounted in $took ms from ${3%%:*}, 200 ms away"
    [ "$took" -lt 5000 ] || fail "that is more than 5 s"
    ls -A "$4" >/mnt/there
    ls -A "$STATE/mounts/far$1" | grep -v lost+found | cmp - /mnt/there || fail "it is not what was imaged"
    driver Unmount "{\"Name\": \"far$1\", \"ID\": \"a\"}" | grep -q '"Err":""' || fail "it was not unmounted"
    driver Remove "{\"Name\": \"far$1\"}" | grep -q '"Err":""' || fail "it was not removed"
}
echo "[127.0.0.1]:2223 $(cut -d' ' -f1,2 /mnt/host_key.pub)" >>"$HOME/.ssh/known_hosts"
far 8333 8334 minio://127.0.0.1:8334/volumes/repo /usr/share/common-licenses
far 2222 2223 scp://root@127.0.0.1:2223/mnt/remote/repo /usr/share/zoneinfo

# The originals are as they were: another volume of the same version has neither.
docker volume create -d horcrux-nbd -o name=prod -o access="$pg_repo" -o ro=true clean >/dev/null
run -v clean:/data tools test ! -e /data/postmaster.pid || fail "a change went into the version"
docker volume rm clean >/dev/null

# The same by a compose file, whose image and network are not to be had here.
cat >/mnt/here.yaml <<YAML
services:
  db:
    image: tools
    network_mode: none
    user: "$PGUID"
    environment: {LC_ALL: C.UTF-8}
    volumes: ["/usr:/usr:ro"]
    command: [$PGBIN/postgres, -D, /var/lib/postgresql/data, -k, /tmp, -c, listen_addresses=, -c, shared_buffers=32MB]
YAML
compose() { HORCRUX_IMAGE=prod HORCRUX_REPO=$pg_repo docker-compose -p story -f "${UML_LIB%/*}/../../plugin/compose.yaml" -f /mnt/here.yaml "$@"; }
compose up -d 2>&1
composed() { docker exec --user "$PGUID" "$(compose ps -q db)" "$PGBIN/psql" -h /tmp -U postgres -XAtqc 'select count(*) from pgbench_accounts' pgbench; }
wait_until "PostgreSQL to answer" composed
[ "$(composed)" = 100000 ] || fail "rows are missing"
compose down -v 2>&1
[ "$(docker volume ls -q | sort | xargs)" = "home pgdata" ] || fail "a volume of the compose file is left: $(docker volume ls -q | xargs)"
say "a compose file made, used and removed its volume"

docker rm -f db jira >/dev/null
docker volume rm pgdata home >/dev/null
wait_until "mounts to be let go" nothing_mounted
wait_until "devices to be let go" nothing_connected
[ -z "$(ls -A "$STATE/mounts")" ] || fail "mountpoints are left"
[ -z "$(ls -A "$STATE/volumes" | grep -v '^\.')" ] || fail "directories of volumes are left"
[ "$(cli cache stat --json | jq .chunks)" = 0 ] || fail "the cache still holds $(cli cache stat)"
end_it "$dockerd_pid" TERM
end_it "$driver_pid" TERM
stop_server
[ ! -e /run/docker/plugins/horcrux-nbd.sock ] || fail "the driver's socket is left"
! pgrep -x 'horcrux-.*' || fail "processes are left"
end_it "$sshd_pid" TERM
end_it "$weed_pid" KILL
trap - EXIT
say "the story is over, and nothing is left"
