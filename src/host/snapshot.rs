//! States of a volume to come back to, and volumes made of one.
//!
//! Enters: a volume's name. Leaves: a snapshot in its record, the volume as it was, or another volume. Invariant: nothing is copied: what is sealed is shared, by its record or by links.

use std::sync::Arc;

use super::commit::Sealing;
use super::{Entry, Host, HostError, VolumeStatus, once_let_go};
use crate::volume::travel::{To, clone_volume, restand};
use crate::volume::{MAX_LAYERS, Snapshot, Volume, VolumeError, VolumeName, VolumeRecord};

/// Snapshots whose names a message lists.
const MOST_NAMES: usize = 8;

impl Host {
    /// Takes a snapshot of what the volume is now; without a name it is called by a number.
    pub async fn snapshot(
        self: &Arc<Self>,
        name: &VolumeName,
        snapshot: Option<&VolumeName>,
    ) -> Result<Snapshot, HostError> {
        let entry = self.entry(name)?;
        let _versioning = entry.versioning.lock().await;
        let record = self.record(name, &entry)?;
        let called = match snapshot {
            Some(called) if record.snapshots.iter().any(|there| there.name == called.as_str()) => {
                let (volume, snapshot) = (name.to_string(), called.to_string());
                return Err(HostError::SnapshotExists { volume, snapshot });
            }
            Some(called) => called.clone(),
            None => free_name(&record)?,
        };
        refuse_more_layers(name, &record)?;
        let volume = self.opened(name).await?;
        let take = {
            let (volume, called) = (name.clone(), called.clone());
            move |record: &mut VolumeRecord| {
                let taken = record.snapshot(&volume, &called)?;
                record.snapshots.push(taken);
                Ok(true)
            }
        };
        self.seal(name, &entry, &volume, Sealing::WhereWritten, take).await?;
        tracing::info!(volume = %name, snapshot = %called, "snapshot taken");
        let taken = volume.record().snapshots.into_iter().find(|there| there.name == called.as_str());
        taken.ok_or_else(|| no_snapshot(name, called.as_str(), &record))
    }

    /// Forgets a snapshot.
    pub async fn remove_snapshot(&self, name: &VolumeName, snapshot: &str) -> Result<(), HostError> {
        let entry = self.entry(name)?;
        let _versioning = entry.versioning.lock().await;
        find(name, snapshot, &self.record(name, &entry)?)?;
        let volume = self.opened(name).await?;
        let gone = snapshot.to_owned();
        let forget = move || {
            let forget = |record: &mut VolumeRecord| {
                record.snapshots.retain(|there| there.name != gone);
                Ok(())
            };
            volume.change_record(forget, || Ok(()))
        };
        tokio::task::spawn_blocking(forget).await.map_err(|_| HostError::Stopping)??;
        Ok(())
    }

    /// Makes the volume what it was in a snapshot; what was written since is gone, and so are commits with `force`. Nobody may use it.
    pub async fn rollback(
        self: &Arc<Self>,
        name: &VolumeName,
        snapshot: &str,
        force: bool,
    ) -> Result<VolumeStatus, HostError> {
        let entry = self.entry(name)?;
        let _versioning = entry.versioning.lock().await;
        if force {
            self.end_jobs_of(name).await;
        }
        let record = self.record(name, &entry)?;
        let to = find(name, snapshot, &record)?;
        let stays = |commit| commit == to.commit || commit == record.pushed;
        let pending_stays = record.pending == to.pending;
        if !force && !(stays(record.commit) && pending_stays) {
            return Err(HostError::Unpushed { volume: name.to_string(), action: "a rollback" });
        }
        // What was written since goes, as was asked; commits that came meanwhile do not.
        let decided = (!force).then_some(Decided { record, losing: None });
        self.stand(name, &entry, To::Snapshot(snapshot.to_owned()), decided).await?;
        tracing::info!(volume = %name, snapshot, "rolled back");
        self.inspect(name)
    }

    /// Makes another volume that is what this one is now, and shares all its bytes.
    pub async fn clone_volume(
        self: &Arc<Self>,
        of: &VolumeName,
        name: &VolumeName,
    ) -> Result<(VolumeStatus, bool), HostError> {
        let source = self.entry(of)?;
        let entry = self.volumes.lock().entry(name.clone()).or_default().clone();
        let made = self.clone_in_turn(of, &source, name, &entry).await;
        match made {
            Ok(true) => {}
            Ok(false) => return Ok((self.inspect(name)?, false)),
            Err(error) => {
                self.forget_what_is_not_there(entry);
                return Err(error);
            }
        }
        let has_pending = |record: &VolumeRecord| !record.pending.is_empty();
        if entry.now.read().record().as_ref().is_some_and(has_pending) {
            // What is being made of the source is made of it too.
            let volume = self.opened(name).await?;
            self.make_commits(name, &entry, &volume);
        }
        tracing::info!(volume = %name, %of, "cloned");
        Ok((self.inspect(name)?, true))
    }

