//! Commits that were made on this host, brought to where everybody finds them.
//!
//! Enters: a repository with what was made here before it, and the place that is to have it. Leaves: the branch there, moved; or an error, and the branch where it was. Invariants: base objects are
//! written before map nodes, these before commits, and the ref moves last, by compare-and-swap, after it was asked whether all that the new commits name is there; what is there already is not sent
//! again, so that a push that was cut short goes on where it was.

use std::collections::HashSet;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use futures_util::{StreamExt, TryStreamExt, stream};

use super::meta::{MetaCache, named_object_error};
use super::version::read_node;
use super::{BranchName, ImageName, RepoError, Repository, Version, VersionOptions, keys};
use crate::format::map_node::{MapNode, SLOTS_LOG2, TableRef, root_level};
use crate::format::{CommitId, FormatError, MapRoot, NodeId, ObjectId};
use crate::store::{DirStore, Key, Store, StoreError};
use crate::units::{BlockIndex, ByteLen};

/// Objects on their way at once.
const AT_ONCE: usize = 8;
/// Questions whether an object is there, at once.
const QUESTIONS: usize = 16;
/// Bytes of an object that are read at a time.
const PIECE: u64 = 4 << 20;
/// Commits that are looked at to find out how two versions are related.
pub const MAX_HISTORY: usize = 100_000;
/// Commits of the other side that are looked at first: as a rule it has moved on from where we began.
const RECENT: usize = 64;

/// Commits of one version's history that another place may lack.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Unpushed {
    /// Parents before children.
    pub commits: Vec<CommitId>,
    /// Those it goes back to, which are not in it: what is known to be there, and what was not made here.
    pub rests_on: Vec<CommitId>,
}

/// What was done.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct PushReport {
    /// Commits that are there now and were not named by the branch before.
    pub commits: u64,
    /// Objects that were sent.
    pub sent: u64,
    /// Their bytes.
    pub sent_bytes: ByteLen,
    /// Objects that were there already.
    pub present: u64,
    /// The branch was there already, at this commit.
    pub up_to_date: bool,
}

/// How much of a push is done.
#[derive(Debug, Default)]
pub struct Pushing {
    sent: AtomicU64,
    total: AtomicU64,
}

impl Pushing {
    /// Bytes that were sent, or were there.
    pub fn sent(&self) -> ByteLen {
        ByteLen(self.sent.load(Ordering::Relaxed))
    }

    /// Bytes there are; nothing before that is known.
    pub fn total(&self) -> ByteLen {
        ByteLen(self.total.load(Ordering::Relaxed))
    }
}

/// The commits from `tip` back to `known`, which is left out with all that is before it; those of other parents only as far as they were made here.
pub async fn unpushed(
    made: &Repository,
    here: &DirStore,
    image: &ImageName,
    meta: &Arc<dyn MetaCache>,
    tip: CommitId,
    known: Option<CommitId>,
) -> Result<Unpushed, RepoError> {
    let (mut commits, mut rests_on) = (Vec::new(), Vec::new());
    let mut seen: HashSet<CommitId> = HashSet::new();
    // Depth first, so that parents come before their children: a commit is listed when its parents are through.
    let mut stack = vec![(tip, false)];
    while let Some((id, parents_done)) = stack.pop() {
        if parents_done {
            commits.push(id);
            continue;
        }
        if seen.len() > MAX_HISTORY || !seen.insert(id) {
            continue;
        }
        if Some(id) == known || !is_made(here, image, id).await? {
            rests_on.push(id);
            continue;
        }
        stack.push((id, true));
        stack.extend(made.commit(image, id, meta).await?.parents.into_iter().map(|parent| (parent, false)));
    }
    Ok(Unpushed { commits, rests_on })
}

/// Whether `old` is `new` or in its history.
pub async fn is_ancestor(
    repository: &Repository,
    image: &ImageName,
    meta: &Arc<dyn MetaCache>,
    old: CommitId,
    new: CommitId,
    most: usize,
) -> Result<bool, RepoError> {
    let (mut seen, mut next) = (HashSet::new(), vec![new]);
    while let Some(id) = next.pop() {
        if id == old {
            return Ok(true);
        }
        if seen.len() < most && seen.insert(id) {
            next.extend(repository.commit(image, id, meta).await?.parents);
        }
    }
    Ok(false)
}

