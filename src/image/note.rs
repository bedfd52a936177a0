//! What a user should know about an image that was made: nothing failed, but something is not as it was.
//!
//! Enters: one remark per file. Leaves: one [`Note`] per kind, with a count and a few examples.
//! Invariant: memory is bounded by the number of kinds, however many files a remark applies to.

use std::fmt;
use std::path::PathBuf;

use crate::units::ByteLen;

/// How many paths a note names.
pub const NOTE_EXAMPLES_MAX: usize = 5;

/// Kinds of xattr names a single image tells apart before it stops counting new ones.
const KINDS_MAX: usize = 64;

/// Why the streaming writer could not make this image, so that mke2fs did.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mke2fsReason {
    /// A file name is not UTF-8.
    Name,
    /// A symbolic link's target is not UTF-8.
    Target,
    /// An extended attribute's name is not UTF-8.
    XattrName,
    /// Extended attributes of one file take more than an inode and a block.
    XattrSize,
    /// A sparse file has more data segments than a two-level extent tree holds.
    Segments,
    /// `lost+found` in the directory is not empty.
    LostFound,
    /// The device is 16 TiB or more, which takes 64-bit block numbers.
    DeviceSize,
}

impl fmt::Display for Mke2fsReason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Mke2fsReason::Name => "names that are not UTF-8",
            Mke2fsReason::Target => "symbolic links whose target is not UTF-8",
            Mke2fsReason::XattrName => "extended attributes whose name is not UTF-8",
            Mke2fsReason::XattrSize => "extended attributes bigger than an inode and a block",
            Mke2fsReason::Segments => "sparse files in very many pieces",
            Mke2fsReason::LostFound => "a lost+found that is not empty",
            Mke2fsReason::DeviceSize => "a device of more than 16 TiB",
        })
    }
}

/// What a [`Note`] is about.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum NoteKind {
    /// The image went through mke2fs and a scratch file.
    ThroughMke2fs(Mke2fsReason),
    /// Inode flags (chattr) that are not carried over.
    InodeFlag(&'static str),
    /// Extended attributes the filesystem has no place for.
    XattrLost(String),
    /// Times outside the filesystem's range, set to the nearest it can hold.
    TimeClamped,
    /// `lost+found` is the filesystem's own; the directory's empty one was not copied.
    LostFound,
    /// Names of one symbolic link or special file that have become files of their own.
    LinkSplit,
    /// Directories that are mount points: what is mounted there is in the image.
    MountPoint,
    /// The filesystem is smaller than the device; the rest of the device is a hole.
    FilesystemSmaller {
        /// Size of the filesystem.
        filesystem: ByteLen,
        /// Size of the device.
        device: ByteLen,
    },
    /// A raw image was padded with zeros to a multiple of 4096 bytes.
    Padded {
        /// Its size before.
        from: ByteLen,
    },
}

/// Something a user should know about an image.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Note {
    /// What it is about.
    pub kind: NoteKind,
    /// How many files it applies to; 0 where it is about the image.
    pub count: u64,
    /// The first of them, relative to the directory.
    pub examples: Vec<PathBuf>,
}

impl fmt::Display for Note {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.kind {
            NoteKind::ThroughMke2fs(reason) => write!(f, "made by mke2fs because of {reason}")?,
            NoteKind::InodeFlag(flag) => write!(f, "the inode flag '{flag}' is not kept")?,
            NoteKind::XattrLost(name) => write!(f, "the attribute {name} is not kept")?,
            NoteKind::TimeClamped => f.write_str("times moved into the filesystem's range")?,
            NoteKind::LostFound => f.write_str("lost+found is the filesystem's own")?,
            NoteKind::LinkSplit => f.write_str("names of one link or special file that are separate now")?,
            NoteKind::MountPoint => f.write_str("mount points, whose contents are included")?,
            NoteKind::FilesystemSmaller { filesystem, device } => {
                write!(f, "the filesystem has {filesystem} bytes of the device's {device}")?
            }
            NoteKind::Padded { from } => write!(f, "padded with zeros from {from} bytes")?,
        }
        if let Some(first) = self.examples.first() {
            write!(f, ": {}", first.display())?;
            for path in &self.examples[1..] {
                write!(f, ", {}", path.display())?;
            }
            if self.count > self.examples.len() as u64 {
                write!(f, " and {} more", self.count - self.examples.len() as u64)?;
            }
        }
        Ok(())
    }
}

/// Collects remarks into notes.
#[derive(Debug, Default)]
pub(crate) struct Notes(Vec<Note>);

impl Notes {
    /// Adds one about the image.
    pub(crate) fn about_image(&mut self, kind: NoteKind) {
        self.0.push(Note { kind, count: 0, examples: Vec::new() });
    }

    /// Adds one about a file; `path` is asked for only while examples are wanted.
    pub(crate) fn about(&mut self, kind: NoteKind, path: impl FnOnce() -> PathBuf) {
        let note = match self.0.iter().position(|note| note.kind == kind) {
            Some(found) => &mut self.0[found],
            None if self.0.len() < KINDS_MAX => {
                self.0.push(Note { kind, count: 0, examples: Vec::new() });
                self.0.last_mut().expect("a note was pushed above")
            }
            None => return,
        };
        note.count += 1;
        if note.examples.len() < NOTE_EXAMPLES_MAX {
            note.examples.push(path());
        }
    }

    pub(crate) fn into_vec(self) -> Vec<Note> {
        self.0
    }
}
