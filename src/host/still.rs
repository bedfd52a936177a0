//! A volume's device that stands still while the volume is sealed.
//!
//! Enters: a device. Leaves: a moment in which nothing is written to it, and whether it lasted. Invariants: before anything is frozen there is a mark that says so, and it goes when the filesystem is known to
//! go on; whoever finds a mark at its start thaws what it tells of. So nothing stays frozen, whoever is killed when.

use std::path::PathBuf;
use std::time::Duration;

use tokio_util::sync::CancellationToken;

use super::attach::in_use;
use super::{Host, HostError};
use crate::format::ids;
use crate::kernel::{KernelError, apart, device};
use crate::volume::{VolumeName, VolumeRecord};

/// The longest a filesystem is made to stand still.
const STILL_LIMIT: Duration = Duration::from_secs(5);
/// The longest it is waited for: what is in memory is written back first, and the kernel may have to read for that.
const BEGIN_LIMIT: Duration = Duration::from_secs(60);
/// How long it waits before it tries again to thaw a filesystem.
const AGAIN: Duration = Duration::from_secs(1);
/// How a mark's name begins; the volume's id follows.
const MARK: &str = "frozen-";

/// A device that stands still.
pub(super) struct StandsStill {
    frozen: apart::Frozen,
    thaw: Thaw,
}

/// What it takes to have a filesystem go on for sure.
#[derive(Clone)]
struct Thaw {
    index: u32,
    mark: PathBuf,
    stop: CancellationToken,
}

impl Host {
    /// Has a volume's device stand still, as long as what is returned is not ended, and no longer than a bound.
    pub(super) async fn stand_still(
        &self,
        name: &VolumeName,
        record: &VolumeRecord,
        index: u32,
    ) -> Result<StandsStill, HostError> {
        let thaw = self.thaw_of(record, index);
        let mark = thaw.mark.clone();
        let marking = move || {
            let path = Some(mark.clone());
            let failed = |source| KernelError::System { action: "write".into(), path, source };
            std::fs::write(&mark, b"").map_err(failed)
        };
        tokio::task::spawn_blocking(marking).await.map_err(|_| HostError::Stopping)??;
        let mut beginning = tokio::spawn(apart::still(index, STILL_LIMIT));
        let Ok(begun) = tokio::time::timeout(BEGIN_LIMIT, &mut beginning).await else {
            // It goes on by itself when it comes to it: nobody holds its input open.
            tokio::spawn(async move {
                drop(beginning.await);
                thaw.for_sure().await;
            });
            return Err(HostError::NotStill { volume: name.to_string() });
        };
        match begun.map_err(|_| HostError::Stopping)? {
            Ok(frozen) => Ok(StandsStill { frozen, thaw }),
            // It may have been frozen: who did is gone without a word.
            Err(error @ KernelError::Answer(_)) => {
                thaw.for_sure().await;
                Err(error.into())
            }
            Err(error) => {
                thaw.is_done().await;
                Err(in_use(name, error))
            }
        }
    }

    /// Thaws a volume's filesystem where a daemon was killed that had frozen it.
    pub(super) fn thaw_what_was_frozen(&self, record: &VolumeRecord, index: u32) {
        let thaw = self.thaw_of(record, index);
        if thaw.mark.exists() {
            tracing::warn!(device = %device::path_of(index).display(), "a commit was cut short: its filesystem is thawed");
            tokio::spawn(async move { thaw.for_sure().await });
        }
    }

    fn thaw_of(&self, record: &VolumeRecord, index: u32) -> Thaw {
        let mark = self.state.run_dir().join(format!("{MARK}{}", ids::to_hex(&record.id)));
        Thaw { index, mark, stop: self.stop.clone() }
    }
}

impl StandsStill {
    /// Lets it go on. Whether it stood still until now.
    pub(super) async fn end(self) -> bool {
        match self.frozen.thaw().await {
            Ok(stood) => {
                self.thaw.is_done().await;
                stood
            }
            Err(error) => {
                tracing::warn!(%error, "a filesystem was not thawed by who froze it");
                self.thaw.for_sure().await;
                false
            }
        }
    }
}

impl Thaw {
    /// Until it goes on, or is no device any more; the next daemon goes on with it where this one stops.
    async fn for_sure(self) {
        loop {
            match apart::thaw(self.index).await {
                Ok(_) => return self.is_done().await,
                Err(_) if !device::is_connected(self.index) => return self.is_done().await,
                Err(error) => {
                    tracing::error!(device = %device::path_of(self.index).display(), %error, "its filesystem can't be thawed yet");
                }
            }
            tokio::select! { () = tokio::time::sleep(AGAIN) => {}, () = self.stop.cancelled() => return }
        }
    }

    async fn is_done(self) {
        // One that stays costs the next daemon a thaw of what is not frozen.
        let _ = tokio::task::spawn_blocking(move || std::fs::remove_file(&self.mark)).await;
    }
}
