//! A store in a directory, local or mounted from elsewhere; a key is a path below it.
//!
//! Invariants. Objects get their name by a rename after an fsync, so a name never shows half a file. The directories above are fsynced
//! before a write is answered. A compare-and-swap holds an flock on `.lock` beside the object while it reads, compares and renames;
//! the lock belongs to the process, so a dead client can't keep it, and dying between any two steps leaves old or new, since the
//! rename alone is what changes anything. Clients of SFTP can't take an flock: what keeps them and us apart is the `claim` that the rename is a part of.
//! All file I/O runs on blocking threads, at most [`MAX_BLOCKING`] at a time.

use std::fs::File;
use std::io::{self, Read, Write};
use std::ops::Range;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime};

use async_trait::async_trait;
use bytes::Bytes;
use parking_lot::Mutex;
use rustix::fs::FlockOperation;
use tokio::sync::Semaphore;

use super::claim::{CLAIM_EXPIRY, Claim};
use super::{Etag, Key, KeyPrefix, Listed, MAX_WHOLE_OBJECT, Page, Store, StoreError, Upload};
use crate::durable::{self, TempFile, unless_stale};

/// Blocking calls under way at once, of one store.
pub const MAX_BLOCKING: usize = 32;
/// How long a compare-and-swap waits for another one of the same directory, which may itself wait for a claim.
pub const LOCK_PATIENCE: Duration = Duration::from_secs(40);
/// How long it sleeps between two tries.
const LOCK_RETRY: Duration = Duration::from_millis(3);
/// The name of the lock file beside refs. It starts with a dot, so it is no object.
const LOCK_NAME: &str = ".lock";
/// Directories remembered as durable. Forgetting them costs an fsync each.
const MAX_KNOWN_DIRS: usize = 4096;
/// Bytes compared at a time where an upload meets an object of its name.
const COMPARE_BYTES: usize = 1 << 20;
/// What a filesystem puts into its own root, and no one's data.
pub(super) const LOST_FOUND: &str = "lost+found";

/// A store in a directory. Clones are the same store.
#[derive(Clone, Debug)]
pub struct DirStore {
    inner: Arc<Inner>,
}

#[derive(Debug)]
struct Inner {
    root: PathBuf,
    slots: Arc<Semaphore>,
    /// Directories whose names, up to the root's own, are durable. Guards nothing else.
    known_dirs: Mutex<std::collections::HashSet<PathBuf>>,
}

impl DirStore {
    /// The store at `root`. Touches nothing: the directory is made by the first write, and missed by the first read.
    pub fn new(root: impl Into<PathBuf>) -> DirStore {
        let slots = Arc::new(Semaphore::new(MAX_BLOCKING));
        DirStore { inner: Arc::new(Inner { root: root.into(), slots, known_dirs: Mutex::default() }) }
    }

    /// The directory.
    pub fn root(&self) -> &Path {
        &self.inner.root
    }
}

/// Checks a range against an object's length.
pub(super) fn check_range(store: &str, key: &Key, range: &Range<u64>, len: u64) -> Result<(), StoreError> {
    if range.start > range.end {
        return Err(StoreError::BadRange {
            store: store.into(),
            key: key.clone(),
            start: range.start,
            end: range.end,
        });
    }
    if range.end > len {
        return Err(StoreError::ShortBody {
            store: store.into(),
            key: key.clone(),
            expected: range.end - range.start,
            actual: len.saturating_sub(range.start),
        });
    }
    Ok(())
}

/// Runs blocking work of one store.
async fn blocking<T: Send + 'static>(
    inner: &Arc<Inner>,
    operation: &'static str,
    work: impl FnOnce(&Inner) -> Result<T, StoreError> + Send + 'static,
) -> Result<T, StoreError> {
    let cancelled = || StoreError::Cancelled { store: inner.describe(), operation };
    let permit = inner.slots.clone().acquire_owned().await.map_err(|_| cancelled())?;
    let handle = {
        let inner = inner.clone();
        tokio::task::spawn_blocking(move || {
            let _permit = permit;
            work(&inner)
        })
    };
    match handle.await {
        Ok(result) => result,
        Err(error) if error.is_panic() => std::panic::resume_unwind(error.into_panic()),
        Err(_) => Err(cancelled()),
    }
}

