//! Writes, zeroes and trims of any alignment.
//!
//! Enters: bytes for a range. Leaves: pages in the delta. Invariant: a page that is written in part keeps the rest of what it had, whoever else writes to it
//! at the same time (the stripes), and nothing of a connection that is gone reaches the delta (the fence).

use std::sync::Arc;

use bytes::Bytes;
use smallvec::SmallVec;

use crate::delta::{Delta, DeltaError, PageWrite};
use crate::units::{ByteLen, ByteOffset, ByteRange, PAGE_SIZE, PageIndex};

use super::stripes::Stripes;
use super::{Device, DeviceError, Fence, Now, Piece, TOGETHER};

const PAGE: usize = PAGE_SIZE as usize;
/// Zeroes that must take space are written in pieces of this size.
const ZERO_PIECE: u64 = 1 << 20;
/// Seals that may come between a write's look at the layers and its turn. A seal takes fsyncs, a look a microsecond.
const SEALS_AT_ONCE: usize = 64;

/// What to put into a range.
#[derive(Clone, Debug)]
enum Content<'a> {
    Bytes(&'a [u8]),
    Zero,
}

impl<'a> Content<'a> {
    /// The part from byte `from` to byte `to` of the range.
    fn part(&self, from: u64, to: u64) -> Content<'a> {
        match self {
            Content::Bytes(bytes) => Content::Bytes(&bytes[from as usize..to as usize]),
            Content::Zero => Content::Zero,
        }
    }

    fn copy_into(&self, target: &mut [u8]) {
        match self {
            Content::Bytes(bytes) => target.copy_from_slice(bytes),
            Content::Zero => target.fill(0),
        }
    }
}

/// A range cut at page borders: a partial page at either end (they may be one and the same), whole pages between.
struct Cut {
    head: Option<ByteRange>,
    whole: ByteRange,
    tail: Option<ByteRange>,
}

impl Cut {
    fn new(range: ByteRange) -> Cut {
        let (first, end) = range.whole_pages();
        let none = ByteRange { start: range.end, end: range.end };
        if first.0 > end.0 {
            // Inside one page.
            return Cut { head: Some(range), whole: none, tail: None };
        }
        let whole = ByteRange { start: first.offset(), end: end.offset() };
        let head = ByteRange { start: range.start, end: whole.start };
        let tail = ByteRange { start: whole.end, end: range.end };
        let some = |part: ByteRange| (!part.is_empty()).then_some(part);
        Cut { head: some(head), whole, tail: some(tail) }
    }

    fn partial(&self) -> impl Iterator<Item = ByteRange> {
        self.head.into_iter().chain(self.tail)
    }
}

/// The partial pages of a write as they were, in the order of [`Cut::partial`].
type OldPages = Vec<[u8; PAGE]>;

impl Device {
    fn writable(&self, range: ByteRange) -> Result<(), DeviceError> {
        self.check(range)?;
        if self.read_only { Err(DeviceError::ReadOnly) } else { Ok(()) }
    }

    /// Does something to the layer that takes the writes. Where that was sealed in this moment it is done to the next one: all of it, what was done already too.
    #[inline]
    fn on_top(&self, change: impl Fn(&Delta) -> Result<(), DeltaError>) -> Result<(), DeviceError> {
        for _ in 0..SEALS_AT_ONCE {
            let view = self.view.load();
            let delta = view.delta().ok_or(DeviceError::ReadOnly)?;
            match change(delta) {
                // Whoever seals a layer puts the next one on before he lets anybody be told.
                Err(DeltaError::Sealed) => {}
                done => return Ok(done?),
            }
        }
        Err(DeltaError::Sealed.into())
    }

    /// Writes `bytes` at `at`, if nothing must be waited for. Blocks only as long as the kernel takes to buffer the bytes.
    #[inline]
    pub fn write_now(&self, fence: &Fence, at: ByteOffset, bytes: &[u8]) -> Result<Now, DeviceError> {
        self.change_now(fence, byte_range(at, bytes.len() as u64, self.size)?, &Content::Bytes(bytes))
    }

