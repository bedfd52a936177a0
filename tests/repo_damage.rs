//! A damaged object is named and never served; other objects keep serving.
#![allow(clippy::unwrap_used, reason = "a test that can't go on fails")]

mod common;

use std::collections::BTreeMap;
use std::sync::Arc;

use bytes::Bytes;
use common::*;
use horcrux::format::base_object::{TRAILER_BYTES, read_trailer};
use horcrux::repo::{
    ImageWriter, MetaCache, NoMetaCache, RepoError, Repository, TagName, Version, VersionOptions,
};
use horcrux::store::counting::Method;
use horcrux::store::fault::Fault;
use horcrux::store::{FaultStore, Key, MemStore, StoreError};
use horcrux::units::{BlockIndex, ByteLen};
use parking_lot::Mutex;
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};
use tokio::runtime::Runtime;

type Chunks = BTreeMap<u64, Bytes>;

/// Two versions of an image with two levels of map, compressed, raw and repeated chunks; and another image.
fn sample(runtime: &Runtime) -> (MemStore, Chunks) {
    let memory = MemStore::new();
    let repo = create(runtime, Arc::new(memory.clone()));
    let mut rng = StdRng::seed_from_u64(5);
    let raw = noise(&mut rng, 3 * 65_536);
    for version in 0..2u8 {
        for name in ["other", "a"] {
            let size = 300 << 20;
            let mut writer =
                ImageWriter::new(runtime.handle(), &repo, &image(name), small_params(size)).unwrap();
            writer.data(&raw).unwrap();
            writer.data(&b"text and more text ".repeat(8000)[..100_000]).unwrap();
            let at = writer.position().0;
            writer.hole(ByteLen((290 << 20) - at)).unwrap();
            writer.data(&raw[..65_536]).unwrap();
            writer.data(&[version + 1; 65_536]).unwrap();
            writer.finish(meta()).unwrap();
        }
    }
    let chunks = runtime.block_on(read(&memory)).unwrap();
    assert!(chunks.len() >= 7);
    (memory, chunks)
}

async fn read(memory: &MemStore) -> Result<Chunks, RepoError> {
    let repo = Repository::open(Arc::new(memory.clone())).await?;
    let version = open(&repo, &image("a"), "main").await?;
    let chunks = read_chunks(&version).await?;
    Ok(chunks.into_iter().map(|(at, chunk)| (at, chunk.content().clone())).collect())
}

/// What the current version of image `a` is made of: keys, and the part of each that reading it needs.
fn needed(runtime: &Runtime, memory: &MemStore) -> Vec<(Key, usize)> {
    let dump = memory.dump();
    dump.iter()
        .filter(|(key, _)| !key.as_str().starts_with("images/other/"))
        .filter(|(key, _)| {
            let without = MemStore::new();
            dump.iter()
                .filter(|(other, _)| other != key)
                .for_each(|(key, body)| without.overwrite(key, body.clone()));
            runtime.block_on(read(&without)).is_err()
        })
        .map(|(key, body)| {
            let end = if key.as_str().contains("/blocks/") { body.len() - TRAILER_BYTES } else { body.len() };
            (key.clone(), end)
        })
        .collect()
}

/// A zstd frame has bits that no decoder looks at. With one of them flipped a chunk is still the chunk its id names, and may be served;
/// anything else must be an error.
fn expect_named(runtime: &Runtime, memory: &MemStore, key: &Key, what: &str, truth: &Chunks) {
    match runtime.block_on(read(memory)) {
        Ok(chunks) if key.as_str().contains("/blocks/") && what.contains("flipped") && chunks == *truth => {}
        Ok(_) => panic!("{key}: {what}: read as if nothing were wrong"),
        Err(error) => {
            let text = error.to_string();
            let named = text.contains(key.as_str()) || matches!(error, RepoError::NotARepository { .. });
            assert!(named, "{key}: {what}: the error does not name it: {text}");
            assert!(!error.is_transient(), "{text}");
        }
    }
}

