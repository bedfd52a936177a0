# Process 1 of the guest becomes systemd. Sourced by init.sh where UML_SYSTEMD is set; never returns.
#
# In:  the first disk (/dev/ubda) keeps what this machine writes; on it lies, by overlay, the host's own root. A second boot with the same disk is the same machine again.
# Out: $UML_SCRIPT runs when multi-user.target is up, then the machine is shut down as a user would. $UML_OUT is below /host in here.
#
# Of the host's services none is enabled, for what a developer's machine runs is not this one's.
root=/mnt/root
insmod "/usr/lib/uml/modules/$(uname -r)/kernel/fs/overlayfs/overlay.ko"
mkdir -p /mnt/disk "$root"
mount /dev/ubda /mnt/disk 2>/dev/null || { mkfs.ext4 -q /dev/ubda && mount /dev/ubda /mnt/disk && touch /mnt/disk/new; }
mkdir -p /mnt/disk/upper /mnt/disk/work
give_up() {
    echo "systemd.sh: $1"
    echo 1 >"$UML_OUT/status"
    busybox poweroff -f
}
mount -t overlay -o lowerdir=/,upperdir=/mnt/disk/upper,workdir=/mnt/disk/work root "$root" || give_up "no overlay: what follows would change the host"
if [ -e /mnt/disk/new ]; then
    rm -rf "$root"/etc/systemd/system/* "$root"/var/lib/{docker,containerd,horcrux} "$root"/etc/{docker,fstab} "$root"/usr/sbin/policy-rc.d \
        "$root"/etc/rc?.d/* "$root"/.dockerenv
    # What lies in /tmp there may be what is tested.
    mkdir -p "$root"/etc/tmpfiles.d "$root"/host "$root"/usr/lib/modules
    : >"$root/etc/tmpfiles.d/tmp.conf"
    echo guest >"$root/etc/hostname"
    tr -d - </proc/sys/kernel/random/uuid >"$root/etc/machine-id"
    cat >"$root/etc/systemd/system/guest.target" <<-'UNIT'
	[Unit]
	Requires=multi-user.target
	After=multi-user.target
	Wants=guest.service
	AllowIsolate=yes
	UNIT
    cat >"$root/etc/systemd/system/guest.service" <<-UNIT
	[Unit]
	After=multi-user.target
	DefaultDependencies=no
	[Service]
	Type=oneshot
	ExecStart=/bin/bash ${0%/*}/systemd-run.sh
	StandardOutput=file:/dev/console
	StandardError=inherit
	KillMode=process
	UNIT
    ln -s guest.target "$root/etc/systemd/system/default.target"
    rm /mnt/disk/new
fi
# This boot's, for systemd-run.sh.
{ cat "$UML_OUT/env"; printf 'export UML_OUT=%q UML_LIB=%q\n' "/host$UML_OUT" "${0%/*}/lib.sh"; } >"$root/etc/guest.env"
mount --bind /usr/lib/uml/modules "$root/usr/lib/modules"
umount -l /proc /sys /dev/shm /dev/pts /run /sys/fs/cgroup 2>/dev/null
cd "$root" && pivot_root . host && exec chroot . /lib/systemd/systemd
give_up "systemd can't be started"
