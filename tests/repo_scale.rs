//! Large devices cost little: to open, to read a little of, to change a little of.
#![allow(clippy::unwrap_used, reason = "a test that can't go on fails")]

mod common;

use std::collections::BTreeMap;
use std::sync::Arc;

use common::*;
use horcrux::format::map_node::{TableRef, root_level};
use horcrux::format::{BlockSize, ChunkId, ChunkSize, Codec, Commit, CommitId, MapRoot, ObjectId, TableId};
use horcrux::repo::{
    BlockWriter, BranchName, ImageName, MapBase, MapBuilder, MetaCache, NoMetaCache, RepoError, Repository,
    Version, VersionOptions,
};
use horcrux::store::counting::Method;
use horcrux::store::{CountingStore, MemStore};
use horcrux::units::{BlockIndex, ByteLen, ByteOffset};
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};

fn no_cache() -> Arc<dyn MetaCache> {
    Arc::new(NoMetaCache)
}

fn commit_of(map: MapRoot, blocks: u64) -> Commit {
    let meta = meta();
    Commit {
        parents: vec![],
        map,
        size: ByteLen(blocks * BlockSize::DEFAULT.len().0),
        block_size: BlockSize::DEFAULT,
        chunk_size: ChunkSize::DEFAULT,
        filesystem: meta.filesystem,
        author: meta.author,
        time: meta.time,
        message: meta.message,
    }
}

/// A device of `blocks` blocks of 64 MiB, all the same block full of noise: a full map and full tables without the bytes of a full disk. One
/// block of each 256 is zeros, another one in each node, so that no two nodes are the same.
async fn full_device(repo: &Repository, name: &ImageName, blocks: u64) -> CommitId {
    let mut writer = BlockWriter::new(repo, name, BlockSize::DEFAULT, ChunkSize::DEFAULT);
    let mut rng = StdRng::seed_from_u64(1);
    for index in 0..512 {
        let chunk = noise(&mut rng, ChunkSize::DEFAULT.len());
        writer.store(index, ChunkId::of(&chunk), Codec::Raw, &chunk).await.unwrap();
    }
    let table = writer.seal().finish().await.unwrap();
    let mut map = MapBuilder::new(repo, name, &no_cache(), MapBase::ZERO, blocks).unwrap();
    for block in (0..blocks).filter(|block| block % 256 != block / 256) {
        map.set(BlockIndex(block), Some(table)).await.unwrap();
    }
    let (root, _) = map.finish().await.unwrap();
    let id = repo.put_commit(name, &commit_of(root, blocks)).await.unwrap();
    repo.update_branch(name, &BranchName::default(), None, id).await.unwrap();
    id
}

#[test]
fn a_full_tebibyte_opens_with_a_commit_and_reads_with_a_path() {
    let runtime = runtime();
    let counting = CountingStore::new(Arc::new(MemStore::new()));
    runtime.block_on(async {
        let repo = Repository::create(Arc::new(counting.clone()), [1; 16]).await.unwrap();
        full_device(&repo, &image("a"), 1 << 14).await;
        counting.reset();
        let repo = Repository::open(Arc::new(counting.clone())).await.unwrap();
        let version = open(&repo, &image("a"), "main").await.unwrap();
        assert!(counting.bytes_read() < 1000, "opening read {}", counting.bytes_read());
        // The whole map, as a scan of the allocation would read it.
        let mut from = BlockIndex(0);
        let mut found = 0;
        while let Some((block, _)) = version.next_block(from, BlockIndex(u64::MAX)).await.unwrap() {
            from = BlockIndex(block.0 + 1);
            found += 1;
        }
        assert_eq!(found, (1 << 14) - 64);
        assert!(counting.bytes_read() < 4 << 20, "the whole map read {}", counting.bytes_read());
        assert_eq!(
            counting.requests(),
            4 + 65,
            "format, ref, that no tag has its name, and commit; 64 leaves and the root"
        );
    });
}

