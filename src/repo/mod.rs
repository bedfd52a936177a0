//! Repositories: images, their branches, tags and commits, read and written on a store.
//!
//! Enters: names, commits and bytes to store; untrusted bytes from a store. Leaves: verified chunks, commits and refs.
//! Invariants: nothing is handed out that was not checked against the hash its parent holds; objects are written before what names them
//! and a ref moves last, by compare-and-swap.
//!
//! - [`repository`]: make and open one, list it.
//! - [`refs`]: branches and tags. [`resolve`]: what a name stands for.
//! - [`history`]: the commits behind some commits, newest first.
//! - [`naming`]: refs made and deleted by hand, so that nothing is lost.
//! - [`verify`], [`fsck`]: whether it is all there, and all right.
//! - [`hold`], [`gc`]: what keeps objects that no ref names yet, and what takes those that none names any more.
//! - [`squash`]: a history with fewer commits.
//! - [`sync`]: a repository copied to another place.
//! - [`version`]: one opened commit: chunk tables by block, chunks by location.
//! - [`writer`]: a stream of bytes to a new commit.
//! - [`map_builder`]: a map from a parent's map and the blocks that changed.

pub mod block_writer;
mod clock_cache;
mod closure;
mod commits;
pub mod error;
pub mod fetch;
mod flights;
pub mod fsck;
pub mod gc;
pub mod history;
pub mod hold;
mod keys;
mod known;
pub mod map_builder;
pub mod meta;
pub mod names;
pub mod naming;
pub mod refs;
pub mod repository;
mod rescue;
pub mod resolve;
pub mod squash;
pub mod sync;
pub mod verify;
pub mod version;
pub mod writer;

pub use block_writer::BlockWriter;
pub use error::RepoError;
pub use history::History;
pub use hold::{Hold, HoldOptions};
pub use known::known_chunks;
pub use map_builder::{MapBase, MapBuilder};
pub use meta::{MetaCache, NoMetaCache};
pub use names::{BranchName, ImageName, RefSpec, Reference, TagName};
pub use refs::{BranchTip, TagState};
pub use repository::Repository;
pub use resolve::Resolved;
pub use version::{Version, VersionOptions};
pub use writer::{CommitMeta, Finished, ImageWriter, WriteStats, WriterParams};
