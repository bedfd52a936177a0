//! Stores: flat spaces of objects under keys, in a directory, in memory, in S3 buckets, on SSH hosts.
//!
//! Enters: keys, ranges and bodies. Leaves: bytes as the store gave them, *not verified*: whoever reads checks them against a hash.
//! Invariant: an object is visible whole or not at all, and what a method answered `Ok` for survives a power cut at the store.
//!
//! The promises are on the methods of [`Store`]; the suite in `tests/common/store_contract.rs` holds every store to them.

mod claim;
pub mod counting;
pub mod dir;
pub mod error;
pub mod fault;
pub mod key;
pub mod mem;
pub mod mirror;
pub mod retry;
pub mod s3;
pub mod ssh;
pub mod url;

use std::fmt;
use std::ops::Range;
use std::time::SystemTime;

use async_trait::async_trait;
use bytes::Bytes;

pub use counting::CountingStore;
pub use dir::DirStore;
pub use error::StoreError;
pub use fault::FaultStore;
pub use key::{Key, KeyError, KeyPrefix};
pub use mem::MemStore;
pub use mirror::MirrorStore;
pub use retry::{RetryOptions, RetryStore};
pub use s3::{S3Place, S3Store};
pub use ssh::{SshPlace, SshStore};
pub use url::{RepositoryUrl, UrlError};

/// The longest object that [`Store::get`] reads whole. Base objects are longer; they are read by ranges.
pub const MAX_WHOLE_OBJECT: u64 = 16 << 20;

/// What a store calls one content of a key: equal tags mean equal content. Opaque; compared, never parsed.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Etag(String);

impl Etag {
    /// Takes a store's own token.
    pub fn new(token: impl Into<String>) -> Etag {
        Etag(token.into())
    }

    /// The token.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl fmt::Display for Etag {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// One object of a listing.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Listed {
    /// Its key.
    pub key: Key,
    /// Its length in bytes.
    pub len: u64,
    /// When it was written, by the clock of whoever keeps the store, to the second or finer; `None` where it does not tell. Good for saying how long ago that was by the
    /// same clock, and for nothing else.
    pub modified: Option<SystemTime>,
}

/// A part of a listing.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Page<T> {
    /// Its items, in order.
    pub items: Vec<T>,
    /// Whether there are more after the last one.
    pub more: bool,
}

/// A flat space of objects.
///
/// Bytes come as the store holds them. A store does not verify content; it does guarantee lengths, so that a short reply of a network or a
/// truncated file is an error here and never looks like data.
#[async_trait]
pub trait Store: Send + Sync + fmt::Debug {
    /// Reads a whole object of at most [`MAX_WHOLE_OBJECT`] bytes, and the tag to give to [`Store::compare_and_swap`].
    ///
    /// Guarantees: content and tag belong together; a read that starts after a write was answered sees it or a later one.
    /// Does not: promise that the object is still the same afterwards.
    async fn get(&self, key: &Key) -> Result<(Bytes, Etag), StoreError>;

    /// Reads the bytes `range` (end exclusive) of an object.
    ///
    /// Guarantees: exactly `range.end - range.start` bytes, else [`StoreError::ShortBody`]; an empty range of an existing object is empty.
    /// Does not: promise that two ranges come from one content, where an object is replaced; only write-once objects are read by range.
    async fn get_range(&self, key: &Key, range: Range<u64>) -> Result<Bytes, StoreError>;

    /// Makes an object that is written once.
    ///
    /// Guarantees: on `Ok` it is visible whole and durable. If it exists with the same content that is `Ok` too, and with
    /// other content [`StoreError::AlreadyExists`], the old content untouched.
    /// Does not: undo. On another `Err` the object may exist, whole; the same call may be made again.
    async fn put_new(&self, key: &Key, body: Bytes) -> Result<(), StoreError>;

    /// Starts an object whose bytes, and so whose key, are not all known yet.
    async fn begin(&self) -> Result<Box<dyn Upload>, StoreError>;

    /// Replaces an object whose tag is `expected`, or makes it where `expected` is `None` and there is none.
    ///
    /// Guarantees: of any number of callers with one `expected`, from any process, at most one gets `Ok`; the others get
    /// [`StoreError::Conflict`] and change nothing. On `Ok` the new content is durable; its tag is returned. A reader sees old or new, whole.
    /// Does not: undo. On an `Err` other than `Conflict` the swap may have happened or may still happen; read again to know.
    async fn compare_and_swap(
        &self,
        key: &Key,
        expected: Option<&Etag>,
        new: Bytes,
    ) -> Result<Etag, StoreError>;

    /// Lists up to `limit` objects whose keys start with `prefix` and come after `after`, the last key of the page before, in an order of the
    /// store's own: by bytes of the key in most, by segments in some.
    ///
    /// Guarantees: an object that exists throughout a listing is in it once. Writes in flight are not in it.
    /// Does not: show one moment; an object made or deleted meanwhile may be in it or not.
    async fn list(
        &self,
        prefix: &KeyPrefix,
        after: Option<&Key>,
        limit: usize,
    ) -> Result<Page<Listed>, StoreError>;

    /// Lists up to `limit` distinct next segments of the keys below `dir` (a prefix that is empty or ends in `/`), greater than `after`,
    /// in ascending order, without reading what is below them. As consistent as [`Store::list`]; a segment below which there is no
    /// object (any more) may be in it.
    async fn children(
        &self,
        dir: &KeyPrefix,
        after: Option<&str>,
        limit: usize,
    ) -> Result<Page<String>, StoreError>;

    /// Deletes an object; that there is none is `Ok`.
    ///
    /// Guarantees: on `Ok` it is gone for readers that start later, and after a power cut.
    /// Does not: stop a range read under way. On `Err` it may be gone.
    async fn delete(&self, key: &Key) -> Result<(), StoreError>;

    /// Names something in the place that is neither an object key's first segment in use by a repository nor a leftover of
    /// a write: whatever makes it unwise to start a repository there. `None` where the place is empty or missing.
    async fn occupant(&self) -> Result<Option<String>, StoreError>;

    /// The place, for messages: no credentials in it.
    fn describe(&self) -> String;

    /// Says that many reads are to come soon: a store over a network opens so many connections in the background. Promises nothing; must be called in a
    /// runtime.
    fn expect_reads(&self, _at_once: usize) {}

    /// How its requests went since it was opened; `None` for a store that makes one attempt at each.
    fn attempts(&self) -> Option<Attempts> {
        None
    }
}

/// How requests to a store that may be away went.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Attempts {
    /// Attempts begun.
    pub begun: u64,
    /// Attempts that failed in a way that may pass: no answer, a store that is too busy, one that is in trouble.
    pub failed: u64,
    /// Attempts that were made because the one before had failed so.
    pub repeated: u64,
}

/// An object being written as a stream. Dropping it leaves nothing visible; a leftover that a crash leaves is no object.
#[async_trait]
pub trait Upload: Send {
    /// Appends bytes. After an `Err` the upload can only be dropped.
    async fn write(&mut self, bytes: Bytes) -> Result<(), StoreError>;

    /// Makes all that was written visible under `key`, as [`Store::put_new`] does. After a transient error it may be called again with the same key; after
    /// any other answer the upload can only be dropped.
    async fn finish(&mut self, key: &Key) -> Result<(), StoreError>;
}
