//! A store with what was made on this host before it: objects that are here are never asked of the other one, and new ones are written here.
//!
//! Enters: keys. Leaves: objects, from here if they are here. Invariants: nothing is ever written to the store behind it; refs and listings are that one's alone, because who else moves a
//! ref or adds an object can't be known here.

use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use async_trait::async_trait;
use bytes::Bytes;

use super::{Attempts, DirStore, Etag, Key, KeyPrefix, Listed, Page, Store, StoreError, Upload};

/// The segment that refs have in their keys: those are never here.
const REFS: &str = "refs";

/// Two stores as one. Clones are the same.
#[derive(Clone, Debug)]
pub struct OverlayStore {
    here: DirStore,
    behind: Arc<dyn Store>,
    /// Whether anything was ever made here: looking costs who has nothing a system call for each object.
    has_any: Arc<AtomicBool>,
}

impl OverlayStore {
    /// What is in `here`, before `behind`. Looks whether the directory is there: blocks on that.
    pub fn new(here: DirStore, behind: Arc<dyn Store>) -> OverlayStore {
        let has_any = Arc::new(AtomicBool::new(here.root().exists()));
        OverlayStore { here, behind, has_any }
    }

    fn looks_here(&self, key: &Key) -> bool {
        self.has_any.load(Ordering::Relaxed) && !is_ref(key)
    }
}

impl OverlayStore {
    /// Before an object is written: one that is here under its key and does not hash to it must not be in the way.
    async fn make_way(&self, key: &Key) -> Result<(), StoreError> {
        if self.here.len_of(key).await?.is_none() || self.here.is_as_named(key).await? {
            return Ok(());
        }
        tracing::warn!(%key, made = %self.here.describe(), "what was made here before is damaged: it is made again");
        self.here.set_aside(key).await
    }
}

/// An object that is being made here.
struct Writing {
    upload: Box<dyn Upload>,
    store: OverlayStore,
}

#[async_trait]
impl Upload for Writing {
    async fn write(&mut self, bytes: Bytes) -> Result<(), StoreError> {
        self.upload.write(bytes).await
    }

    async fn finish(&mut self, key: &Key) -> Result<(), StoreError> {
        self.store.make_way(key).await?;
        self.upload.finish(key).await
    }
}

/// Whether the disk has not got all of it.
fn is_broken(error: &StoreError) -> bool {
    matches!(error, StoreError::Io { .. } | StoreError::ShortBody { .. } | StoreError::TooLong { .. })
}

fn is_ref(key: &Key) -> bool {
    key.segments().any(|segment| segment == REFS)
}

/// Whether the place answered that it has not got it.
fn is_missing(error: &StoreError) -> bool {
    matches!(error, StoreError::NotFound { .. } | StoreError::NoPlace { .. })
}

#[async_trait]
impl Store for OverlayStore {
    async fn get(&self, key: &Key) -> Result<(Bytes, Etag), StoreError> {
        if self.looks_here(key) {
            match self.here.get(key).await {
                Err(error) if is_missing(&error) => {}
                // Not all of it is here: the other one may have it whole.
                Err(error) if is_broken(&error) => {
                    return self.behind.get(key).await.map_err(|_| error);
                }
                found => return found,
            }
        }
        self.behind.get(key).await
    }

    async fn get_range(&self, key: &Key, range: Range<u64>) -> Result<Bytes, StoreError> {
        if self.looks_here(key) {
            match self.here.get_range(key, range.clone()).await {
                Err(error) if is_missing(&error) => {}
                Err(error) if is_broken(&error) => {
                    return self.behind.get_range(key, range).await.map_err(|_| error);
                }
                found => return found,
            }
        }
        self.behind.get_range(key, range).await
    }

    async fn put_new(&self, key: &Key, body: Bytes) -> Result<(), StoreError> {
        // Before the write: who looks for it from now on must look here.
        self.has_any.store(true, Ordering::Relaxed);
        self.make_way(key).await?;
        self.here.put_new(key, body).await
    }

    async fn begin(&self) -> Result<Box<dyn Upload>, StoreError> {
        self.has_any.store(true, Ordering::Relaxed);
        Ok(Box::new(Writing { upload: self.here.begin().await?, store: self.clone() }))
    }

    async fn compare_and_swap(
        &self,
        _key: &Key,
        _expected: Option<&Etag>,
        _new: Bytes,
    ) -> Result<Etag, StoreError> {
        Err(StoreError::Remote {
            store: self.describe(),
            operation: "write to",
            key: "a ref".into(),
            why: "refs move by a push alone".into(),
            transient: false,
        })
    }

    async fn list(
        &self,
        prefix: &KeyPrefix,
        after: Option<&Key>,
        limit: usize,
    ) -> Result<Page<Listed>, StoreError> {
        self.behind.list(prefix, after, limit).await
    }

