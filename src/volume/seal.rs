//! A volume's layer comes to an end, and another one takes the writes: what commits, snapshots and clones begin with.
//!
//! Enters: an open volume. Leaves: its layers up to now sealed, and its record saying so. Invariants: the record names a new layer before the first write to it; a layer is called sealed when all of
//! it is on the disk; a kill at any point leaves a stack of layers that reads the same (FORMAT.md, "Sealing").

use std::sync::Arc;

use super::history::LayerRef;
use super::layers::{self, bounded, quota_over};
use super::{Volume, VolumeError, VolumeRecord, random_id};
use crate::delta::{Layer, LayerId};

/// The most layers a volume reads through when a snapshot is taken. Each costs every read of what it does not have.
pub const MAX_LAYERS: usize = 64;

impl Volume {
    /// Makes the layer that is to take the writes next, and has the record name it. It is empty, so the volume reads the same with it and without. Blocks on the disk.
    /// For a commit the quota counts nothing of what is below: that is about to go.
    pub fn prepare_layer(&self, is_for_commit: bool) -> Result<Arc<Layer>, VolumeError> {
        let (Some(dir), Some(delta)) = (&self.dir, self.device.delta()) else {
            return Err(VolumeError::ReadOnly { volume: self.name.clone() });
        };
        let _changing = self.changing.lock();
        let mut record = self.record();
        let below = if is_for_commit { 0 } else { uncommitted_pages(&record, delta.layers()) };
        if let Some(waiting) = self.waiting.lock().clone() {
            // One that was made before, and not put on: the record names it.
            if let Some(quota) = record.quota {
                waiting.set_quota(quota_over(quota, below));
            }
            return Ok(waiting);
        }
        // Room is left for commits, which make them fewer.
        if record.layers.len() >= 2 * MAX_LAYERS {
            return Err(VolumeError::TooManyLayers { volume: self.name.clone(), most: MAX_LAYERS });
        }
        let id = LayerId(random_id());
        // A write of the record that failed may have come to the disk all the same: what that names stays what it is.
        let on_disk = VolumeRecord::load(dir)?.unwrap_or_else(|| record.clone());
        let name = LayerRef::name_after(record.all_layers().chain(on_disk.all_layers()));
        let next = LayerRef { name, id: Some(id), sealed: false };
        let layer = bounded(layers::create(dir, &next, id, &record)?, &record, below);
        record.layers.push(next);
        record.store(dir)?;
        *self.record.write() = record;
        let layer = Arc::new(layer);
        *self.waiting.lock() = Some(layer.clone());
        Ok(layer)
    }

    /// Has the prepared layer take the writes. Waits for writes under way, never for the disk.
    pub fn seal(&self, prepared: Arc<Layer>) -> Result<(), VolumeError> {
        // Without `changing`: who has that may wait for the disk, and a filesystem stands still meanwhile.
        let mut waiting = self.waiting.lock();
        self.device.seal(prepared).map_err(|source| self.device_failed(source))?;
        *waiting = None;
        Ok(())
    }

    /// Whether a layer is made that does not take the writes yet: the one below it is no sealed one.
    pub fn has_layer_waiting(&self) -> bool {
        self.waiting.lock().is_some()
    }

    pub(super) fn not_sealed(&self, layer: &str) -> VolumeError {
        VolumeError::NotSealed { volume: self.name.clone(), layer: layer.to_owned() }
    }

    /// Does something while nobody changes what the volume's layers are. Blocks on who does so now.
    pub fn holding<T>(&self, work: impl FnOnce(&VolumeRecord) -> T) -> T {
        let _changing = self.changing.lock();
        work(&self.record())
    }

    /// Makes all layers below the top durable and has the record call them sealed, together with whatever else is to change in it. Blocks on the disk.
    pub fn settle(
        &self,
        change: impl FnOnce(&mut VolumeRecord) -> Result<(), VolumeError>,
    ) -> Result<VolumeRecord, VolumeError> {
        let _changing = self.changing.lock();
        // In this turn: who folds layers meanwhile changes record and device.
        let (Some(dir), Some(delta)) = (&self.dir, self.device.delta()) else {
            return Err(VolumeError::ReadOnly { volume: self.name.clone() });
        };
        let mut record = self.record();
        if record.layers.len() != delta.layers().len() {
            // The record names one that waits to be put on: the one below it takes the writes.
            return Err(self.not_sealed(record.layers.last().map_or("", |layer| layer.name.as_str())));
        }
        let sealed = delta.layers().len() - 1;
        for (layer, named) in delta.layers()[..sealed].iter().zip(&mut record.layers) {
            layer.settle()?;
            (named.id, named.sealed) = (Some(layer.id()), true);
        }
        change(&mut record)?;
        record.store(dir)?;
        *self.record.write() = record.clone();
        self.bound_top();
        Ok(record)
    }

