//! `squash`: a history with fewer versions. The ones that are kept read as before; what only the others had is `gc`'s.
//!
//! Enters: a branch and what to keep of it. Leaves: new commits, with the maps, authors, times and messages of those that are kept, each on the one kept before it; the branch
//! at the last of them. Invariants: the tip is kept; commits before the first that is left out stay what they are; tags stay where they are, and keep all that is behind them.

use std::collections::{HashMap, HashSet};
use std::sync::Arc;

use time::OffsetDateTime;

use super::hold::{Hold, HoldOptions};
use super::{BranchName, ImageName, MetaCache, NoMetaCache, RepoError, Repository};
use crate::format::{Commit, CommitId};

/// The longest history that is squashed: it is in memory.
pub const MAX_HISTORY: usize = 1 << 16;

/// What is kept. A version that any of these asks for is kept; so is the tip.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Keep {
    /// So many of the newest.
    pub last: usize,
    /// The newest of each day, of so many days that have one. Days, weeks (from Monday) and months are those of UTC.
    pub daily: usize,
    /// The newest of each week.
    pub weekly: usize,
    /// The newest of each month.
    pub monthly: usize,
}

/// One version of the old history, newest first.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Planned {
    /// What it was.
    pub old: CommitId,
    /// The commit.
    pub commit: Commit,
    /// What it is in the new history; `None` where it is left out.
    pub new: Option<CommitId>,
}

/// Squashes a branch; what became of each of its commits. In a dry run nothing is written.
pub async fn squash(
    repo: &Repository,
    image: &ImageName,
    branch: &BranchName,
    keep: Keep,
    dry_run: bool,
    options: HoldOptions,
) -> Result<Vec<Planned>, RepoError> {
    if dry_run {
        let (_, history) = first_parents(repo, image, branch).await?;
        return Ok(plan(history, keep)?.0);
    }
    let hold = Hold::push(repo, image, options).await?;
    let squashed = async {
        let (tip, history) = first_parents(repo, image, branch).await?;
        let (planned, new) = plan(history, keep)?;
        if new.is_empty() {
            return Ok(planned);
        }
        let mut ids = Vec::with_capacity(new.len());
        for commit in &new {
            ids.push(repo.put_commit(image, commit).await?);
        }
        hold.move_branch(branch, Some(&tip), &ids).await?;
        Ok(planned)
    }
    .await;
    hold.release().await;
    squashed
}

async fn first_parents(
    repo: &Repository,
    image: &ImageName,
    branch: &BranchName,
) -> Result<(super::BranchTip, Vec<(CommitId, Commit)>), RepoError> {
    let Some(tip) = repo.branch(image, branch).await? else {
        let has = repo.branches(image).await?.iter().map(BranchName::to_string).collect();
        return Err(RepoError::NoBranch { image: image.to_string(), branch: branch.to_string(), has });
    };
    let meta: Arc<dyn MetaCache> = Arc::new(NoMetaCache);
    let mut reader = super::commits::CommitReader::new(repo, image, meta);
    let (mut next, mut history) = (Some(tip.commit), Vec::new());
    while let Some(id) = next {
        if history.len() == MAX_HISTORY {
            return Err(RepoError::TooLong { image: image.to_string(), max: MAX_HISTORY });
        }
        let commit = reader.take(id).await?;
        next = commit.parents.first().copied();
        history.push((id, commit));
    }
    Ok((tip, history))
}

/// Which are kept, and the commits to write, oldest first; none where the history stays what it is.
fn plan(history: Vec<(CommitId, Commit)>, keep: Keep) -> Result<(Vec<Planned>, Vec<Commit>), RepoError> {
    let kept = kept(&history, keep);
    let mut new = Vec::new();
    let mut news: HashMap<CommitId, CommitId> = HashMap::new();
    let mut before: Option<CommitId> = None;
    // Once one is left out, all after it are new.
    let mut is_changed = false;
    for (at, (old, commit)) in history.iter().enumerate().rev() {
        if !kept.contains(&at) {
            is_changed = true;
            continue;
        }
        let id = match is_changed {
            false => *old,
            true => {
                let commit = Commit { parents: before.into_iter().collect(), ..commit.clone() };
                let id = CommitId::of(&commit.encode()?);
                new.push(commit);
                id
            }
        };
        news.insert(*old, id);
        before = Some(id);
    }
    let planned =
        history.into_iter().map(|(old, commit)| Planned { new: news.get(&old).copied(), old, commit });
    Ok((planned.collect(), new))
}

