//! The limit is kept, what is in use stays, and every byte is right while chunks come and go.

#![allow(clippy::unwrap_used)]

mod cache_common;

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use cache_common::{Random, chunk, content, id, open, read, room, seed, small};
use horcrux::cache::{Cache, ChunkRef};
use horcrux::format::ChunkSize;
use horcrux::units::ByteLen;

fn on_disk(dir: &Path) -> u64 {
    fs::read_dir(dir.join("slabs"))
        .unwrap()
        .filter_map(|entry| entry.unwrap().metadata().ok())
        .map(|metadata| metadata.blocks() * 512)
        .sum()
}

async fn insert_all(cache: &Arc<Cache>, numbers: std::ops::Range<u64>, size: ChunkSize) {
    for n in numbers {
        room(cache, size).await;
        cache.insert(chunk(n, size));
    }
    cache.written().await;
}

#[tokio::test]
async fn the_limit_is_kept_and_most_of_it_used() {
    let dir = tempfile::tempdir().unwrap();
    let limit = 32 << 20;
    let cache = open(dir.path(), 32);
    for n in 0..10 {
        insert_all(&cache, n * 100..(n + 1) * 100, small()).await;
        assert!(on_disk(dir.path()) <= limit, "{} bytes on disk", on_disk(dir.path()));
        assert_eq!(cache.stats().allocated.0, on_disk(dir.path()));
    }
    let stats = cache.stats();
    assert!(stats.used.0 >= limit / 2, "{stats:?}");
    assert!(stats.evicted > 0 && stats.heap_fallbacks == 0, "{stats:?}");
    let kept = (0..1000).filter(|n| cache.contains(&id(*n, small()))).count() as u64;
    assert_eq!(kept << 16, stats.used.0);
}

#[tokio::test]
async fn a_smaller_limit_is_kept_from_the_next_start_on() {
    let dir = tempfile::tempdir().unwrap();
    insert_all(&open(dir.path(), 64), 0..900, small()).await;
    assert!(on_disk(dir.path()) > 32 << 20);
    let cache = open(dir.path(), 32);
    assert!(on_disk(dir.path()) <= 32 << 20);
    for n in 0..900 {
        assert_eq!(*read(&cache, n, small()).await, *content(n, small()));
    }
    assert!(cache.stats().verified > 0, "what fitted was kept");
}

#[tokio::test]
async fn what_is_used_again_outlives_a_scan() {
    let dir = tempfile::tempdir().unwrap();
    let cache = open(dir.path(), 32);
    insert_all(&cache, 0..100, small()).await;
    for round in 0..20 {
        for n in 0..100 {
            assert!(cache.lookup(&id(n, small())).is_some(), "round {round}: {n} was washed out");
        }
        insert_all(&cache, 1000 + round * 200..1200 + round * 200, small()).await;
    }
}

#[tokio::test]
async fn a_pinned_chunk_is_never_overwritten_and_a_cache_all_pinned_serves_from_memory() {
    let dir = tempfile::tempdir().unwrap();
    let cache = open(dir.path(), 16);
    insert_all(&cache, 0..300, small()).await;
    let held: Vec<(u64, ChunkRef)> =
        (0..300).filter_map(|n| Some((n, cache.lookup(&id(n, small()))?))).collect();
    assert!(held.len() >= 128, "{} held", held.len());
    assert!(held.iter().all(|(_, chunk)| !chunk.is_heap()));
    for n in 300..600 {
        assert_eq!(*read(&cache, n, small()).await, *content(n, small()));
    }
    cache.written().await;
    let stats = cache.stats();
    assert!(stats.heap_fallbacks > 0, "{stats:?}");
    for (n, chunk) in &held {
        assert_eq!(**chunk, *content(*n, small()));
    }
    // Let go, their slots are used again.
    drop(held);
    insert_all(&cache, 600..700, small()).await;
    assert!(cache.contains(&id(699, small())));
    assert_eq!(cache.stats().heap_fallbacks, stats.heap_fallbacks);
}

#[tokio::test]
async fn two_chunk_sizes_share_one_limit_and_the_second_gets_its_part() {
    let dir = tempfile::tempdir().unwrap();
    let cache = open(dir.path(), 32);
    let large = ChunkSize::from_log2(20).unwrap();
    insert_all(&cache, 0..1000, small()).await;
    insert_all(&cache, 0..50, large).await;
    assert!(cache.contains(&id(49, large)), "the second size found no place");
    assert!(cache.contains(&id(999, small())), "the first lost all of its");
    for n in 0..1000 {
        assert_eq!(*read(&cache, n, small()).await, *content(n, small()));
        if n % 20 == 0 {
            assert_eq!(*read(&cache, n / 20, large).await, *content(n / 20, large));
        }
    }
    cache.written().await;
    assert!(on_disk(dir.path()) <= 32 << 20);
    assert_eq!(cache.stats().allocated.0, on_disk(dir.path()));
    drop(cache);
    let cache = open(dir.path(), 32);
    for n in 0..50 {
        assert_eq!(*read(&cache, n, large).await, *content(n, large));
    }
    assert_eq!(cache.stats().healed, 0);
}

