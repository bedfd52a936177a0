//! What the cache holds and no volume needs: what the last volume of an image leaves behind.

use std::collections::{BTreeMap, HashSet};

use super::pin::is_pinned;
use super::{StateDir, VolumeName, VolumeRecord};
use crate::cache::Cache;
use crate::format::ChunkId;
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
        let are_all = known_chunks(cache, commit, &mut |chunk| {
            unused.remove(chunk);
        });
        if pinned && !are_all {
            tracing::warn!(%commit, "can't tell what a pinned volume needs: nothing is freed");
            return HashSet::new();
        }
    }
    unused
}
