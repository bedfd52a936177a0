//! One layer: a map in memory, its log, and the pages.
//!
//! Enters: whole pages, ranges to zero, FLUSH. Leaves: runs of states, page bytes. Invariant: FORMAT.md, "Why a crash can't lose or tear"; the
//! numbers in comments here are its rules.

use std::collections::VecDeque;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, OnceLock};

use parking_lot::{Mutex, RwLock};
use smallvec::SmallVec;

use crate::format::CommitId;
use crate::format::delta::{
    CommitName, LayerId, MapHeader, PageKind, PageState, Record, Slot, TailEntry, VolumeId,
    decode_data_header, encode_data_header,
};
use crate::units::{ByteLen, PAGE_SIZE, PageIndex};

use super::disk::{Dir, File};
use super::error::DeltaError;
use super::in_place::InPlace;
use super::log::{Log, MAP_FILE};
use super::page_map::PageMap;
use super::slots::Slots;
use super::tail::{self, Tails};

/// Name of the file with the pages.
pub const DATA_FILE: &str = "data";
/// The log is rewritten only when it is longer than this,
const REWRITE_MIN_LEN: u64 = 4 << 20;
/// and than this many times what it was when it was last rewritten.
const REWRITE_FACTOR: u64 = 4;
/// Past this many records in memory [`Layer::wants_commit`] asks for a commit.
const PENDING_SOFT: usize = 1 << 16;
/// And past this many entries in its tails: 1 GiB of writes, which who opens it after a kill reads.
const SAID_SOFT: u64 = 1 << 18;
/// Past this many records in memory, which takes failing commits, writes are refused: 64 MiB.
const PENDING_HARD: usize = 1 << 22;
/// Freed runs of at least this many slots are given back to the file system.
const PUNCH_MIN_SLOTS: u32 = 16;
/// A longer write is done in pieces of so many bytes: while its checksums are made, they stay in the processor's cache.
const WRITTEN_AT_ONCE: usize = 1 << 20;
/// Times a reader tries before it holds the writers off.
const READS_ACROSS_WRITES: usize = 8;

/// What a layer is, apart from what it holds.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Identity {
    /// The commit its volume is a view of.
    pub base: CommitId,
    /// The volume.
    pub volume: VolumeId,
    /// Size of the device.
    pub device_size: ByteLen,
}

/// How a layer that is opened is known to belong where it is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Binding {
    /// It was made for this base, and for this volume.
    Made(Identity),
    /// It has this id, whatever it was made for: its record says what it lies on now. The device has this size.
    Named(LayerId, ByteLen),
}

impl Binding {
    fn device_size(&self) -> ByteLen {
        match self {
            Binding::Made(identity) => identity.device_size,
            Binding::Named(_, device_size) => *device_size,
        }
    }
}

impl From<&Identity> for Binding {
    fn from(identity: &Identity) -> Binding {
        Binding::Made(identity.clone())
    }
}

