//! Where two commits differ, by their maps and chunk tables: no chunk is read.
//!
//! Enters: two versions of one geometry. Leaves: ranges of the device, in whole chunks. Invariant: outside of them both read the same. Subtrees with the same id are not looked into, so the cost
//! is by what differs. What is kept is bounded by [`MAX_RANGES`].

use crate::format::map_node::{MapNode, SLOTS_LOG2, TableRef, root_level};
use crate::format::{ChunkEntry, ChunkTable, MapRoot, NodeId};
use crate::units::{BlockIndex, ByteOffset, ByteRange};

use super::{RepoError, Version};

/// The most ranges that are told apart; further ones are joined with what is between them.
const MAX_RANGES: usize = 4 << 20;

/// What a slot holds.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Slot {
    Table(TableRef),
    Node(NodeId),
}

/// Two parts of the maps that are of the same blocks; `None` is all zeros.
struct Pair {
    start: u64,
    old: Option<(Slot, u8)>,
    new: Option<(Slot, u8)>,
}

/// The ranges in which `old` and `new` differ, ascending, neighbours joined; chunks are their unit. Where one device is longer, its further part counts as far as it is no hole. Two
/// commits of different block or chunk sizes differ everywhere.
pub async fn differing(old: &Version, new: &Version) -> Result<Vec<ByteRange>, RepoError> {
    let (old_commit, new_commit) = (old.commit(), new.commit());
    let end = ByteOffset(old_commit.size.0.max(new_commit.size.0));
    if (old_commit.block_size, old_commit.chunk_size) != (new_commit.block_size, new_commit.chunk_size) {
        return Ok(vec![ByteRange { start: ByteOffset(0), end }]);
    }
    let top = |version: &Version| match version.commit().map {
        MapRoot::Zero => None,
        // The level of a table is 0, a node's one more than its own.
        MapRoot::Node(root) => Some((Slot::Node(root), root_level(version.commit().blocks()) + 1)),
    };
    let mut ranges: Vec<ByteRange> = Vec::new();
    // The first is at the end.
    let mut open = vec![Pair { start: 0, old: top(old), new: top(new) }];
    while let Some(pair) = open.pop() {
        if pair.old == pair.new {
            continue;
        }
        let level = |slot: Option<(Slot, u8)>| slot.map_or(0, |(_, level)| level);
        let height = level(pair.old).max(level(pair.new));
        if height == 0 {
            let tables = (table(old, &pair, pair.old).await?, table(new, &pair, pair.new).await?);
            let block = (old_commit.block_size.len().0, old_commit.chunk_size.len() as u64);
            compare_tables(tables.0.as_deref(), tables.1.as_deref(), pair.start, block, end, &mut ranges);
            continue;
        }
        let below =
            (children(old, &pair, pair.old, height).await?, children(new, &pair, pair.new, height).await?);
        open.extend(merged(below.0, below.1).into_iter().rev());
    }
    Ok(ranges)
}

type Children = Vec<(u64, (Slot, u8))>;

/// What is below one side of a pair, by first block. A map that is less high is the first child.
async fn children(
    version: &Version,
    pair: &Pair,
    slot: Option<(Slot, u8)>,
    height: u8,
) -> Result<Children, RepoError> {
    let (id, level) = match slot {
        None => return Ok(Vec::new()),
        Some((Slot::Node(id), level)) if level == height => (id, level),
        Some(lower) => return Ok(vec![(pair.start, lower)]),
    };
    let node = version.node(id, level - 1).await?;
    let start = |slot: u8| pair.start + (u64::from(slot) << (SLOTS_LOG2 * (level - 1)));
    Ok(match &*node {
        MapNode::Leaf(entries) => {
            entries.iter().map(|(slot, table)| (start(*slot), (Slot::Table(*table), 0))).collect()
        }
        MapNode::Inner { entries, .. } => {
            entries.iter().map(|(slot, node)| (start(*slot), (Slot::Node(*node), level - 1))).collect()
        }
    })
}

/// The children of both sides as pairs.
fn merged(old: Children, new: Children) -> Vec<Pair> {
    let mut pairs = Vec::with_capacity(old.len().max(new.len()));
    let (mut old, mut new) = (old.into_iter().peekable(), new.into_iter().peekable());
    loop {
        let start = match (old.peek(), new.peek()) {
            (Some((one, _)), Some((other, _))) => *one.min(other),
            (Some((only, _)), None) | (None, Some((only, _))) => *only,
            (None, None) => return pairs,
        };
        let old = old.next_if(|(at, _)| *at == start).map(|(_, slot)| slot);
        let new = new.next_if(|(at, _)| *at == start).map(|(_, slot)| slot);
        pairs.push(Pair { start, old, new });
    }
}

async fn table(
    version: &Version,
    pair: &Pair,
    slot: Option<(Slot, u8)>,
) -> Result<Option<std::sync::Arc<ChunkTable>>, RepoError> {
    match slot {
        Some(_) => version.table(BlockIndex(pair.start)).await,
        None => Ok(None),
    }
}

fn compare_tables(
    old: Option<&ChunkTable>,
    new: Option<&ChunkTable>,
    block: u64,
    (block_len, chunk_len): (u64, u64),
    end: ByteOffset,
    ranges: &mut Vec<ByteRange>,
) {
    let entries = |table: Option<&'_ ChunkTable>| -> Vec<ChunkEntry> {
        table.map_or_else(Vec::new, |table| table.entries().to_vec())
    };
    let (old, new) = (entries(old), entries(new));
    let (mut old, mut new) = (old.iter().peekable(), new.iter().peekable());
    loop {
        let index = match (old.peek(), new.peek()) {
            (Some(one), Some(other)) => one.index.min(other.index),
            (Some(only), None) | (None, Some(only)) => only.index,
            (None, None) => return,
        };
        let old = old.next_if(|entry| entry.index == index).map(|entry| entry.id);
        let new = new.next_if(|entry| entry.index == index).map(|entry| entry.id);
        if old == new {
            continue;
        }
        let start = block.saturating_mul(block_len).saturating_add(u64::from(index) * chunk_len);
        let range_end = start.saturating_add(chunk_len).min(end.0);
        if range_end <= start {
            // Past the device: a map may say so, nobody reads there.
            return;
        }
        let range = ByteRange { start: ByteOffset(start), end: ByteOffset(range_end) };
        let is_full = ranges.len() >= MAX_RANGES;
        match ranges.last_mut() {
            Some(last) if last.end == range.start || is_full => last.end = range.end,
            _ => ranges.push(range),
        }
    }
}
