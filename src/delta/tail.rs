//! What was acknowledged and is in no commit yet, for the next server on this run of the kernel.
//!
//! Enters: where each page is written, before it is. Leaves: after a kill of the server, what its map in memory knew. Invariant: FORMAT.md, "What a kill leaves". Nothing here is ever synced: what
//! a killed server wrote is in the kernel's memory, and after a power cut none of it counts.

use std::collections::HashMap;

use crate::format::delta::{
    LayerId, Over, PageKind, PageState, Position, Record, Slot, TAIL_ENTRY_LEN, TAIL_HEADER_LEN, TailEntry,
    TailHeader, TailSeal,
};
use crate::units::{PAGE_SIZE, PageIndex};

use super::disk::{Dir, File};
use super::error::DeltaError;
use super::page_map::PageMap;

/// Past this a tail is not gone on with after the next capture.
const LONG: u64 = 4 << 20;
/// Entries are read so many at a time.
const READ_ENTRIES: usize = 16 << 10;

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
    over: [Over; 2],
    /// Entries of the active tail that are in the last capture.
    captured: u64,
    /// A sync failed: nobody can know what the kernel shows.
    is_void: bool,
    buffer: Vec<u8>,
}

/// What the tails of a server that was killed said, in order.
pub struct Recovered {
    /// Pages that were acknowledged, and perhaps some that were not: the bytes of each are there.
    pub entries: Vec<TailEntry>,
}

impl Tails {
    /// Of a layer that has no writes yet.
    pub fn new(layer: LayerId, boot: [u8; 16], last: Position) -> Tails {
        Tails {
            layer,
            boot,
            active: None,
            uncovered: Vec::new(),
            free: Vec::new(),
            files: 0,
            next_epoch: 1,
            over: [Over { commit: last, from: 0 }; 2],
            captured: 0,
            is_void: false,
            buffer: Vec::new(),
        }
    }

    /// Reads what is there; `last` is the last commit of the log. What counts stays until it is committed.
    pub fn open(dir: &dyn Dir, layer: LayerId, last: Position) -> Result<(Tails, Recovered), DeltaError> {
        let mut tails = Tails::new(layer, dir.boot(), last);
        let mut found: Vec<(TailHeader, TailFile)> = Vec::new();
        loop {
            let name = file_name(tails.files);
            let file = match dir.open(&name) {
                Ok(file) => file,
                Err(error) if error.kind() == std::io::ErrorKind::NotFound => break,
                Err(error) => return Err(DeltaError::io("open", dir.describe(&name), error)),
            };
            tails.files += 1;
            let tail = TailFile { name, file };
            match tail.header(dir)? {
                Some(header) if header.layer == layer => {
                    tails.next_epoch = tails.next_epoch.max(header.epoch + 1);
                    found.push((header, tail));
                }
                _ => tails.free.push(tail),
            }
        }
        found.sort_by_key(|(header, _)| header.epoch);
        let mut chain: Vec<(TailHeader, TailFile)> = Vec::new();
        for (header, tail) in found {
            let follows = chain.last().is_none_or(|(before, _)| before.epoch + 1 == header.epoch);
            if header.boot != tails.boot || !follows {
                tails.free.extend(chain.drain(..).map(|(_, tail)| tail));
            }
            if header.boot == tails.boot {
                chain.push((header, tail));
            } else {
                tails.free.push(tail);
            }
        }
        // What comes before it is in the log.
        let over_last = |header: &TailHeader| header.over.into_iter().find(|over| over.commit == last);
        let first = chain.iter().position(|(header, _)| over_last(header).is_some());
        let counted = chain.split_off(first.unwrap_or(chain.len()));
        tails.free.extend(chain.into_iter().map(|(_, tail)| tail));
        let mut entries = Vec::new();
        for (number, (header, tail)) in counted.iter().enumerate() {
            let from = over_last(header).filter(|_| number == 0).map_or(0, |over| over.from);
            tail.entries(dir, header, from, &mut entries)?;
        }
        if counted.is_empty() {
            // Not in a row with what does not count.
            tails.next_epoch += 1;
        }
        tails.uncovered.extend(counted.into_iter().map(|(_, tail)| tail));
        Ok((tails, Recovered { entries }))
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
        let written = active.tail.file.write_at(&self.buffer, active.end);
        written.map_err(|source| DeltaError::io("write", dir.describe(&active.tail.name), source))?;
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
            over: self.over,
            nonce: *uuid::Uuid::new_v4().as_bytes(),
        };
        if let Err(error) = tail.write_header(dir, &header) {
            self.free.push(tail);
            return Err(error);
        }
        self.next_epoch += 1;
        self.captured = 0;
        let seal = header.seal();
        self.active = Some(Active { tail, header, seal, end: TAIL_HEADER_LEN as u64, entries: 0 });
        Ok(())
    }

    /// All that was said is in a capture. Nobody writes now.
    pub fn captured(&mut self) {
        self.captured = self.active.as_ref().map_or(0, |active| active.entries);
        if self.active.as_ref().is_some_and(|active| active.end > LONG) {
            self.uncovered.extend(self.active.take().map(|active| active.tail));
            self.captured = 0;
        }
    }

    /// What was captured is about to be appended as a commit, or the log to be written anew: what was said since goes on from that too.
    pub fn about_to_be(&mut self, dir: &dyn Dir, next: Position) -> Result<(), DeltaError> {
        self.over[1] = Over { commit: next, from: self.captured };
        let Some(active) = &mut self.active else { return Ok(()) };
        active.header.over = self.over;
        active.tail.write_header(dir, &active.header)
    }

    /// It is durable.
    pub fn committed(&mut self, last: Position) {
        self.over = [Over { commit: last, from: self.captured }; 2];
        for tail in self.uncovered.drain(..) {
            // Its entries are sealed with its epoch: nothing of them is read again.
            let _ = tail.file.set_len(0);
            self.free.push(tail);
        }
    }

    /// Nothing that was said may ever count.
    pub fn void(&mut self, dir: &dyn Dir) {
        self.is_void = true;
        let active = self.active.take().map(|active| active.tail);
        for tail in self.uncovered.drain(..).chain(active) {
            if let Err(error) = tail.file.set_len(0) {
                let path = dir.describe(&tail.name);
                tracing::error!(path = %path.display(), %error, "could not be emptied after a failed sync");
            }
        }
    }
}