/// An entry of a directory that can be a part of a key.
#[derive(PartialEq, Eq, PartialOrd, Ord)]
struct Entry {
    name: String,
    is_dir: bool,
    len: u64,
    modified: Option<SystemTime>,
}

/// Opens a file for reading; tells its length.
fn open(path: &Path) -> io::Result<(File, u64)> {
    let file = File::open(path)?;
    let meta = file.metadata()?;
    if meta.is_file() { Ok((file, meta.len())) } else { Err(io::ErrorKind::IsADirectory.into()) }
}

impl Inner {
    fn describe(&self) -> String {
        self.root.display().to_string()
    }

    fn path(&self, key: &Key) -> PathBuf {
        self.root.join(key.as_str())
    }

    fn error(&self, operation: &'static str, path: &Path, error: io::Error) -> StoreError {
        let store = self.describe();
        let relative = path.strip_prefix(&self.root).unwrap_or(path);
        let path = if relative.as_os_str().is_empty() { path } else { relative }.to_owned();
        match error.kind() {
            io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => {
                StoreError::NoSpace { store, what: path.display().to_string() }
            }
            io::ErrorKind::PermissionDenied | io::ErrorKind::ReadOnlyFilesystem => {
                StoreError::PermissionDenied { store, operation, path }
            }
            _ => StoreError::Io { store, operation, path, source: Arc::new(error) },
        }
    }

    /// The error of a read, where "not there" can mean the object or the whole place.
    fn read_error(&self, key: &Key, path: &Path, error: io::Error) -> StoreError {
        match error.kind() {
            io::ErrorKind::NotFound | io::ErrorKind::NotADirectory if !self.root.is_dir() => {
                StoreError::NoPlace { store: self.describe() }
            }
            io::ErrorKind::NotFound | io::ErrorKind::NotADirectory | io::ErrorKind::IsADirectory => {
                StoreError::NotFound { store: self.describe(), key: key.clone() }
            }
            _ => self.error("read", path, error),
        }
    }

    /// Opens an object for reading; tells its length.
    fn open(&self, key: &Key) -> Result<(File, u64), StoreError> {
        let path = self.path(key);
        unless_stale(|| open(&path)).map_err(|error| self.read_error(key, &path, error))
    }

    fn read_whole(&self, key: &Key) -> Result<Vec<u8>, StoreError> {
        let too_long = |len| StoreError::TooLong {
            store: self.describe(),
            key: key.clone(),
            len,
            max: MAX_WHOLE_OBJECT,
        };
        let path = self.path(key);
        // Opened again where it was replaced while it was read.
        let read = || {
            let (file, len) = open(&path)?;
            let mut body = Vec::with_capacity(len.min(MAX_WHOLE_OBJECT) as usize);
            if len <= MAX_WHOLE_OBJECT {
                // The length is a hint: a file may grow on a foreign machine after we asked, and is bounded all the same.
                file.take(MAX_WHOLE_OBJECT + 1).read_to_end(&mut body)?;
            }
            Ok((len, body))
        };
        let (len, body) = unless_stale(read).map_err(|error| self.read_error(key, &path, error))?;
        match len.max(body.len() as u64) {
            len if len > MAX_WHOLE_OBJECT => Err(too_long(len)),
            _ => Ok(body),
        }
    }

    /// Makes the directory of an object, durable up to the root's own name.
    fn make_dir_of(&self, path: &Path) -> Result<(), StoreError> {
        let dir = durable::parent_of(path);
        let mut known = self.known_dirs.lock().contains(dir);
        if known && !dir.is_dir() {
            // Someone removed it; what was known of any directory may be as old.
            self.known_dirs.lock().clear();
            known = false;
        }
        if known {
            return Ok(());
        }
        let above_root = durable::parent_of(&self.root);
        durable::create_dirs(dir, &mut |dir| dir == above_root && dir.is_dir())
            .map_err(|error| self.error("make the directory", dir, error))?;
        let mut known_dirs = self.known_dirs.lock();
        if known_dirs.len() >= MAX_KNOWN_DIRS {
            known_dirs.clear();
        }
        known_dirs.insert(dir.to_owned());
        Ok(())
    }

