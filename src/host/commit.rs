//! Commits of volumes: sealed in a moment, made afterwards.
//!
//! Enters: a volume's name and what the commit says. Leaves: a sealed layer and a record that says so, at once; later the commit. Invariants: a filesystem that is mounted stands still while the
//! volume is sealed and no longer; of one volume one commit is made at a time, in the order they were asked for; one that could not be made is tried again, by this daemon or the next.

use std::sync::Arc;
use std::time::Duration;

use parking_lot::Mutex;
use tokio::sync::Notify;
use tokio_util::sync::CancellationToken;

use super::jobs::{BROKE_OFF, JobKind, Progress, broke_off};
use super::{Entry, Host, HostError, JobStatus};
use crate::format::Timestamp;
use crate::volume::commit::{Made, Making};
use crate::volume::{Pending, Volume, VolumeError, VolumeName, VolumeRecord};

/// Commits of one volume that may be in the making.
const MOST_PENDING: usize = 16;
/// How long it waits before a commit that failed is tried again: at first, and at most.
const AGAIN: [Duration; 2] = [Duration::from_secs(2), Duration::from_secs(300)];
/// What is said where nothing differs.
const NOTHING: &str = "nothing to commit";
/// How long jobs of a volume that goes have to end.
const JOBS_END: Duration = Duration::from_secs(20);

/// A commit to be made.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NewCommit {
    /// Why; `None` with `amend`: as before.
    pub message: Option<String>,
    /// Who.
    pub author: String,
    /// When.
    pub time: Timestamp,
    /// Make it even where nothing differs.
    pub allow_empty: bool,
    /// Put it in the place of the last one, which must not be pushed.
    pub amend: bool,
}

/// When a new layer is put on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Sealing {
    /// In any case: something has to end there.
    Always,
    /// Not where the top layer is empty: then all there is is sealed already.
    WhereWritten,
}

/// Whether a volume's commits are being made, and how that goes.
#[derive(Default)]
pub(super) struct Makers {
    now: Mutex<Maker>,
    /// Rung when a commit is made, or could not be.
    rung: Notify,
}

#[derive(Default)]
struct Maker {
    /// Why the last try came to nothing.
    failed: Option<String>,
    /// How often it has failed since one was made.
    failures: u32,
}

impl Makers {
    /// Why the last try came to nothing.
    pub(super) fn failed(&self) -> Option<String> {
        self.now.lock().failed.clone()
    }
}

impl Host {
    /// Seals what the volume is now as a commit, which is made from then on. The job that makes it.
    pub async fn commit(self: &Arc<Self>, name: &VolumeName, new: NewCommit) -> Result<JobStatus, HostError> {
        let entry = self.entry(name)?;
        let _versioning = entry.versioning.lock().await;
        let volume = self.opened(name).await?;
        let record = volume.record();
        if record.read_only {
            return Err(VolumeError::ReadOnly { volume: name.to_string() }.into());
        }
        if record.pending.len() >= MOST_PENDING {
            return Err(HostError::TooManyCommits { volume: name.to_string(), count: record.pending.len() });
        }
        let message = self.message(name, &volume, &new).await?;
        let may_be_empty = new.allow_empty || new.amend;
        let is_attached = entry.now.read().attached.is_some();
        // A device has what the kernel has not written back yet.
        if !is_attached && !may_be_empty && volume.is_clean() {
            return Err(HostError::NothingToCommit { volume: name.to_string() });
        }
        let pending = move |upto: String| Pending {
            upto,
            message,
            author: new.author,
            time: new.time,
            allow_empty: new.allow_empty,
            amend: new.amend,
        };
        let looked = volume.clone();
        let add = move |record: &mut VolumeRecord| {
            let Some(sealed) = record.layers.len().checked_sub(2) else { return Ok(false) };
            if may_be_empty || looked.has_sealed_changes(record) {
                let upto = record.layers[sealed].name.clone();
                record.pending.push(pending(upto));
                return Ok(true);
            }
            Ok(false)
        };
        if !self.seal(name, &entry, &volume, Sealing::Always, add).await? {
            let tidying = volume.clone();
            let tidied = tokio::task::spawn_blocking(move || tidying.drop_empty_layers()).await;
            tidied.map_err(|_| HostError::Stopping)??;
            return Err(HostError::NothingToCommit { volume: name.to_string() });
        }
        tracing::info!(volume = %name, "sealed");
        Ok(self.make_commits(name, &entry, &volume))
    }

