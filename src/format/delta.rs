//! The bytes of a delta layer: headers of `map` and `data`, and the frames of the log (FORMAT.md, "Delta layer").
//!
//! Enters: bytes of a local disk, perhaps torn. Leaves: headers, records, or the reason why a frame does not count.
//! Invariant: a frame is accepted only with its CRC over its layer's id and generation, so bytes of another file or of an
//! earlier life of this one never pass.

use super::{CommitId, FormatError};
use crate::units::{ByteLen, PAGE_SIZE, PageIndex};

/// Length of the `map` header.
pub const MAP_HEADER_LEN: usize = 128;
/// Bytes of the `data` header that mean something; it occupies one page.
pub const DATA_HEADER_LEN: usize = 36;
/// Records a frame can hold.
pub const MAX_FRAME_RECORDS: usize = 65_536;
/// Bytes of a frame before its records.
pub const FRAME_HEAD_LEN: usize = 24;
/// Bytes of a frame after its records.
pub const FRAME_TAIL_LEN: usize = 8;
/// Bytes of a record.
pub const RECORD_LEN: usize = 16;
/// Slots a layer can have: two values of the 32-bit field mean base and zero, and a run may be stepped one past its last slot
/// without wrapping to them.
pub const MAX_SLOTS: u32 = u32::MAX - 2;

/// Length of a tail's header.
pub const TAIL_HEADER_LEN: usize = 128;
/// A tail has two headers, written in turns: the newer one that is whole counts.
pub const TAIL_HEADERS: u64 = 2;
/// Where the entries of a tail begin.
pub const TAIL_ENTRIES_AT: u64 = TAIL_HEADERS * TAIL_HEADER_LEN as u64;
/// Length of an entry of a tail.
pub const TAIL_ENTRY_LEN: usize = 24;

const TAIL_MAGIC: &[u8; 8] = b"HCXTAIL\0";
const MAP_MAGIC: &[u8; 8] = b"HCXDELTA";
const DATA_MAGIC: &[u8; 8] = b"HCXPAGES";
const FRAME_MAGIC: &[u8; 4] = b"HCXF";
const VERSION: u16 = 1;
const FLAG_MORE: u32 = 1;

/// Names one layer of one volume; random.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct LayerId(pub [u8; 16]);

/// Names one volume; random.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct VolumeId(pub [u8; 16]);

/// A place for one page in a layer's `data`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Slot(pub u32);

impl Slot {
    /// Where the slot's page lies in `data`.
    pub const fn offset(self) -> u64 {
        (self.0 as u64 + 1) * PAGE_SIZE
    }
}

/// What a layer says of a page, in the 32 bits it takes on disk and in memory.
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct PageState(u32);

/// [`PageState`], spelled out.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PageKind {
    /// The layer says nothing: look below.
    Base,
    /// All zeros.
    Zero,
    /// The bytes are in this slot.
    Data(Slot),
}

impl PageState {
    /// Look below.
    pub const BASE: PageState = PageState(0);
    /// All zeros.
    pub const ZERO: PageState = PageState(1);

    /// The state of a page whose bytes are in `slot`.
    pub const fn data(slot: Slot) -> PageState {
        debug_assert!(slot.0 < MAX_SLOTS);
        PageState(slot.0 + 2)
    }

    /// Spelled out.
    #[inline]
    pub const fn kind(self) -> PageKind {
        match self.0 {
            0 => PageKind::Base,
            1 => PageKind::Zero,
            n => PageKind::Data(Slot(n - 2)),
        }
    }

    /// The state `pages` further on in a run that starts with this one: data is in consecutive slots.
    #[inline]
    pub const fn step(self, pages: u32) -> PageState {
        if self.0 < 2 { self } else { PageState(self.0 + pages) }
    }
}

impl std::fmt::Debug for PageState {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        self.kind().fmt(f)
    }
}

/// One line of the log: from `first` on, `pages` pages are in `state` (data: in consecutive slots).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Record {
    /// First page.
    pub first: PageIndex,
    /// How many pages, at least 1.
    pub pages: u32,
    /// State of the first page.
    pub state: PageState,
}

