//! A block map from a parent's map and the blocks that changed, by ascending block.
//!
//! Enters: blocks with their new chunk table, or without one where they became zeros. Leaves: the root of the new map, its new nodes
//! written, leaves first. Invariants: a node is written when its last change is known, and only if it differs from the parent's: one changed
//! block writes one node per level. Memory is one open node per level.

use std::collections::BTreeMap;

use super::meta::MetaReader;
use super::version::read_node;
use super::{ImageName, RepoError, keys};
use crate::format::map_node::{MapNode, TableRef, node_start, root_level, slot_of};
use crate::format::{MapRoot, NodeId};
use crate::units::BlockIndex;

/// The map that a new one stands on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MapBase {
    /// Its root.
    pub root: MapRoot,
    /// How many blocks its device has.
    pub blocks: u64,
}

impl MapBase {
    /// The map of a device of zeros.
    pub const ZERO: MapBase = MapBase { root: MapRoot::Zero, blocks: 0 };
}

#[derive(Debug)]
enum Entries {
    Leaf(BTreeMap<u8, TableRef>),
    Inner(BTreeMap<u8, NodeId>),
}

#[derive(Debug)]
struct OpenNode {
    start: BlockIndex,
    /// The parent version's node at this place.
    base: Option<NodeId>,
    entries: Entries,
}

/// Builds a map.
#[derive(Debug)]
pub struct MapBuilder {
    meta: MetaReader,
    image: ImageName,
    blocks: u64,
    /// The nodes on the path to the last block, by level. Above an open node all are open.
    open: Vec<Option<OpenNode>>,
    root: Option<NodeId>,
    last: Option<BlockIndex>,
    written: u64,
}

impl MapBuilder {
    /// Starts the map of a device of `blocks` blocks, which is `base` but for what is set.
    pub fn new(
        repo: &super::Repository,
        image: &ImageName,
        cache: &std::sync::Arc<dyn super::MetaCache>,
        base: MapBase,
        blocks: u64,
    ) -> Result<MapBuilder, RepoError> {
        let (top, base_top) = (root_level(blocks), root_level(base.blocks));
        let mut builder = MapBuilder {
            meta: repo.meta(cache),
            image: image.clone(),
            blocks,
            open: (0..=top).map(|_| None).collect(),
            root: None,
            last: None,
            written: 0,
        };
        if let MapRoot::Node(root) = base.root {
            // The old nodes name blocks past the new end, which nobody would set to zeros.
            if base.blocks > blocks {
                return Err(RepoError::MapShrinks { blocks, base: base.blocks });
            }
            builder.root = Some(root);
            if base_top < top {
                // The device has grown by levels: the old root hangs below new nodes on the path to block 0, which are open from the
                // start so that they are written even if nothing else below them is set.
                for level in base_top + 1..=top {
                    let entries =
                        if level == base_top + 1 { BTreeMap::from([(0, root)]) } else { BTreeMap::new() };
                    let node =
                        OpenNode { start: BlockIndex(0), base: None, entries: Entries::Inner(entries) };
                    builder.open[usize::from(level)] = Some(node);
                }
                builder.root = None;
            }
        }
        Ok(builder)
    }

    fn top(&self) -> u8 {
        root_level(self.blocks)
    }

    /// Sets a block's table, `None` for zeros. Blocks come in ascending order, each once.
    ///
    /// The object that holds the table is durable already: a node that names it may be written at once.
    pub async fn set(&mut self, block: BlockIndex, table: Option<TableRef>) -> Result<(), RepoError> {
        if let Some(last) = self.last
            && block <= last
        {
            return Err(RepoError::BlockOrder { block, last });
        }
        if block.0 >= self.blocks {
            return Err(RepoError::NoBlock { image: self.image.to_string(), block, blocks: self.blocks });
        }
        self.last = Some(block);
        for level in (0..=self.top()).rev() {
            let start = node_start(block, level);
            if self.open[usize::from(level)].as_ref().is_some_and(|node| node.start == start) {
                continue;
            }
            // What is open here and below lies left of the block: it will not change any more.
            self.close_up_to(level).await?;
            self.open_node(level, block).await?;
        }
        if let Some(OpenNode { entries: Entries::Leaf(entries), .. }) = &mut self.open[0] {
            let slot = slot_of(block, 0);
            match table {
                Some(table) => entries.insert(slot, table),
                None => entries.remove(&slot),
            };
        }
        Ok(())
    }

    /// Opens the node of `level` on the path to `block`, with the entries it has in the base.
    async fn open_node(&mut self, level: u8, block: BlockIndex) -> Result<(), RepoError> {
        let above = self.open.get(usize::from(level) + 1).and_then(Option::as_ref);
        let base = match above {
            Some(OpenNode { entries: Entries::Inner(entries), .. }) => {
                entries.get(&slot_of(block, level + 1)).copied()
            }
            _ => self.root,
        };
        let entries = match base {
            Some(id) => match read_node(&self.meta, &self.image, id, level).await? {
                MapNode::Leaf(entries) => Entries::Leaf(entries.into_iter().collect()),
                MapNode::Inner { entries, .. } => Entries::Inner(entries.into_iter().collect()),
            },
            None if level == 0 => Entries::Leaf(BTreeMap::new()),
            None => Entries::Inner(BTreeMap::new()),
        };
        self.open[usize::from(level)] = Some(OpenNode { start: node_start(block, level), base, entries });
        Ok(())
    }

    /// Closes what is open at `level` and below, leaves first.
    async fn close_up_to(&mut self, level: u8) -> Result<(), RepoError> {
        for level in 0..=level {
            if let Some(node) = self.open[usize::from(level)].take() {
                self.close_node(level, node).await?;
            }
        }
        Ok(())
    }

    async fn close_node(&mut self, level: u8, node: OpenNode) -> Result<(), RepoError> {
        let OpenNode { start, base, entries } = node;
        let map_node = match entries {
            Entries::Leaf(entries) if !entries.is_empty() => {
                Some(MapNode::Leaf(entries.into_iter().collect()))
            }
            Entries::Inner(entries) if !entries.is_empty() => {
                Some(MapNode::Inner { level, entries: entries.into_iter().collect() })
            }
            _ => None,
        };
        let id = match map_node {
            None => None,
            Some(map_node) => {
                let bytes = map_node.encode();
                let id = NodeId::of(&bytes);
                if base != Some(id) {
                    self.meta.store.put_new(&keys::node(&self.image, &id), bytes.into()).await?;
                    self.written += 1;
                }
                Some(id)
            }
        };
        match self.open.get_mut(usize::from(level) + 1).and_then(Option::as_mut) {
            Some(OpenNode { entries: Entries::Inner(entries), .. }) => {
                let slot = slot_of(start, level + 1);
                match id {
                    Some(id) => entries.insert(slot, id),
                    None => entries.remove(&slot),
                };
            }
            _ => self.root = id,
        }
        Ok(())
    }

    /// Writes what is still open; tells the root and how many nodes were written in all.
    pub async fn finish(mut self) -> Result<(MapRoot, u64), RepoError> {
        self.close_up_to(self.top()).await?;
        Ok((self.root.map_or(MapRoot::Zero, MapRoot::Node), self.written))
    }
}
