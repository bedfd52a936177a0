//! A cache that was damaged, cut or scribbled on serves nothing wrong, and mends itself.

#![allow(clippy::unwrap_used)]

mod cache_common;

use std::fs::{self, OpenOptions};
use std::os::unix::fs::FileExt;
use std::path::Path;

use cache_common::{Random, chunk, content, first_slab, id, open, read, seed, small};
use horcrux::cache::{Cache, CacheError, CacheOptions, Claim, MAX_BLOB, Settled};
use horcrux::format::ChunkId;
use horcrux::units::ByteLen;

/// Finds `needle` in the file and changes a bit of its byte `at`.
fn flip(path: &Path, needle: &[u8], at: usize) {
    let bytes = fs::read(path).unwrap();
    let found = bytes.windows(needle.len()).position(|window| window == needle).expect("it is in the file");
    let file = OpenOptions::new().write(true).open(path).unwrap();
    file.write_all_at(&[needle[at] ^ 0x10], (found + at) as u64).unwrap();
}

async fn fill(dir: &Path, chunks: u64) {
    let cache = open(dir, 64);
    for n in 0..chunks {
        cache.insert(chunk(n, small()));
    }
    cache.written().await;
}

#[tokio::test]
async fn chunks_are_found_again_after_a_restart_and_verified_once() {
    let dir = tempfile::tempdir().unwrap();
    fill(dir.path(), 20).await;
    let cache = open(dir.path(), 64);
    for n in 0..20 {
        let wanted = id(n, small());
        assert!(cache.contains(&wanted));
        assert!(cache.lookup(&wanted).is_none(), "not verified yet");
        for _ in 0..3 {
            let found = cache
                .get_or_fetch(wanted, small(), || async {
                    Err(std::io::Error::other("nothing to fetch from"))
                })
                .await
                .unwrap();
            assert_eq!(*found, *content(n, small()));
            assert!(!found.is_heap());
        }
        assert!(cache.lookup(&wanted).is_some());
    }
    let stats = cache.stats();
    assert_eq!((stats.verified, stats.healed, stats.misses), (20, 0, 0));
    assert_eq!(stats.used, ByteLen(20 << 16));
}

#[tokio::test]
async fn a_flipped_bit_is_found_at_first_use_healed_and_counted() {
    let dir = tempfile::tempdir().unwrap();
    fill(dir.path(), 5).await;
    flip(&first_slab(dir.path()), &content(3, small()), 40_000);
    {
        let cache = open(dir.path(), 64);
        for n in 0..5 {
            assert_eq!(*read(&cache, n, small()).await, *content(n, small()));
        }
        let stats = cache.stats();
        assert_eq!((stats.healed, stats.misses, stats.verified), (1, 1, 4));
        cache.written().await;
    }
    let cache = open(dir.path(), 64);
    for n in 0..5 {
        assert_eq!(*read(&cache, n, small()).await, *content(n, small()));
    }
    assert_eq!((cache.stats().healed, cache.stats().misses), (0, 0), "healed for good");
}

#[tokio::test]
async fn a_hundred_readers_of_a_damaged_chunk_heal_it_once() {
    let dir = tempfile::tempdir().unwrap();
    fill(dir.path(), 1).await;
    flip(&first_slab(dir.path()), &content(0, small()), 1);
    let cache = open(dir.path(), 64);
    let readers: Vec<_> = (0..100)
        .map(|_| {
            let cache = cache.clone();
            tokio::spawn(async move { read(&cache, 0, small()).await })
        })
        .collect();
    for reader in readers {
        assert_eq!(*reader.await.unwrap(), *content(0, small()));
    }
    assert_eq!((cache.stats().healed, cache.stats().misses), (1, 1));
}

