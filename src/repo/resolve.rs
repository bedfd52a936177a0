//! What a user's words for a version stand for.
//!
//! Enters: a reference. Leaves: the commit it means, and the branch where it is one. Invariant: a word that means two things is refused, and the ways to say which are told; one
//! that means nothing is answered with what there is.

use std::sync::Arc;

use futures_util::future::try_join;

use super::names::{DEFAULT_BRANCH, HEAD, MIN_PREFIX_DIGITS, RefKind};
use super::{BranchName, ImageName, MetaCache, Reference, RepoError, Repository, TagName, keys};
use crate::format::CommitId;

/// Commits listed where a prefix is ambiguous.
const MAX_MATCHES: usize = 16;
/// Lower-case hex digits of a commit's id.
const ID_DIGITS: usize = 64;

/// What a reference stands for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Resolved {
    /// The commit.
    pub commit: CommitId,
    /// The branch, where one was named and its tip is meant.
    pub branch: Option<BranchName>,
}

impl Repository {
    /// Finds the commit that a reference stands for: a branch or a tag, else the start of a commit's id; then so many first parents back. A name that a branch and a
    /// tag have is refused, unless both name one commit: `heads/NAME` and `tags/NAME` say which. Errors name what there is.
    pub async fn resolve(
        &self,
        image: &ImageName,
        reference: &Reference,
        meta: &Arc<dyn MetaCache>,
    ) -> Result<Resolved, RepoError> {
        let resolved = self.resolve_name(image, reference).await?;
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

    async fn resolve_name(&self, image: &ImageName, reference: &Reference) -> Result<Resolved, RepoError> {
        let (kind, name) = match (reference.kind(), reference.name()) {
            // In a repository nothing is checked out: the default branch is what git's HEAD is there.
            (None, HEAD) => (Some(RefKind::Branch), DEFAULT_BRANCH),
            (kind, name) => (kind, name),
        };
        let (branch, tag): (BranchName, TagName) = (name.parse()?, name.parse()?);
        let (tip, tagged) = try_join(
            async {
                match kind {
                    Some(RefKind::Tag) => Ok(None),
                    _ => self.branch(image, &branch).await,
                }
            },
            async {
                match kind {
                    Some(RefKind::Branch) => Ok(None),
                    _ => self.tag(image, &tag).await,
                }
            },
        )
        .await?;
        match (tip, tagged) {
            (Some(tip), Some(tag)) if tip.commit != tag => {
                return Err(RepoError::TwoThings {
                    image: image.to_string(),
                    name: name.to_owned(),
                    branch: tip.commit,
                    tag,
                });
            }
            (Some(tip), _) => return Ok(Resolved { commit: tip.commit, branch: Some(branch) }),
            (None, Some(commit)) => return Ok(Resolved { commit, branch: None }),
            (None, None) => {}
        }
        if kind.is_none()
            && let Some(commit) = self.by_prefix(image, name).await?
        {
            return Ok(Resolved { commit, branch: None });
        }
        let mut has: Vec<String> = self.branches(image).await?.iter().map(BranchName::to_string).collect();
        has.extend(self.tags(image).await?.iter().map(TagName::to_string));
        if has.is_empty() {
            let has = self.images().await?.iter().map(ImageName::to_string).collect();
            return Err(RepoError::NoImage { place: self.describe(), image: image.to_string(), has });
        }
        Err(RepoError::NoRef { image: image.to_string(), reference: name.into(), has })
    }

    /// The commit whose id starts so, if there is one.
    async fn by_prefix(&self, image: &ImageName, name: &str) -> Result<Option<CommitId>, RepoError> {
        let lower = name.to_ascii_lowercase();
        let hex = lower.len() <= ID_DIGITS && lower.bytes().all(|byte| byte.is_ascii_hexdigit());
        if !hex || lower.len() < MIN_PREFIX_DIGITS {
            return Ok(None);
        }
        let page = self.store().list(&keys::commits(image, &lower), None, MAX_MATCHES).await?;
        let ids: Vec<CommitId> =
            page.items.iter().filter_map(|listed| listed.key.segments().next_back()?.parse().ok()).collect();
        match ids.as_slice() {
            [] => Ok(None),
            [commit] => Ok(Some(*commit)),
            several => Err(RepoError::Ambiguous {
                image: image.to_string(),
                prefix: lower,
                matches: several.iter().map(CommitId::to_string).collect(),
            }),
        }
    }
}