const VOID: &str = "a sync failed";

fn file_name(number: usize) -> String {
    format!("tail.{number}")
}

impl TailFile {
    /// `None` where it has none that is whole.
    fn header(&self, dir: &dyn Dir) -> Result<Option<TailHeader>, DeltaError> {
        let mut bytes = [0; TAIL_HEADER_LEN];
        match self.file.read_at(&mut bytes, 0) {
            Ok(()) => Ok(TailHeader::decode(&bytes)),
            Err(error) if error.kind() == std::io::ErrorKind::UnexpectedEof => Ok(None),
            Err(error) => Err(DeltaError::io("read", dir.describe(&self.name), error)),
        }
    }

    fn write_header(&self, dir: &dyn Dir, header: &TailHeader) -> Result<(), DeltaError> {
        let written = self.file.write_at(&header.encode(), 0);
        written.map_err(|source| DeltaError::io("write", dir.describe(&self.name), source))
    }

    /// Its entries, up to the first that is not whole.
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
        let (mut at, mut index) = (TAIL_HEADER_LEN as u64, 0);
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

impl Recovered {
    /// The map with what was said since its last commit. What a page's slot holds must be what was said of it: then it is written once more, for the sync it was once written for may have failed.
    pub fn onto(&self, pages: &PageMap, data: &dyn File) -> Result<PageMap, std::io::Error> {
        let mut said: HashMap<(u64, Slot), Vec<u32>> = HashMap::new();
        for TailEntry { record, crc } in &self.entries {
            if let PageKind::Data(slot) = record.state.kind() {
                said.entry((record.first.0, slot)).or_default().push(*crc);
            }
        }
        let slots = data.len()? / PAGE_SIZE;
        let mut holds: HashMap<(u64, Slot), bool> = HashMap::new();
        let mut page = vec![0; PAGE_SIZE as usize];
        for (&(first, slot), crcs) in &said {
            // The header's page comes before the first slot.
            let is_there = u64::from(slot.0) + 1 < slots;
            let mut fits = false;
            if is_there {
                data.read_at(&mut page, slot.offset())?;
                fits = crcs.contains(&crc32fast::hash(&page));
            }
            if fits {
                data.write_at(&page, slot.offset())?;
            }
            holds.insert((first, slot), fits);
        }
        let mut after = pages.clone();
        for TailEntry { record, .. } in &self.entries {
            let counts = match record.state.kind() {
                PageKind::Data(slot) => holds[&(record.first.0, slot)],
                PageKind::Base | PageKind::Zero => true,
            };
            if counts && record.fits(pages.pages()) {
                after.apply(*record, &mut |_, _| {});
            }
        }
        Ok(after)
    }

    /// Where two maps differ in what was said, as records that lead from the one to the other.
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

    /// Whether nothing was said.
    pub fn is_empty(&self) -> bool {
        self.entries.is_empty()
    }
}

/// What is said of pages that are about to be written to consecutive slots.
pub fn entries_of(first: PageIndex, slot: Slot, bytes: &[u8]) -> impl Iterator<Item = TailEntry> + '_ {
    bytes.chunks_exact(PAGE_SIZE as usize).enumerate().map(move |(step, page)| {
        let state = PageState::data(slot).step(step as u32);
        let record = Record { first: PageIndex(first.0 + step as u64), pages: 1, state };
        TailEntry { record, crc: crc32fast::hash(page) }
    })
}
