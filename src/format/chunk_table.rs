//! A block's chunk table: where each chunk's bytes are.
//!
//! Enters: the bytes of a table whose hash was checked, the object that holds it, and the image's geometry. Leaves: a [`ChunkTable`].
//! Invariant: every entry lies inside an object's chunk area, names an object the table knows, and has a length its codec allows.

use super::{BlockSize, ChunkId, ChunkSize, FormatError, ObjectId, TableId};
use crate::units::ByteOffset;

const WHAT: &str = TableId::WHAT;
const MAGIC: &[u8; 4] = b"HCXT";
const VERSION: u16 = 1;
const HEADER_BYTES: usize = 16;
const OBJECT_BYTES: usize = 32;
const ENTRY_BYTES: usize = 48;

/// The most other objects a table can name.
pub const MAX_OTHER_OBJECTS: usize = 65_534;
/// The most chunks a block can have.
pub const MAX_CHUNKS: usize = 1 << (BlockSize::MAX_LOG2 - ChunkSize::MIN_LOG2);
/// The longest table, in bytes.
pub const MAX_TABLE_BYTES: usize = HEADER_BYTES + MAX_OTHER_OBJECTS * OBJECT_BYTES + MAX_CHUNKS * ENTRY_BYTES;

/// How a chunk is stored.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Codec {
    /// As it is.
    Raw,
    /// One zstd frame.
    Zstd,
}

/// Where one chunk is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ChunkEntry {
    /// The chunk's id.
    pub id: ChunkId,
    /// First byte of the stored chunk in its object.
    pub offset: u32,
    /// Bytes stored.
    pub stored_len: u32,
    /// Number of the chunk in its block.
    pub index: u16,
    /// 0 for the object that holds the table, k for other object k - 1.
    pub object: u16,
    /// How it is stored.
    pub codec: Codec,
}

/// Where one chunk is, without the table it was found in: all that is needed to fetch and verify it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct ChunkLocation {
    /// The chunk's id.
    pub id: ChunkId,
    /// The base object that holds it.
    pub object: ObjectId,
    /// First byte of the stored chunk there.
    pub offset: ByteOffset,
    /// Bytes stored.
    pub stored_len: u32,
    /// How it is stored.
    pub codec: Codec,
}

/// The chunks of one block.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ChunkTable {
    holder: ObjectId,
    others: Vec<ObjectId>,
    entries: Vec<ChunkEntry>,
}

impl ChunkTable {
    /// Reads a table that `holder` holds, of an image with this geometry.
    pub fn decode(
        bytes: &[u8],
        holder: ObjectId,
        block_size: BlockSize,
        chunk_size: ChunkSize,
    ) -> Result<ChunkTable, FormatError> {
        let length = |expected: usize| FormatError::Length {
            what: WHAT,
            expected: expected as u64,
            actual: bytes.len() as u64,
        };
        let header: &[u8; HEADER_BYTES] = bytes.first_chunk().ok_or_else(|| length(HEADER_BYTES))?;
        if !header.starts_with(MAGIC) {
            return Err(FormatError::Magic { what: WHAT });
        }
        FormatError::check_version(WHAT, u16::from_le_bytes([header[4], header[5]]), VERSION)?;
        if header[6] != chunk_size.log2() {
            return Err(bad("log2 of chunk-size", header[6]));
        }
        if header[7] != block_size.log2() {
            return Err(bad("log2 of block-size", header[7]));
        }
        let count = usize::from(u16::from_le_bytes([header[8], header[9]]));
        let others = usize::from(u16::from_le_bytes([header[10], header[11]]));
        if count > block_size.chunks(chunk_size) as usize {
            return Err(bad("entries", count));
        }
        if others > MAX_OTHER_OBJECTS {
            return Err(bad("other objects", others));
        }
        if header[12..] != [0; 4] {
            return Err(bad("reserved", 1));
        }
        let expected = HEADER_BYTES + others * OBJECT_BYTES + count * ENTRY_BYTES;
        if bytes.len() != expected {
            return Err(length(expected));
        }
        let (ids, entries) = bytes[HEADER_BYTES..].split_at(others * OBJECT_BYTES);
        let others: Vec<ObjectId> =
            ids.as_chunks::<OBJECT_BYTES>().0.iter().map(|id| ObjectId(*id)).collect();
        let mut last = None;
        let entries = entries.as_chunks::<ENTRY_BYTES>().0.iter().map(|bytes| {
            let entry = decode_entry(bytes, block_size, chunk_size, others.len())?;
            if last.is_some_and(|last| entry.index <= last) {
                return Err(bad("index", entry.index));
            }
            last = Some(entry.index);
            Ok(entry)
        });
        let entries = entries.collect::<Result<Vec<_>, FormatError>>()?;
        Ok(ChunkTable { holder, others, entries })
    }