#[test]
fn every_object_that_is_cut_flipped_zeroed_emptied_or_gone_is_named() {
    let runtime = runtime();
    let (memory, chunks) = sample(&runtime);
    let keys = needed(&runtime, &memory);
    for kind in ["format", "refs/heads", "commits/", "maps/", "blocks/"] {
        assert!(keys.iter().any(|(key, _)| key.as_str().contains(kind)), "no {kind}");
    }
    let mut rng = StdRng::seed_from_u64(seed(6));
    for (key, end) in &keys {
        let good = memory.dump()[key].clone();
        let is_block = key.as_str().contains("/blocks/");
        let first = if is_block { 16 } else { 0 };
        let mut cuts: Vec<usize> = (0..24).map(|_| rng.random_range(first..*end)).collect();
        cuts.extend([0, first, end - 1]);
        for cut in cuts {
            memory.overwrite(key, good.slice(..cut));
            expect_named(&runtime, &memory, key, &format!("cut to {cut} of {}", good.len()), &chunks);
        }
        let mut flips: Vec<usize> = (0..60).map(|_| rng.random_range(first..*end)).collect();
        flips.extend([first, end - 1]);
        for at in flips {
            let mut bad = good.to_vec();
            bad[at] ^= 1 << rng.random_range(0..8);
            memory.overwrite(key, bad);
            expect_named(&runtime, &memory, key, &format!("bit of byte {at} flipped"), &chunks);
        }
        memory.overwrite(key, vec![0; good.len()]);
        expect_named(&runtime, &memory, key, "zeros", &chunks);
        memory.overwrite(key, Bytes::from_static(b"<html>502 Bad Gateway</html>"));
        expect_named(&runtime, &memory, key, "an error page", &chunks);
        memory.overwrite(key, good);
    }
    assert!(runtime.block_on(read(&memory)).unwrap() == chunks);
}

#[test]
fn two_objects_of_one_kind_that_are_swapped_are_named() {
    let runtime = runtime();
    let (memory, _) = sample(&runtime);
    let dump = memory.dump();
    let mut swapped = 0;
    for (key, _) in needed(&runtime, &memory) {
        let kind = |key: &Key| key.segments().nth(2).map(str::to_owned);
        for (other, body) in
            dump.iter().filter(|(other, body)| kind(other) == kind(&key) && **body != dump[&key])
        {
            memory.overwrite(&key, body.clone());
            memory.overwrite(other, dump[&key].clone());
            match runtime.block_on(read(&memory)) {
                Ok(_) => panic!("{key} and {other} were swapped and nobody saw"),
                Err(error) => {
                    let text = error.to_string();
                    assert!(text.contains(key.as_str()) || text.contains(other.as_str()), "{text}");
                }
            }
            memory.overwrite(&key, dump[&key].clone());
            memory.overwrite(other, body.clone());
            swapped += 1;
        }
    }
    assert!(swapped > 8, "{swapped}");
}

#[test]
fn a_ref_copied_over_another_says_whose_it_is() {
    let runtime = runtime();
    let (memory, _) = sample(&runtime);
    let [a, other] = ["a", "other"].map(|name| Key::new(&format!("images/{name}/refs/heads/main")).unwrap());
    memory.overwrite(&a, memory.dump()[&other].clone());
    let error = runtime.block_on(read(&memory)).unwrap_err();
    assert!(matches!(error, RepoError::RefMisplaced { .. }), "{error}");
    assert!(error.to_string().contains("heads/main of image other"), "{error}");
}

