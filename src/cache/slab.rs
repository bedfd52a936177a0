//! A slab: one file of equal slots, written with pwrite and read through a read-only map.
//!
//! Enters: verified chunks to keep, slots to read. Leaves: bytes of slots, and whether they are in memory.
//! Invariants: a slot is written only while nobody has it pinned; bytes are read through the map only from slots that
//! were filled; the file keeps its length while it is mapped. Which slot holds what is decided elsewhere (`index`,
//! `writer`).

use std::fs::{self, File, OpenOptions};
use std::io;
use std::ops::Range;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};

use memmap2::{Mmap, MmapOptions};
use rustix::fs::{Advice, FallocateFlags};

use super::error::CacheError;
use crate::format::ChunkId;
use crate::format::cache_index::{
    HEADER_LEN, RECORD_LEN, RECORDS_AT, SlabGeometry, decode_record, encode_record,
};
use crate::lock::FileLock;

/// The slot is in the index: its bytes are whole as far as anyone knows.
pub(super) const FILLED: u32 = 1 << 31;
/// This process has seen the right bytes in it.
pub(super) const VERIFIED: u32 = 1 << 30;
/// Used since the clock's hand last passed.
pub(super) const REFERENCED: u32 = 1 << 29;
/// Writing it failed with an I/O error: not used again by this process.
pub(super) const BAD: u32 = 1 << 28;
/// The low bits count the pins: live `ChunkRef`s. Each takes 40 bytes of memory, so the count can't reach the flags.
pub(super) const PINS: u32 = BAD - 1;

/// Pages of the largest chunk, at the smallest page size: what one look at residency needs room for.
const MAX_PAGES: usize = 256;

/// What is kept in memory of a slot: 40 bytes.
pub(super) struct Slot {
    /// The id of the chunk in it. Written by the writer thread while the slot is in no index and has no pins; atomic
    /// only so that this needs no `unsafe`.
    id: [AtomicU64; 4],
    /// Flags and pins. FILLED, VERIFIED and the step from no pin to one change under the lock of the id's shard.
    pub(super) state: AtomicU32,
    /// The second (see [`now`]) in which all its pages were last found in memory; 0 is never.
    resident_at: AtomicU32,
}

/// What opening a file that may be a slab brought.
pub(super) enum Opened {
    /// A slab, and which chunk each of its slots says it holds.
    Slab(Slab, Vec<Option<ChunkId>>),
    /// Damaged, cut short, or of a version this build does not know.
    Useless,
}

/// An open slab.
pub(super) struct Slab {
    /// Its number: in its name, and in the index.
    pub(super) number: u16,
    pub(super) geometry: SlabGeometry,
    path: PathBuf,
    file: File,
    map: Mmap,
    slots: Box<[Slot]>,
    /// The directory stays locked as long as any chunk of it can be read.
    _lock: Arc<FileLock>,
}

impl Slab {
    /// The name of slab `number`.
    pub(super) fn name(number: u16) -> String {
        format!("{number:08}.slab")
    }

    /// The number in a slab's name.
    pub(super) fn number_of(name: &str) -> Option<u16> {
        let number = name.strip_suffix(".slab")?.parse().ok()?;
        (Slab::name(number) == name).then_some(number)
    }

    /// Makes an empty slab, its space allocated. On error nothing is left behind.
    pub(super) fn create(
        dir: &Path,
        number: u16,
        geometry: SlabGeometry,
        lock: Arc<FileLock>,
    ) -> io::Result<Slab> {
        let temporary = dir.join(format!(".tmp-{number:08}"));
        let path = dir.join(Slab::name(number));
        let made = (|| {
            let file = OpenOptions::new()
                .read(true)
                .write(true)
                .create(true)
                .truncate(true)
                .mode(0o600)
                .open(&temporary)?;
            match rustix::fs::fallocate(&file, FallocateFlags::empty(), 0, geometry.file_len()) {
                Ok(()) => {}
                // A filesystem without it: space is found out about by pwrite, which is an error and not a signal, too.
                Err(rustix::io::Errno::OPNOTSUPP | rustix::io::Errno::NOSYS) => {
                    file.set_len(geometry.file_len())?
                }
                Err(errno) => return Err(errno.into()),
            }
            file.write_all_at(&geometry.encode(), 0)?;
            fs::rename(&temporary, &path)?;
            Slab::map(number, geometry, path.clone(), file, lock)
        })();
        if made.is_err() {
            // Best effort: what stays goes at the next start.
            let _ = fs::remove_file(&temporary);
            let _ = fs::remove_file(&path);
        }
        made
    }

