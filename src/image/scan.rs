//! Walks a directory and records everything about it but the contents of its files.
//!
//! Enters: a directory. Leaves: a [`Tree`]. Invariant: no symbolic link below the directory is followed, and the
//! result depends on what is in the directory, not on inode numbers, the order of `readdir` or the clock.
//!
//! What is mounted below the directory is part of it, as it is for whoever reads it (`tar`, `cp -a`); a note names
//! the mount points.

use std::collections::HashMap;
use std::ffi::CStr;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::Path;

use rustix::fs::{
    Access, AtFlags, Dir, FileType, Mode, OFlags, SeekFrom, Statx, StatxAttributes, StatxFlags,
};
use rustix::io::Errno;

use super::dirs::{Dirs, FRESH, open_quietly};
use super::error::{ImageError, UNREADABLE_NAMED_MAX};
use super::note::{NoteKind, Notes};
use super::progress::Progress;
use super::tree::{BLOCK, Entry, EntryId, Kind, ROOT, Segment, Stamp, Tree};
use super::xattrs::XattrReader;

/// The inode flags that `statx` tells of and no image keeps.
const FLAGS: [(StatxAttributes, &str); 5] = [
    (StatxAttributes::IMMUTABLE, "immutable"),
    (StatxAttributes::APPEND, "append-only"),
    (StatxAttributes::NODUMP, "nodump"),
    (StatxAttributes::ENCRYPTED, "encrypted"),
    (StatxAttributes::VERITY, "verity"),
];

/// A scan's result.
pub(crate) struct Scan {
    pub(crate) tree: Tree,
    /// The directory itself, for the one who reads the contents.
    pub(crate) root: OwnedFd,
    /// Regular files, each inode once.
    pub(crate) files: u64,
    pub(crate) dirs: u64,
}

/// Scans `dir`. None of the directories in `forbidden` may be met on the way.
pub(crate) fn scan(
    dir: &Path,
    forbidden: &[impl AsRef<Path>],
    progress: &Progress,
    notes: &mut Notes,
) -> Result<Scan, ImageError> {
    let failed = |source: Errno| ImageError::Source { path: dir.to_path_buf(), source: source.into() };
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
    let root = rustix::fs::open(dir, flags, Mode::empty()).map_err(failed)?;
    let walk_root = root.try_clone().map_err(|source| ImageError::Source { path: dir.into(), source })?;
    let stat = rustix::fs::statx(&root, c"", AtFlags::EMPTY_PATH, StatxFlags::BASIC_STATS).map_err(failed)?;
    let forbidden = forbidden
        .iter()
        .filter_map(|path| rustix::fs::stat(path.as_ref()).ok())
        .map(|stat| (stat.st_dev, stat.st_ino))
        .collect();
    let mut walk = Walk {
        tree: Tree::new(dir.to_path_buf()),
        linked: HashMap::new(),
        xattrs: XattrReader::new().ok_or_else(|| ImageError::Io {
            what: "read extended attributes without /proc",
            path: "/proc/self/fd".into(),
            source: Errno::NOENT.into(),
        })?,
        without_xattrs: None,
        forbidden,
        privileged: rustix::process::geteuid().is_root(),
        unreadable: Vec::new(),
        unreadable_more: 0,
        files: 0,
        dirs: 1,
        progress,
        notes,
    };
    walk.check_allowed(&Stamp::of(&stat), ROOT)?;
    walk.push(Entry::new(ROOT, &stat, Kind::Dir), c"")?;
    walk.read_xattrs(root.as_fd(), c".", ROOT)?;
    walk.all(walk_root)?;
    if !walk.unreadable.is_empty() {
        return Err(ImageError::Unreadable { paths: walk.unreadable, more: walk.unreadable_more });
    }
    Ok(Scan { files: walk.files, dirs: walk.dirs, tree: walk.tree, root })
}

struct Walk<'w> {
    tree: Tree,
    /// (device, inode) of every file with more than one link, and the entry that came first.
    linked: HashMap<(u64, u64), EntryId>,
    xattrs: XattrReader,
    /// The last device that answered that it has no attributes.
    without_xattrs: Option<u64>,
    forbidden: Vec<(u64, u64)>,
    privileged: bool,
    unreadable: Vec<std::path::PathBuf>,
    unreadable_more: u64,
    files: u64,
    dirs: u64,
    progress: &'w Progress,
    notes: &'w mut Notes,
}

