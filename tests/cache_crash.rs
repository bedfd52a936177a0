//! kill -9 in mid-insert: what was cached is found again, nothing half written is served.

#![allow(clippy::unwrap_used)]

mod cache_common;

use std::process::{Command, Stdio};
use std::time::Duration;

use cache_common::{Random, content, id, open, read, seed, small};

const CHILD: &str = "HORCRUX_CACHE_CRASH_CHILD";
const CHUNKS: u64 = 2000;

/// Not a test of its own: the process that is killed. Without its variable it does nothing.
#[test]
fn child_that_inserts_until_it_is_killed() {
    let Ok(dir) = std::env::var(CHILD) else { return };
    let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
    let cache = open(dir.as_ref(), 32);
    runtime.block_on(async {
        for n in (0..CHUNKS).cycle() {
            cache.room().await;
            drop(read(&cache, n, small()).await);
        }
    });
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_cache_killed_in_mid_insert_finds_its_chunks_again_and_none_is_damaged() {
    let seed = seed("a_cache_killed_in_mid_insert_finds_its_chunks_again_and_none_is_damaged");
    let mut random = Random(seed);
    let dir = tempfile::tempdir().unwrap();
    let mut found_again = 0;
    for round in 0..12 {
        let mut child = Command::new(std::env::current_exe().unwrap())
            .args(["--exact", "child_that_inserts_until_it_is_killed", "--nocapture"])
            .env(CHILD, dir.path())
            .stdout(Stdio::null())
            .spawn()
            .unwrap();
        tokio::time::sleep(Duration::from_millis(100 + random.below(400))).await;
        assert!(child.try_wait().unwrap().is_none(), "round {round}: the child ended by itself");
        child.kill().unwrap();
        child.wait().unwrap();

        let cache = open(dir.path(), 32);
        let here: Vec<u64> = (0..CHUNKS).filter(|n| cache.contains(&id(*n, small()))).collect();
        for n in &here {
            assert_eq!(*read(&cache, *n, small()).await, *content(*n, small()), "round {round}");
        }
        // The page cache survives the process, and each slot's record is written after its bytes: not one may be damaged.
        let stats = cache.stats();
        assert_eq!((stats.healed, stats.misses), (0, 0), "round {round}");
        assert_eq!(stats.verified, here.len() as u64);
        found_again += here.len();
    }
    println!("{found_again} chunks found again in 12 rounds");
    assert!(found_again > 1000, "only {found_again} chunks were found again");
}
