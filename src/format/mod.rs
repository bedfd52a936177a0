//! Bytes to values and back, as FORMAT.md lays them down; no I/O.
//!
//! Enters: bytes from anywhere, not trusted. Leaves: values whose invariants hold, or a [`FormatError`] that says which field is
//! wrong. Invariant: no input makes these functions panic or allocate more than a small multiple of its own length.

pub mod base_object;
pub mod cache_index;
pub mod chunk;
pub mod chunk_table;
pub mod commit;
pub mod condemned;
pub mod delta;
pub mod hold;
pub mod ids;
pub mod map_node;
pub mod prefetch_list;
pub mod refs;
pub mod repository;
pub mod text;

pub use chunk::{ChunkSize, VerifiedChunk};
pub use chunk_table::{ChunkEntry, ChunkLocation, ChunkTable, Codec};
pub use commit::{BlockSize, Commit, Filesystem, MapRoot, Timestamp};
pub use ids::{ChunkId, CommitId, NodeId, ObjectId, TableId};
pub use prefetch_list::PrefetchList;

/// What is wrong with some bytes that should have been one of the formats.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum FormatError {
    /// Fewer bytes than the format needs, or more.
    #[error("{what}: {actual} bytes, expected {expected}")]
    Length {
        /// The thing that was read.
        what: &'static str,
        /// Bytes it must have, or at least have.
        expected: u64,
        /// Bytes there were.
        actual: u64,
    },
    /// The first bytes are not those of the format.
    #[error("not a {what}: wrong magic")]
    Magic {
        /// The thing that was expected.
        what: &'static str,
    },
    /// A version this build does not read.
    #[error("{what} version {found}, this build reads {min}..={max}")]
    Version {
        /// The thing that was read.
        what: &'static str,
        /// Its version.
        found: u64,
        /// Oldest version known.
        min: u64,
        /// Newest version known.
        max: u64,
    },
    /// A checksum or hash that does not match.
    #[error("{what}: checksum does not match, the bytes are damaged")]
    Checksum {
        /// The thing that was read.
        what: &'static str,
    },
    /// Content whose hash is not the id it was asked for by.
    #[error("{what} {expected} is damaged: its bytes hash to {actual}")]
    Hash {
        /// The kind of thing.
        what: &'static str,
        /// The id asked for.
        expected: String,
        /// What the bytes hash to.
        actual: String,
    },
    /// A field with a value it can't have.
    #[error("{what}: field {field} can't be {value}")]
    Field {
        /// The thing that was read.
        what: &'static str,
        /// The field.
        field: &'static str,
        /// Its value, as read.
        value: String,
    },
}

impl FormatError {
    /// Refuses every version of a binary format but the one there is.
    fn check_version(what: &'static str, found: u16, known: u16) -> Result<(), FormatError> {
        if found == known {
            return Ok(());
        }
        Err(FormatError::Version { what, found: found.into(), min: known.into(), max: known.into() })
    }
}
