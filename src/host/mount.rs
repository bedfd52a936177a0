//! Volumes mounted on directories: attach and mount in one step, unmount and detach in another.
//!
//! Enters: a volume and a directory. Leaves: a mount in this process's mount namespace. Invariants: where a mount is stands in the kernel, not in a record of ours; a mount that
//! fails gives its device back, and one that nobody waited for is undone.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::oneshot;

use super::attach::first_bytes;
use super::{Host, HostError, VolumeStatus};
use crate::kernel::filesystem::Filesystem;
use crate::kernel::{KernelError, device, mount};
use crate::volume::VolumeName;

/// A mount that takes longer is given up, so that its user is told within half a minute; what comes of it later is undone.
const MOUNT_LIMIT: Duration = Duration::from_secs(20);

/// What came of a mount: the volume, and whether it was mounted now.
type Mounted = (VolumeStatus, bool);

impl Host {
    /// Mounts a volume on a directory, attaching it if it is not. Where it is mounted there already it stays so.
    pub async fn mount(self: &Arc<Self>, name: &VolumeName, dir: &Path) -> Result<VolumeStatus, HostError> {
        let (tell, mut told) = oneshot::channel();
        let (host, volume, on) = (self.clone(), name.clone(), dir.to_owned());
        tokio::spawn(async move { host.mount_and_tell(&volume, &on, tell).await });
        let done = match tokio::time::timeout(MOUNT_LIMIT, &mut told).await {
            Ok(done) => done.ok(),
            Err(_) => {
                told.close();
                // It may have been told in this moment.
                Some(told.try_recv().unwrap_or_else(|_| {
                    Err(HostError::TooSlow { volume: name.to_string(), limit: MOUNT_LIMIT })
                }))
            }
        };
        done.unwrap_or(Err(HostError::Stopping)).map(|(volume, _)| volume)
    }

    /// Mounts, and undoes it where nobody is left to be told.
    async fn mount_and_tell(
        self: Arc<Self>,
        name: &VolumeName,
        dir: &Path,
        tell: oneshot::Sender<Result<Mounted, HostError>>,
    ) {
        let entry = match self.entry(name) {
            Ok(entry) => entry,
            Err(error) => return drop(tell.send(Err(error))),
        };
        let _turn = entry.mounting.lock().await;
        if tell.is_closed() {
            return;
        }
        let done = self.mount_in_turn(name, dir).await;
        if let Err(Ok((_, true))) = tell.send(done)
            && let Err(error) = self.unmount_in_turn(name, Some(dir)).await
        {
            tracing::warn!(volume = %name, dir = %dir.display(), %error, "a mount that came too late could not be undone");
        }
    }

    async fn mount_in_turn(self: &Arc<Self>, name: &VolumeName, dir: &Path) -> Result<Mounted, HostError> {
        let dir = resolved(dir).await?;
        let before = self.inspect(name)?;
        if before.mounts.contains(&dir) {
            return Ok((before, false));
        }
        // Read before there is a device, which would wait in the kernel for what does not come.
        let export = self.serve(name).await?;
        let start = first_bytes(export.device())
            .await
            .map_err(|error| HostError::Read { volume: name.to_string(), source: Box::new(error) })?;
        let filesystem =
            Filesystem::probe(&start).ok_or_else(|| HostError::NoFilesystem { volume: name.to_string() })?;
        let attached = self.attach(name, None).await?;
        match self.mount_attached(attached, filesystem, dir).await {
            Ok(()) => Ok((self.inspect(name)?, true)),
            Err(error) => {
                if before.device.is_none()
                    && let Err(kept) = self.detach_in_turn(name).await
                {
                    tracing::warn!(volume = %name, error = %kept, "its device could not be given back");
                }
                Err(error)
            }
        }
    }

    async fn mount_attached(
        &self,
        attached: VolumeStatus,
        filesystem: Filesystem,
        dir: PathBuf,
    ) -> Result<(), HostError> {
        let VolumeStatus { name, device, record, .. } = attached;
        let device = device.ok_or_else(|| self.no_volume(&name))?;
        let mounting = move || {
            mount::mount_device(&device, &filesystem, &dir, record.read_only)?;
            tracing::info!(volume = %name, device = %device.display(), dir = %dir.display(), "mounted");
            Ok::<_, HostError>(())
        };
        tokio::task::spawn_blocking(mounting).await.map_err(|_| HostError::Stopping)?
    }

    /// Unmounts a volume from a directory, or from all it is mounted on, and detaches it where no mount is left. One that is not mounted is detached all the same.
    pub async fn unmount(self: &Arc<Self>, name: &VolumeName, dir: Option<&Path>) -> Result<(), HostError> {
        let entry = self.entry(name)?;
        let _turn = entry.mounting.lock().await;
        self.unmount_in_turn(name, dir).await
    }

    async fn unmount_in_turn(
        self: &Arc<Self>,
        name: &VolumeName,
        dir: Option<&Path>,
    ) -> Result<(), HostError> {
        let Some(device) = self.inspect(name)?.device else { return Ok(()) };
        let (asked, volume) = (dir.map(Path::to_owned), name.to_string());
        let unmounting = move || {
            let asked = asked.map(|dir| dir.canonicalize().unwrap_or(dir));
            let mounts = mount::mounts_of(&device)?;
            let going: Vec<PathBuf> = match &asked {
                // An earlier unmount may have been cut short before it detached.
                Some(_) if mounts.is_empty() => Vec::new(),
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
        if is_free { self.detach_in_turn(name).await } else { Ok(()) }
    }

    /// Where a volume is mounted, as far as this process sees.
    pub(super) fn mounts(index: u32) -> Vec<PathBuf> {
        mount::mounts_of(&device::path_of(index)).unwrap_or_default()
    }
}

/// The directory, as the kernel names it.
async fn resolved(dir: &Path) -> Result<PathBuf, HostError> {
    let dir = dir.to_owned();
    let resolving = move || {
        dir.canonicalize().map_err(|source| KernelError::System {
            action: "find the directory",
            path: Some(dir.clone()),
            source,
        })
    };
    Ok(tokio::task::spawn_blocking(resolving).await.map_err(|_| HostError::Stopping)??)
}
