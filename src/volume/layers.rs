//! A volume's directory: its lock and the layers of its delta.
//!
//! Enters: the directory and the volume's record. Leaves: the delta, opened or made, under the volume's lock. Invariant: a record never names a layer that is not there; what no record names is
//! nobody's, and is deleted.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use super::history::LayerRef;
use super::{RECORD_FILE, VolumeError, VolumeRecord, random_id};
use crate::delta::disk::OsDir;
use crate::delta::{Binding, DATA_FILE, Delta, DeltaError, Identity, Layer, LayerId, MAP_FILE, VolumeId};
use crate::lock::FileLock;
use crate::units::{ByteLen, PAGE_SIZE};

/// Where the layers are, in a volume's directory.
const LAYERS: &str = "layers";

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
        refuse_orphans(dir)?;
        let layer = create(dir, &record.layers[0], LayerId(random_id()), record)?;
        // The layer first: a record must never name one that is not there.
        record.store(dir)?;
        let layer = bounded(layer, record, 0);
        Ok(Layers { delta: Delta::new(vec![Arc::new(layer)]), lock })
    }

    /// Opens the layers the record names, and deletes what it does not. The record was read under the lock: one from before may not name what was written to last.
    pub fn open(
        dir: &Path,
        name: &str,
        record: &VolumeRecord,
        lock: FileLock,
    ) -> Result<Layers, VolumeError> {
        crate::durable::sync_dir(dir).map_err(io(dir, "sync"))?;
        let (mut layers, mut pages) = (Vec::new(), 0);
        let top = record.layers.len() - 1;
        for (at, layer) in record.layers.iter().enumerate() {
            let layer = open(dir, layer, record)?;
            if at < top {
                // A server that was killed had put the next one on already.
                layer.seal(|| ());
                match layer.settle() {
                    // Every flush tries it again.
                    Err(error @ DeltaError::Full { .. }) => {
                        tracing::warn!(volume = name, %error, "a sealed layer can't be made durable yet");
                    }
                    settled => settled?,
                }
            }
            let layer = bounded(layer, record, pages);
            if at >= record.committed_layers() {
                pages += layer.data_pages();
            }
            layers.push(Arc::new(layer));
        }
        sweep(dir, record);
        Ok(Layers { delta: Delta::new(layers), lock })
    }
}

fn open(dir: &Path, layer: &LayerRef, record: &VolumeRecord) -> Result<Layer, VolumeError> {
    let files = Box::new(OsDir::new(&layer_dir(dir, &layer.name)));
    let size = device_size(record);
    Ok(match layer.id {
        Some(id) if layer.sealed => Layer::open_sealed(files, id, size)?,
        Some(id) => Layer::open(files, Binding::Named(id, size))?,
        None => Layer::open(files, Binding::Made(identity(record)))?,
    })
}

/// An empty layer of this name, durably. What is there under it already is nobody's.
pub(super) fn create(
    dir: &Path,
    layer: &LayerRef,
    id: LayerId,
    record: &VolumeRecord,
) -> Result<Layer, VolumeError> {
    let path = layer_dir(dir, &layer.name);
    remove_dir(&path)?;
    crate::durable::create_dirs(&path, &mut |path| path == dir).map_err(io(dir, "make the directory"))?;
    Ok(Layer::create(Box::new(OsDir::new(&path)), &identity(record), id)?)
}

/// A layer that takes no more than the quota leaves it over the pages of those below.
pub(super) fn bounded(layer: Layer, record: &VolumeRecord, below: u64) -> Layer {
    match record.quota {
        Some(quota) => layer.with_quota(quota_over(quota, below)),
        None => layer,
    }
}

/// What a quota leaves over the pages of the layers below.
pub(super) fn quota_over(quota: ByteLen, below: u64) -> ByteLen {
    ByteLen(quota.0.saturating_sub(below * PAGE_SIZE))
}

/// Gives another volume the files of a sealed layer: both have them, and each can let go of them by itself.
pub(super) fn share(from: &Path, to: &Path, layer: &LayerRef) -> Result<(), VolumeError> {
    if !layer.sealed {
        // Two volumes would write to one file.
        let problem = format!("layer {} can't be shared: it is not sealed", layer.name);
        return Err(VolumeError::Record { path: from.join(RECORD_FILE), problem });
    }
    let (from, into) = (layer_dir(from, &layer.name), layer_dir(to, &layer.name));
    remove_dir(&into)?;
    crate::durable::create_dirs(&into, &mut |path| path == to).map_err(io(to, "make the directory"))?;
    for file in [MAP_FILE, DATA_FILE] {
        std::fs::hard_link(from.join(file), into.join(file)).map_err(io(&into, "link a layer into"))?;
    }
    crate::durable::sync_dir(&into).map_err(io(&into, "sync"))
}

/// Deletes layers that the record does not name. Who has one open goes on with it.
pub(super) fn sweep(dir: &Path, record: &VolumeRecord) {
    let named: BTreeSet<&str> = record.all_layers().map(|layer| layer.name.as_str()).collect();
    let Ok(entries) = std::fs::read_dir(dir.join(LAYERS)) else { return };
    for name in entries.filter_map(|entry| entry.ok()?.file_name().into_string().ok()) {
        if LayerRef::is_name(&name)
            && !named.contains(name.as_str())
            && let Err(error) = remove_dir(&layer_dir(dir, &name))
        {
            tracing::warn!(layer = name, %error, "can't delete a layer that nobody needs");
        }
    }
}

fn remove_dir(path: &Path) -> Result<(), VolumeError> {
    match std::fs::remove_dir_all(path) {
        Err(source) if source.kind() != std::io::ErrorKind::NotFound => {
            Err(VolumeError::Io { action: "delete", path: path.to_owned(), source })
        }
        _ => Ok(()),
    }
}

pub(super) fn io(dir: &Path, action: &'static str) -> impl Fn(std::io::Error) -> VolumeError {
    move |source| VolumeError::Io { action, path: dir.to_owned(), source }
}

fn layer_dir(dir: &Path, layer: &str) -> PathBuf {
    dir.join(LAYERS).join(layer)
}

fn device_size(record: &VolumeRecord) -> ByteLen {
    ByteLen(record.size.0.next_multiple_of(PAGE_SIZE))
}

fn identity(record: &VolumeRecord) -> Identity {
    Identity { base: record.commit, volume: VolumeId(record.id), device_size: device_size(record) }
}

/// A layer without a record is one whose making was cut short, and is made anew; but it must be empty, else it is somebody's.
pub(super) fn refuse_orphans(dir: &Path) -> Result<(), VolumeError> {
    let failed = |path: PathBuf| move |source| VolumeError::Io { action: "look at", path, source };
    let layers = match std::fs::read_dir(dir.join(LAYERS)) {
        Ok(layers) => layers,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(()),
        Err(source) => return Err(failed(dir.join(LAYERS))(source)),
    };
    for layer in layers {
        let data = layer.map_err(failed(dir.join(LAYERS)))?.path().join(DATA_FILE);
        match std::fs::metadata(&data) {
            Ok(metadata) if metadata.len() > PAGE_SIZE => {
                return Err(VolumeError::Record {
                    path: dir.join(RECORD_FILE),
                    problem: format!(
                        "it is missing, and {} holds writes; put the record back, or move the directory away to begin anew",
                        data.display()
                    ),
                });
            }
            Err(source) if source.kind() != std::io::ErrorKind::NotFound => return Err(failed(data)(source)),
            _ => {}
        }
    }
    Ok(())
}
