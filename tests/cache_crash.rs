//! kill -9 in mid-insert: what was cached is found again, nothing half written is served.

#![allow(clippy::unwrap_used)]

mod cache_common;

use std::collections::BTreeMap;
use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

use cache_common::{Random, chunk, content, id, open, read, room, seed};
use horcrux::format::ChunkSize;

const CHILD: &str = "HORCRUX_CACHE_CRASH_CHILD";
const CHILD_CHUNK_LOG2: &str = "HORCRUX_CACHE_CRASH_CHUNK_LOG2";

/// Chunks of 2^`log2` bytes for three times the cache's limit of 16 MiB, so that it evicts all the time.
fn chunks(log2: u8) -> u64 {
    (48 << 20) >> log2
}

/// Not a test of its own: the process that is killed. Without its variables it does nothing.
#[test]
fn child_that_inserts_until_it_is_killed() {
    let (Ok(dir), Ok(log2)) = (std::env::var(CHILD), std::env::var(CHILD_CHUNK_LOG2)) else { return };
    let log2 = log2.parse().unwrap();
    let size = ChunkSize::from_log2(log2).unwrap();
    // Made before, so that the writer is busy all the time and the kill is likely to hit it in mid-write.
    let chunks: Vec<_> = (0..chunks(log2)).map(|n| chunk(n, size)).collect();
    let runtime = tokio::runtime::Builder::new_current_thread().enable_time().build().unwrap();
    let cache = open(dir.as_ref(), 16);
    println!("ready");
    runtime.block_on(async {
        for chunk in chunks.iter().cycle() {
            room(&cache, size).await;
            cache.insert(chunk.clone());
        }
    });
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_cache_killed_in_mid_insert_finds_its_chunks_again_and_none_is_damaged() {
    let seed = seed("a_cache_killed_in_mid_insert_finds_its_chunks_again_and_none_is_damaged");
    let mut random = Random(seed);
    let dir = tempfile::tempdir().unwrap();
    let mut found_again = 0;
    for round in 0..16 {
        // Small ones for many steps between writes, large ones for long writes.
        let log2 = if round % 2 == 0 { 20 } else { 16 };
        let size = ChunkSize::from_log2(log2).unwrap();
        let mut child = Command::new(std::env::current_exe().unwrap())
            .args(["--exact", "child_that_inserts_until_it_is_killed", "--nocapture"])
            .env(CHILD, dir.path())
            .env(CHILD_CHUNK_LOG2, log2.to_string())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let mut lines = BufReader::new(child.stdout.take().unwrap()).lines();
        assert!(lines.any(|line| line.unwrap() == "ready"), "round {round}: the child ended by itself");
        tokio::time::sleep(Duration::from_micros(random.below(150_000))).await;
        assert!(child.try_wait().unwrap().is_none(), "round {round}: the child ended by itself");
        child.kill().unwrap();
        child.wait().unwrap();

        let cache = open(dir.path(), 16);
        let here: Vec<u64> = (0..chunks(log2)).filter(|n| cache.contains(&id(*n, size))).collect();
        for n in &here {
            assert_eq!(*read(&cache, *n, size).await, *content(*n, size), "round {round}");
        }
        // The page cache survives the process, and each slot's record is written after its bytes: not one may be
        // damaged.
        let stats = cache.stats();
        assert_eq!((stats.healed, stats.misses), (0, 0), "round {round}");
        assert_eq!(stats.verified, here.len() as u64);
        found_again += here.len() << log2;
    }
    println!("{} MiB found again in 16 rounds", found_again >> 20);
    assert!(found_again > 32 << 20, "only {found_again} bytes were found again");
}

/// The files of the cache's slabs, by name.
fn slabs(dir: &Path) -> BTreeMap<PathBuf, Vec<u8>> {
    let slabs = std::fs::read_dir(dir.join("slabs")).unwrap();
    slabs
        .map(|entry| entry.unwrap().path())
        .map(|path| (path.clone(), std::fs::read(path).unwrap()))
        .collect()
}

/// Nothing is synced, so a power cut may leave any mixture of sectors from before and after the last writes. Every
/// mixture is served right.
#[tokio::test]
async fn any_mixture_of_old_and_new_sectors_after_a_power_cut_serves_nothing_wrong() {
    const SECTOR: usize = 512;
    let seed = seed("any_mixture_of_old_and_new_sectors_after_a_power_cut_serves_nothing_wrong");
    let mut random = Random(seed);
    let size = ChunkSize::from_log2(16).unwrap();
    let dir = tempfile::tempdir().unwrap();
    let (mut healed, mut survived) = (0, 0);
    for round in 0..30 {
        let numbers = |generation: u64| (round * 2 + generation) * 100..(round * 2 + generation) * 100 + 150;
        for generation in 0..2 {
            let cache = open(dir.path(), 16);
            for n in numbers(generation) {
                room(&cache, size).await;
                cache.insert(chunk(n, size));
            }
            cache.written().await;
            drop(cache);
            if generation == 1 {
                break;
            }
            std::fs::create_dir_all(dir.path().join("before")).unwrap();
            for (path, bytes) in slabs(dir.path()) {
                std::fs::write(dir.path().join("before").join(path.file_name().unwrap()), bytes).unwrap();
            }
        }
        // One sector in `old_of` stayed old: few, half or nearly all of them. A run stays old or new together, as
        // writeback leaves them.
        let old_of = [2, 3, 50, 1000][random.below(4) as usize];
        let longest_run = [1, 16, 400][random.below(3) as usize];
        for (path, after) in slabs(dir.path()) {
            let before = dir.path().join("before").join(path.file_name().unwrap());
            let before = std::fs::read(before).unwrap_or_else(|_| vec![0; after.len()]);
            let mut mixed = after;
            let mut at = 0;
            while at < mixed.len() {
                let end = (at + SECTOR * (1 + random.below(longest_run) as usize)).min(mixed.len());
                if random.below(old_of) == 0 {
                    mixed[at..end].copy_from_slice(&before[at..end]);
                }
                at = end;
            }
            std::fs::write(path, mixed).unwrap();
        }
        let cache = open(dir.path(), 16);
        // What is here first: the cache holds fewer than all, and what is fetched would take their places unread.
        let all = numbers(0).start..numbers(1).end;
        let (here, gone): (Vec<u64>, Vec<u64>) = all.partition(|n| cache.contains(&id(*n, size)));
        for n in here.into_iter().chain(gone) {
            assert_eq!(*read(&cache, n, size).await, *content(n, size), "round {round}");
        }
        healed += cache.stats().healed;
        survived += cache.stats().verified;
    }
    println!("{healed} damaged entries thrown away, {survived} chunks survived");
    assert!(healed > 0 && survived > 0, "{healed} healed, {survived} survived: the test tests nothing");
}