/// The identity of a layer's `map`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MapHeader {
    /// 1, and one more each time the log was rewritten.
    pub generation: u32,
    /// The commit this layer's volume is a view of.
    pub base: CommitId,
    /// The layer.
    pub layer: LayerId,
    /// The volume.
    pub volume: VolumeId,
    /// Size of the device.
    pub device_size: ByteLen,
}

fn field<const N: usize>(bytes: &[u8], at: usize) -> [u8; N] {
    let mut out = [0; N];
    out.copy_from_slice(&bytes[at..at + N]);
    out
}

fn u16_at(bytes: &[u8], at: usize) -> u16 {
    u16::from_le_bytes(field(bytes, at))
}

fn u32_at(bytes: &[u8], at: usize) -> u32 {
    u32::from_le_bytes(field(bytes, at))
}

fn u64_at(bytes: &[u8], at: usize) -> u64 {
    u64::from_le_bytes(field(bytes, at))
}

fn check_head(bytes: &[u8], what: &'static str, magic: &[u8; 8], len: usize) -> Result<(), FormatError> {
    if bytes.len() < len {
        return Err(FormatError::Length { what, expected: len as u64, actual: bytes.len() as u64 });
    }
    if &bytes[..8] != magic {
        return Err(FormatError::Magic { what });
    }
    FormatError::check_version(what, u16_at(bytes, 8), VERSION)?;
    if crc32fast::hash(&bytes[..len - 4]) != u32_at(bytes, len - 4) {
        return Err(FormatError::Checksum { what });
    }
    Ok(())
}

impl MapHeader {
    const WHAT: &'static str = "delta map";

    /// The header's bytes.
    pub fn encode(&self) -> [u8; MAP_HEADER_LEN] {
        let mut out = Vec::with_capacity(MAP_HEADER_LEN);
        out.extend_from_slice(MAP_MAGIC);
        out.extend_from_slice(&VERSION.to_le_bytes());
        out.extend_from_slice(&(PAGE_SIZE.trailing_zeros() as u16).to_le_bytes());
        out.extend_from_slice(&self.generation.to_le_bytes());
        out.extend_from_slice(self.base.as_bytes());
        out.extend_from_slice(&self.layer.0);
        out.extend_from_slice(&self.volume.0);
        out.extend_from_slice(&self.device_size.0.to_le_bytes());
        out.resize(MAP_HEADER_LEN - 4, 0);
        let crc = crc32fast::hash(&out);
        out.extend_from_slice(&crc.to_le_bytes());
        field(&out, 0)
    }

    /// Reads and checks a header.
    pub fn decode(bytes: &[u8]) -> Result<MapHeader, FormatError> {
        check_head(bytes, Self::WHAT, MAP_MAGIC, MAP_HEADER_LEN)?;
        let page_log2 = u16_at(bytes, 10);
        if 1 << page_log2.min(63) != PAGE_SIZE {
            return Err(FormatError::Field {
                what: Self::WHAT,
                field: "log2 of the page size",
                value: page_log2.to_string(),
            });
        }
        Ok(MapHeader {
            generation: u32_at(bytes, 12),
            base: CommitId(field(bytes, 16)),
            layer: LayerId(field(bytes, 48)),
            volume: VolumeId(field(bytes, 64)),
            device_size: ByteLen(u64_at(bytes, 80)),
        })
    }

    /// What frames of this log are sealed with.
    pub fn seal(&self) -> FrameSeal {
        FrameSeal { layer: self.layer, generation: self.generation }
    }
}

/// The header of `data`: one page.
pub fn encode_data_header(layer: LayerId) -> Vec<u8> {
    let mut out = Vec::with_capacity(PAGE_SIZE as usize);
    out.extend_from_slice(DATA_MAGIC);
    out.extend_from_slice(&VERSION.to_le_bytes());
    out.resize(16, 0);
    out.extend_from_slice(&layer.0);
    let crc = crc32fast::hash(&out);
    out.extend_from_slice(&crc.to_le_bytes());
    out.resize(PAGE_SIZE as usize, 0);
    out
}

/// Reads the header of `data`: whose it is.
pub fn decode_data_header(bytes: &[u8]) -> Result<LayerId, FormatError> {
    check_head(bytes, "delta data", DATA_MAGIC, DATA_HEADER_LEN)?;
    Ok(LayerId(field(bytes, 16)))
}

