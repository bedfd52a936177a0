//! How far an image is: counters the CLI's progress bar reads from another thread.
//!
//! Enters: increments from the scan and the reader. Leaves: numbers, and the wish to stop.
//! Invariant: counters only grow; the totals are final once the phase is past [`Phase::Scan`].

use std::sync::atomic::{AtomicBool, AtomicU8, AtomicU64, Ordering::Relaxed};

use crate::units::ByteLen;

/// What is being done.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Phase {
    /// The directory is walked; totals still grow.
    Scan,
    /// The filesystem is laid out, by another program perhaps.
    Layout,
    /// Contents are read and the image is emitted.
    Read,
    /// The last byte went to the sink.
    Done,
}

/// Counters of one image, shared with whoever shows them.
#[derive(Debug, Default)]
pub struct Progress {
    phase: AtomicU8,
    cancelled: AtomicBool,
    entries_found: AtomicU64,
    files_total: AtomicU64,
    files_done: AtomicU64,
    bytes_total: AtomicU64,
    bytes_done: AtomicU64,
}

impl Progress {
    /// All at zero.
    pub fn new() -> Progress {
        Progress::default()
    }

    /// What is being done now.
    pub fn phase(&self) -> Phase {
        match self.phase.load(Relaxed) {
            0 => Phase::Scan,
            1 => Phase::Layout,
            2 => Phase::Read,
            _ => Phase::Done,
        }
    }

    /// Directory entries of every kind the scan has seen.
    pub fn entries_found(&self) -> u64 {
        self.entries_found.load(Relaxed)
    }

    /// Regular files with content.
    pub fn files_total(&self) -> u64 {
        self.files_total.load(Relaxed)
    }

    /// Of these, how many are read.
    pub fn files_done(&self) -> u64 {
        self.files_done.load(Relaxed)
    }

    /// Bytes to be read: contents without holes.
    pub fn bytes_total(&self) -> ByteLen {
        ByteLen(self.bytes_total.load(Relaxed))
    }

    /// Of these, how many are read.
    pub fn bytes_done(&self) -> ByteLen {
        ByteLen(self.bytes_done.load(Relaxed))
    }

    /// Asks the image to stop; it then fails with [`ImageError::Cancelled`](super::ImageError::Cancelled) soon,
    /// after having put away what it made (temporary files, mounts).
    pub fn cancel(&self) {
        self.cancelled.store(true, Relaxed);
    }

    /// Whether it was asked to stop.
    pub fn is_cancelled(&self) -> bool {
        self.cancelled.load(Relaxed)
    }

    pub(crate) fn enter(&self, phase: Phase) {
        self.phase.store(phase as u8, Relaxed);
    }

    pub(crate) fn found(&self) {
        self.entries_found.fetch_add(1, Relaxed);
    }

    pub(crate) fn to_read(&self, bytes: u64) {
        self.files_total.fetch_add(1, Relaxed);
        self.bytes_total.fetch_add(bytes, Relaxed);
    }

    pub(crate) fn read(&self, bytes: u64) {
        self.bytes_done.fetch_add(bytes, Relaxed);
    }

    pub(crate) fn file_done(&self) {
        self.files_done.fetch_add(1, Relaxed);
    }
}
