//! A sealed state of a volume becomes a commit: its changed chunks are made into objects on this host, and the volume stands on it from then on.
//!
//! Enters: an open volume whose record has a commit in the making. Leaves: the commit's objects below `made/`, a record that names it, and a device that reads through it. Invariants: the objects
//! are all there before the record names the commit; the sealed layers go only after that; whoever reads meanwhile reads the same bytes.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use async_trait::async_trait;
use bytes::{Bytes, BytesMut};
use tokio_util::sync::CancellationToken;

use super::history::{LayerRef, Pending};
use super::{Volume, VolumeError, VolumeRecord};
use crate::device::{Device, DeviceError, Piece};
use crate::format::{Commit, CommitId, MapRoot};
use crate::repo::patch::{self, Change, PatchSource};
use crate::repo::writer::DEFAULT_LEVEL;
use crate::repo::{Version, VersionOptions};
use crate::units::{ByteLen, ByteOffset, ByteRange, PAGE_SIZE, PageIndex};

/// How far a commit is.
#[derive(Debug, Default)]
pub struct Making {
    looked_at: AtomicU64,
}

impl Making {
    /// Bytes of changed chunks that were looked at.
    pub fn looked_at(&self) -> ByteLen {
        ByteLen(self.looked_at.load(Ordering::Relaxed))
    }
}

/// What became of a commit in the making.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Made {
    /// It is there.
    Commit(CommitId),
    /// Nothing differs from the commit before it, so there is none.
    Nothing,
}

/// The oldest commit in the making, and what it is made of.
struct Oldest {
    pending: Pending,
    record: VolumeRecord,
    device: Device,
}

/// A device of which nothing changes any more, as a commit reads it.
struct Frozen {
    device: Arc<Device>,
}

#[async_trait]
impl PatchSource for Frozen {
    type Error = DeviceError;

    fn next_change(&self, at: ByteOffset) -> Option<Change> {
        let (view, size) = (self.device.view(), self.device.size().0);
        let (first, pages, is_zero) =
            view.delta()?.next_change(at.page(), PageIndex(size.div_ceil(PAGE_SIZE)))?;
        let end = ByteOffset(((first.0 + pages) * PAGE_SIZE).min(size));
        // A caller looks from chunks' borders, which are pages'.
        Some(Change { range: ByteRange { start: first.offset(), end }, is_zero })
    }

    async fn read(&self, range: ByteRange) -> Result<Bytes, DeviceError> {
        let pieces = self.device.read(range).await?;
        if let [Piece::Bytes(bytes)] = pieces.as_slice() {
            return Ok(bytes.clone());
        }
        let mut bytes = BytesMut::with_capacity(range.len().0 as usize);
        for piece in pieces {
            match piece {
                Piece::Zero(len) => bytes.resize(bytes.len() + len.0 as usize, 0),
                Piece::Chunk(slice) => bytes.extend_from_slice(&slice),
                Piece::Bytes(part) => bytes.extend_from_slice(&part),
            }
        }
        Ok(bytes.freeze())
    }
}

impl Volume {
    /// Makes the oldest commit that is in the making, and has the volume stand on it. One at a time: others wait. Stopped, it is as if it had not been begun, or it is done.
    pub async fn make_commit(
        self: &Arc<Self>,
        making: &Making,
        stop: &CancellationToken,
    ) -> Result<Option<Made>, VolumeError> {
        let _one = self.making.lock().await;
        let volume = self.clone();
        let looking = tokio::task::spawn_blocking(move || volume.oldest());
        let oldest = looking.await.map_err(|_| VolumeError::Stopped)??;
        let Some(Oldest { pending, record, device }) = oldest else { return Ok(None) };
        let pending = &pending;
        let base = device.base();
        let parent = base.version();
        // Whoever has it stands on it: it can't be taken back.
        let amend = pending.amend && parent.id() != record.pushed;
        if pending.amend && !amend {
            tracing::warn!(volume = self.name, commit = %parent.id(), "it is pushed by now: what was to replace it follows it");
        }
        let source = Frozen { device: Arc::new(device) };
        let looked = |bytes: ByteLen| making.looked_at.store(bytes.0, Ordering::Relaxed);
        let size = ByteLen(record.size.0.next_multiple_of(PAGE_SIZE));
        let patched = tokio::select! {
            biased;
            () = stop.cancelled() => return Err(VolumeError::Stopped),
            patched = patch::patch(parent, size, DEFAULT_LEVEL, &source, &looked) => patched,
        };
        let patched = patched.map_err(|error| match error {
            patch::PatchError::Source(source) => self.device_failed(source),
            patch::PatchError::Repo(error) => error.into(),
        })?;
        let is_same = (patched.map, size) == (parent.commit().map, parent.commit().size);
        if is_same && !pending.allow_empty && !amend {
            self.stand_on(None, pending.clone()).await?;
            return Ok(Some(Made::Nothing));
        }
        let commit = commit_of(parent, pending, amend, patched.map, size);
        let (repository, image) = (parent.repository(), parent.image());
        let id = repository.put_commit(image, &commit).await?;
        let (meta, options) = (parent.meta_cache(), VersionOptions::default());
        let version = Version::of(repository, image, id, commit, meta, options);
        self.stand_on(Some(version), pending.clone()).await?;
        Ok(Some(Made::Commit(id)))
    }

