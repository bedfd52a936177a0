//! A patch of a version against a byte vector: what it reads, what it stores, what it leaves alone.
#![allow(clippy::unwrap_used, reason = "a test that can't go on fails")]

mod common;

use std::sync::Arc;

use async_trait::async_trait;
use bytes::Bytes;
use horcrux::format::{Commit, CommitId};
use horcrux::repo::patch::{PatchError, patch};
use horcrux::repo::push::{Push, Pushing, unpushed};
use horcrux::repo::{
    Change, MetaCache, NoMetaCache, PatchSource, Patched, Repository, Version, VersionOptions,
};
use horcrux::store::counting::Method;
use horcrux::store::{CountingStore, DirStore, MemStore, Store};
use horcrux::units::{ByteLen, ByteOffset, ByteRange};
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};
use tokio::runtime::Runtime;

const CHUNK: usize = 64 << 10;
const BLOCK: usize = 1 << 20;
const PAGE: usize = 4096;

/// A device, and which pages of it were written (`false`) or zeroed (`true`) since the parent.
struct Model {
    bytes: Vec<u8>,
    pages: Vec<Option<bool>>,
}

impl Model {
    fn of(bytes: Vec<u8>) -> Model {
        let pages = vec![None; bytes.len() / PAGE];
        Model { bytes, pages }
    }

    fn write(&mut self, page: usize, bytes: &[u8]) {
        self.bytes[page * PAGE..page * PAGE + bytes.len()].copy_from_slice(bytes);
        self.pages[page..page + bytes.len() / PAGE].fill(Some(false));
    }

    fn zero(&mut self, page: usize, pages: usize) {
        self.bytes[page * PAGE..(page + pages) * PAGE].fill(0);
        self.pages[page..page + pages].fill(Some(true));
    }
}

#[async_trait]
impl PatchSource for Model {
    type Error = String;

    fn next_change(&self, at: ByteOffset) -> Option<Change> {
        let first = (at.0 as usize / PAGE..self.pages.len()).find(|page| self.pages[*page].is_some())?;
        let kind = self.pages[first];
        let len = self.pages[first..].iter().take_while(|page| **page == kind).count();
        let at = |page: usize| ByteOffset((page * PAGE) as u64);
        Some(Change {
            range: ByteRange { start: at(first), end: at(first + len) },
            is_zero: kind == Some(true),
        })
    }

    async fn read(&self, range: ByteRange) -> Result<Bytes, String> {
        Ok(Bytes::copy_from_slice(&self.bytes[range.start.0 as usize..range.end.0 as usize]))
    }
}

fn meta() -> Arc<dyn MetaCache> {
    Arc::new(NoMetaCache)
}

async fn version(repo: &Repository, id: CommitId) -> Version {
    Version::open(repo, &common::image("disk"), id, meta(), VersionOptions::default()).await.unwrap()
}

async fn patched(parent: &Version, model: &Model) -> Patched {
    patch(parent, ByteLen(model.bytes.len() as u64), 1, model, &|_| ()).await.unwrap()
}

/// The commit of a patch.
async fn commit(repo: &Repository, parent: &Version, model: &Model, patched: &Patched) -> CommitId {
    let commit = Commit {
        parents: vec![parent.id()],
        map: patched.map,
        size: ByteLen(model.bytes.len() as u64),
        message: "patched".to_owned(),
        ..parent.commit().clone()
    };
    repo.put_commit(&common::image("disk"), &commit).await.unwrap()
}

struct Bed {
    runtime: Runtime,
    store: CountingStore,
    repo: Repository,
    first: CommitId,
}

fn bed(bytes: &[u8]) -> Bed {
    let runtime = common::runtime();
    let store = CountingStore::new(Arc::new(MemStore::new()));
    let repo = common::create(&runtime, Arc::new(store.clone()) as Arc<dyn Store>);
    let written =
        common::write(&runtime, &repo, &common::image("disk"), bytes, common::small_params(bytes.len()));
    let first = written.unwrap().commit;
    store.reset();
    Bed { runtime, store, repo, first }
}