    /// Opens a slab and lists which chunk each of its slots says it holds.
    pub(super) fn open(path: &Path, number: u16, lock: Arc<FileLock>) -> Result<Opened, CacheError> {
        let file = OpenOptions::new()
            .read(true)
            .write(true)
            .open(path)
            .map_err(CacheError::io("open the cache slab", path))?;
        let length = file.metadata().map_err(CacheError::io("look at the cache slab", path))?.len();
        let mut header = [0; HEADER_LEN];
        // Unreadable is as useless as unintelligible, and as harmless: the caller throws the slab away.
        if file.read_exact_at(&mut header, 0).is_err() {
            return Ok(Opened::Useless);
        }
        let geometry = match SlabGeometry::decode(&header) {
            Ok(geometry) if geometry.file_len() == length => geometry,
            _ => return Ok(Opened::Useless),
        };
        // The length was checked against the file's, so this is at most 4 MiB.
        let mut records = vec![0; geometry.slots() as usize * RECORD_LEN];
        if file.read_exact_at(&mut records, RECORDS_AT).is_err() {
            return Ok(Opened::Useless);
        }
        let (records, _) = records.as_chunks::<RECORD_LEN>();
        let ids: Vec<_> = records.iter().map(decode_record).collect();
        let slab = Slab::map(number, geometry, path.to_owned(), file, lock)
            .map_err(CacheError::io("map the cache slab", path))?;
        for (slot, id) in ids.iter().enumerate() {
            if let Some(id) = id {
                slab.set_id(slot as u32, id);
            }
        }
        Ok(Opened::Slab(slab, ids))
    }

    fn map(
        number: u16,
        geometry: SlabGeometry,
        path: PathBuf,
        file: File,
        lock: Arc<FileLock>,
    ) -> io::Result<Slab> {
        // SAFETY: the file is private to this process: mode 0600, in a directory it holds the lock of. It writes a
        // slot only while no reference into it exists (no pins), and never shortens the file.
        let map = unsafe { MmapOptions::new().len(geometry.file_len() as usize).map(&file)? };
        // No read-ahead: a page in memory shall be one that this process wrote or verified. Only advice, so an error
        // changes nothing.
        let _ = map.advise(memmap2::Advice::Random);
        // Nor is it held in memory where the rest of this process is (`kernel::memory`): it is as large as the disk lets it be.
        map.unlock()?;
        let _ = rustix::fs::fadvise(&file, 0, None, Advice::Random);
        let slots = (0..geometry.slots())
            .map(|_| Slot {
                id: [const { AtomicU64::new(0) }; 4],
                state: AtomicU32::new(0),
                resident_at: AtomicU32::new(0),
            })
            .collect();
        Ok(Slab { number, geometry, path, file, map, slots, _lock: lock })
    }

    /// The slot's entry in memory.
    #[inline]
    pub(super) fn slot(&self, slot: u32) -> &Slot {
        &self.slots[slot as usize]
    }

    /// Whether the slot holds chunk `id`, as far as its record says.
    #[inline]
    pub(super) fn holds(&self, slot: u32, id: &ChunkId) -> bool {
        let words = words(id);
        let slot = &self.slots[slot as usize];
        slot.id.iter().zip(words).all(|(mine, word)| mine.load(Ordering::Relaxed) == word)
    }

    /// The id of the chunk in the slot; zeros where it never held one.
    pub(super) fn id(&self, slot: u32) -> ChunkId {
        let mut id = [0; 32];
        for (bytes, word) in id.chunks_exact_mut(8).zip(&self.slots[slot as usize].id) {
            bytes.copy_from_slice(&word.load(Ordering::Relaxed).to_ne_bytes());
        }
        ChunkId(id)
    }

    fn set_id(&self, slot: u32, id: &ChunkId) {
        for (mine, word) in self.slots[slot as usize].id.iter().zip(words(id)) {
            mine.store(word, Ordering::Relaxed);
        }
    }

    /// The slot's bytes. The caller holds a pin on it, and it was filled.
    #[inline]
    pub(super) fn bytes(&self, slot: u32) -> &[u8] {
        let at = self.geometry.slot_at(slot) as usize;
        &self.map[at..at + self.geometry.chunk().len()]
    }

