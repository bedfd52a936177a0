//! A stack of layers: the top one takes the writes, what it does not say the next one below does.
//!
//! Enters: pages and ranges. Leaves: runs, each from one source. Invariant: layers below the top never change.

use std::sync::Arc;

use crate::format::delta::{PageKind, PageState, Slot};
use crate::units::{PAGE_SIZE, PageIndex};

use super::error::DeltaError;
use super::layer::{Layer, PageWrite, Pin};

/// Pages with bytes that are told of as one change: who looks for changes is not kept by a disk that was written all over.
const MOST_CHANGED: u64 = 1 << 14;

/// Where the pages of a run are.
#[derive(Clone, Debug)]
pub enum Source {
    /// No layer says anything: the commit has them.
    Base,
    /// All zeros.
    Zero,
    /// In consecutive slots of a layer.
    Data {
        /// Layer, counted from the bottom.
        layer: usize,
        /// Slot of the first page.
        slot: Slot,
    },
}

/// Pages in a row with one source. While it is kept, its slots keep their bytes.
#[derive(Clone)]
pub struct Run {
    /// First page.
    pub first: PageIndex,
    /// How many pages, at least 1.
    pub pages: u64,
    /// Where they are.
    pub source: Source,
    _pin: Option<Pin>,
}

/// The layers of one volume.
pub struct Delta {
    /// Lowest first, never empty.
    layers: Vec<Arc<Layer>>,
}

impl Delta {
    /// A delta of these layers, lowest first; there must be one.
    pub fn new(layers: Vec<Arc<Layer>>) -> Delta {
        assert!(!layers.is_empty(), "a delta has a layer that takes its writes");
        Delta { layers }
    }

    fn top(&self) -> &Arc<Layer> {
        self.layers.last().expect("never empty")
    }

    /// The layers, lowest first.
    pub fn layers(&self) -> &[Arc<Layer>] {
        &self.layers
    }

    /// The same with one more on top.
    pub fn with_top(&self, top: Arc<Layer>) -> Delta {
        Delta { layers: self.layers.iter().cloned().chain([top]).collect() }
    }

    /// Ends the writes to the top layer; see [`Layer::seal`].
    pub fn seal_top(&self, swap: impl FnOnce()) {
        self.top().seal(swap);
    }

    /// The first pages at or after `at` of which a layer says anything, and whether they are all zeros; neighbours that are alike are one run, but for a bound on those with bytes. `None`: there are none before `end`.
    pub fn next_change(&self, at: PageIndex, end: PageIndex) -> Option<(PageIndex, u64, bool)> {
        let mut found: Option<(PageIndex, u64, bool)> = None;
        let mut at = at;
        while at < end {
            let run = self.run(at, end.0 - at.0);
            at.0 += run.pages;
            let is_zero = match run.source {
                Source::Base if found.is_some() => break,
                Source::Base => continue,
                Source::Zero => true,
                Source::Data { .. } => false,
            };
            match &mut found {
                None => found = Some((run.first, run.pages, is_zero)),
                Some((_, pages, zero)) if *zero == is_zero => *pages += run.pages,
                Some(_) => break,
            }
            if found.is_some_and(|(_, pages, zero)| !zero && pages >= MOST_CHANGED) {
                break;
            }
        }
        found
    }

    /// The run that starts at `at`, at most `limit` pages of it (at least 1). Runs may be told in pieces.
    #[inline]
    pub fn run(&self, at: PageIndex, limit: u64) -> Run {
        let mut limit = limit;
        for (layer, below) in self.layers.iter().enumerate().rev() {
            let (state, pages, pin) = below.run(at, limit);
            let source = match state.kind() {
                PageKind::Base => {
                    limit = pages;
                    continue;
                }
                PageKind::Zero => Source::Zero,
                PageKind::Data(slot) => Source::Data { layer, slot },
            };
            return Run { first: at, pages, source, _pin: Some(pin) };
        }
        Run { first: at, pages: limit, source: Source::Base, _pin: None }
    }

    /// Reads from a run of [`Source::Data`], `skip` bytes from its start. May wait for the disk.
    pub fn read(&self, run: &Run, skip: u64, buf: &mut [u8]) -> Result<(), DeltaError> {
        let Source::Data { layer, slot } = run.source else {
            debug_assert!(false, "only data has bytes");
            return Ok(());
        };
        debug_assert!(skip + buf.len() as u64 <= run.pages * PAGE_SIZE);
        self.layers[layer].read(slot, skip, buf)
    }

    /// Like [`Delta::read`] if no disk is needed; `false` where it would wait.
    pub fn read_nowait(&self, run: &Run, skip: u64, buf: &mut [u8]) -> Result<bool, DeltaError> {
        let Source::Data { layer, slot } = run.source else {
            debug_assert!(false, "only data has bytes");
            return Ok(true);
        };
        self.layers[layer].read_nowait(slot, skip, buf)
    }

    /// Writes whole pages; see [`Layer::write`].
    pub fn write(&self, first: PageIndex, bytes: &[u8]) -> Result<(), DeltaError> {
        self.check_sealed()?;
        self.top().write(first, bytes)
    }

    /// Refuses writes where a layer below can't be made durable any more: no FLUSH would ever do well again.
    fn check_sealed(&self) -> Result<(), DeltaError> {
        let (_, sealed) = self.layers.split_last().expect("never empty");
        sealed.iter().try_for_each(|layer| layer.check_poison())
    }

    /// Does writes that came together; see [`Layer::write_together`].
    pub fn write_together(&self, writes: &[PageWrite<'_>]) -> Result<(), DeltaError> {
        self.check_sealed()?;
        self.top().write_together(writes)
    }

    /// Makes whole pages zero, at a cost by extents.
    pub fn zero(&self, first: PageIndex, pages: u64) -> Result<(), DeltaError> {
        self.check_sealed()?;
        self.top().set(first, pages, PageState::ZERO)
    }

    /// Makes durable all that was written before the call.
    pub fn flush(&self) -> Result<(), DeltaError> {
        let (top, sealed) = self.layers.split_last().expect("never empty");
        // From the bottom up. One that was sealed a moment ago may have what nobody flushed yet.
        sealed.iter().try_for_each(|layer| layer.settle())?;
        top.flush()
    }

    /// Whether a commit should be made though nobody asked.
    pub fn wants_commit(&self) -> bool {
        self.top().wants_commit()
    }

    /// Whether anything waits for a flush.
    pub fn has_pending(&self) -> bool {
        self.layers.iter().any(|layer| layer.has_pending())
    }

    /// Whether no page was ever written or zeroed.
    pub fn is_empty(&self) -> bool {
        self.layers.iter().all(|layer| layer.is_empty())
    }

    /// Pages that take space, over all layers.
    pub fn data_pages(&self) -> u64 {
        self.layers.iter().map(|layer| layer.data_pages()).sum()
    }
}
