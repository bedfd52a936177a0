//! What was acknowledged and is in no commit yet, for the next server on this run of the kernel.
//!
//! Enters: where each page is written, before it is. Leaves: after a kill of the server, what its map in memory knew. Invariant: FORMAT.md, "What a kill leaves". Nothing here is ever synced: what
//! a killed server wrote is in the kernel's memory, and after a power cut none of it counts.

use std::io::ErrorKind;

use crate::format::delta::{
    CommitName, LayerId, PageKind, PageState, Predecessor, Record, Slot, TAIL_ENTRIES_AT, TAIL_ENTRY_LEN,
    TAIL_HEADER_LEN, TAIL_HEADERS, TailEntry, TailHeader, TailSeal,
};
use crate::units::{PAGE_SIZE, PageIndex};

use super::disk::{Dir, File};
use super::error::DeltaError;
use super::page_map::PageMap;

/// A tail longer than this is not gone on with after the next capture.
const LONG: u64 = 4 << 20;
/// What a file that is used again may keep of the disk.
const KEPT: u64 = 64 << 20;
/// Entries are read so many at a time.
const READ_ENTRIES: usize = 16 << 10;
/// Pages are read so many at a time.
const READ_PAGES: usize = 256;
const PAGE: usize = PAGE_SIZE as usize;
const VOID: &str = "a sync failed";

/// One file.
struct TailFile {
    name: String,
    file: Box<dyn File>,
}

struct Active {
    tail: TailFile,
    header: TailHeader,
    seal: TailSeal,
    end: u64,
    entries: u64,
}

/// The tails of a layer.
pub struct Tails {
    layer: LayerId,
    boot: [u8; 16],
    /// Begun with the first write after a capture that found the last one long.
    active: Option<Active>,
    /// They hold what the commit that is under way, or the next one, makes durable.
    uncovered: Vec<TailFile>,
    free: Vec<TailFile>,
    /// How many files there are.
    files: usize,
    next_epoch: u64,
    /// The last durable commit, and the one that is about to be.
    after: [Predecessor; 2],
    /// Entries of the active tail that the last capture has.
    in_capture: u64,
    /// The layer is being opened: what is in its tails is nowhere else, whatever fails.
    is_opening: bool,
    is_void: bool,
    long: u64,
    buffer: Vec<u8>,
}

impl Tails {
    /// Of a layer that has no writes yet.
    pub fn new(layer: LayerId, boot: [u8; 16], last: CommitName) -> Tails {
        Tails {
            layer,
            boot,
            active: None,
            uncovered: Vec::new(),
            free: Vec::new(),
            files: 0,
            next_epoch: 1,
            after: [Predecessor { commit: last, from: 0 }; 2],
            in_capture: 0,
            is_opening: false,
            is_void: false,
            long: LONG,
            buffer: Vec::new(),
        }
    }

    /// Has tails be given up when they are longer than `len` instead of 4 MiB.
    pub fn give_up_above(&mut self, len: u64) {
        self.long = len;
    }

    /// Reads what is there; `last` is the last commit of the log. What counts stays until [`Tails::opened`].
    pub fn open(dir: &dyn Dir, layer: LayerId, last: CommitName) -> Result<(Tails, Recovered), DeltaError> {
        let mut tails = Tails::new(layer, dir.boot(), last);
        tails.is_opening = true;
        let mut found: Vec<(TailHeader, TailFile)> = Vec::new();
        loop {
            let name = file_name(tails.files);
            let file = match dir.open(&name) {
                Ok(file) => file,
                Err(error) if error.kind() == ErrorKind::NotFound => break,
                Err(error) => return Err(DeltaError::io("open", dir.describe(&name), error)),
            };
            tails.files += 1;
            let tail = TailFile { name, file };
            let header = tail.header(dir)?.filter(|header| header.layer == layer);
            if let Some(header) = &header {
                tails.next_epoch = tails.next_epoch.max(header.epoch + 1);
            }
            match header {
                Some(header) if header.boot == tails.boot => found.push((header, tail)),
                _ => tails.free.push(tail),
            }
        }
        // Those that follow one another to the last one,
        found.sort_by_key(|(header, _)| header.epoch);
        let mut chain: Vec<(TailHeader, TailFile)> = Vec::new();
        for (header, tail) in found {
            if chain.last().is_some_and(|(before, _)| before.epoch + 1 != header.epoch) {
                tails.free.extend(chain.drain(..).map(|(_, tail)| tail));
            }
            chain.push((header, tail));
        }
        // from where the log ends.
        let goes_on = |header: &TailHeader| header.after.into_iter().find(|after| after.commit == last);
        let first = chain.iter().position(|(header, _)| goes_on(header).is_some());
        let counted = chain.split_off(first.unwrap_or(chain.len()));
        tails.free.extend(chain.into_iter().map(|(_, tail)| tail));
        let mut entries = Vec::new();
        for (number, (header, tail)) in counted.iter().enumerate() {
            let from = goes_on(header).filter(|_| number == 0).map_or(0, |after| after.from);
            tail.entries(dir, header, from, &mut entries)?;
        }
        tails.uncovered.extend(counted.into_iter().map(|(_, tail)| tail));
        Ok((tails, Recovered { entries }))
    }

