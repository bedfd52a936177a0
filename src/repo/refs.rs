//! Refs: the branches and tags of images, made, moved, protected and deleted.
//!
//! Enters: names. Leaves: commits, tips. Invariants: a ref that is read says its own name; every change of one is a compare-and-swap against what was read, deletion
//! included: a deleted ref is an object that names nothing, because no store but memory removes an object on a condition.

use bytes::Bytes;
use futures_util::{StreamExt, TryStreamExt, stream};

use super::{BranchName, ImageName, RepoError, Repository, TagName, keys};
use crate::format::CommitId;
use crate::format::refs::RefObject;
use crate::store::{Etag, KeyPrefix, StoreError};

/// Refs, or images, that are looked at at once.
const PARALLEL: usize = 16;

/// Where a branch is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BranchTip {
    /// The commit it names.
    pub commit: CommitId,
    /// The ref object as the store knows it; what a swap expects.
    pub etag: Etag,
}

/// What a tag is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TagState {
    /// The commit it names.
    pub commit: CommitId,
    /// It is not deleted before it is let go of.
    pub protected: bool,
    etag: Etag,
}

/// A ref as it was read; `commit` is `None` where it was deleted.
struct Read {
    object: RefObject,
    etag: Etag,
}

impl Repository {
    /// The images, by name. An image is there when it has a branch or a tag; one whose first write was cut short is not.
    pub async fn images(&self) -> Result<Vec<ImageName>, RepoError> {
        let found = stream::iter(self.image_names().await?).map(|image| async move {
            for dir in [keys::heads(&image), keys::tags(&image)] {
                if !self.live_names(&image, &dir).await?.is_empty() {
                    return Ok::<_, RepoError>(Some(image));
                }
            }
            Ok(None)
        });
        let found: Vec<Option<ImageName>> = found.buffered(PARALLEL).try_collect().await?;
        Ok(found.into_iter().flatten().collect())
    }

    /// Every name below which there is, or was, something of an image.
    pub(super) async fn image_names(&self) -> Result<Vec<ImageName>, RepoError> {
        let names = self.names_below(&keys::images()).await?;
        Ok(names.iter().filter_map(|name| name.parse().ok()).collect())
    }

    /// Whether there is any object of an image, be it one that no ref names.
    pub async fn has_anything_of(&self, image: &ImageName) -> Result<bool, RepoError> {
        Ok(!self.store().list(&keys::image(image), None, 1).await?.items.is_empty())
    }

    /// Names below a directory of refs that are not those of deleted ones. A ref that can't be read counts as there.
    async fn live_names(&self, image: &ImageName, dir: &KeyPrefix) -> Result<Vec<String>, RepoError> {
        let below = format!("{}/", dir.as_str().trim_end_matches('/').rsplit('/').next().unwrap_or_default());
        let read = stream::iter(self.names_below(dir).await?).map(|name| {
            let full = format!("{below}{name}");
            async move {
                match self.read_ref(image, &full).await {
                    Ok(Some(read)) if read.object.commit.is_some() => Ok(Some(name)),
                    Ok(_) => Ok(None),
                    Err(error) if error.is_transient() => Err(error),
                    Err(_) => Ok(Some(name)),
                }
            }
        });
        let names: Vec<Option<String>> = read.buffered(PARALLEL).try_collect().await?;
        Ok(names.into_iter().flatten().collect())
    }

    /// The branches of an image, by name.
    pub async fn branches(&self, image: &ImageName) -> Result<Vec<BranchName>, RepoError> {
        let names = self.live_names(image, &keys::heads(image)).await?;
        Ok(names.iter().filter_map(|name| name.parse().ok()).collect())
    }

    /// The tags of an image, by name.
    pub async fn tags(&self, image: &ImageName) -> Result<Vec<TagName>, RepoError> {
        let names = self.live_names(image, &keys::tags(image)).await?;
        Ok(names.iter().filter_map(|name| name.parse().ok()).collect())
    }

