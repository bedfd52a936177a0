//! Nodes of a block map: 256 slots each, absent slots are zeros.
//!
//! Enters: the bytes of a node whose id was checked, and the level it must have. Leaves: a [`MapNode`] with its entries by ascending slot.
//! Invariant: a node has at least one entry, so a map has one shape and one root id.

use super::{FormatError, NodeId, ObjectId, TableId};
use crate::units::{BlockIndex, ByteLen, ByteOffset};

const WHAT: &str = NodeId::WHAT;
const MAGIC: &[u8; 4] = b"HCXM";
const VERSION: u16 = 1;
const HEADER_BYTES: usize = 16;
const LEAF_ENTRY_BYTES: usize = 80;
const INNER_ENTRY_BYTES: usize = 40;

/// log2 of the slots of a node.
pub const SLOTS_LOG2: u8 = 8;
/// Slots of a node.
pub const SLOTS: usize = 1 << SLOTS_LOG2;
/// The highest level a map can have: 2^50 bytes in blocks of 1 MiB are 256^4 / 4 blocks.
pub const MAX_LEVEL: u8 = 3;
/// The longest node, in bytes.
pub const MAX_NODE_BYTES: usize = HEADER_BYTES + SLOTS * LEAF_ENTRY_BYTES;

/// The level of the root of a map of `blocks` blocks.
pub const fn root_level(blocks: u64) -> u8 {
    let mut level = 0;
    while level < MAX_LEVEL && blocks > 1 << (SLOTS_LOG2 * (level + 1)) {
        level += 1;
    }
    level
}

/// The slot of `block` in the node of `level` on its path.
pub const fn slot_of(block: BlockIndex, level: u8) -> u8 {
    (block.0 >> (SLOTS_LOG2 * level)) as u8
}

/// The first block that the node of `level` on the path to `block` covers.
pub const fn node_start(block: BlockIndex, level: u8) -> BlockIndex {
    let bits = SLOTS_LOG2 * (level + 1);
    BlockIndex(block.0 >> bits << bits)
}

/// Where a block's chunk table is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct TableRef {
    /// The base object that holds it.
    pub object: ObjectId,
    /// Its first byte there.
    pub offset: ByteOffset,
    /// Its length.
    pub len: ByteLen,
    /// Its hash.
    pub id: TableId,
}

/// A node of a block map.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum MapNode {
    /// Level 0: names blocks.
    Leaf(Vec<(u8, TableRef)>),
    /// Level 1 and up: names nodes of the level below.
    Inner {
        /// The node's own level.
        level: u8,
        /// Its entries, by ascending slot.
        entries: Vec<(u8, NodeId)>,
    },
}

impl MapNode {
    /// The node's level.
    pub fn level(&self) -> u8 {
        match self {
            MapNode::Leaf(_) => 0,
            MapNode::Inner { level, .. } => *level,
        }
    }

    /// The object's bytes. The node has at least one entry, its slots ascend.
    pub fn encode(&self) -> Vec<u8> {
        let (level, count) = match self {
            MapNode::Leaf(entries) => (0, entries.len()),
            MapNode::Inner { level, entries } => (*level, entries.len()),
        };
        debug_assert!((1..=SLOTS).contains(&count));
        let mut out = Vec::with_capacity(HEADER_BYTES + count * LEAF_ENTRY_BYTES);
        out.extend_from_slice(MAGIC);
        out.extend_from_slice(&VERSION.to_le_bytes());
        out.extend_from_slice(&[level, SLOTS_LOG2]);
        out.extend_from_slice(&(count as u16).to_le_bytes());
        out.extend_from_slice(&[0; 6]);
        match self {
            MapNode::Leaf(entries) => {
                for (slot, table) in entries {
                    out.extend_from_slice(&u16::from(*slot).to_le_bytes());
                    out.extend_from_slice(&[0; 2]);
                    out.extend_from_slice(&(table.len.0 as u32).to_le_bytes());
                    out.extend_from_slice(&table.offset.0.to_le_bytes());
                    out.extend_from_slice(table.object.as_bytes());
                    out.extend_from_slice(table.id.as_bytes());
                }
            }
            MapNode::Inner { entries, .. } => {
                for (slot, node) in entries {
                    out.extend_from_slice(&u16::from(*slot).to_le_bytes());
                    out.extend_from_slice(&[0; 6]);
                    out.extend_from_slice(node.as_bytes());
                }
            }
        }
        out
    }

