//! What can go wrong with the cache itself, and with a fetch that others wait for.
//!
//! A cache that can't keep a chunk is no error: the chunk is served from memory and the counters tell.

use std::error::Error;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use crate::format::ChunkId;
use crate::units::ByteLen;

/// Why a cache can't be opened.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum CacheError {
    /// Another server has it open, or this one still holds chunks of an earlier opening.
    #[error("the cache in {dir} is in use{}", holder.map(|pid| format!(" by process {pid}")).unwrap_or_default())]
    InUse {
        /// The cache's directory.
        dir: PathBuf,
        /// The process that says it holds the lock.
        holder: Option<u32>,
    },
    /// The size limit is below what a cache needs to be one.
    #[error("a cache of {limit} bytes is too small, it needs at least {min}")]
    Limit {
        /// The limit asked for.
        limit: ByteLen,
        /// The smallest one.
        min: ByteLen,
    },
    /// A system call failed.
    #[error("cache: can't {action} {path}: {source}")]
    Io {
        /// What was tried.
        action: &'static str,
        /// On which file or directory.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
}

impl CacheError {
    pub(super) fn io(action: &'static str, path: &Path) -> impl FnOnce(io::Error) -> CacheError {
        let path = path.to_owned();
        move |source| CacheError::Io { action, path, source }
    }
}

/// Why a chunk did not come. Everyone who waited for the same flight gets the same one.
#[derive(Clone, Debug, thiserror::Error)]
#[non_exhaustive]
pub enum FetchError {
    /// The fetch failed.
    #[error("chunk {id}: {source}")]
    Fetch {
        /// The chunk.
        id: ChunkId,
        /// What the fetch said.
        source: Arc<dyn Error + Send + Sync>,
    },
    /// The fetch brought another chunk, or one of another size.
    #[error("chunk {id} of {expected} bytes was asked for, the fetch brought {actual_id} of {actual}")]
    Wrong {
        /// The chunk asked for.
        id: ChunkId,
        /// Its size.
        expected: ByteLen,
        /// The chunk that came.
        actual_id: ChunkId,
        /// Its size.
        actual: ByteLen,
    },
    /// The fetch ended without a result: it panicked, or the server is going down.
    #[error("chunk {id}: the fetch was broken off")]
    BrokenOff {
        /// The chunk.
        id: ChunkId,
    },
}

impl FetchError {
    /// The error of the fetch itself, if it was an `E`.
    pub fn cause<E: Error + 'static>(&self) -> Option<&E> {
        match self {
            FetchError::Fetch { source, .. } => source.downcast_ref(),
            _ => None,
        }
    }
}