#[tokio::test]
async fn damage_that_comes_while_the_pages_are_out_of_memory_is_found_on_reload() {
    let dir = tempfile::tempdir().unwrap();
    let cache = open(dir.path(), 64);
    cache.insert(chunk(0, small()));
    cache.written().await;
    let found = cache.lookup(&id(0, small())).unwrap();
    assert!(!found.is_heap() && found.is_resident(0..4096), "just written");

    // Undamaged: it is verified again and served.
    let Settled::Ready(found) = cache.reload(found).await.unwrap() else { panic!("nothing was damaged") };
    assert_eq!(cache.stats().verified, 1);

    flip(&first_slab(dir.path()), &content(0, small()), 9);
    let Settled::Missing(flight) = cache.reload(found).await.unwrap() else {
        panic!("the damage was missed")
    };
    assert_eq!(cache.stats().healed, 1);
    assert_eq!(*flight.fulfil(chunk(0, small())).unwrap(), *content(0, small()));
    cache.written().await;
    assert_eq!(*cache.lookup(&id(0, small())).unwrap(), *content(0, small()));
}

#[tokio::test]
async fn pages_dropped_from_memory_are_told_as_not_resident() {
    const TMPFS_MAGIC: u64 = 0x0102_1994;
    let dir = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    if rustix::fs::statfs(dir.path()).unwrap().f_type as u64 == TMPFS_MAGIC {
        eprintln!("SKIPPED: the build directory is a tmpfs, which has no disk to drop its pages to");
        return;
    }
    let cache = open(dir.path(), 64);
    cache.insert(chunk(0, small()));
    cache.written().await;
    let slab = OpenOptions::new().read(true).write(true).open(first_slab(dir.path())).unwrap();
    slab.sync_all().unwrap();
    rustix::fs::fadvise(&slab, 0, None, rustix::fs::Advice::DontNeed).unwrap();
    let found = cache.lookup(&id(0, small())).unwrap();
    assert!(!found.is_resident(0..65_536), "dropped");
    let Settled::Ready(found) = cache.reload(found).await.unwrap() else { panic!("nothing was damaged") };
    assert!(found.is_resident(0..65_536), "read back");
    assert_eq!(*found, *content(0, small()));
}

#[tokio::test]
async fn a_reader_keeps_what_it_holds_while_the_entry_is_thrown_away() {
    let dir = tempfile::tempdir().unwrap();
    fill(dir.path(), 1).await;
    let cache = open(dir.path(), 64);
    let held = read(&cache, 0, small()).await;
    let bytes = held.clone().into_bytes().slice(100..200);
    let part = held.slice(4096..8192);
    drop(cache);
    assert_eq!(*part, content(0, small())[4096..8192]);
    assert_eq!(bytes, content(0, small())[100..200]);
    // Its slot can't be written by another server meanwhile.
    assert!(matches!(
        Cache::open(dir.path(), CacheOptions::new(ByteLen(64 << 20))),
        Err(CacheError::InUse { .. })
    ));
    drop((part, bytes));
    open(dir.path(), 64);
}

#[tokio::test]
async fn garbage_truncated_swapped_and_foreign_slabs_serve_nothing_wrong() {
    let seed = seed("garbage_truncated_swapped_and_foreign_slabs_serve_nothing_wrong");
    let mut random = Random(seed);
    for round in 0..60 {
        let dir = tempfile::tempdir().unwrap();
        fill(dir.path(), 30).await;
        let slab = first_slab(dir.path());
        let file = OpenOptions::new().read(true).write(true).open(&slab).unwrap();
        let length = file.metadata().unwrap().len();
        match round % 6 {
            // Anywhere in the header and records.
            0 => {
                for _ in 0..random.below(200) {
                    file.write_all_at(&[random.next() as u8], random.below(4096 + 64 * 30)).unwrap();
                }
            }
            1 => file.set_len(random.below(length)).unwrap(),
            2 => file.set_len(length + 1 + random.below(1 << 20)).unwrap(),
            // Two records change places: each names a chunk that is in the other's slot.
            3 => {
                let (mut a, mut b) = ([0; 64], [0; 64]);
                file.read_exact_at(&mut a, 4096).unwrap();
                file.read_exact_at(&mut b, 4096 + 64).unwrap();
                file.write_all_at(&b, 4096).unwrap();
                file.write_all_at(&a, 4096 + 64).unwrap();
            }
            // All bytes of the slots zero, as after a power cut.
            4 => {
                file.set_len(65_536).unwrap();
                file.set_len(length).unwrap();
            }
            // Every record names one chunk.
            _ => {
                let mut record = [0; 64];
                file.read_exact_at(&mut record, 4096 + 64 * random.below(30)).unwrap();
                for slot in 0..64 {
                    file.write_all_at(&record, 4096 + 64 * slot).unwrap();
                }
            }
        }
        fs::write(dir.path().join("slabs/.tmp-00000007"), b"left by a crash").unwrap();
        fs::write(dir.path().join("slabs/99999999.slab"), b"no number of ours").unwrap();
        let cache = open(dir.path(), 64);
        assert!(!dir.path().join("slabs/.tmp-00000007").exists());
        for n in 0..30 {
            assert_eq!(*read(&cache, n, small()).await, *content(n, small()), "round {round}");
        }
        cache.written().await;
        for n in 0..30 {
            assert_eq!(*read(&cache, n, small()).await, *content(n, small()), "round {round}");
        }
    }
}

