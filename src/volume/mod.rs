//! Volumes: a named, writable view of one commit on this host.
//!
//! Enters: a state directory, a repository and which version of which image. Leaves: a [`Volume`] with its device. Invariant: a volume keeps its base commit
//! as long as its delta holds anything; its directory is locked by whoever has it open.

pub mod commit;
mod create;
mod error;
mod history;
mod layers;
mod name;
mod needed;
pub mod pin;
pub mod prefetch;
mod record;
mod record_json;
mod seal;
mod state_dir;
pub mod travel;

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use parking_lot::{Mutex, RwLock};

pub use create::{NewVolume, remove};
pub use error::VolumeError;
pub use history::{LayerRef, Pending, Snapshot};
use layers::Layers;
pub use name::VolumeName;
pub use needed::{chunks_here, unused_chunks};
pub use prefetch::Prefetch;
use record::Wanted;
pub use record::{RECORD_FILE, VolumeRecord};
pub use seal::MAX_LAYERS;
pub use state_dir::{StateDir, default_state_dir, volume_dir};

use crate::cache::Cache;
use crate::delta::Layer;
use crate::device::{Base, Device, DeviceError};
use crate::format::{CommitId, PrefetchList};
use crate::lock::FileLock;
use crate::repo::{ImageName, MetaCache, Reference, Repository, Resolved, Version, VersionOptions};
use crate::store::DirStore;

/// How long a start waits for the repository where it could do without.
const PATIENCE: Duration = Duration::from_secs(5);

/// Which version of which image a volume is to be a view of.
#[derive(Clone, Debug)]
pub struct Source {
    /// Where the repository is, as the user named it: one place, or copies of it in several. Never empty.
    pub access: Vec<String>,
    /// The image.
    pub image: ImageName,
    /// The version; `None` is the tip of the default branch, or what the volume has already.
    pub reference: Option<Reference>,
}

impl Source {
    fn wanted(&self) -> Wanted {
        Wanted {
            access: self.access.clone(),
            image: self.image.to_string(),
            reference: self.reference.as_ref().map(ToString::to_string),
            size: None,
            read_only: false,
            prefetch: Prefetch::Learned,
            quota: None,
            from: None,
        }
    }
}

/// A volume that is open.
pub struct Volume {
    name: String,
    record: RwLock<VolumeRecord>,
    /// Held by who changes which layers there are, or the record, for as long as the disk takes. Taken before `waiting`.
    changing: Mutex<()>,
    /// The layer that is made, and that does not take the writes yet. Held for moments only: a filesystem stands still for it.
    waiting: Mutex<Option<Arc<Layer>>>,
    /// Held by who makes a commit of it.
    making: tokio::sync::Mutex<()>,
    device: Arc<Device>,
    /// The branch's tip, where the volume stands on an older commit.
    newer: Option<CommitId>,
    /// The commit's prefetch list, where it was asked for at the start.
    list: Option<PrefetchList>,
    /// Its directory; `None` for a view that leaves nothing behind.
    dir: Option<PathBuf>,
    _lock: Option<FileLock>,
}

impl Volume {
    /// Opens the volume named like its image, making it if it is not there. A read-only view of an image that has no volume here leaves nothing behind.
    pub async fn of_image(
        state: &StateDir,
        cache: &Arc<Cache>,
        repository: &Repository,
        source: &Source,
        read_only: bool,
    ) -> Result<Volume, VolumeError> {
        let name = source.image.to_string();
        let dir = state.volume_dir(&name);
        let meta: Arc<dyn MetaCache> = cache.clone();
        let recorded = VolumeRecord::load(&dir)?;
        let resolve = async |reference: &Reference| repository.resolve(&source.image, reference, &meta).await;
        let Some(record) = recorded else {
            let resolved = resolve(&source.reference.clone().unwrap_or_default()).await?;
            return Self::make(dir, cache, repository, source, resolved, read_only).await;
        };
        record.check_image(&name, source)?;
        record.check_repository(&name, source, repository)?;
        let asked = source.reference.clone().unwrap_or_default();
        // A repository that can't be reached now must not keep the volume from its user.
        let resolved = tokio::time::timeout(PATIENCE, resolve(&asked)).await;
        let mut newer = None;
        match (&source.reference, resolved) {
            (Some(reference), Ok(Ok(asked))) => record.check_base(&name, reference, asked.commit)?,
            (Some(reference), Err(_)) if record.is_of(reference) => {}
            (Some(reference), Ok(Err(error))) if error.is_away() && record.is_of(reference) => {}
            (Some(_), Ok(Err(error))) => return Err(error.into()),
            (Some(reference), Err(_)) => {
                let (volume, reference) = (name.clone(), reference.to_string());
                return Err(VolumeError::Away { volume, reference });
            }
            // For the message alone.
            (None, tip) => {
                newer =
                    tip.ok().and_then(Result::ok).map(|tip| tip.commit).filter(|tip| *tip != record.pushed)
            }
        }
        let volume = Self::open(state, cache, repository, &name, read_only).await?;
        Ok(Volume { newer, ..volume })
    }

