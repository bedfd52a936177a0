//! The bytes of a cache slab that are not chunks: its header and one record per slot (FORMAT.md, "Cache").
//!
//! Enters: bytes of a slab file, not trusted. Leaves: its geometry, and which chunk each slot says it holds.
//! Invariant: a record that decodes is only a hint where a chunk may be; nobody believes it before hashing the slot.

use super::{ChunkId, ChunkSize, FormatError};

/// Length of the header's part that is checked; the rest up to [`RECORDS_AT`] is zero.
pub const HEADER_LEN: usize = 12;
/// Where the records begin.
pub const RECORDS_AT: u64 = 4096;
/// Length of a record.
pub const RECORD_LEN: usize = 64;
/// The slots begin at a multiple of this: the largest page size Linux uses.
pub const SLOTS_ALIGN: u64 = 65_536;
/// Smallest log2 of the bytes of all slots of a slab.
pub const MIN_SLAB_LOG2: u8 = 22;
/// Largest log2 of the bytes of all slots of a slab.
pub const MAX_SLAB_LOG2: u8 = 32;

const WHAT: &str = "cache slab";
const SLAB_MAGIC: [u8; 4] = *b"HCXS";
const RECORD_MAGIC: [u8; 4] = *b"HCXR";
const VERSION: u16 = 1;

/// What a slab's header says: how big its slots are, and how many there are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SlabGeometry {
    chunk: ChunkSize,
    slab_log2: u8,
}

impl SlabGeometry {
    /// A slab of 2^`slab_log2` bytes in slots of `chunk` bytes, where that is allowed.
    pub const fn new(chunk: ChunkSize, slab_log2: u8) -> Option<SlabGeometry> {
        if slab_log2 < MIN_SLAB_LOG2 || slab_log2 > MAX_SLAB_LOG2 {
            None
        } else {
            Some(SlabGeometry { chunk, slab_log2 })
        }
    }

    /// The size of every slot.
    pub const fn chunk(self) -> ChunkSize {
        self.chunk
    }

    /// How many slots there are: 4 to 65,536.
    pub const fn slots(self) -> u32 {
        1 << (self.slab_log2 - self.chunk.log2())
    }

    /// Where slot 0 begins.
    pub const fn slots_at(self) -> u64 {
        (RECORDS_AT + self.slots() as u64 * RECORD_LEN as u64).next_multiple_of(SLOTS_ALIGN)
    }

    /// Where the record of `slot` is.
    pub const fn record_at(self, slot: u32) -> u64 {
        RECORDS_AT + slot as u64 * RECORD_LEN as u64
    }

    /// Where the bytes of `slot` are.
    pub const fn slot_at(self, slot: u32) -> u64 {
        self.slots_at() + ((slot as u64) << self.chunk.log2())
    }

    /// The exact length of the file.
    pub const fn file_len(self) -> u64 {
        self.slots_at() + (1 << self.slab_log2)
    }

    /// The header.
    pub fn encode(self) -> [u8; HEADER_LEN] {
        let mut out = [0; HEADER_LEN];
        out[..4].copy_from_slice(&SLAB_MAGIC);
        out[4..6].copy_from_slice(&VERSION.to_le_bytes());
        out[6] = self.chunk.log2();
        out[7] = self.slab_log2;
        let crc = crc32fast::hash(&out[..8]);
        out[8..].copy_from_slice(&crc.to_le_bytes());
        out
    }

    /// Reads a header.
    pub fn decode(bytes: &[u8; HEADER_LEN]) -> Result<SlabGeometry, FormatError> {
        let (body, crc) = (&bytes[..8], &bytes[8..]);
        if body[..4] != SLAB_MAGIC {
            return Err(FormatError::Magic { what: WHAT });
        }
        if crc32fast::hash(body).to_le_bytes() != crc {
            return Err(FormatError::Checksum { what: WHAT });
        }
        FormatError::check_version(WHAT, u16::from_le_bytes([body[4], body[5]]), VERSION)?;
        let field = |field, value: u8| FormatError::Field { what: WHAT, field, value: value.to_string() };
        let chunk = ChunkSize::from_log2(body[6]).ok_or_else(|| field("chunk size", body[6]))?;
        SlabGeometry::new(chunk, body[7]).ok_or_else(|| field("slab size", body[7]))
    }
}

