//! Reads: which bytes come from where, in order.
//!
//! Enters: a byte range. Leaves: pieces that together are the range, chunks and zeros without a copy. Invariant: a piece of a chunk was verified; a piece of
//! the delta is from slots that stay as they are while the run is held.

use std::sync::Arc;

use bytes::Bytes;
use smallvec::SmallVec;

use crate::cache::{ChunkRef, ChunkSlice};
use crate::delta::{Run, Source};
use crate::units::{ByteLen, ByteOffset, ByteRange, ChunkIndex, PAGE_SIZE};

use super::base::{Fetched, Here};
use super::{Device, DeviceError, Now, View};

/// A part of what was read.
#[derive(Clone, Debug)]
pub enum Piece {
    /// Zeros.
    Zero(ByteLen),
    /// A part of a chunk of the commit.
    Chunk(ChunkSlice),
    /// Bytes of the delta.
    Bytes(Bytes),
}

impl Piece {
    /// How many bytes.
    pub fn len(&self) -> u64 {
        match self {
            Piece::Zero(len) => len.0,
            Piece::Chunk(slice) => slice.len() as u64,
            Piece::Bytes(bytes) => bytes.len() as u64,
        }
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

/// What a pass over the range still lacks.
#[derive(Default)]
struct Lacking {
    chunks: Vec<ChunkIndex>,
    /// Chunks that are here but have left memory.
    asleep: Vec<(ChunkIndex, ChunkRef)>,
    delta: bool,
}

impl Lacking {
    fn is_none(&self) -> bool {
        self.chunks.is_empty() && self.asleep.is_empty() && !self.delta
    }
}

/// Runs of the delta that follow each other, and which bytes of the device each stands for.
type DataRuns = SmallVec<[(Run, ByteRange); 1]>;

impl Device {
    /// Appends the pieces of `range` if all of it is here and in memory; else leaves `pieces` as it was.
    #[inline]
    pub fn read_now(&self, range: ByteRange, pieces: &mut Vec<Piece>) -> Result<Now, DeviceError> {
        self.check(range)?;
        let before = pieces.len();
        let mut lacking = Lacking::default();
        match self.view.load().pass(range, &[], false, pieces, &mut lacking) {
            Ok(()) if lacking.is_none() => Ok(Now::Done),
            other => {
                pieces.truncate(before);
                other.map(|()| Now::Wait)
            }
        }
    }

    /// The pieces of `range`, waiting for whatever is not here.
    pub async fn read(self: &Arc<Self>, range: ByteRange) -> Result<Vec<Piece>, DeviceError> {
        self.check(range)?;
        // One view to the end: what is fetched for one base is not mixed with another.
        let view = self.view();
        let mut pieces = Vec::new();
        let mut fetched = Fetched::new();
        // Two rounds as a rule. A page can turn from data to something else meanwhile, never back to base, so each round that lacks a chunk
        // fetches one it did not have: the loop ends.
        loop {
            pieces.clear();
            let mut lacking = Lacking::default();
            view.pass(range, &fetched, false, &mut pieces, &mut lacking)?;
            if lacking.is_none() {
                return Ok(pieces);
            }
            if !lacking.chunks.is_empty() || !lacking.asleep.is_empty() {
                view.base().fetch(&lacking.chunks, &mut fetched).await?;
                view.base().wake(lacking.asleep, &mut fetched).await?;
                fetched.sort_unstable_by_key(|(index, _)| *index);
                continue;
            }
            // Only pages of the delta are not in memory: the rest is held.
            let held = view.clone();
            let work = move || {
                let (mut pieces, mut lacking) = (Vec::new(), Lacking::default());
                held.pass(range, &fetched, true, &mut pieces, &mut lacking)?;
                Ok::<_, DeviceError>((pieces, lacking, fetched))
            };
            let (found, lacking, kept) =
                tokio::task::spawn_blocking(work).await.map_err(|_| DeviceError::Stopped)??;
            if lacking.is_none() {
                return Ok(found);
            }
            fetched = kept;
        }
    }

    /// Brings what a range of the commit holds into the cache, where the delta does not hide it.
    pub async fn prefetch(self: &Arc<Self>, range: ByteRange) -> Result<(), DeviceError> {
        self.check(range)?;
        let view = self.view();
        let mut at = range.start;
        while at < range.end {
            let (run, end) = view.run_at(at, range.end);
            if run.is_none_or(|run| matches!(run.source, Source::Base)) {
                view.base().prefetch(ByteRange { start: at, end }).await?;
            }
            at = end;
        }
        Ok(())
    }
}

impl View {
    /// Goes over `range` once; appends pieces as long as nothing lacks, and notes all that does.
    #[inline]
    fn pass(
        &self,
        range: ByteRange,
        fetched: &[(ChunkIndex, Option<ChunkRef>)],
        may_wait: bool,
        pieces: &mut Vec<Piece>,
        lacking: &mut Lacking,
    ) -> Result<(), DeviceError> {
        let mut at = range.start;
        let mut data = DataRuns::new();
        while at < range.end {
            let (run, end) = self.run_at(at, range.end);
            let part = ByteRange { start: at, end };
            at = end;
            match run {
                Some(run) if matches!(run.source, Source::Data { .. }) => {
                    data.push((run, part));
                    continue;
                }
                _ if data.is_empty() => {}
                _ => self.read_delta(&mut data, may_wait, pieces, lacking)?,
            }
            match run {
                Some(run) if matches!(run.source, Source::Zero) => push_zero(pieces, part.len().0),
                _ => self.pass_base(part, fetched, pieces, lacking),
            }
        }
        if !data.is_empty() {
            self.read_delta(&mut data, may_wait, pieces, lacking)?;
        }
        Ok(())
    }

    /// The delta's run at `at` (none on a read-only device) and where it ends, at most `limit`.
    #[inline]
    pub(super) fn run_at(&self, at: ByteOffset, limit: ByteOffset) -> (Option<Run>, ByteOffset) {
        let Some(delta) = self.delta() else { return (None, limit) };
        let first = at.page();
        let run = delta.run(first, limit.0.div_ceil(PAGE_SIZE) - first.0);
        let end = ByteOffset(((first.0 + run.pages) * PAGE_SIZE).min(limit.0));
        (Some(run), end)
    }

    /// Reads runs that follow each other into one buffer, each run to its place, and takes them off `data`.
    fn read_delta(
        &self,
        data: &mut DataRuns,
        may_wait: bool,
        pieces: &mut Vec<Piece>,
        lacking: &mut Lacking,
    ) -> Result<(), DeviceError> {
        let delta = self.delta().expect("the runs are of this delta");
        let runs = std::mem::take(data);
        if !lacking.is_none() {
            // There will be another pass.
            return Ok(());
        }
        let mut buffer = vec![0; runs.iter().map(|(_, part)| part.len().0).sum::<u64>() as usize];
        let mut rest = buffer.as_mut_slice();
        for (run, part) in &runs {
            let (place, after) = rest.split_at_mut(part.len().0 as usize);
            let skip = part.start.0 - run.first.offset().0;
            if may_wait {
                delta.read(run, skip, place)?;
            } else if !delta.read_nowait(run, skip, place)? {
                lacking.delta = true;
                return Ok(());
            }
            rest = after;
        }
        pieces.push(Piece::Bytes(buffer.into()));
        Ok(())
    }

    #[inline]
    fn pass_base(
        &self,
        range: ByteRange,
        fetched: &[(ChunkIndex, Option<ChunkRef>)],
        pieces: &mut Vec<Piece>,
        lacking: &mut Lacking,
    ) {
        let mut at = range.start;
        while at < range.end {
            let base = self.base();
            let (index, chunk_start) = base.chunk_at(at);
            let chunk_end = ByteOffset(chunk_start.0 + base.chunk_len());
            let end = chunk_end.min(range.end);
            let part = (at.0 - chunk_start.0) as usize..(end.0 - chunk_start.0) as usize;
            let known = fetched.binary_search_by_key(&index, |(index, _)| *index);
            let here = match known {
                Ok(position) => match &fetched[position].1 {
                    Some(chunk) => Here::Chunk(chunk.clone()),
                    None => Here::Zero,
                },
                Err(_) => base.here(index),
            };
            match here {
                Here::Zero => push_zero(pieces, end.0 - at.0),
                Here::Away => lacking.chunks.push(index),
                Here::Chunk(_) if known.is_err() && base.is_mark(index) => lacking.chunks.push(index),
                // What was waited for counts as in memory: asking again could go on for ever on a host short of it.
                Here::Chunk(chunk) if known.is_ok() || chunk.is_resident(part.clone()) => {
                    base.note_use(index);
                    pieces.push(Piece::Chunk(chunk.slice(part)));
                }
                Here::Chunk(chunk) => lacking.asleep.push((index, chunk)),
            }
            at = end;
        }
    }
}

fn push_zero(pieces: &mut Vec<Piece>, len: u64) {
    match pieces.last_mut() {
        Some(Piece::Zero(last)) => last.0 += len,
        _ => pieces.push(Piece::Zero(ByteLen(len))),
    }
}
