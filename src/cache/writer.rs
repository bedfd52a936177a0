//! The one thread that writes: it finds each new chunk a slot, by growing, evicting or taking a slab from another
//! size, and puts it there.
//!
//! Enters: verified chunks that are already being served from memory. Leaves: their slots in the index.
//! Invariants: only this thread fills slots, evicts and makes or deletes slabs, so its books need no lock; the slab
//! files never take more than the limit; it writes only into slots that are in no index and have no pins.
//!
//! The policy. A free slot first; then a new slab, while limit and disk allow; then CLOCK over the slabs of that
//! chunk size (a chunk that was used since the hand last passed gets another round; one that was only brought in does
//! not, so a scan does not wash out what is used). A chunk size that has less than an eighth of the space takes a
//! whole slab from the size that has most, before it evicts its own. If every slot is pinned the chunk stays in
//! memory.

use std::collections::{BTreeMap, HashSet};
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::sync::mpsc::Receiver;

use rustix::io::Errno;
use tokio::sync::oneshot;

use super::Inner;
use super::care::Freed;
use super::index::{Evicted, Place};
use super::queue::Room;
use super::slab::{BAD, FILLED, PINS, Slab};
use super::stats::{count, discount, value};
use crate::format::cache_index::{MIN_SLAB_LOG2, SlabGeometry};
use crate::format::{ChunkId, ChunkSize, VerifiedChunk};
use crate::lock::FileLock;

/// After the disk refused to give a new slab, this many chunks are stored or turned away before it is asked again.
const RETRY_GROWTH_AFTER: u32 = 256;
/// On a tight disk or under the last of the limit, slabs down to 1/2^4 of the usual size are tried.
const SMALLER_SLABS: u8 = 4;
/// A chunk size with less than 1/8 of the space may take a slab from another.
const FAIR_SHARE: u64 = 8;

/// What the writer is asked to do.
pub(super) enum Job {
    /// A chunk to be written. Its room in the queue is given back when the job is done.
    Store { chunk: VerifiedChunk, size: ChunkSize, room: Room },
    /// Chunks nobody needs.
    Free { chunks: HashSet<ChunkId>, tell: oneshot::Sender<Freed> },
}

/// The slabs of one chunk size.
#[derive(Default)]
struct Class {
    slabs: Vec<Arc<Slab>>,
    /// Slots that were free when last seen; checked again when taken.
    free: Vec<Place>,
    /// The clock's hand: index into `slabs`, and a slot of it.
    hand: (usize, u32),
}

impl Class {
    fn bytes(&self) -> u64 {
        self.slabs.iter().map(|slab| slab.geometry.file_len()).sum()
    }

    fn slots(&self) -> u64 {
        self.slabs.iter().map(|slab| u64::from(slab.geometry.slots())).sum()
    }
}

/// The books of the writer thread.
pub(super) struct Writer {
    inner: Arc<Inner>,
    lock: Arc<FileLock>,
    dir: PathBuf,
    /// Bytes all slab files together may take.
    limit: u64,
    /// log2 of the usual slab.
    slab_log2: u8,
    /// Bytes of the filesystem that are left to others.
    keep_free: u64,
    classes: BTreeMap<ChunkSize, Class>,
    /// Chunks to go before growth is tried again.
    growth_paused: u32,
    /// A disk that is full is said once.
    full_logged: bool,
}

/// What the writer is told at the start.
pub(super) struct Books {
    pub(super) inner: Arc<Inner>,
    pub(super) lock: Arc<FileLock>,
    pub(super) dir: PathBuf,
    pub(super) limit: u64,
    pub(super) slab_log2: u8,
    pub(super) keep_free: u64,
}

impl Writer {
    pub(super) fn new(books: Books) -> Writer {
        let Books { inner, lock, dir, limit, slab_log2, keep_free } = books;
        Writer {
            inner,
            lock,
            dir,
            limit,
            slab_log2,
            keep_free,
            classes: BTreeMap::new(),
            growth_paused: 0,
            full_logged: false,
        }
    }

    /// Takes over a slab that is in the index, and the slots of it that are free.
    pub(super) fn adopt(&mut self, slab: Arc<Slab>, free: impl DoubleEndedIterator<Item = u32>) {
        let class = self.classes.entry(slab.geometry.chunk()).or_default();
        let number = slab.number;
        count(&self.inner.counters.allocated, slab.geometry.file_len());
        class.slabs.push(slab);
        // The last is taken first.
        class.free.extend(free.rev().map(|slot| Place { slab: number, slot: slot as u16 }));
    }

    /// Writes until the senders are gone and the queue is empty.
    pub(super) fn run(mut self, jobs: Receiver<Job>) {
        while let Ok(job) = jobs.recv() {
            match job {
                Job::Store { chunk, size, room } => {
                    if !self.store(&chunk, size) {
                        count(&self.inner.counters.heap_fallbacks, 1);
                        self.inner.index.shard(&chunk.id()).staged.remove(&chunk.id());
                    }
                    drop(room);
                }
                Job::Free { chunks, tell } => {
                    // Who asked may not wait for the answer.
                    let _ = tell.send(self.free(&chunks));
                }
            }
        }
    }

