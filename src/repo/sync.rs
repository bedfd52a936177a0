//! Copying a repository to another place: what is missing there, checked on the way.
//!
//! Enters: two stores. Leaves: in the second all images (or one) of the first. Invariants: refs are read first and written last, so a copy that is cut short names
//! nothing it has not got, and is carried on by doing it again; an object is published only if its bytes hash to its name; a branch only moves forward.

use std::collections::{HashMap, HashSet};
use std::sync::Arc;

use futures_util::{StreamExt, TryStreamExt, stream};

use super::meta::{MetaCache, NoMetaCache, named_object_error};
use super::{
    BranchName, History, Hold, HoldOptions, ImageName, RepoError, Repository, TagName, Version,
    VersionOptions, keys,
};
use crate::format::{CommitId, FormatError};
use crate::store::{Key, KeyPrefix, Store, StoreError};
use crate::units::{BlockIndex, ByteLen};

/// Objects on their way at once.
const AT_ONCE: usize = 4;
/// Bytes of an object that are read at a time.
const PIECE: u64 = 4 << 20;
/// Keys of one page of a listing.
const PAGE: usize = 1000;

/// What was done.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct SyncReport {
    /// Images looked at.
    pub images: u64,
    /// Objects copied.
    pub copied: u64,
    /// Their bytes.
    pub copied_bytes: u64,
    /// Objects that were there already.
    pub present: u64,
    /// Branches and tags made or moved.
    pub refs: u64,
    /// Branches and tags that were left alone, because the other place has moved on by itself.
    pub diverged: Vec<String>,
}

/// Copies what the repository on `to` lacks of one image, or of all; it is made, as the same repository, if there is none.
pub async fn sync(
    from: &Repository,
    to: Arc<dyn Store>,
    image: Option<&ImageName>,
    progress: &(dyn Fn(ByteLen) + Send + Sync),
) -> Result<SyncReport, RepoError> {
    let to = &Repository::open_or_create(to, from.id()).await?;
    if to.id() != from.id() {
        return Err(RepoError::OtherRepository { place: to.describe(), of: from.describe() });
    }
    let images = match image {
        Some(image) => vec![image.clone()],
        None => from.images().await?,
    };
    let mut report = SyncReport::default();
    for image in images {
        report.images += 1;
        // Before it is looked at what is there: a gc there must not take what is relied on.
        let holder = format!("a copy from {}, process {}", from.describe(), std::process::id());
        let hold = Hold::push(to, &image, HoldOptions::new(holder)).await?;
        let copied = Copying { from, to, image, hold: &hold, progress }.run(&mut report).await;
        hold.release().await;
        copied?;
    }
    Ok(report)
}

struct Copying<'s> {
    from: &'s Repository,
    to: &'s Repository,
    image: ImageName,
    hold: &'s Hold,
    progress: &'s (dyn Fn(ByteLen) + Send + Sync),
}

