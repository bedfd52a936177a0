//! Repositories: images, their branches, tags and commits, read and written on a store.
//!
//! Enters: names, commits and bytes to store; untrusted bytes from a store. Leaves: verified chunks, commits and refs.
//! Invariants: nothing is handed out that was not checked against the hash its parent holds; objects are written before what names them
//! and a ref moves last, by compare-and-swap.
//!
//! - [`repository`]: make and open one, list, resolve, move refs.
//! - [`sync`]: a repository copied to another place.
//! - [`compare`]: where two commits differ.
//! - [`version`]: one opened commit: chunk tables by block, chunks by location.
//! - [`writer`]: a stream of bytes to a new commit.
//! - [`map_builder`]: a map from a parent's map and the blocks that changed.

pub mod block_writer;
mod clock_cache;
pub mod compare;
pub mod error;
pub mod fetch;
mod flights;
mod keys;
mod known;
pub mod map_builder;
pub mod meta;
pub mod names;
pub mod repository;
pub mod sync;
pub mod version;
pub mod writer;

pub use block_writer::BlockWriter;
pub use error::RepoError;
pub use known::known_chunks;
pub use map_builder::{MapBase, MapBuilder};
pub use meta::{MetaCache, NoMetaCache};
pub use names::{BranchName, ImageName, RefSpec, Reference, TagName};
pub use repository::{BranchTip, Repository, Resolved};
pub use version::{Version, VersionOptions};
pub use writer::{CommitMeta, Finished, ImageWriter, WriteStats, WriterParams};
