//! A store in memory: for tests, and the plainest reading of the contract.
//!
//! Invariant: one lock around one ordered map, so every method is one step to all others.

use std::collections::BTreeMap;
use std::ops::{Bound, Range};
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use async_trait::async_trait;
use bytes::{Bytes, BytesMut};
use parking_lot::Mutex;

use super::{Etag, Key, KeyPrefix, Listed, MAX_WHOLE_OBJECT, Page, Store, StoreError, Upload};

const NAME: &str = "memory";

/// The objects, and when each was written.
#[derive(Debug, Default)]
struct Content {
    objects: BTreeMap<Key, Bytes>,
    written: BTreeMap<Key, SystemTime>,
    /// How far the store's clock is before the system's.
    ahead: Duration,
}

impl Content {
    fn insert(&mut self, key: &Key, body: Bytes) {
        self.objects.insert(key.clone(), body);
        self.written.insert(key.clone(), SystemTime::now() + self.ahead);
    }
}

type Objects = Arc<Mutex<Content>>;

/// A store in memory. Clones are the same store.
#[derive(Clone, Debug, Default)]
pub struct MemStore {
    objects: Objects,
}

fn etag_of(bytes: &[u8]) -> Etag {
    Etag::new(blake3::hash(bytes).to_hex().as_str())
}

fn not_found(key: &Key) -> StoreError {
    StoreError::NotFound { store: NAME.into(), key: key.clone() }
}

impl MemStore {
    /// An empty one.
    pub fn new() -> MemStore {
        MemStore::default()
    }

    /// Puts bytes under a key whatever was there: what bit rot and mischief do.
    pub fn overwrite(&self, key: &Key, bytes: impl Into<Bytes>) {
        self.objects.lock().insert(key, bytes.into());
    }

    /// Every key and content.
    pub fn dump(&self) -> BTreeMap<Key, Bytes> {
        self.objects.lock().objects.clone()
    }

    /// Puts the store's clock forward.
    pub fn pass(&self, time: Duration) {
        self.objects.lock().ahead += time;
    }
}

fn put_new(objects: &Objects, key: &Key, body: Bytes) -> Result<(), StoreError> {
    let mut content = objects.lock();
    match content.objects.get(key) {
        None => {
            content.insert(key, body);
            Ok(())
        }
        Some(there) if *there == body => Ok(()),
        Some(_) => Err(StoreError::AlreadyExists { store: NAME.into(), key: key.clone() }),
    }
}

#[async_trait]
impl Store for MemStore {
    async fn get(&self, key: &Key) -> Result<(Bytes, Etag), StoreError> {
        let body = self.objects.lock().objects.get(key).cloned().ok_or_else(|| not_found(key))?;
        if body.len() as u64 > MAX_WHOLE_OBJECT {
            return Err(StoreError::TooLong {
                store: NAME.into(),
                key: key.clone(),
                len: body.len() as u64,
                max: MAX_WHOLE_OBJECT,
            });
        }
        let etag = etag_of(&body);
        Ok((body, etag))
    }

    async fn get_range(&self, key: &Key, range: Range<u64>) -> Result<Bytes, StoreError> {
        let body = self.objects.lock().objects.get(key).cloned().ok_or_else(|| not_found(key))?;
        super::dir::check_range(NAME, key, &range, body.len() as u64)?;
        Ok(body.slice(range.start as usize..range.end as usize))
    }

    async fn put_new(&self, key: &Key, body: Bytes) -> Result<(), StoreError> {
        put_new(&self.objects, key, body)
    }

    async fn begin(&self) -> Result<Box<dyn Upload>, StoreError> {
        Ok(Box::new(MemUpload { objects: self.objects.clone(), body: BytesMut::new() }))
    }

    async fn compare_and_swap(
        &self,
        key: &Key,
        expected: Option<&Etag>,
        new: Bytes,
    ) -> Result<Etag, StoreError> {
        let mut content = self.objects.lock();
        let current = content.objects.get(key).map(|body| etag_of(body));
        if current.as_ref() != expected {
            return Err(StoreError::Conflict { store: NAME.into(), key: key.clone() });
        }
        let etag = etag_of(&new);
        content.insert(key, new);
        Ok(etag)
    }

    async fn list(
        &self,
        prefix: &KeyPrefix,
        after: Option<&Key>,
        limit: usize,
    ) -> Result<Page<Listed>, StoreError> {
        let content = self.objects.lock();
        let lower = after.map_or(Bound::Unbounded, Bound::Excluded);
        let mut matching = content
            .objects
            .range((lower, Bound::Unbounded))
            .filter(|(key, _)| key.as_str().starts_with(prefix.as_str()))
            .map(|(key, body)| Listed {
                key: key.clone(),
                len: body.len() as u64,
                modified: content.written.get(key).copied(),
            });
        let items = matching.by_ref().take(limit).collect();
        Ok(Page { items, more: matching.next().is_some() })
    }

    async fn children(
        &self,
        dir: &KeyPrefix,
        after: Option<&str>,
        limit: usize,
    ) -> Result<Page<String>, StoreError> {
        let content = self.objects.lock();
        let below = content.objects.keys().filter_map(|key| key.as_str().strip_prefix(dir.as_str()));
        let segments: std::collections::BTreeSet<&str> = below
            .filter_map(|rest| rest.split('/').next())
            .filter(|segment| after.is_none_or(|after| *segment > after))
            .collect();
        let items = segments.iter().take(limit).map(|&segment| segment.to_owned()).collect();
        Ok(Page { items, more: segments.len() > limit })
    }

    async fn delete(&self, key: &Key) -> Result<(), StoreError> {
        let mut content = self.objects.lock();
        content.objects.remove(key);
        content.written.remove(key);
        Ok(())
    }

    async fn occupant(&self) -> Result<Option<String>, StoreError> {
        Ok(self.objects.lock().objects.keys().next().map(Key::to_string))
    }

    fn describe(&self) -> String {
        NAME.into()
    }
}

struct MemUpload {
    objects: Objects,
    body: BytesMut,
}

#[async_trait]
impl Upload for MemUpload {
    async fn write(&mut self, bytes: Bytes) -> Result<(), StoreError> {
        self.body.extend_from_slice(&bytes);
        Ok(())
    }

    async fn finish(&mut self, key: &Key) -> Result<(), StoreError> {
        put_new(&self.objects, key, self.body.clone().freeze())
    }
}