    async fn children(
        &self,
        dir: &KeyPrefix,
        after: Option<&str>,
        limit: usize,
    ) -> Result<Page<String>, StoreError> {
        self.behind.children(dir, after, limit).await
    }

    async fn delete(&self, key: &Key) -> Result<(), StoreError> {
        self.here.delete(key).await
    }

    async fn distrust(&self, key: &Key) -> bool {
        if !self.looks_here(key) || self.here.is_as_named(key).await.unwrap_or(true) {
            return false;
        }
        // Never what is nowhere else: somebody may mend it.
        if self.behind.get_range(key, 0..0).await.is_err() {
            return false;
        }
        tracing::warn!(%key, made = %self.here.describe(), "what was made here is damaged: it is set aside, and the repository's is read");
        self.here.set_aside(key).await.is_ok()
    }

    async fn occupant(&self) -> Result<Option<String>, StoreError> {
        self.behind.occupant().await
    }

    fn describe(&self) -> String {
        self.behind.describe()
    }

    fn expect_reads(&self, at_once: usize) {
        self.behind.expect_reads(at_once);
    }

    fn attempts(&self) -> Option<Attempts> {
        self.behind.attempts()
    }
}

#[cfg(test)]
mod tests {
    use super::super::counting::Method;
    use super::super::{CountingStore, MemStore};
    use super::*;

    fn key(text: &str) -> Key {
        Key::new(text).unwrap()
    }

    #[tokio::test]
    async fn what_is_here_is_never_asked_of_the_other_and_nothing_is_written_there() {
        let dir = tempfile::tempdir().unwrap();
        let behind = CountingStore::new(Arc::new(MemStore::new()));
        behind.put_new(&key("images/a/blocks/b"), "there".into()).await.unwrap();
        behind.put_new(&key("images/a/refs/heads/main"), "ref".into()).await.unwrap();
        behind.reset();
        let store = OverlayStore::new(DirStore::new(dir.path().join("made")), Arc::new(behind.clone()));
        assert_eq!(store.get(&key("images/a/blocks/b")).await.unwrap().0, "there");
        store.put_new(&key("images/a/blocks/c"), "here".into()).await.unwrap();
        assert_eq!(store.get(&key("images/a/blocks/c")).await.unwrap().0, "here");
        assert_eq!(store.get_range(&key("images/a/blocks/c"), 1..3).await.unwrap(), "er");
        assert_eq!(store.get_range(&key("images/a/blocks/b"), 1..3).await.unwrap(), "he");
        assert_eq!(store.get(&key("images/a/refs/heads/main")).await.unwrap().0, "ref");
        assert!(store.get(&key("images/a/blocks/d")).await.unwrap_err().is_not_found());
        assert_eq!(behind.count(Method::Get).requests, 3, "the block, the ref and what is nowhere");
        assert!(behind.get(&key("images/a/blocks/c")).await.unwrap_err().is_not_found());
        // Another one of the same directory finds it.
        let again = OverlayStore::new(DirStore::new(dir.path().join("made")), Arc::new(behind.clone()));
        assert_eq!(again.get(&key("images/a/blocks/c")).await.unwrap().0, "here");
    }

    #[tokio::test]
    async fn what_is_here_and_damaged_gives_way_to_the_other_one_and_to_who_makes_it_again() {
        let dir = tempfile::tempdir().unwrap();
        let behind = MemStore::new();
        let body = b"what it should be";
        let name = key(&format!("images/a/blocks/{}", blake3::hash(body).to_hex()));
        let root = dir.path().join("made");
        let path = root.join(name.as_str());
        std::fs::create_dir_all(path.parent().unwrap()).unwrap();
        std::fs::write(&path, b"what it should").unwrap();
        let store = OverlayStore::new(DirStore::new(&root), Arc::new(behind.clone()));
        let whole = 0..body.len() as u64;
        assert!(store.get_range(&name, whole.clone()).await.is_err(), "too short, and nowhere else");
        assert!(!store.distrust(&name).await, "never what is nowhere else");
        behind.put_new(&name, Bytes::from_static(body)).await.unwrap();
        assert_eq!(store.get_range(&name, whole.clone()).await.unwrap(), &body[..], "too short here");
        assert_eq!(store.get(&name).await.unwrap().0, "what it should", "nobody can tell");
        assert!(store.distrust(&name).await);
        assert_eq!(store.get(&name).await.unwrap().0, &body[..]);
        // Made here again over what rots.
        std::fs::write(&path, b"what it shoult be").unwrap();
        store.put_new(&name, Bytes::from_static(body)).await.unwrap();
        assert_eq!(std::fs::read(&path).unwrap(), body);
        std::fs::write(&path, b"what it shoult be").unwrap();
        let mut upload = store.begin().await.unwrap();
        upload.write(Bytes::from_static(body)).await.unwrap();
        upload.finish(&name).await.unwrap();
        assert_eq!(std::fs::read(&path).unwrap(), body);
        assert!(!store.distrust(&name).await, "it is whole");
    }
}
