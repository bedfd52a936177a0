//! A volume's directory: its lock and the layers of its delta.
//!
//! Enters: the directory and the volume's record. Leaves: the delta, opened or made, under the volume's lock. Invariant: a record never names a layer that is not there.

use std::path::Path;
use std::sync::Arc;

use super::{RECORD_FILE, VolumeError, VolumeRecord, random_id};
use crate::delta::disk::OsDir;
use crate::delta::{Delta, Identity, Layer, LayerId, VolumeId};
use crate::lock::FileLock;
use crate::units::{ByteLen, PAGE_SIZE};

/// A volume's layers, and the lock under which they are open.
pub struct Layers {
    /// What they are together.
    pub delta: Delta,
    /// Nobody else has the volume open as long as this lives.
    pub lock: FileLock,
}

impl Layers {
    /// Takes the volume's lock, making its directory if need be.
    pub fn lock(dir: &Path, name: &str) -> Result<FileLock, VolumeError> {
        // Each name is synced, made now or by a server that was killed before it came to it; so is the record's.
        let volumes = crate::durable::parent_of(dir);
        crate::durable::create_dirs(dir, &mut |dir| dir == volumes).map_err(io(dir, "make the directory"))?;
        FileLock::take(&dir.join("lock"))
            .map_err(|source| VolumeError::Locked { volume: name.to_owned(), source })
    }

    /// Makes the volume: its first layer, then its record.
    pub fn make(dir: &Path, name: &str, record: &VolumeRecord) -> Result<Layers, VolumeError> {
        let lock = Self::lock(dir, name)?;
        let path = layer_dir(dir, &record.layers[0]);
        refuse_orphan(dir, &path)?;
        crate::durable::create_dirs(&path, &mut |path| path == dir).map_err(io(dir, "make the directory"))?;
        let layer = Layer::create(Box::new(OsDir::new(&path)), &identity(record), LayerId(random_id()))?;
        // The layer first: a record must never name one that is not there.
        record.store(dir)?;
        let layer = bounded(layer, record, 0);
        Ok(Layers { delta: Delta::new(vec![Arc::new(layer)]), lock })
    }

    /// Opens the layers the record names.
    pub fn open(dir: &Path, name: &str, record: &VolumeRecord) -> Result<Layers, VolumeError> {
        let lock = Self::lock(dir, name)?;
        crate::durable::sync_dir(dir).map_err(io(dir, "sync"))?;
        let identity = identity(record);
        let (mut layers, mut pages) = (Vec::new(), 0);
        for layer in &record.layers {
            let layer = Layer::open(Box::new(OsDir::new(&layer_dir(dir, layer))), &identity)?;
            let layer = bounded(layer, record, pages);
            pages += layer.data_pages();
            layers.push(Arc::new(layer));
        }
        Ok(Layers { delta: Delta::new(layers), lock })
    }
}

/// A layer that takes no more than the quota leaves it over the pages of those below.
fn bounded(layer: Layer, record: &VolumeRecord, below: u64) -> Layer {
    match record.quota {
        Some(quota) => layer.with_quota(ByteLen(quota.0.saturating_sub(below * PAGE_SIZE))),
        None => layer,
    }
}

fn io(dir: &Path, action: &'static str) -> impl Fn(std::io::Error) -> VolumeError {
    move |source| VolumeError::Io { action, path: dir.to_owned(), source }
}

fn layer_dir(dir: &Path, layer: &str) -> std::path::PathBuf {
    dir.join("layers").join(layer)
}

fn identity(record: &VolumeRecord) -> Identity {
    Identity {
        base: record.commit,
        volume: VolumeId(record.id),
        device_size: ByteLen(record.size.0.next_multiple_of(PAGE_SIZE)),
    }
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
