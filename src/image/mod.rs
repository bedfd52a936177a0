//! Makes filesystem images: a directory, or an existing raw image, becomes one sequential stream of bytes.
//!
//! Enters: a directory or a file. Leaves: the image, first byte to last, into an [`ImageSink`], and a [`Summary`].
//! Invariant: an image either went to the sink whole and right, or the call failed with an error that says why; and
//! nothing (mount, loop device, scratch file) is left behind.
//!
//! ext4 is written in one pass without root (`ext4`), by mke2fs where that can't hold the directory (`mke2fs`); XFS is
//! filled by the kernel through a loop mount and needs root (`xfs`). Everything but contents is read first (`scan`),
//! contents stream from a thread that reads ahead (`reader`).
//!
//! **What comes out the same**: types, permission bits, owners, modification times to the nanosecond, hard links,
//! symbolic links, extended attributes, ACLs, capabilities, holes, fifos, sockets, devices. Access times are set to the
//! modification time, unless [`ImageOptions::keep_atime`] asks for them: making an image would change them, and with
//! them the next image. Change and birth times can't be set by anybody in a live filesystem; in ext4 images they are
//! the modification time. Space reserved by `fallocate` but not written comes out as a hole.
//!
//! **Same directory, same bytes**: for ext4, identity, order and times come from the image's name and the tree. An image
//! that went through mke2fs is the same for the same directory but may differ for a copy of it. In XFS images only the
//! UUID is fixed: the kernel stamps change and birth times.

mod commit_sink;
mod dirs;
mod error;
mod ext4;
mod geometry;
mod identity;
mod loopmount;
mod mke2fs;
mod note;
mod progress;
mod raw;
mod reader;
mod scan;
mod sink;
mod tool;
mod tree;
mod xattrs;
mod xfs;

use std::fmt;
use std::path::{Path, PathBuf};

pub use commit_sink::{CommitSink, Target};
pub use error::{ImageError, UNREADABLE_NAMED_MAX};
pub use note::{Mke2fsReason, NOTE_EXAMPLES_MAX, Note, NoteKind};
pub use progress::{Phase, Progress};
pub use raw::image_from_file;
pub use sink::{FileSink, ImageSink, SinkError};

use crate::units::ByteLen;
use geometry::NoPlan;
use note::Notes;

/// The filesystems an image can have.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum FsKind {
    /// ext4. Also what ext2 and ext3 are mounted as.
    Ext4,
    /// XFS.
    Xfs,
}

impl FsKind {
    /// The name `mount -t` takes.
    pub fn name(self) -> &'static str {
        match self {
            FsKind::Ext4 => "ext4",
            FsKind::Xfs => "xfs",
        }
    }
}

impl fmt::Display for FsKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// How an image is to be made.
#[derive(Clone, Debug)]
pub struct ImageOptions {
    /// The filesystem.
    pub fs: FsKind,
    /// The device's size, rounded up to 4096; `None`: data and metadata, a quarter more, and 64 MiB.
    pub size: Option<ByteLen>,
    /// Where no size is given: the device is not made smaller than this, so that the next version of an image does not shrink.
    pub at_least: ByteLen,
    /// What UUID and hash seed are derived from.
    pub image_name: String,
    /// Store access times. Then the same directory gives other bytes once it was read.
    pub keep_atime: bool,
    /// Where scratch files may be made, for images that can't be streamed.
    pub scratch_dir: PathBuf,
    /// Directories that must not be met inside the source: the repository, the state directory.
    pub forbidden: Vec<PathBuf>,
}

impl ImageOptions {
    /// An ext4 image of a size that fits, with scratch files in `scratch_dir`.
    pub fn new(image_name: impl Into<String>, scratch_dir: impl Into<PathBuf>) -> ImageOptions {
        ImageOptions {
            fs: FsKind::Ext4,
            size: None,
            at_least: ByteLen(0),
            image_name: image_name.into(),
            keep_atime: false,
            scratch_dir: scratch_dir.into(),
            forbidden: Vec::new(),
        }
    }
}

/// What was made.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Summary {
    /// Regular files, however many names they have; 0 for a raw image.
    pub files: u64,
    /// Directories, the top one included; 0 for a raw image.
    pub dirs: u64,
    /// Bytes of contents read; holes are not read.
    pub bytes_read: ByteLen,
    /// The size of the device: what went to the sink, a multiple of 4096.
    pub device_size: ByteLen,
    /// The filesystem on it, where there is one we know.
    pub fs: Option<FsKind>,
    /// What the user should know.
    pub notes: Vec<Note>,
}

/// Makes an image of the directory `dir` and emits it into `sink`.
///
/// On Err the sink has received a part of the image and must be dropped. The directory must not change meanwhile:
/// a change of anything that was read already or is yet to be read is an error that names it.
pub fn image_from_dir(
    dir: &Path,
    options: &ImageOptions,
    sink: &mut dyn ImageSink,
    progress: &Progress,
) -> Result<Summary, ImageError> {
    progress.enter(Phase::Scan);
    let mut notes = Notes::default();
    let scan = scan::scan(dir, &options.forbidden, progress, &mut notes)?;
    let (files, dirs) = (scan.files, scan.dirs);
    let device_size = match options.fs {
        FsKind::Ext4 => ext4_from_scan(scan, options, sink, progress, &mut notes)?,
        FsKind::Xfs => xfs::emit(scan, options, sink, progress, &mut notes)?,
    };
    progress.enter(Phase::Done);
    Ok(Summary {
        files,
        dirs,
        bytes_read: progress.bytes_done(),
        device_size,
        fs: Some(options.fs),
        notes: notes.into_vec(),
    })
}

fn ext4_from_scan(
    scan: scan::Scan,
    options: &ImageOptions,
    sink: &mut dyn ImageSink,
    progress: &Progress,
    notes: &mut Notes,
) -> Result<ByteLen, ImageError> {
    ext4::check(&scan.tree, options, notes)?;
    let demand = geometry::Demand::of(&scan.tree);
    let fits = geometry::plan(demand, options.size);
    let plan = match fits {
        Ok(plan) if options.size.is_none() && plan.device < options.at_least => {
            geometry::plan(demand, Some(options.at_least))
        }
        other => other,
    };
    let plan = plan.map_err(|none| match none {
        NoPlan::Needs(needed) => ImageError::TooBig { needed, given: options.size.unwrap_or_default() },
        NoPlan::TooMuch => ImageError::TooMuch { fs: "ext4" },
    })?;
    if plan.filesystem != plan.device {
        let (filesystem, device) = (plan.filesystem, plan.device);
        notes.about_image(NoteKind::FilesystemSmaller { filesystem, device });
    }
    match ext4::needs_mke2fs(&scan.tree, plan.device) {
        None => ext4::emit(scan, plan, options, sink, progress, notes)?,
        Some((reason, example)) => {
            match example {
                Some(id) => notes.about(NoteKind::ThroughMke2fs(reason), || scan.tree.relative_path(id)),
                None => notes.about_image(NoteKind::ThroughMke2fs(reason)),
            }
            mke2fs::emit(scan, plan, reason, options, sink, progress, notes)?;
        }
    }
    Ok(plan.device)
}
