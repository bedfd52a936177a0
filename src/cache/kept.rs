//! Chunks that are never evicted: those of pinned volumes.
//!
//! Invariant: a chunk that was asked to be kept is; of others, one in some billions may be too, since only 8 bytes of an id are remembered.

use std::collections::HashSet;

use parking_lot::RwLock;

use crate::format::ChunkId;

#[derive(Debug, Default)]
pub(super) struct Kept {
    /// The first 8 bytes of each id.
    ids: RwLock<HashSet<u64>>,
}

fn short(id: &ChunkId) -> u64 {
    let (words, _) = id.as_bytes().as_chunks::<8>();
    u64::from_le_bytes(words[0])
}

impl Kept {
    pub(super) fn add(&self, ids: impl IntoIterator<Item = ChunkId>) {
        self.ids.write().extend(ids.into_iter().map(|id| short(&id)));
    }

    pub(super) fn replace(&self, ids: impl IntoIterator<Item = ChunkId>) {
        let kept = ids.into_iter().map(|id| short(&id)).collect();
        *self.ids.write() = kept;
    }

    pub(super) fn has(&self, id: &ChunkId) -> bool {
        let ids = self.ids.read();
        !ids.is_empty() && ids.contains(&short(id))
    }
}