    /// Changes the record, durably, and then what goes with it. Layers that it does not name any more are deleted. Blocks on the disk.
    pub fn change_record(
        &self,
        change: impl FnOnce(&mut VolumeRecord) -> Result<(), VolumeError>,
        then: impl FnOnce() -> Result<(), VolumeError>,
    ) -> Result<VolumeRecord, VolumeError> {
        let Some(dir) = &self.dir else {
            return Err(VolumeError::ReadOnly { volume: self.name.clone() });
        };
        let _changing = self.changing.lock();
        let mut record = self.record();
        change(&mut record)?;
        record.store(dir)?;
        *self.record.write() = record.clone();
        // In this turn: record and device name the same layers whenever somebody else looks.
        then()?;
        layers::sweep(dir, &record);
        Ok(record)
    }

    /// Goes on without sealed layers that hold nothing and that nothing ends with. Blocks on the disk.
    pub fn drop_empty_layers(&self) -> Result<VolumeRecord, VolumeError> {
        let Some(delta) = self.device.delta() else { return Ok(self.record()) };
        let empty: Vec<LayerId> =
            delta.layers().iter().filter(|layer| layer.is_empty()).map(|layer| layer.id()).collect();
        let gone = std::cell::RefCell::new(Vec::new());
        let drop_them = |record: &mut VolumeRecord| {
            let ends: Vec<String> = record.pending.iter().map(|pending| pending.upto.clone()).collect();
            record.layers.retain(|layer| {
                let id =
                    layer.id.filter(|id| layer.sealed && empty.contains(id) && !ends.contains(&layer.name));
                gone.borrow_mut().extend(id);
                id.is_none()
            });
            Ok(())
        };
        let restack =
            || self.device.restack(None, &gone.borrow()).map_err(|source| self.device_failed(source));
        self.change_record(drop_them, restack)
    }

    /// What the quota leaves the top layer now.
    pub(super) fn bound_top(&self) {
        let (record, Some(delta)) = (self.record(), self.device.delta()) else { return };
        if let (Some(quota), Some((top, below))) = (record.quota, delta.layers().split_last()) {
            top.set_quota(quota_over(quota, uncommitted_pages(&record, below)));
        }
    }

    /// Whether nothing was written since the last seal.
    pub fn top_is_empty(&self) -> bool {
        self.device.delta().is_none_or(|delta| delta.layers().last().is_none_or(|top| top.is_empty()))
    }

    /// Whether nothing was written since the last commit that is made or in the making.
    pub fn is_clean(&self) -> bool {
        let (record, Some(delta)) = (self.record(), self.device.delta()) else { return true };
        delta.layers().iter().skip(committed_in(&record, delta.layers())).all(|layer| layer.is_empty())
    }

    /// Whether layers that are sealed, and belong to no commit in the making yet, hold anything; `record` is what the volume's is about to be.
    pub fn has_sealed_changes(&self, record: &VolumeRecord) -> bool {
        let Some(delta) = self.device.delta() else { return false };
        let sealed = delta.layers().len() - 1;
        delta.layers()[..sealed].iter().skip(record.committed_layers()).any(|layer| !layer.is_empty())
    }

    /// Pages that were written or zeroed since the last commit that is made or in the making.
    pub fn changed_pages(&self) -> u64 {
        let (record, Some(delta)) = (self.record(), self.device.delta()) else { return 0 };
        uncommitted_pages(&record, delta.layers())
    }
}

/// How many of these layers are in a commit that is in the making. By id: the record is of another moment than the layers, and what is made leaves both.
fn committed_in(record: &VolumeRecord, layers: &[Arc<Layer>]) -> usize {
    let Some(last) = record.committed_layers().checked_sub(1).and_then(|at| record.layers[at].id) else {
        return 0;
    };
    layers.iter().position(|layer| layer.id() == last).map_or(0, |at| at + 1)
}

/// Pages of these layers that are in no commit that is made or in the making.
fn uncommitted_pages(record: &VolumeRecord, layers: &[Arc<Layer>]) -> u64 {
    layers.iter().skip(committed_in(record, layers)).map(|layer| layer.data_pages()).sum()
}