#[test]
fn patches_of_patches_read_as_the_bytes_they_were_made_of() {
    let seed = common::seed(11);
    for round in 0..12 {
        let mut rng = StdRng::seed_from_u64(seed + round);
        let len = rng.random_range(1..6) * BLOCK + rng.random_range(0..BLOCK / PAGE) * PAGE;
        let bytes = common::random_image(seed + round, len);
        let Bed { runtime, repo, first, .. } = bed(&bytes);
        runtime.block_on(async {
            let mut parent = version(&repo, first).await;
            let mut bytes = bytes;
            for _ in 0..4 {
                if rng.random_bool(0.3) {
                    // The device has grown.
                    bytes.resize(bytes.len() + rng.random_range(1..600) * PAGE, 0);
                }
                let mut model = Model::of(bytes.clone());
                let pages = model.pages.len();
                for _ in 0..rng.random_range(0..20) {
                    let page = rng.random_range(0..pages);
                    let most = (pages - page).min(if rng.random_bool(0.2) { 600 } else { 10 });
                    let len = rng.random_range(1..=most);
                    match rng.random_range(0..4) {
                        0 => model.zero(page, len),
                        // What it was before: written, and nothing changed.
                        1 => {
                            let same = model.bytes[page * PAGE..(page + len) * PAGE].to_vec();
                            model.write(page, &same);
                        }
                        2 => model.write(page, &vec![rng.random(); len * PAGE]),
                        _ => model.write(page, &common::noise(&mut rng, len * PAGE)),
                    }
                }
                let found = patched(&parent, &model).await;
                let id = commit(&repo, &parent, &model, &found).await;
                parent = version(&repo, id).await;
                assert_eq!(
                    common::read_all(&parent).await.unwrap(),
                    model.bytes,
                    "seed {seed} round {round}"
                );
                bytes = model.bytes;
            }
        });
    }
}

#[test]
fn what_is_written_back_as_it_was_stores_nothing_and_is_the_same_map() {
    let bytes = common::random_image(3, 4 * BLOCK);
    let Bed { runtime, store, repo, first } = bed(&bytes);
    runtime.block_on(async {
        let parent = version(&repo, first).await;
        let mut model = Model::of(bytes.clone());
        model.write(0, &bytes[..BLOCK]);
        model.write(700, &bytes[700 * PAGE..701 * PAGE]);
        let found = patched(&parent, &model).await;
        assert_eq!((found.map, found.stored), (parent.commit().map, 0));
        assert!(found.looked_at >= 17);
        assert_eq!(store.count(Method::PutNew).requests + store.count(Method::Begin).requests, 0);
    });
}

#[test]
fn one_page_stores_one_chunk_and_one_node_a_level() {
    let bytes = common::noise(&mut StdRng::seed_from_u64(5), 8 * BLOCK);
    let Bed { runtime, store, repo, first } = bed(&bytes);
    runtime.block_on(async {
        let parent = version(&repo, first).await;
        let mut model = Model::of(bytes.clone());
        model.write(300, &[7; PAGE]);
        let found = patched(&parent, &model).await;
        assert_eq!((found.looked_at, found.stored), (1, 1));
        assert!(found.stored_bytes.0 < 2 * CHUNK as u64, "{found:?}");
        // An object and a node.
        assert_eq!(store.count(Method::PutNew).requests, 2);
        let id = commit(&repo, &parent, &model, &found).await;
        assert_eq!(common::read_all(&version(&repo, id).await).await.unwrap(), model.bytes);
        // The same chunk at many places is stored once.
        let mut model = Model::of(bytes.clone());
        for chunk in 0..40 {
            model.write(chunk * CHUNK / PAGE, &[9; CHUNK]);
        }
        let found = patched(&parent, &model).await;
        assert_eq!((found.looked_at, found.stored), (40, 1));
        let id = commit(&repo, &parent, &model, &found).await;
        assert_eq!(common::read_all(&version(&repo, id).await).await.unwrap(), model.bytes);
    });
}

#[test]
fn zeroing_everything_costs_by_blocks_and_leaves_an_empty_map() {
    let bytes = common::noise(&mut StdRng::seed_from_u64(5), 8 * BLOCK);
    let Bed { runtime, repo, first, .. } = bed(&bytes);
    runtime.block_on(async {
        let parent = version(&repo, first).await;
        let mut model = Model::of(bytes.clone());
        model.zero(0, 8 * BLOCK / PAGE);
        let found = patched(&parent, &model).await;
        assert_eq!((found.looked_at, found.stored), (0, 0), "no chunk is read for it");
        assert_eq!(found.map, horcrux::format::MapRoot::Zero);
    });
}