    /// The branches of an image and where they are.
    pub async fn branch_tips(&self, image: &ImageName) -> Result<Vec<(BranchName, BranchTip)>, RepoError> {
        let names = self.names_below(&keys::heads(image)).await?;
        let names: Vec<BranchName> = names.iter().filter_map(|name| name.parse().ok()).collect();
        let read = stream::iter(names)
            .map(|name| async move { Ok::<_, RepoError>((self.branch(image, &name).await?, name)) });
        let tips: Vec<(Option<BranchTip>, BranchName)> = read.buffered(PARALLEL).try_collect().await?;
        Ok(tips.into_iter().filter_map(|(tip, name)| Some((name, tip?))).collect())
    }

    /// The tags of an image and what they name.
    pub async fn tag_states(&self, image: &ImageName) -> Result<Vec<(TagName, TagState)>, RepoError> {
        let names = self.names_below(&keys::tags(image)).await?;
        let names: Vec<TagName> = names.iter().filter_map(|name| name.parse().ok()).collect();
        let read = stream::iter(names)
            .map(|name| async move { Ok::<_, RepoError>((self.tag_state(image, &name).await?, name)) });
        let tags: Vec<(Option<TagState>, TagName)> = read.buffered(PARALLEL).try_collect().await?;
        Ok(tags.into_iter().filter_map(|(tag, name)| Some((name, tag?))).collect())
    }

    /// Reads a ref and checks that it is the one that was asked for.
    async fn read_ref(&self, image: &ImageName, name: &str) -> Result<Option<Read>, RepoError> {
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
        Ok(Some(Read { object, etag }))
    }

    /// The commit that a ref (`heads/NAME`, `tags/NAME`) names; `None` where it was deleted or is not there.
    pub(super) async fn ref_target(
        &self,
        image: &ImageName,
        name: &str,
    ) -> Result<Option<CommitId>, RepoError> {
        Ok(self.read_ref(image, name).await?.and_then(|read| read.object.commit))
    }

    /// Where a branch is; `None` where there is none.
    pub async fn branch(
        &self,
        image: &ImageName,
        branch: &BranchName,
    ) -> Result<Option<BranchTip>, RepoError> {
        let read = self.read_ref(image, &keys::branch_name(branch)).await?;
        Ok(read.and_then(|read| Some(BranchTip { commit: read.object.commit?, etag: read.etag })))
    }

    /// What a tag names; `None` where there is none.
    pub async fn tag(&self, image: &ImageName, tag: &TagName) -> Result<Option<CommitId>, RepoError> {
        Ok(self.tag_state(image, tag).await?.map(|state| state.commit))
    }

    /// What a tag is; `None` where there is none.
    pub async fn tag_state(&self, image: &ImageName, tag: &TagName) -> Result<Option<TagState>, RepoError> {
        let read = self.read_ref(image, &keys::tag_name(tag)).await?;
        Ok(read.and_then(|Read { object, etag }| {
            Some(TagState { commit: object.commit?, protected: object.protected, etag })
        }))
    }

    /// Swaps a ref that is as it was read. `Ok(None)`: it is not any more.
    async fn swap_ref(
        &self,
        image: &ImageName,
        expected: Option<&Etag>,
        new: &RefObject,
    ) -> Result<Option<Etag>, RepoError> {
        let key = keys::reference(image, &new.name);
        let body = Bytes::from(new.encode());
        match self.store().compare_and_swap(&key, expected, body.clone()).await {
            Ok(etag) => Ok(Some(etag)),
            Err(StoreError::Conflict { .. }) if expected.is_none() => {
                // The name of a deleted ref is free.
                match self.read_ref(image, &new.name).await? {
                    Some(Read { object: RefObject { commit: None, .. }, etag }) => {
                        match self.store().compare_and_swap(&key, Some(&etag), body).await {
                            Ok(etag) => Ok(Some(etag)),
                            Err(StoreError::Conflict { .. }) => Ok(None),
                            Err(error) => Err(error.into()),
                        }
                    }
                    _ => Ok(None),
                }
            }
            Err(StoreError::Conflict { .. }) => Ok(None),
            Err(error) => Err(error.into()),
        }
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
        let object = RefObject::new(image, keys::branch_name(branch), new);
        match self.swap_ref(image, expected.map(|tip| &tip.etag), &object).await {
            Ok(Some(etag)) => Ok(BranchTip { commit: new, etag }),
            Ok(None) => {
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
                _ => Err(error),
            },
            Err(error) => Err(error),
        }
    }

