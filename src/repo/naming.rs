//! Refs made and deleted by hand, so that nothing is lost by it.
//!
//! Enters: names and commits. Leaves: branches and tags. Invariants: what a new name stands for is whole, and stays so while a gc runs; a name means one thing; a branch whose
//! commits no other ref has goes by force only.

use std::sync::Arc;

use super::closure::Walk;
use super::hold::{Hold, HoldOptions};
use super::names::HEAD;
use super::{
    BranchName, BranchTip, History, ImageName, MetaCache, NoMetaCache, RepoError, Repository, TagName, keys,
};
use crate::format::CommitId;
use crate::format::condemned::Condemned;

fn meta() -> Arc<dyn MetaCache> {
    Arc::new(NoMetaCache)
}

/// Makes a branch at a commit. The name must be free, of tags too.
pub async fn create_branch(
    repo: &Repository,
    image: &ImageName,
    branch: &BranchName,
    commit: CommitId,
    options: HoldOptions,
) -> Result<BranchTip, RepoError> {
    check_new_name("a branch's name", branch.as_str())?;
    if let Some(tip) = repo.branch(image, branch).await? {
        return Err(taken(image, "branch", branch.as_str(), tip.commit));
    }
    if let Some(commit) = repo.tag(image, &branch.as_str().parse()?).await? {
        return Err(taken(image, "tag", branch.as_str(), commit));
    }
    let hold = Hold::push(repo, image, options).await?;
    let made = async {
        check_whole(repo, image, commit).await?;
        match hold.move_branch(branch, None, &[commit]).await {
            Err(RepoError::NotFastForward { actual: Some(there), .. }) => {
                Err(taken(image, "branch", branch.as_str(), there))
            }
            other => other,
        }
    }
    .await;
    hold.release().await;
    made
}

/// Makes a tag of a commit. The name must be free, of branches too; making it again for the same commit is no error.
pub async fn create_tag(
    repo: &Repository,
    image: &ImageName,
    tag: &TagName,
    commit: CommitId,
    options: HoldOptions,
) -> Result<(), RepoError> {
    check_new_name("a tag's name", tag.as_str())?;
    if let Some(tip) = repo.branch(image, &tag.as_str().parse()?).await? {
        return Err(taken(image, "branch", tag.as_str(), tip.commit));
    }
    let hold = Hold::push(repo, image, options).await?;
    let made = async {
        check_whole(repo, image, commit).await?;
        hold.rescue(&[commit], None).await?;
        hold.check()?;
        hold.settled(repo.create_tag(image, tag, commit).await)
    }
    .await;
    hold.release().await;
    made
}

/// Deletes a branch; where it was. One whose commit no other branch or tag has behind it is deleted only with `force`.
pub async fn delete_branch(
    repo: &Repository,
    image: &ImageName,
    branch: &BranchName,
    force: bool,
) -> Result<CommitId, RepoError> {
    let Some(tip) = repo.branch(image, branch).await? else {
        let has = repo.branches(image).await?.iter().map(BranchName::to_string).collect();
        return Err(RepoError::NoBranch { image: image.to_string(), branch: branch.to_string(), has });
    };
    if !force {
        let branches = repo.branch_tips(image).await?.into_iter();
        let mut others: Vec<CommitId> =
            branches.filter(|(name, _)| name != branch).map(|(_, tip)| tip.commit).collect();
        others.extend(repo.tag_states(image).await?.into_iter().map(|(_, tag)| tag.commit));
        if !History::new(repo, image, others, meta()).has(tip.commit).await? {
            return Err(RepoError::NotMerged {
                image: image.to_string(),
                branch: branch.to_string(),
                commit: tip.commit,
            });
        }
    }
    repo.delete_branch(image, branch, &tip).await?;
    Ok(tip.commit)
}

/// That a commit, and all below it, is there. What a ref names is; what none names may have been deleted in part.
async fn check_whole(repo: &Repository, image: &ImageName, commit: CommitId) -> Result<(), RepoError> {
    let mut tips: Vec<CommitId> =
        repo.branch_tips(image).await?.into_iter().map(|(_, tip)| tip.commit).collect();
    tips.extend(repo.tag_states(image).await?.into_iter().map(|(_, tag)| tag.commit));
    if History::new(repo, image, tips, meta()).has(commit).await? {
        return Ok(());
    }
    let mut walk = Walk::new(repo, image, &meta());
    walk.history([commit]).await?;
    let mut missing: std::collections::HashSet<_> = walk.closure.objects.keys().copied().collect();
    repo.listed(&keys::blocks(image), |listed| {
        if let Some(Condemned::Object(id)) = keys::parse(image, &listed.key) {
            missing.remove(&id);
        }
    })
    .await?;
    match missing.into_iter().next() {
        None => Ok(()),
        Some(id) => Err(RepoError::Missing { place: repo.describe(), key: keys::object(image, &id) }),
    }
}

/// What no new name may be. Names that were made before this was asked are read as ever.
fn check_new_name(kind: &'static str, name: &str) -> Result<(), RepoError> {
    if name == HEAD {
        let why = "it stands for the default branch";
        return Err(RepoError::BadName { kind, text: name.to_owned(), why });
    }
    Ok(())
}

fn taken(image: &ImageName, kind: &'static str, name: &str, commit: CommitId) -> RepoError {
    RepoError::NameTaken { image: image.to_string(), kind, name: name.to_owned(), commit }
}
