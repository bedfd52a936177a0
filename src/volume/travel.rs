//! A volume that nobody uses goes somewhere else: to another commit, to a snapshot, or to be two.
//!
//! Enters: a volume's directory that is not open, its record, and where it is to stand. Leaves: the record, changed in one step. Invariants: a new top layer is there before the record names it; the
//! record is the last thing that changes; layers that no record names any more go after that.

use std::path::Path;
use std::time::{SystemTime, UNIX_EPOCH};

use super::history::{LayerRef, Snapshot};
use super::layers::{self, Layers};
use super::{RECORD_FILE, StateDir, VolumeError, VolumeName, VolumeRecord, random_id};
use crate::delta::LayerId;
use crate::format::CommitId;
use crate::units::ByteLen;

/// Where a volume is to stand.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Standing {
    /// The commit.
    pub commit: CommitId,
    /// The last commit of its history that is known to be in the repository.
    pub pushed: CommitId,
    /// The branch its commits go to.
    pub branch: Option<String>,
    /// Bytes the commit has.
    pub size: ByteLen,
}

impl VolumeRecord {
    /// What the volume is when it stands there with nothing written to it. A device that was asked to be larger than its image stays so.
    pub fn standing_on(&self, to: &Standing) -> VolumeRecord {
        VolumeRecord {
            commit: to.commit,
            pushed: to.pushed,
            branch: to.branch.clone(),
            size: self.asked_size.unwrap_or_default().max(to.size),
            layers: Vec::new(),
            pending: Vec::new(),
            ..self.clone()
        }
    }

    /// What the volume is when it is as it was in a snapshot.
    pub fn as_in(&self, snapshot: &Snapshot) -> VolumeRecord {
        VolumeRecord {
            commit: snapshot.commit,
            pushed: snapshot.pushed,
            branch: snapshot.branch.clone(),
            size: snapshot.size,
            layers: snapshot.layers.clone(),
            pending: snapshot.pending.clone(),
            ..self.clone()
        }
    }

    /// The layers below the top, all of which must be sealed.
    fn sealed_layers(&self, volume: &str) -> Result<&[LayerRef], VolumeError> {
        let below = &self.layers[..self.layers.len() - 1];
        match below.iter().find(|layer| !layer.sealed) {
            Some(LayerRef { name, .. }) => {
                Err(VolumeError::NotSealed { volume: volume.to_owned(), layer: name.clone() })
            }
            None => Ok(below),
        }
    }

    /// A snapshot of what is sealed now, of a volume.
    pub fn snapshot(&self, volume: &VolumeName, name: &VolumeName) -> Result<Snapshot, VolumeError> {
        let layers = self.sealed_layers(volume.as_str())?.to_vec();
        Ok(Snapshot {
            name: name.to_string(),
            commit: self.commit,
            pushed: self.pushed,
            branch: self.branch.clone(),
            size: self.size,
            layers,
            pending: self.pending.clone(),
            created_s: now_s(),
        })
    }
}

/// Where a volume goes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum To {
    /// To a commit, with nothing written to it.
    Commit(Standing),
    /// To what it was in the snapshot of this name.
    Snapshot(String),
}

/// Puts a new top layer over what the volume goes to, and makes that its record. Nobody may have it open. Blocks on the disk.
pub fn restand(dir: &Path, name: &VolumeName, to: &To) -> Result<VolumeRecord, VolumeError> {
    let _lock = Layers::lock(dir, name.as_str())?;
    let problem = |problem: String| VolumeError::Record { path: dir.join(RECORD_FILE), problem };
    // What it says now: whoever had the volume open a moment ago may have changed it last.
    let today = VolumeRecord::load(dir)?.ok_or_else(|| VolumeError::missing(dir))?;
    let mut record = match to {
        To::Commit(standing) => today.standing_on(standing),
        To::Snapshot(snapshot) => {
            let found = today.snapshots.iter().find(|there| there.name == *snapshot);
            today.as_in(found.ok_or_else(|| problem(format!("it has no snapshot {snapshot}")))?)
        }
    };
    // Not the name of one that is there: today's record names it until the new one is written.
    let named = today.all_layers().chain(record.all_layers());
    let id = LayerId(random_id());
    let top = LayerRef { name: LayerRef::name_after(named), id: Some(id), sealed: false };
    layers::create(dir, &top, id, &record)?;
    record.layers.push(top);
    if record.commit != today.commit {
        // What is there was not brought here to stay: whoever wants it so pins it anew.
        super::pin::unpin(dir)?;
    }
    record.store(dir)?;
    layers::sweep(dir, &record);
    Ok(record)
}

/// Makes another volume that reads as this one's sealed layers do, and shares their files. Nobody may change which layers the source has meanwhile. It gets its name when all of it is there: cut
/// short, there is nothing of that name. Blocks on the disk, for a time that does not depend on how much there is.
pub fn clone_volume(
    state: &StateDir,
    of: &VolumeName,
    sealed: &VolumeRecord,
    name: &VolumeName,
) -> Result<VolumeRecord, VolumeError> {
    let (from, dir) = (state.volume_dir(of.as_str()), state.volume_dir(name.as_str()));
    if VolumeRecord::load(&dir)?.is_some() {
        return Err(VolumeError::NameTaken {
            volume: name.to_string(),
            option: "name",
            has: name.to_string(),
            asked: "a clone".to_owned(),
        });
    }
    let mut record = VolumeRecord {
        id: random_id(),
        from: Some(of.to_string()),
        created_s: Some(now_s()),
        snapshots: Vec::new(),
        layers: sealed.sealed_layers(of.as_str())?.to_vec(),
        ..sealed.clone()
    };
    let made_in = state.making_dir(name);
    let made = (|| {
        let _lock = Layers::lock(&made_in, name.as_str())?;
        for layer in &record.layers {
            layers::share(&from, &made_in, layer)?;
        }
        let id = LayerId(random_id());
        let top = LayerRef { name: LayerRef::name_after(record.layers.iter()), id: Some(id), sealed: false };
        layers::create(&made_in, &top, id, &record)?;
        record.layers.push(top);
        record.store(&made_in)?;
        // What an opening without a record left there holds nothing, else it is somebody's.
        if dir.exists() {
            let _left = Layers::lock(&dir, name.as_str())?;
            layers::refuse_orphans(&dir)?;
            std::fs::remove_dir_all(&dir).map_err(layers::io(&dir, "delete"))?;
        }
        std::fs::rename(&made_in, &dir).map_err(layers::io(&made_in, "give its name to"))?;
        crate::durable::sync_dir(crate::durable::parent_of(&dir)).map_err(layers::io(&dir, "sync"))
    })();
    if made.is_err() {
        // What stays is deleted at the next start.
        let _ = std::fs::remove_dir_all(&made_in);
    }
    made.map(|()| record)
}

fn now_s() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs())
}
