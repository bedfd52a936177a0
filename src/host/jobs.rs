//! Work that takes long: what it is about, how far it is, how it ended.
//!
//! Enters: pieces of work on volumes. Leaves: their state, for whoever asks. Invariants: one that runs is known until it has ended, and can be cancelled; of those that
//! ended the last [`REMEMBERED`] are.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime};

use parking_lot::Mutex;
use tokio_util::sync::CancellationToken;

use super::{Host, HostError};
use crate::repo::push::Pushing;
use crate::units::ByteLen;
use crate::volume::commit::Making;
use crate::volume::pin::{self, Pinning};
use crate::volume::{self, VolumeName, VolumeRecord};

/// Jobs that ended are told of until so many more have.
const REMEMBERED: usize = 64;

/// Why a job failed that panicked.
pub(super) const BROKE_OFF: &str = "it broke off; the log says why";

pub(super) fn broke_off() -> JobState {
    JobState::Failed(BROKE_OFF.to_owned())
}

/// A job as it is now.
#[derive(Clone, Debug)]
pub struct JobStatus {
    /// Its number, that no other job of this daemon has.
    pub id: u64,
    /// What it does.
    pub kind: JobKind,
    /// The volume it is about.
    pub volume: VolumeName,
    /// When it was begun.
    pub began: SystemTime,
    /// How long it has been running, or ran.
    pub took: Duration,
    /// Bytes that are done.
    pub done: ByteLen,
    /// Bytes there are to do, as far as is known.
    pub total: ByteLen,
    /// Where it stands.
    pub state: JobState,
    /// Why it failed, whole.
    pub failure: Option<Arc<HostError>>,
    /// What came of it, in a line.
    pub said: Option<String>,
}

/// What a job does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum JobKind {
    /// Fetches all of a volume, to stay.
    Pin,
    /// Makes what was sealed into commits.
    Commit,
    /// Brings commits to the repository.
    Push,
}

/// How far a job is.
#[derive(Clone, Debug)]
pub(super) enum Progress {
    Pin(Arc<Pinning>),
    Commit(Arc<Making>),
    Push(Arc<Pushing>),
}

impl Progress {
    fn kind(&self) -> JobKind {
        match self {
            Progress::Pin(_) => JobKind::Pin,
            Progress::Commit(_) => JobKind::Commit,
            Progress::Push(_) => JobKind::Push,
        }
    }

    /// What is done, and what there is to do as far as is known.
    fn figures(&self) -> (ByteLen, ByteLen) {
        match self {
            Progress::Pin(pinning) => (pinning.done(), pinning.total()),
            Progress::Commit(making) => (making.looked_at(), ByteLen(0)),
            Progress::Push(pushing) => (pushing.sent(), pushing.total()),
        }
    }
}

/// Where a job stands.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum JobState {
    /// It runs.
    Running,
    /// It did what it was to do.
    Done,
    /// Somebody cancelled it, or the daemon was stopped.
    Cancelled,
    /// It failed, for this reason.
    Failed(String),
}

struct Job {
    volume: VolumeName,
    began: (SystemTime, Instant),
    progress: Progress,
    stop: CancellationToken,
    failure: Option<Arc<HostError>>,
    said: Option<String>,
    ended: Option<(JobState, Duration)>,
}

/// All jobs of a host.
#[derive(Default)]
pub(super) struct Jobs {
    all: Mutex<Numbered>,
}

#[derive(Default)]
struct Numbered {
    last: u64,
    jobs: BTreeMap<u64, Job>,
}

impl Job {
    fn status(&self, id: u64) -> JobStatus {
        let (state, took) = self.ended.clone().unwrap_or_else(|| (JobState::Running, self.began.1.elapsed()));
        let (done, total) = self.progress.figures();
        let (kind, volume) = (self.progress.kind(), self.volume.clone());
        let (failure, said) = (self.failure.clone(), self.said.clone());
        JobStatus { id, kind, volume, began: self.began.0, took, done, total, state, failure, said }
    }
}