    /// The message of a commit: its own, or that of the one it replaces.
    async fn message(
        &self,
        name: &VolumeName,
        volume: &Volume,
        new: &NewCommit,
    ) -> Result<String, HostError> {
        let record = volume.record();
        if new.amend {
            let pushes = |job: &JobStatus| {
                job.volume == *name && job.kind == JobKind::Push && job.state == super::JobState::Running
            };
            if let Some(job) = self.jobs().into_iter().find(pushes) {
                let by = format!("job {} pushes it", job.id);
                return Err(HostError::InUse { volume: name.to_string(), by });
            }
            if record.pending.is_empty() && record.commit == record.pushed {
                return Err(HostError::AmendPushed { volume: name.to_string() });
            }
        }
        match (&new.message, record.pending.last()) {
            (Some(message), _) => Ok(message.clone()),
            (None, _) if !new.amend => Err(HostError::NoMessage),
            (None, Some(last)) => Ok(last.message.clone()),
            (None, None) => Ok(volume.device().base().version().commit().message.clone()),
        }
    }

    /// The volume, open.
    pub(super) async fn opened(&self, name: &VolumeName) -> Result<Arc<Volume>, HostError> {
        self.serve(name).await?;
        let entry = self.entry(name)?;
        let open = entry.now.read().open.as_ref().map(|open| open.volume.clone());
        open.ok_or(HostError::Stopping)
    }

    /// Seals the volume, its filesystem standing still where it is mounted, and changes its record together with that. Of who has `versioning`, and not `turn`: what the device is asked
    /// meanwhile may need new sockets, which need that turn.
    pub(super) async fn seal(
        &self,
        name: &VolumeName,
        entry: &Entry,
        volume: &Arc<Volume>,
        sealing: Sealing,
        change: impl FnOnce(&mut VolumeRecord) -> Result<bool, VolumeError> + Send + 'static,
    ) -> Result<bool, HostError> {
        let is_attached = entry.now.read().attached.is_some();
        // A layer that waits to be put on lies on one that takes writes: what is below the record's top is not sealed then.
        let nothing_to_seal = !is_attached && !volume.has_layer_waiting() && volume.top_is_empty();
        let is_still = if sealing == Sealing::WhereWritten && nothing_to_seal {
            true
        } else {
            self.put_new_layer(name, entry, volume, sealing == Sealing::Always).await?
        };
        let settling = volume.clone();
        let settle = move || {
            let mut changed = false;
            // What is sealed is sealed, still or not.
            settling.settle(|record| {
                changed = is_still && change(record)?;
                Ok(())
            })?;
            Ok::<_, VolumeError>(changed)
        };
        let changed = tokio::task::spawn_blocking(settle).await.map_err(|_| HostError::Stopping)??;
        if is_still { Ok(changed) } else { Err(HostError::NotStill { volume: name.to_string() }) }
    }

    /// Has a new layer take the writes; whether the filesystem stood still until it did.
    async fn put_new_layer(
        &self,
        name: &VolumeName,
        entry: &Entry,
        volume: &Arc<Volume>,
        is_for_commit: bool,
    ) -> Result<bool, HostError> {
        let preparing = volume.clone();
        let prepared = tokio::task::spawn_blocking(move || preparing.prepare_layer(is_for_commit));
        let prepared = prepared.await.map_err(|_| HostError::Stopping)??;
        // Not between the daemon's own unmount and its look.
        let mounting = entry.mounting.lock().await;
        let index = entry.now.read().attached.as_ref().map(|attached| attached.index);
        let still = match index {
            Some(index) => Some(self.stand_still(name, &volume.record(), index).await?),
            None => None,
        };
        let sealing = volume.clone();
        let sealed = tokio::task::spawn_blocking(move || sealing.seal(prepared)).await;
        let is_still = match still {
            Some(still) => still.end().await,
            None => true,
        };
        drop(mounting);
        sealed.map_err(|_| HostError::Stopping)??;
        Ok(is_still)
    }

