//! The rescue: before a ref moves, nothing below what it will name is condemned any more, and all of it is there. FORMAT.md, "What gc may take", has the argument.
//!
//! Enters: a hold, and the commits a ref is about to name. Leaves: condemned lists without what these need. Invariants: what a list has is waited for while it is being deleted,
//! and looked for afterwards; a list that ended, or lost objects, since the hold was taken may have taken anything that was relied on since, so that all is looked for.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::Duration;

use futures_util::{StreamExt, TryStreamExt, stream};

use super::closure::Walk;
use super::gc::lists;
use super::hold::{Hold, Shared, boot_clock};
use super::{MetaCache, NoMetaCache, RepoError, keys};
use crate::format::CommitId;
use crate::format::condemned::{Condemned, Stage};
use crate::store::StoreError;

/// Between two looks at a deletion under way.
const LOOK_AGAIN: Duration = Duration::from_millis(300);
/// How often a condemned list that others change is changed again.
const TRIES: usize = 64;
/// Objects that are looked for at once.
const PARALLEL: usize = 16;

impl Hold {
    /// Makes sure that nothing below new commits is condemned. `commits` are whole and written, parents first; `base` is the commit they stand on, which the ref that
    /// moves names. Called after everything is written and before the ref moves. Costs one listing where no list of condemned objects is kept.
    ///
    /// What is condemned is taken off its list. What is being deleted is waited for; where it is gone then, [`RepoError::Swept`] says that all must be done again.
    pub async fn rescue(&self, commits: &[CommitId], base: Option<CommitId>) -> Result<(), RepoError> {
        let Shared { repo, image, seen, .. } = &*self.shared;
        let names: BTreeSet<String> = lists::names(repo, image).await?.into_iter().collect();
        let mut is_sure = seen.lock().keys().all(|name| names.contains(name));
        if is_sure && names.is_empty() {
            return Ok(());
        }
        let walked = self.below(commits, base).await.map_err(|error| match error {
            // It was there when it was written, or found.
            RepoError::Missing { place, key } => RepoError::Swept { place, key },
            other => other,
        });
        let walk = walked?;
        let mut doubtful: BTreeSet<Condemned> = BTreeSet::new();
        let started = boot_clock();
        for name in names {
            is_sure &= self.take_off(&name, &walk, started, &mut doubtful).await?;
        }
        if !is_sure {
            doubtful.extend(walk.closure.all());
        }
        self.look_for(doubtful).await
    }

    /// Takes what is below new commits off a list; adds it to `doubtful`. Whether nothing else can have been deleted by this list since the hold was taken.
    async fn take_off(
        &self,
        name: &str,
        walk: &Walk,
        started: Duration,
        doubtful: &mut BTreeSet<Condemned>,
    ) -> Result<bool, RepoError> {
        let Shared { repo, image, options, seen, .. } = &*self.shared;
        let under_way =
            || RepoError::SweepUnderWay { place: repo.describe(), key: keys::condemned_list(image, name) };
        let known = seen.lock().get(name).cloned();
        let mut is_same = true;
        let mut conflicts = 0;
        loop {
            let Some(list) = lists::read(repo, image, name).await? else {
                return Ok(known.is_none());
            };
            is_same &= known.as_ref().is_none_or(|tag| *tag == list.etag);
            let needed: BTreeSet<Condemned> =
                list.object.objects.iter().filter(|object| walk.closure.has(object)).copied().collect();
            if needed.is_empty() {
                return Ok(is_same);
            }
            let mut spared = list.object.clone();
            spared.objects.retain(|object| !needed.contains(object));
            // Also what only waits may be gone: an earlier sweep of the list may have been cut short.
            doubtful.extend(&needed);
            if matches!(list.object.stage, Stage::Sweeping(_)) {
                if !lists::is_abandoned(&list, self.store_time().await?) {
                    if boot_clock().saturating_sub(started) > options.patience {
                        return Err(under_way());
                    }
                    tokio::time::sleep(LOOK_AGAIN.min(options.patience)).await;
                    continue;
                }
                // Whoever was deleting does not come back: what is left of its list waits for the next one.
                spared.stage = Stage::Waiting(BTreeSet::new());
            }
            match lists::swap(repo, image, &list, &spared).await? {
                Some(new) => {
                    // What it had, it has but for what is looked for now.
                    if is_same && let Some(tag) = seen.lock().get_mut(name) {
                        *tag = new.etag;
                    }
                    return Ok(is_same);
                }
                None if conflicts >= TRIES => return Err(under_way()),
                None => conflicts += 1,
            }
        }
    }

    /// That objects are there, now that no list has them.
    async fn look_for(&self, objects: BTreeSet<Condemned>) -> Result<(), RepoError> {
        let Shared { repo, image, .. } = &*self.shared;
        // Readers do without prefetch lists.
        let objects = objects.into_iter().filter(|object| !matches!(object, Condemned::Prefetch(_)));
        let looks = stream::iter(objects.map(|object| keys::of(image, &object))).map(|key| async move {
            match repo.store().get_range(&key, 0..0).await {
                Ok(_) => Ok(()),
                Err(StoreError::NotFound { .. }) => Err(RepoError::Swept { place: repo.describe(), key }),
                Err(error) => Err(error.into()),
            }
        });
        looks.buffer_unordered(PARALLEL).try_collect().await
    }

    /// All that new commits name, without what they have in common with the one they stand on.
    async fn below(&self, commits: &[CommitId], base: Option<CommitId>) -> Result<Walk, RepoError> {
        let Shared { repo, image, .. } = &*self.shared;
        let meta: Arc<dyn MetaCache> = Arc::new(NoMetaCache);
        let mut walk = Walk::new(repo, image, &meta);
        let Some(base) = base else {
            // Nothing says that what they stand on is named by anyone.
            walk.history(commits.iter().copied()).await?;
            return Ok(walk);
        };
        let mut below = repo.commit(image, base, &meta).await?;
        for id in commits {
            if let Some(commit) = walk.commit(*id, Some(&below)).await? {
                let others = commit.parents.iter().filter(|parent| **parent != base);
                let others: Vec<CommitId> = others.copied().filter(|id| !commits.contains(id)).collect();
                if !others.is_empty() {
                    // A merge: what the other side stands on is named by whoever names it, or by nobody.
                    walk.history(others).await?;
                }
                below = commit;
            }
        }
        Ok(walk)
    }
}
