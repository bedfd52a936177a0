//! Commits on their way from a store, many of one image.
//!
//! Enters: ids. Leaves: verified commits. A history is a chain, whose next link is known only when the one before is read: over a long line that is a round trip a commit. So
//! whoever has read some gets the rest of the image's commits at once, in any order, as far as they fit. Invariant: what is remembered is at most [`AHEAD_BYTES`].

use std::collections::HashMap;
use std::sync::Arc;

use futures_util::{StreamExt, stream};

use super::{ImageName, MetaCache, RepoError, Repository, keys};
use crate::format::{Commit, CommitId};

/// Commits read one by one before all are read ahead.
const ONE_BY_ONE: usize = 48;
/// The most commits that are read ahead.
const AHEAD: usize = 16_384;
/// The most bytes they may take.
const AHEAD_BYTES: usize = 32 << 20;
/// How many are read at once.
const PARALLEL: usize = 16;

/// Reads commits of one image.
#[derive(Debug)]
pub(super) struct CommitReader {
    repo: Repository,
    image: ImageName,
    meta: Arc<dyn MetaCache>,
    known: HashMap<CommitId, Commit>,
    read: usize,
    was_ahead: bool,
}

impl CommitReader {
    pub fn new(repo: &Repository, image: &ImageName, meta: Arc<dyn MetaCache>) -> CommitReader {
        CommitReader {
            repo: repo.clone(),
            image: image.clone(),
            meta,
            known: HashMap::new(),
            read: 0,
            was_ahead: false,
        }
    }

    /// A commit; it is not remembered.
    pub async fn take(&mut self, id: CommitId) -> Result<Commit, RepoError> {
        if let Some(commit) = self.known.remove(&id) {
            return Ok(commit);
        }
        self.read += 1;
        if self.read > ONE_BY_ONE && !self.was_ahead {
            self.was_ahead = true;
            self.read_ahead().await?;
            if let Some(commit) = self.known.remove(&id) {
                return Ok(commit);
            }
        }
        self.repo.commit(&self.image, id, &self.meta).await
    }

    async fn read_ahead(&mut self) -> Result<(), RepoError> {
        let mut ids: Vec<CommitId> = Vec::new();
        self.repo
            .listed(&keys::commits(&self.image, ""), |listed| {
                let id: Option<CommitId> = listed.key.segments().next_back().and_then(|id| id.parse().ok());
                if ids.len() < AHEAD {
                    ids.extend(id);
                }
            })
            .await?;
        let (repo, image, meta) = (&self.repo, &self.image, &self.meta);
        let reads = stream::iter(ids).map(|id| async move { (id, repo.commit(image, id, meta).await) });
        let mut reads = reads.buffer_unordered(PARALLEL);
        let mut bytes = 0;
        let mut known = HashMap::new();
        while let Some((id, commit)) = reads.next().await {
            // One that can't be read may be in nobody's history; if it is, it is asked for again.
            let Ok(commit) = commit else { continue };
            bytes += size_of::<Commit>() + commit.message.len() + commit.author.len();
            if bytes > AHEAD_BYTES {
                break;
            }
            known.insert(id, commit);
        }
        drop(reads);
        self.known.extend(known);
        Ok(())
    }
}