/// The record of a slot that holds chunk `id`. A free slot's record is zeros.
pub fn encode_record(id: &ChunkId) -> [u8; RECORD_LEN] {
    let mut out = [0; RECORD_LEN];
    out[..4].copy_from_slice(&RECORD_MAGIC);
    out[4..36].copy_from_slice(id.as_bytes());
    let crc = crc32fast::hash(&out[..60]);
    out[60..].copy_from_slice(&crc.to_le_bytes());
    out
}

/// The chunk a record names, or `None`: the slot is free, or the record is damaged, which is the same.
pub fn decode_record(bytes: &[u8; RECORD_LEN]) -> Option<ChunkId> {
    if bytes[..4] != RECORD_MAGIC || crc32fast::hash(&bytes[..60]).to_le_bytes() != bytes[60..] {
        return None;
    }
    let mut id = [0; 32];
    id.copy_from_slice(&bytes[4..36]);
    Some(ChunkId(id))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_header_comes_back_and_every_flipped_bit_is_refused() {
        let geometry = SlabGeometry::new(ChunkSize::DEFAULT, 26).unwrap();
        assert_eq!(geometry.slots(), 512);
        assert_eq!(geometry.slots_at(), 65_536);
        assert_eq!(geometry.file_len(), 65_536 + (64 << 20));
        let bytes = geometry.encode();
        assert_eq!(SlabGeometry::decode(&bytes), Ok(geometry));
        for bit in 0..bytes.len() * 8 {
            let mut bad = bytes;
            bad[bit / 8] ^= 1 << (bit % 8);
            assert!(SlabGeometry::decode(&bad).is_err(), "bit {bit}");
        }
    }

    #[test]
    fn the_bytes_are_those_of_the_format_document() {
        let bytes = SlabGeometry::new(ChunkSize::DEFAULT, 26).unwrap().encode();
        assert_eq!(bytes[..8], *b"HCXS\x01\x00\x11\x1a");
        let record = encode_record(&ChunkId([7; 32]));
        assert_eq!(record[..4], *b"HCXR");
        assert_eq!(record[4..36], [7; 32]);
        assert_eq!(record[36..60], [0; 24]);
        assert_eq!(record[60..], crc32fast::hash(&record[..60]).to_le_bytes());
    }

    #[test]
    fn a_later_version_is_refused_by_number() {
        let mut bytes = SlabGeometry::new(ChunkSize::DEFAULT, 26).unwrap().encode();
        bytes[4] = 2;
        let crc = crc32fast::hash(&bytes[..8]);
        bytes[8..].copy_from_slice(&crc.to_le_bytes());
        let error = SlabGeometry::decode(&bytes).unwrap_err();
        assert_eq!(error.to_string(), "cache slab version 2, this build reads 1..=1");
    }

    #[test]
    fn a_free_zeroed_or_flipped_record_names_no_chunk() {
        let id = ChunkId::of(b"chunk");
        let bytes = encode_record(&id);
        assert_eq!(decode_record(&bytes), Some(id));
        assert_eq!(decode_record(&[0; RECORD_LEN]), None);
        for bit in 0..bytes.len() * 8 {
            let mut bad = bytes;
            bad[bit / 8] ^= 1 << (bit % 8);
            assert_eq!(decode_record(&bad), None, "bit {bit}");
        }
    }

    #[test]
    fn slots_lie_page_aligned_inside_the_file_for_every_geometry() {
        for chunk in ChunkSize::MIN_LOG2..=ChunkSize::MAX_LOG2 {
            for slab in MIN_SLAB_LOG2..=MAX_SLAB_LOG2 {
                let geometry = SlabGeometry::new(ChunkSize::from_log2(chunk).unwrap(), slab).unwrap();
                let last = geometry.slots() - 1;
                assert!(geometry.record_at(last) + RECORD_LEN as u64 <= geometry.slots_at());
                assert_eq!(geometry.slot_at(0) % SLOTS_ALIGN, 0);
                assert_eq!(geometry.slot_at(last) + geometry.chunk().len() as u64, geometry.file_len());
                assert!(geometry.slots() <= 65_536);
            }
        }
    }
}