#[test]
fn a_damaged_chunk_does_not_take_its_neighbours_with_it() {
    let runtime = runtime();
    let memory = MemStore::new();
    let repo = create(&runtime, Arc::new(memory.clone()));
    let bytes = noise(&mut StdRng::seed_from_u64(1), 1 << 20);
    write(&runtime, &repo, &image("a"), &bytes, small_params(bytes.len())).unwrap();
    let (key, good) = memory.dump().into_iter().find(|(key, _)| key.as_str().contains("/blocks/")).unwrap();
    let trailer = good[good.len() - TRAILER_BYTES..].try_into().unwrap();
    read_trailer(trailer, ByteLen(good.len() as u64)).unwrap();
    let read_each = || {
        runtime.block_on(async {
            let version = open(&repo, &image("a"), "main").await.unwrap();
            // From before the damage: the table lies at the object's end.
            let table = version.table(BlockIndex(0)).await;
            table.map(|table| (version, table.unwrap()))
        })
    };
    let (version, table) = read_each().unwrap();
    let locations: Vec<_> = table.entries().iter().map(|entry| table.location(entry)).collect();
    let mut flipped = good.to_vec();
    flipped[16 + 5 * 65_536 + 99] ^= 4;
    for (what, damaged, bad) in
        [("flipped", flipped, 5..6), ("cut", good[..16 + 10 * 65_536 + 1].to_vec(), 10..16)]
    {
        memory.overwrite(&key, damaged);
        let answers = runtime.block_on(version.fetch(&locations));
        for (at, answer) in answers.into_iter().enumerate() {
            match answer {
                Ok(chunk) => {
                    assert!(!bad.contains(&at), "{what}: chunk {at}");
                    assert_eq!(chunk.content(), &bytes[at * 65_536..][..65_536]);
                }
                Err(error) => {
                    assert!(bad.contains(&at), "{what}: chunk {at}: {error}");
                    assert!(error.to_string().contains(key.as_str()), "{error}");
                }
            }
        }
    }
}

/// Remembers, or lies.
#[derive(Debug, Default)]
struct TestCache {
    entries: Mutex<BTreeMap<[u8; 32], Bytes>>,
    lies: bool,
}

impl MetaCache for TestCache {
    fn get(&self, hash: &[u8; 32]) -> Option<Bytes> {
        if self.lies {
            Some(Bytes::from_static(b"HCXM nonsense"))
        } else {
            self.entries.lock().get(hash).cloned()
        }
    }

    fn put(&self, hash: &[u8; 32], bytes: &[u8]) {
        assert_eq!(blake3::hash(bytes).as_bytes(), hash, "only verified bytes are put");
        self.entries.lock().insert(*hash, Bytes::copy_from_slice(bytes));
    }
}

#[test]
fn a_cache_that_lies_costs_time_and_nothing_else() {
    let runtime = runtime();
    let (memory, chunks) = sample(&runtime);
    runtime.block_on(async {
        let repo = Repository::open(Arc::new(memory)).await.unwrap();
        let id = open(&repo, &image("a"), "main").await.unwrap().id();
        let cache = Arc::new(TestCache { lies: true, ..TestCache::default() });
        let version = Version::open(&repo, &image("a"), id, cache, VersionOptions::default()).await.unwrap();
        assert_eq!(read_chunks(&version).await.unwrap().len(), chunks.len());
    });
}

#[test]
fn a_version_opens_and_knows_its_holes_with_the_store_away() {
    let runtime = runtime();
    let (memory, _) = sample(&runtime);
    runtime.block_on(async {
        let faults = FaultStore::new(Arc::new(memory));
        let repo = Repository::open(Arc::new(faults.clone())).await.unwrap();
        let id = open(&repo, &image("a"), "main").await.unwrap().id();
        let cache = Arc::new(TestCache::default());
        let options = VersionOptions::default();
        let version = Version::open(&repo, &image("a"), id, cache.clone(), options).await.unwrap();
        read_chunks(&version).await.unwrap();

        for method in Method::ALL {
            faults.always(method, "", Fault::FailBefore);
        }
        let version = Version::open(&repo, &image("a"), id, cache, options).await.unwrap();
        assert!(version.table(BlockIndex(100)).await.unwrap().is_none());
        let table = version.table(BlockIndex(290)).await.unwrap().unwrap();
        let answers = version.fetch(&[table.location(&table.entries()[0])]).await;
        assert!(answers[0].as_ref().unwrap_err().is_transient());

        let empty: Arc<dyn MetaCache> = Arc::new(NoMetaCache);
        let error = Version::open(&repo, &image("a"), id, empty, options).await.unwrap_err();
        assert!(error.is_transient(), "{error}");
    });
}

#[test]
fn unknown_versions_are_refused_by_number() {
    let runtime = runtime();
    let (memory, _) = sample(&runtime);
    let text = format!("horcrux-repository 9\nid {}\nchecksum 00000000\n", "0".repeat(32));
    memory.overwrite(&Key::new("format").unwrap(), text);
    let error = runtime.block_on(read(&memory)).unwrap_err().to_string();
    assert!(error.contains("repository version 9, this build reads 1..=1"), "{error}");
    memory.overwrite(&Key::new("format").unwrap(), "some other program's file");
    let error = runtime.block_on(read(&memory)).unwrap_err().to_string();
    assert!(error.contains("format") && error.contains("not a repository"), "{error}");
}

