//! What a device reads through: a stack of layers over a commit, which can be put aside for another one under running requests.
//!
//! Enters: a new top layer, a new base. Leaves: views, each of which reads the same for ever but for what is written to its top layer. Invariants: a write never lands in a layer that has
//! another one above it; putting a view in the place of another never changes what the device reads.

use std::sync::Arc;

use super::{Base, Device, DeviceError};
use crate::delta::{Delta, Layer, LayerId};

/// Layers over a commit.
pub struct View {
    base: Arc<Base>,
    /// `None` where there are no writes and never will be.
    delta: Option<Arc<Delta>>,
}

impl View {
    pub(super) fn new(base: Arc<Base>, delta: Option<Delta>) -> View {
        View { base, delta: delta.map(Arc::new) }
    }

    /// The commit.
    #[inline]
    pub fn base(&self) -> &Arc<Base> {
        &self.base
    }

    /// The layers.
    #[inline]
    pub fn delta(&self) -> Option<&Arc<Delta>> {
        self.delta.as_ref()
    }
}

impl Device {
    /// Puts a new, empty layer on top: what is written from now on goes there, and the layer below it does not change any more. Holds writers off for the moment that the ones under way
    /// take, and waits for no disk. What the sealed layer has is made durable by the next flush.
    pub fn seal(&self, top: Arc<Layer>) -> Result<(), DeviceError> {
        let _changing = self.changing.lock();
        let view = self.view();
        let delta = view.delta().ok_or(DeviceError::ReadOnly)?;
        let next = Arc::new(View { base: view.base.clone(), delta: Some(Arc::new(delta.with_top(top))) });
        delta.seal_top(|| self.view.store(next));
        Ok(())
    }

    /// Goes on without these layers, and on another commit where one is given: together they read the same as before. The top layer stays. Requests under way end on what they began with.
    pub fn restack(&self, base: Option<Base>, gone: &[LayerId]) -> Result<(), DeviceError> {
        let _changing = self.changing.lock();
        let view = self.view();
        let delta = view.delta().ok_or(DeviceError::ReadOnly)?;
        let (top, below) = delta.layers().split_last().expect("a delta has a layer that takes its writes");
        let left = below.iter().filter(|layer| !gone.contains(&layer.id())).chain([top]).cloned();
        let base = base.map_or_else(|| view.base.clone(), Arc::new);
        // Who writes over an old view writes to the same top layer.
        self.view.store(Arc::new(View { base, delta: Some(Arc::new(Delta::new(left.collect()))) }));
        Ok(())
    }

    /// The device as its base and its layers up to this one, which must be sealed, have it: nothing changes in it any more. `None`: it does not read through that layer.
    pub fn frozen(&self, upto: LayerId) -> Result<Option<Device>, DeviceError> {
        let view = self.view();
        let delta = view.delta().ok_or(DeviceError::ReadOnly)?;
        let (_, below) = delta.layers().split_last().expect("a delta has a layer that takes its writes");
        let Some(at) = below.iter().position(|layer| layer.id() == upto) else { return Ok(None) };
        let lowest = Delta::new(below[..=at].to_vec());
        Ok(Some(Device::over(view.base.clone(), Some(lowest), self.size).into_read_only()))
    }
}
