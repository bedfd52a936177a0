//! The log of a layer: commits appended as frames, replayed when the layer is opened.
//!
//! Enters: records of one commit at a time. Leaves: the records of every whole commit, in order. Invariant: a commit is either
//! replayed whole or not at all, and one that was appended with success is always replayed.

use crate::format::delta::{
    CommitName, FRAME_HEAD_LEN, FrameHead, MAP_HEADER_LEN, MAX_FRAME_RECORDS, MapHeader, Record,
    crc_of_frame, decode_frame, encode_frame,
};

use super::disk::{Dir, File};
use super::error::DeltaError;

/// Name of the log in a layer's directory.
pub const MAP_FILE: &str = "map";
const NEW_MAP_FILE: &str = "map.new";
/// Frames are written out when this many bytes of them have gathered.
const WRITE_BUFFER: usize = 1 << 20;

/// An open log, at its end.
pub struct Log {
    file: Box<dyn File>,
    header: MapHeader,
    end: u64,
    next_sequence: u64,
    /// Where the last commit starts: what lies before it was synced before it was appended.
    last_commit: u64,
    /// Number and CRC of the last frame; 0 where there is none.
    last_frame: (u64, u32),
}

/// What a replay found at the end of the log.
pub struct Replayed {
    /// The log, ready for the next commit unless `torn`.
    pub log: Log,
    /// Bytes follow the last whole commit: the log must be rewritten before it is appended to.
    pub torn: bool,
}

impl Log {
    /// Writes a new log of `records` under its temporary name, durably, and moves it into place, once `told` was told what its last commit is.
    pub fn write_new(
        dir: &dyn Dir,
        header: MapHeader,
        records: impl Iterator<Item = Record>,
        told: impl FnOnce(CommitName) -> Result<(), DeltaError>,
    ) -> Result<Log, DeltaError> {
        let failed = |action| move |source| DeltaError::io(action, dir.describe(NEW_MAP_FILE), source);
        let written = (|| {
            let file = dir.create(NEW_MAP_FILE).map_err(failed("create"))?;
            let mut log = Log { file, header, end: 0, next_sequence: 1, last_commit: 0, last_frame: (0, 0) };
            let mut buffer = log.header.encode().to_vec();
            let mut frame = Vec::with_capacity(MAX_FRAME_RECORDS);
            let mut records = records.peekable();
            while records.peek().is_some() {
                frame.clear();
                frame.extend(records.by_ref().take(MAX_FRAME_RECORDS));
                // Every frame is a commit of its own: nobody reads this file before all of it is durable.
                let sequence = log.next_sequence;
                let crc = encode_frame(&mut buffer, log.header.seal(), sequence, sequence, &frame, false);
                log.last_frame = (sequence, crc);
                log.next_sequence += 1;
                if buffer.len() >= WRITE_BUFFER {
                    log.file.write_at(&buffer, log.end).map_err(failed("write"))?;
                    log.end += buffer.len() as u64;
                    buffer.clear();
                }
            }
            log.file.write_at(&buffer, log.end).map_err(failed("write"))?;
            log.end += buffer.len() as u64;
            log.file.sync().map_err(failed("sync"))?;
            log.last_commit = log.end;
            told(log.last())?;
            Ok(log)
        })();
        let log = written.inspect_err(|_| {
            // Best effort: the next rewrite replaces it anyway.
            let _ = dir.remove(NEW_MAP_FILE);
        })?;
        dir.rename(NEW_MAP_FILE, MAP_FILE).map_err(failed("rename"))?;
        if let Err(source) = dir.sync() {
            log.spoil();
            // Whatever it was, full or not: the old log has no name any more, so going on with it is no way out.
            return Err(DeltaError::Io {
                action: "sync the directory of",
                path: dir.describe(MAP_FILE),
                source,
            });
        }
        Ok(log)
    }

    /// Opens the log and tells `apply` the records of each whole commit in order.
    pub fn replay(
        dir: &dyn Dir,
        mut apply: impl FnMut(Record, u64) -> Result<(), DeltaError>,
    ) -> Result<Replayed, DeltaError> {
        let failed = |action| move |source| DeltaError::io(action, dir.describe(MAP_FILE), source);
        let file = dir.open(MAP_FILE).map_err(failed("open"))?;
        let len = file.len().map_err(failed("read"))?;
        let mut bytes = vec![0; MAP_HEADER_LEN.min(len as usize)];
        file.read_at(&mut bytes, 0).map_err(failed("read"))?;
        let header = MapHeader::decode(&bytes)
            .map_err(|source| DeltaError::Format { path: dir.describe(MAP_FILE), source })?;

        let mut commit: Vec<Record> = Vec::new();
        let mut commit_first = 1;
        let mut sequence = 1;
        let mut at = MAP_HEADER_LEN as u64;
        let mut log = Log { end: at, next_sequence: 1, header, file, last_commit: at, last_frame: (0, 0) };
        while let Some(frame) = log.read_frame(at, len).map_err(failed("read"))? {
            let Some((head, records, more)) = decode_frame(&frame, log.header.seal()) else { break };
            if head.sequence != sequence || head.commit != commit_first {
                break;
            }
            commit.extend(records);
            let crc = crc_of_frame(&frame);
            at += frame.len() as u64;
            sequence += 1;
            if !more {
                for record in commit.drain(..) {
                    apply(record, log.end)?;
                }
                log.last_frame = (head.sequence, crc);
                commit_first = sequence;
                log.last_commit = log.end;
                (log.end, log.next_sequence) = (at, sequence);
            }
        }
        if at < len && log.later_commit_follows(at, len, commit_first).map_err(failed("read"))? {
            return Err(DeltaError::Damaged {
                path: dir.describe(MAP_FILE),
                offset: at,
                problem: "a frame is damaged, and later commits follow it",
            });
        }
        let torn = log.end < len;
        Ok(Replayed { log, torn })
    }

