//! Volumes mounted on directories: attach and mount in one step, unmount and detach in another.
//!
//! Enters: a volume and a directory. Leaves: a mount in this process's mount namespace. Invariants: where a mount is stands in the kernel, not in a record of ours; a mount that
//! fails gives its device back.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use super::attach::first_bytes;
use super::{Host, HostError, VolumeStatus};
use crate::kernel::filesystem::Filesystem;
use crate::kernel::{KernelError, device, mount};
use crate::volume::VolumeName;

impl Host {
    /// Mounts a volume on a directory, attaching it if it is not. Where it is mounted there already it stays so.
    pub async fn mount(self: &Arc<Self>, name: &VolumeName, dir: &Path) -> Result<VolumeStatus, HostError> {
        let was_attached = self.inspect(name)?.device.is_some();
        let attached = self.attach(name, None).await?;
        match self.mount_attached(&attached, dir).await {
            Ok(()) => self.inspect(name),
            Err(error) => {
                if !was_attached && let Err(kept) = self.detach(name).await {
                    tracing::warn!(volume = %name, error = %kept, "its device could not be given back");
                }
                Err(error)
            }
        }
    }

    async fn mount_attached(self: &Arc<Self>, attached: &VolumeStatus, dir: &Path) -> Result<(), HostError> {
        let name = &attached.name;
        let device = attached.device.clone().ok_or_else(|| self.no_volume(name))?;
        let export = self.serve(name).await?;
        let start = first_bytes(export.device())
            .await
            .map_err(|error| HostError::Read { volume: name.to_string(), source: Box::new(error) })?;
        let filesystem =
            Filesystem::probe(&start).ok_or_else(|| HostError::NoFilesystem { volume: name.to_string() })?;
        let (dir, read_only) = (dir.to_owned(), attached.record.read_only);
        let volume = name.to_string();
        let mounting = move || {
            let dir = dir.canonicalize().map_err(|source| KernelError::System {
                action: "find the directory",
                path: Some(dir.clone()),
                source,
            })?;
            if mount::mounts_of(&device)?.contains(&dir) {
                return Ok(());
            }
            mount::mount_device(&device, &filesystem, &dir, read_only)?;
            tracing::info!(volume, device = %device.display(), dir = %dir.display(), "mounted");
            Ok::<_, HostError>(())
        };
        tokio::task::spawn_blocking(mounting).await.map_err(|_| HostError::Stopping)?
    }

    /// Unmounts a volume from a directory, or from all it is mounted on, and detaches it where no mount is left. One that is not mounted is detached all the same.
    pub async fn unmount(self: &Arc<Self>, name: &VolumeName, dir: Option<&Path>) -> Result<(), HostError> {
        let Some(device) = self.inspect(name)?.device else { return Ok(()) };
        let asked = dir.map(|dir| dir.canonicalize().unwrap_or_else(|_| dir.to_owned()));
        let volume = name.to_string();
        let unmounting = move || {
            let mounts = mount::mounts_of(&device)?;
            let going: Vec<PathBuf> = match &asked {
                Some(dir) if !mounts.contains(dir) => {
                    return Err(HostError::NotMounted { volume, dir: dir.clone() });
                }
                Some(dir) => vec![dir.clone()],
                // The newest first: one may lie on another.
                None => mounts.iter().rev().cloned().collect(),
            };
            for dir in &going {
                mount::unmount_dir(dir)?;
                tracing::info!(volume, device = %device.display(), dir = %dir.display(), "unmounted");
            }
            Ok(mount::mounts_of(&device)?.is_empty())
        };
        let is_free = tokio::task::spawn_blocking(unmounting).await.map_err(|_| HostError::Stopping)??;
        if is_free { self.detach(name).await } else { Ok(()) }
    }

    /// Where a volume is mounted, as far as this process sees.
    pub(super) fn mounts(index: u32) -> Vec<PathBuf> {
        mount::mounts_of(&device::path_of(index)).unwrap_or_default()
    }
}
