//! An XFS image: made by mkfs.xfs, filled by the kernel through a loop mount, streamed from a scratch file.
//!
//! Enters: a scanned tree. Leaves: the image. Needs root. Invariant: contents come from the same reader as for ext4, so
//! a file that changes meanwhile is an error here as well; what the kernel could not write into the scratch file is an
//! error and no hole; nothing stays mounted or linked on any way out.
//!
//! The kernel stamps change and birth times, so two images of one directory differ in those and in the log.

use std::fs::File;
use std::os::fd::{AsFd, BorrowedFd};

use rustix::fs::{AtFlags, FileType, Gid, Mode, OFlags, Timespec, Timestamps, Uid};
use rustix::io::Errno;

use super::dirs::Dirs;
use super::error::ImageError;
use super::ext4::{Times, times};
use super::identity::{Identity, uuid_text};
use super::loopmount::PrivateMount;
use super::note::{NoteKind, Notes};
use super::progress::{Phase, Progress};
use super::reader::{self, Blocks};
use super::scan::Scan;
use super::sink::{ImageSink, Stream};
use super::tool::{Tool, check_not_full, or_full, path_of_open, reserve, scratch_file};
use super::tree::{BLOCK, Entry, EntryId, Kind, ROOT, Tree};
use super::xattrs::XattrWriter;
use super::{ImageOptions, raw};
use crate::units::{ByteLen, ByteOffset};

const MKFS: Tool = Tool { name: "mkfs.xfs", package: "xfsprogs", good: 0 };

const MIB: u64 = 1 << 20;
/// mkfs.xfs refuses less.
const DEVICE_MIN: u64 = 300 * MIB;
/// A log, allocation group headers, and free space.
const FIXED: u64 = 192 * MIB;
/// An inode, its share of inode chunks and trees, and of a directory.
const PER_ENTRY: u64 = 1024;
/// What unmounting may write besides.
const RESERVED: u64 = 16 * MIB;
/// XFS_SYMLINK_MAXLEN without its NUL (fs/xfs/libxfs/xfs_format.h).
const TARGET_MAX: usize = 1023;
/// The last second of XFS's big timestamps, in 2486 (fs/xfs/libxfs/xfs_format.h).
const SECONDS_MAX: i64 = 16_299_260_424;

/// Makes and emits the image; returns the device's size.
pub(crate) fn emit(
    scan: Scan,
    options: &ImageOptions,
    sink: &mut dyn ImageSink,
    progress: &Progress,
    notes: &mut Notes,
) -> Result<ByteLen, ImageError> {
    progress.enter(Phase::Layout);
    check(&scan.tree)?;
    let dir = &options.scratch_dir;
    let wanted = default_size(&scan.tree);
    let device = match options.size {
        None => wanted.max(options.at_least),
        Some(size) => {
            let rounded = size.value().checked_next_multiple_of(BLOCK);
            ByteLen(rounded.ok_or(ImageError::TooMuch { fs: "XFS" })?)
        }
    };
    let too_big = || ImageError::TooBig { needed: wanted, given: device };
    if device.value() < DEVICE_MIN {
        return Err(ImageError::TooBig { needed: ByteLen(wanted.value().max(DEVICE_MIN)), given: device });
    }
    let file = scratch_file(dir, device.value())?;
    let uuid = uuid_text(&Identity::of(&options.image_name).uuid);
    MKFS.run(
        "for XFS images",
        |command| {
            command.args(["-q", "-f", "-K", "-m", &format!("crc=1,bigtime=1,uuid={uuid}")]);
            command.arg(path_of_open(&file));
        },
        progress,
    )
    .map_err(|error| or_full(error, dir))?;
    // What unmounting writes, after the last moment at which the kernel tells of errors, has its space.
    let kept_back = reserve(dir, scan.tree.entries.len() as u64 * PER_ENTRY + RESERVED)?;

    progress.enter(Phase::Read);
    let filled = std::thread::scope(|scope| {
        let blocks = reader::start(scope, &scan.tree, scan.root, progress);
        let fill = || fill(&file, &kept_back, &scan.tree, options, blocks, notes);
        // A thread of its own, because a mount namespace is a thread's for the rest of its life.
        scope.spawn(fill).join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
    });
    match filled.map_err(|error| or_full(error, dir)) {
        Err(ImageError::Io { source, .. }) if source.raw_os_error() == Some(libc::ENOSPC) => {
            return Err(too_big());
        }
        other => other?,
    }
    file.sync_all().map_err(ImageError::scratch("write it", dir))?;
    check_not_full(dir)?;

    let mut stream = Stream::begin(sink, device)?;
    let failed = |error| ImageError::scratch("read it", dir)(error);
    raw::copy(&file, device.value(), &mut stream, progress, |_| {}, failed)?;
    stream.hole_to(ByteOffset(device.value()))?;
    Ok(device)
}

