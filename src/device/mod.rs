//! A writable disk: a delta over a commit, in bytes.
//!
//! Enters: reads, writes, zeroes, trims and flushes at any byte offset. Leaves: bytes, in pieces that need not be copied; extents.
//! Invariant: every page reads as its newest acknowledged write, or as the commit has it; partial pages never lose a neighbour's bytes.
//!
//! Each request comes in two forms. The `*_now` form does all that can be done without waiting, and says so when something must be waited for (a chunk to be
//! fetched, a page of a file to be read, another write to the same page); it is for the thread that serves a connection. The `async` form then waits; it is
//! for a task of its own.

mod ahead;
mod base;
mod error;
mod fence;
mod read;
mod status;
mod stripes;
mod touched;
mod view;
mod write;

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use arc_swap::ArcSwap;
use parking_lot::Mutex;

use crate::delta::Delta;
use crate::units::{ByteLen, ByteRange};

pub use base::{Base, BaseError, Brought};
pub use error::DeviceError;
pub use fence::Fence;
pub use read::Piece;
pub use status::{Allocation, Dirty, Extent};
use stripes::Stripes;
pub use view::View;

/// So many writes that came together need no memory of their own.
pub const TOGETHER: usize = 64;

/// Whether a request could be done without waiting.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Now {
    /// It is done.
    Done,
    /// Something must be waited for: use the `async` form. What was done so far is harmless to do again.
    Wait,
}

/// A disk. Requests may come from any number of threads at once.
pub struct Device {
    /// What it reads through now. A request loads it once and keeps to it; a seal or a new base puts another one in its place.
    view: ArcSwap<View>,
    /// Held by who puts another view in its place.
    changing: Mutex<()>,
    read_only: bool,
    size: ByteLen,
    stripes: Stripes,
    /// A commit nobody asked for is under way.
    committing: AtomicBool,
}

impl Device {
    /// A device of `size` bytes: `base`, and where that ends zeros, under `delta`. Without a delta it can't be written to.
    pub fn new(base: Base, delta: Option<Delta>, size: ByteLen) -> Device {
        Device::over(Arc::new(base), delta, size)
    }

    fn over(base: Arc<Base>, delta: Option<Delta>, size: ByteLen) -> Device {
        let read_only = delta.is_none();
        Device {
            view: ArcSwap::from_pointee(View::new(base, delta)),
            changing: Mutex::new(()),
            read_only,
            size,
            stripes: Stripes::new(),
            committing: AtomicBool::new(false),
        }
    }

    /// The same, refusing writes.
    pub fn into_read_only(self) -> Device {
        Device { read_only: true, ..self }
    }

    /// Bytes.
    pub fn size(&self) -> ByteLen {
        self.size
    }

    /// Whether writes are refused.
    pub fn is_read_only(&self) -> bool {
        self.read_only
    }

    /// What it reads through at the moment.
    pub fn view(&self) -> Arc<View> {
        self.view.load_full()
    }

    /// What it stands on at the moment.
    pub fn base(&self) -> Arc<Base> {
        self.view.load().base().clone()
    }

    /// Its own writes, at the moment; `None` where there are none and never will be.
    pub fn delta(&self) -> Option<Arc<Delta>> {
        self.view.load().delta().cloned()
    }

    fn check(&self, range: ByteRange) -> Result<(), DeviceError> {
        if range.end.0 > self.size.0 {
            return Err(DeviceError::OutOfRange { end: range.end, size: self.size });
        }
        Ok(())
    }

    /// Makes durable everything acknowledged before the call. Blocks on the disk.
    pub fn flush(&self) -> Result<(), DeviceError> {
        // The newest: it has all layers that were ever written to and are not in a commit.
        match self.delta() {
            Some(delta) => Ok(delta.flush()?),
            None => Ok(()),
        }
    }

    /// Whether so much has gathered that a flush should be made though nobody asked. `true` once, until [`Device::commit_unasked`] has run.
    #[inline]
    pub fn claim_unasked_commit(&self) -> bool {
        self.view.load().delta().is_some_and(|delta| delta.wants_commit())
            && !self.committing.swap(true, Ordering::AcqRel)
    }

    /// The flush that [`Device::claim_unasked_commit`] called for. Blocks on the disk.
    pub fn commit_unasked(&self) -> Result<(), DeviceError> {
        let result = self.flush();
        self.committing.store(false, Ordering::Release);
        result
    }
}