    /// The oldest commit in the making, with the volume as it was when it was sealed. Record and device are of one moment. Blocks on who changes them.
    fn oldest(&self) -> Result<Option<Oldest>, VolumeError> {
        self.holding(|record| {
            let Some(pending) = record.pending.first().cloned() else { return Ok(None) };
            let ends = |layer: &&LayerRef| layer.name == pending.upto && layer.sealed;
            let device = match record.layers.iter().find(ends).and_then(|layer| layer.id) {
                Some(id) => self.device.frozen(id).map_err(|source| self.device_failed(source))?,
                None => None,
            };
            let device = device.ok_or_else(|| self.not_sealed(&pending.upto))?;
            Ok(Some(Oldest { pending, record: record.clone(), device }))
        })
    }

    /// The record first, then the device, then what nobody needs any more. Once begun it is done, whoever waits for it.
    async fn stand_on(
        self: &Arc<Self>,
        version: Option<Version>,
        pending: Pending,
    ) -> Result<(), VolumeError> {
        let volume = self.clone();
        let standing = move || {
            let gone = std::cell::RefCell::new(Vec::new());
            let made = version.as_ref().map(Version::id);
            let base = version.map(|version| volume.device.base().of_version(version));
            let fold = |record: &mut VolumeRecord| {
                let folded = record.fold(made, &pending).ok_or_else(|| volume.not_sealed(&pending.upto))?;
                *gone.borrow_mut() = folded;
                Ok(())
            };
            let restack =
                || volume.device.restack(base, &gone.borrow()).map_err(|source| volume.device_failed(source));
            volume.change_record(fold, restack)?;
            volume.bound_top();
            Ok(())
        };
        tokio::task::spawn_blocking(standing).await.map_err(|_| VolumeError::Stopped)?
    }
}

/// The commit that follows `parent`, or takes its place.
fn commit_of(parent: &Version, pending: &Pending, amend: bool, map: MapRoot, size: ByteLen) -> Commit {
    let before = parent.commit();
    Commit {
        parents: if amend { before.parents.clone() } else { vec![parent.id()] },
        map,
        size,
        block_size: before.block_size,
        chunk_size: before.chunk_size,
        filesystem: before.filesystem,
        author: pending.author.clone(),
        time: pending.time,
        message: pending.message.clone(),
    }
}

impl VolumeRecord {
    /// A commit in the making is made, or came to nothing: what was sealed for it is in the commit now. Which layers the volume does not read through any more; `None`: it
    /// has no such commit in the making.
    fn fold(&mut self, made: Option<CommitId>, done: &Pending) -> Option<Vec<crate::delta::LayerId>> {
        if !self.pending.contains(done) {
            return None;
        }
        let at = self.layers.iter().position(|layer| layer.name == done.upto)?;
        let (before, folded) = (self.commit, self.layers[..=at].to_vec());
        self.layers.drain(..=at);
        self.pending.retain(|pending| pending.upto != done.upto);
        if let Some(made) = made {
            self.commit = made;
        }
        for layer in &mut self.layers {
            debug_assert!(layer.id.is_some(), "what is over a sealed layer was made by a seal");
        }
        // A snapshot that was taken after it has it too, and stands on it like the volume.
        for snapshot in &mut self.snapshots {
            let has_it = snapshot.commit == before
                && snapshot.pending.iter().any(|pending| pending.upto == done.upto)
                && snapshot.layers.starts_with(&folded);
            if has_it {
                snapshot.layers.drain(..=at);
                snapshot.pending.retain(|pending| pending.upto != done.upto);
                snapshot.commit = self.commit;
            }
        }
        Some(folded.iter().filter_map(|layer| layer.id).collect())
    }
}