/// Commits of one image to be brought to one place.
pub struct Push<'p> {
    /// The repository, with what was made here before it.
    pub made: &'p Repository,
    /// What was made here.
    pub here: &'p DirStore,
    /// Where it goes.
    pub to: &'p Repository,
    /// The image.
    pub image: &'p ImageName,
    /// The branch that is to move.
    pub branch: &'p BranchName,
    /// Where metadata is remembered.
    pub meta: &'p Arc<dyn MetaCache>,
    /// How far it is.
    pub progress: &'p Pushing,
}

impl Push<'_> {
    /// Brings `tip` and its history there. `known` is a commit of that history that is there as far as is known.
    pub async fn run(&self, tip: CommitId, known: Option<CommitId>) -> Result<PushReport, RepoError> {
        let mut report = PushReport::default();
        let there = self.to.branch(self.image, self.branch).await?;
        if there.as_ref().is_some_and(|there| there.commit == tip) {
            return Ok(PushReport { up_to_date: true, ..report });
        }
        let named = there.as_ref().map(|there| there.commit);
        // What was there once need not be there still: the place may have been put back from a copy, or the branch that named it have been deleted.
        let is_there = match known {
            Some(id) => named == known || self.has_commit(id).await?,
            None => false,
        };
        let known = known.filter(|_| is_there);
        let unpushed = unpushed(self.made, self.here, self.image, self.meta, tip, known).await?;
        if let Some(there) = &there
            && !unpushed.commits.contains(&there.commit)
            && Some(there.commit) != known
            && !self.leads_to(there.commit, tip, known).await?
        {
            return Err(RepoError::NotFastForward {
                image: self.image.to_string(),
                branch: self.branch.to_string(),
                expected: known,
                actual: Some(there.commit),
            });
        }
        for id in unpushed.rests_on.iter().filter(|id| named != Some(**id)) {
            if !self.has_commit(*id).await? {
                let key = keys::commit(self.image, id);
                return Err(RepoError::Missing { place: self.to.describe(), key });
            }
        }
        let needed = self.needed(&unpushed).await?;
        self.send(&needed, &mut report).await?;
        for id in &unpushed.commits {
            self.send(&[vec![keys::commit(self.image, id)]], &mut report).await?;
        }
        // What was sent was answered for. What was not, because it was there, is asked for once more: nobody may be left with a name of nothing.
        let commits = unpushed.commits.iter().chain([&tip]).map(|id| keys::commit(self.image, id)).collect();
        let mut names: HashSet<Key> = needed.into_iter().chain([commits]).flatten().collect();
        if named.is_none_or(|named| Some(named) != known && !unpushed.commits.contains(&named)) {
            // No branch says that what these commits share with those before them is there.
            names.extend(self.all_of(tip).await?);
        }
        self.check_there(names).await?;
        self.to.update_branch(self.image, self.branch, there.as_ref(), tip).await?;
        report.commits = unpushed.commits.len() as u64;
        Ok(report)
    }

    async fn has_commit(&self, id: CommitId) -> Result<bool, RepoError> {
        Ok(is_there(&**self.to.store(), &keys::commit(self.image, &id)).await?)
    }

    /// All that the map of a version names.
    async fn all_of(&self, id: CommitId) -> Result<Vec<Key>, RepoError> {
        let options = VersionOptions::default();
        let version = Version::open(self.made, self.image, id, self.meta.clone(), options).await?;
        let (mut objects, mut nodes) = (HashSet::new(), HashSet::new());
        self.differing(&version, None, &mut objects, &mut nodes).await?;
        let objects = objects.iter().map(|id| keys::object(self.image, id));
        Ok(objects.chain(nodes.iter().map(|id| keys::node(self.image, id))).collect())
    }

    /// Whether the branch only moves forward from `old`.
    async fn leads_to(
        &self,
        old: CommitId,
        tip: CommitId,
        known: Option<CommitId>,
    ) -> Result<bool, RepoError> {
        // Seen from their end first: where they have moved on from what we have, a few steps tell.
        if let Some(known) = known
            && is_ancestor(self.made, self.image, self.meta, known, old, RECENT).await?
        {
            return Ok(false);
        }
        is_ancestor(self.made, self.image, self.meta, old, tip, MAX_HISTORY).await
    }

    /// What these commits name and their parents do not: base objects first, then map nodes. Commits are not in it.
    async fn needed(&self, unpushed: &Unpushed) -> Result<Vec<Vec<Key>>, RepoError> {
        let (mut objects, mut nodes) = (HashSet::new(), HashSet::new());
        let open =
            |id| Version::open(self.made, self.image, id, self.meta.clone(), VersionOptions::default());
        for id in &unpushed.commits {
            let version = open(*id).await?;
            let parent = match version.commit().parents.first() {
                Some(parent) => Some(open(*parent).await?),
                None => None,
            };
            self.differing(&version, parent.as_ref(), &mut objects, &mut nodes).await?;
        }
        let objects: Vec<Key> = objects.iter().map(|id| keys::object(self.image, id)).collect();
        let nodes: Vec<Key> = nodes.iter().map(|id| keys::node(self.image, id)).collect();
        Ok(vec![objects, nodes])
    }

    /// Adds what the map of a version names and its parent's does not.
    async fn differing(
        &self,
        version: &Version,
        parent: Option<&Version>,
        objects: &mut HashSet<ObjectId>,
        nodes: &mut HashSet<NodeId>,
    ) -> Result<(), RepoError> {
        let root = |version: &Version| match version.commit().map {
            MapRoot::Node(root) => Some((root, root_level(version.commit().blocks()))),
            MapRoot::Zero => None,
        };
        let Some((top, level)) = root(version) else { return Ok(()) };
        let alike = |parent: &&Version| {
            let (one, other) = (parent.commit(), version.commit());
            (one.block_size, one.chunk_size) == (other.block_size, other.chunk_size)
        };
        let parent = parent.filter(alike);
        let reader = self.made.meta(self.meta);
        // As deep as the map is, times what a node has.
        let mut stack = vec![(top, level, BlockIndex(0), parent.and_then(root))];
        while let Some((id, level, start, old)) = stack.pop() {
            if old == Some((id, level)) || !nodes.insert(id) {
                continue;
            }
            let old_node = match old {
                Some((old, old_level)) if old_level == level => {
                    Some(read_node(&reader, self.image, old, level).await?)
                }
                _ => None,
            };
            match read_node(&reader, self.image, id, level).await? {
                MapNode::Inner { entries, .. } => {
                    let old_entries = match &old_node {
                        Some(MapNode::Inner { entries, .. }) => entries.as_slice(),
                        _ => &[],
                    };
                    for (slot, child) in entries {
                        let was = match old {
                            // The device has grown by a level: the old root is at its beginning.
                            Some((_, old_level)) if old_level < level && slot == 0 => old,
                            _ => find(old_entries, slot).map(|node| (*node, level - 1)),
                        };
                        let start = BlockIndex(start.0 + (u64::from(slot) << (SLOTS_LOG2 * level)));
                        stack.push((child, level - 1, start, was));
                    }
                }
                MapNode::Leaf(entries) => {
                    let old_entries = match &old_node {
                        Some(MapNode::Leaf(entries)) => entries.as_slice(),
                        _ => &[],
                    };
                    for (slot, table) in entries {
                        let was = find(old_entries, slot);
                        if was != Some(&table) {
                            let block = BlockIndex(start.0 + u64::from(slot));
                            self.of_block(version, parent.filter(|_| was.is_some()), block, &table, objects)
                                .await?;
                        }
                    }
                }
            }
        }
        Ok(())
    }

    /// The objects of a block, but those its parent's has.
    async fn of_block(
        &self,
        version: &Version,
        parent: Option<&Version>,
        block: BlockIndex,
        table: &TableRef,
        objects: &mut HashSet<ObjectId>,
    ) -> Result<(), RepoError> {
        objects.insert(table.object);
        let before: HashSet<ObjectId> = match parent {
            Some(parent) => parent.table(block).await?.iter().flat_map(|table| table.objects()).collect(),
            None => HashSet::new(),
        };
        if let Some(table) = version.table(block).await? {
            objects.extend(table.objects().filter(|object| !before.contains(object)));
        }
        Ok(())
    }

    /// Sends what is not there, one kind after the other.
    async fn send(&self, kinds: &[Vec<Key>], report: &mut PushReport) -> Result<(), RepoError> {
        for kind in kinds {
            let asked = kind.iter().cloned().map(|key| async move {
                if is_there(&**self.to.store(), &key).await? {
                    return Ok(None);
                }
                match self.here.len_of(&key).await? {
                    Some(len) => Ok(Some((key, len))),
                    None => Err(RepoError::Missing { place: self.to.describe(), key }),
                }
            });
            let missing: Vec<Option<(Key, u64)>> =
                stream::iter(asked).buffer_unordered(QUESTIONS).try_collect().await?;
            let missing: Vec<(Key, u64)> = missing.into_iter().flatten().collect();
            report.present += (kind.len() - missing.len()) as u64;
            let total: u64 = missing.iter().map(|(_, len)| len).sum();
            self.progress.total.fetch_add(total, Ordering::Relaxed);
            let sends = missing.into_iter().map(|(key, len)| async move {
                self.copy(&key, len).await?;
                Ok::<u64, RepoError>(len)
            });
            let mut sends = stream::iter(sends).buffer_unordered(AT_ONCE);
            while let Some(len) = sends.try_next().await? {
                report.sent += 1;
                report.sent_bytes.0 += len;
            }
        }
        Ok(())
    }

    /// Sends one object, checked on the way.
    async fn copy(&self, key: &Key, len: u64) -> Result<(), RepoError> {
        let mut upload = self.to.store().begin().await?;
        let mut hasher = blake3::Hasher::new();
        let mut at = 0;
        while at < len {
            let end = (at + PIECE).min(len);
            let read = self.here.get_range(key, at..end).await;
            let piece = read.map_err(|error| named_object_error(self.here, error, key))?;
            hasher.update(&piece);
            upload.write(piece).await?;
            self.progress.sent.fetch_add(end - at, Ordering::Relaxed);
            at = end;
        }
        let name = key.segments().next_back().unwrap_or_default();
        let actual = hasher.finalize().to_hex().to_string();
        if actual != name {
            return Err(RepoError::Damaged {
                place: self.here.describe(),
                key: key.clone(),
                source: FormatError::Hash { what: "object", expected: name.to_owned(), actual },
            });
        }
        Ok(upload.finish(key).await?)
    }

    async fn check_there(&self, keys: HashSet<Key>) -> Result<(), RepoError> {
        let asked = keys.into_iter().map(|key| async move {
            match is_there(&**self.to.store(), &key).await? {
                true => Ok(()),
                false => Err(RepoError::Missing { place: self.to.describe(), key }),
            }
        });
        stream::iter(asked).buffer_unordered(QUESTIONS).try_collect().await
    }
}

