//! What can be told of a volume without asking anybody else.

use std::path::PathBuf;

use super::{Entry, Host};
use crate::kernel::device;
use crate::units::{ByteLen, PAGE_SIZE};
use crate::volume::{VolumeName, VolumeRecord};

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

impl Host {
    pub(super) fn status(&self, name: &VolumeName, entry: &Entry) -> Option<VolumeStatus> {
        let (record, index, open) = {
            let now = entry.now.read();
            let open = now.open.as_ref().map(|open| OpenStatus {
                connections: open.export.connections(),
                dirty: ByteLen(
                    open.volume.device().delta().map_or(0, |delta| delta.data_pages() * PAGE_SIZE),
                ),
            });
            (now.record.clone()?, now.attached.as_ref().map(|attached| attached.index), open)
        };
        // The kernel is asked with nothing held.
        let mounts = index.map(Host::mounts).unwrap_or_default();
        Some(VolumeStatus { name: name.clone(), record, device: index.map(device::path_of), mounts, open })
    }
}
