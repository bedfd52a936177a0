//! A repository on a store: making and opening it, its images, refs and commits.
//!
//! Invariants: a branch moves by compare-and-swap only; a tag is made once; a ref that is read says its own name; a commit that is read
//! hashes to its id.

use std::sync::Arc;

use bytes::Bytes;
use futures_util::{StreamExt, TryStreamExt, stream};

use super::meta::{MetaCache, MetaReader};
use super::names::MIN_PREFIX_DIGITS;
use super::{BranchName, ImageName, Reference, RepoError, TagName, keys};
use crate::format::refs::RefObject;
use crate::format::repository::RepositoryFormat;
use crate::format::{Commit, CommitId, PrefetchList};
use crate::store::{Etag, Key, KeyPrefix, Store, StoreError};

/// Names asked for in one page of a listing.
const PAGE: usize = 1000;
/// Commits listed where a prefix is ambiguous.
const MAX_MATCHES: usize = 16;
/// Images whose refs are looked at at once.
const PARALLEL_LISTINGS: usize = 8;
/// Lower-case hex digits of a commit's id.
const ID_DIGITS: usize = 64;

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

/// Where a branch is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BranchTip {
    /// The commit it names.
    pub commit: CommitId,
    /// The ref object as the store knows it; what a swap expects.
    pub etag: Etag,
}

