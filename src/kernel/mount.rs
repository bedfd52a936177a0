//! Mounting what is on a device.
//!
//! Enters: a device, its filesystem, a directory. Leaves: a mount, or why there is none.

use std::ffi::CString;
use std::fs;
use std::path::{Path, PathBuf};

use rustix::mount::{MountFlags, UnmountFlags, mount, unmount};

use super::KernelError;
use super::filesystem::Kind;

/// What a guard says it is, in the table of mounts.
const GUARD: &str = "horcrux-guard";

/// Puts an empty filesystem that nobody can write to on a directory, which is made if need be: what is not mounted above it can't be written past it. One that is there stays.
/// The directory's path must be without symbolic links, as all here.
pub fn guard(dir: &Path) -> Result<(), KernelError> {
    let failed = |action| KernelError::of(action, Some(dir.to_owned()));
    match fs::create_dir(dir) {
        Err(error) if error.kind() != std::io::ErrorKind::AlreadyExists => return Err(failed("make")(error)),
        _ => {}
    }
    if is_guarded(dir)? {
        return Ok(());
    }
    let flags = MountFlags::RDONLY | MountFlags::NOSUID | MountFlags::NODEV | MountFlags::NOEXEC;
    mount(GUARD, dir, "tmpfs", flags, c"mode=0555,size=4k").map_err(|errno| match errno {
        rustix::io::Errno::PERM | rustix::io::Errno::ACCESS => KernelError::NotAllowed("mount".into()),
        errno => failed("mount a guard on")(errno.into()),
    })
}

/// Whether a guard is on a directory, with something mounted above it or not.
fn is_guarded(dir: &Path) -> Result<bool, KernelError> {
    Ok(mounts_of(Path::new(GUARD))?.iter().any(|guarded| guarded == dir))
}

/// Whether something is mounted above the guard of a directory, as far as this process sees.
pub fn is_above_guard(dir: &Path) -> Result<bool, KernelError> {
    Ok(is_guarded(dir)? && mounts_on(&mount_table()?, dir) > 1)
}

/// The directories right below another one where something is mounted above a guard.
pub fn mounted_below(dir: &Path) -> Result<Vec<PathBuf>, KernelError> {
    let table = mount_table()?;
    let guards = mounts_in(&table, Path::new(GUARD)).into_iter();
    Ok(guards.filter(|guarded| guarded.parent() == Some(dir) && mounts_on(&table, guarded) > 1).collect())
}

/// Takes the guard away, and the directory. What is mounted above it stays, and so does the guard then.
pub fn unguard(dir: &Path) -> Result<(), KernelError> {
    if is_above_guard(dir)? {
        return Err(KernelError::MountBusy { dir: dir.to_owned() });
    }
    if is_guarded(dir)? {
        unmount_dir(dir)?;
    }
    match fs::remove_dir(dir) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
            Err(KernelError::of("remove", Some(dir.to_owned()))(error))
        }
        _ => Ok(()),
    }
}

/// Mounts a device on a directory. Waits for the device.
pub(super) fn mount_device(
    device: &Path,
    kind: Kind,
    dir: &Path,
    read_only: bool,
) -> Result<(), KernelError> {
    let mut flags = MountFlags::NOATIME;
    flags.set(MountFlags::RDONLY, read_only);
    let options = CString::new(kind.options(read_only)).expect("options have no NUL");
    let mounted = mount(device, dir, kind.name(), flags, options.as_c_str());
    if mounted == Err(rustix::io::Errno::BUSY) && mounts_of(device)?.iter().any(|mounted| mounted == dir) {
        // Somebody else was there first.
        return Ok(());
    }
    mounted.map_err(|errno| {
        let problem = match errno {
            rustix::io::Errno::PERM | rustix::io::Errno::ACCESS => {
                return KernelError::NotAllowed("mount".into());
            }
            rustix::io::Errno::BUSY => return KernelError::DeviceBusy { device: device.to_owned() },
            rustix::io::Errno::NODEV => format!("this kernel has no {}", kind.name()),
            // EBADMSG is a checksum that is wrong.
            rustix::io::Errno::UCLEAN | rustix::io::Errno::INVAL | rustix::io::Errno::BADMSG => {
                return KernelError::Damaged { device: device.to_owned(), kind };
            }
            // XFS says this too of what it finds damaged late.
            rustix::io::Errno::IO => {
                format!(
                    "it can't be read, or its {} filesystem is damaged; the kernel's log says more",
                    kind.name()
                )
            }
            errno => errno.to_string(),
        };
        KernelError::Mount { device: device.to_owned(), problem }
    })
}