#[tokio::test]
async fn a_second_server_is_refused_by_the_name_of_the_directory() {
    let dir = tempfile::tempdir().unwrap();
    let cache = open(dir.path(), 64);
    let error = Cache::open(dir.path(), CacheOptions::new(ByteLen(64 << 20))).unwrap_err();
    let text = error.to_string();
    assert!(text.contains(dir.path().to_str().unwrap()), "{text}");
    assert!(text.contains(&std::process::id().to_string()), "{text}");
    drop(cache);
    open(dir.path(), 64);
}

#[test]
fn a_limit_too_small_to_work_with_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let error = Cache::open(dir.path(), CacheOptions::new(ByteLen(1 << 20))).unwrap_err();
    assert_eq!(error.to_string(), "a cache of 1048576 bytes is too small, it needs at least 16777216");
}

#[test]
fn chunks_are_verified_without_a_runtime_too() {
    let dir = tempfile::tempdir().unwrap();
    let cache = open(dir.path(), 64);
    cache.insert(chunk(0, small()));
    drop(cache);
    let cache = open(dir.path(), 64);
    assert!(matches!(cache.claim_one(&id(0, small())), Claim::Pending(_)));
    assert!(cache.lookup(&id(0, small())).is_some());
}

#[test]
fn a_damaged_blob_is_thrown_away_and_can_be_put_again() {
    let dir = tempfile::tempdir().unwrap();
    let cache = open(dir.path(), 64);
    let node = b"a node of a block map".to_vec();
    let hash = *ChunkId::of(&node).as_bytes();
    assert_eq!(cache.blob(&hash), None);
    cache.put_blob(&hash, &node);
    assert_eq!(cache.blob(&hash).unwrap(), node);

    let name = horcrux::format::ids::to_hex(&hash);
    let path = dir.path().join("meta").join(&name[..2]).join(&name);
    for damaged in [&b""[..], b"a node of a block maq", &vec![0; MAX_BLOB + 2]] {
        fs::write(&path, damaged).unwrap();
        assert_eq!(cache.blob(&hash), None);
        assert!(!path.exists());
        cache.put_blob(&hash, &node);
        assert_eq!(cache.blob(&hash).unwrap(), node);
    }
    assert_eq!(cache.stats().healed, 3);
    drop(cache);
    let cache = open(dir.path(), 64);
    assert_eq!(cache.blob(&hash).unwrap(), node, "kept over a restart");
    assert_eq!(cache.stats().blobs, ByteLen(node.len() as u64));
}

#[test]
fn blobs_stay_within_their_share_the_least_recently_used_going_first() {
    let dir = tempfile::tempdir().unwrap();
    let cache = open(dir.path(), 64);
    let share = (64 << 20) / 32;
    let blob = |n: u64| {
        let content = content(n, small());
        (*ChunkId::of(&content).as_bytes(), content)
    };
    for n in 0..100 {
        let (hash, content) = blob(n);
        cache.put_blob(&hash, &content);
        let name = horcrux::format::ids::to_hex(&hash);
        let path = dir.path().join("meta").join(&name[..2]).join(&name);
        // Used n seconds after the first, whatever the file system's resolution.
        let at = std::time::SystemTime::UNIX_EPOCH + std::time::Duration::from_secs(1_000_000_000 + n);
        fs::File::options().write(true).open(path).unwrap().set_modified(at).unwrap();
        assert!(cache.stats().blobs.0 <= share);
    }
    assert_eq!(cache.blob(&blob(0).0), None);
    assert_eq!(cache.blob(&blob(99).0).unwrap(), blob(99).1);
}
