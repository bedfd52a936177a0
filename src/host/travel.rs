//! A volume goes to another version: checkout, pull, reset.
//!
//! Enters: a volume's name, and where to. Leaves: a volume that stands there, with nothing written to it. Invariants: nobody uses it meanwhile; what would be lost is lost with `force` alone.

use std::sync::Arc;

use super::history::History;
use super::snapshot::Decided;
use super::{Entry, Host, HostError, VolumeStatus};
use crate::format::CommitId;
use crate::repo::names::MIN_PREFIX_DIGITS;
use crate::repo::push::{MAX_HISTORY, is_ancestor, is_made, is_there, made_commits};
use crate::repo::{BranchName, Reference, RepoError, Repository, Resolved};
use crate::volume::travel::{Standing, To};
use crate::volume::{VolumeName, VolumeRecord};

/// The volume's own commit, as a reference.
const HEAD: &str = "HEAD";

/// What a pull came to.
#[derive(Clone, Debug)]
pub struct Pulled {
    /// The volume.
    pub volume: VolumeStatus,
    /// Whether it stands on another commit now.
    pub moved: bool,
}

impl Host {
    /// Has a volume stand on another version.
    pub async fn checkout(
        self: &Arc<Self>,
        name: &VolumeName,
        reference: &Reference,
        force: bool,
    ) -> Result<VolumeStatus, HostError> {
        let entry = self.entry(name)?;
        let _versioning = entry.versioning.lock().await;
        let (history, decided) = self.at_rest(name, &entry, "a checkout", force).await?;
        let to = self.resolve_for(&history, reference).await?;
        if to.commit != history.record.commit && !force {
            self.refuse_losing_commits(name, &history, to.commit, "a checkout").await?;
        }
        self.go(name, &entry, decided, to).await
    }

    /// Has a volume without changes of its own stand on its branch's tip.
    pub async fn pull(self: &Arc<Self>, name: &VolumeName, force: bool) -> Result<Pulled, HostError> {
        let entry = self.entry(name)?;
        let _versioning = entry.versioning.lock().await;
        let history = self.history_of(&self.opened(name).await?);
        let record = history.record.clone();
        let no_branch = || HostError::NoBranch { volume: name.to_string() };
        let branch: BranchName = record.branch.as_ref().ok_or_else(no_branch)?.parse()?;
        let to = self.first_place(&record).await?;
        let (volume, image) = (name.to_string(), record.image.clone());
        let Some(tip) = to.branch(&history.image, &branch).await? else {
            let branch = branch.to_string();
            return Err(HostError::BranchGone { volume, image, branch });
        };
        let (old, new) = (tip.commit, record.commit);
        let has_it = old == new
            || (record.commit != record.pushed
                && is_ancestor(&history.made, &history.image, &history.meta, old, new, MAX_HISTORY).await?);
        if has_it {
            // Nothing that is there is missing here.
            return Ok(Pulled { volume: self.inspect(name)?, moved: false });
        }
        if !force && record.has_unpushed() {
            let branch = branch.to_string();
            return Err(HostError::Diverged { volume, image, branch });
        }
        let (history, decided) = self.at_rest(name, &entry, "a pull", force).await?;
        let found = history.commit(tip.commit).await?;
        let branch = Some(branch.to_string());
        let to = Standing { commit: tip.commit, pushed: tip.commit, branch, size: found.size };
        Ok(Pulled { volume: self.go(name, &entry, decided, to).await?, moved: true })
    }

    /// Has a volume be what its commit is.
    pub async fn reset(self: &Arc<Self>, name: &VolumeName, force: bool) -> Result<VolumeStatus, HostError> {
        let entry = self.entry(name)?;
        let _versioning = entry.versioning.lock().await;
        let (history, decided) = self.at_rest(name, &entry, "a reset", force).await?;
        let VolumeRecord { commit, pushed, branch, .. } = history.record.clone();
        let size = history.commit(commit).await?.size;
        self.go(name, &entry, decided, Standing { commit, pushed, branch, size }).await
    }

