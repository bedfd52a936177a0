//! What can go wrong with a volume or a state directory.

use std::io;
use std::path::PathBuf;

use crate::delta::DeltaError;
use crate::device::{BaseError, DeviceError};
use crate::format::commit::{Filesystem, MAX_DEVICE_SIZE};
use crate::format::{ChunkId, CommitId};
use crate::lock::LockError;
use crate::repo::RepoError;
use crate::units::ByteLen;

/// A volume that can't be opened.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum VolumeError {
    /// Another server uses the state directory.
    #[error("the state directory {dir} is in use{}", holder.map(|pid| format!(" by process {pid}")).unwrap_or_default())]
    StateDirInUse {
        /// The directory.
        dir: PathBuf,
        /// The process that says it holds it.
        holder: Option<u32>,
    },
    /// Another process has the volume open.
    #[error("volume {volume}: {source}")]
    Locked {
        /// The volume.
        volume: String,
        /// Who has it.
        source: LockError,
    },
    /// A file operation failed.
    #[error("can't {action} {path}: {source}")]
    Io {
        /// What was tried.
        action: &'static str,
        /// On what.
        path: PathBuf,
        /// The reason.
        source: io::Error,
    },
    /// A volume's record can't be understood.
    #[error("{path}: {problem}")]
    Record {
        /// The record.
        path: PathBuf,
        /// What is wrong with it.
        problem: String,
    },
    /// Not a name for a volume.
    #[error("'{text}' can't be a volume's name: {why}")]
    BadName {
        /// What was given.
        text: String,
        /// What is wrong with it.
        why: &'static str,
    },
    /// There is a volume of this name that was made of other wishes.
    #[error("there is a volume {volume} already, with {option} {has}, not {asked}")]
    NameTaken {
        /// The name.
        volume: String,
        /// What is different.
        option: &'static str,
        /// What it is made with.
        has: String,
        /// What was asked for.
        asked: String,
    },
    /// A device can't be smaller than what is on it.
    #[error("volume {volume} can't have {}: its image has {}", asked.human(), image.human())]
    SmallerThanImage {
        /// The volume.
        volume: String,
        /// The size asked for.
        asked: ByteLen,
        /// The image's size.
        image: ByteLen,
    },
    /// No device is that large.
    #[error("volume {volume} can't have {}: a device has at most {}", asked.human(), MAX_DEVICE_SIZE.human())]
    TooLarge {
        /// The volume.
        volume: String,
        /// The size asked for.
        asked: ByteLen,
    },
    /// Which version is asked for can't be known now.
    #[error("volume {volume}: the repository is out of reach, so what {reference} stands for can't be known")]
    Away {
        /// The volume.
        volume: String,
        /// What was asked for.
        reference: String,
    },
    /// All of a volume does not fit the cache.
    #[error("volume {volume} needs {} of the cache, which holds {}", needed.human(), limit.human())]
    CacheTooSmall {
        /// The volume.
        volume: String,
        /// What it needs.
        needed: ByteLen,
        /// What there is for chunks.
        limit: ByteLen,
    },
    /// The cache could not keep all that was fetched.
    #[error(
        "volume {volume}: the cache did not keep chunk {chunk}: its disk is full, or the limit too tight"
    )]
    NotKept {
        /// The volume.
        volume: String,
        /// One that is missing.
        chunk: ChunkId,
    },
    /// A part of the commit could not be fetched.
    #[error(transparent)]
    Base(#[from] BaseError),
    /// The volume is there, but of another image than the one it has the name of.
    #[error("volume {volume} is one of the image {recorded}, not of the image {volume}")]
    OtherImage {
        /// The volume.
        volume: String,
        /// The image it was made from.
        recorded: String,
    },
    /// The image's filesystem is not the one that was asked for.
    #[error("{image} holds {has}, not {asked}")]
    OtherFilesystem {
        /// The version.
        image: String,
        /// What it holds.
        has: Filesystem,
        /// What was asked for.
        asked: Filesystem,
    },
    /// The volume is there, but of another repository.
    #[error("volume {volume} is of the repository {recorded}, not of {asked}")]
    OtherRepository {
        /// The volume.
        volume: String,
        /// The repository it was made from.
        recorded: String,
        /// The repository asked for.
        asked: String,
    },
    /// The volume is there, but of another version.
    #[error("volume {volume} stands on commit {recorded}, not on {reference} ({asked})")]
    OtherBase {
        /// The volume.
        volume: String,
        /// The commit it stands on.
        recorded: CommitId,
        /// The version asked for.
        reference: String,
        /// The commit that is.
        asked: CommitId,
    },
    /// The repository can't give what the volume needs.
    #[error(transparent)]
    Repo(#[from] RepoError),
    /// The volume's writes can't be opened.
    #[error(transparent)]
    Delta(#[from] DeltaError),
    /// It takes no writes, so there is nothing of it to commit.
    #[error("volume {volume} is read-only")]
    ReadOnly {
        /// The volume.
        volume: String,
    },
    /// A layer that should have come to its end takes writes still, or is not there.
    #[error("volume {volume}: layer {layer} is not sealed")]
    NotSealed {
        /// The volume.
        volume: String,
        /// The layer.
        layer: String,
    },
    /// It reads through as many layers as it may.
    #[error("volume {volume} has {most} layers already, of snapshots that were taken since its last commit")]
    TooManyLayers {
        /// The volume.
        volume: String,
        /// How many it may have.
        most: usize,
    },
    /// The volume's disk can't be read or changed.
    #[error("volume {volume}: {source}")]
    Device {
        /// The volume.
        volume: String,
        /// The reason.
        source: Box<DeviceError>,
    },
    /// The server is going down.
    #[error("the server is stopping")]
    Stopped,
}

impl VolumeError {
    /// There is no record where there should be one.
    pub(super) fn missing(dir: &std::path::Path) -> VolumeError {
        VolumeError::Record { path: dir.join(super::RECORD_FILE), problem: "it is missing".to_owned() }
    }

    /// Whether it is for want of space on this host.
    pub fn is_full(&self) -> bool {
        match self {
            VolumeError::Delta(DeltaError::Full { .. } | DeltaError::Quota(_)) => true,
            VolumeError::Device { source, .. } => source.is_full(),
            VolumeError::Io { source, .. } => source.kind() == io::ErrorKind::StorageFull,
            _ => false,
        }
    }
}
