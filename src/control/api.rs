//! The words of the control API: what goes over the wire as JSON, both ways.
//!
//! Invariant: what one release sent, a later one reads; fields are added, never changed. Unknown fields of a request are refused, so that a typing error is not passed over.

use std::time::SystemTime;

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use crate::format::commit::Filesystem;
use crate::host::{self, JobStatus, VolumeStatus};
use crate::units::ByteLen;
use crate::volume::Prefetch;

pub use super::files::{FilesRequest, FilesVerb, VolumeDiff};

/// A volume to be made.
#[derive(Clone, Debug, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct CreateVolume {
    /// Its name: letters, digits, `_`, `.` and `-`, the first a letter or digit.
    pub name: String,
    /// Where the repository is: one place, or copies of it in several.
    pub access: Vec<String>,
    /// The image.
    pub image: String,
    /// The version: a branch, tag or commit, with or without `~N`; absent: the default branch.
    #[serde(default, rename = "ref", skip_serializing_if = "Option::is_none")]
    pub reference: Option<String>,
    /// Bytes of the device; absent: the image's size.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub size: Option<u64>,
    /// The filesystem that must be on it; absent: any.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub filesystem: Option<FilesystemKind>,
    /// Whether it refuses writes.
    #[serde(default)]
    pub read_only: bool,
    /// What is fetched before it is asked for.
    #[serde(default)]
    pub prefetch: PrefetchMode,
    /// Bytes its own writes may take; absent: no limit but the disk's.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub quota: Option<u64>,
}

/// A filesystem that can be asked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "lowercase")]
pub enum FilesystemKind {
    /// ext4.
    Ext4,
    /// XFS.
    Xfs,
}

impl From<FilesystemKind> for Filesystem {
    fn from(kind: FilesystemKind) -> Filesystem {
        match kind {
            FilesystemKind::Ext4 => Filesystem::Ext4,
            FilesystemKind::Xfs => Filesystem::Xfs,
        }
    }
}

/// What is fetched before it is asked for.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "lowercase")]
pub enum PrefetchMode {
    /// Nothing.
    None,
    /// What an earlier start read.
    #[default]
    Learned,
    /// Everything.
    All,
}

impl From<PrefetchMode> for Prefetch {
    fn from(mode: PrefetchMode) -> Prefetch {
        match mode {
            PrefetchMode::None => Prefetch::None,
            PrefetchMode::Learned => Prefetch::Learned,
            PrefetchMode::All => Prefetch::All,
        }
    }
}

impl From<Prefetch> for PrefetchMode {
    fn from(mode: Prefetch) -> PrefetchMode {
        match mode {
            Prefetch::None => PrefetchMode::None,
            Prefetch::Learned => PrefetchMode::Learned,
            Prefetch::All => PrefetchMode::All,
        }
    }
}

/// A volume as it is now.
#[derive(Clone, Debug, Serialize, Deserialize, ToSchema)]
pub struct Volume {
    /// Its name.
    pub name: String,
    /// The image.
    pub image: String,
    /// The version that was asked for; absent: the default branch.
    #[serde(default, rename = "ref", skip_serializing_if = "Option::is_none")]
    pub reference: Option<String>,
    /// The commit it stands on.
    pub commit: String,
    /// Where the repository is.
    pub access: Vec<String>,
    /// Bytes of the device.
    pub size: u64,
    /// Whether it refuses writes.
    pub read_only: bool,
    /// What is fetched before it is asked for.
    pub prefetch: PrefetchMode,
    /// Bytes its own writes may take; absent: no limit but the disk's.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub quota: Option<u64>,
    /// When it was made, in seconds since 1970.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub created: Option<u64>,
    /// The kernel device it is; absent while it is none.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub device: Option<String>,
    /// The directories it is mounted on.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub mounts: Vec<String>,
    /// Whether all of it is here to stay.
    #[serde(default)]
    pub pinned: bool,
    /// Bytes of the image that are in the cache here, as far as is known; absent in a list of volumes.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cached_bytes: Option<u64>,
    /// How it is used; absent while it is not open.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub open: Option<OpenVolume>,
}

/// How an open volume is used.
#[derive(Clone, Debug, Serialize, Deserialize, ToSchema)]
pub struct OpenVolume {
    /// NBD connections to it.
    pub connections: u64,
    /// Bytes its own writes take, in whole pages.
    pub dirty_bytes: u64,
}

