//! A scanned tree becomes an ext4 image in one pass, without root and without a scratch file.
//!
//! Enters: a tree, its root's descriptor, a plan. Leaves: the image, in order, into a sink. Invariant: the same tree,
//! name and plan give the same bytes; nothing comes from a clock, an inode number or the order of `readdir`.
//!
//! The crate mkext4 decides where everything lies. It emits all metadata first and contents after, by offset; a
//! sequential stream needs them merged. Metadata before the first file's contents (most of it) goes straight out, the
//! little behind it (further inode tables, backup superblocks) waits in memory. Contents lie in the order the files
//! were declared in, so they are taken from the reader's stream as they come and no file is looked up again.
//!
//! Memory goes by names, some 1.1 KB each, and by the device's size: mkext4 keeps two blocks for each group of 128 MiB,
//! which is 64 MiB for a device of 1 TiB and 1 GiB for one of 16 TiB.

use std::io;

use mkext4::{FsBuilder, InodeCount, InodeHandle, Layout, Meta, Options, RegionSink, SparseSeg, SpecialKind};

use super::error::ImageError;
use super::geometry::{EXTENTS_MAX, Plan, STREAMING_MAX, extents, xattr_room};
use super::identity::Identity;
use super::note::{Mke2fsReason, NoteKind, Notes};
use super::progress::{Phase, Progress};
use super::scan::Scan;
use super::sink::{ImageSink, SinkError, Stream};
use super::tree::{BLOCK, Entry, EntryId, Kind, ROOT, Time, Tree};
use super::xattrs::{Ext4Room, Ext4Xattr, for_ext4};
use super::{ImageOptions, reader};
use crate::units::{ByteLen, ByteOffset};

/// The seconds an ext4 inode can hold: 34 bits from 1901 on.
const SECONDS: std::ops::RangeInclusive<i64> = -(1 << 31)..=(1 << 34) - (1 << 31) - 1;
/// ext4's largest file: 2^32 blocks, less one.
const FILE_MAX: u64 = (1 << 44) - BLOCK;
/// What ext4 can count of an inode's names.
const LINKS_MAX: u32 = 65_000;
/// A directory of the filesystem's own, at the top.
const LOST_FOUND: &[u8] = b"lost+found";

/// What an entry's times become, with a note where ext4 can't hold them.
pub(crate) struct Times {
    pub(crate) atime: Time,
    pub(crate) mtime: Time,
}

/// The times to store for an entry. Reading a file changes its access time, so that is kept only on demand.
pub(crate) fn times(entry: &Entry, keep_atime: bool) -> Times {
    let clamp = |time: Time| {
        if SECONDS.contains(&time.sec) {
            time
        } else {
            Time { sec: time.sec.clamp(*SECONDS.start(), *SECONDS.end()), nsec: 0 }
        }
    };
    let mtime = clamp(entry.stamp.mtime);
    Times { atime: if keep_atime { clamp(entry.atime) } else { mtime }, mtime }
}

/// The superblock's times and those of `lost+found`: the directory's own, as 32 unsigned bits. Not the newest in the tree: one file of the far future would have the filesystem made in 2106, which
/// e2fsck takes for a fault, and each changed file would change the superblock.
pub(crate) fn epoch(tree: &Tree) -> i64 {
    tree.entry(ROOT).stamp.mtime.sec.clamp(0, i64::from(u32::MAX))
}

/// What ext4 itself can't hold, whoever writes it; and notes on what it drops.
pub(crate) fn check(tree: &Tree, options: &ImageOptions, notes: &mut Notes) -> Result<(), ImageError> {
    let mut links = std::collections::HashMap::new();
    for (id, entry) in tree.iter() {
        match &entry.kind {
            Kind::File { .. } if entry.stamp.size > FILE_MAX => {
                return Err(ImageError::FileTooLarge {
                    path: tree.path(id),
                    size: ByteLen(entry.stamp.size),
                    max: ByteLen(FILE_MAX),
                    fs: "ext4",
                });
            }
            Kind::HardLink { to } => {
                let names = links.entry(*to).or_insert(1u32);
                *names += 1;
                if *names > LINKS_MAX {
                    return Err(ImageError::TooManyLinks { path: tree.path(id), max: LINKS_MAX });
                }
                continue;
            }
            Kind::Dir => {}
            _ if is_lost_found(tree, id) => return Err(ImageError::LostFound { path: tree.path(id) }),
            _ => {}
        }
        let clamped = |time: Time| !SECONDS.contains(&time.sec);
        if clamped(entry.stamp.mtime) || options.keep_atime && clamped(entry.atime) {
            notes.about(NoteKind::TimeClamped, || tree.relative_path(id));
        }
    }
    for (&id, xattrs) in &tree.xattrs {
        for xattr in xattrs.iter().filter(|xattr| for_ext4(xattr) == Ext4Xattr::NoPlace) {
            let name = String::from_utf8_lossy(&xattr.name).into_owned();
            notes.about(NoteKind::XattrLost(name), || tree.relative_path(id));
        }
    }
    Ok(())
}