/// What XFS can't hold.
fn check(tree: &Tree) -> Result<(), ImageError> {
    for (id, entry) in tree.iter() {
        if let Kind::Symlink { target } = &entry.kind
            && target.len() > TARGET_MAX
        {
            return Err(ImageError::LinkTooLong {
                path: tree.path(id),
                len: ByteLen(target.len() as u64),
                max: ByteLen(TARGET_MAX as u64),
                fs: "XFS",
            });
        }
    }
    Ok(())
}

/// Data and metadata, a quarter more, and what XFS takes for itself.
fn default_size(tree: &Tree) -> ByteLen {
    let data: u64 = tree
        .iter()
        .flat_map(|(_, entry)| entry.segments())
        .map(|segment| segment.len.next_multiple_of(BLOCK))
        .sum();
    let xattrs: u64 = tree.xattrs.values().flatten().map(|xattr| xattr.value.len() as u64 + PER_ENTRY).sum();
    let used = data + tree.entries.len() as u64 * PER_ENTRY + xattrs;
    ByteLen((used + used / 4 + FIXED).next_multiple_of(MIB).max(DEVICE_MIN))
}

fn fill(
    file: &File,
    kept_back: &File,
    tree: &Tree,
    options: &ImageOptions,
    blocks: Blocks,
    notes: &mut Notes,
) -> Result<(), ImageError> {
    let at = &options.scratch_dir;
    // Over the scratch directory itself: it is there, and only this thread sees what is mounted on it.
    // nouuid: an older image of the same name, so with the same UUID, may well be mounted on this machine.
    let mount = PrivateMount::new(file, at, "xfs", c"nouuid")?;
    let failed =
        |what| move |source: Errno| ImageError::Io { what, path: at.to_path_buf(), source: source.into() };
    {
        let root = mount.open().map_err(failed("open the mounted image"))?;
        // Opened before anything is written: it is told of every write that failed since.
        let watch = mount.open().map_err(failed("open the mounted image"))?;
        let mut copy =
            Copy { tree, options, dirs: Dirs::unchecked(root), blocks, xattrs: XattrWriter::new(), notes };
        copy.all()?;
        copy.blocks.finish()?;
        let unwritten = |source: Errno| ImageError::scratch("write it", at)(source.into());
        rustix::fs::syncfs(&watch).map_err(unwritten)?;
        kept_back.set_len(0).map_err(ImageError::scratch("make room in it", at))?;
    }
    mount.unmount().map_err(failed("unmount the image"))
}

struct Copy<'c> {
    tree: &'c Tree,
    options: &'c ImageOptions,
    /// Directories of the copy.
    dirs: Dirs,
    blocks: Blocks,
    xattrs: XattrWriter,
    notes: &'c mut Notes,
}