    /// The layer is open. Where nothing is left to be committed of what was found, that is forgotten.
    pub fn opened(&mut self, dir: &dyn Dir, nothing_left: bool) -> Result<(), DeltaError> {
        self.is_opening = false;
        if !nothing_left {
            return Ok(());
        }
        for tail in self.uncovered.drain(..) {
            tail.write(dir, &[0; TAIL_ENTRIES_AT as usize], 0)?;
            self.free.push(tail);
        }
        // Not in a row with what does not count any more.
        self.next_epoch += 1;
        Ok(())
    }

    /// Says where pages are about to be written, or that they are to be zeros.
    pub fn append(&mut self, dir: &dyn Dir, entries: &[TailEntry]) -> Result<(), DeltaError> {
        if self.active.is_none() {
            self.begin(dir)?;
        }
        let Some(active) = &mut self.active else { return Err(DeltaError::Poisoned(VOID.to_owned())) };
        self.buffer.clear();
        for (index, entry) in (active.entries..).zip(entries) {
            entry.encode(&active.seal, index, &mut self.buffer);
        }
        if let Err(error) = active.tail.write(dir, &self.buffer, active.end) {
            // What was written of it must not come to lie behind what is written next.
            if active.tail.file.set_len(active.end).is_err() {
                self.give_up();
            }
            return Err(error);
        }
        active.end += self.buffer.len() as u64;
        active.entries += entries.len() as u64;
        Ok(())
    }

    fn begin(&mut self, dir: &dyn Dir) -> Result<(), DeltaError> {
        if self.is_void {
            return Ok(());
        }
        let tail = match self.free.pop() {
            Some(tail) => tail,
            None => {
                let name = file_name(self.files);
                let file = dir.create(&name);
                let file = file.map_err(|source| DeltaError::io("create", dir.describe(&name), source))?;
                self.files += 1;
                TailFile { name, file }
            }
        };
        let header = TailHeader {
            layer: self.layer,
            boot: self.boot,
            epoch: self.next_epoch,
            // All of its entries come after either.
            after: self.after.map(|after| Predecessor { from: 0, ..after }),
            serial: 0,
            nonce: *uuid::Uuid::new_v4().as_bytes(),
        };
        if let Err(error) = tail.write_header(dir, &header) {
            self.free.push(tail);
            return Err(error);
        }
        self.next_epoch += 1;
        self.in_capture = 0;
        let seal = header.seal();
        self.active = Some(Active { tail, header, seal, end: TAIL_ENTRIES_AT, entries: 0 });
        Ok(())
    }

    fn give_up(&mut self) {
        self.uncovered.extend(self.active.take().map(|active| active.tail));
        self.in_capture = 0;
    }

    /// All that was said is in a capture. Nobody writes now.
    pub fn captured(&mut self) {
        self.in_capture = self.active.as_ref().map_or(0, |active| active.entries);
        if self.active.as_ref().is_some_and(|active| active.end > self.long) {
            self.give_up();
        }
    }

    /// What was captured is about to be appended as a commit, or the log to be written anew: what was said since goes on from that too.
    pub fn about_to_be(&mut self, dir: &dyn Dir, next: CommitName) -> Result<(), DeltaError> {
        self.after[1] = Predecessor { commit: next, from: self.in_capture };
        let Some(active) = &mut self.active else { return Ok(()) };
        let serial = active.header.serial.wrapping_add(1);
        let header = TailHeader { after: self.after, serial, ..active.header.clone() };
        active.tail.write_header(dir, &header)?;
        active.header = header;
        Ok(())
    }