/// Whether a commit was made on this host.
pub async fn is_made(here: &DirStore, image: &ImageName, id: CommitId) -> Result<bool, RepoError> {
    Ok(here.len_of(&keys::commit(image, &id)).await?.is_some())
}

/// The commits that were made on this host whose ids begin with some digits; a few of them.
pub async fn made_commits(
    here: &DirStore,
    image: &ImageName,
    digits: &str,
) -> Result<Vec<CommitId>, RepoError> {
    /// Enough to tell that there is more than one.
    const MOST: usize = 16;
    match here.list(&keys::commits(image, digits), None, MOST).await {
        Ok(page) => {
            let ids = page.items.iter().filter_map(|listed| listed.key.segments().next_back()?.parse().ok());
            Ok(ids.collect())
        }
        Err(StoreError::NoPlace { .. } | StoreError::NotFound { .. }) => Ok(Vec::new()),
        Err(error) => Err(error.into()),
    }
}

/// Whether an object is there: write-once objects are there whole or not at all.
pub async fn is_there(store: &dyn Store, key: &Key) -> Result<bool, StoreError> {
    match store.get_range(key, 0..0).await {
        Ok(_) => Ok(true),
        Err(StoreError::NoPlace { .. } | StoreError::NotFound { .. }) => Ok(false),
        Err(error) => Err(error),
    }
}

fn find<T>(entries: &[(u8, T)], slot: u8) -> Option<&T> {
    let at = entries.binary_search_by_key(&slot, |(slot, _)| *slot).ok()?;
    Some(&entries[at].1)
}
