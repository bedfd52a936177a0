//! Histories: the commits behind some commits, all parents followed, newest first.
//!
//! Enters: commits to start from. Leaves: each commit behind them, once. Invariants: of two commits the one with the later time comes first, except that none comes before a
//! commit it was reached by (clocks are not trusted: a commit counts as no newer than its newest child seen). Memory is bounded: 40 bytes a commit seen,
//! [`MAX_COMMITS`] at most, and what `commits` reads ahead.

use std::cmp::Reverse;
use std::collections::{BinaryHeap, HashMap, HashSet};
use std::sync::Arc;

use super::commits::CommitReader;
use super::{ImageName, MetaCache, RepoError, Repository};
use crate::format::{Commit, CommitId, Timestamp};

/// The longest history that is walked.
pub const MAX_COMMITS: usize = 1 << 20;
/// The longest history that is put in the order of a graph, which needs all of it in memory.
pub const MAX_GRAPH: usize = 1 << 16;

/// One commit of a history.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Entry {
    /// Its id.
    pub id: CommitId,
    /// The commit.
    pub commit: Commit,
}

/// A commit that waits for its turn: the newest first, of equals the one seen first.
struct Waiting {
    counts_as: Timestamp,
    turn: Reverse<u64>,
    entry: Entry,
}

impl PartialEq for Waiting {
    fn eq(&self, other: &Waiting) -> bool {
        self.turn == other.turn
    }
}

impl Eq for Waiting {}

impl PartialOrd for Waiting {
    fn partial_cmp(&self, other: &Waiting) -> Option<std::cmp::Ordering> {
        Some(self.cmp(other))
    }
}

impl Ord for Waiting {
    fn cmp(&self, other: &Waiting) -> std::cmp::Ordering {
        self.counts_as.cmp(&other.counts_as).then(self.turn.cmp(&other.turn))
    }
}

/// Walks a history.
pub struct History {
    reader: CommitReader,
    image: ImageName,
    heap: BinaryHeap<Waiting>,
    seen: HashSet<CommitId>,
    /// Commits to read before the next one is told, and how new they may count. Not read before that: whoever wants one commit waits for no other.
    unread: Vec<(CommitId, Timestamp)>,
    turn: u64,
}

/// Later than any commit.
const LATEST: Timestamp = Timestamp { secs: u64::MAX, nanos: u32::MAX };

impl History {
    /// The history of some commits of an image.
    pub fn new(
        repo: &Repository,
        image: &ImageName,
        starts: impl IntoIterator<Item = CommitId>,
        meta: Arc<dyn MetaCache>,
    ) -> History {
        let mut history = History {
            reader: CommitReader::new(repo, image, meta),
            image: image.clone(),
            heap: BinaryHeap::new(),
            seen: HashSet::new(),
            unread: Vec::new(),
            turn: 0,
        };
        history.add(starts, LATEST);
        history
    }

    fn add(&mut self, ids: impl IntoIterator<Item = CommitId>, at_most: Timestamp) {
        for id in ids {
            if self.seen.insert(id) {
                self.unread.push((id, at_most));
            }
        }
    }

    /// The next commit; `None` after the last.
    pub async fn next(&mut self) -> Result<Option<Entry>, RepoError> {
        if self.seen.len() > MAX_COMMITS {
            return Err(RepoError::TooLong { image: self.image.to_string(), max: MAX_COMMITS });
        }
        while let Some((id, at_most)) = self.unread.first().copied() {
            let commit = self.reader.take(id).await?;
            self.unread.remove(0);
            let counts_as = commit.time.min(at_most);
            self.turn += 1;
            self.heap.push(Waiting { counts_as, turn: Reverse(self.turn), entry: Entry { id, commit } });
        }
        let Some(Waiting { counts_as, entry, .. }) = self.heap.pop() else { return Ok(None) };
        self.add(entry.commit.parents.iter().copied(), counts_as);
        Ok(Some(entry))
    }

    /// Whether a commit is behind the starts, or is one of them.
    pub async fn has(mut self, wanted: CommitId) -> Result<bool, RepoError> {
        loop {
            if self.seen.contains(&wanted) {
                return Ok(true);
            }
            if self.next().await?.is_none() {
                return Ok(false);
            }
        }
    }

    /// All of it, no commit before one of its children: the order a graph is drawn in.
    pub async fn in_graph_order(mut self) -> Result<Vec<Entry>, RepoError> {
        let mut all: Vec<Entry> = Vec::new();
        while let Some(entry) = self.next().await? {
            if all.len() == MAX_GRAPH {
                return Err(RepoError::TooLong { image: self.image.to_string(), max: MAX_GRAPH });
            }
            all.push(entry);
        }
        let mut children: HashMap<CommitId, usize> = HashMap::new();
        for entry in &all {
            for parent in distinct(&entry.commit.parents) {
                *children.entry(parent).or_default() += 1;
            }
        }
        let place: HashMap<CommitId, usize> =
            all.iter().enumerate().map(|(at, entry)| (entry.id, at)).collect();
        let mut ready: BinaryHeap<(Timestamp, Reverse<usize>)> = all
            .iter()
            .enumerate()
            .filter(|(_, entry)| !children.contains_key(&entry.id))
            .map(|(at, entry)| (entry.commit.time, Reverse(at)))
            .collect();
        let mut slots: Vec<Option<Entry>> = all.into_iter().map(Some).collect();
        let mut ordered = Vec::with_capacity(slots.len());
        while let Some((_, Reverse(at))) = ready.pop() {
            let Some(entry) = slots[at].take() else { continue };
            for parent in distinct(&entry.commit.parents) {
                let Some(left) = children.get_mut(&parent) else { continue };
                *left -= 1;
                if *left == 0
                    && let Some(&at) = place.get(&parent)
                    && let Some(parent) = &slots[at]
                {
                    ready.push((parent.commit.time, Reverse(at)));
                }
            }
            ordered.push(entry);
        }
        Ok(ordered)
    }
}

/// A commit may name a parent twice.
fn distinct(parents: &[CommitId]) -> HashSet<CommitId> {
    parents.iter().copied().collect()
}
