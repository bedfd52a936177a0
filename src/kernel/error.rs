//! What the kernel refuses.

use std::borrow::Cow;
use std::io;
use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use super::filesystem::Kind;

/// A request the kernel did not do.
#[derive(Debug, Serialize, Deserialize, thiserror::Error)]
#[non_exhaustive]
pub enum KernelError {
    /// The kernel has no nbd driver.
    #[error("the kernel's nbd driver is not loaded")]
    NoDriver,
    /// Only root may.
    #[error("not allowed to {0}: root (CAP_SYS_ADMIN) is needed")]
    NotAllowed(Cow<'static, str>),
    /// The device is somebody's.
    #[error("{} is in use", device.display())]
    DeviceBusy {
        /// The device.
        device: PathBuf,
    },
    /// A device's filesystem can't be come by.
    #[error("{} is mounted, but something else is mounted over it", device.display())]
    Covered {
        /// The device.
        device: PathBuf,
    },
    /// Somebody else has frozen a filesystem, and may thaw it at any moment.
    #[error("the filesystem on {} was frozen by somebody else", dir.display())]
    FrozenByOthers {
        /// Where it is mounted.
        dir: PathBuf,
    },
    /// There is no such device.
    #[error("there is no {}", device.display())]
    NoDevice {
        /// The device.
        device: PathBuf,
    },
    /// The filesystem can't be mounted.
    #[error("can't mount {}: {problem}", device.display())]
    Mount {
        /// The device.
        device: PathBuf,
        /// Why.
        problem: String,
    },
    /// The filesystem is not as it should be.
    #[error("can't mount {}: its {} filesystem is damaged, or newer than this kernel; the kernel's log says more", device.display(), kind.name())]
    Damaged {
        /// The device.
        device: PathBuf,
        /// What it is.
        kind: Kind,
    },
    /// Someone works below the mount.
    #[error("{} is in use: someone has a file open or works in it", dir.display())]
    MountBusy {
        /// Where it is mounted.
        dir: PathBuf,
    },
    /// An answer of the kernel that can't be understood.
    #[error("the kernel's answer can't be understood: {0}")]
    Answer(String),
    /// A system call failed.
    #[error("can't {action}{}: {source}", path.as_ref().map(|path| format!(" {}", path.display())).unwrap_or_default())]
    System {
        /// What was tried.
        action: Cow<'static, str>,
        /// On what.
        path: Option<PathBuf>,
        /// The reason.
        #[serde(with = "errno")]
        source: io::Error,
    },
}

impl KernelError {
    /// What to do about it.
    pub fn hint(&self) -> Option<&'static str> {
        Some(match self {
            KernelError::NoDriver => {
                "load it with 'modprobe nbd'; a line 'nbd' in /etc/modules-load.d/horcrux.conf does so at every boot"
            }
            KernelError::NotAllowed(_) => "run the daemon as root",
            KernelError::DeviceBusy { .. } => "leave the device out: a free one is found",
            KernelError::Damaged { kind: Kind::Ext4, .. } => {
                "mend it: 'horcrux-cli attach VOLUME', 'e2fsck -f DEVICE' with the device that says, 'horcrux-cli detach VOLUME'"
            }
            KernelError::Damaged { kind: Kind::Xfs, .. } => {
                "mend it: 'horcrux-cli attach VOLUME', 'xfs_repair DEVICE' with the device that says, 'horcrux-cli detach VOLUME'"
            }
            KernelError::Covered { .. } => "unmount what lies over it, or mount the volume on one more directory",
            KernelError::FrozenByOthers { .. } => "'fsfreeze --unfreeze DIR' lets it go on",
            KernelError::MountBusy { .. } => "'fuser -vm DIR' says who",
            _ => return None,
        })
    }

    pub(super) fn of(action: &'static str, path: Option<PathBuf>) -> impl FnOnce(io::Error) -> KernelError {
        move |source| match source.kind() {
            io::ErrorKind::PermissionDenied => KernelError::NotAllowed(action.into()),
            _ => KernelError::System { action: action.into(), path, source },
        }
    }
}

/// A system call's error is its number.
mod errno {
    use std::io;

    use rustix::io::Errno;
    use serde::{Deserialize, Deserializer, Serializer};

    pub fn serialize<S: Serializer>(error: &io::Error, to: S) -> Result<S::Ok, S::Error> {
        to.serialize_i32(error.raw_os_error().unwrap_or(Errno::IO.raw_os_error()))
    }

    pub fn deserialize<'de, D: Deserializer<'de>>(from: D) -> Result<io::Error, D::Error> {
        i32::deserialize(from).map(io::Error::from_raw_os_error)
    }
}