impl From<VolumeStatus> for Volume {
    fn from(status: VolumeStatus) -> Volume {
        let VolumeStatus { name, record, device, mounts, pinned, open } = status;
        Volume {
            name: name.to_string(),
            commit: record.commit.to_string(),
            image: record.image,
            reference: record.reference,
            access: record.access,
            size: record.size.0,
            read_only: record.read_only,
            prefetch: record.prefetch.into(),
            quota: record.quota.map(|ByteLen(bytes)| bytes),
            created: record.created_s,
            device: device.map(|device| device.display().to_string()),
            mounts: mounts.iter().map(|dir| dir.display().to_string()).collect(),
            pinned,
            cached_bytes: None,
            open: open
                .map(|open| OpenVolume { connections: open.connections as u64, dirty_bytes: open.dirty.0 }),
        }
    }
}

/// Work that takes long, as it is now.
#[derive(Clone, Debug, Serialize, Deserialize, ToSchema)]
pub struct Job {
    /// Its number.
    pub id: u64,
    /// What it does.
    pub kind: JobKind,
    /// The volume it is about.
    pub volume: String,
    /// Where it stands.
    pub state: JobState,
    /// Why it failed.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub error: Option<String>,
    /// Bytes that are done.
    pub done_bytes: u64,
    /// Bytes there are to do; 0 until that is known.
    pub total_bytes: u64,
    /// When it was begun, in seconds since 1970.
    pub began: u64,
    /// Seconds it has been running, or ran.
    pub took_s: f64,
}

/// What a job does.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "lowercase")]
pub enum JobKind {
    /// Fetches all of a volume, to stay.
    Pin,
}

/// Where a job stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "lowercase")]
pub enum JobState {
    /// It runs.
    Running,
    /// It did what it was to do.
    Done,
    /// It was cancelled.
    Cancelled,
    /// It failed.
    Failed,
}

impl From<JobStatus> for Job {
    fn from(status: JobStatus) -> Job {
        let (state, error) = match status.state {
            host::JobState::Running => (JobState::Running, None),
            host::JobState::Done => (JobState::Done, None),
            host::JobState::Cancelled => (JobState::Cancelled, None),
            host::JobState::Failed(error) => (JobState::Failed, Some(error)),
        };
        let began = status.began.duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
        Job {
            id: status.id,
            kind: JobKind::Pin,
            volume: status.volume.to_string(),
            state,
            error,
            done_bytes: status.done.0,
            total_bytes: status.total.0,
            began: began.as_secs(),
            took_s: status.took.as_secs_f64(),
        }
    }
}

/// How a volume is to be attached.
#[derive(Clone, Debug, Default, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct Attach {
    /// The device, `/dev/nbdN`; absent: a free one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub device: Option<String>,
}

/// Where a volume is to be mounted.
#[derive(Clone, Debug, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct Mount {
    /// A directory that is there, by its absolute path.
    pub directory: String,
}

/// Where a volume is to be mounted no more.
#[derive(Clone, Debug, Default, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct Unmount {
    /// The directory; absent: everywhere.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub directory: Option<String>,
}

/// The daemon as it is now.
#[derive(Clone, Debug, Serialize, Deserialize, ToSchema)]
pub struct Status {
    /// The release that runs.
    pub version: String,
    /// Its process.
    pub pid: u32,
    /// Seconds since it started.
    pub up_s: u64,
    /// Its state directory.
    pub state_dir: String,
    /// Volumes there are.
    pub volumes: u64,
    /// Volumes that are open.
    pub open: u64,
    /// The host's cache.
    pub cache: CacheStatus,
}

/// The cache as it is now.
#[derive(Clone, Debug, Serialize, Deserialize, ToSchema)]
pub struct CacheStatus {
    /// Bytes of chunks that are here.
    pub used_bytes: u64,
    /// Bytes of disk it may take.
    pub limit_bytes: u64,
    /// Bytes fetched since the start.
    pub fetched_bytes: u64,
    /// Chunks asked for that were here.
    pub hits: u64,
    /// Chunks asked for that were not.
    pub misses: u64,
    /// Damaged chunks found, thrown away and fetched again.
    pub healed: u64,
}

/// Why a request was not done.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Failure {
    /// Which kind it is: for programs.
    pub code: String,
    /// What went wrong: for people.
    pub error: String,
    /// What to do about it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub hint: Option<String>,
}
