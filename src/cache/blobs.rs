//! Small objects (chunk tables, map nodes) as files under their hash: what a device needs to find its chunks with the
//! repository away.
//!
//! Enters: objects the caller has checked. Leaves: objects whose BLAKE3 was checked here. All functions block on
//! files.
//! Invariants: a file is whole under its name or not there (temporary file and rename, no fsync: after a power cut
//! the hash finds out); all files together stay within the share of the limit, the least recently used going first.

use std::fs::{self, File};
use std::io::{self, Read, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, SystemTime};

use bytes::Bytes;
use parking_lot::Mutex;

use super::error::CacheError;
use super::stats::{Counters, count, value};
use crate::format::ids::{parse_hex, to_hex};

/// The largest object kept here.
pub const MAX_BLOB: usize = 1 << 20;
/// A used file's time is set anew only when it is older than this: not a write for every read.
const TOUCH_AFTER: Duration = Duration::from_secs(3600);
/// A sweep goes on until so much of the share is used, in eighths.
const SWEEP_TO_EIGHTHS: u64 = 6;

/// The files under `meta/`.
pub(super) struct Blobs {
    dir: PathBuf,
    share: u64,
    /// Bytes of the files, as far as this process knows; a sweep counts anew.
    used: AtomicU64,
    next_temporary: AtomicU64,
    /// Held while sweeping: one sweep is enough.
    sweeping: Mutex<()>,
}

struct Found {
    path: PathBuf,
    length: u64,
    used_at: SystemTime,
}

impl Blobs {
    /// Opens the directory, making it if need be; counts what is there and deletes what a crash left half written.
    pub(super) fn open(dir: PathBuf, share: u64) -> Result<Blobs, CacheError> {
        fs::create_dir_all(&dir).map_err(CacheError::io("make the directory", &dir))?;
        let blobs = Blobs {
            dir,
            share,
            used: AtomicU64::new(0),
            next_temporary: AtomicU64::new(0),
            sweeping: Mutex::new(()),
        };
        let files = blobs.files().map_err(CacheError::io("list", &blobs.dir))?;
        blobs.used.store(files.iter().map(|file| file.length).sum(), Ordering::Relaxed);
        Ok(blobs)
    }

    /// The directory of a cache that someone else may have open: nothing in it is cleared away.
    pub(super) fn beside(dir: PathBuf) -> Blobs {
        let blobs = Blobs {
            dir,
            share: 0,
            used: AtomicU64::new(0),
            // Not the start: temporary files may be in use.
            next_temporary: AtomicU64::new(1),
            sweeping: Mutex::new(()),
        };
        let used = blobs.files().map_or(0, |files| files.iter().map(|file| file.length).sum());
        blobs.used.store(used, Ordering::Relaxed);
        blobs
    }

    pub(super) fn used(&self) -> u64 {
        value(&self.used)
    }

    /// The object of that hash, if it is here; one that is damaged is deleted.
    pub(super) fn read(&self, hash: &[u8; 32], counters: &Counters) -> Option<Bytes> {
        let (content, file) = self.look(hash, counters)?;
        let now = SystemTime::now();
        let used_at = file.metadata().and_then(|metadata| metadata.modified()).unwrap_or(now);
        if now.duration_since(used_at).is_ok_and(|age| age > TOUCH_AFTER) {
            // Only for the order of eviction.
            let _ = file.set_modified(now);
        }
        Some(content)
    }

    /// The same, which is no use of it.
    pub(super) fn look(&self, hash: &[u8; 32], counters: &Counters) -> Option<(Bytes, File)> {
        let path = self.path(hash);
        let file = File::open(&path).ok()?;
        let mut content = Vec::new();
        // One more than allowed tells a file that is too long from one that just fits.
        let read = (&file).take(MAX_BLOB as u64 + 1).read_to_end(&mut content);
        if read.is_err() || content.len() > MAX_BLOB || blake3::hash(&content).as_bytes() != hash {
            tracing::warn!(path = %path.display(), "damaged object in the cache, thrown away");
            count(&counters.healed, 1);
            // What can't be deleted is found damaged again.
            let _ = fs::remove_file(&path);
            return None;
        }
        Some((content.into(), file))
    }

    /// Keeps an object, if it is small enough and there is space. What can't be kept is fetched again some day.
    pub(super) fn write(&self, hash: &[u8; 32], content: &[u8]) {
        let length = content.len() as u64;
        let path = self.path(hash);
        if content.len() > MAX_BLOB || length > self.share || path.exists() {
            return;
        }
        if value(&self.used) + length > self.share {
            self.sweep(length);
        }
        match self.write_file(&path, content) {
            Ok(()) => count(&self.used, length),
            Err(error) => tracing::debug!(path = %path.display(), %error, "small object not kept"),
        }
    }

    fn write_file(&self, path: &Path, content: &[u8]) -> io::Result<()> {
        let parent = path.parent().expect("a blob's path has its two digits as a directory");
        match fs::create_dir(parent) {
            Err(error) if error.kind() != io::ErrorKind::AlreadyExists => return Err(error),
            _ => {}
        }
        let temporary = parent.join(format!(".tmp-{}", self.next_temporary.fetch_add(1, Ordering::Relaxed)));
        let written = fs::OpenOptions::new()
            .write(true)
            .create(true)
            .truncate(true)
            .mode(0o600)
            .open(&temporary)
            .and_then(|mut file| file.write_all(content))
            .and_then(|()| fs::rename(&temporary, path));
        if written.is_err() {
            let _ = fs::remove_file(&temporary);
        }
        written
    }

    /// Deletes the least recently used files until `length` more fit well.
    fn sweep(&self, length: u64) {
        let _one = self.sweeping.lock();
        let Ok(mut files) = self.files() else { return };
        files.sort_by_key(|file| file.used_at);
        let mut used: u64 = files.iter().map(|file| file.length).sum();
        let goal = (self.share / 8 * SWEEP_TO_EIGHTHS).min(self.share.saturating_sub(length));
        for file in files {
            if used <= goal {
                break;
            }
            if fs::remove_file(&file.path).is_ok() {
                used -= file.length;
            }
        }
        self.used.store(used, Ordering::Relaxed);
    }

    /// Lists the objects; deletes temporary files no one is writing (there are none in use when this runs at the
    /// start; later ones are spared).
    fn files(&self) -> io::Result<Vec<Found>> {
        let at_start = value(&self.next_temporary) == 0;
        let mut files = Vec::new();
        for directory in fs::read_dir(&self.dir)? {
            let directory = directory?;
            if !directory.file_type()?.is_dir() {
                continue;
            }
            for entry in fs::read_dir(directory.path())? {
                let entry = entry?;
                let path = entry.path();
                let name = entry.file_name();
                let Some(name) = name.to_str() else { continue };
                if parse_hex::<32>(name).is_some() {
                    // It may have been deleted since it was listed.
                    let Ok(metadata) = entry.metadata() else { continue };
                    let used_at = metadata.modified().unwrap_or(SystemTime::UNIX_EPOCH);
                    files.push(Found { path, length: metadata.len(), used_at });
                } else if at_start && name.starts_with(".tmp-") {
                    let _ = fs::remove_file(path);
                }
            }
        }
        Ok(files)
    }

    fn path(&self, hash: &[u8; 32]) -> PathBuf {
        let name = to_hex(hash);
        self.dir.join(&name[..2]).join(&name)
    }
}
