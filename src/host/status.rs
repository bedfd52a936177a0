//! What can be told of a volume without asking anybody else.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use super::{Entry, Host, HostError};
use crate::cache::Looking;
use crate::device::Brought;
use crate::format::CommitId;
use crate::kernel::device;
use crate::nbd::CommandCount;
use crate::repo::known_chunks;
use crate::store::Attempts;
use crate::units::{ByteLen, PAGE_SIZE};
use crate::volume::{VolumeName, VolumeRecord, pin};

/// A volume as it is now.
#[derive(Clone, Debug)]
pub struct VolumeStatus {
    /// Its name.
    pub name: VolumeName,
    /// What it is.
    pub record: VolumeRecord,
    /// The kernel device it is; `None` while it is none.
    pub device: Option<PathBuf>,
    /// Where it is mounted.
    pub mounts: Vec<PathBuf>,
    /// Whether all of it is here to stay.
    pub pinned: bool,
    /// How it is used; `None` while it is not open.
    pub open: Option<OpenStatus>,
}

/// An open volume as it is now.
#[derive(Clone, Copy, Debug)]
pub struct OpenStatus {
    /// NBD connections to it.
    pub connections: usize,
    /// Bytes of pages its delta has data for.
    pub dirty: ByteLen,
}

/// A volume in figures.
#[derive(Clone, Debug)]
pub struct VolumeFigures {
    /// The volume.
    pub status: VolumeStatus,
    /// Bytes of its image that are in the cache; `None` until they are counted.
    pub cached: Option<ByteLen>,
    /// What was done since it was opened; `None` while it is not open.
    pub since_open: Option<SinceOpen>,
}

/// What was done for an open volume.
#[derive(Clone, Debug)]
pub struct SinceOpen {
    /// Requests that were answered, by command.
    pub answered: Vec<CommandCount>,
    /// What was fetched for them, or ahead of them.
    pub brought: Brought,
}

/// What was asked of a repository that is in use.
#[derive(Clone, Debug)]
pub struct RepositoryFigures {
    /// Its places.
    pub access: Vec<String>,
    /// Requests of ours.
    pub requests: u64,
    /// Bytes that came.
    pub read: ByteLen,
    /// How they went; `None` where each is one attempt.
    pub attempts: Option<Attempts>,
}

/// How much of a volume is cached, as it was lately.
#[derive(Debug)]
pub(super) struct Cached {
    at: Instant,
    took: Duration,
    commit: CommitId,
    bytes: ByteLen,
}

impl Cached {
    /// Counting goes through a volume's whole map: who asks often has the last answer again for a while, the longer the longer it took.
    fn is_fresh(&self, commit: CommitId) -> bool {
        const SHARE_OF_TIME: u32 = 50;
        self.commit == commit && self.at.elapsed() < self.took * SHARE_OF_TIME
    }
}

impl Host {
    /// Bytes of a volume's image that are in the cache: now, or as they were when they were last counted, where that takes long; `None` until they are.
    pub async fn cached(self: &Arc<Self>, name: &VolumeName) -> Result<Option<ByteLen>, HostError> {
        /// Who asks is not kept longer by this.
        const PATIENCE: Duration = Duration::from_millis(300);
        let entry = self.entry(name)?;
        let commit = self.record(name, &entry)?.commit;
        if !entry.cached.lock().as_ref().is_some_and(|cached| cached.is_fresh(commit)) {
            let (host, counted) = (self.clone(), entry.clone());
            let counting = tokio::spawn(async move { host.count_cached(&counted, commit).await });
            // It goes on without us.
            let _ = tokio::time::timeout(PATIENCE, counting).await;
        }
        Ok(entry.cached.lock().as_ref().filter(|cached| cached.commit == commit).map(|cached| cached.bytes))
    }

    async fn count_cached(self: &Arc<Self>, entry: &Arc<Entry>, commit: CommitId) {
        // One at a time, of all volumes.
        let _counting = self.counting.lock().await;
        if entry.cached.lock().as_ref().is_some_and(|cached| cached.is_fresh(commit)) {
            return;
        }
        let (cache, at) = (self.cache.clone(), Instant::now());
        let counting = move || {
            let mut bytes = ByteLen(0);
            known_chunks(&Looking(&cache), commit, &mut |chunk, len| {
                bytes.0 += if cache.contains(chunk) { len } else { 0 };
            });
            bytes
        };
        if let Ok(bytes) = tokio::task::spawn_blocking(counting).await {
            *entry.cached.lock() = Some(Cached { at, took: at.elapsed(), commit, bytes });
        }
    }

    /// Every volume in figures, by name. What is cached is as it was when it was last counted.
    pub async fn figures(self: &Arc<Self>) -> Vec<VolumeFigures> {
        /// Who asks is not kept longer by counting.
        const PATIENCE: Duration = Duration::from_secs(1);
        let host = self.clone();
        let counting = async {
            for (name, _) in host.entries() {
                // One that was taken away meanwhile has nothing to be counted.
                let _ = host.cached(&name).await;
            }
        };
        let _ = tokio::time::timeout(PATIENCE, counting).await;
        let host = self.clone();
        let looking = move || {
            let of = |(name, entry): (VolumeName, Arc<Entry>)| {
                let status = host.status(&name, &entry)?;
                let since_open = entry.now.read().open.as_ref().map(|open| SinceOpen {
                    answered: open.export.answered(),
                    brought: open.volume.device().base().brought(),
                });
                let cached = entry.cached.lock().as_ref().map(|cached| cached.bytes);
                Some(VolumeFigures { status, cached, since_open })
            };
            host.entries().into_iter().filter_map(of).collect()
        };
        // It logged, if it panicked.
        tokio::task::spawn_blocking(looking).await.unwrap_or_default()
    }

    /// Every repository that is in use.
    pub fn repositories(&self) -> Vec<RepositoryFigures> {
        self.repositories.figures()
    }

    pub(super) fn status(&self, name: &VolumeName, entry: &Entry) -> Option<VolumeStatus> {
        let (record, index, open) = {
            let now = entry.now.read();
            let open = now.open.as_ref().map(|open| OpenStatus {
                connections: open.export.connections(),
                dirty: ByteLen(
                    open.volume.device().delta().map_or(0, |delta| delta.data_pages() * PAGE_SIZE),
                ),
            });
            (now.record()?, now.attached.as_ref().map(|attached| attached.index), open)
        };
        // The kernel is asked with nothing held.
        let mounts = index.map(Host::mounts).unwrap_or_default();
        let pinned = pin::is_pinned(&self.state.volume_dir(name.as_str()));
        let device = index.map(device::path_of);
        Some(VolumeStatus { name: name.clone(), record, device, mounts, pinned, open })
    }
}