impl Jobs {
    /// The running job of a volume and a kind, or a new one; whether it is new.
    pub(super) fn begin(
        &self,
        volume: &VolumeName,
        progress: Progress,
        stop: CancellationToken,
    ) -> (JobStatus, bool) {
        let mut all = self.all.lock();
        let runs = |(_, job): &(&u64, &Job)| {
            job.volume == *volume && job.progress.kind() == progress.kind() && job.ended.is_none()
        };
        if let Some((id, job)) = all.jobs.iter().find(runs) {
            return (job.status(*id), false);
        }
        all.last += 1;
        let (id, began) = (all.last, (SystemTime::now(), Instant::now()));
        let (failure, said) = (None, None);
        let job = Job { volume: volume.clone(), began, progress, stop, failure, said, ended: None };
        let status = job.status(id);
        all.jobs.insert(id, job);
        (status, true)
    }

    /// Ends a job by what came of it.
    pub(super) fn end_with(&self, id: u64, ended: Result<String, HostError>) {
        let state = {
            let mut all = self.all.lock();
            let Some(job) = all.jobs.get_mut(&id) else { return };
            match ended {
                Ok(said) => {
                    job.said = Some(said);
                    JobState::Done
                }
                Err(HostError::Stopping) => JobState::Cancelled,
                Err(error) => {
                    let told = error.to_string();
                    job.failure = Some(Arc::new(error));
                    JobState::Failed(told)
                }
            }
        };
        self.end(id, state);
    }

    /// Has the running jobs of a volume end.
    pub(super) fn stop_all_of(&self, volume: &VolumeName) {
        let all = self.all.lock();
        all.jobs
            .values()
            .filter(|job| job.volume == *volume && job.ended.is_none())
            .for_each(|job| job.stop.cancel());
    }

    pub(super) fn end(&self, id: u64, state: JobState) {
        let mut all = self.all.lock();
        if let Some(job) = all.jobs.get_mut(&id) {
            job.ended = Some((state, job.began.1.elapsed()));
        }
        let ended = all.jobs.iter().filter(|(_, job)| job.ended.is_some()).map(|(id, _)| *id);
        let ended: Vec<u64> = ended.collect();
        for id in ended.iter().take(ended.len().saturating_sub(REMEMBERED)) {
            all.jobs.remove(id);
        }
    }

    /// Volumes that are being pinned.
    pub(super) fn being_pinned(&self) -> Vec<VolumeName> {
        let all = self.all.lock();
        let pins = |job: &&Job| job.ended.is_none() && job.progress.kind() == JobKind::Pin;
        all.jobs.values().filter(pins).map(|job| job.volume.clone()).collect()
    }
}

impl Host {
    /// Every job that is known, the oldest first.
    pub fn jobs(&self) -> Vec<JobStatus> {
        self.jobs.all.lock().jobs.iter().map(|(id, job)| job.status(*id)).collect()
    }

    /// One job.
    pub fn job(&self, id: u64) -> Result<JobStatus, HostError> {
        let all = self.jobs.all.lock();
        all.jobs.get(&id).map(|job| job.status(id)).ok_or(HostError::NoJob { id })
    }

    /// Has a job end before it is done; one that has ended stays as it is.
    pub fn cancel(&self, id: u64) -> Result<JobStatus, HostError> {
        let all = self.jobs.all.lock();
        let job = all.jobs.get(&id).ok_or(HostError::NoJob { id })?;
        job.stop.cancel();
        Ok(job.status(id))
    }

