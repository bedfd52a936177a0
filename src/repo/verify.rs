//! `verify`: every object of a version, or of all, is read and checked against its name.
//!
//! Enters: an image and commits of it. Leaves: counts, and each object that is damaged or missing. Invariant: what is counted as good was read in full and hashes to its name;
//! every range that a table names lies within its object. A store that can't be asked is an error and no damage.

use std::collections::HashMap;
use std::sync::Arc;

use futures_util::{StreamExt, stream};

use super::closure::{Walk, is_damage};
use super::meta::{NoMetaCache, named_object_error, on_blocking_thread};
use super::{ImageName, MetaCache, RepoError, Repository, keys};
use crate::format::condemned::Condemned;
use crate::format::{CommitId, FormatError, ObjectId};
use crate::store::Key;
use crate::units::ByteLen;

/// Objects that are read at once.
const AT_ONCE: usize = 8;
/// Bytes of an object that are read at a time.
const PIECE: u64 = 4 << 20;

/// Something that is not as it should be.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Problem {
    /// The object.
    pub key: Key,
    /// What is wrong with it.
    pub what: String,
}

/// What was looked at.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct VerifyReport {
    /// Commits read and checked.
    pub commits: u64,
    /// Map nodes, likewise.
    pub nodes: u64,
    /// Chunk tables, likewise.
    pub tables: u64,
    /// Base objects, likewise.
    pub objects: u64,
    /// Their bytes.
    pub bytes: u64,
    /// What is damaged or missing, by key.
    pub problems: Vec<Problem>,
}

/// Reads and checks the commits, with their histories if `history` is set, and everything below them. `progress` is told of bytes as they are read.
pub async fn verify(
    repo: &Repository,
    image: &ImageName,
    commits: Vec<CommitId>,
    history: bool,
    progress: &(dyn Fn(ByteLen) + Send + Sync),
) -> Result<VerifyReport, RepoError> {
    let meta: Arc<dyn MetaCache> = Arc::new(NoMetaCache);
    let mut walk = Walk::new(repo, image, &meta).tolerate();
    match history {
        true => walk.history(commits).await?,
        false => {
            for id in commits {
                walk.commit(id, None).await?;
            }
        }
    }
    let lens = lens(repo, image).await?;
    let mut problems: Vec<Problem> = walk.problems().iter().filter_map(problem).collect();
    let closure = &walk.closure;
    let mut report = VerifyReport {
        commits: closure.commits.len() as u64,
        nodes: closure.nodes.len() as u64,
        tables: closure.tables.len() as u64,
        ..VerifyReport::default()
    };
    let objects: Vec<(ObjectId, u64, Option<u64>)> =
        closure.objects.iter().map(|(id, end)| (*id, *end, lens.get(id).copied())).collect();
    let reads = stream::iter(objects).map(|(id, end, len)| async move {
        let read = read_whole(repo, image, id, end, len, progress).await;
        (id, read)
    });
    let mut reads = reads.buffer_unordered(AT_ONCE);
    while let Some((_, read)) = reads.next().await {
        match read {
            Ok(len) => {
                report.objects += 1;
                report.bytes += len;
            }
            Err(error) if is_damage(&error) => problems.extend(problem(&error)),
            Err(error) => return Err(error),
        }
    }
    // A table that is damaged and the object it lies in are one problem each; one object is named once.
    problems.sort_by(|a, b| a.key.cmp(&b.key));
    problems.dedup_by(|a, b| a.key == b.key);
    let damaged = |kind: &str| {
        problems.iter().filter(|problem| problem.key.as_str().contains(&format!("/{kind}/"))).count() as u64
    };
    report.commits -= damaged("commits").min(report.commits);
    report.nodes -= damaged("maps").min(report.nodes);
    report.problems = problems;
    Ok(report)
}

/// What the refs of an image name, and the refs that can't be read.
pub async fn roots(repo: &Repository, image: &ImageName) -> Result<(Vec<CommitId>, Vec<Problem>), RepoError> {
    let (mut commits, mut problems) = (Vec::new(), Vec::new());
    for (dir, kind) in [(keys::heads(image), "heads"), (keys::tags(image), "tags")] {
        for name in repo.names_below(&dir).await? {
            match repo.ref_target(image, &format!("{kind}/{name}")).await {
                Ok(commit) => commits.extend(commit),
                Err(error) if is_damage(&error) => problems.extend(problem(&error)),
                Err(error) => return Err(error),
            }
        }
    }
    Ok((commits, problems))
}

/// The lengths of an image's base objects.
pub(super) async fn lens(repo: &Repository, image: &ImageName) -> Result<HashMap<ObjectId, u64>, RepoError> {
    let mut lens = HashMap::new();
    repo.listed(&keys::blocks(image), |listed| {
        if let Some(Condemned::Object(id)) = keys::parse(image, &listed.key) {
            lens.insert(id, listed.len);
        }
    })
    .await?;
    Ok(lens)
}

/// The object an error is about, and what it says.
pub(super) fn problem(error: &RepoError) -> Option<Problem> {
    use crate::store::StoreError;
    let key = match error {
        RepoError::Damaged { key, .. }
        | RepoError::Missing { key, .. }
        | RepoError::RefMisplaced { key, .. } => key,
        RepoError::Store(
            StoreError::NotFound { key, .. }
            | StoreError::ShortBody { key, .. }
            | StoreError::TooLong { key, .. },
        ) => key,
        _ => return None,
    };
    Some(Problem { key: key.clone(), what: error.to_string() })
}

/// That an object is as long as what names its parts says.
pub(super) fn check_len(
    repo: &Repository,
    image: &ImageName,
    id: ObjectId,
    end: u64,
    len: Option<u64>,
) -> Result<u64, RepoError> {
    let key = keys::object(image, &id);
    match len {
        None => Err(RepoError::Missing { place: repo.describe(), key }),
        Some(len) if len < end => Err(RepoError::Damaged {
            place: repo.describe(),
            key,
            source: FormatError::Length { what: ObjectId::WHAT, expected: end, actual: len },
        }),
        Some(len) => Ok(len),
    }
}

async fn read_whole(
    repo: &Repository,
    image: &ImageName,
    id: ObjectId,
    end: u64,
    len: Option<u64>,
    progress: &(dyn Fn(ByteLen) + Send + Sync),
) -> Result<u64, RepoError> {
    let len = check_len(repo, image, id, end, len)?;
    let (key, store) = (keys::object(image, &id), repo.store());
    let mut hasher = blake3::Hasher::new();
    let mut at = 0;
    while at < len {
        let to = (at + PIECE).min(len);
        let read = store.get_range(&key, at..to).await;
        let piece = read.map_err(|error| named_object_error(&**store, error, &key))?;
        hasher = on_blocking_thread(&**store, move || {
            hasher.update(&piece);
            hasher
        })
        .await?;
        progress(ByteLen(to - at));
        at = to;
    }
    let actual = ObjectId(*hasher.finalize().as_bytes());
    if actual != id {
        let source =
            FormatError::Hash { what: ObjectId::WHAT, expected: id.to_string(), actual: actual.to_string() };
        return Err(RepoError::Damaged { place: repo.describe(), key, source });
    }
    Ok(len)
}
