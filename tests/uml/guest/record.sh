# A life of volumes in Docker, for its calls to be written down: made, looked at, used, copied into, restarted under, taken away.
#
# In: as docker-lib.sh, RECORD among it; REPO with the images `image` and `other`.
. "${UML_LIB%/*}/docker-lib.sh"
start_all
docker volume create -d horcrux-nbd -o name=image -o access="$REPO" v1 >/dev/null
docker volume create -d horcrux-nbd -o --name=other -o --access="$REPO" -o ro x1 >/dev/null
docker volume create -d horcrux-nbd -o name=image -o access="$REPO" v1 >/dev/null
refused "unknown option 'acces'" docker volume create -d horcrux-nbd -o name=image -o acces="$REPO" v2
refused "it has: image, other" docker volume create -d horcrux-nbd -o name=none -o access="$REPO" v2
docker volume ls >/dev/null
docker volume inspect v1 x1 >/dev/null
run -v v1:/data -v x1:/other tools sh -c 'echo one >/data/one; ls /other >/dev/null'
docker run -d --name c1 --restart always --network none -v v1:/data tools sh -c 'while :; do sleep 1; done' >/dev/null
run -v v1:/data tools cat /data/one
echo "copied in" >/mnt/in
docker cp /mnt/in c1:/data/in
docker cp c1:/data/in /mnt/out
cmp /mnt/in /mnt/out
docker restart -t 0 c1 >/dev/null
refused "volume is in use" docker volume rm v1
end_it "$dockerd_pid" TERM
start_dockerd
again() { docker exec c1 cat /data/one; }
wait_until "the container to be started again" again
kill_dockerd
start_dockerd
wait_until "the container to be started again" again
docker rm -f c1 >/dev/null
docker volume rm v1 x1 >/dev/null
docker volume ls >/dev/null
wait_until "mounts to be let go" nothing_mounted
trap - EXIT
say "Docker's calls are written down"
