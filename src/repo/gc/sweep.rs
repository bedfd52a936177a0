//! The sweep: what is on a list that says it is being deleted, is deleted.
//!
//! Enters: a list of which this process has just made a sweeping one. Leaves: none of its objects, and no list. Invariants: no request to delete is begun, or waited for, more than
//! half a lease after the list was last renewed, so that who takes it over after two leases finds nobody at it; commits go first, so that what a sweep that was cut short
//! left has no head.

use std::collections::BTreeSet;
use std::mem::discriminant;
use std::time::Duration;

use futures_util::{StreamExt, stream};

use super::lists::{self, List, SWEEP_LEASE};
use crate::format::condemned::{Condemned, CondemnedList, Stage};
use crate::repo::hold::boot_clock;
use crate::repo::{ImageName, RepoError, Repository, keys};

/// Objects deleted at once.
const PARALLEL: usize = 16;
/// Objects between two looks at the clock.
const BATCH: usize = 64;

/// The turn a sweep begins with. By chance, so that no two sweeps of a list write the same bytes: tags of some stores are of the content, and who was stopped for longer than its
/// lease must not take the list of whoever came after it for its own.
pub fn first_turn() -> u64 {
    uuid::Uuid::new_v4().as_u64_pair().0 >> 1
}

/// Deletes what is on a list; what of it may still be there. `renewed` is from before the swap that made it a sweeping one was asked for, by [`boot_clock`].
pub async fn sweep(
    repo: &Repository,
    image: &ImageName,
    mut list: List,
    mut renewed: Duration,
) -> Result<BTreeSet<Condemned>, RepoError> {
    let all: Vec<Condemned> = list.object.objects.iter().copied().collect();
    let mut left: BTreeSet<Condemned> = list.object.objects.clone();
    let Stage::Sweeping(mut turn) = list.object.stage else { return Ok(left) };
    let mut failed = None;
    'all: for kind in all.chunk_by(|a, b| discriminant(a) == discriminant(b)) {
        for batch in kind.chunks(BATCH) {
            if boot_clock().saturating_sub(renewed) > SWEEP_LEASE / 4 {
                turn += 1;
                let begun = boot_clock();
                let next = CondemnedList {
                    stage: Stage::Sweeping(turn),
                    objects: left.clone(),
                    ..list.object.clone()
                };
                // Taken over: the other goes on.
                let Some(new) = lists::swap(repo, image, &list, &next).await? else { return Ok(left) };
                (list, renewed) = (new, begun);
            }
            let deletions = stream::iter(batch.to_vec()).map(|object| async move {
                let bound = (SWEEP_LEASE / 2).saturating_sub(boot_clock().saturating_sub(renewed));
                // Neither is one sent again after that: a store that is out of reach is asked for longer.
                let deletion = tokio::time::timeout(bound, async {
                    repo.store().delete(&keys::of(image, &object)).await
                });
                match bound {
                    Duration::ZERO => (object, None),
                    _ => (object, deletion.await.ok()),
                }
            });
            let mut deletions = deletions.buffer_unordered(PARALLEL);
            while let Some((object, deleted)) = deletions.next().await {
                match deleted {
                    Some(Ok(())) => {
                        left.remove(&object);
                    }
                    None => {}
                    Some(Err(error)) => failed = failed.or(Some(error)),
                }
            }
            if failed.is_some() {
                break 'all;
            }
        }
    }
    // What could not be deleted may still be: the list stays one that is being deleted until nobody can be at it any more.
    if let Some(error) = failed {
        return Err(error.into());
    }
    // Not done where the clock said stop: likewise.
    if !left.is_empty() {
        return Ok(left);
    }
    let rest = CondemnedList {
        stage: Stage::Waiting(BTreeSet::new()),
        objects: BTreeSet::new(),
        ..list.object.clone()
    };
    if let Some(ended) = lists::swap(repo, image, &list, &rest).await? {
        lists::remove(repo, image, &ended).await?;
    }
    Ok(left)
}
