//! Reads the contents of a tree's files ahead of whoever emits them, on a thread of its own.
//!
//! Enters: a scanned tree. Leaves: the contents of all data segments in tree order, each padded with zeros to whole
//! blocks, in buffers that many small files share. Invariant: contents are handed on only while the file is what the
//! scan saw; a file that changed, shrank or vanished, before, while or after it was read, ends the stream with an error
//! that names it. Memory: at most
//! [`SLABS`] buffers of [`SLAB_BYTES`], whatever the size of the files.

use std::os::fd::{AsFd, OwnedFd};
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::thread::Scope;

use rustix::fs::{Advice, OFlags};
use rustix::io::Errno;

use super::dirs::{Dirs, open_quietly, stamp_at, stamp_of};
use super::error::ImageError;
use super::progress::Progress;
use super::tree::{BLOCK, EntryId, Kind, Tree};

/// The size of one buffer, a multiple of the block size.
const SLAB_BYTES: usize = 1 << 20;
/// How many buffers go round between the reader and the emitter.
const SLABS: usize = 7;
/// Files from this size on are announced to the kernel's readahead as read in sequence.
const SEQUENTIAL_FROM: u64 = 256 << 10;

/// A buffer of which the first `filled` bytes are to be emitted.
struct Slab {
    bytes: Box<[u8]>,
    filled: usize,
}

/// The emitting end: blocks in order.
pub(crate) struct Blocks {
    full: Receiver<Result<Slab, ImageError>>,
    empty: SyncSender<Box<[u8]>>,
    current: Option<Slab>,
    taken: usize,
}

impl Blocks {
    /// The next bytes of the stream, at least one block and at most `max` bytes.
    ///
    /// Panics if asked for more than the tree's segments have; layouts are made from the same segments.
    pub(crate) fn next(&mut self, max: u64) -> Result<&[u8], ImageError> {
        if self.current.as_ref().is_none_or(|slab| slab.filled == self.taken) {
            if let Some(slab) = self.current.take() {
                // The reader may be done and gone; then nobody wants the buffer.
                let _ = self.empty.try_send(slab.bytes);
            }
            self.current = Some(self.full.recv().expect("the stream is as long as the layout made from it")?);
            self.taken = 0;
        }
        let slab = self.current.as_ref().expect("a slab was received above");
        let from = self.taken;
        let want = usize::try_from(max).unwrap_or(usize::MAX);
        self.taken += want.min(slab.filled - from);
        Ok(&slab.bytes[from..self.taken])
    }

    /// Waits for the reader's last check, after all blocks were taken.
    pub(crate) fn finish(self) -> Result<(), ImageError> {
        match self.full.recv() {
            Ok(Err(error)) => Err(error),
            Ok(Ok(_)) => unreachable!("all blocks of the layout were taken before"),
            Err(_) => Ok(()),
        }
    }
}

/// Starts reading.
pub(crate) fn start<'scope>(
    scope: &'scope Scope<'scope, '_>,
    tree: &'scope Tree,
    root: OwnedFd,
    progress: &'scope Progress,
) -> Blocks {
    // The other three: one being filled, one on its way, one at the emitter.
    let (full_to, full) = sync_channel(SLABS - 3);
    let (empty, empty_from) = sync_channel(SLABS);
    scope.spawn(move || {
        let mut reader = Reader {
            tree,
            dirs: Dirs::new(root),
            progress,
            packer: Packer {
                slab: Slab { bytes: vec![0; SLAB_BYTES].into(), filled: 0 },
                full: full_to,
                empty: empty_from,
            },
        };
        match reader.all() {
            Ok(()) | Err(Stop::Unwanted) => {}
            Err(Stop::Failed(error)) => {
                // Nobody listens if the emitter failed first; its error is the one that counts.
                let _ = reader.packer.full.send(Err(*error));
            }
        }
    });
    Blocks { full, empty, current: None, taken: 0 }
}

/// Why reading ended before its end.
enum Stop {
    /// The emitter is gone.
    Unwanted,
    Failed(Box<ImageError>),
}

impl From<ImageError> for Stop {
    fn from(error: ImageError) -> Stop {
        Stop::Failed(Box::new(error))
    }
}

struct Reader<'r> {
    tree: &'r Tree,
    dirs: Dirs,
    progress: &'r Progress,
    packer: Packer,
}

