# Podman takes the driver as Docker does, by `volume_plugins` in its containers.conf.
. "${UML_LIB%/*}/docker-lib.sh"
export CONTAINERS_CONF=/mnt/containers.conf
cat >"$CONTAINERS_CONF" <<'CONF'
[engine]
runtime = "/usr/sbin/runc"
cgroup_manager = "cgroupfs"
events_logger = "file"
[engine.volume_plugins]
horcrux-nbd = "/run/docker/plugins/horcrux-nbd.sock"
[containers]
default_ulimits = ["nofile=4096:4096", "nproc=8192:8192"]
CONF
podman() { /usr/bin/podman --root /mnt/podman --runroot /run/podman --storage-driver vfs "$@"; }
run() { podman run --rm --network none "$@"; }
start_daemon
start_driver
tar -C /mnt/root -c . | podman import -q - tools >/dev/null
podman volume create --driver horcrux-nbd -o name=image -o access="$REPO" p1 >/dev/null
refused "unknown option 'acces'" podman volume create --driver horcrux-nbd -o name=image -o acces="$REPO" p2
run -v p1:/data tools sh -c 'ls /data; echo written >/data/by-podman' | grep -qx data || fail "a container does not see what is in the image"
wait_until "the device to be let go" nothing_connected
[ "$(run -v p1:/data tools cat /data/by-podman)" = written ] || fail "a write is lost"
wait_until "the mount to be let go" nothing_mounted
podman volume rm p1 >/dev/null
[ -z "$(cli volume ls --json | jq -r '.[].name')" ] || fail "volumes are left"
nothing_connected || fail "devices are left"
end_it "$driver_pid" TERM
stop_server
trap - EXIT
say "podman $(podman version --format '{{.Client.Version}}') used a volume"