/// What a reference stands for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Resolved {
    /// The commit.
    pub commit: CommitId,
    /// The branch, where one was named and its tip is meant.
    pub branch: Option<BranchName>,
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

    /// The same repository, with what was made on this host and is in `here` before it.
    pub fn over(&self, here: crate::store::DirStore) -> Repository {
        let store = crate::store::OverlayStore::new(here, self.inner.store.clone());
        Repository { inner: Arc::new(Inner { store: Arc::new(store), format: self.inner.format }) }
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

    async fn names_below(&self, dir: &KeyPrefix) -> Result<Vec<String>, RepoError> {
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

    /// The images, by name. An image is there when it has a branch or a tag; one whose first write was cut short is not.
    pub async fn images(&self) -> Result<Vec<ImageName>, RepoError> {
        let names = self.names_below(&keys::images()).await?;
        let images: Vec<ImageName> = names.iter().filter_map(|name| name.parse().ok()).collect();
        let found = stream::iter(images).map(|image| async move {
            for dir in [keys::heads(&image), keys::tags(&image)] {
                if !self.store().children(&dir, None, 1).await?.items.is_empty() {
                    return Ok::<_, RepoError>(Some(image));
                }
            }
            Ok(None)
        });
        let found: Vec<Option<ImageName>> = found.buffered(PARALLEL_LISTINGS).try_collect().await?;
        Ok(found.into_iter().flatten().collect())
    }

    /// The branches of an image, by name.
    pub async fn branches(&self, image: &ImageName) -> Result<Vec<BranchName>, RepoError> {
        let names = self.names_below(&keys::heads(image)).await?;
        Ok(names.iter().filter_map(|name| name.parse().ok()).collect())
    }

    /// The tags of an image, by name.
    pub async fn tags(&self, image: &ImageName) -> Result<Vec<TagName>, RepoError> {
        let names = self.names_below(&keys::tags(image)).await?;
        Ok(names.iter().filter_map(|name| name.parse().ok()).collect())
    }

    /// Reads a ref and checks that it is the one that was asked for.
    async fn read_ref(&self, image: &ImageName, name: &str) -> Result<Option<BranchTip>, RepoError> {
        let key = keys::reference(image, name);
        let (body, etag) = match self.store().get(&key).await {
            Ok(found) => found,
            Err(StoreError::NotFound { .. }) => return Ok(None),
            Err(error) => return Err(error.into()),
        };
        let place = || self.describe();
        let object = RefObject::decode(&body).map_err(|source| RepoError::Damaged {
            place: place(),
            key: key.clone(),
            source,
        })?;
        if object.image != image.as_str() || object.name != name {
            let says = format!("{} of image {}", object.name, object.image);
            return Err(RepoError::RefMisplaced { place: place(), key, says });
        }
        Ok(Some(BranchTip { commit: object.commit, etag }))
    }

    /// Where a branch is; `None` where there is none.
    pub async fn branch(
        &self,
        image: &ImageName,
        branch: &BranchName,
    ) -> Result<Option<BranchTip>, RepoError> {
        self.read_ref(image, &keys::branch_name(branch)).await
    }

    /// What a tag names; `None` where there is none.
    pub async fn tag(&self, image: &ImageName, tag: &TagName) -> Result<Option<CommitId>, RepoError> {
        Ok(self.read_ref(image, &keys::tag_name(tag)).await?.map(|tip| tip.commit))
    }

    /// Moves a branch from `expected` (`None`: it does not exist yet) to `new`, whose objects are all written.
    ///
    /// On [`RepoError::NotFastForward`] nothing changed. On another error it may have moved; read it again to know.
    pub async fn update_branch(
        &self,
        image: &ImageName,
        branch: &BranchName,
        expected: Option<&BranchTip>,
        new: CommitId,
    ) -> Result<BranchTip, RepoError> {
        let name = keys::branch_name(branch);
        let object = RefObject { image: image.to_string(), name: name.clone(), commit: new };
        let key = keys::reference(image, &name);
        let body = Bytes::from(object.encode());
        match self.store().compare_and_swap(&key, expected.map(|tip| &tip.etag), body).await {
            Ok(etag) => Ok(BranchTip { commit: new, etag }),
            Err(StoreError::Conflict { .. }) => {
                let actual = self.branch(image, branch).await?;
                match actual {
                    // Our own swap, whose first answer was lost on the way; or someone's who did the same.
                    Some(tip) if tip.commit == new => Ok(tip),
                    actual => Err(RepoError::NotFastForward {
                        image: image.to_string(),
                        branch: branch.to_string(),
                        expected: expected.map(|tip| tip.commit),
                        actual: actual.map(|tip| tip.commit),
                    }),
                }
            }
            Err(error) if error.is_transient() => match self.branch(image, branch).await {
                Ok(Some(tip)) if tip.commit == new => Ok(tip),
                _ => Err(error.into()),
            },
            Err(error) => Err(error.into()),
        }
    }

    /// Makes a tag. Making it again for the same commit is no error.
    pub async fn create_tag(
        &self,
        image: &ImageName,
        tag: &TagName,
        commit: CommitId,
    ) -> Result<(), RepoError> {
        let name = keys::tag_name(tag);
        let object = RefObject { image: image.to_string(), name: name.clone(), commit };
        let key = keys::reference(image, &name);
        match self.store().compare_and_swap(&key, None, object.encode().into()).await {
            Ok(_) => Ok(()),
            Err(error) if error.is_transient() || matches!(error, StoreError::Conflict { .. }) => {
                match self.tag(image, tag).await? {
                    Some(there) if there == commit => Ok(()),
                    Some(commit) => {
                        Err(RepoError::TagExists { image: image.to_string(), tag: tag.to_string(), commit })
                    }
                    None => Err(error.into()),
                }
            }
            Err(error) => Err(error.into()),
        }
    }

    /// Finds the commit that a reference stands for: a branch, else a tag, else the start of a commit's id; then so many first
    /// parents back. Errors name what there is.
    pub async fn resolve(
        &self,
        image: &ImageName,
        reference: &Reference,
        meta: &Arc<dyn MetaCache>,
    ) -> Result<Resolved, RepoError> {
        let resolved = self.resolve_name(image, reference.name()).await?;
        let mut id = resolved.commit;
        for depth in 0..reference.back() {
            let commit = self.commit(image, id, meta).await?;
            id = *commit.parents.first().ok_or_else(|| RepoError::NoAncestor {
                image: image.to_string(),
                reference: reference.to_string(),
                depth,
            })?;
        }
        let branch = resolved.branch.filter(|_| reference.back() == 0);
        Ok(Resolved { commit: id, branch })
    }

    async fn resolve_name(&self, image: &ImageName, name: &str) -> Result<Resolved, RepoError> {
        let branch: BranchName = name.parse()?;
        if let Some(tip) = self.branch(image, &branch).await? {
            return Ok(Resolved { commit: tip.commit, branch: Some(branch) });
        }
        if let Some(commit) = self.tag(image, &name.parse()?).await? {
            return Ok(Resolved { commit, branch: None });
        }
        let lower = name.to_ascii_lowercase();
        let hex = lower.len() <= ID_DIGITS && lower.bytes().all(|byte| byte.is_ascii_hexdigit());
        if hex && lower.len() >= MIN_PREFIX_DIGITS {
            let page = self.store().list(&keys::commits(image, &lower), None, MAX_MATCHES).await?;
            let ids: Vec<CommitId> = page
                .items
                .iter()
                .filter_map(|listed| listed.key.segments().next_back()?.parse().ok())
                .collect();
            match ids.as_slice() {
                [] => {}
                [commit] => return Ok(Resolved { commit: *commit, branch: None }),
                several => {
                    return Err(RepoError::Ambiguous {
                        image: image.to_string(),
                        prefix: lower,
                        matches: several.iter().map(CommitId::to_string).collect(),
                    });
                }
            }
        }
        let mut has: Vec<String> = self.branches(image).await?.iter().map(BranchName::to_string).collect();
        has.extend(self.tags(image).await?.iter().map(TagName::to_string));
        if has.is_empty() {
            let has = self.images().await?.iter().map(ImageName::to_string).collect();
            return Err(RepoError::NoImage { place: self.describe(), image: image.to_string(), has });
        }
        Err(RepoError::NoRef { image: image.to_string(), reference: name.into(), has })
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

    /// The key of a commit.
    pub fn commit_key(&self, image: &ImageName, id: &CommitId) -> Key {
        keys::commit(image, id)
    }

    /// The key of the base object of a chunk or table, for messages.
    pub fn object_key(&self, image: &ImageName, id: &crate::format::ObjectId) -> Key {
        keys::object(image, id)
    }
}
