//! Base objects: the frame around the stored chunks and the chunk table of one block.
//!
//! Enters: the offsets a writer reached, or the first and last bytes of an object. Leaves: header and trailer bytes, or where the table is.
//! Readers that come by the block map do not need the trailer; it lets a repository be read from its objects alone.

use super::{FormatError, ObjectId};
use crate::units::{ByteLen, ByteOffset};

const WHAT: &str = ObjectId::WHAT;
const MAGIC: &[u8; 8] = b"HCXBLOCK";
const END_MAGIC: &[u8; 8] = b"HCXBLEND";
const VERSION: u16 = 1;

/// Length of the header; the first stored chunk starts here.
pub const HEADER_BYTES: usize = 16;
/// Length of the trailer.
pub const TRAILER_BYTES: usize = 24;

/// The header's bytes.
pub fn header() -> [u8; HEADER_BYTES] {
    let mut out = [0; HEADER_BYTES];
    out[..8].copy_from_slice(MAGIC);
    out[8..10].copy_from_slice(&VERSION.to_le_bytes());
    out
}

/// Checks an object's first bytes.
pub fn check_header(bytes: &[u8; HEADER_BYTES]) -> Result<(), FormatError> {
    if !bytes.starts_with(MAGIC) {
        return Err(FormatError::Magic { what: WHAT });
    }
    FormatError::check_version(WHAT, u16::from_le_bytes([bytes[8], bytes[9]]), VERSION)?;
    if bytes[10..] != [0; 6] {
        return Err(FormatError::Field { what: WHAT, field: "reserved", value: "not zero".into() });
    }
    Ok(())
}

/// The trailer's bytes, for a table of `len` bytes at `offset`.
pub fn trailer(offset: ByteOffset, len: u32) -> [u8; TRAILER_BYTES] {
    let mut out = [0; TRAILER_BYTES];
    out[..8].copy_from_slice(&offset.0.to_le_bytes());
    out[8..12].copy_from_slice(&len.to_le_bytes());
    let crc = crc32fast::hash(&out[..12]);
    out[12..16].copy_from_slice(&crc.to_le_bytes());
    out[16..].copy_from_slice(END_MAGIC);
    out
}

/// Where the table is, from the last bytes of an object of `object_len` bytes.
pub fn read_trailer(
    bytes: &[u8; TRAILER_BYTES],
    object_len: ByteLen,
) -> Result<(ByteOffset, u32), FormatError> {
    let [t0, t1, t2, t3, t4, t5, t6, t7, l0, l1, l2, l3, c0, c1, c2, c3, magic @ ..] = *bytes;
    if &magic != END_MAGIC {
        return Err(FormatError::Magic { what: WHAT });
    }
    if u32::from_le_bytes([c0, c1, c2, c3]) != crc32fast::hash(&bytes[..12]) {
        return Err(FormatError::Checksum { what: WHAT });
    }
    let offset = u64::from_le_bytes([t0, t1, t2, t3, t4, t5, t6, t7]);
    let len = u32::from_le_bytes([l0, l1, l2, l3]);
    let end = offset.checked_add(len.into()).and_then(|end| end.checked_add(TRAILER_BYTES as u64));
    if offset < HEADER_BYTES as u64 || end != Some(object_len.0) {
        return Err(FormatError::Field {
            what: WHAT,
            field: "place of the chunk table",
            value: format!("{len} bytes at {offset} of {object_len}"),
        });
    }
    Ok((ByteOffset(offset), len))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn header_and_trailer_survive_their_bytes() {
        assert_eq!(check_header(&header()), Ok(()));
        let bytes = trailer(ByteOffset(1000), 64);
        assert_eq!(read_trailer(&bytes, ByteLen(1088)), Ok((ByteOffset(1000), 64)));
        assert!(read_trailer(&bytes, ByteLen(1087)).is_err());
    }

    #[test]
    fn every_flipped_bit_of_header_and_trailer_is_found() {
        for bit in 0..HEADER_BYTES * 8 {
            let mut bytes = header();
            bytes[bit / 8] ^= 1 << (bit % 8);
            assert!(check_header(&bytes).is_err(), "header bit {bit}");
        }
        for bit in 0..TRAILER_BYTES * 8 {
            let mut bytes = trailer(ByteOffset(16), 16);
            bytes[bit / 8] ^= 1 << (bit % 8);
            assert!(read_trailer(&bytes, ByteLen(56)).is_err(), "trailer bit {bit}");
        }
    }

    proptest! {
        #[test]
        fn no_trailer_bytes_panic(bytes in any::<[u8; TRAILER_BYTES]>(), len in any::<u64>()) {
            let _ = read_trailer(&bytes, ByteLen(len));
        }
    }
}
