//! What was written is what is read; what is known is not stored again.
#![allow(clippy::unwrap_used, reason = "a test that can't go on fails")]

mod common;

use std::sync::Arc;

use common::*;
use horcrux::format::{ChunkSize, MapRoot};
use horcrux::repo::{ImageWriter, RepoError, WriterParams};
use horcrux::store::counting::Method;
use horcrux::store::{CountingStore, DirStore, MemStore, Store};
use horcrux::units::{BlockIndex, ByteLen};
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};

#[test]
fn random_images_and_their_next_versions_read_back_the_same() {
    let seed = seed(1);
    let runtime = runtime();
    let dir = tempfile::tempdir().unwrap();
    let stores: [Arc<dyn Store>; 2] = [Arc::new(MemStore::new()), Arc::new(DirStore::new(dir.path()))];
    for store in stores {
        let repo = create(&runtime, store);
        for round in 0..4u64 {
            let name = image(&format!("i{round}"));
            let mut rng = StdRng::seed_from_u64(seed + round);
            let len = rng.random_range(1..3000) * 4096;
            let mut bytes = random_image(seed + round, len);
            let mut history = Vec::new();
            for _ in 0..4 {
                let mut params = small_params(bytes.len());
                params.chunk_size = ChunkSize::from_log2(rng.random_range(16..18)).unwrap();
                params.threads = rng.random_range(1..4);
                let finished = write(&runtime, &repo, &name, &bytes, params).unwrap();
                if !finished.unchanged {
                    history.push(bytes.clone());
                }
                // Some of it changes, some becomes zeros, and the device grows or shrinks.
                for _ in 0..rng.random_range(0..6) {
                    let at = rng.random_range(0..bytes.len());
                    let run = rng.random_range(1..200_000).min(bytes.len() - at);
                    let new = if rng.random() { vec![0; run] } else { noise(&mut rng, run) };
                    bytes[at..at + run].copy_from_slice(&new);
                }
                let pages = (bytes.len() / 4096)
                    .saturating_add_signed(rng.random_range(-300i32..600) as isize)
                    .max(1);
                bytes.resize(pages * 4096, 0);
            }
            runtime.block_on(async {
                for (back, expected) in history.iter().rev().enumerate() {
                    let version = open(&repo, &name, &format!("main~{back}")).await.unwrap();
                    assert!(read_all(&version).await.unwrap() == *expected, "round {round}, {back} back");
                }
            });
        }
    }
}

#[test]
fn the_same_image_again_stores_nothing_and_makes_no_commit() {
    let runtime = runtime();
    let memory = MemStore::new();
    let repo = create(&runtime, Arc::new(memory.clone()));
    let bytes = random_image(3, 9 << 20);
    let first = write(&runtime, &repo, &image("a"), &bytes, small_params(bytes.len())).unwrap();
    let before = memory.dump();
    let second = write(&runtime, &repo, &image("a"), &bytes, small_params(bytes.len())).unwrap();
    assert!(second.unchanged && !first.unchanged);
    assert_eq!(
        (second.commit, second.stats.new_bytes, second.stats.objects, second.stats.nodes),
        (first.commit, 0, 0, 0)
    );
    assert_eq!(memory.dump(), before);
}

#[test]
fn the_same_image_gives_the_same_objects_whatever_the_threads() {
    let runtime = runtime();
    let bytes = random_image(5, 9 << 20);
    let dumps = [1, 2, 7].map(|threads| {
        let memory = MemStore::new();
        let repo = create(&runtime, Arc::new(memory.clone()));
        let params = WriterParams { threads, ..small_params(bytes.len()) };
        write(&runtime, &repo, &image("a"), &bytes, params).unwrap();
        memory.dump()
    });
    assert!(dumps[0] == dumps[1] && dumps[1] == dumps[2]);
}

#[test]
fn data_that_moved_by_whole_chunks_is_stored_once() {
    let runtime = runtime();
    let repo = create(&runtime, Arc::new(MemStore::new()));
    let mut rng = StdRng::seed_from_u64(9);
    let data = noise(&mut rng, 6 << 20);
    write(&runtime, &repo, &image("a"), &data, small_params(data.len())).unwrap();
    for shift in [3, 20, 64] {
        let mut moved = noise(&mut rng, shift * 65_536);
        moved.extend_from_slice(&data);
        let finished = write(&runtime, &repo, &image("a"), &moved, small_params(moved.len())).unwrap();
        assert_eq!(finished.stats.new_bytes, shift as u64 * 65_536, "shifted by {shift}");
        let version = runtime.block_on(open(&repo, &image("a"), "main")).unwrap();
        assert!(runtime.block_on(read_all(&version)).unwrap() == moved);
    }
    let back = write(&runtime, &repo, &image("a"), &data, small_params(data.len())).unwrap();
    assert_eq!(back.stats.new_bytes, 0, "what moved back to the front is known too");
}

#[test]
fn what_comes_back_after_versions_without_it_is_stored_once() {
    let runtime = runtime();
    let repo = create(&runtime, Arc::new(MemStore::new()));
    let mut rng = StdRng::seed_from_u64(10);
    let mut bytes = noise(&mut rng, 3 << 20);
    let kept = bytes[65_536..3 * 65_536].to_vec();
    let store = |bytes: &[u8]| {
        write(&runtime, &repo, &image("a"), bytes, small_params(bytes.len())).unwrap().stats.new_bytes
    };
    store(&bytes);
    for _ in 0..5 {
        bytes[65_536..3 * 65_536].copy_from_slice(&noise(&mut rng, 2 * 65_536));
        assert_eq!(store(&bytes), 2 * 65_536);
    }
    // Elsewhere than it was, so that no table of then can be named again.
    bytes[20 * 65_536..22 * 65_536].copy_from_slice(&kept);
    assert_eq!(store(&bytes), 0, "of six versions before");
    let version = runtime.block_on(open(&repo, &image("a"), "main")).unwrap();
    assert!(runtime.block_on(read_all(&version)).unwrap() == bytes);
}

