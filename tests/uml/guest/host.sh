# A host as users have them: systemd, the package, Docker's own units. Its first day (BOOT=1), and the morning after (BOOT=2).
#
# In: DEB, REPO with the image `image` (ext4). The machine's disk is the same in both boots; how the first one shut down is seen by the second.
[ "$(stat -f -c %T /)" = overlayfs ] || fail "this would change the host"
STATE=/var/lib/horcrux
WAIT_S=120
docker() { /usr/bin/docker "$@"; }
more_than() { [ "$(cat "$at/count" 2>/dev/null || echo 0)" -gt "$1" ]; }
writes_on() {
    local counted
    counted=$(cat "$at/count")
    wait_until "the container to write on after $1" more_than "$counted"
    no_errors_at_all "after $1"
    say "the container writes on after $1"
}
no_errors_at_all() {
    no_errors "$1"
    docker exec c1 test ! -e /failed || fail "$1: a write of the container failed"
}
# With several units at once systemctl is content with one.
is_up() {
    local unit
    for unit; do systemctl is-active --quiet "$unit" || return 1; done
}
processes() { systemctl show -P MainPID horcrux-nbd horcrux-dv | xargs; }
nothing_mounted() { ! grep -q "$STATE/mounts" /proc/self/mountinfo; }
trap 'journalctl --no-pager -b -n 60 -u horcrux-nbd -u horcrux-dv -u docker' EXIT
at=$STATE/mounts/v1

first_day() {
    # The disk of this machine has no other driver for containers that works above an overlay; there is no network.
    mkdir -p /etc/docker /mnt/root/bin
    echo '{"storage-driver": "vfs", "bridge": "none", "iptables": false, "exec-opts": ["native.cgroupdriver=cgroupfs"]}' >/etc/docker/daemon.json
    cp "$(type -P busybox)" /mnt/root/bin/
    for name in sh cat echo sleep sync ls test mv rm; do ln -s busybox "/mnt/root/bin/$name"; done

    dpkg --force-depends --no-triggers -i "$DEB" || fail "the package can't be installed"
    is_up horcrux-nbd horcrux-dv.socket || fail "it is installed, and not up"
    [ -b /dev/nbd0 ] || fail "there is no /dev/nbd0"
    horcrux-cli status >/dev/null
    man -w horcrux-cli horcrux-nbd horcrux-dv >/dev/null 2>&1 || ls /usr/share/man/man1/horcrux-{cli,nbd,dv}.1.gz >/dev/null
    say "the package is installed"
    systemctl enable -q --now containerd docker
    wait_until "dockerd's answer" docker version
    tar -C /mnt/root -c . | docker import - tools >/dev/null

    docker volume create -d horcrux-nbd -o name=image -o access="$REPO" v1 >/dev/null
    docker run -d --name c1 --network none --restart always -v v1:/data tools sh -c '
        [ -e /data/count ] || echo 0 >/data/count
        while n=$(cat /data/count); do echo $((n + 1)) >/data/new && sync /data/new && mv /data/new /data/count && sync || echo $n >/failed; done' >/dev/null
    wait_until "the container to write" more_than 1

    systemctl restart horcrux-nbd
    writes_on "a restart of the daemon"
    systemctl kill -s KILL horcrux-nbd
    wait_until "systemd to start it again" is_up horcrux-nbd
    writes_on "a daemon that was killed"
    systemctl stop horcrux-dv.service
    docker volume inspect -f '{{.Status.image}}' v1 | grep -qx image@main || fail "the socket did not start the driver"
    systemctl restart horcrux-dv
    systemctl restart containerd
    writes_on "a restart of containerd"
    systemctl restart docker
    wait_until "the container to be there again" docker exec c1 test -e /data/count
    writes_on "a restart of dockerd"
    before=$(processes)
    dpkg --force-depends --no-triggers -i "$DEB" >/dev/null || fail "it can't be upgraded"
    for pid in $before; do ! kill -0 "$pid" 2>/dev/null || fail "process $pid is the one before the upgrade ($before)"; done
    is_up horcrux-nbd horcrux-dv.service horcrux-dv.socket || fail "an upgrade left it down"
    writes_on "an upgrade"
    if said=$(dpkg -r horcrux 2>&1); then fail "removed from under a container"; fi
    grep -q "a volume is still attached as /dev/nbd" <<<"$said" || fail "it said '$said'"
    is_up horcrux-nbd horcrux-dv.socket || fail "a removal that was refused stopped it"
    writes_on "a removal that was refused"

    # Mounted by hand, and left: the shutdown has it to unmount.
    mkdir -p /srv/by-hand
    horcrux-cli mount --access "$REPO" --name image by-hand /srv/by-hand
    echo first >/srv/by-hand/first
    cat "$at/count" >/root/count
    sync
    say "the first day is over"
}