/// Places in a history, newest first, that are kept.
fn kept(history: &[(CommitId, Commit)], keep: Keep) -> HashSet<usize> {
    let mut kept: HashSet<usize> = (0..history.len().min(keep.last.max(1))).collect();
    let rules: [(usize, fn(i64) -> i64); 3] = [(keep.daily, day), (keep.weekly, week), (keep.monthly, month)];
    for (mut left, period) in rules {
        let mut seen = HashSet::new();
        for (at, (_, commit)) in history.iter().enumerate() {
            if left == 0 {
                break;
            }
            if seen.insert(period(i64::try_from(commit.time.secs).unwrap_or(i64::MAX))) {
                kept.insert(at);
                left -= 1;
            }
        }
    }
    kept
}

fn day(secs: i64) -> i64 {
    secs.div_euclid(86_400)
}

/// Day 0 was a Thursday.
fn week(secs: i64) -> i64 {
    (day(secs) + 3).div_euclid(7)
}

fn month(secs: i64) -> i64 {
    // Times past the year 9999 are all of one month.
    OffsetDateTime::from_unix_timestamp(secs)
        .map_or(i64::MAX, |at| i64::from(at.year()) * 12 + i64::from(u8::from(at.month())))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::format::{BlockSize, ChunkSize, Filesystem, MapRoot, Timestamp};
    use crate::units::ByteLen;

    const DAY: u64 = 86_400;
    /// Wednesday, 1 January 2025.
    const START: u64 = 1_735_689_600;

    /// One version every 12 hours, newest first.
    fn history(len: u64) -> Vec<(CommitId, Commit)> {
        let mut parents = Vec::new();
        let mut history = Vec::new();
        for number in 0..len {
            let commit = Commit {
                parents: parents.clone(),
                map: MapRoot::Zero,
                size: ByteLen(4096 * number),
                block_size: BlockSize::DEFAULT,
                chunk_size: ChunkSize::DEFAULT,
                filesystem: Filesystem::None,
                author: "a".into(),
                time: Timestamp { secs: START + number * DAY / 2, nanos: 0 },
                message: format!("{number}"),
            };
            let id = CommitId::of(&commit.encode().unwrap());
            parents = vec![id];
            history.insert(0, (id, commit));
        }
        history
    }

    fn kept_messages(len: u64, keep: Keep) -> Vec<String> {
        let (planned, _) = plan(history(len), keep).unwrap();
        planned
            .into_iter()
            .filter(|planned| planned.new.is_some())
            .map(|planned| planned.commit.message)
            .collect()
    }

    #[test]
    fn the_newest_of_each_period_is_kept_and_always_the_tip() {
        assert_eq!(kept_messages(10, Keep::default()), ["9"]);
        assert_eq!(kept_messages(10, Keep { last: 3, ..Keep::default() }), ["9", "8", "7"]);
        assert_eq!(kept_messages(10, Keep { daily: 2, ..Keep::default() }), ["9", "7"]);
        // Sundays: 5 and 12 January.
        assert_eq!(kept_messages(30, Keep { weekly: 3, ..Keep::default() }), ["29", "23", "9"]);
        assert_eq!(kept_messages(80, Keep { monthly: 2, ..Keep::default() }), ["79", "61"]);
        assert_eq!(kept_messages(3, Keep { last: 9, ..Keep::default() }), ["2", "1", "0"]);
    }

    #[test]
    fn what_is_before_the_first_that_is_left_out_stays_what_it_is() {
        let (planned, new) = plan(history(6), Keep { last: 9, ..Keep::default() }).unwrap();
        assert!(new.is_empty() && planned.iter().all(|planned| planned.new == Some(planned.old)));
        let (planned, new) = plan(history(6), Keep { last: 2, ..Keep::default() }).unwrap();
        assert_eq!((new.len(), new[0].parents.len()), (2, 0));
        assert_eq!(new[1].parents, [CommitId::of(&new[0].encode().unwrap())]);
        assert_eq!(planned[0].new, Some(CommitId::of(&new[1].encode().unwrap())));
        assert_ne!(planned[0].new, Some(planned[0].old));
    }
}
