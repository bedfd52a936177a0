//! What can go wrong with a delta, one enum.

use std::io;
use std::path::PathBuf;

use crate::format::{CommitId, FormatError};
use crate::units::ByteLen;

/// A delta that can't do what was asked.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum DeltaError {
    /// The disk the delta is on is full; nothing was changed.
    #[error("no space left for the delta in {path}")]
    Full {
        /// The file that could not grow.
        path: PathBuf,
    },
    /// The volume's own writes take as much as they may.
    #[error("the volume's quota of {} is used up", .0.human())]
    Quota(ByteLen),
    /// A file operation failed.
    #[error("can't {action} {path}: {source}")]
    Io {
        /// What was tried.
        action: &'static str,
        /// The file.
        path: PathBuf,
        /// The reason.
        source: io::Error,
    },
    /// A header that is not one of ours, or is damaged, or is of another version.
    #[error("{path}: {source}")]
    Format {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        source: FormatError,
    },
    /// The layer belongs to another commit: on this base its pages would be garbage.
    #[error("{path} is a delta of commit {found}, not of {expected}")]
    WrongBase {
        /// The layer's map.
        path: PathBuf,
        /// The commit the volume has.
        expected: CommitId,
        /// The commit the layer was made for.
        found: CommitId,
    },
    /// The layer belongs to another volume, has another size, or its two files are not a pair.
    #[error("{path} does not belong here: its {field} is not the volume's")]
    Foreign {
        /// The file.
        path: PathBuf,
        /// What differs.
        field: &'static str,
    },
    /// The log is damaged in its middle.
    #[error("{path} is damaged at byte {offset}: {problem}")]
    Damaged {
        /// The log.
        path: PathBuf,
        /// Where.
        offset: u64,
        /// What is wrong there.
        problem: &'static str,
    },
    /// The layer takes no writes any more: there is another above it. Whoever holds an old view of the stack asks for the new one.
    #[error("the layer is sealed")]
    Sealed,
    /// An fsync failed before; nothing can be promised until the volume is opened anew.
    #[error("the delta is read-only since an fsync failed: {0}")]
    Poisoned(String),
}

impl DeltaError {
    /// Wraps the failure of `action` on `path`.
    pub(crate) fn io(action: &'static str, path: PathBuf, source: io::Error) -> DeltaError {
        match source.kind() {
            io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => DeltaError::Full { path },
            _ => DeltaError::Io { action, path, source },
        }
    }
}