    /// The entry of a chunk of the block; `None` where the chunk is zeros.
    #[inline]
    pub fn entry(&self, index: u32) -> Option<&ChunkEntry> {
        // A block with every chunk present, the common case on data, needs no search.
        if let Some(entry) = self.entries.get(index as usize)
            && u32::from(entry.index) == index
        {
            return Some(entry);
        }
        let at = self.entries.binary_search_by_key(&index, |entry| u32::from(entry.index)).ok()?;
        self.entries.get(at)
    }

    /// Where the chunk of an entry of this table is.
    #[inline]
    pub fn location(&self, entry: &ChunkEntry) -> ChunkLocation {
        let object = match entry.object {
            0 => self.holder,
            k => self.others[usize::from(k) - 1],
        };
        ChunkLocation {
            id: entry.id,
            object,
            offset: ByteOffset(entry.offset.into()),
            stored_len: entry.stored_len,
            codec: entry.codec,
        }
    }

    /// The entries, by ascending index.
    pub fn entries(&self) -> &[ChunkEntry] {
        &self.entries
    }

    /// The object that holds this table, then every other one it names.
    pub fn objects(&self) -> impl Iterator<Item = ObjectId> + '_ {
        std::iter::once(self.holder).chain(self.others.iter().copied())
    }

    /// Bytes this takes in memory, about.
    pub fn memory(&self) -> usize {
        size_of::<ChunkTable>()
            + self.others.len() * OBJECT_BYTES
            + self.entries.len() * size_of::<ChunkEntry>()
    }
}

/// The bytes of a table: `entries` ascend, each names 0 or one of `others`.
pub fn encode_table(
    block_size: BlockSize,
    chunk_size: ChunkSize,
    others: &[ObjectId],
    entries: &[ChunkEntry],
) -> Vec<u8> {
    debug_assert!(others.len() <= MAX_OTHER_OBJECTS && entries.len() <= MAX_CHUNKS);
    let mut out =
        Vec::with_capacity(HEADER_BYTES + others.len() * OBJECT_BYTES + entries.len() * ENTRY_BYTES);
    out.extend_from_slice(MAGIC);
    out.extend_from_slice(&VERSION.to_le_bytes());
    out.extend_from_slice(&[chunk_size.log2(), block_size.log2()]);
    out.extend_from_slice(&(entries.len() as u16).to_le_bytes());
    out.extend_from_slice(&(others.len() as u16).to_le_bytes());
    out.extend_from_slice(&[0; 4]);
    for other in others {
        out.extend_from_slice(other.as_bytes());
    }
    for entry in entries {
        out.extend_from_slice(entry.id.as_bytes());
        out.extend_from_slice(&entry.offset.to_le_bytes());
        out.extend_from_slice(&entry.stored_len.to_le_bytes());
        out.extend_from_slice(&entry.index.to_le_bytes());
        out.extend_from_slice(&entry.object.to_le_bytes());
        out.extend_from_slice(&[matches!(entry.codec, Codec::Zstd).into(), 0, 0, 0]);
    }
    out
}

fn bad(field: &'static str, value: impl ToString) -> FormatError {
    FormatError::Field { what: WHAT, field, value: value.to_string() }
}