/// Every chunk that is looked up, fetched, held or cloned has the right bytes, all of them, while eight threads push
/// each other's chunks out.
#[test]
fn eight_threads_of_random_reads_and_evictions_see_only_right_bytes() {
    let seed = seed("eight_threads_of_random_reads_and_evictions_see_only_right_bytes");
    let dir = tempfile::tempdir().unwrap();
    let cache = open(dir.path(), 16);
    // Twice what fits, in two sizes.
    let sizes = [small(), ChunkSize::from_log2(17).unwrap()];
    let numbers = 160;
    let expected: Vec<_> = sizes
        .iter()
        .map(|size| (0..numbers).map(|n| (id(n, *size), content(n, *size))).collect::<Vec<_>>())
        .collect();
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).build().unwrap();
    let until = Instant::now() + Duration::from_secs(4);
    std::thread::scope(|scope| {
        for thread in 0..8 {
            let (cache, expected, runtime) = (&cache, &expected, &runtime);
            scope.spawn(move || {
                let mut random = Random(seed ^ thread);
                let mut held: Vec<(usize, usize, ChunkRef)> = Vec::new();
                while Instant::now() < until {
                    let (kind, n) = (random.below(2) as usize, random.below(numbers) as usize);
                    let (wanted, right) = &expected[kind][n];
                    let found = cache
                        .lookup(wanted)
                        .unwrap_or_else(|| runtime.block_on(read(cache, n as u64, sizes[kind])));
                    assert!(*found == **right, "chunk {n} of {} bytes is wrong", right.len());
                    held.push((kind, n, if random.below(2) == 0 { found.clone() } else { found }));
                    if held.len() > 6 {
                        let (kind, n, old) = held.swap_remove(random.below(7) as usize);
                        assert!(*old == *expected[kind][n].1, "held chunk {n} changed");
                    }
                }
                for (kind, n, old) in held {
                    assert!(*old == *expected[kind][n].1, "held chunk {n} changed");
                }
            });
        }
    });
    let stats = cache.stats();
    println!("{stats:?}");
    assert!(stats.hits > 0 && stats.evicted > 0, "{stats:?}");
    assert!(stats.allocated <= ByteLen(16 << 20));
    assert_eq!(stats.healed, 0);
}

#[tokio::test]
async fn what_is_freed_gives_its_space_back_and_what_is_kept_or_read_stays() {
    let dir = tempfile::tempdir().unwrap();
    let cache = open(dir.path(), 64);
    insert_all(&cache, 0..300, small()).await;
    let before = on_disk(dir.path());
    cache.keep([id(7, small())]);
    let held = read(&cache, 9, small()).await;
    assert_eq!(cache.chunks().len(), 300);
    // Of the chunks that go: one is kept, one is being read, one was never here.
    let freed = cache.free((0..200).chain([5000]).map(|n| id(n, small())).collect()).await;
    assert_eq!(freed.chunks, 198);
    let chunks = cache.chunks();
    assert_eq!(chunks.len(), 102);
    assert!((200..300).chain([7, 9]).all(|n| chunks.contains(&id(n, small()))));
    assert!(on_disk(dir.path()) <= before - (190 << 16), "{before}, then {}", on_disk(dir.path()));
    assert_eq!(*held, *content(9, small()));
    assert_eq!(cache.stats().used.0, 102 << 16);

    // The slots are used again, and a start finds what is there and nothing else.
    insert_all(&cache, 1000..1150, small()).await;
    assert_eq!(cache.free((200..220).map(|n| id(n, small())).collect()).await.chunks, 20);
    drop((held, cache));
    let cache = open(dir.path(), 64);
    assert_eq!(cache.chunks().len(), 82 + 150);
    for n in (220..300).chain(1000..1150).chain([7, 9]) {
        assert!(cache.contains(&id(n, small())), "{n}");
        assert_eq!(*read(&cache, n, small()).await, *content(n, small()));
    }
    assert_eq!(cache.stats().healed, 0);
    let all = cache.chunks();
    assert_eq!(cache.free(all).await.chunks, 232);
    assert_eq!((on_disk(dir.path()), cache.stats().used.0, cache.stats().allocated.0), (0, 0, 0));
    assert_eq!(*read(&cache, 3, small()).await, *content(3, small()));
}

/// Chunks are freed, fetched and read at once: no read sees anything but its chunk.
#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn reads_beside_freeing_see_their_chunks_and_nothing_else() {
    let dir = tempfile::tempdir().unwrap();
    let cache = open(dir.path(), 32);
    let mut readers = Vec::new();
    for reader in 0..4 {
        let cache = cache.clone();
        readers.push(tokio::spawn(async move {
            let mut random = Random(seed("reads_beside_freeing") + reader);
            for _ in 0..1500 {
                let n = random.below(200);
                assert_eq!(*read(&cache, n, small()).await, *content(n, small()), "{n}");
            }
        }));
    }
    while readers.iter().any(|reader| !reader.is_finished()) {
        let chunks = cache.chunks();
        cache.free(chunks).await;
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
    for reader in readers {
        reader.await.unwrap();
    }
}
