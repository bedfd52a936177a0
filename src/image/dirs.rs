//! Opens the directories of a tree without ever following a symbolic link.
//!
//! Enters: the root's descriptor and entry ids. Leaves: a descriptor of that very directory.
//! Invariant: every step is one `openat` with O_NOFOLLOW from a descriptor already checked, and what is opened has
//! the device and inode number the scan saw; so a path swapped for a link in between can't lead elsewhere.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use rustix::fs::{AtFlags, Mode, OFlags, StatxFlags};
use rustix::io::Errno;

use super::error::ImageError;
use super::tree::{EntryId, ROOT, Stamp, Tree};

/// How many directories are kept open. Deeper ones are reached again from the root.
const OPEN_DIRS_MAX: usize = 64;

/// Opens something for reading, without disturbing its access time where the owner of the process may ask for that.
pub(crate) fn open_quietly(
    dir: BorrowedFd<'_>,
    name: &std::ffi::CStr,
    flags: OFlags,
) -> rustix::io::Result<OwnedFd> {
    let flags = flags | OFlags::RDONLY | OFlags::CLOEXEC | OFlags::NOFOLLOW | OFlags::NOATIME;
    match rustix::fs::openat(dir, name, flags, Mode::empty()) {
        // O_NOATIME is for the file's owner and for root.
        Err(Errno::PERM) => rustix::fs::openat(dir, name, flags - OFlags::NOATIME, Mode::empty()),
        other => other,
    }
}

/// As the server of a network filesystem knows it, not as it was remembered here.
pub(crate) const FRESH: AtFlags = AtFlags::STATX_FORCE_SYNC;

/// What of `name` is compared before and after.
pub(crate) fn stamp_at(dir: BorrowedFd<'_>, name: &std::ffi::CStr) -> rustix::io::Result<Stamp> {
    let flags = AtFlags::SYMLINK_NOFOLLOW | AtFlags::NO_AUTOMOUNT | FRESH;
    rustix::fs::statx(dir, name, flags, StatxFlags::BASIC_STATS).map(|stat| Stamp::of(&stat))
}

/// What of an open file is compared before and after.
pub(crate) fn stamp_of(fd: BorrowedFd<'_>) -> rustix::io::Result<Stamp> {
    rustix::fs::statx(fd, c"", AtFlags::EMPTY_PATH | FRESH, StatxFlags::BASIC_STATS)
        .map(|stat| Stamp::of(&stat))
}

/// The directories on the way to the one opened last.
pub(crate) struct Dirs {
    root: OwnedFd,
    chain: Vec<(EntryId, OwnedFd)>,
    /// Whether what is opened must be what the scan saw.
    checked: bool,
}

impl Dirs {
    pub(crate) fn new(root: OwnedFd) -> Dirs {
        Dirs { root, chain: Vec::new(), checked: true }
    }

    /// The directories of a copy of the tree: the same names, other inodes.
    pub(crate) fn unchecked(root: OwnedFd) -> Dirs {
        Dirs { root, chain: Vec::new(), checked: false }
    }

    /// A descriptor of the directory `id`, good until the next call.
    pub(crate) fn open(&mut self, tree: &Tree, id: EntryId) -> Result<BorrowedFd<'_>, ImageError> {
        // Up from `id` to the root or to something that is still open ...
        let mut missing = Vec::new();
        let mut at = id;
        let kept = loop {
            if at == ROOT {
                break 0;
            }
            if let Some(open) = self.chain.iter().position(|(open, _)| *open == at) {
                break open + 1;
            }
            missing.push(at);
            at = tree.entry(at).parent;
        };
        self.chain.truncate(kept);
        // ... and down again, one name at a time.
        for &step in missing.iter().rev() {
            let parent = self.chain.last().map_or(self.root.as_fd(), |(_, fd)| fd.as_fd());
            let failed = |source| ImageError::on_file("open it", tree.path(step), source);
            let fd = open_quietly(parent, tree.name(step), OFlags::DIRECTORY).map_err(failed)?;
            let now = stamp_of(fd.as_fd()).map_err(failed)?;
            let then = &tree.entry(step).stamp;
            if self.checked && (now.dev, now.ino) != (then.dev, then.ino) {
                return Err(ImageError::Changed {
                    path: tree.path(step),
                    what: "another directory has its name",
                });
            }
            if self.chain.len() == OPEN_DIRS_MAX {
                self.chain.remove(0);
            }
            self.chain.push((step, fd));
        }
        Ok(self.chain.last().map_or(self.root.as_fd(), |(_, fd)| fd.as_fd()))
    }
}