/// Keeps the slots a reader was told of from being used again while it reads them.
#[derive(Clone)]
pub struct Pin(#[expect(dead_code, reason = "held for its reference count")] Arc<()>);

/// Map state that changes together; guarded by `Layer::shared`.
struct Shared {
    pages: PageMap,
    /// One for each capture; readers clone it, so that its count tells whether one of them is left.
    pin: Arc<()>,
    /// Records since the last capture.
    pending: Vec<Record>,
    /// How many the journal has that no commit has made durable yet.
    captured: usize,
    /// Slots those records replaced.
    let_go: Vec<(Slot, u32)>,
}

/// The log and what goes with it; guarded by `Layer::log`, which is the flush lock.
struct Journal {
    log: Log,
    /// Length of the log when it was last written whole.
    rewritten_len: u64,
    /// Records captured by commits that failed for want of space; they go with the next.
    retry: Vec<Record>,
    /// Slots that are let go once `retry` is durable.
    retry_let_go: Vec<(Slot, u32)>,
    /// Tickets below this one are covered by a commit.
    covered: u64,
    /// Slots out of every durable commit, oldest first, each with the pin of the readers that may still hold them.
    retired: VecDeque<(Arc<()>, Vec<(Slot, u32)>)>,
}

/// A layer that takes writes, or a sealed one that is only read.
///
/// Locks are taken in the order `journal`, `gate`, `tails`, `shared`, `slots`.
pub struct Layer {
    id: LayerId,
    dir: Box<dyn Dir>,
    data: Box<dyn File>,
    /// Writers share it from choosing a slot to naming it in the map; a capture takes it alone. `true` once the layer is sealed.
    gate: RwLock<bool>,
    shared: RwLock<Shared>,
    slots: Mutex<Slots>,
    /// What a kill must not take.
    tails: Mutex<Tails>,
    /// Sealed, and all of it durable: nothing of it will ever change.
    settled: AtomicBool,
    /// Entries of tails since the last capture.
    said: AtomicU64,
    in_place: InPlace,
    journal: Mutex<Journal>,
    /// Numbers FLUSHes, so that one commit serves all that came before its capture.
    tickets: AtomicU64,
    /// `data` was written since its last fsync.
    data_dirty: AtomicBool,
    poisoned: OnceLock<String>,
    rewrite_min_len: u64,
    /// The most pages that may have a slot.
    quota_pages: AtomicU64,
}

impl Layer {
    /// Makes an empty layer in `dir`, durably.
    pub fn create(dir: Box<dyn Dir>, identity: &Identity, id: LayerId) -> Result<Layer, DeltaError> {
        let path = &dir.describe(DATA_FILE);
        let failed = |action| move |source| DeltaError::io(action, path.clone(), source);
        let data = dir.create(DATA_FILE).map_err(failed("create"))?;
        data.write_at(&encode_data_header(id), 0).map_err(failed("write"))?;
        data.sync().map_err(failed("sync"))?;
        let header = MapHeader {
            generation: 1,
            base: identity.base,
            layer: id,
            volume: identity.volume,
            device_size: identity.device_size,
        };
        // Syncs the directory too, so both files are there or the layer is not.
        let log = Log::write_new(&*dir, header, std::iter::empty(), |_| Ok(()))?;
        let tails = Tails::new(id, dir.boot(), log.last());
        Ok(Layer::assemble(
            dir,
            data,
            log,
            PageMap::new(device_pages(identity.device_size)),
            Slots::new(),
            tails,
        ))
    }

    /// Opens a layer and replays its log. What a server that was killed had acknowledged since is committed, if there is space for that.
    pub fn open(dir: Box<dyn Dir>, binding: impl Into<Binding>) -> Result<Layer, DeltaError> {
        let binding = binding.into();
        let path = &dir.describe(DATA_FILE);
        let data_failed = |action| move |source| DeltaError::io(action, path.clone(), source);
        let data = dir.open(DATA_FILE).map_err(data_failed("open"))?;
        let data_len = data.len().map_err(data_failed("read"))?;
        let mut page = vec![0; PAGE_SIZE.min(data_len) as usize];
        data.read_at(&mut page, 0).map_err(data_failed("read"))?;
        let data_id = decode_data_header(&page)
            .map_err(|source| DeltaError::Format { path: dir.describe(DATA_FILE), source })?;
        let file_slots = (data_len / PAGE_SIZE).saturating_sub(1);

        let device_pages = device_pages(binding.device_size());
        let mut pages = PageMap::new(device_pages);
        let damaged = |offset, problem| DeltaError::Damaged { path: dir.describe(MAP_FILE), offset, problem };
        let replayed = Log::replay(&*dir, |record, offset| {
            if !record.fits(device_pages) {
                return Err(damaged(offset, "a record names pages that are not there"));
            }
            pages.apply(record, &mut |_, _| {});
            Ok(())
        })?;
        let mut log = replayed.log;
        check_binding(log.header(), &binding, data_id, &*dir)?;

        let mut slots = taken(&pages, file_slots).map_err(|problem| damaged(log.len(), problem))?;
        let (mut tails, recovered) = Tails::open(&*dir, data_id, log.last())?;
        let mut said = Vec::new();
        if !recovered.is_empty() {
            let after = recovered.onto(&pages, &*data).map_err(data_failed("read and write again"))?;
            said = recovered.differences(&pages, &after);
            // The slots of the commit stay taken until the next one.
            if !said.iter().all(|record| takes(&mut slots, record, file_slots)) {
                tracing::error!(path = %path.display(), "what was written last before a kill does not fit together, and is left out");
                said.clear();
                slots = taken(&pages, file_slots).map_err(|problem| damaged(log.len(), problem))?;
            }
        }
        if !said.is_empty() {
            // Before any log names it.
            data.sync().map_err(data_failed("sync"))?;
        }
        if replayed.torn {
            for record in said.drain(..) {
                pages.apply(record, &mut |slot, count| slots.release(slot, count));
            }
            // Under a new generation the torn frames can never be read again, whatever is appended where they lie.
            log = Log::write_new(&*dir, log.next_header(), pages.records(), |_| Ok(()))?;
            tails.committed(log.last());
        } else {
            // A server that was killed may have left a commit, or the log's name itself, in the kernel's memory alone. The slots
            // it let go are used again from now on (rule 2), so it must not be undone by a power cut.
            log.make_durable(&*dir)?;
        }
        // Slots past the last one named were taken by writes that nobody was told of.
        let named_len = Slot(slots.len()).offset();
        if named_len < data_len {
            data.set_len(named_len).map_err(data_failed("cut"))?;
        }
        let layer = Layer::assemble(dir, data, log, pages, slots, tails);
        let nothing_left = layer.commit_what_was_said(said)?;
        layer.tails.lock().opened(&*layer.dir, nothing_left)?;
        Ok(layer)
    }

    /// Opens a layer that is sealed and settled, and changes nothing in it: others may share its files.
    pub fn open_sealed(dir: Box<dyn Dir>, id: LayerId, device_size: ByteLen) -> Result<Layer, DeltaError> {
        let path = &dir.describe(DATA_FILE);
        let data_failed = |action| move |source| DeltaError::io(action, path.clone(), source);
        let data = dir.open(DATA_FILE).map_err(data_failed("open"))?;
        let data_len = data.len().map_err(data_failed("read"))?;
        let mut page = vec![0; PAGE_SIZE.min(data_len) as usize];
        data.read_at(&mut page, 0).map_err(data_failed("read"))?;
        let data_id = decode_data_header(&page)
            .map_err(|source| DeltaError::Format { path: dir.describe(DATA_FILE), source })?;
        let device_pages = device_pages(device_size);
        let mut pages = PageMap::new(device_pages);
        let damaged = |offset, problem| DeltaError::Damaged { path: dir.describe(MAP_FILE), offset, problem };
        let replayed = Log::replay(&*dir, |record, offset| {
            if !record.fits(device_pages) {
                return Err(damaged(offset, "a record names pages that are not there"));
            }
            pages.apply(record, &mut |_, _| {});
            Ok(())
        })?;
        let log = replayed.log;
        check_binding(log.header(), &Binding::Named(id, device_size), data_id, &*dir)?;
        if replayed.torn {
            // It was whole before it was called sealed.
            return Err(damaged(log.len(), "a sealed layer's log ends in a torn frame"));
        }
        let slots = taken(&pages, (data_len / PAGE_SIZE).saturating_sub(1))
            .map_err(|problem| damaged(log.len(), problem))?;
        let tails = Tails::new(id, dir.boot(), log.last());
        let layer = Layer::assemble(dir, data, log, pages, slots, tails);
        *layer.gate.write() = true;
        layer.settled.store(true, Ordering::Release);
        Ok(layer)
    }

    /// Of a layer that is being opened. Whether nothing is left to be committed.
    fn commit_what_was_said(&self, said: Vec<Record>) -> Result<bool, DeltaError> {
        if said.is_empty() {
            return Ok(true);
        }
        let mut shared = self.shared.write();
        said.into_iter().for_each(|record| shared.note(record));
        drop(shared);
        match self.flush() {
            // It stays where it is until there is space.
            Err(error @ DeltaError::Full { .. }) => {
                tracing::warn!(%error, "what was written before a kill can't be committed yet");
                Ok(false)
            }
            other => other.map(|()| true),
        }
    }

    fn assemble(
        dir: Box<dyn Dir>,
        data: Box<dyn File>,
        log: Log,
        pages: PageMap,
        slots: Slots,
        tails: Tails,
    ) -> Layer {
        Layer {
            id: log.header().layer,
            data,
            gate: RwLock::new(false),
            settled: AtomicBool::new(false),
            shared: RwLock::new(Shared {
                pages,
                pin: Arc::new(()),
                pending: Vec::new(),
                captured: 0,
                let_go: Vec::new(),
            }),
            slots: Mutex::new(slots),
            tails: Mutex::new(tails),
            said: AtomicU64::new(0),
            in_place: InPlace::new(),
            journal: Mutex::new(Journal {
                rewritten_len: log.len(),
                log,
                retry: Vec::new(),
                retry_let_go: Vec::new(),
                covered: 0,
                retired: VecDeque::new(),
            }),
            tickets: AtomicU64::new(0),
            data_dirty: AtomicBool::new(false),
            poisoned: OnceLock::new(),
            rewrite_min_len: REWRITE_MIN_LEN,
            quota_pages: AtomicU64::new(u64::MAX),
            dir,
        }
    }

    /// Bounds the pages that have bytes of their own, in bytes. Pages that have some already can be written again all the same; writers at the same moment may pass the bound
    /// by what each of them writes.
    pub fn with_quota(self, quota: ByteLen) -> Layer {
        self.set_quota(quota);
        self
    }

    /// As [`Layer::with_quota`], of a layer in use.
    pub fn set_quota(&self, quota: ByteLen) {
        self.quota_pages.store(quota.0 / PAGE_SIZE, Ordering::Relaxed);
    }

    /// Ends the writes to this layer: those under way are done, then `swap` runs, and who comes after it is told [`DeltaError::Sealed`]. Waits for writers alone, never for the disk:
    /// what is not durable yet is made so by [`Layer::settle`].
    pub fn seal(&self, swap: impl FnOnce()) {
        let mut sealed = self.gate.write();
        *sealed = true;
        // Before the gate opens: who is sent away by it must find the next layer.
        swap();
    }

    /// Makes all of a sealed layer durable: nothing of it is anywhere but in its log and its data then. What its tails say is in there too, and nobody reads them.
    pub fn settle(&self) -> Result<(), DeltaError> {
        if self.settled.load(Ordering::Acquire) {
            return Ok(());
        }
        debug_assert!(*self.gate.read(), "only a sealed layer comes to an end");
        self.flush()?;
        self.settled.store(true, Ordering::Release);
        Ok(())
    }

    /// The layer's own id.
    pub fn id(&self) -> LayerId {
        self.id
    }

    /// Lets tails be given up when they are longer than `len` instead of 4 MiB.
    pub fn give_up_tails_above(mut self, len: ByteLen) -> Layer {
        self.tails.get_mut().give_up_above(len.0);
        self
    }

    /// Lets the log be rewritten when it is longer than `len` instead of 4 MiB.
    pub fn rewrite_log_above(mut self, len: ByteLen) -> Layer {
        self.rewrite_min_len = len.0;
        self
    }

    /// The state of a page and the length of the run it starts, as [`PageMap::run`], with the pin to hold while reading its slots.
    pub fn run(&self, at: PageIndex, limit: u64) -> (PageState, u64, Pin) {
        let shared = self.shared.read();
        let (state, len) = shared.pages.run(at, limit);
        (state, len, Pin(shared.pin.clone()))
    }

    /// Pages that have a slot.
    pub fn data_pages(&self) -> u64 {
        self.shared.read().pages.data_pages()
    }

    /// Whether it says nothing of any page.
    pub fn is_empty(&self) -> bool {
        self.shared.read().pages.records().next().is_none()
    }

    /// A snapshot of everything the layer holds, for those who walk all of it.
    pub fn snapshot(&self) -> PageMap {
        self.shared.read().pages.clone()
    }

    /// Reads from the slots of a run: `skip` bytes into `first`, under the run's pin. Each page is whole, even where it is being written.
    pub fn read(&self, first: Slot, skip: u64, buf: &mut [u8]) -> Result<(), DeltaError> {
        let (slot, count) = slots_of(first, skip, buf.len());
        let mut read = || self.data.read_at(buf, first.offset() + skip);
        for _ in 0..READS_ACROSS_WRITES {
            if let Some(done) = self.in_place.read(slot, count, &mut read) {
                return done.map_err(|source| self.data_failed("read", source));
            }
        }
        // They are written to all the time. What was just written is in memory, so this holds nobody up for long.
        let _gate = self.gate.write();
        read().map_err(|source| self.data_failed("read", source))
    }

    /// Like [`Layer::read`] if it needs neither the disk nor a writer to be done; `false` where it would wait.
    #[inline]
    pub fn read_nowait(&self, first: Slot, skip: u64, buf: &mut [u8]) -> Result<bool, DeltaError> {
        let (slot, count) = slots_of(first, skip, buf.len());
        match self.in_place.read(slot, count, || self.data.read_at_nowait(buf, first.offset() + skip)) {
            Some(done) => done.map_err(|source| self.data_failed("read", source)),
            None => Ok(false),
        }
    }

    /// Writes whole pages from `first` on. Not durable before the next flush. On `Err` each page is old or new.
    pub fn write(&self, first: PageIndex, bytes: &[u8]) -> Result<(), DeltaError> {
        debug_assert!(bytes.len().is_multiple_of(PAGE_SIZE as usize));
        let firsts = (first.0..).step_by((WRITTEN_AT_ONCE as u64 / PAGE_SIZE) as usize).map(PageIndex);
        let mut pieces = firsts.zip(bytes.chunks(WRITTEN_AT_ONCE));
        pieces.try_for_each(|(first, bytes)| self.write_together(&[PageWrite { first, bytes }]))
    }

    /// Does small writes that came together, in their order, for less than each by itself costs. Else as [`Layer::write`].
    pub fn write_together(&self, writes: &[PageWrite<'_>]) -> Result<(), DeltaError> {
        self.check_writable()?;
        let gate = self.gate.read();
        if *gate {
            return Err(DeltaError::Sealed);
        }
        let mut parts: SmallVec<[Part<'_>; 4]> = SmallVec::new();
        let mut filled = 0;
        let written = self.place_all(writes, &mut parts).and_then(|()| self.fill(&parts, &mut filled));
        // After the bytes: set before, it could be cleared by the commit under way, whose sync they then miss.
        self.data_dirty.store(true, Ordering::Release);
        let (filled, empty) = parts.split_at(filled);
        let mut shared = self.shared.write();
        for Part { first, slot, named, bytes } in filled {
            if !named {
                // After the bytes: a reader that finds the slot finds them in it.
                let record = Record { first: *first, pages: pages_of(bytes), state: PageState::data(*slot) };
                shared.note(record);
            }
        }
        drop(shared);
        let mut slots = self.slots.lock();
        for part in empty.iter().filter(|part| !part.named) {
            slots.release(part.slot, pages_of(part.bytes));
        }
        written
    }

    /// Finds a place for each page. What is in `parts` in the end was taken, also on `Err`.
    fn place_all<'a>(
        &self,
        writes: &[PageWrite<'a>],
        parts: &mut SmallVec<[Part<'a>; 4]>,
    ) -> Result<(), DeltaError> {
        let mut added = 0;
        for PageWrite { first, bytes } in writes {
            let (mut at, mut bytes) = (*first, *bytes);
            while !bytes.is_empty() {
                let Place { slot, pages, named, adds } = self.place(at, u64::from(pages_of(bytes)), added)?;
                let (here, rest) = bytes.split_at(pages as usize * PAGE_SIZE as usize);
                parts.push(Part { first: at, slot, named, bytes: here });
                added += if adds { u64::from(pages) } else { 0 };
                at.0 += u64::from(pages);
                bytes = rest;
            }
        }
        Ok(())
    }

    /// Writes the bytes where they were placed; `filled` of the parts have theirs in the end, also on `Err`.
    fn fill(&self, parts: &[Part<'_>], filled: &mut usize) -> Result<(), DeltaError> {
        // Before the bytes: those that are there and are not what was said are nobody's.
        let said: SmallVec<[TailEntry; 4]> =
            parts.iter().flat_map(|part| tail::entries_of(part.first, part.slot, part.bytes)).collect();
        self.say(&said)?;
        for run in parts.chunk_by(Part::goes_on) {
            let Part { slot, named, .. } = run[0];
            let bytes: SmallVec<[&[u8]; 4]> = run.iter().map(|part| part.bytes).collect();
            let write = || self.data.write_parts_at(&bytes, slot.offset());
            let pages = run.iter().map(|part| pages_of(part.bytes)).sum();
            let (whole, written) = if named { self.in_place.write(slot, pages, write) } else { write() };
            *filled += whole;
            written.map_err(|source| self.data_failed("write", source))?;
        }
        Ok(())
    }

    fn say(&self, entries: &[TailEntry]) -> Result<(), DeltaError> {
        self.said.fetch_add(entries.len() as u64, Ordering::Relaxed);
        self.tails.lock().append(&*self.dir, entries)
    }

    /// Where the next pages go (rule 1): in place if their slots are in no commit, captured or durable; else into slots nobody names. `added` pages, of which the map
    /// does not know yet, are about to have a slot that had none.
    fn place(&self, at: PageIndex, limit: u64, added: u64) -> Result<Place, DeltaError> {
        let (state, run, taken) = {
            let pages = &self.shared.read().pages;
            let (state, run) = pages.run(at, limit);
            (state, run, pages.data_pages())
        };
        let run = run.min(u64::from(u32::MAX)) as u32;
        let mut slots = self.slots.lock();
        let (want, adds) = if let PageKind::Data(slot) = state.kind() {
            let (fresh, alike) = slots.fresh_run(slot, run);
            if fresh {
                return Ok(Place { slot, pages: alike, named: true, adds: false });
            }
            (alike, false)
        } else {
            let quota_pages = self.quota_pages.load(Ordering::Relaxed);
            let left = quota_pages.saturating_sub(taken + added);
            if left == 0 {
                return Err(DeltaError::Quota(ByteLen(quota_pages * PAGE_SIZE)));
            }
            (left.min(u64::from(run)) as u32, true)
        };
        let (slot, pages) =
            slots.take(want).ok_or_else(|| DeltaError::Full { path: self.dir.describe(DATA_FILE) })?;
        Ok(Place { slot, pages, named: false, adds })
    }

    /// Sets whole pages to a state without bytes: zero, or base (which uncovers what is below).
    pub fn set(&self, first: PageIndex, pages: u64, state: PageState) -> Result<(), DeltaError> {
        debug_assert!(!matches!(state.kind(), PageKind::Data(_)));
        self.check_writable()?;
        let gate = self.gate.read();
        if *gate {
            return Err(DeltaError::Sealed);
        }
        let (mut done, mut is_said) = (0, true);
        while done < pages {
            let len = (pages - done).min(u64::from(u32::MAX)) as u32;
            let record = Record { first: PageIndex(first.0 + done), pages: len, state };
            match self.say(&[TailEntry { record, crc: 0 }]) {
                Ok(()) => {}
                Err(DeltaError::Full { .. }) => is_said = false,
                Err(other) => return Err(other),
            }
            self.shared.write().note(record);
            done += u64::from(len);
        }
        drop(gate);
        // On a full disk, of all times, it must be possible to give space back.
        if is_said { Ok(()) } else { self.flush() }
    }

    /// Whether enough has gathered in memory that a commit should be made even if nobody asks for one.
    pub fn wants_commit(&self) -> bool {
        self.shared.read().pending.len() > PENDING_SOFT || self.said.load(Ordering::Relaxed) > SAID_SOFT
    }

    /// Whether anything was written or zeroed that is in no commit.
    pub fn has_pending(&self) -> bool {
        let shared = self.shared.read();
        !shared.pending.is_empty() || shared.captured > 0
    }

    /// Makes durable all that was written before the call. One commit serves every caller that came before its capture.
    pub fn flush(&self) -> Result<(), DeltaError> {
        if self.settled.load(Ordering::Acquire) {
            // Somebody's view is older than that: others may share the files, and nothing may change in them.
            return Ok(());
        }
        let ticket = self.tickets.fetch_add(1, Ordering::SeqCst);
        let mut journal = self.journal.lock();
        self.check_poison()?;
        if ticket < journal.covered {
            return Ok(());
        }
        // Whoever has a ticket now had his writes acknowledged before; the capture below takes them all.
        let covers = self.tickets.load(Ordering::SeqCst);
        let rewrite = journal.log.len() > self.rewrite_min_len.max(REWRITE_FACTOR * journal.rewritten_len);
        let (pin, let_go, snapshot) = {
            let _gate = self.gate.write();
            let mut tails = self.tails.lock();
            let mut shared = self.shared.write();
            self.slots.lock().seal_fresh();
            let snapshot = rewrite.then(|| shared.pages.clone());
            if !shared.pending.is_empty() {
                tails.captured();
                self.said.store(0, Ordering::Relaxed);
            }
            journal.retry.append(&mut shared.pending);
            shared.captured = journal.retry.len();
            let let_go = std::mem::take(&mut shared.let_go);
            (std::mem::take(&mut shared.pin), let_go, snapshot)
        };
        journal.retry_let_go.extend(let_go);
        let committed = self.commit(&mut journal);
        if committed.is_ok() {
            journal.covered = covers;
            self.shared.write().captured = 0;
            let let_go = std::mem::take(&mut journal.retry_let_go);
            journal.retired.push_back((pin, let_go));
        } else {
            // The readers of this capture may hold slots that a later commit will let go.
            journal.retired.push_back((pin, Vec::new()));
        }
        committed?;
        self.reclaim(&mut journal);
        if let Some(pages) = snapshot {
            self.rewrite(&mut journal, &pages)?;
        }
        Ok(())
    }

    /// Rule 3, from the first fsync to the second.
    fn commit(&self, journal: &mut Journal) -> Result<(), DeltaError> {
        if journal.retry.is_empty() {
            return Ok(());
        }
        // Cleared first: a write that comes during the fsync is for the next one.
        if self.data_dirty.swap(false, Ordering::AcqRel)
            && let Err(source) = self.data.sync()
        {
            return Err(self.poison(self.data_failed("sync", source)));
        }
        let prepared = journal.log.prepare(&journal.retry);
        let next = journal.log.name_of(&prepared);
        self.about_to_be(next)?;
        let map_failed = |action, source| DeltaError::io(action, self.dir.describe(MAP_FILE), source);
        let appended = match journal.log.append(prepared) {
            Ok(appended) => appended,
            Err(source) => return Err(self.poison_unless_full(map_failed("write", source))),
        };
        journal.log.sync(appended).map_err(|source| self.poison(map_failed("sync", source)))?;
        self.tails.lock().committed(next);
        journal.retry.clear();
        // A burst must not keep its memory for ever.
        journal.retry.shrink_to(PENDING_SOFT);
        Ok(())
    }

    /// Rule 2: slots that no commit names and no reader holds are free again, their space first.
    fn reclaim(&self, journal: &mut Journal) {
        while let Some((pin, _)) = journal.retired.front() {
            // Only the queue holds it, and no reader can get it again: it left `shared` with its capture. Later entries wait
            // for earlier ones, because a reader from before may hold a slot that was let go after.
            if Arc::strong_count(pin) > 1 {
                break;
            }
            let (_, runs) = journal.retired.pop_front().expect("front was there");
            for &(slot, count) in &runs {
                if count >= PUNCH_MIN_SLOTS
                    && let Err(error) = self.data.punch(slot.offset(), u64::from(count) * PAGE_SIZE)
                {
                    tracing::warn!(path = %self.dir.describe(DATA_FILE).display(), %error, "can't give space back");
                }
            }
            let mut slots = self.slots.lock();
            for (slot, count) in runs {
                slots.release(slot, count);
            }
        }
    }

    /// Replaces a log that has grown long by one that says the same in less. `pages` is the map as of the last commit.
    fn rewrite(&self, journal: &mut Journal, pages: &PageMap) -> Result<(), DeltaError> {
        let header = journal.log.next_header();
        let rewritten = Log::write_new(&*self.dir, header, pages.records(), |next| self.about_to_be(next));
        match rewritten {
            Ok(log) => {
                self.tails.lock().committed(log.last());
                journal.rewritten_len = log.len();
                journal.log = log;
                Ok(())
            }
            // The old log is whole and goes on; trying again at every flush would be no help.
            Err(DeltaError::Full { path }) => {
                tracing::warn!(path = %path.display(), "no space to rewrite the delta's log, it goes on growing");
                journal.rewritten_len = journal.log.len();
                Ok(())
            }
            // The rename may or may not have reached the disk: which log counts is not known.
            Err(other) => Err(self.poison(other)),
        }
    }

    /// Whichever of the two is found to be the log's last: what is written now goes on from it.
    fn about_to_be(&self, next: CommitName) -> Result<(), DeltaError> {
        let told = self.tails.lock().about_to_be(&*self.dir, next);
        told.map_err(|error| self.poison_unless_full(error))
    }

    fn data_failed(&self, action: &'static str, source: std::io::Error) -> DeltaError {
        DeltaError::io(action, self.dir.describe(DATA_FILE), source)
    }

    fn poison(&self, error: DeltaError) -> DeltaError {
        let reason = self.poisoned.get_or_init(|| error.to_string());
        tracing::error!(%reason, "the delta takes no more writes until the volume is opened anew");
        self.tails.lock().void(&*self.dir);
        error
    }

    fn poison_unless_full(&self, error: DeltaError) -> DeltaError {
        match error {
            DeltaError::Full { .. } => error,
            other => self.poison(other),
        }
    }

    pub(super) fn check_poison(&self) -> Result<(), DeltaError> {
        match self.poisoned.get() {
            Some(reason) => Err(DeltaError::Poisoned(reason.clone())),
            None => Ok(()),
        }
    }

    fn check_writable(&self) -> Result<(), DeltaError> {
        self.check_poison()?;
        let shared = self.shared.read();
        if shared.pending.len() + shared.captured > PENDING_HARD {
            // Only commits that keep failing for want of space get this far.
            return Err(DeltaError::Full { path: self.dir.describe(MAP_FILE) });
        }
        Ok(())
    }
}

/// Whole pages to be written.
#[derive(Clone, Copy, Debug)]
pub struct PageWrite<'a> {
    /// The first of them.
    pub first: PageIndex,
    /// Their bytes.
    pub bytes: &'a [u8],
}

struct Place {
    slot: Slot,
    pages: u32,
    /// The map names the slot already, for these pages.
    named: bool,
    /// The pages had no slot.
    adds: bool,
}

/// Pages of a write that go to consecutive slots.
struct Part<'a> {
    first: PageIndex,
    slot: Slot,
    named: bool,
    bytes: &'a [u8],
}

impl Part<'_> {
    /// Whether the next one's slots come right after this one's, to be written in the same way.
    fn goes_on(&self, next: &Part<'_>) -> bool {
        self.named == next.named && self.slot.0 + pages_of(self.bytes) == next.slot.0
    }
}

/// How many pages these are the bytes of.
fn pages_of(bytes: &[u8]) -> u32 {
    (bytes.len() as u64 / PAGE_SIZE) as u32
}

impl Shared {
    fn note(&mut self, record: Record) {
        let let_go = &mut self.let_go;
        self.pages.apply(record, &mut |slot, count| let_go.push((slot, count)));
        if let Some(last) = self.pending.last_mut()
            && last.first.0 + u64::from(last.pages) == record.first.0
            && last.state.step(last.pages) == record.state
            && let Some(pages) = last.pages.checked_add(record.pages)
        {
            last.pages = pages;
            return;
        }
        self.pending.push(record);
    }
}

/// The slots under `len` bytes (at least 1) that start `skip` bytes into `first`.
fn slots_of(first: Slot, skip: u64, len: usize) -> (Slot, u32) {
    let (from, end) = (skip / PAGE_SIZE, (skip + len as u64).div_ceil(PAGE_SIZE));
    (Slot(first.0 + from as u32), (end - from).max(1) as u32)
}

/// The slots a map names.
fn taken(pages: &PageMap, file_slots: u64) -> Result<Slots, &'static str> {
    let mut slots = Slots::new();
    for record in pages.records() {
        let PageKind::Data(slot) = record.state.kind() else { continue };
        // Only now: records that later ones replaced may name slots that were cut off since.
        if u64::from(slot.0) + u64::from(record.pages) > file_slots {
            return Err("the map names slots past the end of the data");
        }
        if !slots.adopt(slot, record.pages) {
            return Err("two pages claim one slot");
        }
    }
    Ok(slots)
}

/// Takes the slots of one record more; `false` where they are not to be had.
fn takes(slots: &mut Slots, record: &Record, file_slots: u64) -> bool {
    let PageKind::Data(slot) = record.state.kind() else { return true };
    u64::from(slot.0) + u64::from(record.pages) <= file_slots && slots.adopt(slot, record.pages)
}

fn device_pages(device_size: ByteLen) -> u64 {
    device_size.0.div_ceil(PAGE_SIZE)
}

fn check_binding(
    header: &MapHeader,
    binding: &Binding,
    data_id: LayerId,
    dir: &dyn Dir,
) -> Result<(), DeltaError> {
    let path = dir.describe(MAP_FILE);
    let foreign = |path, field| Err(DeltaError::Foreign { path, field });
    match binding {
        Binding::Made(Identity { base, .. }) if header.base != *base => {
            return Err(DeltaError::WrongBase { path, expected: *base, found: header.base });
        }
        Binding::Made(Identity { volume, .. }) if header.volume != *volume => {
            return foreign(path, "volume id");
        }
        Binding::Named(id, _) if header.layer != *id => return foreign(path, "layer id"),
        _ => {}
    }
    if header.device_size != binding.device_size() {
        return foreign(path, "device size");
    }
    if header.layer != data_id {
        return foreign(dir.describe(DATA_FILE), "layer id");
    }
    Ok(())
}