impl Copying<'_> {
    async fn run(&self, report: &mut SyncReport) -> Result<(), RepoError> {
        // Before the objects are listed: all that these names need is in the listing then.
        let mut branches = Vec::new();
        for branch in self.from.branches(&self.image).await? {
            branches.extend(self.from.branch(&self.image, &branch).await?.map(|tip| (branch, tip.commit)));
        }
        let mut tags = Vec::new();
        for tag in self.from.tags(&self.image).await? {
            tags.extend(self.from.tag(&self.image, &tag).await?.map(|commit| (tag, commit)));
        }
        if branches.is_empty() && tags.is_empty() {
            let has = self.from.images().await?.iter().map(ToString::to_string).collect();
            return Err(RepoError::NoImage {
                place: self.from.describe(),
                image: self.image.to_string(),
                has,
            });
        }
        // Listed from the top down and copied from the bottom up: whatever is written there meanwhile, all that a copied commit names was listed after it.
        let mut kinds = Vec::new();
        for kind in [keys::commits(&self.image, ""), keys::nodes(&self.image), keys::blocks(&self.image)] {
            let listed = self.listed(self.from, &kind).await?;
            kinds.push((kind, listed));
        }
        let mut have = HashSet::new();
        for (kind, listed) in kinds.into_iter().rev() {
            self.copy_kind(&kind, listed, &mut have, report).await?;
        }
        self.copy_lists(&branches, report).await?;
        for (branch, commit) in branches {
            self.check_whole(commit, &have).await?;
            self.move_branch(&branch, commit, report).await?;
        }
        for (tag, commit) in tags {
            self.check_whole(commit, &have).await?;
            self.make_tag(&tag, commit, report).await?;
        }
        Ok(())
    }

    async fn listed(
        &self,
        repository: &Repository,
        prefix: &KeyPrefix,
    ) -> Result<HashMap<Key, u64>, RepoError> {
        let mut all = HashMap::new();
        let mut after: Option<Key> = None;
        loop {
            let page = repository.store().list(prefix, after.as_ref(), PAGE).await?;
            after = page.items.last().map(|listed| listed.key.clone());
            let more = page.more && after.is_some();
            all.extend(page.items.into_iter().map(|listed| (listed.key, listed.len)));
            if !more {
                return Ok(all);
            }
        }
    }

    /// Before a name is given to a commit there: that the commit, its map and every block's object are there too. A listing that lagged, or an object that is missing
    /// here as well, is found out now and not by a reader.
    async fn check_whole(&self, commit: CommitId, have: &HashSet<Key>) -> Result<(), RepoError> {
        let meta: Arc<dyn MetaCache> = Arc::new(NoMetaCache);
        let version = Version::open(self.to, &self.image, commit, meta, VersionOptions::default()).await?;
        let (mut at, end) = (BlockIndex(0), BlockIndex(version.commit().blocks()));
        while let Some((block, table)) = version.next_block(at, end).await? {
            let key = keys::object(&self.image, &table.object);
            if !have.contains(&key) {
                return Err(RepoError::Missing { place: self.to.describe(), key });
            }
            at = BlockIndex(block.0 + 1);
        }
        Ok(())
    }

    async fn copy_kind(
        &self,
        prefix: &KeyPrefix,
        listed: HashMap<Key, u64>,
        have: &mut HashSet<Key>,
        report: &mut SyncReport,
    ) -> Result<(), RepoError> {
        let there = self.listed(self.to, prefix).await?;
        have.extend(there.keys().chain(listed.keys()).cloned());
        let mut missing = Vec::new();
        for (key, len) in listed {
            match there.get(&key) {
                None => missing.push((key, len)),
                Some(there) if *there == len => report.present += 1,
                Some(there) => {
                    return Err(StoreError::ShortBody {
                        store: self.to.describe(),
                        key,
                        expected: len,
                        actual: *there,
                    }
                    .into());
                }
            }
        }
        missing.sort_unstable();
        let copies = missing.into_iter().map(|(key, len)| async move {
            self.copy(&key, len).await?;
            (self.progress)(ByteLen(len));
            Ok::<u64, RepoError>(len)
        });
        let mut copies = stream::iter(copies).buffer_unordered(AT_ONCE);
        while let Some(len) = copies.try_next().await? {
            report.copied += 1;
            report.copied_bytes += len;
        }
        Ok(())
    }

    async fn copy(&self, key: &Key, len: u64) -> Result<(), RepoError> {
        let (from, to) = (self.from.store(), self.to.store());
        let mut upload = to.begin().await?;
        let mut hasher = blake3::Hasher::new();
        let mut at = 0;
        while at < len {
            let end = (at + PIECE).min(len);
            let read = from.get_range(key, at..end).await;
            let piece = read.map_err(|error| named_object_error(&**from, error, key))?;
            hasher.update(&piece);
            upload.write(piece).await?;
            at = end;
        }
        let name = key.segments().next_back().unwrap_or_default();
        let actual = hasher.finalize().to_hex().to_string();
        if actual != name {
            return Err(RepoError::Damaged {
                place: self.from.describe(),
                key: key.clone(),
                source: FormatError::Hash { what: "object", expected: name.to_owned(), actual },
            });
        }
        Ok(upload.finish(key).await?)
    }

    /// Prefetch lists are hints: the other place's own is kept.
    async fn copy_lists(
        &self,
        branches: &[(BranchName, CommitId)],
        report: &mut SyncReport,
    ) -> Result<(), RepoError> {
        for (_, commit) in branches {
            if self.to.prefetch_list(&self.image, *commit).await.is_ok_and(|list| list.is_some()) {
                continue;
            }
            if let Ok(Some(list)) = self.from.prefetch_list(&self.image, *commit).await {
                // A hint: someone else's is as good.
                if self.to.put_prefetch_list(&list).await.is_ok() {
                    report.copied += 1;
                }
            }
        }
        Ok(())
    }

    async fn move_branch(
        &self,
        branch: &BranchName,
        commit: CommitId,
        report: &mut SyncReport,
    ) -> Result<(), RepoError> {
        let there = self.to.branch(&self.image, branch).await?;
        if let Some(there) = &there {
            if there.commit == commit || self.is_ancestor(commit, there.commit).await? {
                return Ok(());
            }
            if !self.is_ancestor(there.commit, commit).await? {
                report.diverged.push(format!("{}@{branch}", self.image));
                return Ok(());
            }
        }
        self.keep(commit).await?;
        self.hold.settled(self.to.update_branch(&self.image, branch, there.as_ref(), commit).await)?;
        report.refs += 1;
        Ok(())
    }

    async fn make_tag(
        &self,
        tag: &TagName,
        commit: CommitId,
        report: &mut SyncReport,
    ) -> Result<(), RepoError> {
        match self.to.tag(&self.image, tag).await? {
            Some(there) if there == commit => return Ok(()),
            Some(_) => {
                report.diverged.push(format!("{}@{tag}", self.image));
                return Ok(());
            }
            None => {}
        }
        self.keep(commit).await?;
        self.hold.settled(self.to.create_tag(&self.image, tag, commit).await)?;
        report.refs += 1;
        Ok(())
    }

    /// That all a name is about to stand for stays there: it was there already, or was copied.
    async fn keep(&self, commit: CommitId) -> Result<(), RepoError> {
        self.hold.rescue(&[commit], None).await?;
        self.hold.check()
    }

    /// Whether `old` is in the history of `new`, by what the other place has.
    async fn is_ancestor(&self, old: CommitId, new: CommitId) -> Result<bool, RepoError> {
        let meta: Arc<dyn MetaCache> = Arc::new(NoMetaCache);
        History::new(self.to, &self.image, [new], meta).has(old).await
    }
}