#[test]
fn one_changed_chunk_stores_one_chunk_and_one_node_per_level() {
    let runtime = runtime();
    let repo = create(&runtime, Arc::new(MemStore::new()));
    let mut rng = StdRng::seed_from_u64(11);
    // 300 blocks: two levels.
    let mut bytes = vec![0; 300 << 20];
    for block in 0..300 {
        bytes[block << 20..][..5000].copy_from_slice(&noise(&mut rng, 5000));
    }
    let first = write(&runtime, &repo, &image("a"), &bytes, small_params(bytes.len())).unwrap();
    assert_eq!(first.stats.nodes, 3);
    bytes[(299 << 20) + 70_000] = 1;
    let second = write(&runtime, &repo, &image("a"), &bytes, small_params(bytes.len())).unwrap();
    assert_eq!((second.stats.nodes, second.stats.objects, second.stats.new_bytes), (2, 1, 65_536));
    bytes[7 << 20..8 << 20].fill(0);
    let third = write(&runtime, &repo, &image("a"), &bytes, small_params(bytes.len())).unwrap();
    assert_eq!((third.stats.nodes, third.stats.objects), (2, 0));
    let version = runtime.block_on(open(&repo, &image("a"), "main")).unwrap();
    assert!(runtime.block_on(read_all(&version)).unwrap() == bytes);
}

#[test]
fn an_image_of_holes_has_no_map_and_costs_nothing() {
    let runtime = runtime();
    let counting = CountingStore::new(Arc::new(MemStore::new()));
    let repo = create(&runtime, Arc::new(counting.clone()));
    counting.reset();
    let params = WriterParams::new(ByteLen(16 << 40));
    let mut writer = ImageWriter::new(runtime.handle(), &repo, &image("a"), params.clone()).unwrap();
    writer.hole(ByteLen(1 << 40)).unwrap();
    writer.data(&[0; 300_000]).unwrap();
    writer.finish(meta()).unwrap();
    assert_eq!(counting.count(Method::PutNew).requests, 2, "a hold and a commit, and nothing else");
    runtime.block_on(async {
        let version = open(&repo, &image("a"), "main").await.unwrap();
        assert_eq!(version.commit().map, MapRoot::Zero);
        assert_eq!(version.table_if_loaded(BlockIndex(12345)), Some(None));
        assert_eq!(version.next_block(BlockIndex(0), BlockIndex(u64::MAX)).await.unwrap(), None);
    });
}

#[test]
fn more_bytes_than_the_device_holds_are_refused() {
    let runtime = runtime();
    let repo = create(&runtime, Arc::new(MemStore::new()));
    let mut writer = ImageWriter::new(runtime.handle(), &repo, &image("a"), small_params(8192)).unwrap();
    writer.data(&[1; 8000]).unwrap();
    assert!(matches!(writer.data(&[1; 193]).unwrap_err(), RepoError::TooMuchData { .. }));
    assert!(matches!(writer.hole(ByteLen(u64::MAX)).unwrap_err(), RepoError::TooMuchData { .. }));
    writer.data(&[1; 192]).unwrap();
    writer.finish(meta()).unwrap();
    assert!(ImageWriter::new(runtime.handle(), &repo, &image("b"), small_params(8193)).is_err());
}

#[test]
fn joined_reads_answer_in_the_order_asked() {
    let runtime = runtime();
    let counting = CountingStore::new(Arc::new(MemStore::new()));
    let repo = create(&runtime, Arc::new(counting.clone()));
    let bytes = noise(&mut StdRng::seed_from_u64(1), 1 << 20);
    write(&runtime, &repo, &image("a"), &bytes, small_params(bytes.len())).unwrap();
    runtime.block_on(async {
        let version = open(&repo, &image("a"), "main").await.unwrap();
        let table = version.table(BlockIndex(0)).await.unwrap().unwrap();
        assert_eq!(version.table_if_loaded(BlockIndex(0)), Some(Some(table.clone())));
        let order = [9, 3, 3, 15, 0, 4];
        let locations: Vec<_> = order.iter().map(|&at| table.location(table.entry(at).unwrap())).collect();
        counting.reset();
        for (chunk, at) in version.fetch(&locations).await.into_iter().zip(order) {
            let at = at as usize * 65_536;
            assert_eq!(chunk.unwrap().content(), &bytes[at..at + 65_536]);
        }
        // 0, 3 to 4, 9 and 15: the gaps between are over the bound.
        assert_eq!(counting.count(Method::GetRange).requests, 4);
        assert_eq!(counting.bytes_read(), 5 * 65_536);
    });
}

#[test]
fn many_who_ask_for_one_table_fetch_it_once() {
    let runtime = runtime();
    let counting = CountingStore::new(Arc::new(MemStore::new()));
    let repo = create(&runtime, Arc::new(counting.clone()));
    let bytes = noise(&mut StdRng::seed_from_u64(1), 1 << 20);
    write(&runtime, &repo, &image("a"), &bytes, small_params(bytes.len())).unwrap();
    runtime.block_on(async {
        let version = open(&repo, &image("a"), "main").await.unwrap();
        counting.reset();
        let asks = (0..50).map(|_| {
            let version = version.clone();
            tokio::spawn(async move { version.table(BlockIndex(0)).await.unwrap().unwrap() })
        });
        for ask in asks.collect::<Vec<_>>() {
            ask.await.unwrap();
        }
        assert_eq!(counting.requests(), 2, "one node and one table");
    });
}
