//! What a volume is in git's words: on which commit and branch, how far from the repository, what it has of its own.
//!
//! Enters: a volume's name. Leaves: facts. Invariant: what can be told without the repository is told without it; what can't be is waited for, and no longer than a bound.

use std::sync::Arc;
use std::time::Duration;

use super::{Host, HostError};
use crate::format::{Commit, CommitId};
use crate::repo::push::unpushed;
use crate::repo::{BranchName, ImageName, MetaCache, RepoError, Repository};
use crate::store::DirStore;
use crate::units::{ByteLen, PAGE_SIZE};
use crate::volume::{Pending, Snapshot, Volume, VolumeName, VolumeRecord};

/// How long a repository may take to say where a branch is.
const PATIENCE: Duration = Duration::from_secs(5);
/// Commits that are counted behind a branch's tip.
const MOST_BEHIND: u64 = 1000;

/// A volume in git's words.
#[derive(Clone, Debug)]
pub struct VersionStatus {
    /// What it is.
    pub record: VolumeRecord,
    /// Commits that are not pushed.
    pub ahead: u64,
    /// Commits the branch has and the volume has not, as far as they are counted; `None`: the repository did not say.
    pub behind: Option<u64>,
    /// Bytes of pages that were written since the last commit.
    pub changed: ByteLen,
    /// Whether anything was written since.
    pub is_clean: bool,
    /// Why the oldest commit in the making is not made yet, where a try has failed.
    pub failed: Option<String>,
}

/// A commit of a volume's history.
#[derive(Clone, Debug)]
pub struct LogEntry {
    /// Its id; `None`: it is in the making.
    pub id: Option<CommitId>,
    /// Why.
    pub message: String,
    /// Who.
    pub author: String,
    /// When.
    pub time: crate::format::Timestamp,
    /// The commits it follows.
    pub parents: Vec<CommitId>,
    /// Whether it is known to be in the repository.
    pub is_pushed: bool,
}

/// A volume's history: where its commits are read.
///
/// Not the volume itself: that would keep others from it for as long as the repository takes.
pub(super) struct History {
    /// What the volume was when this was made.
    pub(super) record: VolumeRecord,
    pub(super) image: ImageName,
    /// With what was made here before it.
    pub(super) made: Repository,
    pub(super) here: DirStore,
    pub(super) meta: Arc<dyn MetaCache>,
}

impl History {
    pub(super) async fn commit(&self, id: CommitId) -> Result<Commit, RepoError> {
        self.made.commit(&self.image, id, &self.meta).await
    }
}

impl Host {
    /// Where the history of an open volume is read.
    pub(super) fn history_of(&self, volume: &Volume) -> History {
        let base = volume.device().base();
        let version = base.version();
        let record = volume.record();
        let here = DirStore::new(self.state.made_dir(&record.repository));
        let (image, made, meta) =
            (version.image().clone(), version.repository().clone(), version.meta_cache());
        History { record, image, made, here, meta }
    }

    /// The volume in git's words.
    pub async fn version_status(&self, name: &VolumeName) -> Result<VersionStatus, HostError> {
        let (history, changed, is_clean) = {
            let volume = self.opened(name).await?;
            let changed = ByteLen(volume.changed_pages() * PAGE_SIZE);
            (self.history_of(&volume), changed, volume.is_clean())
        };
        let record = history.record.clone();
        let (tip, known) = (record.commit, Some(record.pushed));
        let ahead = match record.commit == record.pushed {
            true => 0,
            false => {
                let found = unpushed(&history.made, &history.here, &history.image, &history.meta, tip, known);
                found.await?.commits.len() as u64
            }
        };
        let behind = tokio::time::timeout(PATIENCE, behind(&history, &record)).await;
        let behind = behind.ok().and_then(Result::ok).flatten();
        let entry = self.entry(name)?;
        Ok(VersionStatus {
            ahead: ahead + record.pending.iter().filter(|pending| !pending.amend).count() as u64,
            behind,
            changed,
            is_clean,
            failed: entry.making.failed(),
            record,
        })
    }

    /// The newest commits of a volume's history, at most `most`.
    pub async fn log(&self, name: &VolumeName, most: usize) -> Result<Vec<LogEntry>, HostError> {
        let history = self.history_of(&self.opened(name).await?);
        let record = &history.record;
        let mut entries: Vec<LogEntry> = record.pending.iter().rev().map(LogEntry::in_the_making).collect();
        let mut next = Some(record.commit);
        let mut is_pushed = false;
        while let Some(id) = next.filter(|_| entries.len() < most) {
            is_pushed |= id == record.pushed;
            let Commit { message, author, time, parents, .. } = history.commit(id).await?;
            next = parents.first().copied();
            entries.push(LogEntry { id: Some(id), message, author, time, parents, is_pushed });
        }
        entries.truncate(most);
        Ok(entries)
    }

    /// A volume's snapshots, the oldest first.
    pub fn snapshots(&self, name: &VolumeName) -> Result<Vec<Snapshot>, HostError> {
        let entry = self.entry(name)?;
        Ok(self.record(name, &entry)?.snapshots)
    }
}

impl LogEntry {
    fn in_the_making(pending: &Pending) -> LogEntry {
        LogEntry {
            id: None,
            message: pending.message.clone(),
            author: pending.author.clone(),
            time: pending.time,
            parents: Vec::new(),
            is_pushed: false,
        }
    }
}

/// Commits from the branch's tip back to what the volume knows of it; `None` where there is no such branch.
async fn behind(history: &History, record: &VolumeRecord) -> Result<Option<u64>, RepoError> {
    let Some(branch) = &record.branch else { return Ok(None) };
    let branch: BranchName = branch.parse()?;
    let Some(tip) = history.made.branch(&history.image, &branch).await? else { return Ok(None) };
    let (mut at, mut count) = (Some(tip.commit), 0);
    while let Some(id) = at {
        if id == record.pushed || id == record.commit || count == MOST_BEHIND {
            break;
        }
        count += 1;
        at = history.commit(id).await?.parents.first().copied();
    }
    // It is not on the way: the volume stands elsewhere.
    Ok(if at.is_none() { None } else { Some(count) })
}