    /// Reads the bytes of a node that must be of `level`.
    pub fn decode(bytes: &[u8], level: u8) -> Result<MapNode, FormatError> {
        let header: &[u8; HEADER_BYTES] = bytes.first_chunk().ok_or(FormatError::Length {
            what: WHAT,
            expected: HEADER_BYTES as u64,
            actual: bytes.len() as u64,
        })?;
        if !header.starts_with(MAGIC) {
            return Err(FormatError::Magic { what: WHAT });
        }
        FormatError::check_version(WHAT, u16::from_le_bytes([header[4], header[5]]), VERSION)?;
        let bad = |field, value: u64| FormatError::Field { what: WHAT, field, value: value.to_string() };
        if header[6] != level {
            return Err(bad("level", header[6].into()));
        }
        if header[7] != SLOTS_LOG2 {
            return Err(bad("log2 of slots", header[7].into()));
        }
        let count = usize::from(u16::from_le_bytes([header[8], header[9]]));
        if !(1..=SLOTS).contains(&count) {
            return Err(bad("entries", count as u64));
        }
        if header[10..] != [0; 6] {
            return Err(bad("reserved", 1));
        }
        let entry_bytes = if level == 0 { LEAF_ENTRY_BYTES } else { INNER_ENTRY_BYTES };
        let expected = HEADER_BYTES + count * entry_bytes;
        if bytes.len() != expected {
            return Err(FormatError::Length {
                what: WHAT,
                expected: expected as u64,
                actual: bytes.len() as u64,
            });
        }
        let mut last = None;
        let mut slot_in = |entry: &[u8], zeros: &[u8]| {
            let slot = u16::from_le_bytes([entry[0], entry[1]]);
            if last.is_some_and(|last| slot <= last) || usize::from(slot) >= SLOTS {
                return Err(bad("slot", slot.into()));
            }
            if zeros.iter().any(|&byte| byte != 0) {
                return Err(bad("reserved", 1));
            }
            last = Some(slot);
            Ok(slot as u8)
        };
        let body = &bytes[HEADER_BYTES..];
        if level > 0 {
            let (chunks, _) = body.as_chunks::<INNER_ENTRY_BYTES>();
            let entries = chunks.iter().map(|entry| {
                let slot = slot_in(entry, &entry[2..8])?;
                Ok((slot, NodeId(array(&entry[8..]))))
            });
            return Ok(MapNode::Inner { level, entries: entries.collect::<Result<_, FormatError>>()? });
        }
        let (chunks, _) = body.as_chunks::<LEAF_ENTRY_BYTES>();
        let entries = chunks.iter().map(|entry| {
            let slot = slot_in(entry, &entry[2..4])?;
            let table = TableRef {
                len: ByteLen(u32::from_le_bytes(array(&entry[4..])).into()),
                offset: ByteOffset(u64::from_le_bytes(array(&entry[8..]))),
                object: ObjectId(array(&entry[16..])),
                id: TableId(array(&entry[48..])),
            };
            if table.len.0 > super::chunk_table::MAX_TABLE_BYTES as u64 {
                return Err(bad("length of the chunk table", table.len.0));
            }
            // An object is at most 4 GiB.
            if table.offset.0 > u64::from(u32::MAX) {
                return Err(bad("offset of the chunk table", table.offset.0));
            }
            Ok((slot, table))
        });
        Ok(MapNode::Leaf(entries.collect::<Result<_, FormatError>>()?))
    }
}

/// The first `N` bytes of a slice that is known to have as many.
fn array<const N: usize>(bytes: &[u8]) -> [u8; N] {
    *bytes.first_chunk().expect("entries are cut to a fixed length that covers every field")
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn leaf(slots: &[u8]) -> MapNode {
        MapNode::Leaf(
            slots
                .iter()
                .map(|&slot| {
                    let table = TableRef {
                        object: ObjectId([slot; 32]),
                        offset: ByteOffset(16 + u64::from(slot)),
                        len: ByteLen(64),
                        id: TableId([!slot; 32]),
                    };
                    (slot, table)
                })
                .collect(),
        )
    }

    #[test]
    fn nodes_survive_their_bytes() {
        for slots in [&[0][..], &[255], &[3, 4, 200]] {
            assert_eq!(MapNode::decode(&leaf(slots).encode(), 0), Ok(leaf(slots)));
            let entries = slots.iter().map(|&slot| (slot, NodeId([slot; 32]))).collect();
            let inner = MapNode::Inner { level: 2, entries };
            assert_eq!(MapNode::decode(&inner.encode(), 2), Ok(inner));
        }
        let full: Vec<u8> = (0..=255).collect();
        assert_eq!(leaf(&full).encode().len(), MAX_NODE_BYTES);
        assert_eq!(MapNode::decode(&leaf(&full).encode(), 0), Ok(leaf(&full)));
    }

    #[test]
    fn a_node_of_another_level_or_with_slots_out_of_order_is_refused() {
        assert!(MapNode::decode(&leaf(&[1]).encode(), 1).is_err());
        assert!(MapNode::decode(&leaf(&[4, 3]).encode(), 0).is_err());
        assert!(MapNode::decode(&leaf(&[4, 4]).encode(), 0).is_err());
        let mut future = leaf(&[1]).encode();
        future[4] = 3;
        let error = MapNode::decode(&future, 0).unwrap_err();
        assert_eq!(error.to_string(), "block map node version 3, this build reads 1..=1");
    }

    #[test]
    fn the_root_level_is_the_smallest_that_spans_the_device() {
        for (blocks, level) in [
            (0, 0),
            (1, 0),
            (256, 0),
            (257, 1),
            (65_536, 1),
            (65_537, 2),
            (1 << 24, 2),
            ((1 << 24) + 1, 3),
            (1 << 30, 3),
        ] {
            assert_eq!(root_level(blocks), level, "{blocks} blocks");
        }
    }

    #[test]
    fn slots_and_starts_agree_on_the_path() {
        let block = BlockIndex(0x01_02_03);
        assert_eq!([slot_of(block, 0), slot_of(block, 1), slot_of(block, 2)], [3, 2, 1]);
        assert_eq!(node_start(block, 0), BlockIndex(0x01_02_00));
        assert_eq!(node_start(block, 1), BlockIndex(0x01_00_00));
    }

    proptest! {
        #[test]
        fn no_bytes_panic_and_what_reads_writes_the_same(
            patch in proptest::collection::vec(any::<u8>(), 0..60), at in 0usize..200, level in 0u8..3,
        ) {
            let mut bytes = leaf(&[1, 9]).encode();
            let at = at.min(bytes.len());
            let end = (at + patch.len()).min(bytes.len());
            bytes[at..end].copy_from_slice(&patch[..end - at]);
            if let Ok(node) = MapNode::decode(&bytes, level) {
                prop_assert_eq!(node.encode(), bytes);
            }
            let _ = MapNode::decode(&patch, level);
        }
    }
}