morning_after() {
    is_up horcrux-nbd horcrux-dv.socket docker || fail "not everything is up"
    wait_until "the container to be there again" docker exec c1 test -e /data/count
    more_than "$(($(cat /root/count) - 1))" || fail "the container lost what it wrote: $(cat "$at/count")"
    writes_on "a reboot"
    horcrux-cli mount by-hand /srv/by-hand
    [ "$(cat /srv/by-hand/first)" = first ] || fail "what was written by hand is lost"
    # Whoever unmounts leaves no journal to replay.
    if dmesg | grep "(nbd.*recover"; then fail "it was not unmounted when the host went down"; fi
    say "everything is back after a reboot"
    horcrux-cli umount --rm /srv/by-hand
    docker rm -f c1 >/dev/null
    docker volume rm v1 >/dev/null
    wait_until "devices to be let go" nothing_connected
    nothing_mounted || fail "mounts are left"
    over_tls
    dpkg --no-triggers -P horcrux || fail "it can't be removed"
    ! is_up horcrux-nbd || fail "it was removed, and is up"
    [ ! -e /run/docker/plugins/horcrux-nbd.sock ] || fail "the driver's socket is left"
    [ -z "$(find /etc -name '*horcrux*')" ] || fail "files are left: $(find /etc -name '*horcrux*' | xargs)"
    say "nothing is left"
}

# certificate NAME [BY]: of BY, or of itself.
certificate() {
    openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -days 2 -subj "/CN=$1" -addext subjectAltName=IP:127.0.0.1 \
        -keyout "/root/tls/$1.key" -out "/root/tls/$1.pem" ${2:+-addext basicConstraints=critical,CA:FALSE -CA "/root/tls/$2.pem" -CAkey "/root/tls/$2.key"} 2>/dev/null
}

# A driver that Docker finds by a .json, over TCP, where each shows the other a certificate; and one it finds by a .spec.
over_tls() {
    local driver
    systemctl stop horcrux-dv.socket horcrux-dv.service
    mkdir -p /root/tls /etc/docker/plugins
    certificate ca
    certificate driver ca
    certificate docker ca
    horcrux-dv --listen 127.0.0.1:7878 --tls-cert /root/tls/driver.pem --tls-key /root/tls/driver.key --tls-client-ca /root/tls/ca.pem >/root/tls/log 2>&1 &
    driver=$!
    cat >/etc/docker/plugins/horcrux-tls.json <<-'JSON'
	{"Name": "horcrux-tls", "Addr": "https://127.0.0.1:7878",
	 "TLSConfig": {"CAFile": "/root/tls/ca.pem", "CertFile": "/root/tls/docker.pem", "KeyFile": "/root/tls/docker.key"}}
	JSON
    is_there() { grep -q ready /root/tls/log; }
    wait_until "the driver" is_there
    docker volume create -d horcrux-tls -o name=image -o access="$REPO" t1 >/dev/null
    docker run --rm --network none -v t1:/data tools ls /data | grep -qx data || fail "a container does not see what is in the image"
    docker volume rm t1 >/dev/null
    kill "$driver"
    wait "$driver" || true
    say "Docker found the driver by a .json, over TLS"

    horcrux-dv --socket /root/tls/dv.sock >/root/tls/log2 2>&1 &
    driver=$!
    is_there() { grep -q ready /root/tls/log2; }
    wait_until "the driver" is_there
    echo unix:///root/tls/dv.sock >/etc/docker/plugins/horcrux-spec.spec
    docker volume create -d horcrux-spec -o name=image -o access="$REPO" s1 >/dev/null
    docker volume rm s1 >/dev/null
    kill "$driver"
    wait "$driver" || true
    rm -r /etc/docker/plugins /root/tls
    say "Docker found the driver by a .spec"
}

case $BOOT in
1) first_day ;;
2) morning_after ;;
esac
trap - EXIT
