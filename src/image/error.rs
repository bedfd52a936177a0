//! What can go wrong while a directory or a file becomes an image.
//!
//! Every error names the file, tool or number it is about; none of them leaves a mount or a scratch file behind.

use std::io;
use std::path::{Path, PathBuf};

use super::sink::SinkError;
use crate::units::ByteLen;

/// How many unreadable files one error names.
pub const UNREADABLE_NAMED_MAX: usize = 20;

/// Why an image was not made.
#[derive(Debug, thiserror::Error)]
pub enum ImageError {
    /// The directory or file to be made an image is not there, or not what it should be.
    #[error("{path}: {source}", path = path.display())]
    Source {
        /// What was to be imaged.
        path: PathBuf,
        /// Why not.
        source: io::Error,
    },
    /// A system call on one file failed.
    #[error("{path}: cannot {what}: {source}", path = path.display())]
    Io {
        /// What was attempted ("read", "list its extended attributes").
        what: &'static str,
        /// On which file.
        path: PathBuf,
        /// The system's answer.
        source: io::Error,
    },
    /// Files or directories that this user may not read.
    #[error("{}", unreadable_text(paths, *more))]
    Unreadable {
        /// The first of them, at most [`UNREADABLE_NAMED_MAX`].
        paths: Vec<PathBuf>,
        /// How many more there are.
        more: u64,
    },
    /// A file or directory is not as it was when it was first looked at.
    #[error("{path}: changed while the image was made ({what}); stop its writers or copy a snapshot", path = path.display())]
    Changed {
        /// Which.
        path: PathBuf,
        /// What about it changed.
        what: &'static str,
    },
    /// A file or directory was there and is gone.
    #[error("{path}: vanished while the image was made; stop its writers or copy a snapshot", path = path.display())]
    Vanished {
        /// Which.
        path: PathBuf,
    },
    /// The directory's contents do not fit the device.
    #[error("the directory needs a device of {needed} bytes, the size given is {given}; hint: --size {}M or more", needed.value().div_ceil(1 << 20))]
    TooBig {
        /// The least size that holds it.
        needed: ByteLen,
        /// The size asked for.
        given: ByteLen,
    },
    /// The contents, or the size asked for, are beyond what a filesystem can have.
    #[error("the directory or the size is more than an {fs} filesystem can have")]
    TooMuch {
        /// Which filesystem.
        fs: &'static str,
    },
    /// The directory holds the place the image would be written to.
    #[error("{path}: is where the image goes; it can't be inside the directory", path = path.display())]
    OutputInside {
        /// The path inside the directory.
        path: PathBuf,
    },
    /// A file is bigger than the filesystem can hold.
    #[error("{path}: {size} bytes are more than the {max} a file can have in {fs}", path = path.display())]
    FileTooLarge {
        /// Which.
        path: PathBuf,
        /// Its size.
        size: ByteLen,
        /// The most it may have.
        max: ByteLen,
        /// In which filesystem.
        fs: &'static str,
    },
    /// A symbolic link's target is longer than the filesystem can hold.
    #[error("{path}: a link target of {len} bytes is more than the {max} of {fs}", path = path.display())]
    LinkTooLong {
        /// Which.
        path: PathBuf,
        /// The length of its target.
        len: ByteLen,
        /// The most it may have.
        max: ByteLen,
        /// In which filesystem.
        fs: &'static str,
    },
    /// A file has more names than ext4 can count.
    #[error("{path}: more than {max} hard links", path = path.display())]
    TooManyLinks {
        /// One of its names.
        path: PathBuf,
        /// The most ext4 can count.
        max: u32,
    },
    /// A `lost+found` at the top that is not a directory.
    #[error("{path}: ext4 needs this name for its own directory; rename it", path = path.display())]
    LostFound {
        /// Which.
        path: PathBuf,
    },
    /// A directory has more entries or names than this build can address.
    #[error("the directory has more than {max} entries")]
    TooManyEntries {
        /// The most it may have.
        max: u32,
    },
    /// The streaming ext4 writer refused.
    #[error("ext4: {0}")]
    Ext4(#[source] mkext4::Error),
    /// A program is not installed.
    #[error("{tool} is needed {why} and was not found; hint: install the package {package}")]
    ToolMissing {
        /// The program.
        tool: &'static str,
        /// What for.
        why: String,
        /// The Debian package it comes in.
        package: &'static str,
    },
    /// A program failed.
    #[error("{tool} failed ({status}): {stderr}")]
    ToolFailed {
        /// The program.
        tool: &'static str,
        /// How it ended.
        status: String,
        /// The end of what it wrote to standard error.
        stderr: String,
    },
    /// An XFS image needs a mount, which needs root.
    #[error("cannot {what}: an XFS image is filled through a loop mount, which needs root ({source})")]
    NeedsRoot {
        /// What was refused.
        what: &'static str,
        /// The system's answer.
        source: io::Error,
    },
    /// The kernel did not mount the image.
    #[error("cannot {what}: {source}; hint: 'modprobe xfs', or see what the kernel's log says")]
    Mount {
        /// What was refused.
        what: &'static str,
        /// The system's answer.
        source: io::Error,
    },
    /// No loop device could be had.
    #[error("cannot {what}: no usable loop device ({source})")]
    NoLoopDevice {
        /// What was attempted.
        what: &'static str,
        /// The system's answer.
        source: io::Error,
    },
    /// The scratch file failed.
    #[error("scratch file in {dir}: cannot {what}: {source}", dir = dir.display())]
    Scratch {
        /// What was attempted.
        what: &'static str,
        /// The scratch directory.
        dir: PathBuf,
        /// The system's answer.
        source: io::Error,
    },
    /// The sink failed.
    #[error("the image cannot be stored: {0}")]
    Sink(#[source] SinkError),
    /// [`Progress::cancel`](super::Progress::cancel) was called.
    #[error("cancelled")]
    Cancelled,
}

impl From<SinkError> for ImageError {
    fn from(source: SinkError) -> ImageError {
        ImageError::Sink(source)
    }
}

impl ImageError {
    /// The error for a failed call on a file that was there when it was listed.
    pub(crate) fn on_file(what: &'static str, path: PathBuf, source: rustix::io::Errno) -> ImageError {
        match source {
            rustix::io::Errno::NOENT | rustix::io::Errno::STALE => ImageError::Vanished { path },
            // The name is now a symbolic link or no directory: something else took the place of what was listed.
            rustix::io::Errno::LOOP | rustix::io::Errno::NOTDIR => {
                ImageError::Changed { path, what: "something else has its name" }
            }
            rustix::io::Errno::ACCESS | rustix::io::Errno::PERM => {
                ImageError::Unreadable { paths: vec![path], more: 0 }
            }
            other => ImageError::Io { what, path, source: other.into() },
        }
    }

    pub(crate) fn scratch(what: &'static str, dir: &Path) -> impl FnOnce(io::Error) -> ImageError {
        let dir = dir.to_path_buf();
        move |source| ImageError::Scratch { what, dir, source }
    }
}

fn unreadable_text(paths: &[PathBuf], more: u64) -> String {
    let names: Vec<String> = paths.iter().map(|path| path.display().to_string()).collect();
    let more = if more > 0 { format!(" and {more} more") } else { String::new() };
    format!("no permission to read {}{more}", names.join(", "))
}
