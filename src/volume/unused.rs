//! What the cache holds and no volume needs: what the last volume of an image leaves behind.

use std::collections::{BTreeSet, HashSet};

use super::VolumeRecord;
use crate::cache::Cache;
use crate::format::ChunkId;
use crate::repo::known_chunks;

/// The chunks in the cache that none of these volumes needs, as far as their maps are here. Blocks on files.
pub fn unused_chunks(cache: &Cache, volumes: &[VolumeRecord]) -> HashSet<ChunkId> {
    let mut unused = cache.chunks();
    let commits: BTreeSet<_> = volumes.iter().map(|volume| volume.commit).collect();
    for commit in commits {
        if unused.is_empty() {
            break;
        }
        known_chunks(cache, commit, &mut |chunk| {
            unused.remove(chunk);
        });
    }
    unused
}
