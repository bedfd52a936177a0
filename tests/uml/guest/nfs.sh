# Runs a command with an NFS mount: this kernel is the server and the client.
#
# In: COMMAND, which gets HORCRUX_MOUNT. It must write nowhere else but below TMPDIR.
modules=/usr/lib/uml/modules/$(uname -r)
load() {
    local file list
    # The line of modules.dep, from its end: what it needs before itself.
    list=$(grep "/$1.ko:" "$modules/modules.dep" | tr -d : | tr ' ' '\n' | tac)
    for file in $list; do
        grep -qw "^$(basename "$file" .ko)" /proc/modules || insmod "$modules/$file" || fail "$file does not load"
    done
}
load nfsd
load nfsv4
# What the servers keep is not this machine's.
mount -t tmpfs state /var/lib/nfs
touch /var/lib/nfs/{etab,rmtab,xtab}
mkdir -p /var/lib/nfs/{sm,v4recovery,rpc_pipefs} /mnt/export /mnt/nfs
mount -t nfsd nfsd /proc/fs/nfsd
mount -t tmpfs -o size=1G export /mnt/export
exportfs -i -o rw,sync,fsid=0,no_root_squash,no_subtree_check '127.0.0.1:/mnt/export'
rpc.mountd -N 3 -V 4 -F >>"$UML_OUT/server.log" 2>&1 &
mountd=$!
rpc.nfsd -N 3 -V 4 --no-udp 4
wait_until "the mount" mount -t nfs4 -o vers=4.2,timeo=50 127.0.0.1:/ /mnt/nfs
say "mounted $(findmnt -n -o FSTYPE,OPTIONS /mnt/nfs)"
HORCRUX_MOUNT=/mnt/nfs bash -c "$COMMAND"
umount /mnt/nfs
rpc.nfsd 0
kill $mountd
