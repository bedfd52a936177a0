//! What can be known of a commit on this host alone, with no store to ask.
//!
//! Enters: a commit's id, and where metadata is remembered. Leaves: the chunks of every table that is remembered, block by block, and whether these are all. What is not here is
//! passed over: no chunk below it can be read without asking the store first.

use super::MetaCache;
use crate::format::map_node::{MapNode, root_level};
use crate::format::{ChunkId, ChunkTable, Commit, CommitId, MapRoot, NodeId};

/// Calls `visit` with each chunk of the commit that can be found without its repository, and its length; whether that is every one. Blocks on files.
pub fn known_chunks(meta: &dyn MetaCache, commit: CommitId, visit: &mut dyn FnMut(&ChunkId, u64)) -> bool {
    let read = meta.get(&commit.0).filter(|bytes| commit.check(bytes).is_ok());
    let Some(commit) = read.and_then(|bytes| Commit::decode(&bytes).ok()) else { return false };
    let MapRoot::Node(root) = commit.map else { return true };
    let chunk_len = commit.chunk_size.len() as u64;
    let mut are_all = true;
    // As deep as the map is, times what a node has.
    let mut nodes: Vec<(NodeId, u8)> = vec![(root, root_level(commit.blocks()))];
    while let Some((id, level)) = nodes.pop() {
        let read = meta.get(&id.0).filter(|bytes| id.check(bytes).is_ok());
        match read.and_then(|bytes| MapNode::decode(&bytes, level).ok()) {
            Some(MapNode::Inner { level, entries }) => {
                nodes.extend(entries.into_iter().map(|(_, below)| (below, level - 1)));
            }
            Some(MapNode::Leaf(entries)) => {
                for (_, table) in entries {
                    let read = meta.get(&table.id.0).filter(|bytes| table.id.check(bytes).is_ok());
                    let decode = |bytes: bytes::Bytes| {
                        ChunkTable::decode(&bytes, table.object, commit.block_size, commit.chunk_size).ok()
                    };
                    match read.and_then(decode) {
                        Some(table) => table.entries().iter().for_each(|entry| visit(&entry.id, chunk_len)),
                        None => are_all = false,
                    }
                }
            }
            None => are_all = false,
        }
    }
    are_all
}