    /// Has the commits of a volume that are in the making be made, where nobody does so already. The job that does.
    pub(super) fn make_commits(
        self: &Arc<Self>,
        name: &VolumeName,
        entry: &Arc<Entry>,
        volume: &Arc<Volume>,
    ) -> JobStatus {
        let stop = self.stop.child_token();
        let making = Arc::<Making>::default();
        let _maker = entry.making.now.lock();
        let (status, is_new) = self.jobs.begin(name, Progress::Commit(making.clone()), stop.clone());
        if !is_new {
            // It looks for more before it ends, with this lock.
            return status;
        }
        let (host, name, entry, volume) = (self.clone(), name.clone(), entry.clone(), volume.clone());
        let id = status.id;
        tokio::spawn(async move {
            let working = {
                let (host, name, entry, volume) = (host.clone(), name.clone(), entry.clone(), volume.clone());
                async move { host.make_until_done(id, &name, &entry, volume, &making, stop).await }
            };
            if tokio::spawn(working).await.is_err() {
                // It panicked, and the log says where: the next try must not be kept away by it.
                host.jobs.end(id, broke_off());
                entry.making.now.lock().failed = Some(BROKE_OFF.to_owned());
                entry.making.rung.notify_waiters();
                host.make_later(&name, &entry, &volume, AGAIN[1]);
            }
        });
        status
    }

    async fn make_until_done(
        self: Arc<Self>,
        id: u64,
        name: &VolumeName,
        entry: &Arc<Entry>,
        volume: Arc<Volume>,
        making: &Making,
        stop: CancellationToken,
    ) {
        let mut said = NOTHING.to_owned();
        loop {
            let made = volume.make_commit(making, &stop).await;
            if let Ok(Some(Made::Commit(_))) = &made {
                // What a pinned volume stands on now is known here, and so kept at the next start too.
                volume.keep_pinned(&self.cache).await;
            }
            let goes_on = self.after_a_try(id, name, entry, &volume, &stop, made, &mut said);
            entry.making.rung.notify_waiters();
            if !goes_on {
                return;
            }
        }
    }

    /// Notes what became of a try; whether there is more to do.
    #[expect(clippy::too_many_arguments, reason = "all that a job knows")]
    fn after_a_try(
        self: &Arc<Self>,
        id: u64,
        name: &VolumeName,
        entry: &Arc<Entry>,
        volume: &Arc<Volume>,
        stop: &CancellationToken,
        made: Result<Option<Made>, VolumeError>,
        said: &mut String,
    ) -> bool {
        let mut maker = entry.making.now.lock();
        match made {
            Ok(Some(made)) => {
                *said = match made {
                    Made::Commit(commit) => commit.to_string(),
                    Made::Nothing => NOTHING.to_owned(),
                };
                tracing::info!(volume = %name, commit = said.as_str(), "made");
                (maker.failed, maker.failures) = (None, 0);
                true
            }
            // Under the lock: whoever adds one after this look begins another job.
            Ok(None) if volume.record().pending.is_empty() => {
                self.jobs.end_with(id, Ok(std::mem::take(said)));
                false
            }
            Ok(None) => true,
            Err(_) if stop.is_cancelled() => {
                self.jobs.end_with(id, Err(HostError::Stopping));
                // It is sealed and told of: who cancels it has it made later.
                self.make_later(name, entry, volume, AGAIN[1]);
                false
            }
            Err(error) => {
                tracing::warn!(volume = %name, %error, "a commit could not be made yet");
                maker.failed = Some(error.to_string());
                maker.failures += 1;
                let pause = AGAIN[0] * 2u32.saturating_pow(maker.failures.min(16) - 1);
                self.jobs.end_with(id, Err(error.into()));
                self.make_later(name, entry, volume, pause.min(AGAIN[1]));
                false
            }
        }
    }

