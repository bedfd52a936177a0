//! Files of volumes over the API: what is asked, and the streams that answer.
//!
//! Enters: a volume, a version, paths. Leaves: lines of JSON, bytes, archives. Invariant: what can be refused is refused before the answer begins; an answer that fails later is cut short, never ended as
//! if it were whole, and the log says why. A stream that nobody reads holds no more than its few pieces.

use std::time::Duration;

use axum::Json;
use axum::body::{Body, Bytes};
use axum::extract::rejection::JsonRejection;
use axum::extract::{Path, State};
use axum::http::HeaderValue;
use axum::http::header::CONTENT_TYPE;
use axum::response::Response;
use futures_util::stream;
use serde::{Deserialize, Serialize};
use tokio::sync::OwnedSemaphorePermit;
use utoipa::ToSchema;

use super::api::Failure;
use super::failure::Refused;
use super::routes::{Shared, name_of};
use crate::files::changes::Ranges;
use crate::files::diff::DiffOptions;
use crate::files::list::ListOptions;
use crate::files::request::{Request, answer, compare};
use crate::files::{FilePath, FilesError, Outlet, Stream};
use crate::host::{Compared, HostError};
use crate::repo::Reference;
use crate::volume::VolumeName;

/// Answers about files that are under way at once: a large directory, or a comparison, takes memory.
pub(super) const MOST_READERS: usize = 8;
/// How long others wait for theirs: somebody's pager may hold one for a day.
const TURN_LIMIT: Duration = Duration::from_secs(60);
/// One JSON value a line.
const LINES: &str = "application/x-ndjson";
const BYTES: &str = "application/octet-stream";

/// What is asked of files.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "lowercase")]
pub enum FilesVerb {
    /// Their names, or what their inodes say.
    Ls,
    /// The bytes of one.
    Cat,
    /// A tar archive.
    Export,
}

/// A request about the files of a volume.
#[derive(Clone, Debug, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct FilesRequest {
    /// What is to be done.
    #[serde(rename = "do")]
    pub verb: FilesVerb,
    /// The version: a branch, tag or commit, with or without `~N`; absent: the volume as it is now.
    #[serde(default, rename = "ref", skip_serializing_if = "Option::is_none")]
    pub reference: Option<String>,
    /// The path, from the root; text, or `{"hex": ...}` where it is none.
    #[schema(value_type = String)]
    pub path: FilePath,
    /// List what the inodes say.
    #[serde(default)]
    pub long: bool,
    /// List everything below.
    #[serde(default)]
    pub recursive: bool,
    /// List a directory itself.
    #[serde(default)]
    pub directory: bool,
}

/// A question what changed.
#[derive(Clone, Debug, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct VolumeDiff {
    /// The older version; absent: what the volume stands on. To be given where `new` is.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub old: Option<String>,
    /// The newer version; absent: the volume as it is now.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub new: Option<String>,
    /// Where the disks differ, as `[start, length]`, not which files.
    #[serde(default)]
    pub blocks: bool,
    /// Files that were renamed are one that went and one that came.
    #[serde(default)]
    pub no_renames: bool,
    /// Count the changed lines of texts.
    #[serde(default)]
    pub lines: bool,
    /// And show them.
    #[serde(default)]
    pub patch: bool,
}

impl FilesRequest {
    /// A request as it is sent.
    pub fn new(reference: Option<&Reference>, request: &Request) -> FilesRequest {
        let (verb, path, options) = match request {
            Request::List { path, options } => (FilesVerb::Ls, path, *options),
            Request::Content { path } => (FilesVerb::Cat, path, ListOptions::default()),
            Request::Archive { path } => (FilesVerb::Export, path, ListOptions::default()),
        };
        let ListOptions { long, recursive, directory } = options;
        let reference = reference.map(ToString::to_string);
        FilesRequest { verb, reference, path: path.clone(), long, recursive, directory }
    }

    fn request(&self) -> Request {
        // As users write paths.
        let path = FilePath::new(self.path.as_bytes());
        match self.verb {
            FilesVerb::Ls => {
                let FilesRequest { long, recursive, directory, .. } = *self;
                Request::List { path, options: ListOptions { long, recursive, directory } }
            }
            FilesVerb::Cat => Request::Content { path },
            FilesVerb::Export => Request::Archive { path },
        }
    }
}

impl VolumeDiff {
    /// A question for files.
    pub fn new(old: Option<&Reference>, new: Option<&Reference>, options: DiffOptions) -> VolumeDiff {
        let (old, new) = (old.map(ToString::to_string), new.map(ToString::to_string));
        let DiffOptions { renames, lines, patch } = options;
        VolumeDiff { old, new, blocks: false, no_renames: !renames, lines, patch }
    }

    /// A question for ranges.
    pub fn blocks(old: Option<&Reference>, new: Option<&Reference>) -> VolumeDiff {
        VolumeDiff { blocks: true, ..VolumeDiff::new(old, new, DiffOptions::default()) }
    }
}

