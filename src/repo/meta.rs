//! Metadata on its way from a store: commits, map nodes and chunk tables, each checked against the hash its parent holds.
//!
//! Enters: a key and a hash. Leaves: the decoded object. Invariant: bytes of a cache are trusted no more than bytes of a store.

use std::collections::HashMap;
use std::fmt;
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use bytes::Bytes;
use parking_lot::Mutex;

use super::RepoError;
use crate::format::FormatError;
use crate::store::{Key, Store, StoreError};

/// How often what came damaged is asked for again: it may have been spoilt on the way.
pub(super) const REREADS: usize = 2;

/// A place on this host that remembers metadata by its hash, so that versions open and read with the store away.
///
/// What it answers is verified; a cache may lose or mangle anything and only costs time. Both methods are called on blocking threads.
pub trait MetaCache: Send + Sync + fmt::Debug {
    /// The bytes with this BLAKE3 hash, if they are here.
    fn get(&self, hash: &[u8; 32]) -> Option<Bytes>;

    /// Remembers bytes that have this hash, or does not.
    fn put(&self, hash: &[u8; 32], bytes: &[u8]);
}

/// Remembers nothing.
#[derive(Clone, Copy, Debug, Default)]
pub struct NoMetaCache;

impl MetaCache for NoMetaCache {
    fn get(&self, _hash: &[u8; 32]) -> Option<Bytes> {
        None
    }

    fn put(&self, _hash: &[u8; 32], _bytes: &[u8]) {}
}

/// Remembers some metadata in memory, for who reads several versions after each other: what they share is fetched once.
#[derive(Default)]
pub(super) struct MemMetaCache {
    held: Mutex<HashMap<[u8; 32], Bytes>>,
    len: AtomicUsize,
}

impl MemMetaCache {
    /// It takes no more than this.
    const MOST: usize = 64 << 20;
}

impl fmt::Debug for MemMetaCache {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("MemMetaCache")
    }
}

impl MetaCache for MemMetaCache {
    fn get(&self, hash: &[u8; 32]) -> Option<Bytes> {
        self.held.lock().get(hash).cloned()
    }

    fn put(&self, hash: &[u8; 32], bytes: &[u8]) {
        if self.len.fetch_add(bytes.len(), Ordering::Relaxed) + bytes.len() <= Self::MOST {
            self.held.lock().insert(*hash, Bytes::copy_from_slice(bytes));
        }
    }
}

/// Reads verified metadata.
#[derive(Clone, Debug)]
pub(super) struct MetaReader {
    pub(super) store: Arc<dyn Store>,
    pub(super) cache: Arc<dyn MetaCache>,
}

impl MetaReader {
    /// Reads the object `key`, or a range of it, whose bytes hash to `hash`. `check` verifies the hash and decodes.
    pub(super) async fn read<T: Send + 'static>(
        &self,
        hash: [u8; 32],
        key: &Key,
        range: Option<Range<u64>>,
        check: impl Fn(&[u8]) -> Result<T, FormatError> + Send + Sync + 'static,
    ) -> Result<T, RepoError> {
        let cache = self.cache.clone();
        let (check, cached) = on_blocking_thread(&*self.store, move || {
            // Bad bytes in the cache are as good as none: the store's replace them.
            let cached = cache.get(&hash).and_then(|bytes| check(&bytes).ok());
            (check, cached)
        })
        .await?;
        if let Some(value) = cached {
            return Ok(value);
        }
        let check = Arc::new(check);
        let mut rereads = 0;
        loop {
            let body = match &range {
                Some(range) => self.store.get_range(key, range.clone()).await,
                None => self.store.get(key).await.map(|(body, _)| body),
            };
            let body = body.map_err(|error| self.named_object_error(error, key))?;
            let (cache, check) = (self.cache.clone(), check.clone());
            let checked = on_blocking_thread(&*self.store, move || {
                let value = check(&body)?;
                cache.put(&hash, &body);
                Ok(value)
            })
            .await?;
            let source = match checked {
                Ok(value) => return Ok(value),
                Err(source) => source,
            };
            // Where there are two of it, the other one is read from now on.
            self.store.distrust(key).await;
            let damage = RepoError::Damaged { place: self.store.describe(), key: key.clone(), source };
            if rereads == REREADS {
                return Err(damage);
            }
            // It may have been spoilt on the way.
            tracing::warn!(%damage, "reading it again");
            rereads += 1;
        }
    }

    fn named_object_error(&self, error: StoreError, key: &Key) -> RepoError {
        named_object_error(&*self.store, error, key)
    }
}

/// The error of reading an object that another object names: that it is not there is damage.
pub(super) fn named_object_error(store: &dyn Store, error: StoreError, key: &Key) -> RepoError {
    if error.is_not_found() {
        return RepoError::Missing { place: store.describe(), key: key.clone() };
    }
    error.into()
}

/// Runs hashing, decompression and cache reads where they hold up no other task.
pub(super) async fn on_blocking_thread<T: Send + 'static>(
    store: &dyn Store,
    work: impl FnOnce() -> T + Send + 'static,
) -> Result<T, StoreError> {
    match tokio::task::spawn_blocking(work).await {
        Ok(value) => Ok(value),
        Err(error) if error.is_panic() => std::panic::resume_unwind(error.into_panic()),
        Err(_) => Err(StoreError::Cancelled { store: store.describe(), operation: "verification" }),
    }
}
