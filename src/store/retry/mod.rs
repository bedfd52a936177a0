//! A store that tries again: what every store that is reached over a network is wrapped in.
//!
//! Enters: requests. Leaves: answers, or the last error when the request's time is up. Invariants: an error that will not go away by itself is passed on at once;
//! a request takes no longer than its deadline and one attempt; waits between attempts grow and are random (`backoff`); no more requests are under way than the
//! store takes (`limit`); a second request for the same bytes is sent beside a slow one rarely enough never to double the load (`hedge`).
//!
//! A swap is repeated only while the object still has the expected tag. Where its answer was lost and the object changed, the caller is told that it is not known.

mod backoff;
mod hedge;
mod limit;

use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use async_trait::async_trait;
use bytes::Bytes;
use parking_lot::Mutex;

use self::backoff::Backoff;
use self::hedge::Hedge;
use self::limit::Limit;
use super::{Attempts, Etag, Key, KeyPrefix, Listed, Page, Store, StoreError, Upload};

/// A store that is out of reach is told of once it has been so for this long: most hiccups are over by then.
const QUIET: Duration = Duration::from_secs(2);

/// A read that comes at 32 KB/s or faster is let finish, besides the time every attempt has.
const SLOWEST_BYTES_PER_MS: u64 = 32;
/// How often a range that comes back too short is asked for again.
const SHORT_AGAIN: u32 = 2;

/// How long and how hard to try.
#[derive(Clone, Copy, Debug)]
pub struct RetryOptions {
    /// After this long no further attempt is begun.
    pub deadline: Duration,
    /// The same for a store that has not answered anything yet: its address may be wrong, and who gave it is waiting.
    pub first_contact: Duration,
    /// How long one attempt at a read or a listing may take. Writes have no bound but their store's: a slow line is no failure.
    pub attempt: Duration,
    /// The most requests under way.
    pub in_flight: usize,
}

impl Default for RetryOptions {
    fn default() -> RetryOptions {
        RetryOptions {
            deadline: Duration::from_secs(120),
            first_contact: Duration::from_secs(10),
            attempt: Duration::from_secs(15),
            in_flight: 128,
        }
    }
}

/// Wraps a store. Clones share what is known of it.
#[derive(Clone, Debug)]
pub struct RetryStore {
    inner: Arc<dyn Store>,
    options: RetryOptions,
    shared: Arc<Shared>,
}

/// What is known of the store.
#[derive(Debug)]
struct Shared {
    limit: Limit,
    hedge: Hedge,
    /// Whether it has ever answered.
    known: AtomicBool,
    /// Since when nothing was answered, and whether that was told.
    away: Mutex<Option<(Instant, bool)>>,
    begun: AtomicU64,
    failed: AtomicU64,
    repeated: AtomicU64,
}

impl RetryStore {
    /// Wraps a store.
    pub fn new(inner: Arc<dyn Store>, options: RetryOptions) -> RetryStore {
        let shared = Shared {
            limit: Limit::new(options.in_flight),
            hedge: Hedge::default(),
            known: AtomicBool::new(false),
            away: Mutex::default(),
            begun: AtomicU64::new(0),
            failed: AtomicU64::new(0),
            repeated: AtomicU64::new(0),
        };
        RetryStore { inner, options, shared: Arc::new(shared) }
    }

    /// One attempt: within its time, and no more at once than the store takes.
    async fn attempt<T>(
        &self,
        bound: Option<Duration>,
        operation: &'static str,
        key: &str,
        request: impl Future<Output = Result<T, StoreError>>,
    ) -> Result<T, StoreError> {
        let no_answer =
            || Err(StoreError::Unavailable { store: self.describe(), operation, key: key.to_owned() });
        let Ok(_permit) = tokio::time::timeout(self.options.deadline, self.shared.limit.enter()).await else {
            return no_answer();
        };
        let began = Instant::now();
        self.shared.begun.fetch_add(1, Ordering::Relaxed);
        let answer = match bound {
            None => request.await,
            Some(bound) => tokio::time::timeout(bound, request).await.unwrap_or_else(|_| no_answer()),
        };
        tracing::trace!(operation, key, took = ?began.elapsed(), answered = answer.is_ok(), "request");
        match &answer {
            Err(StoreError::Busy { .. } | StoreError::Unavailable { .. }) => self.shared.limit.overloaded(),
            Err(_) => {}
            Ok(_) => self.shared.limit.answered(),
        }
        if answer.as_ref().is_err_and(|error| self.may_pass(error)) {
            self.shared.failed.fetch_add(1, Ordering::Relaxed);
        }
        answer
    }