    /// Whether a write of this range may go together with others: it is small, and of whole pages.
    #[inline]
    pub fn may_go_together(range: ByteRange) -> bool {
        let is_whole = |at: ByteOffset| at.0.is_multiple_of(PAGE_SIZE);
        !range.is_empty() && is_whole(range.start) && is_whole(range.end) && Stripes::is_one(range)
    }

    /// Does writes that came together and may go together, in their order: each is told whether it is done, or is to be tried by itself because something must be
    /// waited for. On `Err` any of them may be done, and each page is as it was or as one of them has it.
    pub fn write_together_now(
        &self,
        fence: &Fence,
        writes: &[(ByteOffset, &[u8])],
    ) -> Result<SmallVec<[bool; TOGETHER]>, DeviceError> {
        for (at, bytes) in writes {
            let range = byte_range(*at, bytes.len() as u64, self.size)?;
            debug_assert!(Device::may_go_together(range));
            self.writable(range)?;
        }
        let (_held, each) = self.stripes.try_hold_each(writes.iter().map(|(at, _)| *at));
        let held = writes.iter().zip(&each).filter(|(_, is_held)| **is_held);
        let pages: SmallVec<[PageWrite<'_>; TOGETHER]> =
            held.map(|((at, bytes), _)| PageWrite { first: at.page(), bytes }).collect();
        if !pages.is_empty() {
            let _passage = fence.enter().ok_or(DeviceError::Fenced)?;
            self.on_top(|delta| delta.write_together(&pages))?;
        }
        Ok(each)
    }

    /// Writes `bytes` at `at`, waiting for what must be waited for.
    pub async fn write(
        self: &Arc<Self>,
        fence: &Fence,
        at: ByteOffset,
        bytes: Bytes,
    ) -> Result<(), DeviceError> {
        let range = byte_range(at, bytes.len() as u64, self.size)?;
        self.change(fence, range, &Content::Bytes(&bytes)).await
    }

    /// Makes a range read as zeros, at a cost by extents, if nothing must be waited for.
    pub fn zero_now(&self, fence: &Fence, range: ByteRange) -> Result<Now, DeviceError> {
        self.change_now(fence, range, &Content::Zero)
    }

    /// Makes a range read as zeros, at a cost by extents.
    pub async fn zero(self: &Arc<Self>, fence: &Fence, range: ByteRange) -> Result<(), DeviceError> {
        self.change(fence, range, &Content::Zero).await
    }

    /// Makes a range read as zeros that take space. Costs what writing them would.
    pub async fn zero_allocated(
        self: &Arc<Self>,
        fence: &Fence,
        range: ByteRange,
    ) -> Result<(), DeviceError> {
        self.writable(range)?;
        let zeros = Bytes::from(vec![0; ZERO_PIECE.min(range.len().0) as usize]);
        let mut at = range.start;
        while at < range.end {
            let len = (range.end.0 - at.0).min(ZERO_PIECE);
            self.write(fence, at, zeros.slice(..len as usize)).await?;
            at.0 += len;
        }
        Ok(())
    }

    /// Forgets the whole pages of a range: they read as zeros from then on. Partial pages stay as they are, as the protocol allows.
    pub fn trim_now(&self, fence: &Fence, range: ByteRange) -> Result<Now, DeviceError> {
        match whole(range) {
            Some(pages) => self.change_now(fence, pages, &Content::Zero),
            None => self.writable(range).map(|()| Now::Done),
        }
    }

    /// As [`Device::trim_now`], waiting for other writes to the same pages.
    pub async fn trim(self: &Arc<Self>, fence: &Fence, range: ByteRange) -> Result<(), DeviceError> {
        match whole(range) {
            Some(pages) => self.change(fence, pages, &Content::Zero).await,
            None => self.writable(range),
        }
    }

    #[inline]
    fn change_now(&self, fence: &Fence, range: ByteRange, content: &Content<'_>) -> Result<Now, DeviceError> {
        self.writable(range)?;
        if range.is_empty() {
            return Ok(Now::Done);
        }
        let Some(_held) = self.stripes.try_hold(range) else { return Ok(Now::Wait) };
        let cut = Cut::new(range);
        let mut old = OldPages::new();
        for part in cut.partial() {
            let mut pieces = Vec::new();
            match self.read_now(page_around(part, self.size), &mut pieces)? {
                Now::Done => old.push(gather(&pieces)),
                Now::Wait => return Ok(Now::Wait),
            }
        }
        self.apply(fence, range, &cut, content, old)?;
        Ok(Now::Done)
    }

    async fn change(
        self: &Arc<Self>,
        fence: &Fence,
        range: ByteRange,
        content: &Content<'_>,
    ) -> Result<(), DeviceError> {
        self.writable(range)?;
        if range.is_empty() {
            return Ok(());
        }
        let _held = self.stripes.hold(range).await;
        let cut = Cut::new(range);
        let mut old = OldPages::new();
        for part in cut.partial() {
            old.push(gather(&self.read(page_around(part, self.size)).await?));
        }
        // Into the page cache, as in the `now` form: it takes no longer than the kernel takes to buffer it.
        self.apply(fence, range, &cut, content, old)
    }

    /// Puts the pages of a write into the delta; the caller holds their stripes.
    #[inline]
    fn apply(
        &self,
        fence: &Fence,
        range: ByteRange,
        cut: &Cut,
        content: &Content<'_>,
        mut pages: OldPages,
    ) -> Result<(), DeviceError> {
        let _passage = fence.enter().ok_or(DeviceError::Fenced)?;
        let of = |part: ByteRange| content.part(part.start.0 - range.start.0, part.end.0 - range.start.0);
        for (part, page) in cut.partial().zip(&mut pages) {
            let first = (part.start.0 % PAGE_SIZE) as usize;
            of(part).copy_into(&mut page[first..first + part.len().0 as usize]);
        }
        self.on_top(|delta| {
            for (part, page) in cut.partial().zip(&pages) {
                delta.write(part.start.page(), page)?;
            }
            if cut.whole.is_empty() {
                return Ok(());
            }
            match of(cut.whole) {
                Content::Bytes(bytes) => delta.write(cut.whole.start.page(), bytes),
                Content::Zero => delta.zero(cut.whole.start.page(), cut.whole.len().0 / PAGE_SIZE),
            }
        })
    }
}

fn byte_range(at: ByteOffset, len: u64, size: ByteLen) -> Result<ByteRange, DeviceError> {
    let past_the_end = DeviceError::OutOfRange { end: ByteOffset(u64::MAX), size };
    ByteRange::at(at, ByteLen(len)).ok_or(past_the_end)
}

/// The whole pages inside a range.
fn whole(range: ByteRange) -> Option<ByteRange> {
    let (first, end) = range.whole_pages();
    (first < end).then(|| ByteRange { start: first.offset(), end: end.offset() })
}

/// The page a partial page's bytes lie in, as far as the device goes.
fn page_around(part: ByteRange, size: ByteLen) -> ByteRange {
    let page = part.start.page();
    let end = PageIndex(page.0 + 1).offset().min(ByteOffset(size.0));
    ByteRange { start: page.offset(), end }
}

fn gather(pieces: &[Piece]) -> [u8; PAGE] {
    // A page at the very end of a device that is not a multiple of pages ends in zeros.
    let mut page = [0; PAGE];
    let mut at = 0;
    for piece in pieces {
        let len = piece.len() as usize;
        match piece {
            Piece::Zero(_) => {}
            Piece::Chunk(bytes) => page[at..at + len].copy_from_slice(bytes),
            Piece::Bytes(bytes) => page[at..at + len].copy_from_slice(bytes),
        }
        at += len;
    }
    page
}