impl Reader<'_> {
    fn all(&mut self) -> Result<(), Stop> {
        let tree = self.tree;
        for (id, entry) in tree.iter() {
            if entry.has_data() {
                self.file(id)?;
            }
        }
        self.packer.send()?;
        // Last, everything once more: a name added or removed shows in its directory's times, and a file written after it was
        // read would be in the image as it was before another one that is there as it is now.
        for id in in_order_of_telling(tree) {
            if self.progress.is_cancelled() {
                return Err(ImageError::Cancelled.into());
            }
            unchanged(tree, &mut self.dirs, id)?;
        }
        Ok(())
    }

    /// Reads one file's segments into the stream.
    fn file(&mut self, id: EntryId) -> Result<(), Stop> {
        let tree = self.tree;
        let entry = tree.entry(id);
        let dir = self.dirs.open(tree, entry.parent)?;
        // What can't be opened or read may be another file by now (a fifo, a socket): then that is the error.
        let failed = |source| match stamp_at(dir, tree.name(id)).map(|now| entry.stamp.difference(&now)) {
            Ok(Some(what)) => ImageError::Changed { path: tree.path(id), what },
            Ok(None) => ImageError::on_file("read it", tree.path(id), source),
            Err(gone) => ImageError::on_file("read it", tree.path(id), gone),
        };
        // O_NONBLOCK: should a fifo have taken the name, the open must not wait for a writer.
        let fd = open_quietly(dir, tree.name(id), OFlags::NONBLOCK).map_err(failed)?;
        if entry.stamp.size >= SEQUENTIAL_FROM {
            // Advice: where it is not taken, reading is slower and still right.
            let _ = rustix::fs::fadvise(&fd, 0, None, Advice::Sequential);
        }
        let mut shrank = false;
        'segments: for segment in entry.segments() {
            let mut at = segment.start;
            let end = segment.start + segment.len;
            while at < end {
                let space = self.packer.space()?;
                let want = space.len().min(usize::try_from(end - at).unwrap_or(usize::MAX));
                let got = match rustix::io::pread(&fd, &mut space[..want], at) {
                    Ok(0) => {
                        shrank = true;
                        break 'segments;
                    }
                    Ok(got) => got,
                    Err(Errno::INTR) => continue,
                    Err(source) => return Err(failed(source).into()),
                };
                self.packer.slab.filled += got;
                at += got as u64;
                self.progress.read(got as u64);
                if self.progress.is_cancelled() {
                    return Err(ImageError::Cancelled.into());
                }
            }
            self.packer.pad();
        }
        // One look, after the reading: it is compared with what the scan saw, so it covers the time before as well.
        let now = stamp_of(fd.as_fd()).map_err(failed)?;
        let difference = entry.stamp.difference(&now).or(shrank.then_some("it shrank"));
        if let Some(what) = difference {
            return Err(ImageError::Changed { path: tree.path(id), what }.into());
        }
        self.progress.file_done();
        Ok(())
    }
}

/// Fills buffers and sends them.
struct Packer {
    slab: Slab,
    full: SyncSender<Result<Slab, ImageError>>,
    empty: Receiver<Box<[u8]>>,
}

impl Packer {
    /// Room for at least one byte of contents.
    fn space(&mut self) -> Result<&mut [u8], Stop> {
        if self.slab.filled == self.slab.bytes.len() {
            self.send()?;
        }
        Ok(&mut self.slab.bytes[self.slab.filled..])
    }

    /// Fills the last block of a segment up with zeros.
    fn pad(&mut self) {
        let to = self.slab.filled.next_multiple_of(BLOCK as usize);
        self.slab.bytes[self.slab.filled..to].fill(0);
        self.slab.filled = to;
    }

    fn send(&mut self) -> Result<(), Stop> {
        if self.slab.filled == 0 {
            return Ok(());
        }
        let bytes = match self.empty.try_recv() {
            Ok(bytes) => bytes,
            // The first few: the channel's length bounds how many there can be.
            Err(_) => vec![0; SLAB_BYTES].into(),
        };
        let slab = std::mem::replace(&mut self.slab, Slab { bytes, filled: 0 });
        self.full.send(Ok(slab)).map_err(|_| Stop::Unwanted)
    }
}

/// Compares every entry with what the scan saw, for contents that somebody else read.
pub(crate) fn check_unchanged(tree: &Tree, root: OwnedFd, progress: &Progress) -> Result<(), ImageError> {
    let mut dirs = Dirs::new(root);
    for id in in_order_of_telling(tree) {
        unchanged(tree, &mut dirs, id)?;
        if tree.entry(id).has_data() {
            progress.file_done();
        }
    }
    Ok(())
}

/// Files before directories: that a file is gone says more than that its directory changed. Each inode once.
fn in_order_of_telling(tree: &Tree) -> impl Iterator<Item = EntryId> + '_ {
    let of = |dirs: bool| {
        tree.iter().filter(move |(_, entry)| match entry.kind {
            Kind::HardLink { .. } => false,
            Kind::Dir => dirs,
            _ => !dirs,
        })
    };
    of(false).chain(of(true)).map(|(id, _)| id)
}

/// Checks that an entry is what the scan saw.
fn unchanged(tree: &Tree, dirs: &mut Dirs, id: EntryId) -> Result<(), ImageError> {
    let entry = tree.entry(id);
    let failed = |source| ImageError::on_file("look at it", tree.path(id), source);
    if !matches!(entry.kind, Kind::Dir) {
        let now = stamp_at(dirs.open(tree, entry.parent)?, tree.name(id)).map_err(failed)?;
        return match entry.stamp.difference(&now) {
            Some(what) => Err(ImageError::Changed { path: tree.path(id), what }),
            None => Ok(()),
        };
    }
    let now = stamp_of(dirs.open(tree, id)?).map_err(failed)?;
    // Not its size: that says how a directory is stored, which is nobody's business but its filesystem's.
    if (entry.stamp.mtime, entry.stamp.ctime) != (now.mtime, now.ctime) {
        let what = "names were added or removed, or its metadata was changed";
        return Err(ImageError::Changed { path: tree.path(id), what });
    }
    Ok(())
}
