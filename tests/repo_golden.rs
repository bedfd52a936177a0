//! Repositories written by earlier builds are read by this one. `tests/golden/repository-v1` is checked in and never written again; where a
//! later version of the format adds one, HORCRUX_WRITE_GOLDEN=<empty directory> makes this test write it there.
#![allow(clippy::unwrap_used, reason = "a test that can't go on fails")]

mod common;

use std::path::Path;
use std::sync::Arc;

use common::*;
use horcrux::format::{ChunkSize, Codec, Filesystem};
use horcrux::repo::{CommitMeta, ImageWriter, Repository, TagName, WriterParams};
use horcrux::store::DirStore;
use horcrux::units::{BlockIndex, ByteLen};

const DEVICE: u64 = 300 << 20;
const CHUNK: usize = 65_536;

/// Bytes that do not depend on any crate's random numbers.
fn golden_noise(mut state: u64, len: usize) -> Vec<u8> {
    std::iter::repeat_with(|| {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (state >> 56) as u8
    })
    .take(len)
    .collect()
}

/// The chunks of a version that are not zeros, by number.
fn expected(version: u8) -> Vec<(u64, Vec<u8>)> {
    let text = b"a line of text that packs well\n".repeat(CHUNK / 31 + 1)[..CHUNK].to_vec();
    let mut last = vec![version; 5000];
    last.resize(CHUNK, 0);
    vec![
        (0, golden_noise(1, CHUNK)),
        (3, text.clone()),
        (4700, text),
        (4701, vec![version; CHUNK]),
        (4799, last),
    ]
}

fn write_golden(root: &Path) {
    let runtime = runtime();
    let store = Arc::new(DirStore::new(root));
    let repo = runtime.block_on(Repository::create(store, [0x5a; 16])).unwrap();
    for version in 1..=2 {
        let params = WriterParams { threads: 1, ..small_params(DEVICE as usize) };
        let mut writer = ImageWriter::new(runtime.handle(), &repo, &image("golden"), params).unwrap();
        for (chunk, bytes) in expected(version) {
            let hole = chunk * CHUNK as u64 - writer.position().0;
            writer.hole(ByteLen(hole)).unwrap();
            writer.data(&bytes).unwrap();
        }
        let meta =
            CommitMeta { message: format!("version {version}\n"), filesystem: Filesystem::Ext4, ..meta() };
        let finished = writer.finish(meta).unwrap();
        if version == 1 {
            let tag: TagName = "first".parse().unwrap();
            runtime.block_on(repo.create_tag(&image("golden"), &tag, finished.commit)).unwrap();
        }
    }
}

#[test]
fn a_repository_of_format_1_reads_as_it_was_written() {
    let mut root = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden/repository-v1");
    if let Some(at) = std::env::var_os("HORCRUX_WRITE_GOLDEN") {
        root = at.into();
        write_golden(&root);
    }
    let runtime = runtime();
    runtime.block_on(async {
        let repo = Repository::open(Arc::new(DirStore::new(&root))).await.unwrap();
        assert_eq!(repo.id(), [0x5a; 16]);
        assert_eq!(repo.images().await.unwrap(), [image("golden")]);
        for (version, reference) in [(1, "first"), (1, "main~1"), (2, "main")] {
            let opened = open(&repo, &image("golden"), reference).await.unwrap();
            let commit = opened.commit();
            assert_eq!((commit.size, commit.filesystem), (ByteLen(DEVICE), Filesystem::Ext4));
            assert_eq!(commit.message, format!("version {version}\n"));
            assert_eq!(commit.chunk_size, ChunkSize::from_log2(16).unwrap());
            let chunks = read_chunks(&opened).await.unwrap();
            let chunks: Vec<(u64, Vec<u8>)> =
                chunks.into_iter().map(|(at, chunk)| (at, chunk.content().to_vec())).collect();
            assert!(chunks == expected(version), "{reference}");
        }
        let opened = open(&repo, &image("golden"), "main").await.unwrap();
        let first = opened.table(BlockIndex(0)).await.unwrap().unwrap();
        assert_eq!(
            first.entries().iter().map(|entry| entry.codec).collect::<Vec<_>>(),
            [Codec::Raw, Codec::Zstd]
        );
        let last = opened.table(BlockIndex(293)).await.unwrap().unwrap();
        assert!(last.objects().count() > 1, "a chunk of another object is named");
    });
}
