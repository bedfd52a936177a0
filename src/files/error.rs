//! What can go wrong with the files of a device.

use crate::device::DeviceError;
use crate::repo::RepoError;
use crate::units::{ByteLen, ByteOffset};

use super::FilePath;

/// Files that can't be read.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum FilesError {
    /// The repository can't give what is needed.
    #[error(transparent)]
    Repo(#[from] RepoError),
    /// The volume can't.
    #[error(transparent)]
    Device(#[from] Box<DeviceError>),
    /// The filesystem points past the end of its device.
    #[error("byte {end} is past the end of a device of {size} bytes")]
    OutOfRange {
        /// End of the read, exclusive.
        end: ByteOffset,
        /// Size of the device.
        size: ByteLen,
    },
    /// It is XFS, which only the kernel reads.
    #[error("this is an XFS filesystem: its files are read through a mount")]
    Xfs,
    /// There is nothing we know.
    #[error("there is no filesystem that is known here: neither ext4 nor XFS")]
    NoFilesystem,
    /// The filesystem uses something this build can't read.
    #[error("this ext4 filesystem uses {feature}, which this build can't read: mount it")]
    Unsupported {
        /// What.
        feature: String,
    },
    /// The filesystem says what can't be.
    #[error("the filesystem is damaged: {what}: {why}")]
    Damaged {
        /// Which part of it.
        what: String,
        /// What is wrong.
        why: &'static str,
    },
    /// There is nothing of this name.
    #[error("there is no {path}")]
    NotFound {
        /// The path, up to the name that is not there.
        path: FilePath,
    },
    /// A path leads through something that is no directory.
    #[error("{path} is no directory")]
    NotADirectory {
        /// The path.
        path: FilePath,
    },
    /// What is to be read is no plain file.
    #[error("{path} is {kind}, not a file")]
    NotAFile {
        /// The path.
        path: FilePath,
        /// What it is.
        kind: &'static str,
    },
    /// Symbolic links that lead nowhere.
    #[error("{path} leads through too many symbolic links")]
    TooManyLinks {
        /// The path.
        path: FilePath,
    },
    /// The content is encrypted by the filesystem.
    #[error("{path} is encrypted: only a mount with its key reads it")]
    Encrypted {
        /// The path.
        path: FilePath,
    },
    /// More than can be kept in memory.
    #[error("there are more than {most} {what}")]
    TooMany {
        /// Of what.
        what: &'static str,
        /// How many can be kept.
        most: usize,
    },
    /// The reader of a stream went away.
    #[error("nobody reads any more")]
    NobodyReads,
    /// A line could not be written as JSON.
    #[error("the answer can't be written: {0}")]
    Answer(String),
    /// A task of this program died or was stopped.
    #[error("the work was stopped")]
    Stopped,
}

impl From<DeviceError> for FilesError {
    fn from(error: DeviceError) -> FilesError {
        FilesError::Device(Box::new(error))
    }
}

impl FilesError {
    /// Whether it is the filesystem that is wrong, not what it is read from.
    pub(super) fn is_of_filesystem(&self) -> bool {
        matches!(
            self,
            FilesError::Damaged { .. } | FilesError::OutOfRange { .. } | FilesError::Unsupported { .. }
        )
    }

    pub(super) fn damaged(what: impl Into<String>, why: &'static str) -> FilesError {
        FilesError::Damaged { what: what.into(), why }
    }

    /// What to do about it; `mount` is the command that mounts this version.
    pub fn hint(&self, mount: &str) -> Option<String> {
        match self {
            FilesError::Xfs | FilesError::Unsupported { .. } => Some(format!("'{mount}' mounts it, as root")),
            FilesError::Damaged { .. } => {
                Some("mount a writable volume of it and run e2fsck on its device".to_owned())
            }
            _ => None,
        }
    }
}