    /// Tries again after a while, if somebody has the volume open still.
    fn make_later(
        self: &Arc<Self>,
        name: &VolumeName,
        entry: &Arc<Entry>,
        volume: &Arc<Volume>,
        pause: Duration,
    ) {
        let (host, name) = (Arc::downgrade(self), name.clone());
        let (entry, volume, stop) = (entry.clone(), Arc::downgrade(volume), self.stop.child_token());
        tokio::spawn(async move {
            tokio::select! { () = tokio::time::sleep(pause) => {}, () = stop.cancelled() => return }
            if let (Some(host), Some(volume)) = (host.upgrade(), volume.upgrade()) {
                host.make_commits(&name, &entry, &volume);
            }
        });
    }

    /// Waits until all commits of a volume that are in the making are made, or one could not be.
    pub(super) async fn all_made(
        self: &Arc<Self>,
        name: &VolumeName,
        entry: &Arc<Entry>,
    ) -> Result<(), HostError> {
        let volume = self.opened(name).await?;
        loop {
            let rung = entry.making.rung.notified();
            let mut rung = std::pin::pin!(rung);
            // Before the look: what is rung after it is heard.
            rung.as_mut().enable();
            if volume.record().pending.is_empty() {
                return Ok(());
            }
            let failed = entry.making.now.lock().failed.clone();
            if failed.is_some() {
                return Err(HostError::BeingMade { volume: name.to_string(), why: failed });
            }
            self.make_commits(name, entry, &volume);
            rung.await;
        }
    }

    /// Goes on with commits that an earlier daemon had in the making.
    pub async fn resume_commits(self: &Arc<Self>) {
        for (name, entry) in self.entries() {
            let has_pending = |record: &VolumeRecord| !record.pending.is_empty();
            if !entry.now.read().record().as_ref().is_some_and(has_pending) {
                continue;
            }
            let (host, stop) = (self.clone(), self.stop.child_token());
            tokio::spawn(async move {
                tokio::select! { () = host.resume(&name, &entry) => {}, () = stop.cancelled() => {} }
            });
        }
    }

    async fn resume(self: &Arc<Self>, name: &VolumeName, entry: &Arc<Entry>) {
        let mut pause = AGAIN[0];
        loop {
            match self.opened(name).await {
                Ok(volume) => {
                    self.make_commits(name, entry, &volume);
                    return;
                }
                Err(HostError::NoVolume { .. }) => return,
                Err(error) => {
                    tracing::warn!(volume = %name, %error, "a commit can't be gone on with yet");
                    entry.making.now.lock().failed = Some(error.to_string());
                }
            }
            tokio::time::sleep(pause).await;
            pause = (pause * 2).min(AGAIN[1]);
        }
    }

    /// Has the jobs of a volume end, and waits for that, bounded.
    pub(super) async fn end_jobs_of(&self, name: &VolumeName) {
        self.jobs.stop_all_of(name);
        let ended = async {
            while self.refuse_with_a_job(name).is_err() {
                tokio::time::sleep(Duration::from_millis(10)).await;
            }
        };
        let _ = tokio::time::timeout(JOBS_END, ended).await;
    }

    /// Forgets what was made here of a repository that no volume is of any more.
    pub(super) async fn forget_what_was_made_for(&self, gone: &VolumeRecord) {
        if self.records().iter().any(|(_, record)| record.repository == gone.repository) {
            return;
        }
        // Whoever makes a volume now may make one of it: then it stays until the next one goes.
        let Ok(alone) = self.coming.try_write() else { return };
        let (state, repository) = (self.state.clone(), gone.repository.clone());
        let taken = tokio::task::spawn_blocking(move || state.take_away_made(&repository)).await;
        drop(alone);
        let dir = match taken {
            Ok(Ok(Some(dir))) => dir,
            Ok(Err(error)) => return tracing::warn!(%error, "can't take away what was made here"),
            // It logged, if it panicked.
            _ => return,
        };
        let deleting = move || {
            if let Err(error) = std::fs::remove_dir_all(&dir) {
                tracing::warn!(dir = %dir.display(), %error, "can't delete what was made here");
            }
        };
        let _ = tokio::task::spawn_blocking(deleting).await;
    }
}