/// What a frame's CRC covers besides its own bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FrameSeal {
    layer: LayerId,
    generation: u32,
}

impl FrameSeal {
    fn crc(&self, bytes: &[u8]) -> u32 {
        let mut hasher = crc32fast::Hasher::new();
        hasher.update(&self.layer.0);
        hasher.update(&self.generation.to_le_bytes());
        hasher.update(bytes);
        hasher.finalize()
    }
}

/// The first bytes of a frame: enough to know its length.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FrameHead {
    /// Records in the frame.
    pub records: usize,
    /// The frame's number in the log.
    pub sequence: u64,
    /// The number of the first frame of its commit.
    pub commit: u64,
}

impl FrameHead {
    /// Reads the head; `None` where it can't be one.
    pub fn decode(bytes: &[u8; FRAME_HEAD_LEN]) -> Option<FrameHead> {
        let records = u32_at(bytes, 4) as usize;
        let head = FrameHead { records, sequence: u64_at(bytes, 8), commit: u64_at(bytes, 16) };
        let sane = &bytes[..4] == FRAME_MAGIC
            && (1..=MAX_FRAME_RECORDS).contains(&records)
            && (1..=head.sequence).contains(&head.commit);
        sane.then_some(head)
    }

    /// Length of the whole frame.
    pub const fn frame_len(&self) -> usize {
        FRAME_HEAD_LEN + self.records * RECORD_LEN + FRAME_TAIL_LEN
    }
}

/// Appends one frame to `out`; its CRC.
pub fn encode_frame(
    out: &mut Vec<u8>,
    seal: FrameSeal,
    sequence: u64,
    commit: u64,
    records: &[Record],
    more: bool,
) -> u32 {
    assert!((1..=MAX_FRAME_RECORDS).contains(&records.len()), "the caller cuts frames to size");
    let start = out.len();
    out.extend_from_slice(FRAME_MAGIC);
    out.extend_from_slice(&(records.len() as u32).to_le_bytes());
    out.extend_from_slice(&sequence.to_le_bytes());
    out.extend_from_slice(&commit.to_le_bytes());
    for record in records {
        out.extend_from_slice(&record.first.0.to_le_bytes());
        out.extend_from_slice(&record.pages.to_le_bytes());
        out.extend_from_slice(&record.state.0.to_le_bytes());
    }
    out.extend_from_slice(&if more { FLAG_MORE } else { 0 }.to_le_bytes());
    let crc = seal.crc(&out[start..]);
    out.extend_from_slice(&crc.to_le_bytes());
    crc
}

/// The CRC of a whole frame.
pub fn crc_of_frame(frame: &[u8]) -> u32 {
    u32_at(frame, frame.len() - 4)
}

/// Checks a whole frame and gives its records in order, and whether more frames of its commit follow. `None`: not a frame of this log.
pub fn decode_frame<'a>(
    bytes: &'a [u8],
    seal: FrameSeal,
) -> Option<(FrameHead, impl Iterator<Item = Record> + 'a, bool)> {
    let head = FrameHead::decode(bytes.first_chunk()?)?;
    let bytes = bytes.get(..head.frame_len())?;
    let (body, crc) = bytes.split_at(bytes.len() - 4);
    if seal.crc(body) != u32_at(crc, 0) {
        return None;
    }
    let flags = u32_at(body, body.len() - 4);
    let records = body[FRAME_HEAD_LEN..body.len() - 4].chunks_exact(RECORD_LEN).map(|bytes| Record {
        first: PageIndex(u64_at(bytes, 0)),
        pages: u32_at(bytes, 8),
        state: PageState(u32_at(bytes, 12)),
    });
    Some((head, records, flags & FLAG_MORE != 0))
}

/// Names a commit of a layer's log: its place, and what it says, for one that was about to be may not be there, and another in its place.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct CommitName {
    /// The log's generation.
    pub generation: u32,
    /// The number of the commit's last frame; 0 before the first.
    pub sequence: u64,
    /// That frame's CRC; 0 before the first.
    pub crc: u32,
}

/// What a tail goes on from.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Predecessor {
    /// A commit.
    pub commit: CommitName,
    /// The first entry that is not in it.
    pub from: u64,
}

