//! Fetching chunks: neighbours in one object are read by one range, then each is unpacked and verified.
//!
//! Enters: locations from a verified chunk table. Leaves: per location a [`VerifiedChunk`] or an error that names chunk and object.
//! [`plan`] and [`unpack`] are pure; the I/O around them is in [`super::Version::fetch`].

use std::cell::RefCell;
use std::ops::Range;

use bytes::Bytes;

use crate::format::{ChunkId, ChunkLocation, ChunkSize, Codec, FormatError, ObjectId, VerifiedChunk};

/// The most bytes nobody asked for that are read to save a request. At 50 ms a request and 50 MB/s this is 1.3 ms well spent.
pub const MAX_GAP: u64 = 64 << 10;
/// The longest joined read. More requests run at once instead.
pub const MAX_JOINED: u64 = 4 << 20;

/// One range to read, and which of the asked chunks lie in it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RangeRead {
    /// The object.
    pub object: ObjectId,
    /// Bytes of it, end exclusive.
    pub range: Range<u64>,
    /// Indexes into the list of locations.
    pub chunks: Vec<usize>,
}

/// The range of one stored chunk.
pub fn range_of(location: &ChunkLocation) -> Range<u64> {
    location.offset.0..location.offset.0 + u64::from(location.stored_len)
}

/// Joins neighbours. Every location is in exactly one of the reads.
pub fn plan(locations: &[ChunkLocation]) -> Vec<RangeRead> {
    let mut order: Vec<usize> = (0..locations.len()).collect();
    order.sort_unstable_by_key(|&at| (locations[at].object, locations[at].offset));
    let mut reads: Vec<RangeRead> = Vec::new();
    for at in order {
        let location = &locations[at];
        let range = range_of(location);
        if let Some(last) = reads.last_mut()
            && last.object == location.object
            && range.start <= last.range.end.saturating_add(MAX_GAP)
            && range.end.max(last.range.end) - last.range.start <= MAX_JOINED
        {
            last.range.end = last.range.end.max(range.end);
            last.chunks.push(at);
        } else {
            reads.push(RangeRead { object: location.object, range, chunks: vec![at] });
        }
    }
    reads
}

thread_local! {
    /// A zstd context is a few hundred KiB; each thread that unpacks keeps one, and blocking threads come and go.
    static DECOMPRESSOR: RefCell<Option<zstd::bulk::Decompressor<'static>>> = const { RefCell::new(None) };
}

fn frame_error(why: impl ToString) -> FormatError {
    FormatError::Field { what: ChunkId::WHAT, field: "zstd frame", value: why.to_string() }
}

/// Unpacks a stored chunk and checks length and hash. `stored` is exactly the location's range.
pub fn unpack(
    location: &ChunkLocation,
    size: ChunkSize,
    stored: Bytes,
) -> Result<VerifiedChunk, FormatError> {
    let content = match location.codec {
        Codec::Raw => stored,
        Codec::Zstd => {
            // One frame and nothing after it: zstd would run on over any number of frames.
            if zstd::zstd_safe::find_frame_compressed_size(&stored).ok() != Some(stored.len()) {
                return Err(frame_error("cut short or followed by more bytes"));
            }
            // The buffer has the room of one chunk, and zstd stops when it is full: no frame can make it grow.
            let mut content = Vec::with_capacity(size.len());
            DECOMPRESSOR.with_borrow_mut(|slot| {
                let decompressor = match slot {
                    Some(decompressor) => decompressor,
                    None => slot.insert(zstd::bulk::Decompressor::new().map_err(frame_error)?),
                };
                decompressor.decompress_to_buffer(&stored, &mut content).map_err(frame_error)
            })?;
            content.into()
        }
    };
    VerifiedChunk::verify(location.id, size, content)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::units::ByteOffset;

    fn location(object: u8, offset: u64, stored_len: u32) -> ChunkLocation {
        ChunkLocation {
            id: ChunkId([0; 32]),
            object: ObjectId([object; 32]),
            offset: ByteOffset(offset),
            stored_len,
            codec: Codec::Zstd,
        }
    }

    #[test]
    fn neighbours_are_read_at_once_and_strangers_are_not() {
        let reads = plan(&[
            location(1, 1000, 100),
            location(2, 1100, 100),
            location(1, 16, 900),
            location(1, 1100 + MAX_GAP, 10),
            location(1, 1111 + 2 * MAX_GAP, 10),
        ]);
        let ranges: Vec<_> = reads.iter().map(|read| (read.range.clone(), read.chunks.clone())).collect();
        assert_eq!(
            ranges,
            [
                (16..1110 + MAX_GAP, vec![2, 0, 3]),
                (1111 + 2 * MAX_GAP..1121 + 2 * MAX_GAP, vec![4]),
                (1100..1200, vec![1]),
            ]
        );
    }

    #[test]
    fn a_frame_that_would_grow_past_the_chunk_is_refused() {
        let size = ChunkSize::from_log2(16).unwrap();
        let bomb = zstd::bulk::compress(&vec![0; 64 << 20], 1).unwrap();
        let location = ChunkLocation { stored_len: bomb.len() as u32, ..location(1, 16, 0) };
        assert!(unpack(&location, size, bomb.into()).is_err());
    }

    #[test]
    fn two_frames_and_trailing_bytes_are_refused_even_where_the_hash_would_fit() {
        let size = ChunkSize::from_log2(16).unwrap();
        let content = vec![7; size.len()];
        let location = ChunkLocation { id: ChunkId::of(&content), ..location(1, 16, 0) };
        let (a, b) = content.split_at(1000);
        let two = [zstd::bulk::compress(a, 1).unwrap(), zstd::bulk::compress(b, 1).unwrap()].concat();
        assert!(unpack(&location, size, two.into()).is_err());
        let mut one = zstd::bulk::compress(&content, 1).unwrap();
        assert!(unpack(&location, size, one.clone().into()).is_ok());
        one.push(0);
        assert!(unpack(&location, size, one.into()).is_err());
    }

    proptest! {
        #[test]
        fn every_chunk_is_in_one_read_that_covers_it(
            chunks in proptest::collection::vec((0u8..3, 0u64..10 << 20, 1u32..1 << 20), 0..60),
        ) {
            let locations: Vec<_> = chunks.iter().map(|&(object, at, len)| location(object, at, len)).collect();
            let reads = plan(&locations);
            let mut seen = vec![0; locations.len()];
            for read in &reads {
                prop_assert!(read.range.end - read.range.start <= MAX_JOINED);
                for &at in &read.chunks {
                    seen[at] += 1;
                    prop_assert_eq!(read.object, locations[at].object);
                    let range = range_of(&locations[at]);
                    prop_assert!(read.range.start <= range.start && range.end <= read.range.end);
                }
            }
            prop_assert!(seen.iter().all(|&times| times == 1));
        }

        #[test]
        fn no_stored_bytes_panic(bytes in proptest::collection::vec(any::<u8>(), 0..300), frame in any::<bool>()) {
            let size = ChunkSize::from_log2(16).unwrap();
            let bytes = if frame { [&[0x28, 0xb5, 0x2f, 0xfd], bytes.as_slice()].concat() } else { bytes };
            let _ = unpack(&location(1, 16, bytes.len() as u32), size, bytes.into());
        }
    }
}
