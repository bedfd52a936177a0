//! A store on an SSH host, over SFTP.
//!
//! Enters: keys, ranges and bodies. Leaves: objects below the place's directory, the very files a directory store makes: one and the same repository may be
//! used both ways at once. Invariants: no byte is sent to a host that is not the known one (`connect`); an object gets its name after its fsync (`files`); refs
//! move by a claim that neither a pause nor a broken connection can get round (`swap`).
//!
//! Each request has a session of its own for its time, of at most [`MAX_SESSIONS`] (`pool`), on a blocking thread; within it what can go out in a row
//! does (`sftp`). The crate ssh2 makes the sessions and the channels; SFTP on top of them is ours, `sftp` says why.

mod auth;
mod config;
mod connect;
mod error;
mod files;
mod known_hosts;
mod listing;
mod local;
mod place;
mod pool;
mod requests;
mod sftp;
mod swap;
mod upload;
mod wire;
mod writes;

use std::collections::HashSet;
use std::fmt;
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::time::Duration;

use async_trait::async_trait;
use bytes::Bytes;
use parking_lot::Mutex;
use tokio::sync::Semaphore;

use self::pool::{Again, Pool};
use super::claim::CLAIM_EXPIRY;
use super::dir::etag_of;
use super::{Etag, Key, KeyPrefix, Listed, Page, Store, StoreError, Upload};

pub use local::Local;
pub use place::SshPlace;
pub use pool::{MAX_SESSIONS, MAX_UPLOADS};

/// Where sshd listens.
const DEFAULT_PORT: u16 = 22;

/// A store on a host. Clones share the sessions.
#[derive(Clone)]
pub struct SshStore {
    inner: Arc<Inner>,
}

struct Inner {
    place: SshPlace,
    local: Local,
    name: String,
    /// Sessions that wait. Guards nothing else.
    pool: Pool,
    slots: Arc<Semaphore>,
    uploads: Arc<Semaphore>,
    /// Directories whose names are durable. Guards nothing else.
    known_dirs: Mutex<HashSet<Vec<u8>>>,
    /// Whether it was said that the server can't fsync.
    warned: AtomicBool,
    claim_expiry: Duration,
}

impl fmt::Debug for SshStore {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("SshStore").field(&self.inner.place).finish()
    }
}

impl SshStore {
    /// The store at a place. Touches nothing yet.
    pub fn new(place: SshPlace, local: Local) -> SshStore {
        SshStore::with_claim_expiry(place, local, CLAIM_EXPIRY)
    }

    /// The same, waiting only so long for a writer of refs that may be dead.
    pub fn with_claim_expiry(place: SshPlace, local: Local, claim_expiry: Duration) -> SshStore {
        let inner = Inner {
            name: place.to_string(),
            place,
            local,
            pool: Pool::default(),
            slots: Arc::new(Semaphore::new(MAX_SESSIONS)),
            uploads: Arc::new(Semaphore::new(MAX_UPLOADS)),
            known_dirs: Mutex::default(),
            warned: AtomicBool::new(false),
            claim_expiry,
        };
        SshStore { inner: Arc::new(inner) }
    }
}

/// Up to twice a pause: many who wait for one thing should not come back at one moment.
fn jittered(pause: Duration) -> Duration {
    pause + pause.mul_f64(f64::from(uuid::Uuid::new_v4().as_bytes()[0]) / 256.0)
}

#[async_trait]
impl Store for SshStore {
    async fn get(&self, key: &Key) -> Result<(Bytes, Etag), StoreError> {
        let key = key.clone();
        let body = pool::run(&self.inner, "read", Again::Harmless, move |at| at.read_whole(&key)).await?;
        let etag = etag_of(&body);
        Ok((body, etag))
    }

    async fn get_range(&self, key: &Key, range: Range<u64>) -> Result<Bytes, StoreError> {
        let key = key.clone();
        pool::run(&self.inner, "read", Again::Harmless, move |at| at.read_range(&key, &range)).await
    }

    async fn put_new(&self, key: &Key, body: Bytes) -> Result<(), StoreError> {
        let key = key.clone();
        // Twice is harmless: the second finds what the first has made.
        pool::run(&self.inner, "write", Again::Harmless, move |at| at.put_new(&key, &body)).await
    }

    async fn begin(&self) -> Result<Box<dyn Upload>, StoreError> {
        let cancelled = |_| StoreError::Cancelled { store: self.inner.name.clone(), operation: "an upload" };
        let permit = self.inner.uploads.clone().acquire_owned().await.map_err(cancelled)?;
        Ok(Box::new(upload::begin(self.inner.clone(), permit).await?))
    }

    async fn compare_and_swap(
        &self,
        key: &Key,
        expected: Option<&Etag>,
        new: Bytes,
    ) -> Result<Etag, StoreError> {
        let (key, expected) = (key.clone(), expected.cloned());
        let swap = move |at: &mut files::At<'_>| at.compare_and_swap(&key, expected.as_ref(), &new);
        pool::run(&self.inner, "write", Again::Never, swap).await
    }

    async fn list(
        &self,
        prefix: &KeyPrefix,
        after: Option<&Key>,
        limit: usize,
    ) -> Result<Page<Listed>, StoreError> {
        let (prefix, after) = (prefix.clone(), after.cloned());
        let list = move |at: &mut files::At<'_>| at.list(&prefix, after.as_ref(), limit);
        pool::run(&self.inner, "list", Again::Harmless, list).await
    }

    async fn children(
        &self,
        dir: &KeyPrefix,
        after: Option<&str>,
        limit: usize,
    ) -> Result<Page<String>, StoreError> {
        let (dir, after) = (dir.clone(), after.map(str::to_owned));
        let children = move |at: &mut files::At<'_>| at.children(&dir, after.as_deref(), limit);
        pool::run(&self.inner, "list", Again::Harmless, children).await
    }

    async fn delete(&self, key: &Key) -> Result<(), StoreError> {
        let key = key.clone();
        pool::run(&self.inner, "delete", Again::Harmless, move |at| at.delete(&key)).await
    }

    async fn occupant(&self) -> Result<Option<String>, StoreError> {
        pool::run(&self.inner, "list", Again::Harmless, |at| at.occupant()).await
    }

    fn describe(&self) -> String {
        self.inner.name.clone()
    }
}
