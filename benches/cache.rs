//! The cache's hot path: `cargo bench --bench cache`.
//!
//! `lookup` is what every warm read pays per chunk: find, pin, unpin. The ids are visited in random order, so that
//! the larger case misses the processor's caches.

use std::hint::black_box;
use std::time::Duration;

use criterion::{BatchSize, Criterion, Throughput, criterion_group, criterion_main};
use horcrux::cache::{Cache, CacheOptions};
use horcrux::format::{ChunkId, ChunkSize, VerifiedChunk};
use horcrux::units::ByteLen;

fn chunk(n: u64, size: ChunkSize) -> VerifiedChunk {
    let mut content = vec![0; size.len()];
    content[..8].copy_from_slice(&n.to_le_bytes());
    VerifiedChunk::verify(ChunkId::of(&content), size, content.into()).expect("hashed just before")
}

/// Visits `0..end` in an order without pattern: steps of a prime.
fn scattered(end: usize) -> impl Iterator<Item = usize> {
    (0..end).cycle().scan(0, move |at, _| {
        *at = (*at + 7_919) % end;
        Some(*at)
    })
}

fn lookups(criterion: &mut Criterion) {
    let size = ChunkSize::from_log2(16).expect("64 KiB is allowed");
    let mut group = criterion.benchmark_group("cache");
    group.measurement_time(Duration::from_secs(3)).throughput(Throughput::Elements(1));
    for count in [64u64, 8_192] {
        let dir = tempfile::tempdir().expect("a temporary directory");
        let cache = Cache::open(dir.path(), CacheOptions::new(ByteLen(2 << 30))).expect("an empty directory");
        let runtime = tokio::runtime::Builder::new_current_thread().enable_time().build().expect("a runtime");
        let ids: Vec<_> = (0..count)
            .map(|n| {
                let chunk = chunk(n, size);
                // Waits for the queue, so that all of them are kept.
                drop(runtime.block_on(cache.room(ByteLen(size.len() as u64))));
                cache.insert(chunk.clone());
                chunk.id()
            })
            .collect();
        runtime.block_on(cache.written());
        let mut order = scattered(ids.len());
        group.bench_function(format!("lookup, {count} chunks"), |bencher| {
            bencher.iter(|| {
                cache.lookup(black_box(&ids[order.next().expect("endless")])).expect("all are here")
            });
        });
        if count == 64 {
            group.bench_function("lookup of what is not here", |bencher| {
                let absent = ChunkId::of(b"absent");
                bencher.iter(|| cache.lookup(black_box(&absent)));
            });
            let found = cache.lookup(&ids[0]).expect("all are here");
            group.bench_function("is_resident, 4 KiB", |bencher| {
                bencher.iter(|| found.is_resident(black_box(4096..8192)))
            });
            group.bench_function("lookup and copy 4 KiB", |bencher| {
                let mut page = [0; 4096];
                bencher.iter_batched(
                    || order.next().expect("endless"),
                    |n| {
                        let found = cache.lookup(&ids[n]).expect("all are here");
                        page.copy_from_slice(&found[8192..12288]);
                    },
                    BatchSize::SmallInput,
                );
            });
        }
    }
    group.finish();
}

criterion_group!(benches, lookups);
criterion_main!(benches);