    /// Gives a written temporary file its key; the same content under it already is as good.
    fn publish_new(&self, mut temp: TempFile, key: &Key) -> Result<(), StoreError> {
        let path = self.path(key);
        match temp.publish_new(&path) {
            Ok(()) => Ok(()),
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {
                let (there, _) = self.open(key)?;
                let same = same_content(&there, temp.file())
                    .map_err(|error| self.error("compare with", &path, error))?;
                self.settle_existing(key, same)
            }
            Err(error) => Err(self.error("write", &path, error)),
        }
    }

    /// The answer to a put where the key exists.
    fn settle_existing(&self, key: &Key, same: bool) -> Result<(), StoreError> {
        if !same {
            return Err(StoreError::AlreadyExists { store: self.describe(), key: key.clone() });
        }
        // Whoever made it may not have come to fsync the directory yet, and we answer that it is durable.
        let path = self.path(key);
        durable::sync_dir(durable::parent_of(&path)).map_err(|error| self.error("sync", &path, error))
    }

    fn put_new(&self, key: &Key, body: &[u8]) -> Result<(), StoreError> {
        match self.read_whole(key) {
            Ok(there) => return self.settle_existing(key, there == body),
            Err(StoreError::TooLong { .. }) => return self.settle_existing(key, false),
            Err(StoreError::NotFound { .. } | StoreError::NoPlace { .. }) => {}
            Err(error) => return Err(error),
        }
        let path = self.path(key);
        self.make_dir_of(&path)?;
        let temp = self.write_temp(&path, body)?;
        self.publish_new(temp, key)
    }

    fn write_temp(&self, target: &Path, body: &[u8]) -> Result<TempFile, StoreError> {
        let write = || {
            let mut temp = TempFile::create(durable::parent_of(target))?;
            temp.file_mut().write_all(body)?;
            Ok(temp)
        };
        write().map_err(|error| self.error("write", target, error))
    }

    /// Takes the lock of a directory of refs; it is released when the file is dropped, or the process dies.
    fn lock(&self, key: &Key, dir: &Path) -> Result<File, StoreError> {
        let path = dir.join(LOCK_NAME);
        let fail = |error| self.error("lock", &path, error);
        let started = Instant::now();
        loop {
            let file = File::options().write(true).create(true).truncate(false).open(&path).map_err(fail)?;
            match rustix::fs::flock(&file, FlockOperation::NonBlockingLockExclusive) {
                Ok(()) => {
                    // A lock on a file that was removed since keeps nobody out.
                    let ours = file.metadata().map_err(fail)?;
                    match std::fs::metadata(&path) {
                        Ok(there) if (there.dev(), there.ino()) == (ours.dev(), ours.ino()) => {
                            return Ok(file);
                        }
                        Ok(_) => {}
                        Err(error) if error.kind() == io::ErrorKind::NotFound => {}
                        Err(error) => return Err(fail(error)),
                    }
                }
                Err(rustix::io::Errno::WOULDBLOCK | rustix::io::Errno::INTR) => {}
                Err(error) => return Err(fail(error.into())),
            }
            if started.elapsed() > LOCK_PATIENCE {
                return Err(StoreError::Locked { store: self.describe(), key: key.clone() });
            }
            std::thread::sleep(LOCK_RETRY);
        }
    }

    fn compare_and_swap(&self, key: &Key, expected: Option<&Etag>, new: &[u8]) -> Result<Etag, StoreError> {
        let path = self.path(key);
        let there = unless_stale(|| match std::fs::metadata(&path) {
            Err(error) if matches!(error.kind(), io::ErrorKind::NotFound | io::ErrorKind::NotADirectory) => {
                Ok(false)
            }
            other => other.map(|_| true),
        });
        if expected.is_some() && !there.map_err(|error| self.read_error(key, &path, error))? {
            return Err(StoreError::Conflict { store: self.describe(), key: key.clone() });
        }
        self.make_dir_of(&path)?;
        let dir = durable::parent_of(&path);
        let fail = |error| self.error("write", &path, error);
        // Written before the lock is taken: a full disk or a slow one must not hold up others.
        let mut claim = Claim::prepare(dir, new).map_err(fail)?;
        let _lock = self.lock(key, dir)?;
        let locked = || StoreError::Locked { store: self.describe(), key: key.clone() };
        if !claim.take(CLAIM_EXPIRY).map_err(fail)? {
            return Err(locked());
        }
        let current = match self.read_whole(key) {
            Ok(body) => Some(etag_of(&body)),
            Err(StoreError::NotFound { .. }) => None,
            Err(error) => return Err(error),
        };
        if current.as_ref() != expected {
            return Err(StoreError::Conflict { store: self.describe(), key: key.clone() });
        }
        match claim.publish(&path).map_err(fail)? {
            true => Ok(etag_of(new)),
            false => Err(locked()),
        }
    }