    /// It is durable.
    pub fn committed(&mut self, last: CommitName) {
        self.after = [Predecessor { commit: last, from: self.in_capture }; 2];
        for tail in self.uncovered.drain(..) {
            // What is in it goes on from commits that are not the last any more.
            if tail.file.len().is_ok_and(|len| len > KEPT) {
                let _ = tail.file.set_len(0);
            }
            self.free.push(tail);
        }
    }

    /// Nothing that was said may ever count: a sync failed, and nobody can know of what the kernel shows whether the disk has it.
    pub fn void(&mut self, dir: &dyn Dir) {
        if self.is_opening {
            // It is written once more by who opens it next.
            return;
        }
        self.is_void = true;
        self.give_up();
        for tail in self.uncovered.drain(..) {
            if let Err(error) = tail.file.set_len(0) {
                let path = dir.describe(&tail.name);
                tracing::error!(path = %path.display(), %error, "could not be emptied after a failed sync");
            }
        }
    }
}

fn file_name(number: usize) -> String {
    format!("tail.{number}")
}

impl TailFile {
    fn write(&self, dir: &dyn Dir, bytes: &[u8], at: u64) -> Result<(), DeltaError> {
        let written = self.file.write_at(bytes, at);
        written.map_err(|source| DeltaError::io("write", dir.describe(&self.name), source))
    }

    /// In the place of the one before the last: that one stays whole whatever becomes of this.
    fn write_header(&self, dir: &dyn Dir, header: &TailHeader) -> Result<(), DeltaError> {
        let place = u64::from(header.serial) % TAIL_HEADERS;
        self.write(dir, &header.encode(), place * TAIL_HEADER_LEN as u64)
    }

    /// The newest that is whole; `None` where none is.
    fn header(&self, dir: &dyn Dir) -> Result<Option<TailHeader>, DeltaError> {
        let mut newest: Option<TailHeader> = None;
        for place in 0..TAIL_HEADERS {
            let mut bytes = [0; TAIL_HEADER_LEN];
            match self.file.read_at(&mut bytes, place * TAIL_HEADER_LEN as u64) {
                Ok(()) => {}
                Err(error) if error.kind() == ErrorKind::UnexpectedEof => break,
                Err(error) => return Err(DeltaError::io("read", dir.describe(&self.name), error)),
            }
            let age = |header: &TailHeader| (header.epoch, header.serial);
            let found = TailHeader::decode(&bytes);
            newest = newest.into_iter().chain(found).max_by_key(age);
        }
        Ok(newest)
    }

    /// Its entries from a number on, up to the first that is not whole.
    fn entries(
        &self,
        dir: &dyn Dir,
        header: &TailHeader,
        from: u64,
        entries: &mut Vec<TailEntry>,
    ) -> Result<(), DeltaError> {
        let failed = |source| DeltaError::io("read", dir.describe(&self.name), source);
        let len = self.file.len().map_err(failed)?;
        let seal = header.seal();
        let (mut at, mut index) = (TAIL_ENTRIES_AT, 0);
        let mut bytes = vec![0; READ_ENTRIES * TAIL_ENTRY_LEN];
        loop {
            let whole = (len.saturating_sub(at) / TAIL_ENTRY_LEN as u64).min(READ_ENTRIES as u64) as usize;
            if whole == 0 {
                return Ok(());
            }
            let bytes = &mut bytes[..whole * TAIL_ENTRY_LEN];
            self.file.read_at(bytes, at).map_err(failed)?;
            for bytes in bytes.chunks_exact(TAIL_ENTRY_LEN) {
                let Some(entry) = TailEntry::decode(bytes, &seal, index) else { return Ok(()) };
                if index >= from {
                    entries.push(entry);
                }
                index += 1;
            }
            at += bytes.len() as u64;
        }
    }
}

/// What the tails of a server that was killed say, in order.
pub struct Recovered {
    /// Writes that were acknowledged, and perhaps some that were not.
    entries: Vec<TailEntry>,
}

/// A slot, and what was said of it last.
struct Claim {
    slot: Slot,
    /// Entries that say that it is the page's which was said last to have it.
    entries: Vec<usize>,
}

impl Recovered {
    /// Whether nothing was said.
    pub fn is_empty(&self) -> bool {
        self.entries.is_empty()
    }

