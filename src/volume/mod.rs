//! Volumes: a named, writable view of one commit on this host.
//!
//! Enters: a state directory, a repository and which version of which image. Leaves: a [`Volume`] with its device. Invariant: a volume keeps its base commit
//! as long as its delta holds anything; its directory is locked by whoever has it open.

mod error;
pub mod pin;
pub mod prefetch;
mod record;
mod state_dir;

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

pub use error::VolumeError;
pub use prefetch::Prefetch;
pub use record::{RECORD_FILE, VolumeRecord};
pub use state_dir::{StateDir, default_state_dir, volume_dir};

use crate::cache::Cache;
use crate::delta::disk::OsDir;
use crate::delta::{Delta, Identity, Layer, LayerId, VolumeId};
use crate::device::{Base, Device};
use crate::format::{CommitId, PrefetchList};
use crate::lock::FileLock;
use crate::repo::{ImageName, MetaCache, Reference, Repository, Version, VersionOptions};
use crate::units::{ByteLen, PAGE_SIZE};

/// How long a start waits for the repository where it could do without.
const PATIENCE: Duration = Duration::from_secs(5);

/// Which version of which image a volume is to be a view of.
#[derive(Clone, Debug)]
pub struct Source {
    /// The repository, as the user named it.
    pub access: String,
    /// The image.
    pub image: ImageName,
    /// The version; `None` is the tip of the default branch, or what the volume has already.
    pub reference: Option<Reference>,
}

/// A volume that is open.
pub struct Volume {
    name: String,
    record: VolumeRecord,
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
    pub async fn open(
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
        let resolve = async |reference: &Reference| {
            repository.resolve(&source.image, reference, &meta).await.map(|resolved| resolved.commit)
        };
        let mut newer = None;
        let commit = match (&recorded, &source.reference) {
            (None, reference) => resolve(&reference.clone().unwrap_or_default()).await?,
            (Some(record), reference) => {
                record.check_repository(&name, source, repository)?;
                let asked = reference.clone().unwrap_or_default();
                // A repository that can't be reached now must not keep the volume from its user.
                let resolved = tokio::time::timeout(PATIENCE, resolve(&asked)).await;
                match (reference, resolved) {
                    (Some(reference), Ok(Ok(asked))) => record.check_base(&name, reference, asked)?,
                    (Some(reference), Err(_)) if record.is_of(reference) => {}
                    (Some(reference), Ok(Err(error))) if error.is_away() && record.is_of(reference) => {}
                    (Some(_), Ok(Err(error))) => return Err(error.into()),
                    (Some(reference), Err(_)) => {
                        let (volume, reference) = (name.clone(), reference.to_string());
                        return Err(VolumeError::Away { volume, reference });
                    }
                    // For the message alone.
                    (None, tip) => newer = tip.ok().and_then(Result::ok).filter(|tip| *tip != record.commit),
                }
                record.commit
            }
        };
        let opening =
            Version::open(repository, &source.image, commit, meta.clone(), VersionOptions::default());
        // Asked for at once: on a cold start every round trip counts. A volume that was here has its own.
        let listing = async {
            match recorded {
                None => repository.prefetch_list(&source.image, commit).await.ok().flatten(),
                Some(_) => None,
            }
        };
        let (version, list) = tokio::join!(opening, listing);
        let version = version?;
        let size = version.commit().size;
        let base = Base::new(version, cache.clone()).reading_ahead();
        let record = recorded.clone().unwrap_or_else(|| VolumeRecord::new(source, repository, commit, size));
        if recorded.is_none() && read_only {
            let device = Arc::new(Device::new(base, None, size));
            return Ok(Volume { name, record, device, newer, list, dir: None, _lock: None });
        }
        let opening = {
            let (dir, name, record, is_new) = (dir.clone(), name.clone(), record.clone(), recorded.is_none());
            move || open_delta(&dir, &name, &record, is_new)
        };
        let (lock, delta) =
            tokio::task::spawn_blocking(opening).await.map_err(|_| VolumeError::Stopped)??;
        let device = Device::new(base, Some(delta), record.size);
        let device = Arc::new(if read_only { device.into_read_only() } else { device });
        let volume = Volume { name, record, device, newer, list, dir: Some(dir), _lock: Some(lock) };
        volume.keep_pinned(cache).await;
        Ok(volume)
    }

    /// Its name, which is its export's.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// What it is.
    pub fn record(&self) -> &VolumeRecord {
        &self.record
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

/// Opens the layers of a volume, or makes the first one; blocks on the disk.
fn open_delta(
    dir: &Path,
    name: &str,
    record: &VolumeRecord,
    is_new: bool,
) -> Result<(FileLock, Delta), VolumeError> {
    let io = |action| move |source| VolumeError::Io { action, path: dir.to_owned(), source };
    // Each name is synced, made now or by a server that was killed before it came to it; so is the record's.
    let volumes = crate::durable::parent_of(dir);
    crate::durable::create_dirs(dir, &mut |dir| dir == volumes).map_err(io("make the directory"))?;
    let lock = FileLock::take(&dir.join("lock"))
        .map_err(|source| VolumeError::Locked { volume: name.to_owned(), source })?;
    let identity = Identity {
        base: record.commit,
        volume: VolumeId(record.id),
        device_size: ByteLen(record.size.0.next_multiple_of(PAGE_SIZE)),
    };
    let layer_dir = |layer: &str| dir.join("layers").join(layer);
    let layers = if is_new {
        let path = layer_dir(&record.layers[0]);
        refuse_orphan(dir, &path)?;
        crate::durable::create_dirs(&path, &mut |path| path == dir).map_err(io("make the directory"))?;
        let layer = Layer::create(Box::new(OsDir::new(&path)), &identity, LayerId(random_id()))?;
        // The layer first: a record must never name one that is not there.
        record.store(dir)?;
        vec![Arc::new(layer)]
    } else {
        crate::durable::sync_dir(dir).map_err(io("sync"))?;
        let open =
            |layer: &String| Layer::open(Box::new(OsDir::new(&layer_dir(layer))), &identity).map(Arc::new);
        record.layers.iter().map(open).collect::<Result<Vec<_>, _>>()?
    };
    Ok((lock, Delta::new(layers)))
}

/// A layer without a record is one whose making was cut short, and is made anew; but it must be empty, else it is somebody's.
fn refuse_orphan(dir: &Path, layer: &Path) -> Result<(), VolumeError> {
    let data = layer.join(crate::delta::DATA_FILE);
    match std::fs::metadata(&data) {
        Ok(metadata) if metadata.len() > PAGE_SIZE => Err(VolumeError::Record {
            path: dir.join(RECORD_FILE),
            problem: format!(
                "it is missing, and {} holds writes; put the record back, or move the directory away to begin anew",
                data.display()
            ),
        }),
        Err(source) if source.kind() != std::io::ErrorKind::NotFound => {
            Err(VolumeError::Io { action: "look at", path: data, source })
        }
        _ => Ok(()),
    }
}

/// 16 random bytes.
pub(crate) fn random_id() -> [u8; 16] {
    *uuid::Uuid::new_v4().as_bytes()
}
