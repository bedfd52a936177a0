//! What a run of `gc` came to.
//!
//! Enters: objects, as they are found. Leaves: counts and bytes, each kind by itself.

use std::time::SystemTime;

use crate::units::ByteLen;

/// Objects and their bytes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Amount {
    /// How many.
    pub objects: u64,
    /// Their bytes.
    pub bytes: u64,
}

impl Amount {
    pub(super) fn add(&mut self, len: u64) {
        self.objects += 1;
        self.bytes += len;
    }

    pub(super) fn add_all(&mut self, other: Amount) {
        self.objects += other.objects;
        self.bytes += other.bytes;
    }

    /// The bytes.
    pub fn len(&self) -> ByteLen {
        ByteLen(self.bytes)
    }
}

/// What a run came to.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct GcReport {
    /// Images looked at.
    pub images: u64,
    /// What refs and holds name.
    pub reachable: Amount,
    /// What was found unreachable now, and is on a list since.
    pub condemned: Amount,
    /// What is on a list and has not been there for long enough.
    pub waiting: Amount,
    /// When the first of it may go, by the store's clock.
    pub due: Option<SystemTime>,
    /// What was deleted; in a dry run, what would have been.
    pub deleted: Amount,
    /// What was on a list and is named again.
    pub spared: u64,
    /// Who is waited for: pushes under way since before a list was published.
    pub pushes: Vec<String>,
    /// Lists that another gc is deleting.
    pub others: u64,
    /// Holds whose time was over.
    pub expired: u64,
}
