//! The writer's threads: chunks are hashed and compressed side by side and put back in order.
//!
//! Enters: filled chunk buffers from the caller's thread. Leaves: to the assembler, in the order they were filled, each chunk's id and stored form.
//! Invariant: there are [`Buffers`] for so many chunks and no more; whoever runs ahead waits for one, so every queue here is
//! bounded by their number.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, Sender};

use parking_lot::Mutex;

use super::known::KnownChunks;
use crate::format::{ChunkId, Codec};
use crate::units::ChunkIndex;

/// Bytes of chunks that are on their way at once; each may have its compressed form beside it.
pub const IN_FLIGHT_BYTES: usize = 8 << 20;
/// Chunks on their way at once, at least.
const MIN_IN_FLIGHT: usize = 8;

/// A chunk is stored compressed only where that is smaller by this part of it.
const MIN_GAIN: usize = 16;

/// The memory of one chunk on its way; used again and again.
#[derive(Debug)]
pub(super) struct Buffers {
    /// The chunk's content.
    pub(super) content: Vec<u8>,
    /// Its compressed form, where it has one.
    pub(super) packed: Vec<u8>,
}

/// How many [`Buffers`] there are for chunks of this size.
pub(super) fn buffers_for(chunk_bytes: usize) -> usize {
    (IN_FLIGHT_BYTES / chunk_bytes).max(MIN_IN_FLIGHT)
}

/// A filled chunk.
#[derive(Debug)]
pub(super) struct Job {
    /// Counts up by one from zero.
    pub(super) sequence: u64,
    pub(super) index: ChunkIndex,
    pub(super) buffers: Buffers,
}

/// What a worker found.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Finding {
    /// All zeros.
    Zero,
    /// Content with this id; `packed` tells the codec, `None` where the chunk was known and so was not packed.
    Chunk { id: ChunkId, packed: Option<Codec> },
}

/// A chunk a worker is done with.
#[derive(Debug)]
pub(super) struct Done {
    pub(super) job: Job,
    pub(super) finding: Finding,
}

/// Compresses chunks; one per thread.
pub(super) struct Packer {
    compressor: zstd::bulk::Compressor<'static>,
}

impl Packer {
    pub(super) fn new(level: i32) -> std::io::Result<Packer> {
        Ok(Packer { compressor: zstd::bulk::Compressor::new(level)? })
    }

    /// Compresses `content` into `packed` if that is worth it.
    pub(super) fn pack(&mut self, buffers: &mut Buffers) -> Codec {
        let Buffers { content, packed } = buffers;
        packed.clear();
        // No more room than the result may take: zstd gives up by itself where it would be longer.
        packed.reserve_exact(content.len());
        let room = content.len() - content.len() / MIN_GAIN;
        match self.compressor.compress_to_buffer(content.as_slice(), packed) {
            Ok(len) if len <= room => Codec::Zstd,
            // The only failure with a valid context is that the output does not fit.
            Ok(_) | Err(_) => Codec::Raw,
        }
    }
}

/// Whether all bytes are zero. Differing data ends it within the first line.
pub(super) fn is_zero(bytes: &[u8]) -> bool {
    let (lines, rest) = bytes.as_chunks::<64>();
    lines.iter().all(|line| line.iter().fold(0, |all, byte| all | byte) == 0)
        && rest.iter().all(|&byte| byte == 0)
}

/// Hashes and compresses until there are no more jobs, or nobody takes the results.
pub(super) fn work(
    jobs: &Mutex<Receiver<Job>>,
    results: &Sender<Done>,
    known: &Arc<Mutex<KnownChunks>>,
    mut packer: Packer,
) {
    loop {
        // Held while waiting: the workers take turns to wait, and whoever gets a job lets the next one in.
        let job = jobs.lock().recv();
        let Ok(mut job) = job else { return };
        let finding = examine(&mut job.buffers, known, &mut packer);
        if results.send(Done { job, finding }).is_err() {
            return;
        }
    }
}

fn examine(buffers: &mut Buffers, known: &Mutex<KnownChunks>, packer: &mut Packer) -> Finding {
    if is_zero(&buffers.content) {
        return Finding::Zero;
    }
    let id = ChunkId::of(&buffers.content);
    // A hint that saves work; what is stored is for the assembler to decide, in order, so that the same image gives the same objects.
    let is_known = known.lock().contains(&id);
    let packed = if is_known { None } else { Some(packer.pack(buffers)) };
    Finding::Chunk { id, packed }
}

/// Puts results back in the order of their sequence.
pub(super) struct InOrder {
    results: Receiver<Done>,
    next: u64,
    /// Results that came early; no more than there are buffers.
    early: BTreeMap<u64, Done>,
}

impl InOrder {
    pub(super) fn new(results: Receiver<Done>) -> InOrder {
        InOrder { results, next: 0, early: BTreeMap::new() }
    }

    /// The next result. `Ok(None)` when all are through, `Err` when a worker took one with it.
    pub(super) fn next(&mut self) -> Result<Option<Done>, WorkerLost> {
        loop {
            if let Some(done) = self.early.remove(&self.next) {
                self.next += 1;
                return Ok(Some(done));
            }
            match self.results.recv() {
                Ok(done) => self.early.insert(done.job.sequence, done),
                Err(_) if self.early.is_empty() => return Ok(None),
                Err(_) => return Err(WorkerLost),
            };
        }
    }
}

/// A worker ended with a chunk in its hands.
#[derive(Clone, Copy, Debug)]
pub(super) struct WorkerLost;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn zeros_are_found_to_the_last_byte() {
        for len in [0, 1, 63, 64, 65, 4096, 4099] {
            let mut bytes = vec![0; len];
            assert!(is_zero(&bytes));
            for at in [0, len / 2, len.saturating_sub(1)] {
                if at < len {
                    bytes[at] = 1;
                    assert!(!is_zero(&bytes), "{at} of {len}");
                    bytes[at] = 0;
                }
            }
        }
    }

    #[test]
    fn what_does_not_shrink_by_a_sixteenth_is_kept_as_it_is() {
        let mut packer = Packer::new(1).unwrap();
        let mut state = 1u64;
        let mut noise = |len: usize| -> Vec<u8> {
            std::iter::repeat_with(|| {
                state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
                (state >> 56) as u8
            })
            .take(len)
            .collect()
        };
        let mut content = noise(65_536);
        let mut buffers = Buffers { content: content.clone(), packed: Vec::new() };
        assert_eq!(packer.pack(&mut buffers), Codec::Raw);
        content[..2000].fill(0);
        buffers.content = content.clone();
        assert_eq!(packer.pack(&mut buffers), Codec::Raw);
        content[..20_000].fill(0);
        buffers.content = content;
        assert_eq!(packer.pack(&mut buffers), Codec::Zstd);
        assert!(buffers.packed.len() < 50_000);
    }
}