    fn read_frame(&self, at: u64, len: u64) -> std::io::Result<Option<Vec<u8>>> {
        let mut head_bytes = [0; FRAME_HEAD_LEN];
        if at + FRAME_HEAD_LEN as u64 > len {
            return Ok(None);
        }
        self.file.read_at(&mut head_bytes, at)?;
        let Some(head) = FrameHead::decode(&head_bytes) else { return Ok(None) };
        if at + head.frame_len() as u64 > len {
            return Ok(None);
        }
        let mut frame = vec![0; head.frame_len()];
        self.file.read_at(&mut frame, at)?;
        Ok(Some(frame))
    }

    /// Whether a good frame of a commit after the one that starts at `commit` lies anywhere past `at`. Frames are multiples of eight bytes.
    fn later_commit_follows(&self, mut at: u64, len: u64, commit: u64) -> std::io::Result<bool> {
        while at + FRAME_HEAD_LEN as u64 <= len {
            if let Some(frame) = self.read_frame(at, len)?
                && let Some((head, ..)) = decode_frame(&frame, self.header.seal())
                && head.commit > commit
            {
                return Ok(true);
            }
            at += 8;
        }
        Ok(false)
    }

    /// One commit, as it is to be appended.
    pub fn prepare(&self, records: &[Record]) -> Prepared {
        let mut prepared = Prepared { bytes: Vec::new(), next_sequence: self.next_sequence, crc: 0 };
        let mut frames = records.chunks(MAX_FRAME_RECORDS).peekable();
        while let Some(frame) = frames.next() {
            let more = frames.peek().is_some();
            let (sequence, seal) = (prepared.next_sequence, self.header.seal());
            prepared.crc = encode_frame(&mut prepared.bytes, seal, sequence, self.next_sequence, frame, more);
            prepared.next_sequence += 1;
        }
        prepared
    }

    /// What the last commit will be, once that is appended.
    pub fn name_of(&self, prepared: &Prepared) -> CommitName {
        let sequence = prepared.next_sequence - 1;
        CommitName { generation: self.header.generation, sequence, crc: prepared.crc }
    }

    /// Appends one commit, not yet durable. On `Err` the log is as it was.
    pub fn append(&mut self, prepared: Prepared) -> std::io::Result<Appended> {
        let Prepared { bytes, next_sequence, crc } = prepared;
        if let Err(error) = self.file.write_at(&bytes, self.end) {
            // What was written past `end` is a torn tail; the next append goes over it. Cutting it off frees the space.
            let _ = self.file.set_len(self.end);
            return Err(error);
        }
        Ok(Appended { end: self.end + bytes.len() as u64, next_sequence, crc })
    }

    /// Makes what was appended durable; only now does it count. On `Err` it is cut off again.
    pub fn sync(&mut self, appended: Appended) -> std::io::Result<()> {
        if let Err(error) = self.file.sync() {
            self.spoil();
            return Err(error);
        }
        self.last_frame = (appended.next_sequence - 1, appended.crc);
        (self.last_commit, self.end, self.next_sequence) = (self.end, appended.end, appended.next_sequence);
        Ok(())
    }

    /// Cuts off what is not durable and leaves a torn tail of one byte in its place, so that whoever opens this log rewrites it.
    ///
    /// After a failed sync the kernel may call pages clean that never reached the disk, and show them to the next server, whose own sync
    /// then succeeds and proves nothing. Here they are gone, and under the next generation whatever did reach the disk is void too.
    fn spoil(&self) {
        if let Err(error) = self.file.set_len(self.end).and_then(|()| self.file.set_len(self.end + 1)) {
            tracing::error!(%error, "the delta's log could not be cut back after a failed sync");
        }
    }

    /// Makes what was found by a replay durable, and the log's name.
    ///
    /// The last commit is written once more, as it is: the sync it was appended for may have failed for a server that was killed before it
    /// could say so, and then its pages are clean in memory, not on the disk, and a sync alone would do nothing. Whatever lies before it was
    /// synced with success before it was appended. A power cut in between finds each sector old or new, which is the same.
    pub fn make_durable(&self, dir: &dyn Dir) -> Result<(), DeltaError> {
        let failed = |action| move |source| DeltaError::io(action, dir.describe(MAP_FILE), source);
        let mut at = self.last_commit;
        let mut bytes = vec![0; WRITE_BUFFER.min((self.end - at) as usize)];
        while at < self.end {
            let len = bytes.len().min((self.end - at) as usize);
            self.file.read_at(&mut bytes[..len], at).map_err(failed("read"))?;
            self.file.write_at(&bytes[..len], at).map_err(failed("write"))?;
            at += len as u64;
        }
        self.file.sync().map_err(failed("sync"))?;
        dir.sync().map_err(failed("sync the directory of"))
    }

    /// The last commit.
    pub fn last(&self) -> CommitName {
        let (sequence, crc) = self.last_frame;
        CommitName { generation: self.header.generation, sequence, crc }
    }

    /// Length of the log in bytes.
    pub fn len(&self) -> u64 {
        self.end
    }

    /// The log's identity.
    pub fn header(&self) -> &MapHeader {
        &self.header
    }

    /// The identity of the log that replaces this one.
    pub fn next_header(&self) -> MapHeader {
        MapHeader { generation: self.header.generation + 1, ..self.header.clone() }
    }
}

/// A commit that is not in the log yet.
pub struct Prepared {
    bytes: Vec<u8>,
    next_sequence: u64,
    crc: u32,
}

/// Where the log ends once an appended commit counts.
pub struct Appended {
    end: u64,
    next_sequence: u64,
    crc: u32,
}
