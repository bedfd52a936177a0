//! The files of a host's volumes: as they are now, and in any version of their image.
//!
//! Enters: a volume, versions. Leaves: filesystems to be read, and where two of them differ. Invariant: what a mounted filesystem or the kernel's memory holds back is flushed first, by
//! another process; nothing is written to the volume. What is written to it meanwhile may be seen or not.

use std::sync::Arc;

use super::{Host, HostError};
use crate::device::{Base, Device};
use crate::files::changes::Ranges;
use crate::files::ext4::Ext4;
use crate::files::{DeviceSource, FilesError};
use crate::kernel::{KernelError, apart, device};
use crate::repo::{MetaCache, Reference, Version, VersionOptions};
use crate::volume::VolumeName;

/// One side of a comparison.
struct Side {
    device: Arc<Device>,
    /// The commit it is, or stands on.
    version: Version,
}

/// Two filesystems, and where their disks may differ.
#[derive(Debug)]
pub struct Compared {
    /// The older one.
    pub old: Ext4,
    /// The newer one.
    pub new: Ext4,
    /// Outside of these both disks read the same.
    pub ranges: Ranges,
}

impl Host {
    /// The filesystem of a volume as it is now, or of a version of its image.
    pub async fn filesystem(
        self: &Arc<Self>,
        name: &VolumeName,
        reference: Option<&Reference>,
    ) -> Result<Ext4, HostError> {
        let side = self.side(name, reference).await?;
        side.filesystem().await.map_err(of(name))
    }

    /// Two filesystems to be compared: by default what the volume stands on, and what it is now.
    pub async fn compared(
        self: &Arc<Self>,
        name: &VolumeName,
        old: Option<&Reference>,
        new: Option<&Reference>,
    ) -> Result<Compared, HostError> {
        let (old, new, ranges) = self.sides(name, old, new).await?;
        let (old, new) =
            (old.filesystem().await.map_err(of(name))?, new.filesystem().await.map_err(of(name))?);
        Ok(Compared { old, new, ranges })
    }

    /// Where two disks differ: pages of the volume's own, whole chunks of versions.
    pub async fn differing(
        self: &Arc<Self>,
        name: &VolumeName,
        old: Option<&Reference>,
        new: Option<&Reference>,
    ) -> Result<Ranges, HostError> {
        Ok(self.sides(name, old, new).await?.2)
    }

    async fn sides(
        self: &Arc<Self>,
        name: &VolumeName,
        old: Option<&Reference>,
        new: Option<&Reference>,
    ) -> Result<(Side, Side, Ranges), HostError> {
        let new = self.side(name, new).await?;
        let old = match old {
            Some(old) => self.side(name, Some(old)).await?,
            // Of two versions none is the volume's base; of the volume itself its base is the older one.
            None => self.at(new.version.clone()),
        };
        let mut ranges = if old.version.id() == new.version.id() {
            Ranges::default()
        } else {
            Ranges::between(&old.version, &new.version).await.map_err(of(name))?
        };
        let device = new.device.clone();
        if device.delta().is_some() {
            // Millions of extents take their time.
            let written = tokio::task::spawn_blocking(move || Ranges::written(&device));
            let written = written.await.map_err(|_| HostError::Stopping)?;
            ranges = ranges.with(written.map_err(FilesError::from).map_err(of(name))?);
        }
        Ok((old, new, ranges))
    }

    async fn side(
        self: &Arc<Self>,
        name: &VolumeName,
        reference: Option<&Reference>,
    ) -> Result<Side, HostError> {
        let entry = self.entry(name)?;
        let record = self.record(name, &entry)?;
        let Some(reference) = reference else {
            self.settle(name).await?;
            let device = self.serve(name).await?.device().clone();
            let version = device.base().version().clone();
            return Ok(Side { device, version });
        };
        let repository =
            self.repositories.opened_before(&record.access, record.repository_id().unwrap_or_default())?;
        let image = record.image.parse()?;
        let meta: Arc<dyn MetaCache> = self.cache.clone();
        let resolved = repository.resolve(&image, reference, &meta).await?;
        let version =
            Version::open(&repository, &image, resolved.commit, meta, VersionOptions::default()).await?;
        Ok(self.at(version))
    }

    /// A commit, read through the host's cache.
    fn at(&self, version: Version) -> Side {
        let size = version.commit().size;
        let base = Base::new(version.clone(), self.cache.clone());
        Side { device: Arc::new(Device::new(base, None, size)), version }
    }

    /// Has the kernel bring to the volume what it holds in memory for it.
    async fn settle(self: &Arc<Self>, name: &VolumeName) -> Result<(), HostError> {
        let (host, volume) = (self.clone(), name.clone());
        let looking = move || host.inspect(&volume);
        let status = tokio::task::spawn_blocking(looking).await.map_err(|_| HostError::Stopping)??;
        let Some(device) = status.device else { return Ok(()) };
        if let Some(dir) = status.mounts.first() {
            apart::sync_dir(dir).await?;
        } else if let Some(index) = device::index_of(&device) {
            match apart::flush(index).await {
                Ok(flushed) => flushed.let_go().await,
                // Somebody has it: what he has not flushed is his.
                Err(KernelError::DeviceBusy { .. }) => {}
                Err(error) => return Err(error.into()),
            }
        }
        Ok(())
    }
}

impl Side {
    async fn filesystem(&self) -> Result<Ext4, FilesError> {
        Ext4::open(Arc::new(DeviceSource::new(self.device.clone()))).await
    }
}

fn of(name: &VolumeName) -> impl Fn(FilesError) -> HostError {
    let volume = name.to_string();
    move |source| HostError::Files { volume: volume.clone(), source: Box::new(source) }
}
