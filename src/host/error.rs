//! What can go wrong with the volumes of a host.

use std::path::PathBuf;
use std::time::Duration;

use crate::device::DeviceError;
use crate::kernel::KernelError;
use crate::nbd::ServeError;
use crate::repo::RepoError;
use crate::store::UrlError;
use crate::units::{ByteLen, PAGE_SIZE};
use crate::volume::{Volume, VolumeError, VolumeName};

/// A request about a volume that can't be done.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum HostError {
    /// There is no volume of this name.
    #[error("there is no volume {volume}{}", listed(.known))]
    NoVolume {
        /// The name.
        volume: String,
        /// Some that there are.
        known: Vec<String>,
    },
    /// Someone uses the volume.
    #[error("volume {volume} is in use: {by}")]
    InUse {
        /// The volume.
        volume: String,
        /// By whom.
        by: String,
    },
    /// The repository's URL can't be understood.
    #[error(transparent)]
    Url(#[from] UrlError),
    /// The repository can't give what is needed.
    #[error(transparent)]
    Repo(#[from] RepoError),
    /// The volume can't be made, opened or taken away.
    #[error(transparent)]
    Volume(#[from] VolumeError),
    /// The volume's export can't be served.
    #[error(transparent)]
    Serve(#[from] ServeError),
    /// The kernel refuses.
    #[error(transparent)]
    Kernel(#[from] KernelError),
    /// The volume's first bytes can't be read.
    #[error("volume {volume} can't be read: {source}")]
    Read {
        /// The volume.
        volume: String,
        /// The reason.
        source: Box<DeviceError>,
    },
    /// There is nothing on the volume that could be mounted.
    #[error("volume {volume} has no filesystem that is known here: neither ext4 nor XFS")]
    NoFilesystem {
        /// The volume.
        volume: String,
    },
    /// The volume is not mounted there.
    #[error("volume {volume} is not mounted on {}", dir.display())]
    NotMounted {
        /// The volume.
        volume: String,
        /// Where.
        dir: PathBuf,
    },
    /// It could not be mounted in time.
    #[error("volume {volume} could not be mounted within {} s: what it needs first has not come", limit.as_secs())]
    TooSlow {
        /// The volume.
        volume: String,
        /// The time it had.
        limit: Duration,
    },
    /// There is no such job, or not any more.
    #[error("there is no job {id}")]
    NoJob {
        /// Its number.
        id: u64,
    },
    /// Nothing differs from the commit the volume stands on.
    #[error("nothing to commit: volume {volume} is as its commit has it")]
    NothingToCommit {
        /// The volume.
        volume: String,
    },
    /// A commit needs a message.
    #[error("a commit needs a message")]
    NoMessage,
    /// Only what nobody else can have seen is replaced.
    #[error("the last commit of volume {volume} is pushed: it can't be replaced")]
    AmendPushed {
        /// The volume.
        volume: String,
    },
    /// Commits are being made as fast as they can be.
    #[error("{count} commits of volume {volume} are being made already")]
    TooManyCommits {
        /// The volume.
        volume: String,
        /// How many there are.
        count: usize,
    },
    /// The filesystem did not stand still until the volume was sealed.
    #[error(
        "the filesystem of volume {volume} could not be kept still for long enough: nothing was committed"
    )]
    NotStill {
        /// The volume.
        volume: String,
    },
    /// What was written and not committed would be lost.
    #[error("volume {volume} has changes that are not committed ({}): {action} would lose them", changed.human())]
    Dirty {
        /// The volume.
        volume: String,
        /// What was asked for.
        action: &'static str,
        /// What its writes take.
        changed: ByteLen,
    },
    /// Commits that are nowhere else would be lost.
    #[error("volume {volume} has commits that are not pushed: {action} would lose them")]
    Unpushed {
        /// The volume.
        volume: String,
        /// What was asked for.
        action: &'static str,
    },
    /// A commit is in the making.
    #[error("a commit of volume {volume} is being made{}", why.as_ref().map(|why| format!(", and has failed so far: {why}")).unwrap_or_default())]
    BeingMade {
        /// The volume.
        volume: String,
        /// Why it is not done yet, where it has failed.
        why: Option<String>,
    },
    /// Somebody else has pushed.
    #[error(
        "not a fast-forward: {image}@{branch} has moved on to {actual}, which volume {volume} does not have"
    )]
    NotFastForward {
        /// The volume.
        volume: String,
        /// The image.
        image: String,
        /// The branch.
        branch: String,
        /// Where it is.
        actual: String,
    },
    /// Both have commits the other has not.
    #[error("volume {volume} and {image}@{branch} have diverged: each has commits the other has not")]
    Diverged {
        /// The volume.
        volume: String,
        /// The image.
        image: String,
        /// The branch.
        branch: String,
    },
    /// The volume is on no branch.
    #[error(
        "volume {volume} is on no branch: it was made of a tag, a commit, or a version before a branch's tip"
    )]
    NoBranch {
        /// The volume.
        volume: String,
    },
    /// The branch is gone.
    #[error("{image} has no branch {branch} any more")]
    BranchGone {
        /// The volume.
        volume: String,
        /// The image.
        image: String,
        /// The branch.
        branch: String,
    },
    /// There is no such snapshot.
    #[error("volume {volume} has no snapshot {snapshot}{}", listed(.has))]
    NoSnapshot {
        /// The volume.
        volume: String,
        /// The name.
        snapshot: String,
        /// Some that there are.
        has: Vec<String>,
    },
    /// There is one of this name.
    #[error("volume {volume} has a snapshot {snapshot} already")]
    SnapshotExists {
        /// The volume.
        volume: String,
        /// The name.
        snapshot: String,
    },
    /// Some places have it now, and some have not.
    #[error("it is pushed to {first}, but not everywhere: {}", failed.join("; "))]
    NotEverywhere {
        /// The place that has it.
        first: String,
        /// Why others have not.
        failed: Vec<String>,
    },
    /// The last flush failed.
    #[error("volume {volume} could not be flushed: {source}")]
    Flush {
        /// The volume.
        volume: String,
        /// The reason.
        source: Box<DeviceError>,
    },
    /// The server is going down.
    #[error("the server is stopping")]
    Stopping,
}

impl HostError {
    /// What was written to a volume since its last commit would be lost.
    pub(super) fn dirty(name: &VolumeName, action: &'static str, volume: &Volume) -> HostError {
        let changed = ByteLen(volume.changed_pages() * PAGE_SIZE);
        HostError::Dirty { volume: name.to_string(), action, changed }
    }
}

fn listed(names: &[String]) -> String {
    match names {
        [] => "; there is none yet".to_owned(),
        names => format!("; there is: {}", names.join(", ")),
    }
}