/// Whether an entry is the top's `lost+found`.
pub(crate) fn is_lost_found(tree: &Tree, id: EntryId) -> bool {
    id != ROOT && tree.entry(id).parent == ROOT && tree.name(id).to_bytes() == LOST_FOUND
}

/// Why this tree is not for the streaming writer, and which entry says so.
pub(crate) fn needs_mke2fs(tree: &Tree, device: ByteLen) -> Option<(Mke2fsReason, Option<EntryId>)> {
    if device.value() > STREAMING_MAX {
        return Some((Mke2fsReason::DeviceSize, None));
    }
    let utf8 = |bytes: &[u8]| std::str::from_utf8(bytes).is_ok();
    for (id, entry) in tree.iter() {
        let reason = match &entry.kind {
            _ if !utf8(tree.name(id).to_bytes()) => Mke2fsReason::Name,
            Kind::Symlink { target } if !utf8(target) => Mke2fsReason::Target,
            Kind::File { .. } if extents(entry) > EXTENTS_MAX => Mke2fsReason::Segments,
            _ if id != ROOT && is_lost_found(tree, entry.parent) => Mke2fsReason::LostFound,
            _ => continue,
        };
        return Some((reason, Some(id)));
    }
    for (&id, xattrs) in &tree.xattrs {
        if xattrs.iter().any(|xattr| !utf8(&xattr.name)) {
            return Some((Mke2fsReason::XattrName, Some(id)));
        }
        if xattr_room(tree, id) == Ext4Room::TooBig {
            return Some((Mke2fsReason::XattrSize, Some(id)));
        }
    }
    None
}

/// Emits the image of a tree that [`check`] and [`needs_mke2fs`] let pass.
pub(crate) fn emit(
    scan: Scan,
    plan: Plan,
    options: &ImageOptions,
    sink: &mut dyn ImageSink,
    progress: &Progress,
    notes: &mut Notes,
) -> Result<(), ImageError> {
    progress.enter(Phase::Layout);
    let tree = &scan.tree;
    let Declared { builder, files } = declare(tree, plan, options, notes)?;
    let layout = builder.seal().map_err(ImageError::Ext4)?;
    let runs = data_runs(&layout, &files);
    drop(files);

    let mut stream = Stream::begin(sink, plan.device)?;
    let first = runs.first().map_or(u64::MAX, |run| run.start);
    let mut capture = Capture { stream: &mut stream, until: first, later: Vec::new(), failed: None };
    let written = layout.writer(&mut capture).map(|_| ());
    let Capture { later, failed, .. } = capture;
    match (failed, written) {
        (Some(error), _) => return Err(error.into()),
        (None, written) => written.map_err(ImageError::Ext4)?,
    }
    // Inodes and directories are out or in `later`; what remains needs none of the layout's memory.
    drop(layout);

    progress.enter(Phase::Read);
    std::thread::scope(|scope| {
        let mut blocks = reader::start(scope, tree, scan.root, progress);
        let mut later = later.into_iter().peekable();
        for run in runs {
            while let Some((at, bytes)) = later.next_if(|(at, _)| *at < run.start) {
                stream.hole_to(ByteOffset(at))?;
                stream.data(&bytes)?;
            }
            stream.hole_to(ByteOffset(run.start))?;
            while stream.at().value() < run.end {
                stream.data(blocks.next(run.end - stream.at().value())?)?;
            }
        }
        for (at, bytes) in later {
            stream.hole_to(ByteOffset(at))?;
            stream.data(&bytes)?;
        }
        stream.hole_to(ByteOffset(plan.device.value()))?;
        blocks.finish()
    })
}

struct Declared {
    builder: FsBuilder,
    /// The files with data, in tree order.
    files: Vec<InodeHandle>,
}

fn declare(
    tree: &Tree,
    plan: Plan,
    options: &ImageOptions,
    notes: &mut Notes,
) -> Result<Declared, ImageError> {
    let identity = Identity::of(&options.image_name);
    let mut settings = Options::new(plan.filesystem.value(), identity.uuid, epoch(tree));
    for (word, bytes) in settings.hash_seed.iter_mut().zip(identity.hash_seed.chunks_exact(4)) {
        *word = u32::from_le_bytes(bytes.try_into().expect("chunks of 4"));
    }
    settings.inodes = InodeCount::Exact(plan.inodes);
    // Space kept back for root is for system disks; on a volume of one service it is only space lost.
    settings.reserved_percent = 0;
    let mut builder = FsBuilder::new(settings).map_err(ImageError::Ext4)?;

    let mut handles: Vec<InodeHandle> = Vec::with_capacity(tree.entries.len());
    let mut files = Vec::new();
    for (id, entry) in tree.iter() {
        let handle = if id == ROOT {
            builder.set_meta(mkext4::ROOT, meta(entry, options)).map(|()| mkext4::ROOT)
        } else if is_lost_found(tree, id) {
            notes.about(NoteKind::LostFound, || tree.relative_path(id));
            // Never asked for: a lost+found with anything in it is not for this writer.
            handles.push(mkext4::ROOT);
            continue;
        } else {
            declare_one(&mut builder, tree, id, &handles, options)
        };
        let handle = handle.map_err(ImageError::Ext4)?;
        handles.push(handle);
        if entry.has_data() {
            files.push(handle);
        }
        for xattr in tree.xattrs.get(&id).into_iter().flatten() {
            if let (Ext4Xattr::Stored(value), Ok(name)) = (for_ext4(xattr), std::str::from_utf8(&xattr.name))
            {
                builder.set_xattr(handle, name, &value).map_err(ImageError::Ext4)?;
            }
        }
    }
    Ok(Declared { builder, files })
}