#[test]
fn what_can_t_be_read_is_told_and_no_map_is_made() {
    struct Broken;
    #[async_trait]
    impl PatchSource for Broken {
        type Error = String;
        fn next_change(&self, at: ByteOffset) -> Option<Change> {
            let range = ByteRange { start: at, end: ByteOffset(BLOCK as u64) };
            (at.0 < range.end.0).then_some(Change { range, is_zero: false })
        }
        async fn read(&self, _range: ByteRange) -> Result<Bytes, String> {
            Err("a bad sector".to_owned())
        }
    }
    let bytes = common::random_image(3, 2 * BLOCK);
    let Bed { runtime, repo, first, .. } = bed(&bytes);
    runtime.block_on(async {
        let parent = version(&repo, first).await;
        let error = patch(&parent, ByteLen(bytes.len() as u64), 1, &Broken, &|_| ()).await.unwrap_err();
        assert!(matches!(error, PatchError::Source(_)), "{error}");
        assert_eq!(error.to_string(), "a bad sector");
    });
}

/// A place that has the first version, and commits made on a host that stand on it.
#[test]
fn a_push_sends_what_is_missing_once_and_goes_on_where_it_was_cut_short() {
    let bytes = common::noise(&mut StdRng::seed_from_u64(9), 4 * BLOCK);
    let Bed { runtime, store, repo, first } = bed(&bytes);
    let dir = tempfile::tempdir().unwrap();
    let here = DirStore::new(dir.path().join("made"));
    let made = repo.over(here.clone());
    let (image, branch) = (common::image("disk"), "main".parse().unwrap());
    runtime.block_on(async {
        let mut model = Model::of(bytes.clone());
        let mut parent = version(&made, first).await;
        for round in 0..3 {
            model.pages.fill(None);
            model.write(100 * round, &vec![round as u8 + 1; 3 * PAGE]);
            let found = patched(&parent, &model).await;
            let id = commit(&made, &parent, &model, &found).await;
            parent = version(&made, id).await;
        }
        assert_eq!(store.count(Method::PutNew).requests, 0, "nothing is written to the repository");
        let tip = parent.id();
        let cache = meta();
        let waiting = unpushed(&made, &here, &image, &cache, tip, Some(first)).await.unwrap();
        assert_eq!(waiting.commits.len(), 3);
        assert_eq!(waiting.commits[2], tip, "parents come first");
        let progress = Pushing::default();
        let (to, meta) = (&repo, &cache);
        let push =
            Push { made: &made, here: &here, to, image: &image, branch: &branch, meta, progress: &progress };
        // Some of it is there already, of a push that was killed.
        let lone = unpushed(&made, &here, &image, &cache, waiting.commits[0], Some(first)).await.unwrap();
        assert_eq!(lone.commits.len(), 1);
        let done = push.run(tip, Some(first)).await.unwrap();
        assert_eq!((done.commits, done.up_to_date), (3, false));
        assert_eq!(done.sent, 9, "an object, a node and a commit each: {done:?}");
        assert!(push.run(tip, Some(first)).await.unwrap().up_to_date);
        // Whoever has the repository alone reads it.
        let there = common::open(&repo, &image, "main").await.unwrap();
        assert_eq!(there.id(), tip);
        assert_eq!(common::read_all(&there).await.unwrap(), model.bytes);
        let older = common::open(&repo, &image, "main~1").await.unwrap();
        assert_ne!(common::read_all(&older).await.unwrap(), model.bytes);
        // To another branch nothing is sent again.
        let other = "other".parse().unwrap();
        let push =
            Push { branch: &other, made: &made, here: &here, to, image: &image, meta, progress: &progress };
        let again = push.run(tip, Some(first)).await.unwrap();
        assert_eq!((again.sent, again.present), (0, 9));
        // A branch that others have moved is not theirs to lose.
        let error = push.run(waiting.commits[0], Some(first)).await.unwrap_err();
        assert!(error.to_string().starts_with("not a fast-forward: disk@other is at"), "{error}");
    });
}
