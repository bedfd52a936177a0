//! What the kernel says of its nbd devices, in /sys and /dev.
//!
//! Enters: an index or whose device is looked for. Leaves: facts of the moment.

use std::fs;
use std::io;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};

use rustix::fs::{Mode, OFlags};

use super::KernelError;

const SYS_BLOCK: &str = "/sys/block";
const PREFIX: &str = "nbd";
/// One request of the kernel's: what a read-ahead of this size makes of many small ones.
const MAX_SECTORS_KB: u64 = 4096;
const READ_AHEAD_KB: u64 = 4096;
/// How often the block layer looks after a request that is not answered: one that a dead socket took is asked again over the new one then, and not before.
const LOOK_AFTER_MS: u64 = 2000;

/// The device of an index.
pub fn path_of(index: u32) -> PathBuf {
    PathBuf::from(format!("/dev/{PREFIX}{index}"))
}

/// The index in `/dev/nbdN`; `None` where it is not such a name.
pub fn index_of(path: &Path) -> Option<u32> {
    let name = path.strip_prefix("/dev").ok()?.to_str()?;
    name.strip_prefix(PREFIX)?.parse().ok()
}

/// Devices that are connected and say that they are `backend`'s, or that of one of many.
pub fn connected(mut is_ours: impl FnMut(&str) -> bool) -> io::Result<Vec<(u32, String)>> {
    let mut found = Vec::new();
    for entry in fs::read_dir(SYS_BLOCK)? {
        let name = entry?.file_name();
        let Some(index) = name.to_str().and_then(|name| name.strip_prefix(PREFIX)?.parse().ok()) else {
            continue;
        };
        if let Some(backend) = backend_of(index).filter(|backend| is_ours(backend)) {
            found.push((index, backend));
        }
    }
    found.sort_unstable();
    Ok(found)
}

/// Whose the device says it is; `None` where it is not connected, or by someone who does not say.
pub fn backend_of(index: u32) -> Option<String> {
    let dir = sys(index);
    // The driver leaves the file of the last backend behind for a moment; a pid is only there while it is connected.
    dir.join("pid").exists().then_some(())?;
    Some(fs::read_to_string(dir.join("backend")).ok()?.trim_end_matches(['\n', '\0']).to_owned())
}

/// Whether the device is connected.
pub fn is_connected(index: u32) -> bool {
    sys(index).join("pid").exists()
}

/// Takes the device for this process: nobody has it mounted or otherwise claimed, and nobody can until this is closed. Of whoever only has it open nothing is known.
pub(super) fn claim(index: u32) -> Result<OwnedFd, KernelError> {
    let device = path_of(index);
    match rustix::fs::open(&device, OFlags::RDONLY | OFlags::EXCL | OFlags::CLOEXEC, Mode::empty()) {
        Ok(claimed) => Ok(claimed),
        Err(rustix::io::Errno::BUSY) => Err(KernelError::DeviceBusy { device }),
        Err(rustix::io::Errno::NOENT) => Err(KernelError::NoDevice { device }),
        Err(errno) => Err(KernelError::of("open", Some(device))(errno.into())),
    }
}

/// Brings to the device what is in the kernel's memory still; `false` where it is dead.
pub(super) fn flush(claimed: &OwnedFd, index: u32) -> Result<bool, KernelError> {
    match rustix::fs::fsync(claimed) {
        Ok(()) => Ok(true),
        Err(_) if is_dead(index) => Ok(false),
        Err(errno) => Err(KernelError::of("flush", Some(path_of(index)))(errno.into())),
    }
}

/// Whether not even its first block can be read, past the kernel's cache.
fn is_dead(index: u32) -> bool {
    const BLOCK: usize = 4096;
    let Ok(device) =
        rustix::fs::open(path_of(index), OFlags::RDONLY | OFlags::DIRECT | OFlags::CLOEXEC, Mode::empty())
    else {
        return true;
    };
    let mut room = vec![0; 2 * BLOCK];
    // Direct reads go to addresses that are multiples of the block.
    let skip = room.as_ptr().align_offset(BLOCK);
    rustix::io::pread(&device, &mut room[skip..skip + BLOCK], 0) == Err(rustix::io::Errno::IO)
}

/// Lets the kernel ask for more at a time. What it does not take is no loss but speed.
pub fn tune(index: u32) {
    let wishes = [
        ("queue/max_sectors_kb", MAX_SECTORS_KB),
        ("queue/read_ahead_kb", READ_AHEAD_KB),
        ("queue/io_timeout", LOOK_AFTER_MS),
    ];
    for (file, value) in wishes {
        let path = sys(index).join(file);
        if let Err(error) = fs::write(&path, value.to_string()) {
            tracing::debug!(path = %path.display(), %error, "not set");
        }
    }
}

fn sys(index: u32) -> PathBuf {
    Path::new(SYS_BLOCK).join(format!("{PREFIX}{index}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_device_s_name_has_an_index_and_nothing_else() {
        assert_eq!(index_of(&path_of(12)), Some(12));
        for other in ["/dev/sda", "/dev/nbd", "/dev/nbd1p1", "nbd1", "/tmp/nbd1", "/dev/nbd-1"] {
            assert_eq!(index_of(Path::new(other)), None, "{other}");
        }
    }
}