impl Copy<'_> {
    fn all(&mut self) -> Result<(), ImageError> {
        let tree = self.tree;
        for (id, entry) in tree.iter().skip(1) {
            self.create(id, entry)?;
            if !matches!(entry.kind, Kind::Dir | Kind::HardLink { .. }) {
                self.describe(id, entry)?;
            }
        }
        // Directories last, children first: a default ACL would be inherited, and every new name sets the times.
        for (index, entry) in tree.entries.iter().enumerate().rev() {
            if matches!(entry.kind, Kind::Dir) {
                self.describe(EntryId(index as u32), entry)?;
            }
        }
        Ok(())
    }

    fn create(&mut self, id: EntryId, entry: &Entry) -> Result<(), ImageError> {
        let tree = self.tree;
        let failed =
            |source: Errno| ImageError::Io { what: "copy it", path: tree.path(id), source: source.into() };
        let name = tree.name(id);
        let private = Mode::RUSR | Mode::WUSR | Mode::XUSR;
        let dir = self.dirs.open(tree, entry.parent)?;
        let node = |file_type, dev| rustix::fs::mknodat(dir, name, file_type, private, dev);
        match &entry.kind {
            Kind::Dir => rustix::fs::mkdirat(dir, name, private).map_err(failed),
            Kind::File { .. } => {
                let flags =
                    OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL | OFlags::CLOEXEC | OFlags::NOFOLLOW;
                let file = File::from(rustix::fs::openat(dir, name, flags, private).map_err(failed)?);
                write_contents(&file, entry, &mut self.blocks, failed)
            }
            Kind::HardLink { to } => {
                // The other name's directory is another one; both must be open at once.
                let dir = dir.try_clone_to_owned().map_err(|source| ImageError::Io {
                    what: "copy it",
                    path: tree.path(id),
                    source,
                })?;
                let from = self.dirs.open(tree, tree.entry(*to).parent)?;
                rustix::fs::linkat(from, tree.name(*to), dir, name, AtFlags::empty()).map_err(failed)
            }
            Kind::Symlink { target } => rustix::fs::symlinkat(&target[..], dir, name).map_err(failed),
            Kind::Fifo => node(FileType::Fifo, 0).map_err(failed),
            Kind::Socket => node(FileType::Socket, 0).map_err(failed),
            Kind::CharDevice { major, minor } => {
                node(FileType::CharacterDevice, rustix::fs::makedev(*major, *minor)).map_err(failed)
            }
            Kind::BlockDevice { major, minor } => {
                node(FileType::BlockDevice, rustix::fs::makedev(*major, *minor)).map_err(failed)
            }
        }
    }

    /// Owner, mode, attributes, times, in this order: each may change what was set before it.
    fn describe(&mut self, id: EntryId, entry: &Entry) -> Result<(), ImageError> {
        let tree = self.tree;
        let failed = |source: Errno| ImageError::Io {
            what: "copy its metadata",
            path: tree.path(id),
            source: source.into(),
        };
        let (dir, name): (BorrowedFd<'_>, _) = if id == ROOT {
            (self.dirs.open(tree, ROOT)?, c".")
        } else {
            (self.dirs.open(tree, entry.parent)?, tree.name(id))
        };
        let (uid, gid) = (Uid::from_raw(entry.uid), Gid::from_raw(entry.gid));
        rustix::fs::chownat(dir, name, Some(uid), Some(gid), AtFlags::SYMLINK_NOFOLLOW).map_err(failed)?;
        if !matches!(entry.kind, Kind::Symlink { .. }) {
            let mode = Mode::from_raw_mode(entry.mode.into());
            rustix::fs::chmodat(dir, name, mode, AtFlags::empty()).map_err(failed)?;
        }
        for xattr in tree.xattrs.get(&id).into_iter().flatten() {
            match self.xattrs.set(dir.as_fd(), name, xattr) {
                Ok(()) => {}
                Err(Errno::NOTSUP | Errno::INVAL) => {
                    let lost = String::from_utf8_lossy(&xattr.name).into_owned();
                    self.notes.about(NoteKind::XattrLost(lost), || tree.relative_path(id));
                }
                Err(source) => return Err(failed(source)),
            }
        }
        let Times { atime, mtime } = times(entry, self.options.keep_atime);
        if atime.sec.max(mtime.sec) > SECONDS_MAX || mtime != entry.stamp.mtime {
            // The kernel moves it to the nearest it can store.
            self.notes.about(NoteKind::TimeClamped, || tree.relative_path(id));
        }
        let spec = |time: super::tree::Time| Timespec { tv_sec: time.sec, tv_nsec: time.nsec.into() };
        let times = Timestamps { last_access: spec(atime), last_modification: spec(mtime) };
        rustix::fs::utimensat(dir, name, &times, AtFlags::SYMLINK_NOFOLLOW).map_err(failed)
    }
}

/// Writes a file's segments from the stream of blocks, leaving its holes.
fn write_contents(
    file: &File,
    entry: &Entry,
    blocks: &mut Blocks,
    failed: impl Fn(Errno) -> ImageError,
) -> Result<(), ImageError> {
    // At its full size from the start: past the end of a file XFS allocates ahead, and so fills holes.
    rustix::fs::ftruncate(file, entry.stamp.size).map_err(&failed)?;
    for segment in entry.segments() {
        let end = segment.start + segment.len;
        let mut at = segment.start;
        while at < end {
            // The stream is padded to blocks, the file is not.
            let bytes = blocks.next(end.next_multiple_of(BLOCK) - at)?;
            let wanted = bytes.len().min(usize::try_from(end - at).unwrap_or(usize::MAX));
            let taken = bytes.len() as u64;
            let mut rest = &bytes[..wanted];
            while !rest.is_empty() {
                match rustix::io::pwrite(file, rest, at + (wanted - rest.len()) as u64) {
                    Ok(0) => return Err(failed(Errno::IO)),
                    Ok(written) => rest = &rest[written..],
                    Err(Errno::INTR) => {}
                    Err(source) => return Err(failed(source)),
                }
            }
            at += taken;
        }
    }
    Ok(())
}