    /// Opens a volume that is here, as its record on the disk has it; `read_only` refuses writes to one that takes them.
    pub async fn open(
        state: &StateDir,
        cache: &Arc<Cache>,
        repository: &Repository,
        name: &str,
        read_only: bool,
    ) -> Result<Volume, VolumeError> {
        let dir = state.volume_dir(name);
        let reading = {
            let (dir, name) = (dir.clone(), name.to_owned());
            move || {
                let lock = Layers::lock(&dir, &name)?;
                // Under the lock: whoever had it open before may have changed it last, and not have come to say so.
                let record = VolumeRecord::load(&dir)?.ok_or_else(|| VolumeError::missing(&dir))?;
                Ok::<_, VolumeError>((lock, record))
            }
        };
        let (lock, record) =
            tokio::task::spawn_blocking(reading).await.map_err(|_| VolumeError::Stopped)??;
        let image = record.image(&dir)?;
        // What was committed here is here, and is never asked of the repository.
        let repository = &repository.over(DirStore::new(state.made_dir(&record.repository)));
        let (meta, options): (Arc<dyn MetaCache>, _) = (cache.clone(), VersionOptions::default());
        let version = Version::open(repository, &image, record.commit, meta, options).await?;
        let opening = {
            let (dir, name, record) = (dir.clone(), name.to_owned(), record.clone());
            move || Layers::open(&dir, &name, &record, lock)
        };
        let layers = tokio::task::spawn_blocking(opening).await.map_err(|_| VolumeError::Stopped)??;
        let read_only = read_only || record.read_only;
        let volume = Self::over(version, cache, name, record, Some((dir, layers)), read_only);
        volume.keep_pinned(cache).await;
        Ok(volume)
    }

    /// Makes the volume named like its image, and opens it.
    async fn make(
        dir: PathBuf,
        cache: &Arc<Cache>,
        repository: &Repository,
        source: &Source,
        resolved: Resolved,
        read_only: bool,
    ) -> Result<Volume, VolumeError> {
        let (name, commit) = (source.image.to_string(), resolved.commit);
        let (meta, options): (Arc<dyn MetaCache>, _) = (cache.clone(), VersionOptions::default());
        // The list at once too: on a cold start every round trip counts.
        let (version, list) = tokio::join!(
            Version::open(repository, &source.image, commit, meta, options),
            repository.prefetch_list(&source.image, commit),
        );
        let (version, list) = (version?, list.ok().flatten());
        let record = VolumeRecord::new(
            source.wanted(),
            repository,
            commit,
            resolved.branch.map(|branch| branch.to_string()),
            version.commit().size,
        );
        let layers = if read_only {
            None
        } else {
            let (name, dir, record) = (name.clone(), dir.clone(), record.clone());
            let making = move || Layers::make(&dir, &name, &record).map(|layers| (dir, layers));
            Some(tokio::task::spawn_blocking(making).await.map_err(|_| VolumeError::Stopped)??)
        };
        Ok(Volume { list, ..Self::over(version, cache, &name, record, layers, read_only) })
    }

    fn over(
        version: Version,
        cache: &Arc<Cache>,
        name: &str,
        record: VolumeRecord,
        layers: Option<(PathBuf, Layers)>,
        read_only: bool,
    ) -> Volume {
        let base = Base::new(version, cache.clone()).reading_ahead();
        let (dir, delta, lock) = match layers {
            Some((dir, Layers { delta, lock })) => (Some(dir), Some(delta), Some(lock)),
            None => (None, None, None),
        };
        let device = Device::new(base, delta, record.size);
        let device = Arc::new(if read_only { device.into_read_only() } else { device });
        Volume {
            name: name.to_owned(),
            record: RwLock::new(record),
            changing: Mutex::new(()),
            waiting: Mutex::new(None),
            making: tokio::sync::Mutex::new(()),
            device,
            newer: None,
            list: None,
            dir,
            _lock: lock,
        }
    }

    /// Its name, which is its export's.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// What it is.
    pub fn record(&self) -> VolumeRecord {
        self.record.read().clone()
    }

    fn device_failed(&self, source: DeviceError) -> VolumeError {
        VolumeError::Device { volume: self.name.clone(), source: Box::new(source) }
    }

    /// Its disk.
    pub fn device(&self) -> &Arc<Device> {
        &self.device
    }

    /// The tip of its branch, where that has moved on since the volume was made.
    pub fn newer(&self) -> Option<CommitId> {
        self.newer
    }
}

/// 16 random bytes.
pub(crate) fn random_id() -> [u8; 16] {
    *uuid::Uuid::new_v4().as_bytes()
}
