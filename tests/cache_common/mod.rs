//! Shared by the cache tests: chunks made from a number, a repeatable generator, caches in temporary directories.

#![allow(dead_code, clippy::unwrap_used)]

use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use horcrux::cache::{Cache, CacheError, CacheOptions, ChunkRef};
use horcrux::format::{ChunkId, ChunkSize, VerifiedChunk};
use horcrux::units::ByteLen;

/// 64 KiB, the smallest.
pub fn small() -> ChunkSize {
    ChunkSize::from_log2(16).unwrap()
}

/// SplitMix64: repeatable from its seed.
pub struct Random(pub u64);

impl Random {
    pub fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    pub fn below(&mut self, end: u64) -> u64 {
        self.next() % end
    }
}

/// A seed from the environment or the clock, printed so that a failure can be run again.
pub fn seed(test: &str) -> u64 {
    let seed = std::env::var("HORCRUX_TEST_SEED")
        .ok()
        .and_then(|text| text.parse().ok())
        .unwrap_or_else(|| SystemTime::now().duration_since(UNIX_EPOCH).unwrap().as_nanos() as u64);
    println!("{test}: HORCRUX_TEST_SEED={seed}");
    seed
}

/// The content of chunk `n`: every 8 bytes differ, and say which chunk they are of.
pub fn content(n: u64, size: ChunkSize) -> Vec<u8> {
    let mut random = Random(n);
    let mut content = Vec::with_capacity(size.len());
    while content.len() < size.len() {
        content.extend_from_slice(&random.next().to_le_bytes());
    }
    content
}

pub fn chunk(n: u64, size: ChunkSize) -> VerifiedChunk {
    let content = content(n, size);
    VerifiedChunk::verify(ChunkId::of(&content), size, content.into()).unwrap()
}

pub fn id(n: u64, size: ChunkSize) -> ChunkId {
    ChunkId::of(&content(n, size))
}

/// Opens a cache. An earlier one's last reference may still be on its way out in a background task: that is waited for.
pub fn open(dir: &Path, mib: u64) -> Arc<Cache> {
    let options = CacheOptions { keep_free: Some(ByteLen(0)), ..CacheOptions::new(ByteLen(mib << 20)) };
    let patience = Instant::now() + Duration::from_secs(10);
    loop {
        match Cache::open(dir, options) {
            Err(CacheError::InUse { .. }) if Instant::now() < patience => {
                std::thread::sleep(Duration::from_millis(2));
            }
            opened => return opened.unwrap(),
        }
    }
}

/// The chunk, fetched from nowhere but `content`.
pub async fn read(cache: &Arc<Cache>, n: u64, size: ChunkSize) -> ChunkRef {
    let chunk = chunk(n, size);
    cache.get_or_fetch(chunk.id(), size, || async move { Ok::<_, std::io::Error>(chunk) }).await.unwrap()
}

/// The only slab file of a cache directory, or the first of several.
pub fn first_slab(dir: &Path) -> std::path::PathBuf {
    let mut names: Vec<_> =
        std::fs::read_dir(dir.join("slabs")).unwrap().map(|entry| entry.unwrap().path()).collect();
    names.sort();
    names.into_iter().next().expect("a slab")
}

/// Waits until the write queue has room for a chunk, so that it will be kept.
pub async fn room(cache: &Cache, size: ChunkSize) {
    drop(cache.room(ByteLen(size.len() as u64)).await);
}
