//! A volume's own writes: copy-on-write in 4 KiB pages, as a stack of layers over a commit.
//!
//! Enters: whole pages to write, ranges to zero, FLUSH. Leaves: for each page whether it is base, zero, or these bytes.
//! Invariant: see FORMAT.md, "Why a crash can't lose or tear". All calls may block on the disk; `*_nowait` calls do not.

pub mod disk;
mod error;
mod in_place;
mod layer;
mod log;
pub mod page_map;
pub mod simulated;
mod slots;
mod stack;
mod tail;

pub use crate::format::delta::{LayerId, Slot, VolumeId};
pub use error::DeltaError;
pub use layer::{Binding, DATA_FILE, Identity, Layer, PageWrite, Pin};
pub use log::MAP_FILE;
pub use stack::{Delta, Run, Source};
