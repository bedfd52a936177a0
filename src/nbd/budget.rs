//! Memory for requests that wait, over all connections of a server.
//!
//! Invariant: a connection with nothing under way may always begin, so that none waits for another; beyond that, what is under way is about no
//! more bytes than the budget has.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

/// Bytes that requests under way may be about, and one more request a connection, or the small ones it received at once.
const BYTES: u64 = 256 << 20;

/// So much is taken.
#[derive(Default)]
pub struct Budget {
    taken: AtomicU64,
}

impl Budget {
    /// Whether no request should begin but those of connections with nothing under way.
    #[inline]
    pub fn is_spent(&self) -> bool {
        self.taken.load(Ordering::Relaxed) >= BYTES
    }

    /// Takes what a request is about, until the share is dropped.
    pub fn take(self: &Arc<Self>, bytes: u64) -> Share {
        self.taken.fetch_add(bytes, Ordering::Relaxed);
        Share { budget: self.clone(), bytes }
    }
}

/// What one request has of a budget.
pub struct Share {
    budget: Arc<Budget>,
    bytes: u64,
}

impl Drop for Share {
    fn drop(&mut self) {
        self.budget.taken.fetch_sub(self.bytes, Ordering::Relaxed);
    }
}