#[test]
fn the_first_read_of_a_cold_10_gib_image_moves_under_1_mib() {
    let runtime = runtime();
    let counting = CountingStore::new(Arc::new(MemStore::new()));
    runtime.block_on(async {
        let repo = Repository::create(Arc::new(counting.clone()), [1; 16]).await.unwrap();
        full_device(&repo, &image("a"), 160).await;
        counting.reset();
        let repo = Repository::open(Arc::new(counting.clone())).await.unwrap();
        let version = open(&repo, &image("a"), "main").await.unwrap();
        let table = version.table(BlockIndex(77)).await.unwrap().unwrap();
        let location = table.location(table.entry(300).unwrap());
        let chunk = version.fetch(&[location]).await.remove(0).unwrap();
        assert_eq!(chunk.content().len(), ChunkSize::DEFAULT.len());
        assert!(counting.bytes_read() < 1 << 20, "{}", counting.bytes_read());
        assert!(counting.bytes_read() < 180_000, "node, table and chunk: {}", counting.bytes_read());
        assert_eq!(counting.requests(), 7);
    });
}

#[test]
fn one_changed_block_of_a_tebibyte_rewrites_one_node_per_level() {
    let runtime = runtime();
    let counting = CountingStore::new(Arc::new(MemStore::new()));
    runtime.block_on(async {
        let repo = Repository::create(Arc::new(counting.clone()), [1; 16]).await.unwrap();
        let id = full_device(&repo, &image("a"), 1 << 14).await;
        let base =
            MapBase { root: repo.commit(&image("a"), id, &no_cache()).await.unwrap().map, blocks: 1 << 14 };
        let levels = u64::from(root_level(1 << 14)) + 1;
        for (block, table) in [(1, Some(table_ref(1))), (9999, None), ((1 << 14) - 1, Some(table_ref(2)))] {
            let mut map = MapBuilder::new(&repo, &image("a"), &no_cache(), base, 1 << 14).unwrap();
            counting.reset();
            map.set(BlockIndex(block), table).await.unwrap();
            let (root, written) = map.finish().await.unwrap();
            assert_eq!(written, levels);
            assert_eq!(counting.count(Method::PutNew).requests, levels);
            assert!(counting.bytes_written() < 40_000, "{}", counting.bytes_written());
            assert_eq!(counting.count(Method::Get).requests, levels, "only the path is read");
            assert_ne!(root, base.root);
        }
        let map = MapBuilder::new(&repo, &image("a"), &no_cache(), base, 1 << 14).unwrap();
        assert_eq!(map.finish().await.unwrap(), (base.root, 0), "nothing set, nothing written");
    });
}

#[test]
fn sixteen_tebibytes_with_three_blocks_are_scanned_in_a_few_requests() {
    let runtime = runtime();
    let counting = CountingStore::new(Arc::new(MemStore::new()));
    runtime.block_on(async {
        let repo = Repository::create(Arc::new(counting.clone()), [1; 16]).await.unwrap();
        let blocks = 1 << 18;
        let set = [0, 100_000, blocks - 1];
        let mut map = MapBuilder::new(&repo, &image("a"), &no_cache(), MapBase::ZERO, blocks).unwrap();
        for block in set {
            map.set(BlockIndex(block), Some(table_ref(block))).await.unwrap();
        }
        let (root, written) = map.finish().await.unwrap();
        assert_eq!(written, 7);
        let version = version_of(&repo, root, blocks);
        counting.reset();
        let mut found = Vec::new();
        let mut from = BlockIndex(0);
        while let Some((block, table)) = version.next_block(from, BlockIndex(blocks)).await.unwrap() {
            assert_eq!(table, table_ref(block.0));
            found.push(block.0);
            from = BlockIndex(block.0 + 1);
        }
        assert_eq!(found, set);
        assert_eq!(counting.requests(), 7);
        let within = version.next_block(BlockIndex(1), BlockIndex(100_000)).await.unwrap();
        assert_eq!(within, None, "the end is exclusive");
        let error = version.table(BlockIndex(blocks)).await.unwrap_err();
        assert!(matches!(error, RepoError::NoBlock { .. }), "{error}");
    });
}

fn table_ref(tag: u64) -> TableRef {
    let mut id = [0; 32];
    id[..8].copy_from_slice(&tag.to_le_bytes());
    TableRef { object: ObjectId(id), offset: ByteOffset(16), len: ByteLen(64), id: TableId(id) }
}