    /// The entries of a directory that can be parts of keys, unordered.
    fn entries(&self, dir: &Path) -> Result<Vec<Entry>, StoreError> {
        let fail = |error| self.error("list", dir, error);
        let reader = match std::fs::read_dir(dir) {
            Ok(reader) => reader,
            Err(error) if matches!(error.kind(), io::ErrorKind::NotFound | io::ErrorKind::NotADirectory) => {
                if self.root.is_dir() {
                    return Ok(Vec::new());
                }
                return Err(StoreError::NoPlace { store: self.describe() });
            }
            Err(error) => return Err(fail(error)),
        };
        let mut entries = Vec::new();
        for entry in reader {
            let entry = entry.map_err(fail)?;
            let Ok(name) = entry.file_name().into_string() else { continue };
            if Key::new(&name).is_err() {
                continue;
            }
            // Links are not followed: a listing stays inside the directory and ends.
            match unless_stale(|| entry.metadata()) {
                Ok(meta) if meta.is_dir() => {
                    entries.push(Entry { name, is_dir: true, len: 0, modified: None })
                }
                Ok(meta) if meta.is_file() => {
                    entries.push(Entry {
                        name,
                        is_dir: false,
                        len: meta.len(),
                        modified: meta.modified().ok(),
                    });
                }
                Ok(_) => {}
                Err(error) if error.kind() == io::ErrorKind::NotFound => {}
                Err(error) => return Err(fail(error)),
            }
        }
        Ok(entries)
    }

    /// Appends the objects below `dir` (whose keys start with `above`), in order, until there is one more than `limit`.
    fn walk(
        &self,
        above: &str,
        prefix: &str,
        after: Option<&str>,
        limit: usize,
        out: &mut Vec<Listed>,
    ) -> Result<(), StoreError> {
        let dir = if above.is_empty() { self.root.clone() } else { self.root.join(above) };
        let mut entries = self.entries(&dir)?;
        for Entry { name, is_dir, .. } in &mut entries {
            name.insert_str(0, above);
            if *is_dir {
                // With its slash a directory sorts where its objects do: "a-b" < "a/b" < "ab".
                name.push('/');
            }
        }
        entries.sort_unstable();
        for Entry { name, is_dir, len, modified } in entries {
            if out.len() > limit {
                break;
            }
            let inside = name.starts_with(prefix) || (is_dir && prefix.starts_with(&name));
            let passed =
                after.is_some_and(|after| name.as_str() <= after && !(is_dir && after.starts_with(&name)));
            if !inside || passed {
                continue;
            }
            if is_dir {
                self.walk(&name, prefix, after, limit, out)?;
            } else if let Ok(key) = Key::new(&name) {
                out.push(Listed { key, len, modified });
            }
        }
        Ok(())
    }

    fn occupant(&self) -> Result<Option<String>, StoreError> {
        let reader = match std::fs::read_dir(&self.root) {
            Ok(reader) => reader,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(error) => return Err(self.error("list", &self.root, error)),
        };
        for entry in reader {
            let name = entry.map_err(|error| self.error("list", &self.root, error))?.file_name();
            if !durable::is_temp_name(&name) && name != LOST_FOUND {
                return Ok(Some(name.to_string_lossy().into_owned()));
            }
        }
        Ok(None)
    }
}

/// The tag of a content.
pub(super) fn etag_of(body: &[u8]) -> Etag {
    Etag::new(blake3::hash(body).to_hex().as_str())
}

