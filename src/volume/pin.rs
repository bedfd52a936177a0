//! Pinned volumes: all of the commit is here, and stays.
//!
//! Enters: a volume. Leaves: its chunks in the cache, and a mark by which the next server keeps them there. Invariant: the mark is set only once everything is here.

use std::collections::HashSet;
use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering};

use super::{Volume, VolumeError};
use crate::cache::Cache;
use crate::durable::replace_file;
use crate::format::ChunkId;
use crate::repo::{RepoError, Version};
use crate::units::{BlockIndex, ByteLen};

/// Name of the mark in a volume's directory.
pub const PIN_MARK: &str = "pinned";

/// Every chunk a version needs. Loads its tables.
pub async fn chunks_of(version: &Version) -> Result<HashSet<ChunkId>, RepoError> {
    let mut chunks = HashSet::new();
    let (mut at, end) = (BlockIndex(0), BlockIndex(version.commit().blocks()));
    while let Some((block, _)) = version.next_block(at, end).await? {
        if let Some(table) = version.table(block).await? {
            chunks.extend(table.entries().iter().map(|entry| entry.id));
        }
        at = BlockIndex(block.0 + 1);
    }
    Ok(chunks)
}

/// Whether a volume is pinned.
pub fn is_pinned(dir: &Path) -> bool {
    dir.join(PIN_MARK).exists()
}

/// Takes the mark away; the chunks may be evicted from the next start on.
pub fn unpin(dir: &Path) -> Result<(), VolumeError> {
    let path = dir.join(PIN_MARK);
    match std::fs::remove_file(&path) {
        Err(source) if source.kind() != std::io::ErrorKind::NotFound => {
            Err(VolumeError::Io { action: "delete", path, source })
        }
        _ => Ok(()),
    }
}

/// How far pinning a volume is.
#[derive(Debug, Default)]
pub struct Pinning {
    done: AtomicU64,
    total: AtomicU64,
}

impl Pinning {
    /// Bytes that are here.
    pub fn done(&self) -> ByteLen {
        ByteLen(self.done.load(Ordering::Relaxed))
    }

    /// Bytes there are; nothing before that is known.
    pub fn total(&self) -> ByteLen {
        ByteLen(self.total.load(Ordering::Relaxed))
    }
}

impl Volume {
    /// Brings all of the commit here and marks the volume. How many bytes were fetched.
    pub async fn pin(&self, cache: &Cache, progress: &Pinning) -> Result<ByteLen, VolumeError> {
        let base = &self.device().base();
        let chunks = chunks_of(base.version()).await?;
        let needed = ByteLen(chunks.len() as u64 * base.chunk_len());
        let limit = cache.chunk_limit();
        if needed > limit {
            return Err(VolumeError::CacheTooSmall { volume: self.name().to_owned(), needed, limit });
        }
        // Before the fetch: its end must not wash out its beginning.
        cache.keep(chunks.iter().copied());
        let here = chunks.iter().filter(|chunk| cache.contains(chunk)).count() as u64 * base.chunk_len();
        progress.total.store(needed.0, Ordering::Relaxed);
        let brought =
            |so_far: ByteLen| progress.done.store((here + so_far.0).min(needed.0), Ordering::Relaxed);
        brought(ByteLen(0));
        let brought = super::prefetch::fetch_everything(base, None, brought, Err).await?;
        // Of these alone: other volumes' fetches may never end.
        cache.written_of(&chunks).await;
        if let Some(missing) = chunks.iter().find(|id| !cache.contains(id)) {
            return Err(VolumeError::NotKept { volume: self.name().to_owned(), chunk: *missing });
        }
        if let Some(dir) = &self.dir {
            let path = dir.join(PIN_MARK);
            let mark = path.clone();
            let marked = tokio::task::spawn_blocking(move || replace_file(&mark, b"")).await;
            let marked = marked.unwrap_or_else(|error| Err(error.into()));
            marked.map_err(|source| VolumeError::Io { action: "write", path, source })?;
        }
        Ok(brought)
    }

    /// Has the cache keep what a pinned volume needs.
    pub async fn keep_pinned(&self, cache: &Cache) {
        if !self.dir.as_deref().is_some_and(is_pinned) {
            return;
        }
        match chunks_of(self.device().base().version()).await {
            Ok(chunks) => cache.keep(chunks),
            // It is served all the same; what leaves the cache can be fetched again.
            Err(error) => {
                tracing::warn!(volume = self.name(), %error, "can't tell what to keep of a pinned volume");
            }
        }
    }
}