    /// The map with what was said since its last commit. A slot is the last page's that it was said to be, if it holds what was said of that page; then it is written once more, for the sync it was
    /// once written for may have failed.
    pub fn onto(&self, pages: &PageMap, data: &dyn File) -> std::io::Result<PageMap> {
        let mut counts: Vec<bool> = self.entries.iter().map(|entry| slot_of(entry).is_none()).collect();
        let slots = (data.len()? / PAGE_SIZE).saturating_sub(1);
        let claims: Vec<Claim> =
            self.claims().into_iter().filter(|claim| u64::from(claim.slot.0) < slots).collect();
        let mut buffer = vec![0; READ_PAGES * PAGE];
        let mut has_space = true;
        for run in runs(&claims) {
            let bytes = &mut buffer[..run.len() * PAGE];
            data.read_at(bytes, run[0].slot.offset())?;
            for (claim, page) in run.iter().zip(bytes.chunks_exact(PAGE)) {
                let crc = crc32fast::hash(page);
                if !claim.entries.iter().any(|entry| self.entries[*entry].crc == crc) {
                    continue;
                }
                claim.entries.iter().for_each(|entry| counts[*entry] = true);
                if has_space && let Err(error) = data.write_at(page, claim.slot.offset()) {
                    if error.kind() != ErrorKind::StorageFull {
                        return Err(error);
                    }
                    // As it is, it is what it was.
                    has_space = false;
                }
            }
        }
        let mut after = pages.clone();
        for (TailEntry { record, .. }, counts) in self.entries.iter().zip(counts) {
            if counts && record.fits(pages.pages()) {
                after.apply(*record, &mut |_, _| {});
            }
        }
        Ok(after)
    }

    /// By slot.
    fn claims(&self) -> Vec<Claim> {
        let said = |(number, entry): (usize, &TailEntry)| Some((slot_of(entry)?, number));
        let mut said: Vec<(Slot, usize)> = self.entries.iter().enumerate().filter_map(said).collect();
        said.sort_unstable();
        let of_a_slot = said.chunk_by(|one, other| one.0 == other.0);
        of_a_slot
            .map(|said| {
                let page = |number: usize| self.entries[number].record.first;
                let (slot, last) = said[said.len() - 1];
                let its = said.iter().map(|(_, number)| *number).filter(|number| page(*number) == page(last));
                Claim { slot, entries: its.collect() }
            })
            .collect()
    }

    /// What leads from a map to that with what was said.
    pub fn differences(&self, pages: &PageMap, after: &PageMap) -> Vec<Record> {
        let mut now = pages.clone();
        let mut records = Vec::new();
        for TailEntry { record, .. } in self.entries.iter().filter(|entry| entry.record.fits(pages.pages())) {
            let end = record.first.0 + u64::from(record.pages);
            let mut at = record.first.0;
            while at < end {
                let first = PageIndex(at);
                let ((is, is_run), (was, was_run)) = (after.run(first, end - at), now.run(first, end - at));
                let pages = is_run.min(was_run).min(u64::from(u32::MAX)) as u32;
                if is != was {
                    let record = Record { first, pages, state: is };
                    now.apply(record, &mut |_, _| {});
                    records.push(record);
                }
                at += u64::from(pages);
            }
        }
        records
    }
}

fn slot_of(entry: &TailEntry) -> Option<Slot> {
    match entry.record.state.kind() {
        PageKind::Data(slot) => Some(slot),
        PageKind::Base | PageKind::Zero => None,
    }
}

/// Claims of consecutive slots, as many as are read at once.
fn runs(claims: &[Claim]) -> impl Iterator<Item = &[Claim]> {
    let consecutive = claims.chunk_by(|one, other| one.slot.0 + 1 == other.slot.0);
    consecutive.flat_map(|run| run.chunks(READ_PAGES))
}

/// What is said of pages that are about to be written to consecutive slots.
pub fn entries_of(first: PageIndex, slot: Slot, bytes: &[u8]) -> impl Iterator<Item = TailEntry> + '_ {
    bytes.chunks_exact(PAGE).enumerate().map(move |(step, page)| {
        let state = PageState::data(slot).step(step as u32);
        let record = Record { first: PageIndex(first.0 + step as u64), pages: 1, state };
        TailEntry { record, crc: crc32fast::hash(page) }
    })
}