fn reference(text: Option<&String>) -> Result<Option<Reference>, Refused> {
    text.map(|text| text.parse().map_err(Refused::bad_request)).transpose()
}

/// Files of a volume, as it is now or in any version of its image: listed (an entry of JSON a line), read, or as a tar archive
#[utoipa::path(post, path = "/v1/volumes/{name}/files", params(("name" = String, Path, description = "The volume's name")),
    request_body = FilesRequest, responses((status = 200, body = String, content_type = "application/octet-stream"), (status = 400, body = Failure),
        (status = 404, body = Failure), (status = 422, body = Failure), (status = 502, body = Failure), (status = 503, body = Failure), (status = 504, body = Failure)))]
pub(super) async fn files(
    State(shared): State<Shared>,
    Path(name): Path<String>,
    wanted: Result<Json<FilesRequest>, JsonRejection>,
) -> Result<Response, Refused> {
    let (name, Json(wanted)) = (name_of(&name)?, wanted?);
    let version = reference(wanted.reference.as_ref())?;
    let turn = turn(&shared).await?;
    let filesystem = shared.host.filesystem(&name, version.as_ref()).await?;
    let content = if wanted.verb == FilesVerb::Ls { LINES } else { BYTES };
    streamed(name, answer(filesystem, wanted.request()), content, turn).await
}

/// What changed in a volume, or between two versions of its image: a change of JSON a line
#[utoipa::path(post, path = "/v1/volumes/{name}/diff", params(("name" = String, Path, description = "The volume's name")),
    request_body = VolumeDiff, responses((status = 200, body = String, content_type = "application/x-ndjson"), (status = 400, body = Failure),
        (status = 404, body = Failure), (status = 422, body = Failure), (status = 502, body = Failure), (status = 503, body = Failure), (status = 504, body = Failure)))]
pub(super) async fn diff(
    State(shared): State<Shared>,
    Path(name): Path<String>,
    wanted: Result<Json<VolumeDiff>, JsonRejection>,
) -> Result<Response, Refused> {
    let (name, Json(wanted)) = (name_of(&name)?, wanted?);
    let (old, new) = (reference(wanted.old.as_ref())?, reference(wanted.new.as_ref())?);
    let (old, new) = (old.as_ref(), new.as_ref());
    if new.is_some() && old.is_none() {
        return Err(Refused::bad_request("what is 'new' to be compared with? 'old' is absent"));
    }
    let turn = turn(&shared).await?;
    if wanted.blocks {
        let ranges = shared.host.differing(&name, old, new).await?;
        return streamed(name, told(ranges), LINES, turn).await;
    }
    let Compared { old, new, ranges } = shared.host.compared(&name, old, new).await?;
    let options = DiffOptions { renames: !wanted.no_renames, lines: wanted.lines, patch: wanted.patch };
    streamed(name, compare(old, new, ranges, options), LINES, turn).await
}

/// Ranges as lines.
fn told(ranges: Ranges) -> Stream {
    let (mut out, from) = Outlet::new();
    Stream::new(from, async move {
        let telling = async {
            for range in ranges.iter() {
                out.send_line(&(range.start.0, range.len().0)).await?;
            }
            Ok(())
        };
        let told = telling.await;
        out.end(told).await;
    })
}

/// A stream as an answer; what fails before its first piece is a refusal.
async fn streamed(
    name: VolumeName,
    mut stream: Stream,
    content: &'static str,
    turn: OwnedSemaphorePermit,
) -> Result<Response, Refused> {
    let refused = |source: FilesError| {
        Refused::from(HostError::Files { volume: name.to_string(), source: Box::new(source) })
    };
    let first: Option<Bytes> = stream.recv().await.transpose().map_err(refused)?;
    // The turn ends with the answer.
    type Rest = (VolumeName, Stream, OwnedSemaphorePermit);
    let rest = |(name, mut stream, turn): Rest| async move {
        let piece = stream.recv().await?;
        if let Err(error) = &piece {
            tracing::warn!(volume = %name, %error, "an answer about files was cut short");
        }
        Some((piece, (name, stream, turn)))
    };
    let first = stream::iter(first.map(Ok));
    let all = futures_util::StreamExt::chain(first, stream::unfold((name, stream, turn), rest));
    let mut response = Response::new(Body::from_stream(all));
    response.headers_mut().insert(CONTENT_TYPE, HeaderValue::from_static(content));
    Ok(response)
}

async fn turn(shared: &Shared) -> Result<OwnedSemaphorePermit, Refused> {
    let waiting = shared.readers.clone().acquire_owned();
    let turn = tokio::time::timeout(TURN_LIMIT, waiting).await.map_err(|_| Refused::busy(MOST_READERS))?;
    turn.map_err(|_| Refused::from(HostError::Stopping))
}