    /// Empties the slots of these chunks; slabs that hold nothing then go, of the others the slots' space does.
    fn free(&mut self, chunks: &HashSet<ChunkId>) -> Freed {
        let mut freed = Freed::default();
        let slabs = |class: (&ChunkSize, &Class)| {
            class.1.slabs.iter().map(|slab| (*class.0, slab.clone())).collect::<Vec<_>>()
        };
        let slabs: Vec<(ChunkSize, Arc<Slab>)> = self.classes.iter().flat_map(slabs).collect();
        for (size, slab) in slabs {
            let slots = 0..slab.geometry.slots();
            let is_going = |slot: &u32| {
                slab.slot(*slot).state.load(Ordering::Relaxed) & FILLED != 0
                    && chunks.contains(&slab.id(*slot))
            };
            let going: Vec<u32> = slots.clone().filter(is_going).collect();
            let emptied: Vec<u32> =
                going.into_iter().filter(|slot| self.evict(&slab, *slot, false) == Evicted::Yes).collect();
            if emptied.is_empty() {
                continue;
            }
            freed.chunks += emptied.len() as u64;
            let in_use = |slot: u32| slab.slot(slot).state.load(Ordering::Acquire) & (FILLED | PINS) != 0;
            if !slots.clone().any(in_use) {
                freed.bytes.0 += slab.geometry.file_len();
                self.drop_slab(size, &slab);
                continue;
            }
            for slot in emptied {
                freed.bytes.0 += if slab.release(slot) { size.len() as u64 } else { 0 };
                self.give_back(size, Place { slab: slab.number, slot: slot as u16 });
            }
        }
        // Space was given back, whatever the disk said before.
        self.growth_paused = 0;
        freed
    }

    /// Moves a chunk from the stage into a slot. `false`: there was none, or it could not be written.
    fn store(&mut self, chunk: &VerifiedChunk, size: ChunkSize) -> bool {
        self.growth_paused = self.growth_paused.saturating_sub(1);
        let Some((slab, slot)) = self.take_slot(size) else {
            return false;
        };
        let place = Place { slab: slab.number, slot: slot as u16 };
        let id = chunk.id();
        if let Err(error) = slab.fill(slot, &id, chunk.content()) {
            if is_full(&error) {
                // Not given back: the hand comes by it, and until then slots that have their space are used.
                self.pause_growth(&error);
            } else {
                // The slot is in no index and has no pins: nobody else looks at its state.
                slab.slot(slot).state.store(BAD, Ordering::Relaxed);
                tracing::warn!(chunk = %id, slab = slab.number, slot, %error, "cache slot can't be written, left out from now on");
            }
            return false;
        }
        // One lock for both, so that a lookup finds it in one or the other.
        let mut shard = self.inner.index.shard(&id);
        shard.staged.remove(&id);
        let entered = shard.enter(&id, place, true);
        drop(shard);
        if entered {
            count(&self.inner.counters.used, size.len() as u64);
        } else {
            self.give_back(size, place);
        }
        true
    }

    fn give_back(&mut self, size: ChunkSize, place: Place) {
        self.classes.entry(size).or_default().free.push(place);
    }

    /// Finds a slot for a chunk of `size`: out of the index, without pins.
    fn take_slot(&mut self, size: ChunkSize) -> Option<(Arc<Slab>, u32)> {
        if let Some(slot) = self.take_free(size) {
            return Some(slot);
        }
        if self.grow(size) || (self.is_starved(size) && self.take_slab(size)) {
            return self.take_free(size);
        }
        self.sweep(size)
    }

    fn take_free(&mut self, size: ChunkSize) -> Option<(Arc<Slab>, u32)> {
        let class = self.classes.get_mut(&size)?;
        while let Some(place) = class.free.pop() {
            let slab = class.slabs.iter().find(|slab| slab.number == place.slab);
            let Some(slab) = slab else { continue };
            let slot = u32::from(place.slot);
            if slab.slot(slot).state.load(Ordering::Acquire) & (FILLED | BAD | PINS) == 0 {
                return Some((slab.clone(), slot));
            }
        }
        None
    }

    /// Makes a slab of slots of `size`, if limit and disk allow.
    fn grow(&mut self, size: ChunkSize) -> bool {
        if self.growth_paused > 0 {
            return false;
        }
        let smallest = self.slab_log2.saturating_sub(SMALLER_SLABS).max(MIN_SLAB_LOG2);
        let mut refused = None;
        for log2 in (smallest..=self.slab_log2).rev() {
            let Some(geometry) = SlabGeometry::new(size, log2) else { continue };
            let bytes = geometry.file_len();
            if value(&self.inner.counters.allocated) + bytes > self.limit {
                continue;
            }
            if !self.disk_has(bytes) {
                refused = Some(std::io::Error::from(Errno::NOSPC));
                continue;
            }
            let Some(number) = self.free_number() else { return false };
            match Slab::create(&self.dir, number, geometry, self.lock.clone()) {
                Ok(slab) => {
                    let slab = Arc::new(slab);
                    self.inner.index.add_slab(&slab);
                    self.adopt(slab, 0..geometry.slots());
                    self.full_logged = false;
                    return true;
                }
                Err(error) if is_full(&error) => refused = Some(error),
                Err(error) => {
                    refused = Some(error);
                    break;
                }
            }
        }
        if let Some(error) = refused {
            self.pause_growth(&error);
        }
        false
    }

