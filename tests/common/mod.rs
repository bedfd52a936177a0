//! What the repository tests share: a runtime, seeded images, writing and reading them whole.
#![allow(clippy::unwrap_used, reason = "a test that can't go on fails")]
#![allow(dead_code, reason = "each test binary uses its part")]

use std::sync::Arc;

use horcrux::format::{BlockSize, ChunkSize, Filesystem, Timestamp};
use horcrux::repo::{
    CommitMeta, Finished, ImageName, ImageWriter, NoMetaCache, Reference, RepoError, Repository, Version,
    VersionOptions, WriterParams,
};
use horcrux::store::Store;
use horcrux::units::{BlockIndex, ByteLen};
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};
use tokio::runtime::Runtime;

pub fn runtime() -> Runtime {
    tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap()
}

pub fn image(name: &str) -> ImageName {
    name.parse().unwrap()
}

/// A seed for one test: from HORCRUX_TEST_SEED, else fixed. It is in the output of a test that fails.
pub fn seed(default: u64) -> u64 {
    let seed = std::env::var("HORCRUX_TEST_SEED").ok().and_then(|text| text.parse().ok()).unwrap_or(default);
    println!("HORCRUX_TEST_SEED={seed}");
    seed
}

pub fn noise(rng: &mut StdRng, len: usize) -> Vec<u8> {
    let mut bytes = vec![0; len];
    rng.fill(bytes.as_mut_slice());
    bytes
}

/// Noise, text-like bytes, zeros and repetitions, in runs of random lengths, `len` bytes in all.
pub fn random_image(seed: u64, len: usize) -> Vec<u8> {
    let mut rng = StdRng::seed_from_u64(seed);
    let mut bytes = Vec::with_capacity(len);
    while bytes.len() < len {
        let run = rng.random_range(1..300_000).min(len - bytes.len());
        match rng.random_range(0..5) {
            0 => bytes.extend_from_slice(&noise(&mut rng, run)),
            1 => bytes.extend((0..run).map(|_| b"the quick brown fox "[rng.random_range(0..20)])),
            2 | 3 => bytes.resize(bytes.len() + run, 0),
            _ if bytes.is_empty() => {}
            _ => {
                // A piece from before, at chunk alignment both there and here where it fits.
                let aligned = bytes.len().next_multiple_of(65_536).min(len);
                bytes.resize(aligned, 0);
                let from = rng.random_range(0..bytes.len().max(1)) / 65_536 * 65_536;
                let run = run.min(bytes.len() - from).min(len - bytes.len());
                bytes.extend_from_within(from..from + run);
            }
        }
    }
    bytes
}

/// Blocks of 1 MiB and chunks of 64 KiB, so that small images have many of them.
pub fn small_params(size: usize) -> WriterParams {
    WriterParams {
        block_size: BlockSize::from_log2(20).unwrap(),
        chunk_size: ChunkSize::from_log2(16).unwrap(),
        threads: 2,
        ..WriterParams::new(ByteLen(size as u64))
    }
}

pub fn meta() -> CommitMeta {
    CommitMeta {
        filesystem: Filesystem::None,
        author: "tests".into(),
        time: Timestamp { secs: 1_750_000_000, nanos: 0 },
        message: "by a test".into(),
    }
}

/// Creates a repository on a store.
pub fn create(runtime: &Runtime, store: Arc<dyn Store>) -> Repository {
    runtime.block_on(Repository::create(store, [7; 16])).unwrap()
}

/// Writes `bytes` in pieces; runs of zeros of a page or more go as holes now and then.
pub fn write(
    runtime: &Runtime,
    repo: &Repository,
    name: &ImageName,
    bytes: &[u8],
    params: WriterParams,
) -> Result<Finished, RepoError> {
    let mut rng = StdRng::seed_from_u64(bytes.len() as u64);
    let mut writer = ImageWriter::new(runtime.handle(), repo, name, params)?;
    let mut rest = bytes;
    while !rest.is_empty() {
        let zeros = rest.iter().take_while(|&&byte| byte == 0).count();
        if zeros >= 4096 && rng.random_bool(0.7) {
            writer.hole(ByteLen(zeros as u64))?;
            rest = &rest[zeros..];
        } else {
            let piece = rng.random_range(1..200_000).min(rest.len());
            writer.data(&rest[..piece])?;
            rest = &rest[piece..];
        }
    }
    writer.finish(meta())
}

pub async fn open(repo: &Repository, name: &ImageName, reference: &str) -> Result<Version, RepoError> {
    let cache: Arc<dyn horcrux::repo::MetaCache> = Arc::new(NoMetaCache);
    let reference: Reference = reference.parse()?;
    let resolved = repo.resolve(name, &reference, &cache).await?;
    Version::open(repo, name, resolved.commit, cache, VersionOptions::default()).await
}

/// Reads a whole version.
pub async fn read_all(version: &Version) -> Result<Vec<u8>, RepoError> {
    let commit = version.commit();
    let mut bytes = vec![0; commit.size.0 as usize];
    let chunk_len = commit.chunk_size.len();
    for block in 0..commit.blocks() {
        let Some(table) = version.table(BlockIndex(block)).await? else { continue };
        let locations: Vec<_> = table.entries().iter().map(|entry| table.location(entry)).collect();
        for (entry, chunk) in table.entries().iter().zip(version.fetch(&locations).await) {
            let chunk = chunk?;
            assert_eq!(chunk.id(), entry.id);
            let at = (block * commit.block_size.len().0) as usize + usize::from(entry.index) * chunk_len;
            let len = chunk_len.min(bytes.len() - at);
            bytes[at..at + len].copy_from_slice(&chunk.content()[..len]);
            assert!(chunk.content()[len..].iter().all(|&byte| byte == 0), "past the end there are zeros");
        }
    }
    Ok(bytes)
}

/// Every chunk of a version that is not zeros, by its number on the device.
pub async fn read_chunks(
    version: &Version,
) -> Result<std::collections::BTreeMap<u64, horcrux::format::VerifiedChunk>, RepoError> {
    let commit = version.commit();
    let per_block = u64::from(commit.block_size.chunks(commit.chunk_size));
    let mut chunks = std::collections::BTreeMap::new();
    let mut from = BlockIndex(0);
    while let Some((block, _)) = version.next_block(from, BlockIndex(u64::MAX)).await? {
        let table = version.table(block).await?.expect("next_block names blocks that have a table");
        let locations: Vec<_> = table.entries().iter().map(|entry| table.location(entry)).collect();
        for (entry, chunk) in table.entries().iter().zip(version.fetch(&locations).await) {
            chunks.insert(block.0 * per_block + u64::from(entry.index), chunk?);
        }
        from = BlockIndex(block.0 + 1);
    }
    Ok(chunks)
}