impl Walk<'_> {
    fn all(&mut self, root: OwnedFd) -> Result<(), ImageError> {
        let mut dirs = Dirs::new(root);
        let mut todo = vec![ROOT];
        // One directory's names, with a NUL after each; kept for its allocation.
        let mut names = Vec::new();
        while let Some(dir) = todo.pop() {
            let fd = match dirs.open(&self.tree, dir) {
                Ok(fd) => fd,
                Err(ImageError::Unreadable { .. }) => {
                    self.note_unreadable(dir);
                    continue;
                }
                Err(error) => return Err(error),
            };
            let starts = self.list(fd, dir, &mut names)?;
            let first_child = self.tree.entries.len();
            for start in starts {
                if self.progress.is_cancelled() {
                    return Err(ImageError::Cancelled);
                }
                let name =
                    CStr::from_bytes_until_nul(&names[start..]).expect("names are stored with a NUL each");
                self.one(fd, dir, name)?;
            }
            let children = first_child..self.tree.entries.len();
            todo.extend(
                children
                    .rev()
                    .map(|id| EntryId(id as u32))
                    .filter(|&id| matches!(self.tree.entry(id).kind, Kind::Dir)),
            );
        }
        Ok(())
    }

    /// Fills `names` with what is in a directory; the result says where each name starts, in their order by bytes.
    fn list(&self, fd: BorrowedFd<'_>, dir: EntryId, names: &mut Vec<u8>) -> Result<Vec<usize>, ImageError> {
        let failed = |source| ImageError::on_file("list it", self.tree.path(dir), source);
        names.clear();
        let mut starts = Vec::new();
        let listing = open_quietly(fd, c".", OFlags::DIRECTORY).map_err(failed)?;
        for entry in Dir::new(listing).map_err(failed)? {
            let entry = entry.map_err(failed)?;
            let name = entry.file_name();
            if name != c"." && name != c".." {
                starts.push(names.len());
                names.extend_from_slice(name.to_bytes_with_nul());
            }
        }
        // A NUL sorts before every byte a name can have, so the order is that of the names themselves.
        // No two are equal, so a comparison ends at the first NUL at the latest.
        starts.sort_unstable_by(|&a, &b| names[a..].cmp(&names[b..]));
        Ok(starts)
    }

    /// Records one name of a directory.
    fn one(&mut self, fd: BorrowedFd<'_>, dir: EntryId, name: &CStr) -> Result<(), ImageError> {
        let flags = AtFlags::SYMLINK_NOFOLLOW | AtFlags::NO_AUTOMOUNT | FRESH;
        let stat = match rustix::fs::statx(fd, name, flags, StatxFlags::BASIC_STATS) {
            Ok(stat) => stat,
            Err(Errno::ACCESS) => {
                // The directory may be listed but not entered: nothing in it can be read.
                if self.unreadable.last().is_none_or(|last| *last != self.tree.path(dir)) {
                    self.note_unreadable(dir);
                }
                return Ok(());
            }
            Err(source) => return Err(self.failed("look at it", dir, name, source)),
        };
        self.progress.found();
        let stamp = Stamp::of(&stat);
        let kind = FileType::from_raw_mode(stat.stx_mode.into());
        let several_names = stat.stx_nlink > 1 && kind != FileType::Directory;
        if several_names && let Some(&to) = self.linked.get(&(stamp.dev, stamp.ino)) {
            let entry = Entry::new(dir, &stat, Kind::HardLink { to });
            let first = self.tree.entry(to);
            if (&entry.stamp, entry.mode, entry.uid, entry.gid)
                != (&first.stamp, first.mode, first.uid, first.gid)
            {
                // Some filesystems number files of several volumes alike; one of the two would be lost.
                let path = self.child_path(dir, name);
                return Err(ImageError::Changed {
                    path,
                    what: "it has the inode number of another file, or was written",
                });
            }
            self.push(entry, name)?;
            return Ok(());
        }
        let kind = match kind {
            FileType::Directory => {
                self.dirs += 1;
                Kind::Dir
            }
            FileType::RegularFile => self.regular_file(fd, dir, name, &stat)?,
            FileType::Symlink => {
                let target = rustix::fs::readlinkat(fd, name, Vec::new())
                    .map_err(|source| self.failed("read the link", dir, name, source))?;
                Kind::Symlink { target: target.into_bytes().into() }
            }
            FileType::Fifo => Kind::Fifo,
            FileType::Socket => Kind::Socket,
            FileType::CharacterDevice => {
                Kind::CharDevice { major: stat.stx_rdev_major, minor: stat.stx_rdev_minor }
            }
            FileType::BlockDevice => {
                Kind::BlockDevice { major: stat.stx_rdev_major, minor: stat.stx_rdev_minor }
            }
            FileType::Unknown => return Err(self.failed("tell what it is", dir, name, Errno::NOTSUP)),
        };
        let is_dir = matches!(kind, Kind::Dir);
        let id = self.push(Entry::new(dir, &stat, kind), name)?;
        if several_names {
            self.linked.insert((stamp.dev, stamp.ino), id);
        }
        for (flag, word) in FLAGS {
            if stat.stx_attributes.contains(flag) {
                self.notes.about(NoteKind::InodeFlag(word), || self.tree.relative_path(id));
            }
        }
        if is_dir {
            self.check_allowed(&stamp, id)?;
            if stamp.dev != self.tree.entry(dir).stamp.dev {
                self.notes.about(NoteKind::MountPoint, || self.tree.relative_path(id));
            }
        }
        self.read_xattrs(fd, name, id)
    }

    fn regular_file(
        &mut self,
        fd: BorrowedFd<'_>,
        dir: EntryId,
        name: &CStr,
        stat: &Statx,
    ) -> Result<Kind, ImageError> {
        self.files += 1;
        if !self.privileged {
            // Asked for now, so that one error can name all of them and nothing was made in vain.
            let readable = rustix::fs::accessat(fd, name, Access::READ_OK, AtFlags::EACCESS);
            if matches!(readable, Err(Errno::ACCESS | Errno::PERM)) {
                if self.unreadable.len() < UNREADABLE_NAMED_MAX {
                    self.unreadable.push(self.child_path(dir, name));
                } else {
                    self.unreadable_more += 1;
                }
                return Ok(Kind::File { segments: None });
            }
        }
        let size = stat.stx_size;
        if stat.stx_blocks.saturating_mul(512) >= size {
            if size > 0 {
                self.progress.to_read(size);
            }
            return Ok(Kind::File { segments: None });
        }
        let segments = data_segments(fd, name, size)
            .map_err(|source| self.failed("find its holes", dir, name, source))?;
        let bytes = segments.iter().map(|segment| segment.len).sum();
        if bytes > 0 {
            self.progress.to_read(bytes);
        }
        let dense = bytes == size;
        Ok(Kind::File { segments: (!dense).then(|| segments.into()) })
    }

    fn read_xattrs(&mut self, fd: BorrowedFd<'_>, name: &CStr, id: EntryId) -> Result<(), ImageError> {
        let dev = self.tree.entry(id).stamp.dev;
        if self.without_xattrs == Some(dev) {
            return Ok(());
        }
        match self.xattrs.read(fd, name) {
            Ok(found) if found.is_empty() => {}
            Ok(found) => {
                self.tree.xattrs.insert(id, found);
            }
            Err(Errno::NOTSUP) => self.without_xattrs = Some(dev),
            Err(Errno::ACCESS | Errno::PERM) => self.note_unreadable(id),
            Err(Errno::NODATA) => {
                return Err(ImageError::Changed { path: self.tree.path(id), what: "an attribute went away" });
            }
            Err(source) => {
                return Err(ImageError::on_file("read its extended attributes", self.tree.path(id), source));
            }
        }
        Ok(())
    }

    fn push(&mut self, entry: Entry, name: &CStr) -> Result<EntryId, ImageError> {
        self.tree.push(entry, name).ok_or(ImageError::TooManyEntries { max: u32::MAX })
    }

    fn check_allowed(&self, stamp: &Stamp, id: EntryId) -> Result<(), ImageError> {
        if self.forbidden.contains(&(stamp.dev, stamp.ino)) {
            return Err(ImageError::OutputInside { path: self.tree.path(id) });
        }
        Ok(())
    }

    fn note_unreadable(&mut self, id: EntryId) {
        if self.unreadable.len() < UNREADABLE_NAMED_MAX {
            self.unreadable.push(self.tree.path(id));
        } else {
            self.unreadable_more += 1;
        }
    }

    fn child_path(&self, dir: EntryId, name: &CStr) -> std::path::PathBuf {
        use std::os::unix::ffi::OsStrExt;
        self.tree.path(dir).join(std::ffi::OsStr::from_bytes(name.to_bytes()))
    }

    fn failed(&self, what: &'static str, dir: EntryId, name: &CStr, source: Errno) -> ImageError {
        ImageError::on_file(what, self.child_path(dir, name), source)
    }
}

/// Where a sparse file has data, widened to whole blocks: the source's blocks may be smaller than the image's.
fn data_segments(dir: BorrowedFd<'_>, name: &CStr, size: u64) -> rustix::io::Result<Vec<Segment>> {
    let fd = open_quietly(dir, name, OFlags::NONBLOCK)?;
    let mut segments: Vec<Segment> = Vec::new();
    let mut at = 0;
    while at < size {
        let start = match rustix::fs::seek(&fd, SeekFrom::Data(at)) {
            Ok(start) if start < size => start,
            // ENXIO: no data from here on. A file that grew has some, past the size that was seen.
            Ok(_) | Err(Errno::NXIO) => break,
            // A filesystem that knows no holes.
            Err(Errno::INVAL) => return Ok(vec![Segment { start: 0, len: size }]),
            Err(error) => return Err(error),
        };
        let end = rustix::fs::seek(&fd, SeekFrom::Hole(start))?.min(size);
        let from = start - start % BLOCK;
        let to = end.next_multiple_of(BLOCK).min(size);
        match segments.last_mut() {
            Some(last) if last.start + last.len >= from => last.len = to - last.start,
            _ => segments.push(Segment { start: from, len: to - from }),
        }
        at = end;
    }
    Ok(segments)
}