/// The identity of a tail.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TailHeader {
    /// The layer.
    pub layer: LayerId,
    /// The run of the kernel that has it in memory.
    pub boot: [u8; 16],
    /// 1, and one more for each tail that was begun.
    pub epoch: u64,
    /// 0, and one more each time the header was written.
    pub serial: u32,
    /// Random: sets its entries apart from those of any tail that was in its file before.
    pub nonce: [u8; 16],
    /// Whichever of the two is the log's last.
    pub after: [Predecessor; 2],
}

impl TailHeader {
    /// The header's bytes.
    pub fn encode(&self) -> [u8; TAIL_HEADER_LEN] {
        let mut out = Vec::with_capacity(TAIL_HEADER_LEN);
        out.extend_from_slice(TAIL_MAGIC);
        out.extend_from_slice(&VERSION.to_le_bytes());
        out.resize(12, 0);
        out.extend_from_slice(&self.serial.to_le_bytes());
        out.extend_from_slice(&self.layer.0);
        out.extend_from_slice(&self.boot);
        out.extend_from_slice(&self.epoch.to_le_bytes());
        for Predecessor { commit, from } in self.after {
            out.extend_from_slice(&commit.generation.to_le_bytes());
            out.extend_from_slice(&commit.crc.to_le_bytes());
            out.extend_from_slice(&commit.sequence.to_le_bytes());
            out.extend_from_slice(&from.to_le_bytes());
        }
        out.extend_from_slice(&self.nonce);
        out.resize(TAIL_HEADER_LEN - 4, 0);
        let crc = crc32fast::hash(&out);
        out.extend_from_slice(&crc.to_le_bytes());
        field(&out, 0)
    }

    /// Reads a header; `None` where it is none of this version, or not whole: a tail is no promise.
    pub fn decode(bytes: &[u8; TAIL_HEADER_LEN]) -> Option<TailHeader> {
        check_head(bytes, "delta tail", TAIL_MAGIC, TAIL_HEADER_LEN).ok()?;
        let after = |at| Predecessor {
            commit: CommitName {
                generation: u32_at(bytes, at),
                crc: u32_at(bytes, at + 4),
                sequence: u64_at(bytes, at + 8),
            },
            from: u64_at(bytes, at + 16),
        };
        Some(TailHeader {
            layer: LayerId(field(bytes, 16)),
            boot: field(bytes, 32),
            serial: u32_at(bytes, 12),
            epoch: u64_at(bytes, 48),
            after: [after(56), after(80)],
            nonce: field(bytes, 104),
        })
    }

    /// What entries of this tail are sealed with.
    pub fn seal(&self) -> TailSeal {
        let mut hasher = crc32fast::Hasher::new();
        hasher.update(&self.nonce);
        TailSeal(hasher)
    }
}

/// What an entry's CRC covers besides its own bytes.
#[derive(Clone, Debug)]
pub struct TailSeal(crc32fast::Hasher);

impl TailSeal {
    fn crc(&self, index: u64, bytes: &[u8]) -> u32 {
        let mut hasher = self.0.clone();
        hasher.update(&index.to_le_bytes());
        hasher.update(bytes);
        hasher.finalize()
    }
}

/// What a tail says of pages: of one that is written, or of a run that is not data.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TailEntry {
    /// The pages and their state.
    pub record: Record,
    /// CRC of the page's bytes; 0 where there are none.
    pub crc: u32,
}

impl TailEntry {
    /// Appends the entry to `out`, as the `index`th of its tail.
    pub fn encode(&self, seal: &TailSeal, index: u64, out: &mut Vec<u8>) {
        let start = out.len();
        out.extend_from_slice(&self.record.first.0.to_le_bytes());
        out.extend_from_slice(&self.record.pages.to_le_bytes());
        out.extend_from_slice(&self.record.state.0.to_le_bytes());
        out.extend_from_slice(&self.crc.to_le_bytes());
        let crc = seal.crc(index, &out[start..]);
        out.extend_from_slice(&crc.to_le_bytes());
    }