fn declare_one(
    builder: &mut FsBuilder,
    tree: &Tree,
    id: EntryId,
    handles: &[InodeHandle],
    options: &ImageOptions,
) -> mkext4::Result<InodeHandle> {
    let entry = tree.entry(id);
    let utf8 = |bytes| {
        std::str::from_utf8(bytes).map_err(|_| mkext4::Error::Invalid("a name that is not UTF-8".into()))
    };
    let name = utf8(tree.name(id).to_bytes())?;
    let parent = handles[entry.parent.0 as usize];
    let meta = meta(entry, options);
    let mut special = |kind| builder.mknod(parent, name, meta, kind);
    match &entry.kind {
        Kind::Dir => builder.mkdir(parent, name, meta),
        Kind::File { segments: None } => builder.file(parent, name, meta, entry.stamp.size),
        Kind::File { segments: Some(_) } => builder.file_sparse(parent, name, meta, &sparse_segments(entry)),
        Kind::HardLink { to } => {
            let to = handles[to.0 as usize];
            builder.hardlink(parent, name, to).map(|()| to)
        }
        Kind::Symlink { target } => builder.symlink(parent, name, utf8(target)?, meta),
        Kind::Fifo => special(SpecialKind::Fifo),
        Kind::Socket => special(SpecialKind::Socket),
        Kind::CharDevice { major, minor } => special(SpecialKind::Char { major: *major, minor: *minor }),
        Kind::BlockDevice { major, minor } => special(SpecialKind::Block { major: *major, minor: *minor }),
    }
}

fn meta(entry: &Entry, options: &ImageOptions) -> Meta {
    let Times { atime, mtime } = times(entry, options.keep_atime);
    let mut meta = Meta::new(entry.mode, entry.uid, entry.gid, (mtime.sec, mtime.nsec));
    meta.atime = Some((atime.sec, atime.nsec));
    meta
}

/// A sparse file as a list of data and holes that covers it.
fn sparse_segments(entry: &Entry) -> Vec<SparseSeg> {
    let mut list = Vec::new();
    let mut at = 0;
    for segment in entry.segments() {
        if segment.start > at {
            list.push(SparseSeg::Hole(segment.start - at));
        }
        list.push(SparseSeg::Data(segment.len));
        at = segment.start + segment.len;
    }
    if entry.stamp.size > at {
        list.push(SparseSeg::Hole(entry.stamp.size - at));
    }
    list
}

/// A range of the image that holds contents, in bytes; `end` is exclusive, both are on block boundaries.
struct Run {
    start: u64,
    end: u64,
}

/// Where contents lie, neighbours joined. In tree order, which is ascending.
fn data_runs(layout: &Layout, files: &[InodeHandle]) -> Vec<Run> {
    let mut runs: Vec<Run> = Vec::new();
    for &file in files {
        for (start, len) in layout.extents(file) {
            let end = (start + len).next_multiple_of(BLOCK);
            match runs.last_mut() {
                Some(last) if last.end == start => last.end = end,
                _ => runs.push(Run { start, end }),
            }
        }
    }
    runs
}

/// Takes mkext4's metadata: what lies before `until` goes out, what lies behind it is kept.
struct Capture<'c, 's> {
    stream: &'c mut Stream<'s>,
    until: u64,
    later: Vec<(u64, Vec<u8>)>,
    failed: Option<SinkError>,
}

impl RegionSink for Capture<'_, '_> {
    fn data(&mut self, offset: u64, bytes: &[u8]) -> io::Result<()> {
        // Bitmaps and descriptors of groups nobody uses yet: they join the holes around them.
        if bytes.iter().all(|&byte| byte == 0) {
            return Ok(());
        }
        if offset < self.until {
            let sent = self.stream.hole_to(ByteOffset(offset)).and_then(|()| self.stream.data(bytes));
            return sent.map_err(|error| {
                self.failed = Some(error);
                io::Error::other("the sink failed")
            });
        }
        match self.later.last_mut() {
            Some((at, last)) if *at + last.len() as u64 == offset => last.extend_from_slice(bytes),
            _ => self.later.push((offset, bytes.to_vec())),
        }
        Ok(())
    }

    fn zeros(&mut self, _offset: u64, _len: u64) -> io::Result<()> {
        // Whatever is not data becomes a hole on its own.
        Ok(())
    }
}
