//! What the cache holds and who needs it: what the last volume of an image leaves behind, what pinned volumes must have.

use std::collections::{BTreeMap, BTreeSet, HashSet};

use super::pin::is_pinned;
use super::{StateDir, VolumeName, VolumeRecord};
use crate::cache::Cache;
use crate::format::{ChunkId, CommitId};
use crate::repo::known_chunks;

/// The chunks in the cache that none of these volumes needs, as far as their maps are here; none at all if a pinned volume's is not here whole, since
/// it has to work with its repository away. Blocks on files.
pub fn unused_chunks(
    cache: &Cache,
    state: &StateDir,
    volumes: &[(VolumeName, VolumeRecord)],
) -> HashSet<ChunkId> {
    let mut commits = BTreeMap::new();
    for (name, record) in volumes {
        *commits.entry(record.commit).or_insert(false) |= is_pinned(&state.volume_dir(name.as_str()));
    }
    let mut unused = cache.chunks();
    for (commit, pinned) in commits {
        if unused.is_empty() {
            break;
        }
        let are_all = known_chunks(cache, commit, &mut |chunk, _| {
            unused.remove(chunk);
        });
        if pinned && !are_all {
            tracing::warn!(%commit, "can't tell what a pinned volume needs: nothing is freed");
            return HashSet::new();
        }
    }
    unused
}

/// The chunks these commits need, as far as their maps are here, and whether these are all. Blocks on files.
pub fn chunks_here(cache: &Cache, commits: BTreeSet<CommitId>) -> (HashSet<ChunkId>, bool) {
    let (mut chunks, mut are_all) = (HashSet::new(), true);
    for commit in commits {
        are_all &= known_chunks(cache, commit, &mut |chunk, _| {
            chunks.insert(*chunk);
        });
    }
    (chunks, are_all)
}
