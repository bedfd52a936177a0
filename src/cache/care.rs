//! Looking after a cache that no server has open: what is in it, whether that is right, and giving space back.
//!
//! Enters: a cache's directory. Leaves: figures; freed slots. Invariants: looking needs no lock and changes nothing but what is damaged (it goes), so it may be a moment out of date beside a
//! running server; whatever frees takes the lock a server holds.

use std::collections::HashMap;
use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};

use super::blobs::Blobs;
use super::error::CacheError;
use super::slab::{self, Slab};
use super::stats::Counters;
use crate::format::ChunkId;
use crate::format::cache_index::{HEADER_LEN, RECORD_LEN, RECORDS_AT, SlabGeometry, decode_record};
use crate::lock::FileLock;
use crate::repo::MetaCache;
use crate::units::ByteLen;

/// What a cache holds.
#[derive(Clone, Debug, Default)]
pub struct Survey {
    /// Chunks, and how long each is.
    pub chunks: HashMap<ChunkId, ByteLen>,
    /// Slab files.
    pub slabs: u64,
    /// What they take of the disk.
    pub slab_bytes: ByteLen,
    /// What map nodes and chunk tables take.
    pub blob_bytes: ByteLen,
}

/// What was freed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Freed {
    /// Chunks.
    pub chunks: u64,
    /// Bytes of the disk.
    pub bytes: ByteLen,
}

/// What verifying found.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Verified {
    /// Chunks that are what they say.
    pub good: u64,
    /// Chunks that were not, and were thrown away.
    pub damaged: u64,
}

/// A slab file, opened by itself.
struct SlabFile {
    path: PathBuf,
    file: File,
    geometry: SlabGeometry,
    ids: Vec<Option<ChunkId>>,
}

impl SlabFile {
    /// `None` for what is no slab of this build: a server throws it away.
    fn open(path: &Path, write: bool) -> io::Result<Option<SlabFile>> {
        let file = OpenOptions::new().read(true).write(write).open(path)?;
        let mut header = [0; HEADER_LEN];
        if file.read_exact_at(&mut header, 0).is_err() {
            return Ok(None);
        }
        let geometry = match SlabGeometry::decode(&header) {
            Ok(geometry) if geometry.file_len() == file.metadata()?.len() => geometry,
            _ => return Ok(None),
        };
        // The length was checked against the file's, so this is at most 4 MiB.
        let mut records = vec![0; geometry.slots() as usize * RECORD_LEN];
        if file.read_exact_at(&mut records, RECORDS_AT).is_err() {
            return Ok(None);
        }
        let ids = records.as_chunks::<RECORD_LEN>().0.iter().map(decode_record).collect();
        Ok(Some(SlabFile { path: path.to_owned(), file, geometry, ids }))
    }

    fn chunk_len(&self) -> u64 {
        self.geometry.chunk().len() as u64
    }

    fn free(&self, slot: usize) -> io::Result<()> {
        slab::release(&self.file, &self.geometry, slot as u32).map(drop)
    }
}

fn slabs(dir: &Path, write: bool) -> Result<Vec<SlabFile>, CacheError> {
    let dir = dir.join("slabs");
    let listed = match fs::read_dir(&dir) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        other => other.map_err(CacheError::io("list", &dir))?,
    };
    let mut found = Vec::new();
    for entry in listed {
        let entry = entry.map_err(CacheError::io("list", &dir))?;
        if entry.file_name().to_str().and_then(Slab::number_of).is_none() {
            continue;
        }
        match SlabFile::open(&entry.path(), write) {
            Ok(slab) => found.extend(slab),
            // A server beside us may have dropped it.
            Err(error) if error.kind() == io::ErrorKind::NotFound && !write => {}
            Err(error) => return Err(CacheError::io("open the cache slab", &entry.path())(error)),
        }
    }
    Ok(found)
}

/// Looks at what a cache holds. Blocks on files; needs no lock.
pub fn survey(dir: &Path) -> Result<Survey, CacheError> {
    let mut survey = Survey::default();
    for slab in slabs(dir, false)? {
        survey.slabs += 1;
        let taken = slab.file.metadata().map_or(0, |found| found.blocks() * 512);
        survey.slab_bytes.0 += taken;
        survey.chunks.extend(slab.ids.iter().flatten().map(|id| (*id, ByteLen(slab.chunk_len()))));
    }
    survey.blob_bytes = ByteLen(Blobs::beside(dir.join("meta")).used());
    Ok(survey)
}

/// Frees the chunks that `keep` does not want, and gives their space back. Takes the cache's lock.
pub fn prune(dir: &Path, keep: impl Fn(&ChunkId) -> bool) -> Result<Freed, CacheError> {
    let _lock: FileLock = super::lock(dir)?;
    let mut freed = Freed::default();
    for slab in slabs(dir, true)? {
        let failed = |error| CacheError::io("free slots of", &slab.path)(error);
        let before = slab.file.metadata().map_err(failed)?.blocks() * 512;
        let mut kept = 0;
        for (slot, id) in slab.ids.iter().enumerate() {
            match id {
                Some(id) if keep(id) => kept += 1,
                Some(_) => {
                    slab.free(slot).map_err(failed)?;
                    freed.chunks += 1;
                }
                None => {}
            }
        }
        let after = if kept == 0 {
            fs::remove_file(&slab.path).map_err(failed)?;
            0
        } else {
            slab.file.metadata().map_err(failed)?.blocks() * 512
        };
        freed.bytes.0 += before.saturating_sub(after);
    }
    Ok(freed)
}

/// Reads every chunk and throws away what is not what it says. Takes the cache's lock.
pub fn verify(dir: &Path, mut progress: impl FnMut(ByteLen)) -> Result<Verified, CacheError> {
    let _lock: FileLock = super::lock(dir)?;
    let mut verified = Verified::default();
    for slab in slabs(dir, true)? {
        let mut content = vec![0; slab.geometry.chunk().len()];
        for (slot, id) in slab.ids.iter().enumerate() {
            let Some(id) = id else { continue };
            let read = slab.file.read_exact_at(&mut content, slab.geometry.slot_at(slot as u32));
            if read.is_ok() && ChunkId::of(&content) == *id {
                verified.good += 1;
            } else {
                slab.free(slot).map_err(CacheError::io("free a slot of", &slab.path))?;
                verified.damaged += 1;
            }
            progress(ByteLen(slab.chunk_len()));
        }
    }
    Ok(verified)
}

/// The map nodes and chunk tables of a cache, for who wants to know what volumes need without opening the cache. Reads only.
pub struct KeptMeta {
    blobs: Blobs,
    counters: Counters,
}

impl KeptMeta {
    /// Those of the cache in `dir`.
    pub fn open(dir: &Path) -> KeptMeta {
        KeptMeta { blobs: Blobs::beside(dir.join("meta")), counters: Counters::default() }
    }
}

impl std::fmt::Debug for KeptMeta {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("KeptMeta")
    }
}

impl MetaCache for KeptMeta {
    fn get(&self, hash: &[u8; 32]) -> Option<bytes::Bytes> {
        self.blobs.read(hash, &self.counters)
    }

    fn put(&self, _hash: &[u8; 32], _bytes: &[u8]) {}
}
