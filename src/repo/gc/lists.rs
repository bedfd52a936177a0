//! Condemned lists in a repository: read, made and changed by compare-and-swap, each in one step.
//!
//! Enters: an image. Leaves: lists as they are, with the tag a change of them expects. Invariant: a list is deleted only when nothing is on it.

use std::collections::BTreeMap;
use std::time::{Duration, SystemTime};

use crate::format::condemned::CondemnedList;
use crate::repo::{ImageName, RepoError, Repository, keys};
use crate::store::{Etag, StoreError};

/// Whoever deletes renews its list at least this often, or stops; so long and once more is waited before it counts as dead.
pub const SWEEP_LEASE: Duration = Duration::from_secs(300);

/// A list as it was read.
#[derive(Clone, Debug)]
pub struct List {
    pub name: String,
    pub object: CondemnedList,
    pub etag: Etag,
    /// When it was changed last, by the store's clock.
    pub modified: Option<SystemTime>,
}

/// The names of the lists of an image.
pub async fn names(repo: &Repository, image: &ImageName) -> Result<Vec<String>, RepoError> {
    let mut names = Vec::new();
    repo.listed(&keys::condemned_lists(image), |listed| {
        names.extend(listed.key.segments().next_back().map(str::to_owned));
    })
    .await?;
    Ok(names)
}

/// The lists of an image by name, each with its tag. One that ends meanwhile is left out.
pub async fn tags(repo: &Repository, image: &ImageName) -> Result<BTreeMap<String, Etag>, RepoError> {
    let mut tags = BTreeMap::new();
    for name in names(repo, image).await? {
        match repo.store().get(&keys::condemned_list(image, &name)).await {
            Ok((_, etag)) => tags.extend([(name, etag)]),
            Err(error) if error.is_not_found() => {}
            Err(error) => return Err(error.into()),
        }
    }
    Ok(tags)
}

/// Reads a list; `None` where it is there no more.
pub async fn read(repo: &Repository, image: &ImageName, name: &str) -> Result<Option<List>, RepoError> {
    let key = keys::condemned_list(image, name);
    let (body, etag) = match repo.store().get(&key).await {
        Ok(found) => found,
        Err(error) if error.is_not_found() => return Ok(None),
        Err(error) => return Err(error.into()),
    };
    let object = CondemnedList::decode(&body).map_err(|source| RepoError::Damaged {
        place: repo.describe(),
        key: key.clone(),
        source,
    })?;
    if object.image != image.as_str() {
        let says = format!("of image {}", object.image);
        return Err(RepoError::RefMisplaced { place: repo.describe(), key, says });
    }
    let mut modified = None;
    let prefix = keys::condemned_lists(image);
    repo.listed(&prefix, |listed| {
        if listed.key == key {
            modified = listed.modified;
        }
    })
    .await?;
    Ok(Some(List { name: name.to_owned(), object, etag, modified }))
}

/// Changes a list that is as it was read, or makes one where `etag` is of none. `Ok(None)`: someone else changed it.
pub async fn swap(
    repo: &Repository,
    image: &ImageName,
    list: &List,
    new: &CondemnedList,
) -> Result<Option<List>, RepoError> {
    let key = keys::condemned_list(image, &list.name);
    match repo.store().compare_and_swap(&key, Some(&list.etag), new.encode().into()).await {
        Ok(etag) => Ok(Some(List { object: new.clone(), etag, ..list.clone() })),
        Err(StoreError::Conflict { .. }) => Ok(None),
        Err(error) => Err(error.into()),
    }
}

/// Publishes a list.
pub async fn publish(repo: &Repository, image: &ImageName, new: CondemnedList) -> Result<List, RepoError> {
    let name = uuid::Uuid::new_v4().simple().to_string();
    let key = keys::condemned_list(image, &name);
    let etag = repo.store().compare_and_swap(&key, None, new.encode().into()).await?;
    Ok(List { name, object: new, etag, modified: None })
}

/// Takes a list away that has nothing on it, and so says nothing: whether it is there is the same to everyone.
pub async fn remove(repo: &Repository, image: &ImageName, list: &List) -> Result<(), RepoError> {
    debug_assert!(list.object.objects.is_empty());
    Ok(repo.store().delete(&keys::condemned_list(image, &list.name)).await?)
}

/// Whether who is deleting what is on a list has not been heard of for too long. Where the store tells no times, never.
pub fn is_abandoned(list: &List, now: Option<SystemTime>) -> bool {
    let (Some(modified), Some(now)) = (list.modified, now) else { return false };
    now.duration_since(modified).is_ok_and(|age| age > 2 * SWEEP_LEASE)
}