/// Unmounts what is on top of a directory; `false` where nothing is mounted there. Waits for what is written to it.
pub(super) fn unmount_dir(dir: &Path) -> Result<bool, KernelError> {
    match unmount(dir, UnmountFlags::NOFOLLOW) {
        Ok(()) => Ok(true),
        Err(rustix::io::Errno::INVAL | rustix::io::Errno::NOENT) => Ok(false),
        Err(rustix::io::Errno::BUSY) => Err(KernelError::MountBusy { dir: dir.to_owned() }),
        Err(errno) => Err(KernelError::of("unmount", Some(dir.to_owned()))(errno.into())),
    }
}

/// Brings to its device what the filesystem on a directory holds in memory. Waits for the device.
pub(super) fn sync_dir(dir: &Path) -> Result<(), KernelError> {
    let synced = fs::File::open(dir).and_then(|dir| Ok(rustix::fs::syncfs(dir)?));
    synced.map_err(KernelError::of("sync", Some(dir.to_owned())))
}

/// Where a device is mounted, in this process's view of the mounts.
pub fn mounts_of(device: &Path) -> Result<Vec<PathBuf>, KernelError> {
    Ok(mounts_in(&mount_table()?, device))
}

fn mount_table() -> Result<String, KernelError> {
    let path = PathBuf::from("/proc/self/mountinfo");
    let table = fs::read(&path).map_err(KernelError::of("read", Some(path)))?;
    Ok(String::from_utf8_lossy(&table).into_owned())
}

/// How many mounts lie on a directory, one above the other.
fn mounts_on(table: &str, dir: &Path) -> usize {
    let place = |line: &&str| line.split(' ').nth(4).is_some_and(|place| Path::new(&unescaped(place)) == dir);
    table.lines().filter(place).count()
}

/// proc(5), mountinfo: the fifth field is where, the second after the lone dash is what.
fn mounts_in(table: &str, device: &Path) -> Vec<PathBuf> {
    let device = device.to_string_lossy();
    let mounted = |line: &str| {
        let (mount, source) = line.split_once(" - ")?;
        (source.split(' ').nth(1)? == device).then_some(())?;
        Some(PathBuf::from(unescaped(mount.split(' ').nth(4)?)))
    };
    table.lines().filter_map(mounted).collect()
}

/// Space, tab, newline and backslash are written as octal there.
fn unescaped(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    let mut rest = text;
    while let Some((before, after)) = rest.split_once('\\') {
        out.push_str(before);
        let byte = after.get(..3).and_then(|digits| u8::from_str_radix(digits, 8).ok());
        out.push(byte.map_or('\\', char::from));
        rest = if byte.is_some() { &after[3..] } else { after };
    }
    out + rest
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_device_s_mounts_are_found_in_the_table_whatever_their_names_hold() {
        let table = "\
22 1 254:0 / / rw,relatime shared:1 - ext4 /dev/vda rw\n\
40 22 43:0 / /var/lib/horcrux/mnt/v1 rw,noatime shared:7 - ext4 /dev/nbd0 rw\n\
41 22 43:0 / /mnt/with\\040a\\134space rw - ext4 /dev/nbd0 rw\n\
42 22 43:16 / /mnt/other rw - xfs /dev/nbd1 rw,nouuid\n\
43 22 0:50 / /mnt/odd rw master:1 - tmpfs none\n";
        assert_eq!(
            mounts_in(table, Path::new("/dev/nbd0")),
            [Path::new("/var/lib/horcrux/mnt/v1"), Path::new("/mnt/with a\\space")]
        );
        assert_eq!(mounts_in(table, Path::new("/dev/nbd2")), Vec::<PathBuf>::new());
        let stacked = format!("{table}44 41 0:51 / /mnt/with\\040a\\134space rw - tmpfs horcrux-guard\n");
        assert_eq!(mounts_on(&stacked, Path::new("/mnt/with a\\space")), 2);
        assert_eq!(mounts_on(&stacked, Path::new("/mnt")), 0);
    }
}
