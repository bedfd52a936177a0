//! What can be asked of the files of one filesystem, and the stream that answers.
//!
//! Enters: a request. Leaves: lines of JSON for a listing, bytes for a content or an archive. The work is a task of its own, which ends when nobody reads any more.

use super::changes::Ranges;
use super::diff::{Comparison, DiffOptions};
use super::ext4::Ext4;
use super::list::ListOptions;
use super::{FilePath, Outlet, Stream, archive, content, list};

/// What is asked.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Request {
    /// A listing.
    List {
        /// Of what.
        path: FilePath,
        /// How.
        options: ListOptions,
    },
    /// The bytes of a file.
    Content {
        /// Which.
        path: FilePath,
    },
    /// A tar archive.
    Archive {
        /// Of what.
        path: FilePath,
    },
}

/// Answers.
pub fn answer(filesystem: Ext4, request: Request) -> Stream {
    let (mut out, from) = Outlet::new();
    Stream::new(from, async move {
        let done = match &request {
            Request::List { path, options } => list::list(&filesystem, path, *options, &mut out).await,
            Request::Content { path } => content::cat(&filesystem, path, &mut out).await,
            Request::Archive { path } => archive::export(&filesystem, path, &mut out).await,
        };
        out.end(done).await;
    })
}

/// Tells what changed, as lines of JSON.
pub fn compare(old: Ext4, new: Ext4, ranges: Ranges, options: DiffOptions) -> Stream {
    let (mut out, from) = Outlet::new();
    Stream::new(from, async move {
        let done = async {
            let comparison = Comparison::new(old, new, ranges).await?;
            comparison.run(options, &mut out).await
        };
        let done = done.await;
        out.end(done).await;
    })
}