    /// Begins to fetch all of a volume, which then stays here. Where that is under way already, it is that job.
    pub async fn pin(self: &Arc<Self>, name: &VolumeName) -> Result<JobStatus, HostError> {
        let entry = self.entry(name)?;
        let _turn = entry.turn.lock().await;
        self.serve_in_turn(name, &entry).await?;
        let Some(open) = entry.now.read().open.as_ref().map(|open| open.volume.clone()) else {
            return Err(HostError::Stopping);
        };
        let stop = self.stop.child_token();
        let progress = Arc::<Pinning>::default();
        let (status, is_new) = {
            // What is kept is not looked through in this moment.
            let _keeping = self.keeping.lock().await;
            self.jobs.begin(name, Progress::Pin(progress.clone()), stop.clone())
        };
        if !is_new {
            return Ok(status);
        }
        let (host, id, name) = (self.clone(), status.id, name.clone());
        let cache = self.cache.clone();
        let pinning = tokio::spawn(async move {
            tokio::select! {
                done = open.pin(&cache, &progress) => match done {
                    Ok(_) => JobState::Done,
                    Err(error) => JobState::Failed(error.to_string()),
                },
                () = stop.cancelled() => JobState::Cancelled,
            }
        });
        tokio::spawn(async move {
            // The volume is let go by then: who hears of the end may take it away.
            let ended = pinning.await.unwrap_or_else(|_| broke_off());
            match &ended {
                JobState::Failed(error) => tracing::warn!(job = id, volume = %name, error, "not pinned"),
                ended => tracing::info!(job = id, volume = %name, ?ended, "pinning ended"),
            }
            host.jobs.end(id, ended);
            host.keep_what_is_pinned().await;
        });
        Ok(status)
    }

    /// Lets a volume leave the cache again. It must not be being pinned.
    pub async fn unpin(self: &Arc<Self>, name: &VolumeName) -> Result<(), HostError> {
        let entry = self.entry(name)?;
        let turn = entry.turn.lock().await;
        self.record(name, &entry)?;
        self.refuse_with_a_job(name)?;
        let dir = self.state.volume_dir(name.as_str());
        let unpinning = move || pin::unpin(&dir);
        tokio::task::spawn_blocking(unpinning).await.map_err(|_| HostError::Stopping)??;
        drop(turn);
        self.keep_what_is_pinned().await;
        tracing::info!(volume = %name, "unpinned");
        Ok(())
    }

    /// Refuses where a job of the volume runs.
    pub(super) fn refuse_with_a_job(&self, name: &VolumeName) -> Result<(), HostError> {
        let running =
            self.jobs().into_iter().find(|job| job.state == JobState::Running && job.volume == *name);
        match running {
            Some(job) => {
                let what = match job.kind {
                    JobKind::Pin => "fetches all of it",
                    JobKind::Commit => "makes a commit of it",
                    JobKind::Push => "pushes it",
                };
                let by = format!("job {} {what}", job.id);
                Err(HostError::InUse { volume: name.to_string(), by })
            }
            None => Ok(()),
        }
    }

    /// Has the cache keep what pinned volumes need, and nothing else; where that can't be told, what it keeps now too.
    pub(super) async fn keep_what_is_pinned(self: &Arc<Self>) {
        let host = self.clone();
        let _keeping = self.keeping.lock().await;
        // It logged, if it panicked; then what was kept is kept.
        let _ = tokio::task::spawn_blocking(move || host.keep_what_is_pinned_now()).await;
    }

    /// The same, of who has `keeping`. Blocks on files.
    pub(super) fn keep_what_is_pinned_now(&self) {
        let being_pinned = self.jobs.being_pinned();
        let is_to_stay = |(name, _): &(VolumeName, VolumeRecord)| {
            pin::is_pinned(&self.state.volume_dir(name.as_str())) || being_pinned.contains(name)
        };
        let commits: BTreeSet<_> =
            self.records().into_iter().filter(is_to_stay).map(|(_, record)| record.commit).collect();
        let (needed, are_all) = volume::chunks_here(&self.cache, commits);
        if are_all {
            self.cache.keep_only(needed);
        } else {
            self.cache.keep(needed);
            tracing::warn!("can't tell all that pinned volumes need: what was kept so far is kept too");
        }
    }
}
