//! What can go wrong with the volumes of a host.

use std::path::PathBuf;
use std::time::Duration;

use crate::device::DeviceError;
use crate::files::FilesError;
use crate::kernel::KernelError;
use crate::nbd::ServeError;
use crate::repo::RepoError;
use crate::store::UrlError;
use crate::volume::VolumeError;

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
    /// The volume's files can't be read.
    #[error("{volume}: {source}")]
    Files {
        /// The volume.
        volume: String,
        /// The reason.
        source: Box<FilesError>,
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

fn listed(names: &[String]) -> String {
    match names {
        [] => "; there is none yet".to_owned(),
        names => format!("; there is: {}", names.join(", ")),
    }
}
