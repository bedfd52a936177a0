//! Commits of a volume brought to its repository.
//!
//! Enters: a volume's name, and a branch where it is not the volume's own. Leaves: the branch, moved, and a record that knows. Invariant: the first of the volume's places decides; the others get
//! copies of what it has, and each that fails is told of.

use std::sync::Arc;

use super::jobs::{Progress, broke_off};
use super::{Entry, Host, HostError, JobStatus};
use crate::format::ids;
use crate::repo::names::MIN_PREFIX_DIGITS;
use crate::repo::push::{Push, PushReport, Pushing};
use crate::repo::sync::sync;
use crate::repo::{BranchName, RepoError, Repository};
use crate::store;
use crate::units::ByteLen;
use crate::volume::{VolumeName, VolumeRecord};

impl Host {
    /// Begins to push a volume's commits to a branch: the one given, else the volume's own. Where that is under way already, it is that job.
    pub async fn push(
        self: &Arc<Self>,
        name: &VolumeName,
        branch: Option<BranchName>,
    ) -> Result<JobStatus, HostError> {
        let entry = self.entry(name)?;
        let record = self.record(name, &entry)?;
        if branch.is_none() && record.branch.is_none() {
            return Err(HostError::NoBranch { volume: name.to_string() });
        }
        let stop = self.stop.child_token();
        let progress = Arc::<Pushing>::default();
        let mut pushing_to = entry.pushing_to.lock();
        let (status, is_new) = self.jobs.begin(name, Progress::Push(progress.clone()), stop.clone());
        if !is_new {
            if *pushing_to != branch {
                let by = format!("job {} pushes it to another branch", status.id);
                return Err(HostError::InUse { volume: name.to_string(), by });
            }
            return Ok(status);
        }
        pushing_to.clone_from(&branch);
        drop(pushing_to);
        let (host, name, id) = (self.clone(), name.clone(), status.id);
        tokio::spawn(async move {
            let pushing = {
                let (host, name) = (host.clone(), name.clone());
                async move {
                    tokio::select! {
                        pushed = host.push_now(&name, &entry, branch, &progress) => pushed,
                        () = stop.cancelled() => Err(HostError::Stopping),
                    }
                }
            };
            match tokio::spawn(pushing).await {
                Ok(pushed) => {
                    if let Err(error) = &pushed {
                        tracing::warn!(volume = %name, %error, "not pushed");
                    }
                    host.jobs.end_with(id, pushed);
                }
                // It panicked: the next push must not be kept away by it.
                Err(_) => host.jobs.end(id, broke_off()),
            }
        });
        Ok(status)
    }

    async fn push_now(
        self: &Arc<Self>,
        name: &VolumeName,
        entry: &Arc<Entry>,
        asked: Option<BranchName>,
        progress: &Pushing,
    ) -> Result<String, HostError> {
        // Tip and branch of one moment, and none in which the tip is about to be replaced.
        let (volume, history) = loop {
            self.all_made(name, entry).await?;
            let _versioning = entry.versioning.lock().await;
            let volume = self.opened(name).await?;
            let history = self.history_of(&volume);
            if !history.record.pending.iter().any(|pending| pending.amend) {
                break (volume, history);
            }
        };
        let record = history.record.clone();
        let own = record.branch.as_ref().map(|branch| branch.parse::<BranchName>()).transpose()?;
        let no_branch = || HostError::NoBranch { volume: name.to_string() };
        let branch = asked.clone().or(own).ok_or_else(no_branch)?;
        let to = self.first_place(&record).await?;
        if asked.is_none() && to.branch(&history.image, &branch).await?.is_none() {
            // Somebody deleted it, or records of before knew it as a ref without its kind. Only who names a branch makes one.
            let is_one = to.tag(&history.image, &branch.as_str().parse()?).await?.is_none()
                && !is_commit_prefix(branch.as_str());
            let (image, branch) = (record.image.clone(), branch.to_string());
            return Err(match is_one {
                true => HostError::BranchGone { volume: name.to_string(), image, branch },
                false => no_branch(),
            });
        }
        let (tip, known) = (record.commit, record.pushed);
        let push = Push {
            made: &history.made,
            here: &history.here,
            to: &to,
            image: &history.image,
            branch: &branch,
            meta: &history.meta,
            progress,
        };
        let report = push.run(tip, Some(known)).await.map_err(|error| match error {
            RepoError::NotFastForward { image, branch, actual: Some(actual), .. } => {
                let (volume, actual) = (name.to_string(), actual.to_string()[..12].to_owned());
                HostError::NotFastForward { volume, image, branch, actual }
            }
            error => error.into(),
        })?;
        tracing::info!(volume = %name, %branch, commit = %tip, sent = report.sent, bytes = report.sent_bytes.0, "pushed");
        let (remembered, on) = (branch.to_string(), tip);
        let remember = move || {
            let change = |record: &mut VolumeRecord| {
                // Commits that were made meanwhile follow it.
                record.pushed = on;
                record.branch = Some(remembered);
                Ok(())
            };
            volume.change_record(change, || Ok(()))
        };
        tokio::task::spawn_blocking(remember).await.map_err(|_| HostError::Stopping)??;
        self.copy_to_others(&record, &to, &history.image).await?;
        Ok(told(&record, &branch, &report))
    }

    /// The first of a volume's places, for writing.
    pub(super) async fn first_place(&self, record: &VolumeRecord) -> Result<Repository, HostError> {
        let first = record.access.first().map(String::as_str).unwrap_or_default();
        let to = Repository::open(store::url::open(first)?).await?;
        if ids::to_hex(&to.id()) != record.repository {
            let of = format!("the one volumes of {} were made from", record.image);
            return Err(RepoError::OtherRepository { place: to.describe(), of }.into());
        }
        Ok(to)
    }

    async fn copy_to_others(
        &self,
        record: &VolumeRecord,
        from: &Repository,
        image: &crate::repo::ImageName,
    ) -> Result<(), HostError> {
        let mut failed = Vec::new();
        for place in record.access.iter().skip(1) {
            let copying = async {
                let store = store::url::open(place)?;
                // A place that is not mounted now is not one to begin a new copy in.
                Repository::open(store.clone()).await?;
                Ok::<_, HostError>(sync(from, store, Some(image), &|_: ByteLen| ()).await?)
            };
            match copying.await {
                Ok(report) if report.diverged.is_empty() => {}
                Ok(report) => {
                    failed.push(format!("{place} has moved on by itself: {}", report.diverged.join(", ")))
                }
                Err(error) => failed.push(format!("{place}: {error}")),
            }
        }
        if failed.is_empty() {
            Ok(())
        } else {
            Err(HostError::NotEverywhere { first: from.describe(), failed })
        }
    }
}

/// Whether a name can be the start of a commit's id.
fn is_commit_prefix(name: &str) -> bool {
    name.len() >= MIN_PREFIX_DIGITS && name.bytes().all(|byte| byte.is_ascii_hexdigit())
}

/// What came of it, in a line.
fn told(record: &VolumeRecord, branch: &BranchName, report: &PushReport) -> String {
    let to = format!("{}@{branch}", record.image);
    if report.up_to_date {
        return format!("{to} is up to date");
    }
    let commits = if report.commits == 1 { "commit" } else { "commits" };
    let sent = report.sent_bytes.human();
    format!("{to} is at {}: {} {commits}, {sent} sent", &record.commit.to_string()[..12], report.commits)
}