    /// Writes a chunk into a slot that is in no index and has no pins. On error the slot is free, on the disk too
    /// unless that failed as well.
    pub(super) fn fill(&self, slot: u32, id: &ChunkId, content: &[u8]) -> io::Result<()> {
        assert_eq!(content.len(), self.geometry.chunk().len(), "the writer chose a slab of the chunk's size");
        // Record to zeros, bytes, record: a process killed in between leaves a free slot (FORMAT.md).
        self.clear_record(slot)?;
        self.file.write_all_at(content, self.geometry.slot_at(slot))?;
        self.set_id(slot, id);
        self.file.write_all_at(&encode_record(id), self.geometry.record_at(slot))
    }

    /// Marks the slot free on the disk.
    pub(super) fn clear_record(&self, slot: u32) -> io::Result<()> {
        self.file.write_all_at(&[0; RECORD_LEN], self.geometry.record_at(slot))
    }

    /// Gives the space of a slot that is in no index and has no pins back to the filesystem; `false` where that can't be done, and the slot keeps it.
    pub(super) fn release(&self, slot: u32) -> bool {
        release(&self.file, &self.geometry, slot).unwrap_or(false)
    }

    /// Reads the slot with pread, so that a bad sector is an error and not a signal, and checks it against its id.
    /// The caller holds a pin.
    pub(super) fn check(&self, slot: u32) -> bool {
        let mut content = vec![0; self.geometry.chunk().len()];
        self.slots[slot as usize].resident_at.store(0, Ordering::Relaxed);
        match self.file.read_exact_at(&mut content, self.geometry.slot_at(slot)) {
            Ok(()) => ChunkId::of(&content) == self.id(slot),
            Err(error) => {
                tracing::warn!(slab = %self.path.display(), slot, %error, "cache slot can't be read");
                false
            }
        }
    }

    /// Whether the pages under `range` of the slot are in memory. If the whole slot was within this second, that is
    /// taken for an answer: a system call for each read would cost more than the rest of the lookup.
    pub(super) fn is_resident(&self, slot: u32, range: Range<usize>) -> bool {
        let chunk = self.bytes(slot);
        let resident_at = &self.slots[slot as usize].resident_at;
        let now = now();
        if resident_at.load(Ordering::Relaxed) == now {
            return true;
        }
        if self.pages_resident(chunk) {
            resident_at.store(now, Ordering::Relaxed);
            return true;
        }
        chunk.get(range).is_none_or(|wanted| self.pages_resident(wanted))
    }

    /// Asks the system for the pages under `wanted`, which lies in one slot. `true` where it can't tell.
    fn pages_resident(&self, wanted: &[u8]) -> bool {
        let page = rustix::param::page_size();
        let start = wanted.as_ptr().addr() & !(page - 1);
        let length = wanted.as_ptr().addr() + wanted.len() - start;
        let pages = length.div_ceil(page);
        let mut resident = [0u8; MAX_PAGES];
        if pages == 0 || pages > MAX_PAGES {
            return true;
        }
        // SAFETY: start is page aligned and [start, start + length) lies in this mapping, which lives as long as
        // self; `resident` has a byte for each of its pages, as was just checked.
        let done = unsafe { libc::mincore(start as *mut libc::c_void, length, resident.as_mut_ptr()) };
        done != 0 || resident[..pages].iter().all(|page| page & 1 != 0)
    }

    /// Deletes the file; its space is given back when the last reference goes.
    pub(super) fn unlink(&self) {
        if let Err(error) = fs::remove_file(&self.path) {
            tracing::warn!(slab = %self.path.display(), %error, "can't delete the cache slab");
        }
    }
}

/// Marks a slot free on the disk and gives its space back; `Ok(false)` where the filesystem can't, and the next chunk there uses it again.
pub(super) fn release(file: &File, geometry: &SlabGeometry, slot: u32) -> io::Result<bool> {
    // The record first: a slot whose bytes are gone must not say that it holds something.
    file.write_all_at(&[0; RECORD_LEN], geometry.record_at(slot))?;
    let hole = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
    let len = geometry.chunk().len() as u64;
    Ok(rustix::fs::fallocate(file, hole, geometry.slot_at(slot), len).is_ok())
}

/// The current second of a clock that only goes forward, never 0. Coarse, so that it costs no system call.
fn now() -> u32 {
    let now = rustix::time::clock_gettime(rustix::time::ClockId::MonotonicCoarse);
    (now.tv_sec as u32).saturating_add(1)
}

/// An id as the four words a slot keeps it in.
#[inline]
fn words(id: &ChunkId) -> [u64; 4] {
    let (words, _) = id.as_bytes().as_chunks::<8>();
    [0, 1, 2, 3].map(|i| u64::from_ne_bytes(words[i]))
}
