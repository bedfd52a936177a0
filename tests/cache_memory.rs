//! What the index costs: a million chunks in under 100 MB of memory, and how long it takes to find them at start.

#![allow(clippy::unwrap_used)]

mod cache_common;

use std::alloc::{GlobalAlloc, Layout, System};
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Instant;

use cache_common::{Random, open};
use horcrux::format::ChunkId;
use horcrux::format::cache_index::{SlabGeometry, encode_record};

/// Counts what is allocated now.
struct Counting;

static ALLOCATED: AtomicUsize = AtomicUsize::new(0);

// SAFETY: passes every call on to the system's allocator as it is; the counter has no part in it.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        ALLOCATED.fetch_add(layout.size(), Ordering::Relaxed);
        // SAFETY: the caller's promises are System's.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, pointer: *mut u8, layout: Layout) {
        ALLOCATED.fetch_sub(layout.size(), Ordering::Relaxed);
        // SAFETY: the caller's promises are System's.
        unsafe { System.dealloc(pointer, layout) }
    }
}

#[global_allocator]
static COUNTING: Counting = Counting;

#[test]
fn a_million_chunks_cost_under_a_hundred_megabytes_of_memory() {
    const CHUNKS: u64 = 1_000_000;
    let dir = tempfile::tempdir().unwrap();
    std::fs::create_dir(dir.path().join("slabs")).unwrap();
    // Sparse slabs whose records name a million chunks: nothing looks at their bytes before their first use.
    let geometry = SlabGeometry::new(cache_common::small(), 29).unwrap();
    let mut random = Random(1);
    let mut ids = Vec::new();
    for number in 0..CHUNKS.div_ceil(geometry.slots().into()) {
        let file = File::create(dir.path().join(format!("slabs/{number:08}.slab"))).unwrap();
        file.set_len(geometry.file_len()).unwrap();
        file.write_all_at(&geometry.encode(), 0).unwrap();
        let mut records = Vec::new();
        for _ in 0..u64::from(geometry.slots()).min(CHUNKS - ids.len() as u64) {
            let mut id = [0; 32];
            id.chunks_exact_mut(8).for_each(|word| word.copy_from_slice(&random.next().to_le_bytes()));
            records.extend_from_slice(&encode_record(&ChunkId(id)));
            ids.push(ChunkId(id));
        }
        file.write_all_at(&records, geometry.record_at(0)).unwrap();
    }
    let before = ALLOCATED.load(Ordering::Relaxed);
    let start = Instant::now();
    let cache = open(dir.path(), 100 << 10);
    let opened = start.elapsed();
    let bytes = ALLOCATED.load(Ordering::Relaxed) - before;
    println!(
        "{CHUNKS} chunks: {bytes} bytes, {:.1} each, opened in {opened:?}",
        bytes as f64 / CHUNKS as f64
    );
    assert_eq!(cache.stats().used.0, CHUNKS << 16);
    assert!(ids.iter().all(|id| cache.contains(id)));
    assert!(bytes < 100_000_000, "{bytes} bytes");
}