fn version_of(repo: &Repository, root: MapRoot, blocks: u64) -> Version {
    let block_size = BlockSize::from_log2(20).unwrap();
    let size = ByteLen(blocks * block_size.len().0);
    let commit = Commit { block_size, size, ..commit_of(root, 1) };
    let id = CommitId::of(&commit.encode().unwrap());
    Version::of(repo, &image("a"), id, commit, no_cache(), VersionOptions::default())
}

#[test]
fn maps_edited_and_grown_at_random_are_what_a_plain_map_is() {
    let seed = seed(3);
    let runtime = runtime();
    runtime.block_on(async {
        for round in 0..30 {
            let mut rng = StdRng::seed_from_u64(seed + round);
            let repo = Repository::create(Arc::new(MemStore::new()), [1; 16]).await.unwrap();
            let mut model: BTreeMap<u64, TableRef> = BTreeMap::new();
            let mut blocks = rng.random_range(1..600);
            let mut base = MapBase::ZERO;
            for _ in 0..6 {
                let mut map = MapBuilder::new(&repo, &image("a"), &no_cache(), base, blocks).unwrap();
                let mut edits = BTreeMap::new();
                for _ in 0..rng.random_range(0..40) {
                    // Often what is there already, to be removed or replaced.
                    let known: Vec<u64> = model.keys().copied().collect();
                    let block = match known.as_slice() {
                        [_, ..] if rng.random_bool(0.5) => known[rng.random_range(0..known.len())],
                        _ => rng.random_range(0..blocks),
                    };
                    let table = rng.random_bool(0.6).then(|| table_ref(rng.random()));
                    edits.insert(block, table);
                }
                for (&block, &table) in &edits {
                    map.set(BlockIndex(block), table).await.unwrap();
                    match table {
                        Some(table) => model.insert(block, table),
                        None => model.remove(&block),
                    };
                }
                let (root, _) = map.finish().await.unwrap();
                let version = version_of(&repo, root, blocks);
                let mut found = BTreeMap::new();
                let mut from = BlockIndex(0);
                while let Some((block, table)) = version.next_block(from, BlockIndex(blocks)).await.unwrap() {
                    found.insert(block.0, table);
                    from = BlockIndex(block.0 + 1);
                }
                assert_eq!(found, model, "round {round}");
                // One shape: built in one go the same map has the same root.
                let mut whole =
                    MapBuilder::new(&repo, &image("a"), &no_cache(), MapBase::ZERO, blocks).unwrap();
                for (&block, &table) in &model {
                    whole.set(BlockIndex(block), Some(table)).await.unwrap();
                }
                assert_eq!(whole.finish().await.unwrap().0, root, "round {round}");
                base = MapBase { root, blocks };
                blocks += [0, rng.random_range(0..1000), rng.random_range(0..1 << 20), 1 << 26]
                    [rng.random_range(0..4)];
            }
        }
    });
}

#[test]
fn blocks_out_of_order_and_smaller_devices_are_refused() {
    let runtime = runtime();
    runtime.block_on(async {
        let repo = Repository::create(Arc::new(MemStore::new()), [1; 16]).await.unwrap();
        let mut map = MapBuilder::new(&repo, &image("a"), &no_cache(), MapBase::ZERO, 10).unwrap();
        map.set(BlockIndex(5), Some(table_ref(1))).await.unwrap();
        for block in [5, 4] {
            let error = map.set(BlockIndex(block), None).await.unwrap_err();
            assert!(matches!(error, RepoError::BlockOrder { .. }), "{error}");
        }
        let error = map.set(BlockIndex(10), None).await.unwrap_err();
        assert!(matches!(error, RepoError::NoBlock { .. }), "{error}");
        let (root, _) = map.finish().await.unwrap();
        let error =
            MapBuilder::new(&repo, &image("a"), &no_cache(), MapBase { root, blocks: 10 }, 9).unwrap_err();
        assert!(matches!(error, RepoError::MapShrinks { .. }), "{error}");
    });
}