    async fn clone_in_turn(
        self: &Arc<Self>,
        of: &VolumeName,
        source: &Entry,
        name: &VolumeName,
        entry: &Entry,
    ) -> Result<bool, HostError> {
        // The source's first, as everybody takes them; the new one is nobody's source yet.
        let _versioning = source.versioning.lock().await;
        let _turn = entry.turn.lock().await;
        if let Some(there) = entry.now.read().record() {
            if there.from.as_deref() == Some(of.as_str()) {
                return Ok(false);
            }
            let (volume, has) = (name.to_string(), there.from.unwrap_or_else(|| "none".to_owned()));
            return Err(VolumeError::NameTaken { volume, option: "from", has, asked: of.to_string() }.into());
        }
        let _coming = self.coming.read().await;
        let volume = self.opened(of).await?;
        refuse_more_layers(of, &volume.record())?;
        self.seal(of, source, &volume, Sealing::WhereWritten, |_| Ok(true)).await?;
        let (state, from, to) = (self.state.clone(), of.clone(), name.clone());
        // A commit that is made meanwhile takes layers away.
        let cloning = move || volume.holding(|record| clone_volume(&state, &from, record, &to));
        let record = tokio::task::spawn_blocking(cloning).await.map_err(|_| HostError::Stopping)??;
        entry.now.write().record = Some(record);
        Ok(true)
    }

    /// Puts a volume that nobody uses somewhere else.
    pub(super) async fn stand(
        self: &Arc<Self>,
        name: &VolumeName,
        entry: &Arc<Entry>,
        to: To,
        decided: Option<Decided>,
    ) -> Result<(), HostError> {
        let turn = entry.turn.lock().await;
        self.refuse_in_use(name, entry)?;
        self.refuse_with_a_job(name)?;
        if let Some(decided) = decided {
            self.serve_in_turn(name, entry).await?;
            let volume = entry.now.read().open.as_ref().map(|open| open.volume.clone());
            self.close_in_turn(name, entry).await?;
            // Only now nobody can write to it any more: somebody may have since the decision was made, and have gone again.
            decided.still_holds(name, &volume.ok_or(HostError::Stopping)?)?;
        } else {
            self.close_in_turn(name, entry).await?;
        }
        let (dir, named) = (self.state.volume_dir(name.as_str()), name.clone());
        let record = once_let_go(move || restand(&dir, &named, &to)).await?;
        let has_pending = !record.pending.is_empty();
        entry.now.write().record = Some(record);
        drop(turn);
        if has_pending {
            let volume = self.opened(name).await?;
            self.make_commits(name, entry, &volume);
        }
        Ok(())
    }
}

/// What a volume was when it was decided that it may go somewhere else.
pub(super) struct Decided {
    /// Its record.
    pub(super) record: VolumeRecord,
    /// What would lose what was written since its last commit; `None`: that is to be lost.
    pub(super) losing: Option<&'static str>,
}

impl Decided {
    fn still_holds(&self, name: &VolumeName, volume: &Volume) -> Result<(), HostError> {
        let (then, now) = (&self.record, volume.record());
        if (then.commit, &then.pending, &then.branch) != (now.commit, &now.pending, &now.branch) {
            let by = "commits of it have just been made or pushed".to_owned();
            return Err(HostError::InUse { volume: name.to_string(), by });
        }
        match self.losing {
            Some(action) if !volume.is_clean() => Err(HostError::dirty(name, action, volume)),
            _ => Ok(()),
        }
    }
}

fn refuse_more_layers(volume: &VolumeName, record: &VolumeRecord) -> Result<(), HostError> {
    if record.layers.len() < MAX_LAYERS {
        return Ok(());
    }
    Err(VolumeError::TooManyLayers { volume: volume.to_string(), most: MAX_LAYERS }.into())
}

/// The snapshot of a name.
fn find(volume: &VolumeName, snapshot: &str, record: &VolumeRecord) -> Result<Snapshot, HostError> {
    let found = record.snapshots.iter().find(|there| there.name == snapshot);
    found.cloned().ok_or_else(|| no_snapshot(volume, snapshot, record))
}

fn no_snapshot(volume: &VolumeName, snapshot: &str, record: &VolumeRecord) -> HostError {
    let has = record.snapshots.iter().map(|there| there.name.clone()).take(MOST_NAMES).collect();
    HostError::NoSnapshot { volume: volume.to_string(), snapshot: snapshot.to_owned(), has }
}

/// A name that none has.
fn free_name(record: &VolumeRecord) -> Result<VolumeName, HostError> {
    let taken = |name: &String| record.snapshots.iter().any(|there| there.name == *name);
    let free = (1..).map(|number| format!("s{number}")).find(|name| !taken(name)).unwrap_or_default();
    Ok(free.parse()?)
}
