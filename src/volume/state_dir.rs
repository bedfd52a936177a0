//! The state directory: everything this host keeps.
//!
//! Enters: its path. Leaves: the paths inside it, and the promise that no other server uses it.

use std::path::{Path, PathBuf};

use crate::lock::{FileLock, LockError};

use super::error::VolumeError;

/// A state directory this process holds.
#[derive(Debug)]
pub struct StateDir {
    root: PathBuf,
    _lock: FileLock,
}

impl StateDir {
    /// Takes the state directory at `root`, making it if need be. Blocks on the disk.
    pub fn open(root: &Path) -> Result<StateDir, VolumeError> {
        let io = |action| move |source| VolumeError::Io { action, path: root.to_owned(), source };
        crate::durable::create_dirs(root, &mut Path::is_dir).map_err(io("make the state directory"))?;
        let lock = FileLock::take(&root.join("lock")).map_err(|error| match error {
            LockError::InUse { holder } => VolumeError::StateDirInUse { dir: root.to_owned(), holder },
            LockError::Io(source) => io("lock")(source),
        })?;
        let state = StateDir { root: root.to_owned(), _lock: lock };
        for dir in [state.run_dir(), state.cache_dir(), root.join("volumes")] {
            crate::durable::create_dirs(&dir, &mut Path::is_dir).map_err(io("make directories in"))?;
        }
        Ok(state)
    }

    /// Its path.
    pub fn root(&self) -> &Path {
        &self.root
    }

    /// Where the host's cache is.
    pub fn cache_dir(&self) -> PathBuf {
        self.root.join("cache")
    }

    /// Where sockets are.
    pub fn run_dir(&self) -> PathBuf {
        self.root.join("run")
    }

    /// Where a volume is. `volume` is an image's name, so it can't leave the directory.
    pub fn volume_dir(&self, volume: &str) -> PathBuf {
        self.root.join("volumes").join(volume)
    }
}