    /// A volume that can go somewhere else: nobody uses it, no commit of it is being made, and there is nothing to be lost, or it is to be.
    async fn at_rest(
        &self,
        name: &VolumeName,
        entry: &Arc<Entry>,
        action: &'static str,
        force: bool,
    ) -> Result<(History, Option<Decided>), HostError> {
        self.refuse_in_use(name, entry)?;
        if force {
            // One that can't be made must not be in the way of everything.
            self.end_jobs_of(name).await;
            return Ok((self.history_of(&self.opened(name).await?), None));
        }
        let volume = self.opened(name).await?;
        let history = self.history_of(&volume);
        if !history.record.pending.is_empty() {
            let (volume, why) = (name.to_string(), entry.making.failed());
            return Err(HostError::BeingMade { volume, why });
        }
        if !volume.is_clean() {
            return Err(HostError::dirty(name, action, &volume));
        }
        let decided = Decided { record: history.record.clone(), losing: Some(action) };
        Ok((history, Some(decided)))
    }

    async fn go(
        self: &Arc<Self>,
        name: &VolumeName,
        entry: &Arc<Entry>,
        decided: Option<Decided>,
        to: Standing,
    ) -> Result<VolumeStatus, HostError> {
        let stands_there =
            |Decided { record, .. }: &Decided| record.commit == to.commit && record.branch == to.branch;
        if decided.as_ref().is_some_and(stands_there) {
            return self.inspect(name);
        }
        tracing::info!(volume = %name, commit = %to.commit, "goes to another version");
        self.stand(name, entry, To::Commit(to), decided).await?;
        self.inspect(name)
    }

    /// Refuses where commits that are nowhere else are not in the history of `to`.
    async fn refuse_losing_commits(
        &self,
        name: &VolumeName,
        history: &History,
        to: CommitId,
        action: &'static str,
    ) -> Result<(), HostError> {
        let record = &history.record;
        if record.commit == record.pushed
            || is_ancestor(&history.made, &history.image, &history.meta, record.commit, to, MAX_HISTORY)
                .await?
        {
            return Ok(());
        }
        Err(HostError::Unpushed { volume: name.to_string(), action })
    }

    /// What a reference stands for, to a volume: its own commit, a branch or tag of the repository, or the start of a commit's id, made here or there.
    async fn resolve_for(&self, history: &History, reference: &Reference) -> Result<Standing, HostError> {
        let record = &history.record;
        let image = &history.image;
        let found = match reference.name() {
            HEAD => Resolved { commit: record.commit, branch: None },
            name => {
                let there = history.made.resolve(image, &name.parse()?, &history.meta).await;
                let lower = name.to_ascii_lowercase();
                let is_hex =
                    lower.len() >= MIN_PREFIX_DIGITS && lower.bytes().all(|byte| byte.is_ascii_hexdigit());
                match there {
                    Err(error @ (RepoError::NoRef { .. } | RepoError::Store(_))) if is_hex => {
                        match made_commits(&history.here, image, &lower).await?.as_slice() {
                            [] => return Err(error.into()),
                            [commit] => Resolved { commit: *commit, branch: None },
                            several => {
                                let matches = several.iter().map(CommitId::to_string).collect();
                                let (image, prefix) = (image.to_string(), lower);
                                return Err(RepoError::Ambiguous { image, prefix, matches }.into());
                            }
                        }
                    }
                    there => there?,
                }
            }
        };
        let mut commit = found.commit;
        for depth in 0..reference.back() {
            let parents = history.commit(commit).await?.parents;
            let (image, reference) = (image.to_string(), reference.to_string());
            commit = *parents.first().ok_or(RepoError::NoAncestor { image, reference, depth })?;
        }
        let branch = found.branch.filter(|_| reference.back() == 0).map(|branch| branch.to_string());
        let size = history.commit(commit).await?.size;
        let pushed = if branch.is_some() { commit } else { self.pushed_of(history, commit).await? };
        // On its own commit it is where it was.
        let branch = branch.or_else(|| record.branch.clone().filter(|_| commit == record.commit));
        Ok(Standing { commit, pushed, branch, size })
    }

    /// The nearest commit of a history that the repository has.
    async fn pushed_of(&self, history: &History, commit: CommitId) -> Result<CommitId, HostError> {
        let to = self.first_place(&history.record).await?;
        let mut at = commit;
        for _ in 0..MAX_HISTORY {
            let here = is_made(&history.here, &history.image, at).await?;
            if !here || has_commit(&to, history, at).await? {
                return Ok(at);
            }
            match history.commit(at).await?.parents.first() {
                Some(parent) => at = *parent,
                None => break,
            }
        }
        Ok(at)
    }
}

async fn has_commit(to: &Repository, history: &History, id: CommitId) -> Result<bool, RepoError> {
    Ok(is_there(&**to.store(), &to.commit_key(&history.image, &id)).await?)
}
