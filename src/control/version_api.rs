//! The words of the control API for commits, branches and snapshots of volumes.
//!
//! Invariant: as in `api.rs`: fields are added, never changed; unknown fields of a request are refused.

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use crate::host::{LogEntry, VersionStatus};
use crate::volume::{Snapshot, VolumeRecord};

/// A commit to be made.
#[derive(Clone, Debug, Default, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct Commit {
    /// Why; absent with `amend`: as before.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub message: Option<String>,
    /// Who.
    pub author: String,
    /// Make it even where nothing differs.
    #[serde(default)]
    pub allow_empty: bool,
    /// Put it in the place of the last one, which must not be pushed.
    #[serde(default)]
    pub amend: bool,
}

/// Where commits are to be pushed.
#[derive(Clone, Debug, Default, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct PushTo {
    /// The branch; absent: the volume's own.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub branch: Option<String>,
}

/// Where a volume is to stand.
#[derive(Clone, Debug, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct Checkout {
    /// A branch, tag or commit, or `HEAD`, with or without `~N`.
    #[serde(rename = "ref")]
    pub reference: String,
    /// Even where something is lost by it.
    #[serde(default)]
    pub force: bool,
}

/// Something that may lose what is nowhere else.
#[derive(Clone, Debug, Default, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct Force {
    /// Even where something is lost by it.
    #[serde(default)]
    pub force: bool,
}

/// A snapshot to be taken.
#[derive(Clone, Debug, Default, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct TakeSnapshot {
    /// Its name; absent: a number is found.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub name: Option<String>,
}

/// A volume to be made of another one.
#[derive(Clone, Debug, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct CloneTo {
    /// Its name.
    pub name: String,
}

/// What a pull came to.
#[derive(Clone, Debug, Serialize, Deserialize, ToSchema)]
pub struct Pulled {
    /// Whether the volume stands on another commit now.
    pub moved: bool,
    /// The commit it stands on.
    pub commit: String,
}

/// A volume in git's words.
#[derive(Clone, Debug, Serialize, Deserialize, ToSchema)]
pub struct VolumeVersion {
    /// Its name.
    pub name: String,
    /// The image.
    pub image: String,
    /// The commit it stands on.
    pub commit: String,
    /// The branch its commits go to; absent: it is on none.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub branch: Option<String>,
    /// Commits that are not pushed, those in the making too.
    pub ahead: u64,
    /// Commits the branch has and the volume has not; absent: the repository did not say.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub behind: Option<u64>,
    /// Bytes of pages that were written since the last commit.
    pub changed_bytes: u64,
    /// Whether nothing was written since.
    pub clean: bool,
    /// Commits that are being made.
    pub being_made: u64,
    /// Why the oldest of them is not made yet, where a try has failed.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub failed: Option<String>,
    /// Its snapshots.
    pub snapshots: u64,
}

impl VolumeVersion {
    /// Of a volume of this name.
    pub fn of(name: &str, status: VersionStatus) -> VolumeVersion {
        let VersionStatus { record, ahead, behind, changed, is_clean, failed } = status;
        let VolumeRecord { image, commit, branch, pending, snapshots, .. } = record;
        VolumeVersion {
            name: name.to_owned(),
            image,
            commit: commit.to_string(),
            branch,
            ahead,
            behind,
            changed_bytes: changed.0,
            clean: is_clean,
            being_made: pending.len() as u64,
            failed,
            snapshots: snapshots.len() as u64,
        }
    }
}

/// A commit of a volume's history.
#[derive(Clone, Debug, Serialize, Deserialize, ToSchema)]
pub struct LoggedCommit {
    /// Its id; absent: it is being made.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub id: Option<String>,
    /// The commits it follows.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub parents: Vec<String>,
    /// Who.
    pub author: String,
    /// When, in seconds since 1970.
    pub time: u64,
    /// Why.
    pub message: String,
    /// Whether it is known to be in the repository.
    pub pushed: bool,
}

impl From<LogEntry> for LoggedCommit {
    fn from(entry: LogEntry) -> LoggedCommit {
        let LogEntry { id, message, author, time, parents, is_pushed } = entry;
        LoggedCommit {
            id: id.map(|id| id.to_string()),
            parents: parents.iter().map(ToString::to_string).collect(),
            author,
            time: time.secs,
            message,
            pushed: is_pushed,
        }
    }
}

/// A state of a volume to come back to.
#[derive(Clone, Debug, Serialize, Deserialize, ToSchema)]
pub struct VolumeSnapshot {
    /// Its name.
    pub name: String,
    /// The commit it lies on.
    pub commit: String,
    /// When it was taken, in seconds since 1970.
    pub created: u64,
}

impl From<Snapshot> for VolumeSnapshot {
    fn from(snapshot: Snapshot) -> VolumeSnapshot {
        let Snapshot { name, commit, created_s, .. } = snapshot;
        VolumeSnapshot { name, commit: commit.to_string(), created: created_s }
    }
}
