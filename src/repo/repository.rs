//! A repository on a store: making and opening it, its listings, commits and prefetch lists. Its names are in [`refs`](super::refs).
//!
//! Enters: a store. Leaves: a [`Repository`]. Invariant: a commit that is read hashes to its id.

use std::sync::Arc;

use super::meta::{MetaCache, MetaReader};
use super::{ImageName, RepoError, keys};
use crate::format::repository::RepositoryFormat;
use crate::format::{Commit, CommitId, PrefetchList};
use crate::store::{Key, KeyPrefix, Listed, Store, StoreError};

/// Names asked for in one page of a listing.
const PAGE: usize = 1000;

/// An opened repository. Clones are the same one.
#[derive(Clone, Debug)]
pub struct Repository {
    inner: Arc<Inner>,
}

#[derive(Debug)]
struct Inner {
    store: Arc<dyn Store>,
    format: RepositoryFormat,
}

impl Repository {
    /// Makes a repository in an empty place; its id is `id`, which should be random.
    pub async fn create(store: Arc<dyn Store>, id: [u8; 16]) -> Result<Repository, RepoError> {
        match Repository::open(store.clone()).await {
            Ok(_) => return Err(RepoError::Exists { place: store.describe() }),
            Err(RepoError::NotARepository { .. } | RepoError::Store(StoreError::NoPlace { .. })) => {}
            Err(error) => return Err(error),
        }
        if let Some(occupant) = store.occupant().await? {
            return Err(RepoError::Occupied { place: store.describe(), occupant });
        }
        let format = RepositoryFormat { id };
        // A racing creator has another id, so one of the two is told here.
        match store.put_new(&keys::format(), format.encode().into()).await {
            Ok(()) => Ok(Repository { inner: Arc::new(Inner { store, format }) }),
            Err(StoreError::AlreadyExists { .. }) => Err(RepoError::Exists { place: store.describe() }),
            Err(error) => Err(error.into()),
        }
    }

    /// Opens a repository.
    pub async fn open(store: Arc<dyn Store>) -> Result<Repository, RepoError> {
        let key = keys::format();
        let body = match store.get(&key).await {
            Ok((body, _)) => body,
            Err(StoreError::NotFound { .. }) => {
                return Err(RepoError::NotARepository { place: store.describe() });
            }
            Err(error) => return Err(error.into()),
        };
        let format = RepositoryFormat::decode(&body).map_err(|source| RepoError::Damaged {
            place: store.describe(),
            key,
            source,
        })?;
        Ok(Repository { inner: Arc::new(Inner { store, format }) })
    }

    /// A repository that was opened on this host before, by the id it had then, without asking the store: for volumes that start with the
    /// store away. What is read from it is verified as ever.
    pub fn opened_before(store: Arc<dyn Store>, id: [u8; 16]) -> Repository {
        Repository { inner: Arc::new(Inner { store, format: RepositoryFormat { id } }) }
    }

    /// Opens a repository, or makes one in an empty place.
    pub async fn open_or_create(store: Arc<dyn Store>, id: [u8; 16]) -> Result<Repository, RepoError> {
        match Repository::create(store.clone(), id).await {
            Err(RepoError::Exists { .. }) => Repository::open(store).await,
            other => other,
        }
    }

    /// The id it was given when it was made.
    pub fn id(&self) -> [u8; 16] {
        self.inner.format.id
    }

    /// The store it is on.
    pub fn store(&self) -> &Arc<dyn Store> {
        &self.inner.store
    }

    /// The place, for messages.
    pub fn describe(&self) -> String {
        self.inner.store.describe()
    }

    pub(super) async fn names_below(&self, dir: &KeyPrefix) -> Result<Vec<String>, RepoError> {
        let mut names: Vec<String> = Vec::new();
        loop {
            let page = self.store().children(dir, names.last().map(String::as_str), PAGE).await?;
            let more = page.more && !page.items.is_empty();
            names.extend(page.items);
            if !more {
                return Ok(names);
            }
        }
    }

    /// Every object whose key starts so, page by page.
    pub(super) async fn listed(
        &self,
        prefix: &KeyPrefix,
        mut each: impl FnMut(Listed),
    ) -> Result<(), RepoError> {
        let mut after: Option<Key> = None;
        loop {
            let page = self.store().list(prefix, after.as_ref(), PAGE).await?;
            after = page.items.last().map(|listed| listed.key.clone());
            let more = page.more && after.is_some();
            page.items.into_iter().for_each(&mut each);
            if !more {
                return Ok(());
            }
        }
    }

    /// Reads a commit and checks it against its id.
    pub async fn commit(
        &self,
        image: &ImageName,
        id: CommitId,
        meta: &Arc<dyn MetaCache>,
    ) -> Result<Commit, RepoError> {
        let check = move |bytes: &[u8]| {
            id.check(bytes)?;
            Commit::decode(bytes)
        };
        self.meta(meta).read(id.0, &keys::commit(image, &id), None, check).await
    }

    /// Writes a commit, whose map is written. It is in no history until a ref or another commit names it.
    pub async fn put_commit(&self, image: &ImageName, commit: &Commit) -> Result<CommitId, RepoError> {
        let bytes = commit.encode()?;
        let id = CommitId::of(&bytes);
        self.store().put_new(&keys::commit(image, &id), bytes.into()).await?;
        Ok(id)
    }

    /// The prefetch list of a commit; `None` where nobody left one.
    pub async fn prefetch_list(
        &self,
        image: &ImageName,
        id: CommitId,
    ) -> Result<Option<PrefetchList>, RepoError> {
        let key = keys::prefetch(image, &id);
        let (body, _) = match self.store().get(&key).await {
            Ok(found) => found,
            Err(error) if error.is_not_found() => return Ok(None),
            Err(error) => return Err(error.into()),
        };
        match PrefetchList::decode(&body) {
            Ok(list) if list.image == image.as_str() && list.commit == id => Ok(Some(list)),
            Ok(list) => {
                let says = format!("commit {} of image {}", list.commit, list.image);
                Err(RepoError::RefMisplaced { place: self.describe(), key, says })
            }
            Err(source) => Err(RepoError::Damaged { place: self.describe(), key, source }),
        }
    }

    /// Leaves a prefetch list with its commit, in place of the one that was there. Of two who do so at once one may be told of a conflict.
    pub async fn put_prefetch_list(&self, list: &PrefetchList) -> Result<(), RepoError> {
        let image: ImageName = list.image.parse()?;
        let key = keys::prefetch(&image, &list.commit);
        let there = match self.store().get(&key).await {
            Ok((body, _)) if body == list.encode() => return Ok(()),
            // Even a damaged one: it is a hint, and this is a better one.
            Ok((_, etag)) => Some(etag),
            Err(error) if error.is_not_found() => None,
            Err(error) => return Err(error.into()),
        };
        self.store().compare_and_swap(&key, there.as_ref(), list.encode().into()).await?;
        Ok(())
    }

    pub(super) fn meta(&self, cache: &Arc<dyn MetaCache>) -> MetaReader {
        MetaReader { store: self.inner.store.clone(), cache: cache.clone() }
    }

    /// The key of the base object of a chunk or table, for messages.
    pub fn object_key(&self, image: &ImageName, id: &crate::format::ObjectId) -> Key {
        keys::object(image, id)
    }
}