#[test]
fn what_is_not_there_is_said_with_what_is() {
    let runtime = runtime();
    let (memory, _) = sample(&runtime);
    runtime.block_on(async {
        let repo = Repository::open(Arc::new(memory.clone())).await.unwrap();
        let name = image("a");
        let id = open(&repo, &name, "main").await.unwrap().id();
        let tag: TagName = "v1".parse().unwrap();
        repo.create_tag(&name, &tag, id).await.unwrap();
        repo.create_tag(&name, &tag, id).await.unwrap();
        let old = open(&repo, &name, "main~1").await.unwrap().id();
        let error = repo.create_tag(&name, &tag, old).await.unwrap_err();
        assert!(matches!(error, RepoError::TagExists { commit, .. } if commit == id), "{error}");

        assert_eq!(open(&repo, &name, "v1").await.unwrap().id(), id);
        assert_eq!(open(&repo, &name, &old.to_string()).await.unwrap().id(), old);
        assert_eq!(open(&repo, &name, &old.to_string()[..12].to_uppercase()).await.unwrap().id(), old);
        assert_eq!(open(&repo, &name, &format!("{}~1", &id.to_string()[..12])).await.unwrap().id(), old);

        let error = open(&repo, &image("nope"), "main").await.unwrap_err().to_string();
        assert_eq!(error, "no image 'nope' in memory; it has: a, other");
        let error = open(&repo, &name, "nope").await.unwrap_err().to_string();
        assert_eq!(error, "no branch, tag or commit 'nope' in a; it has: main, v1");
        let error = open(&repo, &name, "main~5").await.unwrap_err().to_string();
        assert_eq!(error, "a@main~5 is not there: the history goes back 1 commits only");

        let twin = format!("{}{}", &old.to_string()[..8], "0".repeat(56));
        memory.overwrite(&Key::new(&format!("images/a/commits/{twin}")).unwrap(), "");
        let error = open(&repo, &name, &twin[..8]).await.unwrap_err();
        assert!(error.to_string().contains(&twin), "{error}");
        assert!(matches!(error, RepoError::Ambiguous { .. }));
        let error = open(&repo, &name, &twin[..3]).await.unwrap_err();
        assert!(matches!(error, RepoError::NoRef { .. }), "three digits are no id: {error}");
    });
}

#[test]
fn a_place_that_is_no_repository_is_told_apart() {
    let runtime = runtime();
    let dir = tempfile::tempdir().unwrap();
    let at = |name: &str| horcrux::store::url::open(dir.path().join(name).to_str().unwrap()).unwrap();
    runtime.block_on(async {
        let error = Repository::open(at("missing")).await.unwrap_err();
        assert!(matches!(error, RepoError::Store(StoreError::NoPlace { .. })), "{error}");
        assert!(error.to_string().contains("missing"));

        std::fs::create_dir(dir.path().join("photos")).unwrap();
        let error = Repository::open(at("photos")).await.unwrap_err();
        assert!(matches!(error, RepoError::NotARepository { .. }), "{error}");
        std::fs::write(dir.path().join("photos/cat picture.jpg"), "meow").unwrap();
        let error = Repository::create(at("photos"), [1; 16]).await.unwrap_err();
        assert!(error.to_string().contains("cat picture.jpg"), "{error}");

        let made = Repository::create(at("deep/er/new"), [1; 16]).await.unwrap();
        assert!(made.images().await.unwrap().is_empty());
        let error = Repository::create(at("deep/er/new"), [2; 16]).await.unwrap_err();
        assert!(matches!(error, RepoError::Exists { .. }), "{error}");
        assert_eq!(Repository::open_or_create(at("deep/er/new"), [3; 16]).await.unwrap().id(), [1; 16]);

        let racers = (0..8).map(|n| Repository::create(at("raced"), [n; 16]));
        let made = futures_util::future::join_all(racers).await;
        assert_eq!(made.iter().filter(|made| made.is_ok()).count(), 1);
    });
}
