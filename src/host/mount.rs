//! Volumes mounted on directories: attach and mount in one step, unmount and detach in another.
//!
//! Enters: a volume and a directory. Leaves: a mount in this process's mount namespace. Invariants: where a mount is stands in the kernel, not in a record of ours; a mount that
//! fails gives its device back, and one that nobody waited for is undone.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::oneshot;

use super::attach::{first_bytes, in_use};
use super::{Host, HostError, VolumeStatus};
use crate::kernel::filesystem::{Filesystem, Kind};
use crate::kernel::{KernelError, apart, device, mount};
use crate::volume::VolumeName;

/// A mount that takes longer is given up, so that its user is told within half a minute; what comes of it later is undone.
const MOUNT_LIMIT: Duration = Duration::from_secs(20);

/// What came of a mount.
struct Mounted {
    volume: VolumeStatus,
    /// What was done for it, and has to be undone where nobody wants it any more.
    done: Done,
}

/// What a mount did.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Done {
    Nothing,
    Mounted,
    AttachedAndMounted,
}

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
        done.unwrap_or(Err(HostError::Stopping)).map(|mounted| mounted.volume)
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
        let Err(Ok(Mounted { done, .. })) = tell.send(self.mount_in_turn(name, dir).await) else { return };
        if let Err(error) = self.undo(name, dir, done).await {
            tracing::warn!(volume = %name, dir = %dir.display(), %error, "a mount that came too late could not be undone");
        }
    }

    async fn undo(self: &Arc<Self>, name: &VolumeName, dir: &Path, done: Done) -> Result<(), HostError> {
        match done {
            Done::Nothing => Ok(()),
            Done::Mounted => self.unmount_dirs(name, Some(dir)).await.map(drop),
            Done::AttachedAndMounted => self.unmount_in_turn(name, Some(dir)).await,
        }
    }

    async fn mount_in_turn(self: &Arc<Self>, name: &VolumeName, dir: &Path) -> Result<Mounted, HostError> {
        let dir = resolved(dir).await?;
        let before = self.inspect(name)?;
        if before.mounts.contains(&dir) {
            return Ok(Mounted { volume: before, done: Done::Nothing });
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
            Ok(()) => {
                let done = if before.device.is_none() { Done::AttachedAndMounted } else { Done::Mounted };
                Ok(Mounted { volume: self.inspect(name)?, done })
            }
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
        let Filesystem { kind, dirty, .. } = filesystem;
        if record.read_only && dirty && kind == Kind::Ext4 {
            tracing::warn!(volume = %name, "its journal is not played on a read-only volume: the newest changes may be missing");
        }
        let mounting = apart::mount_device(device.clone(), kind, dir.clone(), record.read_only);
        mounting.await.map_err(|error| in_use(&name, error))?;
        tracing::info!(volume = %name, device = %device.display(), dir = %dir.display(), "mounted");
        Ok(())
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
        if self.unmount_dirs(name, dir).await? { self.detach_in_turn(name).await } else { Ok(()) }
    }

    /// Unmounts a volume from a directory, or from all it is mounted on; whether no mount is left.
    async fn unmount_dirs(&self, name: &VolumeName, dir: Option<&Path>) -> Result<bool, HostError> {
        let Some(device) = self.inspect(name)?.device else { return Ok(true) };
        let (asked, of) = (dir.map(Path::to_owned), device.clone());
        let looking = move || {
            let asked = asked.map(|dir| dir.canonicalize().unwrap_or(dir));
            Ok::<_, KernelError>((asked, mount::mounts_of(&of)?))
        };
        let (asked, mounts) =
            tokio::task::spawn_blocking(looking).await.map_err(|_| HostError::Stopping)??;
        let going = match asked {
            // An earlier unmount may have been cut short before it detached.
            Some(_) if mounts.is_empty() => Vec::new(),
            Some(dir) if !mounts.contains(&dir) => {
                return Err(HostError::NotMounted { volume: name.to_string(), dir });
            }
            Some(dir) => vec![dir],
            None => mounts,
        };
        // The newest first: one may lie on another.
        for dir in going.iter().rev() {
            // With a mount its replicas go too.
            if apart::unmount_dir(dir).await? {
                tracing::info!(volume = %name, device = %device.display(), dir = %dir.display(), "unmounted");
            }
        }
        let left = tokio::task::spawn_blocking(move || mount::mounts_of(&device));
        Ok(left.await.map_err(|_| HostError::Stopping)??.is_empty())
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
            action: "find the directory".into(),
            path: Some(dir.clone()),
            source,
        })
    };
    Ok(tokio::task::spawn_blocking(resolving).await.map_err(|_| HostError::Stopping)??)
}
