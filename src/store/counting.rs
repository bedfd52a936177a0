//! A store that counts: requests and bytes moved, for tests and figures.

use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use async_trait::async_trait;
use bytes::Bytes;

use super::{Attempts, Etag, Key, KeyPrefix, Listed, Page, Store, StoreError, Upload};

/// The methods of a store, as they are counted and as faults are aimed at.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(usize)]
pub enum Method {
    /// [`Store::get`].
    Get,
    /// [`Store::get_range`].
    GetRange,
    /// [`Store::put_new`].
    PutNew,
    /// [`Store::begin`].
    Begin,
    /// [`Upload::write`].
    Write,
    /// [`Upload::finish`].
    Finish,
    /// [`Store::compare_and_swap`].
    CompareAndSwap,
    /// [`Store::list`] and [`Store::children`].
    List,
    /// [`Store::delete`].
    Delete,
}

impl Method {
    /// Every method.
    pub const ALL: [Method; 9] = [
        Method::Get,
        Method::GetRange,
        Method::PutNew,
        Method::Begin,
        Method::Write,
        Method::Finish,
        Method::CompareAndSwap,
        Method::List,
        Method::Delete,
    ];
}

/// Requests and bytes of one method.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Count {
    /// Requests, failed ones included.
    pub requests: u64,
    /// Bytes of bodies moved, in the method's own direction.
    pub bytes: u64,
}

#[derive(Debug, Default)]
struct Counter {
    requests: AtomicU64,
    bytes: AtomicU64,
}

type Counters = Arc<[Counter; Method::ALL.len()]>;

/// Wraps a store and counts. Clones share the counters.
#[derive(Clone, Debug)]
pub struct CountingStore {
    inner: Arc<dyn Store>,
    counters: Counters,
}

impl CountingStore {
    /// Wraps a store.
    pub fn new(inner: Arc<dyn Store>) -> CountingStore {
        CountingStore { inner, counters: Arc::default() }
    }

    /// What one method did so far.
    pub fn count(&self, method: Method) -> Count {
        let counter = &self.counters[method as usize];
        Count {
            requests: counter.requests.load(Ordering::Relaxed),
            bytes: counter.bytes.load(Ordering::Relaxed),
        }
    }

    /// Requests of all methods so far.
    pub fn requests(&self) -> u64 {
        Method::ALL.iter().map(|&method| self.count(method).requests).sum()
    }

    /// Bytes read so far.
    pub fn bytes_read(&self) -> u64 {
        self.count(Method::Get).bytes + self.count(Method::GetRange).bytes
    }

    /// Bytes written so far.
    pub fn bytes_written(&self) -> u64 {
        [Method::PutNew, Method::Write, Method::CompareAndSwap]
            .iter()
            .map(|&method| self.count(method).bytes)
            .sum()
    }

    /// Starts again from zero.
    pub fn reset(&self) {
        for counter in self.counters.iter() {
            counter.requests.store(0, Ordering::Relaxed);
            counter.bytes.store(0, Ordering::Relaxed);
        }
    }
}

fn add(counters: &Counters, method: Method, bytes: usize) {
    let counter = &counters[method as usize];
    counter.requests.fetch_add(1, Ordering::Relaxed);
    counter.bytes.fetch_add(bytes as u64, Ordering::Relaxed);
}

#[async_trait]
impl Store for CountingStore {
    async fn get(&self, key: &Key) -> Result<(Bytes, Etag), StoreError> {
        let result = self.inner.get(key).await;
        add(&self.counters, Method::Get, result.as_ref().map_or(0, |(body, _)| body.len()));
        result
    }

    async fn get_range(&self, key: &Key, range: Range<u64>) -> Result<Bytes, StoreError> {
        let result = self.inner.get_range(key, range).await;
        add(&self.counters, Method::GetRange, result.as_ref().map_or(0, Bytes::len));
        result
    }

    async fn put_new(&self, key: &Key, body: Bytes) -> Result<(), StoreError> {
        add(&self.counters, Method::PutNew, body.len());
        self.inner.put_new(key, body).await
    }

    async fn begin(&self) -> Result<Box<dyn Upload>, StoreError> {
        add(&self.counters, Method::Begin, 0);
        let inner = self.inner.begin().await?;
        Ok(Box::new(CountingUpload { inner, counters: self.counters.clone() }))
    }

    async fn compare_and_swap(
        &self,
        key: &Key,
        expected: Option<&Etag>,
        new: Bytes,
    ) -> Result<Etag, StoreError> {
        add(&self.counters, Method::CompareAndSwap, new.len());
        self.inner.compare_and_swap(key, expected, new).await
    }

    async fn list(
        &self,
        prefix: &KeyPrefix,
        after: Option<&Key>,
        limit: usize,
    ) -> Result<Page<Listed>, StoreError> {
        add(&self.counters, Method::List, 0);
        self.inner.list(prefix, after, limit).await
    }

    async fn children(
        &self,
        dir: &KeyPrefix,
        after: Option<&str>,
        limit: usize,
    ) -> Result<Page<String>, StoreError> {
        add(&self.counters, Method::List, 0);
        self.inner.children(dir, after, limit).await
    }

    async fn delete(&self, key: &Key) -> Result<(), StoreError> {
        add(&self.counters, Method::Delete, 0);
        self.inner.delete(key).await
    }

    async fn occupant(&self) -> Result<Option<String>, StoreError> {
        self.inner.occupant().await
    }

    fn describe(&self) -> String {
        self.inner.describe()
    }

    fn expect_reads(&self, at_once: usize) {
        self.inner.expect_reads(at_once);
    }

    fn attempts(&self) -> Option<Attempts> {
        self.inner.attempts()
    }
}

struct CountingUpload {
    inner: Box<dyn Upload>,
    counters: Counters,
}

#[async_trait]
impl Upload for CountingUpload {
    async fn write(&mut self, bytes: Bytes) -> Result<(), StoreError> {
        add(&self.counters, Method::Write, bytes.len());
        self.inner.write(bytes).await
    }

    async fn finish(&mut self, key: &Key) -> Result<(), StoreError> {
        add(&self.counters, Method::Finish, 0);
        self.inner.finish(key).await
    }
}