    /// Whether another attempt may go better.
    fn may_pass(&self, error: &StoreError) -> bool {
        match self.shared.known.load(Ordering::Relaxed) {
            true => error.is_transient_once_known(),
            false => error.is_transient(),
        }
    }

    /// Attempts until one is answered for good or time is up.
    async fn again<T, F>(
        &self,
        bound: Option<Duration>,
        operation: &'static str,
        key: &str,
        mut request: impl FnMut() -> F,
    ) -> Result<T, StoreError>
    where
        F: Future<Output = Result<T, StoreError>>,
    {
        let mut backoff = Backoff::new(self.patience());
        loop {
            let answer = self.attempt(bound, operation, key, request()).await;
            match answer {
                Err(error) if self.may_pass(&error) => {
                    let Some(wait) = backoff.next() else { return Err(error) };
                    self.no_answer(&error);
                    tracing::debug!(store = %self.describe(), operation, key, %error, ?wait, "trying again");
                    tokio::time::sleep(wait).await;
                }
                answer => return self.settled(answer),
            }
        }
    }

    /// An answer for good. That it refuses who asks says nothing of a store that never answered.
    fn settled<T>(&self, answer: Result<T, StoreError>) -> Result<T, StoreError> {
        if answer.as_ref().err().is_none_or(|error| !error.is_transient_once_known()) {
            self.answered();
        }
        answer
    }

    /// The store did not answer, and is asked again: said once, when it has lasted. Of one that never answered the error alone speaks, and soon.
    fn no_answer(&self, error: &StoreError) {
        self.shared.repeated.fetch_add(1, Ordering::Relaxed);
        if self.patience() < self.options.deadline {
            return;
        }
        let mut away = self.shared.away.lock();
        let (since, told) = away.get_or_insert_with(|| (Instant::now(), false));
        if !*told && since.elapsed() > QUIET {
            *told = true;
            tracing::warn!(%error, patience = ?self.patience(), "no answer: what is not here waits for it");
        }
    }

    fn patience(&self) -> Duration {
        let RetryOptions { deadline, first_contact, .. } = self.options;
        if self.shared.known.load(Ordering::Relaxed) { deadline } else { deadline.min(first_contact) }
    }

    fn answered(&self) {
        self.shared.known.store(true, Ordering::Relaxed);
        // Taken first, so that the lock is not held while it is told.
        let was = self.shared.away.lock().take();
        if let Some((since, true)) = was {
            tracing::info!(store = %self.describe(), after = ?since.elapsed(), "answers again");
        }
    }

    fn bound(&self) -> Option<Duration> {
        Some(self.options.attempt)
    }
}

#[async_trait]
impl Store for RetryStore {
    async fn get(&self, key: &Key) -> Result<(Bytes, Etag), StoreError> {
        self.again(self.bound(), "read", key.as_str(), || self.inner.get(key)).await
    }

    async fn get_range(&self, key: &Key, range: Range<u64>) -> Result<Bytes, StoreError> {
        let mut short = 0;
        // Long ranges take long on a slow line that many share.
        let len = range.end.saturating_sub(range.start);
        let bound = self.options.attempt + Duration::from_millis(len / SLOWEST_BYTES_PER_MS);
        loop {
            let read = self.again(Some(bound), "read", key.as_str(), || async {
                let read = || self.inner.get_range(key, range.clone());
                self.shared.hedge.race(&self.shared.limit, read).await
            });
            match read.await {
                // The object may end there, or an answer was cut on the way and made to look whole.
                Err(StoreError::ShortBody { .. }) if short < SHORT_AGAIN => short += 1,
                answer => return answer,
            }
        }
    }