    /// Reads the `index`th entry; `None` where it is not whole.
    pub fn decode(bytes: &[u8], seal: &TailSeal, index: u64) -> Option<TailEntry> {
        let (body, crc) = bytes.split_at(TAIL_ENTRY_LEN - 4);
        if seal.crc(index, body) != u32_at(crc, 0) {
            return None;
        }
        let record = Record {
            first: PageIndex(u64_at(body, 0)),
            pages: u32_at(body, 8),
            state: PageState(u32_at(body, 12)),
        };
        // Each page that has bytes has an entry of its own.
        let has_bytes = matches!(record.state.kind(), PageKind::Data(_));
        (!has_bytes || record.pages == 1).then_some(TailEntry { record, crc: u32_at(body, 16) })
    }
}

impl Record {
    /// Whether the record fits a device of `device_pages` pages, and its slots have numbers.
    pub fn fits(&self, device_pages: u64) -> bool {
        let pages_fit = self.pages >= 1
            && self.first.0.checked_add(self.pages.into()).is_some_and(|end| end <= device_pages);
        let slots_fit = match self.state.kind() {
            PageKind::Data(slot) => slot.0.checked_add(self.pages).is_some_and(|end| end <= MAX_SLOTS),
            PageKind::Base | PageKind::Zero => true,
        };
        pages_fit && slots_fit
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn header() -> MapHeader {
        MapHeader {
            generation: 3,
            base: CommitId::of(b"base"),
            layer: LayerId([7; 16]),
            volume: VolumeId([9; 16]),
            device_size: ByteLen(1 << 40),
        }
    }

    fn records() -> Vec<Record> {
        vec![
            Record { first: PageIndex(5), pages: 3, state: PageState::data(Slot(11)) },
            Record { first: PageIndex(0), pages: u32::MAX, state: PageState::ZERO },
        ]
    }

    #[test]
    fn a_header_survives_and_every_flipped_bit_is_found() {
        let bytes = header().encode();
        assert_eq!(MapHeader::decode(&bytes), Ok(header()));
        for bit in 0..bytes.len() * 8 {
            let mut bad = bytes;
            bad[bit / 8] ^= 1 << (bit % 8);
            assert!(MapHeader::decode(&bad).is_err(), "bit {bit}");
        }
    }

    #[test]
    fn a_newer_map_is_refused_by_its_number() {
        let mut bytes = header().encode();
        bytes[8] = 9;
        assert_eq!(
            MapHeader::decode(&bytes).unwrap_err().to_string(),
            "delta map version 9, this build reads 1..=1"
        );
    }

    #[test]
    fn the_page_after_the_last_slot_is_not_taken_for_base() {
        let last = PageState::data(Slot(MAX_SLOTS - 1));
        assert!(matches!(last.step(1).kind(), PageKind::Data(_)));
        let two = Record { first: PageIndex(0), pages: 2, state: last };
        assert!(!two.fits(10), "there is no such slot");
    }

    #[test]
    fn a_frame_of_another_layer_or_generation_does_not_count() {
        let mut frame = Vec::new();
        encode_frame(&mut frame, header().seal(), 4, 3, &records(), true);
        let (head, read, more) = decode_frame(&frame, header().seal()).unwrap();
        assert_eq!((head.sequence, head.commit, more), (4, 3, true));
        assert_eq!(read.collect::<Vec<_>>(), records());
        for other in
            [MapHeader { generation: 4, ..header() }, MapHeader { layer: LayerId([8; 16]), ..header() }]
        {
            assert!(decode_frame(&frame, other.seal()).is_none());
        }
    }

    #[test]
    fn a_frame_cut_or_flipped_anywhere_does_not_count() {
        let mut frame = Vec::new();
        encode_frame(&mut frame, header().seal(), 1, 1, &records(), false);
        for len in 0..frame.len() {
            assert!(decode_frame(&frame[..len], header().seal()).is_none(), "cut at {len}");
        }
        for bit in 0..frame.len() * 8 {
            let mut bad = frame.clone();
            bad[bit / 8] ^= 1 << (bit % 8);
            assert!(decode_frame(&bad, header().seal()).is_none(), "bit {bit}");
        }
    }

    proptest! {
        #[test]
        fn no_bytes_panic(bytes in proptest::collection::vec(any::<u8>(), 0..300)) {
            let _ = MapHeader::decode(&bytes);
            let _ = decode_data_header(&bytes);
            let _ = decode_frame(&bytes, header().seal()).map(|(_, records, _)| records.count());
        }
    }
}