    /// Makes a tag. Making it again for the same commit is no error.
    pub async fn create_tag(
        &self,
        image: &ImageName,
        tag: &TagName,
        commit: CommitId,
    ) -> Result<(), RepoError> {
        let object = RefObject::new(image, keys::tag_name(tag), commit);
        let swapped = self.swap_ref(image, None, &object).await;
        let error = match swapped {
            Ok(Some(_)) => return Ok(()),
            Ok(None) => None,
            Err(error) if error.is_transient() => Some(error),
            Err(error) => return Err(error),
        };
        match (self.tag(image, tag).await?, error) {
            (Some(there), _) if there == commit => Ok(()),
            (Some(commit), _) => {
                Err(RepoError::TagExists { image: image.to_string(), tag: tag.to_string(), commit })
            }
            (None, Some(error)) => Err(error),
            (None, None) => Err(self.moved(image, &object.name)),
        }
    }

    /// Has a tag protected, or lets go of it.
    pub async fn protect_tag(
        &self,
        image: &ImageName,
        tag: &TagName,
        protected: bool,
    ) -> Result<(), RepoError> {
        let Some(state) = self.tag_state(image, tag).await? else {
            return Err(self.no_tag(image, tag).await?);
        };
        if state.protected == protected {
            return Ok(());
        }
        let object = RefObject { protected, ..RefObject::new(image, keys::tag_name(tag), state.commit) };
        match self.swap_ref(image, Some(&state.etag), &object).await? {
            Some(_) => Ok(()),
            None => Err(self.moved(image, &object.name)),
        }
    }

    /// Deletes a branch that is where it was read. What only it named is `gc`'s after that.
    pub async fn delete_branch(
        &self,
        image: &ImageName,
        branch: &BranchName,
        tip: &BranchTip,
    ) -> Result<(), RepoError> {
        self.delete_ref(image, keys::branch_name(branch), &tip.etag).await
    }

    /// Deletes a tag that is not protected; what it named.
    pub async fn delete_tag(&self, image: &ImageName, tag: &TagName) -> Result<CommitId, RepoError> {
        let Some(state) = self.tag_state(image, tag).await? else {
            return Err(self.no_tag(image, tag).await?);
        };
        if state.protected {
            return Err(RepoError::Protected { image: image.to_string(), tag: tag.to_string() });
        }
        self.delete_ref(image, keys::tag_name(tag), &state.etag).await?;
        Ok(state.commit)
    }

    async fn delete_ref(&self, image: &ImageName, name: String, etag: &Etag) -> Result<(), RepoError> {
        let object = RefObject { image: image.to_string(), name, commit: None, protected: false };
        match self.swap_ref(image, Some(etag), &object).await {
            Ok(Some(_)) => Ok(()),
            Ok(None) => Err(self.moved(image, &object.name)),
            // The answer may have been lost: what is there says it.
            Err(error) if error.is_transient() => match self.read_ref(image, &object.name).await {
                Ok(Some(read)) if read.object.commit.is_none() => Ok(()),
                _ => Err(error),
            },
            Err(error) => Err(error),
        }
    }

    fn moved(&self, image: &ImageName, name: &str) -> RepoError {
        StoreError::Conflict { store: self.describe(), key: keys::reference(image, name) }.into()
    }

    async fn no_tag(&self, image: &ImageName, tag: &TagName) -> Result<RepoError, RepoError> {
        let has = self.tags(image).await?.iter().map(TagName::to_string).collect();
        Ok(RepoError::NoTag { image: image.to_string(), tag: tag.to_string(), has })
    }
}