    async fn put_new(&self, key: &Key, body: Bytes) -> Result<(), StoreError> {
        self.again(None, "write", key.as_str(), || self.inner.put_new(key, body.clone())).await
    }

    async fn begin(&self) -> Result<Box<dyn Upload>, StoreError> {
        // Without a bound: it may have to find out first what the server can do.
        let inner = self.again(None, "write", "an upload", || self.inner.begin()).await?;
        Ok(Box::new(RetryUpload { inner, store: self.clone() }))
    }

    async fn compare_and_swap(
        &self,
        key: &Key,
        expected: Option<&Etag>,
        new: Bytes,
    ) -> Result<Etag, StoreError> {
        let mut backoff = Backoff::new(self.patience());
        let mut lost: Option<StoreError> = None;
        loop {
            let swap = self.inner.compare_and_swap(key, expected, new.clone());
            let error = match self.attempt(None, "write", key.as_str(), swap).await {
                // With itself, it may be: an attempt before this one may have been carried out.
                Err(conflict @ StoreError::Conflict { .. }) => return Err(lost.unwrap_or(conflict)),
                Err(error) if self.may_pass(&error) => error,
                answer => return self.settled(answer),
            };
            let Some(wait) = backoff.next() else { return Err(error) };
            self.no_answer(&error);
            tokio::time::sleep(wait).await;
            let there = match self.get(key).await {
                Ok((_, etag)) => Some(etag),
                Err(missing) if missing.is_not_found() => None,
                Err(_) => return Err(error),
            };
            if there.as_ref() != expected {
                return Err(error);
            }
            lost = Some(error);
        }
    }

    async fn list(
        &self,
        prefix: &KeyPrefix,
        after: Option<&Key>,
        limit: usize,
    ) -> Result<Page<Listed>, StoreError> {
        self.again(self.bound(), "list", prefix.as_str(), || self.inner.list(prefix, after, limit)).await
    }

    async fn children(
        &self,
        dir: &KeyPrefix,
        after: Option<&str>,
        limit: usize,
    ) -> Result<Page<String>, StoreError> {
        self.again(self.bound(), "list", dir.as_str(), || self.inner.children(dir, after, limit)).await
    }

    async fn delete(&self, key: &Key) -> Result<(), StoreError> {
        self.again(self.bound(), "delete", key.as_str(), || self.inner.delete(key)).await
    }

    async fn occupant(&self) -> Result<Option<String>, StoreError> {
        self.again(self.bound(), "list", "", || self.inner.occupant()).await
    }

    fn describe(&self) -> String {
        self.inner.describe()
    }

    fn expect_reads(&self, at_once: usize) {
        self.inner.expect_reads(at_once);
    }

    fn attempts(&self) -> Option<Attempts> {
        let value = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        let Shared { begun, failed, repeated, .. } = &*self.shared;
        Some(Attempts { begun: value(begun), failed: value(failed), repeated: value(repeated) })
    }
}

struct RetryUpload {
    inner: Box<dyn Upload>,
    store: RetryStore,
}

#[async_trait]
impl Upload for RetryUpload {
    /// Once: bytes that may or may not be there can't be sent again.
    async fn write(&mut self, bytes: Bytes) -> Result<(), StoreError> {
        self.store.attempt(None, "write", "", self.inner.write(bytes)).await
    }

    async fn finish(&mut self, key: &Key) -> Result<(), StoreError> {
        let mut backoff = Backoff::new(self.store.patience());
        let mut failed: Option<StoreError> = None;
        loop {
            match self.store.attempt(None, "write", key.as_str(), self.inner.finish(key)).await {
                Err(error) if self.store.may_pass(&error) => {
                    let Some(wait) = backoff.next() else { return Err(error) };
                    self.store.no_answer(&error);
                    failed = Some(error);
                    tokio::time::sleep(wait).await;
                }
                // A store whose uploads can't be finished twice: what went wrong is the first answer.
                Err(cancelled @ StoreError::Cancelled { .. }) => return Err(failed.unwrap_or(cancelled)),
                answer => return self.store.settled(answer),
            }
        }
    }
}