/// Whether two files hold the same bytes.
fn same_content(a: &File, b: &File) -> io::Result<bool> {
    let len = a.metadata()?.len();
    if len != b.metadata()?.len() {
        return Ok(false);
    }
    let (mut in_a, mut in_b) = (vec![0; COMPARE_BYTES], vec![0; COMPARE_BYTES]);
    let mut at = 0;
    while at < len {
        let piece = COMPARE_BYTES.min((len - at) as usize);
        a.read_exact_at(&mut in_a[..piece], at)?;
        b.read_exact_at(&mut in_b[..piece], at)?;
        if in_a[..piece] != in_b[..piece] {
            return Ok(false);
        }
        at += piece as u64;
    }
    Ok(true)
}

#[async_trait]
impl Store for DirStore {
    async fn get(&self, key: &Key) -> Result<(Bytes, Etag), StoreError> {
        let key = key.clone();
        blocking(&self.inner, "read", move |inner| {
            let body = inner.read_whole(&key)?;
            let etag = etag_of(&body);
            Ok((body.into(), etag))
        })
        .await
    }

    async fn get_range(&self, key: &Key, range: Range<u64>) -> Result<Bytes, StoreError> {
        let key = key.clone();
        blocking(&self.inner, "read", move |inner| {
            let (file, len) = inner.open(&key)?;
            // Checked before the buffer is made: a damaged table must not make us allocate what no object has.
            check_range(&inner.describe(), &key, &range, len)?;
            let mut body = vec![0; (range.end - range.start) as usize];
            file.read_exact_at(&mut body, range.start).map_err(|error| match error.kind() {
                io::ErrorKind::UnexpectedEof => StoreError::ShortBody {
                    store: inner.describe(),
                    key: key.clone(),
                    expected: range.end - range.start,
                    actual: file.metadata().map_or(0, |meta| meta.len().saturating_sub(range.start)),
                },
                _ => inner.read_error(&key, &inner.path(&key), error),
            })?;
            Ok(body.into())
        })
        .await
    }

    async fn put_new(&self, key: &Key, body: Bytes) -> Result<(), StoreError> {
        let key = key.clone();
        blocking(&self.inner, "write", move |inner| inner.put_new(&key, &body)).await
    }

    async fn begin(&self) -> Result<Box<dyn Upload>, StoreError> {
        let temp = blocking(&self.inner, "write", |inner| {
            // In the root, since the key is not known yet: a rename within one filesystem brings it to its place.
            inner.make_dir_of(&inner.root.join(LOCK_NAME))?;
            TempFile::create(&inner.root).map_err(|error| inner.error("write in", &inner.root, error))
        })
        .await?;
        Ok(Box::new(DirUpload { inner: self.inner.clone(), temp: Some(temp) }))
    }

    async fn compare_and_swap(
        &self,
        key: &Key,
        expected: Option<&Etag>,
        new: Bytes,
    ) -> Result<Etag, StoreError> {
        let (key, expected) = (key.clone(), expected.cloned());
        blocking(&self.inner, "write", move |inner| inner.compare_and_swap(&key, expected.as_ref(), &new))
            .await
    }

    async fn list(
        &self,
        prefix: &KeyPrefix,
        after: Option<&Key>,
        limit: usize,
    ) -> Result<Page<Listed>, StoreError> {
        let (prefix, after) = (prefix.clone(), after.cloned());
        blocking(&self.inner, "list", move |inner| {
            let mut items = Vec::new();
            let above = prefix.split().0.map_or(String::new(), |dir| format!("{dir}/"));
            inner.walk(&above, prefix.as_str(), after.as_ref().map(Key::as_str), limit, &mut items)?;
            let more = items.len() > limit;
            items.truncate(limit);
            Ok(Page { items, more })
        })
        .await
    }