    /// Whether the filesystem has `bytes` more for the cache. Where it can't tell, fallocate will.
    fn disk_has(&self, bytes: u64) -> bool {
        match rustix::fs::statvfs(&self.dir) {
            Ok(fs) => fs.f_bavail.saturating_mul(fs.f_frsize) >= bytes.saturating_add(self.keep_free),
            Err(_) => true,
        }
    }

    fn pause_growth(&mut self, error: &std::io::Error) {
        self.growth_paused = RETRY_GROWTH_AFTER;
        if !std::mem::replace(&mut self.full_logged, true) {
            tracing::warn!(
                dir = %self.dir.display(), %error, keep_free = self.keep_free,
                "the cache can't grow: it goes on with the space it has, and from memory"
            );
        }
    }

    fn free_number(&self) -> Option<u16> {
        (0..=u16::MAX).find(|number| {
            !self.classes.values().any(|class| class.slabs.iter().any(|slab| slab.number == *number))
        })
    }

    /// Whether chunks of `size` have less of the space than they may claim.
    fn is_starved(&self, size: ChunkSize) -> bool {
        let mine = self.classes.get(&size).map_or(0, Class::bytes);
        mine == 0 || mine < value(&self.inner.counters.allocated) / FAIR_SHARE
    }

    /// Takes an unpinned slab from the chunk size with most, and makes one of `size` in its place.
    fn take_slab(&mut self, size: ChunkSize) -> bool {
        let largest =
            self.classes.iter().filter(|(other, _)| **other != size).max_by_key(|(_, class)| class.bytes());
        let Some((&largest, _)) = largest else { return false };
        let Some(class) = self.classes.get(&largest) else { return false };
        let victim = class.slabs.iter().position(|slab| {
            (0..slab.geometry.slots()).all(|slot| slab.slot(slot).state.load(Ordering::Relaxed) & PINS == 0)
        });
        let Some(victim) = victim else { return false };
        let slab = class.slabs[victim].clone();
        let emptied = (0..slab.geometry.slots()).all(|slot| self.evict(&slab, slot, false) != Evicted::No);
        if !emptied {
            // Someone pinned a slot meanwhile. Those freed are found by the hand.
            return false;
        }
        self.drop_slab(largest, &slab);
        // Its last reference: only now is its space free.
        drop(slab);
        // The space was given back, whatever the disk said before.
        self.growth_paused = 0;
        self.grow(size)
    }

    /// Deletes a slab that has nothing in the index.
    fn drop_slab(&mut self, size: ChunkSize, slab: &Arc<Slab>) {
        self.inner.index.remove_slab(slab.number);
        slab.unlink();
        discount(&self.inner.counters.allocated, slab.geometry.file_len());
        if let Some(class) = self.classes.get_mut(&size) {
            class.slabs.retain(|other| !Arc::ptr_eq(other, slab));
            class.free.retain(|place| place.slab != slab.number);
            class.hand = (0, 0);
        }
    }

    /// CLOCK: at most two rounds, the first of which may clear every REFERENCED.
    fn sweep(&mut self, size: ChunkSize) -> Option<(Arc<Slab>, u32)> {
        let steps = 2 * self.classes.get(&size)?.slots();
        for _ in 0..steps {
            let class = self.classes.get_mut(&size)?;
            let (at, slot) = class.hand;
            let slab = class.slabs[at].clone();
            class.hand = if slot + 1 < slab.geometry.slots() {
                (at, slot + 1)
            } else {
                ((at + 1) % class.slabs.len(), 0)
            };
            let state = slab.slot(slot).state.load(Ordering::Relaxed);
            if state & (BAD | PINS) == 0 && self.evict(&slab, slot, true) != Evicted::No {
                return Some((slab, slot));
            }
        }
        None
    }

    fn evict(&mut self, slab: &Arc<Slab>, slot: u32, spare_used: bool) -> Evicted {
        // Only this thread changes a slot's id.
        let id = slab.id(slot);
        let filled = slab.slot(slot).state.load(Ordering::Relaxed) & FILLED != 0;
        if filled && self.inner.kept.has(&id) {
            return Evicted::No;
        }
        let place = Place { slab: slab.number, slot: slot as u16 };
        let evicted = self.inner.index.shard(&id).evict(&id, place, spare_used);
        if evicted == Evicted::Yes {
            count(&self.inner.counters.evicted, 1);
            discount(&self.inner.counters.used, slab.geometry.chunk().len() as u64);
        }
        evicted
    }
}

/// Whether an error says that there is no space, as opposed to trouble.
fn is_full(error: &std::io::Error) -> bool {
    let code = error.raw_os_error();
    code == Some(Errno::NOSPC.raw_os_error()) || code == Some(Errno::DQUOT.raw_os_error())
}
