//! The state directory: everything this host keeps.
//!
//! Enters: its path. Leaves: the paths inside it, and the promise that no other server uses it.

use std::path::{Path, PathBuf};

use crate::lock::{FileLock, LockError};

use super::error::VolumeError;
use super::{RECORD_FILE, VolumeName};

/// How the directory of a volume that is being taken away begins: no volume's name does.
const REMOVED: &str = ".removed-";
/// How the directory of a clone begins that is being made.
const MAKING: &str = ".making-";
/// Where objects are that were made here, by repository.
const MADE: &str = "made";

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
        // Names that are there are synced all the same: a server that was killed may not have come to it.
        crate::durable::create_dirs(root, &mut |dir| dir != root && dir.is_dir())
            .map_err(io("make the state directory"))?;
        let lock = FileLock::take(&root.join("lock")).map_err(|error| match error {
            LockError::InUse { holder } => VolumeError::StateDirInUse { dir: root.to_owned(), holder },
            LockError::Io(source) => io("lock")(source),
        })?;
        let state = StateDir { root: root.to_owned(), _lock: lock };
        for dir in [state.run_dir(), state.cache_dir(), root.join("volumes")] {
            crate::durable::create_dirs(&dir, &mut |dir| dir == root).map_err(io("make directories in"))?;
        }
        state.sweep();
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

    /// Where objects are that were made here, of the repository with this id.
    pub fn made_dir(&self, repository: &str) -> PathBuf {
        // An id is hex digits; whatever else a record says must not lead out of here.
        let plain = repository.bytes().all(|byte| byte.is_ascii_hexdigit()) && !repository.is_empty();
        self.root.join(MADE).join(if plain { repository } else { "unknown" })
    }

    /// Where sockets are.
    pub fn run_dir(&self) -> PathBuf {
        self.root.join("run")
    }

    /// The volumes that are here, by name. Blocks on the disk.
    pub fn volumes(&self) -> Result<Vec<VolumeName>, VolumeError> {
        let mut names: Vec<VolumeName> = self
            .names()?
            .iter()
            .filter_map(|name| name.parse().ok())
            .filter(|name: &VolumeName| self.volume_dir(name.as_str()).join(RECORD_FILE).exists())
            .collect();
        names.sort();
        Ok(names)
    }

    /// Where a volume is put to be deleted; nothing is there.
    pub(super) fn removed_dir(&self, volume: &VolumeName) -> PathBuf {
        let id = crate::format::ids::to_hex(&super::random_id());
        self.root.join("volumes").join(format!("{REMOVED}{volume}-{id}"))
    }

    /// Where a clone is made before it has its name; nothing is there.
    pub(super) fn making_dir(&self, volume: &VolumeName) -> PathBuf {
        let id = crate::format::ids::to_hex(&super::random_id());
        self.root.join("volumes").join(format!("{MAKING}{volume}-{id}"))
    }

    /// Whether a volume of this repository is here. One whose record can't be read may be one. Blocks on the disk.
    fn has_volume_of(&self, repository: &str) -> Result<bool, VolumeError> {
        for name in self.volumes()? {
            match super::VolumeRecord::load(&self.volume_dir(name.as_str())) {
                Ok(Some(record)) if record.repository != repository => {}
                Ok(None) => {}
                Ok(Some(_)) => return Ok(true),
                Err(error) => {
                    tracing::warn!(volume = %name, %error, "it may need what was made here, so that stays");
                    return Ok(true);
                }
            }
        }
        Ok(false)
    }

    /// Takes away what was made here of a repository that no volume is of any more. Nobody may be making one meanwhile. Where it is now, to be deleted. Blocks on the disk.
    pub fn take_away_made(&self, repository: &str) -> Result<Option<PathBuf>, VolumeError> {
        let dir = self.made_dir(repository);
        if !dir.exists() || self.has_volume_of(repository)? {
            return Ok(None);
        }
        let id = crate::format::ids::to_hex(&super::random_id());
        let gone = self.root.join(MADE).join(format!("{REMOVED}{id}"));
        match std::fs::rename(&dir, &gone) {
            Ok(()) => Ok(Some(gone)),
            Err(source) => Err(VolumeError::Io { action: "take away", path: dir, source }),
        }
    }

    /// Deletes what was cut short: removals, clones, objects that were being written.
    fn sweep(&self) {
        let is_left = |name: &str| name.starts_with(REMOVED) || name.starts_with(MAKING);
        let volumes = self.root.join("volumes");
        for name in self.names().unwrap_or_default().iter().filter(|name| is_left(name)) {
            let dir = volumes.join(name);
            told(&dir, std::fs::remove_dir_all(&dir));
        }
        for made in entries(&self.root.join(MADE)) {
            if made.file_name().is_some_and(|name| name.to_string_lossy().starts_with(REMOVED)) {
                told(&made, std::fs::remove_dir_all(&made));
                continue;
            }
            // Uploads begin here, before they have a key.
            let is_temp = |path: &PathBuf| path.file_name().is_some_and(crate::durable::is_temp_name);
            for upload in entries(&made).iter().filter(|path| is_temp(path)) {
                told(upload, std::fs::remove_file(upload));
            }
        }
    }

    /// What is in the directory of volumes.
    fn names(&self) -> Result<Vec<String>, VolumeError> {
        let dir = self.root.join("volumes");
        let failed = |source| VolumeError::Io { action: "list", path: dir.clone(), source };
        let entries = std::fs::read_dir(&dir).map_err(failed)?;
        let names = entries.map(|entry| Ok(entry?.file_name().into_string().ok()));
        names.filter_map(Result::transpose).collect::<std::io::Result<_>>().map_err(failed)
    }

    /// Where a volume is. `volume` is a volume's or an image's name, so it can't leave the directory.
    pub fn volume_dir(&self, volume: &str) -> PathBuf {
        volume_dir(&self.root, volume)
    }
}

/// What is in a directory; nothing where it can't be listed.
fn entries(dir: &Path) -> Vec<PathBuf> {
    let Ok(entries) = std::fs::read_dir(dir) else { return Vec::new() };
    entries.filter_map(|entry| Some(entry.ok()?.path())).collect()
}

fn told(path: &Path, deleted: std::io::Result<()>) {
    if let Err(error) = deleted {
        tracing::warn!(path = %path.display(), %error, "can't delete what was left here");
    }
}

/// Where a volume is, in a state directory that another process may hold.
pub fn volume_dir(state_dir: &Path, volume: &str) -> PathBuf {
    state_dir.join("volumes").join(volume)
}

/// Where the state is kept unless the user says otherwise; `None` where a user has neither a state nor a home directory.
pub fn default_state_dir() -> Option<PathBuf> {
    if rustix::process::geteuid().is_root() {
        return Some(PathBuf::from("/var/lib/horcrux"));
    }
    let absolute = |name| std::env::var_os(name).map(PathBuf::from).filter(|path| path.is_absolute());
    let state_home = absolute("XDG_STATE_HOME").or_else(|| Some(absolute("HOME")?.join(".local/state")))?;
    Some(state_home.join("horcrux"))
}