    async fn children(
        &self,
        dir: &KeyPrefix,
        after: Option<&str>,
        limit: usize,
    ) -> Result<Page<String>, StoreError> {
        let (dir, after) = (dir.clone(), after.map(str::to_owned));
        blocking(&self.inner, "list", move |inner| {
            let entries = inner.entries(&inner.root.join(dir.as_str()))?;
            let names = entries.into_iter().map(|entry| entry.name);
            let mut items: Vec<String> =
                names.filter(|name| after.as_ref().is_none_or(|after| name > after)).collect();
            items.sort_unstable();
            let more = items.len() > limit;
            items.truncate(limit);
            Ok(Page { items, more })
        })
        .await
    }

    async fn delete(&self, key: &Key) -> Result<(), StoreError> {
        let key = key.clone();
        blocking(&self.inner, "delete", move |inner| {
            let path = inner.path(&key);
            match std::fs::remove_file(&path) {
                Ok(()) => durable::sync_dir(durable::parent_of(&path))
                    .map_err(|error| inner.error("sync", &path, error)),
                Err(error)
                    if matches!(error.kind(), io::ErrorKind::NotFound | io::ErrorKind::NotADirectory) =>
                {
                    Ok(())
                }
                Err(error) => Err(inner.error("delete", &path, error)),
            }
        })
        .await
    }

    async fn occupant(&self) -> Result<Option<String>, StoreError> {
        blocking(&self.inner, "list", Inner::occupant).await
    }

    fn describe(&self) -> String {
        self.inner.describe()
    }
}

struct DirUpload {
    inner: Arc<Inner>,
    /// `None` while a write has it, and after one failed.
    temp: Option<TempFile>,
}

impl DirUpload {
    fn take(&mut self) -> Result<TempFile, StoreError> {
        let cancelled = || StoreError::Cancelled { store: self.inner.describe(), operation: "an upload" };
        self.temp.take().ok_or_else(cancelled)
    }
}

#[async_trait]
impl Upload for DirUpload {
    async fn write(&mut self, bytes: Bytes) -> Result<(), StoreError> {
        let mut temp = self.take()?;
        let temp = blocking(&self.inner, "write", move |inner| {
            temp.file_mut().write_all(&bytes).map_err(|error| inner.error("write", temp.path(), error))?;
            Ok(temp)
        })
        .await?;
        self.temp = Some(temp);
        Ok(())
    }

    async fn finish(&mut self, key: &Key) -> Result<(), StoreError> {
        let temp = self.take()?;
        let key = key.clone();
        blocking(&self.inner, "write", move |inner| {
            inner.make_dir_of(&inner.path(&key))?;
            inner.publish_new(temp, &key)
        })
        .await
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_lock_left_by_a_dead_process_keeps_nobody_out() {
        let dir = tempfile::tempdir().unwrap();
        let store = DirStore::new(dir.path());
        let key = Key::new("refs/main").unwrap();
        std::fs::create_dir(dir.path().join("refs")).unwrap();
        std::fs::write(dir.path().join("refs/.lock"), b"").unwrap();
        store.compare_and_swap(&key, None, Bytes::from_static(b"one")).await.unwrap();
    }

    #[tokio::test]
    async fn a_range_past_the_end_is_refused_before_memory_is_taken() {
        let dir = tempfile::tempdir().unwrap();
        let store = DirStore::new(dir.path());
        let key = Key::new("object").unwrap();
        store.put_new(&key, Bytes::from_static(b"12345")).await.unwrap();
        let error = store.get_range(&key, 0..1 << 60).await.unwrap_err();
        assert!(matches!(error, StoreError::ShortBody { actual: 5, .. }), "{error}");
    }

    #[tokio::test]
    async fn a_missing_directory_is_named_and_not_made_by_reading() {
        let dir = tempfile::tempdir().unwrap();
        let store = DirStore::new(dir.path().join("nowhere"));
        let error = store.get(&Key::new("format").unwrap()).await.unwrap_err();
        assert!(matches!(error, StoreError::NoPlace { .. }), "{error}");
        assert!(error.to_string().contains("nowhere"));
        assert!(!dir.path().join("nowhere").exists());
    }

    #[tokio::test]
    async fn a_dropped_upload_leaves_no_file() {
        let dir = tempfile::tempdir().unwrap();
        let store = DirStore::new(dir.path());
        let mut upload = store.begin().await.unwrap();
        upload.write(Bytes::from_static(b"half")).await.unwrap();
        drop(upload);
        assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 0);
    }
}