fn decode_entry(
    bytes: &[u8; ENTRY_BYTES],
    block_size: BlockSize,
    chunk_size: ChunkSize,
    others: usize,
) -> Result<ChunkEntry, FormatError> {
    let [id @ .., a, b, c, d, e, f, g, h, i, j, k, l, codec, zero1, zero2, zero3] = *bytes;
    let entry = ChunkEntry {
        id: ChunkId(id),
        offset: u32::from_le_bytes([a, b, c, d]),
        stored_len: u32::from_le_bytes([e, f, g, h]),
        index: u16::from_le_bytes([i, j]),
        object: u16::from_le_bytes([k, l]),
        codec: match codec {
            0 => Codec::Raw,
            1 => Codec::Zstd,
            _ => return Err(bad("codec", codec)),
        },
    };
    let full = chunk_size.len() as u32;
    let length_ok = match entry.codec {
        Codec::Raw => entry.stored_len == full,
        Codec::Zstd => (1..=full).contains(&entry.stored_len),
    };
    if !length_ok {
        return Err(bad("stored length", entry.stored_len));
    }
    if (entry.offset as usize) < super::base_object::HEADER_BYTES
        || entry.offset.checked_add(entry.stored_len).is_none()
    {
        return Err(bad("offset", entry.offset));
    }
    if u32::from(entry.index) >= block_size.chunks(chunk_size) {
        return Err(bad("index", entry.index));
    }
    if usize::from(entry.object) > others {
        return Err(bad("object", entry.object));
    }
    if [zero1, zero2, zero3] != [0; 3] {
        return Err(bad("reserved", 1));
    }
    Ok(entry)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const BLOCK: BlockSize = BlockSize::DEFAULT;
    const CHUNK: ChunkSize = ChunkSize::DEFAULT;
    const HOLDER: ObjectId = ObjectId([9; 32]);

    fn entry(index: u16, object: u16) -> ChunkEntry {
        ChunkEntry {
            id: ChunkId([index as u8; 32]),
            offset: 16 + u32::from(index) * 100,
            stored_len: 100,
            index,
            object,
            codec: Codec::Zstd,
        }
    }

    fn sample() -> Vec<u8> {
        encode_table(
            BLOCK,
            CHUNK,
            &[ObjectId([1; 32]), ObjectId([2; 32])],
            &[entry(0, 0), entry(5, 2), entry(511, 1)],
        )
    }

    fn decode(bytes: &[u8]) -> Result<ChunkTable, FormatError> {
        ChunkTable::decode(bytes, HOLDER, BLOCK, CHUNK)
    }

    #[test]
    fn a_table_survives_its_bytes_and_finds_its_entries() {
        let table = decode(&sample()).unwrap();
        assert_eq!(table.entry(5), Some(&entry(5, 2)));
        assert_eq!(table.entry(511), Some(&entry(511, 1)));
        assert_eq!(table.entry(0), Some(&entry(0, 0)));
        for absent in [1, 4, 6, 510, 512, u32::MAX] {
            assert_eq!(table.entry(absent), None, "{absent}");
        }
        let objects: Vec<ObjectId> =
            table.entries().iter().map(|entry| table.location(entry).object).collect();
        assert_eq!(objects, [HOLDER, ObjectId([2; 32]), ObjectId([1; 32])]);
        assert_eq!(encode_table(BLOCK, CHUNK, &table.others, table.entries()), sample());
    }

    #[test]
    fn entries_that_point_outside_are_refused() {
        for bad in [
            ChunkEntry { object: 3, ..entry(1, 0) },
            ChunkEntry { index: 512, ..entry(1, 0) },
            ChunkEntry { offset: 15, ..entry(1, 0) },
            ChunkEntry { offset: u32::MAX, ..entry(1, 0) },
            ChunkEntry { stored_len: 0, ..entry(1, 0) },
            ChunkEntry { stored_len: CHUNK.len() as u32 + 1, ..entry(1, 0) },
            ChunkEntry { codec: Codec::Raw, ..entry(1, 0) },
        ] {
            let others = [ObjectId([1; 32]), ObjectId([2; 32])];
            assert!(decode(&encode_table(BLOCK, CHUNK, &others, &[bad])).is_err(), "{bad:?}");
        }
        assert!(decode(&encode_table(BLOCK, CHUNK, &[], &[entry(3, 0), entry(3, 0)])).is_err());
    }

    #[test]
    fn a_table_of_another_geometry_is_refused() {
        let other = ChunkSize::from_log2(18).unwrap();
        assert!(ChunkTable::decode(&sample(), HOLDER, BLOCK, other).is_err());
    }

    proptest! {
        #[test]
        fn no_bytes_panic_and_what_reads_writes_the_same(
            patch in proptest::collection::vec(any::<u8>(), 0..60), at in 0usize..240,
        ) {
            let mut bytes = sample();
            let at = at.min(bytes.len());
            let end = (at + patch.len()).min(bytes.len());
            bytes[at..end].copy_from_slice(&patch[..end - at]);
            if let Ok(table) = decode(&bytes) {
                prop_assert_eq!(encode_table(BLOCK, CHUNK, &table.others, table.entries()), bytes);
            }
            let _ = decode(&patch);
        }
    }
}
