//! `fsck`: whether what is named is there, by listings and metadata; base objects are not read (`verify` does).
//!
//! Enters: a repository. Leaves: counts, what is wrong, and how much nobody names. Invariants: every ref, and every commit, map node and chunk table that refs lead to, is
//! read and checked; every base object they name is listed, and long enough. What nobody names is counted and no error: a push under way looks the same.

use std::sync::Arc;

use super::closure::{Walk, is_damage};
use super::meta::NoMetaCache;
use super::verify::{Problem, check_len, problem};
use super::{ImageName, MetaCache, RepoError, Repository, keys};
use crate::format::CommitId;
use crate::format::condemned::Condemned;

/// What was found.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct FsckReport {
    /// Images.
    pub images: u64,
    /// Branches and tags.
    pub refs: u64,
    /// Refs that were deleted and keep their place.
    pub deleted_refs: u64,
    /// Commits that refs lead to.
    pub commits: u64,
    /// Map nodes, likewise.
    pub nodes: u64,
    /// Chunk tables, likewise.
    pub tables: u64,
    /// Base objects, likewise.
    pub objects: u64,
    /// Objects that no ref leads to: of pushes that are under way or were cut short, or of refs that were deleted.
    pub unnamed: u64,
    /// Their bytes.
    pub unnamed_bytes: u64,
    /// Keys that are no part of a repository.
    pub strangers: Vec<String>,
    /// What is damaged or missing.
    pub problems: Vec<Problem>,
}

/// Checks a repository, or one image of it.
pub async fn fsck(repo: &Repository, only: Option<&ImageName>) -> Result<FsckReport, RepoError> {
    let mut report = FsckReport::default();
    let images = match only {
        Some(image) => vec![image.clone()],
        None => repo.image_names().await?,
    };
    for image in images {
        check(repo, &image, &mut report).await?;
    }
    report.problems.sort_by(|a, b| a.key.cmp(&b.key).then(a.what.cmp(&b.what)));
    report.problems.dedup();
    Ok(report)
}

/// The most strangers that are named.
const MAX_STRANGERS: usize = 100;

async fn check(repo: &Repository, image: &ImageName, report: &mut FsckReport) -> Result<(), RepoError> {
    report.images += 1;
    // Before the objects are listed: all that these lead to is in the listing then.
    let mut roots: Vec<(String, CommitId)> = Vec::new();
    let mut refs = Vec::new();
    for (dir, kind) in [(keys::heads(image), "heads"), (keys::tags(image), "tags")] {
        for name in repo.names_below(&dir).await? {
            refs.push(format!("{kind}/{name}"));
        }
    }
    for name in refs {
        match repo.ref_target(image, &name).await {
            Ok(Some(commit)) => {
                report.refs += 1;
                roots.push((name, commit));
            }
            Ok(None) => report.deleted_refs += 1,
            Err(error) if is_damage(&error) => report.problems.extend(problem(&error)),
            Err(error) => return Err(error),
        }
    }
    let mut listed = std::collections::HashMap::new();
    let (mut strangers, own) = (Vec::new(), format!("images/{image}/"));
    repo.listed(&keys::image(image), |object| match keys::parse(image, &object.key) {
        Some(found) => {
            listed.insert(found, object.len);
        }
        None => {
            let below = object.key.as_str().strip_prefix(&own).unwrap_or_default();
            let ours = ["refs/heads/", "refs/tags/", "holds/", "condemned/"];
            if !ours.iter().any(|ours| below.starts_with(ours)) && strangers.len() < MAX_STRANGERS {
                strangers.push(object.key.to_string());
            }
        }
    })
    .await?;
    report.strangers.extend(strangers);
    for (name, commit) in &roots {
        if !listed.contains_key(&Condemned::Commit(*commit)) {
            report.problems.push(Problem {
                key: keys::reference(image, name),
                what: format!(
                    "{}: {} names commit {commit}, which is not there",
                    repo.describe(),
                    keys::reference(image, name)
                ),
            });
        }
    }
    let meta: Arc<dyn MetaCache> = Arc::new(NoMetaCache);
    let mut walk = Walk::new(repo, image, &meta).tolerate();
    walk.history(roots.into_iter().map(|(_, commit)| commit)).await?;
    report.problems.extend(walk.problems().iter().filter_map(problem));
    let closure = &walk.closure;
    for (id, end) in &closure.objects {
        let len = listed.get(&Condemned::Object(*id)).copied();
        if let Err(error) = check_len(repo, image, *id, *end, len) {
            report.problems.extend(problem(&error));
        }
    }
    for (object, len) in &listed {
        if !closure.has(object) {
            report.unnamed += 1;
            report.unnamed_bytes += len;
        }
    }
    report.commits += closure.commits.len() as u64;
    report.nodes += closure.nodes.len() as u64;
    report.tables += closure.tables.len() as u64;
    report.objects += closure.objects.len() as u64;
    Ok(())
}
