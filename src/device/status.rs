//! What is known of a range: allocated, dirty, here.
//!
//! Enters: a byte range and how many extents are wanted. Leaves: extents from its start on, perhaps not to its end.
//! Invariant: at least one extent, no two neighbours alike, and the work is bounded by the extents and tables looked at, not by the bytes.

use std::sync::Arc;

use crate::delta::Source;
use crate::format::ChunkLocation;
use crate::units::{ByteLen, ByteOffset, ByteRange};

use super::{Device, DeviceError, View};

/// Chunk tables one status request may load: 4 GiB of the device at the default block size.
const MAX_TABLES: usize = 64;
/// Runs of the delta one status request may look at. Alike ones make one extent, so the extents alone bound nothing: a range of terabytes that was written
/// page by page is hundreds of millions of runs. The client asks on from where the answer ends.
const MAX_RUNS: usize = 16 << 10;

/// Whether a range takes space.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Allocation {
    /// It holds data.
    Data,
    /// Nothing is stored: it reads as zeros.
    Hole,
}

/// So many bytes in a row are alike.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Extent<T> {
    /// How many bytes.
    pub len: ByteLen,
    /// What they are.
    pub state: T,
}

/// What the delta says of a range.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Dirty {
    /// Nothing.
    Clean,
    /// It has bytes for it.
    Data,
    /// It has zeros for it.
    Zero,
}

struct Extents<T> {
    found: Vec<Extent<T>>,
    most: usize,
}

impl<T: PartialEq> Extents<T> {
    fn new(most: usize) -> Extents<T> {
        Extents { found: Vec::new(), most: most.max(1) }
    }

    /// Adds an extent; `false` when there is no place for it.
    fn push(&mut self, len: u64, state: T) -> bool {
        if let Some(last) = self.found.last_mut()
            && last.state == state
        {
            last.len.0 += len;
            return true;
        }
        if self.found.len() == self.most {
            return false;
        }
        self.found.push(Extent { len: ByteLen(len), state });
        true
    }
}

impl Device {
    /// What the delta holds of `range`, in at most `most` extents.
    pub fn dirty(&self, range: ByteRange, most: usize) -> Result<Vec<Extent<Dirty>>, DeviceError> {
        self.check(range)?;
        let view = self.view();
        let mut extents = Extents::new(most);
        let mut runs = 0;
        let mut at = range.start;
        while at < range.end && runs < MAX_RUNS {
            runs += 1;
            let (run, end) = view.run_at(at, range.end);
            let state = match run.map(|run| run.source) {
                None | Some(Source::Base) => Dirty::Clean,
                Some(Source::Zero) => Dirty::Zero,
                Some(Source::Data { .. }) => Dirty::Data,
            };
            if !extents.push(end.0 - at.0, state) {
                break;
            }
            at = end;
        }
        Ok(extents.found)
    }

    /// What of `range` takes space and what is a hole, in at most `most` extents.
    pub async fn allocation(
        self: &Arc<Self>,
        range: ByteRange,
        most: usize,
    ) -> Result<Vec<Extent<Allocation>>, DeviceError> {
        let of_chunk = |chunk: Option<ChunkLocation>| match chunk {
            Some(_) => Allocation::Data,
            None => Allocation::Hole,
        };
        self.walk(&self.view(), range, most, Allocation::Data, Allocation::Hole, of_chunk).await
    }

    /// What of `range` can be read without the repository (`true`), in at most `most` extents.
    pub async fn cached(
        self: &Arc<Self>,
        range: ByteRange,
        most: usize,
    ) -> Result<Vec<Extent<bool>>, DeviceError> {
        let view = self.view();
        let of_chunk = |chunk: Option<ChunkLocation>| chunk.is_none_or(|chunk| view.base().is_cached(&chunk));
        self.walk(&view, range, most, true, true, of_chunk).await
    }

    async fn walk<T: PartialEq + Copy>(
        self: &Arc<Self>,
        view: &View,
        range: ByteRange,
        most: usize,
        delta_data: T,
        zero: T,
        of_chunk: impl Fn(Option<ChunkLocation>) -> T,
    ) -> Result<Vec<Extent<T>>, DeviceError> {
        self.check(range)?;
        let mut extents = Extents::new(most);
        let (mut runs, mut tables) = (0, 0);
        // Where the block of the last table ends: a delta may cut it into many runs.
        let mut table_end = ByteOffset(0);
        let mut at = range.start;
        'range: while at < range.end && runs < MAX_RUNS {
            runs += 1;
            let (run, run_end) = view.run_at(at, range.end);
            match run.map_or(Source::Base, |run| run.source) {
                Source::Data { .. } if !extents.push(run_end.0 - at.0, delta_data) => break,
                Source::Zero if !extents.push(run_end.0 - at.0, zero) => break,
                Source::Data { .. } | Source::Zero => at = run_end,
                Source::Base => {
                    while at < run_end {
                        let hole_end = view.base().hole_end(at).await?.min(run_end);
                        if hole_end > at {
                            if !extents.push(hole_end.0 - at.0, zero) {
                                break 'range;
                            }
                            at = hole_end;
                            continue;
                        }
                        if view.base().block_end(at) != table_end {
                            if tables == MAX_TABLES {
                                break 'range;
                            }
                            tables += 1;
                            table_end = view.base().block_end(at);
                        }
                        let table = view.base().table_at(at).await?;
                        let block_end = view.base().block_end(at).min(run_end);
                        while at < block_end {
                            let (index, start) = view.base().chunk_at(at);
                            let end = ByteOffset(start.0 + view.base().chunk_len()).min(block_end);
                            let chunk = view.base().location(table.as_deref(), index);
                            if !extents.push(end.0 - at.0, of_chunk(chunk)) {
                                break 'range;
                            }
                            at = end;
                        }
                    }
                }
            }
        }
        Ok(extents.found)
    }
}
