//! Pushes of small images whose blocks repeat, so that a push relies on what others left; and schedules of pushers, readers, deleters and collectors.
#![allow(clippy::unwrap_used, reason = "a test that can't go on fails")]
#![allow(dead_code, reason = "each test binary uses its part")]

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::Duration;

use horcrux::format::{
    BlockSize, ChunkId, ChunkSize, Codec, Commit, CommitId, Filesystem, MapRoot, Timestamp,
};
use horcrux::repo::gc::{GcOptions, gc};
use horcrux::repo::verify::{roots, verify};
use horcrux::repo::{
    BlockWriter, BranchName, History, Hold, HoldOptions, MapBase, MapBuilder, MetaCache, NoMetaCache,
    RepoError, Repository, Version, VersionOptions, naming,
};
use horcrux::store::{FaultStore, MemStore, Store};
use horcrux::units::{BlockIndex, ByteLen};
use parking_lot::Mutex;
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};

use crate::common::image;

const BLOCKS: u64 = 4;
const CHUNK: usize = 1 << 16;

pub fn hold() -> HoldOptions {
    HoldOptions { patience: Duration::from_millis(50), ..HoldOptions::new("a test") }
}

fn no_cache() -> Arc<dyn MetaCache> {
    Arc::new(NoMetaCache)
}

fn sizes() -> (BlockSize, ChunkSize) {
    (BlockSize::from_log2(20).unwrap(), ChunkSize::from_log2(16).unwrap())
}

/// Writes a version whose blocks are filled with these values (0 is a hole), on the branch's tip, and moves the branch.
pub async fn push(
    repo: &Repository,
    branch: &str,
    values: &[u8],
    number: u64,
) -> Result<CommitId, RepoError> {
    let hold = Hold::push(repo, &image("a"), hold()).await?;
    let pushed = push_under(repo, &hold, branch, values, number).await;
    hold.release().await;
    pushed
}

async fn push_under(
    repo: &Repository,
    hold: &Hold,
    branch: &str,
    values: &[u8],
    number: u64,
) -> Result<CommitId, RepoError> {
    let (name, branch): (_, BranchName) = (image("a"), branch.parse()?);
    let tip = repo.branch(&name, &branch).await?;
    let before = match &tip {
        Some(tip) => {
            Some(Version::open(repo, &name, tip.commit, no_cache(), VersionOptions::default()).await?)
        }
        None => None,
    };
    let (block_size, chunk_size) = sizes();
    let mut map = MapBuilder::new(repo, &name, &no_cache(), MapBase::ZERO, BLOCKS)?;
    for (at, value) in values.iter().enumerate().filter(|(_, value)| **value > 0) {
        let mut writer = BlockWriter::new(repo, &name, block_size, chunk_size);
        let content = vec![*value; CHUNK];
        writer.store(0, ChunkId::of(&content), Codec::Raw, &content).await?;
        // And a chunk that only an object of the version before has.
        if let Some(before) = &before
            && number.is_multiple_of(2)
            && let Some(table) = before.table(BlockIndex(at as u64)).await?
        {
            writer.refer(1, &table.location(&table.entries()[0]));
        }
        map.set(BlockIndex(at as u64), Some(writer.seal().finish().await?)).await?;
    }
    let (map, _) = map.finish().await?;
    let commit = Commit {
        parents: tip.iter().map(|tip| tip.commit).collect(),
        map,
        size: ByteLen(BLOCKS << 20),
        block_size,
        chunk_size,
        filesystem: Filesystem::None,
        author: "tests".into(),
        time: Timestamp { secs: 1_750_000_000 + number, nanos: 0 },
        message: format!("push {number}"),
    };
    assert!(commit.map != MapRoot::Zero || values.iter().all(|value| *value == 0));
    let id = repo.put_commit(&name, &commit).await?;
    hold.move_branch(&branch, tip.as_ref(), &[id]).await?;
    Ok(id)
}

/// Reads a version, each block and chunk of it: the values it was written with.
pub async fn read(repo: &Repository, id: CommitId) -> Result<Vec<u8>, RepoError> {
    let version = Version::open(repo, &image("a"), id, no_cache(), VersionOptions::default()).await?;
    let mut values = Vec::new();
    for block in 0..BLOCKS {
        let Some(table) = version.table(BlockIndex(block)).await? else {
            values.push(0);
            continue;
        };
        let locations: Vec<_> = table.entries().iter().map(|entry| table.location(entry)).collect();
        for (at, chunk) in version.fetch(&locations).await.into_iter().enumerate() {
            let chunk = chunk?;
            if at == 0 {
                values.push(chunk.content()[0]);
            }
        }
    }
    Ok(values)
}

/// What the actors of a schedule know of each other.
#[derive(Default)]
struct World {
    /// Pushes to `main` that were acknowledged.
    acknowledged: Vec<(CommitId, Vec<u8>)>,
    /// Every commit anyone made.
    commits: BTreeSet<CommitId>,
    done: [usize; 5],
}

type Shared = Arc<Mutex<World>>;

/// An actor's own way to the store: slow and unreliable.
async fn way(memory: &MemStore, rng: &mut StdRng) -> Option<Repository> {
    let faults = FaultStore::new(Arc::new(memory.clone()) as Arc<dyn Store>);
    let repo = Repository::open(Arc::new(faults.clone())).await.ok()?;
    faults.jitter(rng.random(), Duration::from_millis(2));
    faults.schedule(rng.random(), rng.random_range(0..8));
    Some(repo)
}

/// Something is done for a while, or killed in the middle of it.
async fn perhaps_killed<T>(rng: &mut StdRng, work: impl Future<Output = T>) -> Option<T> {
    match rng.random_bool(0.15) {
        true => tokio::time::timeout(Duration::from_millis(rng.random_range(1..40)), work).await.ok(),
        false => Some(work.await),
    }
}

/// What must not happen: that anything named is missing or wrong. All else may fail.
fn harmless(error: &RepoError) -> bool {
    error.is_transient()
        || matches!(
            error,
            RepoError::NotFastForward { .. }
                | RepoError::NameTaken { .. }
                | RepoError::NoBranch { .. }
                | RepoError::Swept { .. }
                | RepoError::SweepUnderWay { .. }
                | RepoError::HoldLapsed { .. }
                | RepoError::Store(horcrux::store::StoreError::Conflict { .. })
        )
}

async fn pusher(memory: MemStore, world: Shared, seed: u64, branch: &'static str) {
    let mut rng = StdRng::seed_from_u64(seed);
    for _ in 0..4 {
        // So that some begin, and some end, in the middle of a gc.
        tokio::time::sleep(Duration::from_millis(rng.random_range(0..40))).await;
        let Some(repo) = way(&memory, &mut rng).await else { continue };
        let values: Vec<u8> = (0..BLOCKS).map(|_| rng.random_range(0..6)).collect();
        let number = rng.random_range(0..1_000_000_000);
        let work = push(&repo, branch, &values, number);
        let Some(pushed) = perhaps_killed(&mut rng, work).await else { continue };
        match pushed {
            Ok(id) => {
                let mut world = world.lock();
                world.commits.insert(id);
                world.done[0] += 1;
                if branch == "main" {
                    world.acknowledged.push((id, values));
                }
            }
            // The tip of the other branch may be of one that was deleted: what it stood on may go while it is read.
            Err(RepoError::Missing { .. }) if branch != "main" => {}
            Err(error) => assert!(harmless(&error), "a push to {branch}: {error}"),
        }
    }
}

/// Reads old versions of `main`, slowly.
async fn reader(memory: MemStore, world: Shared, seed: u64) {
    let mut rng = StdRng::seed_from_u64(seed);
    for _ in 0..6 {
        tokio::time::sleep(Duration::from_millis(rng.random_range(0..8))).await;
        let chosen = {
            let world = world.lock();
            let count = world.acknowledged.len();
            (count > 0).then(|| world.acknowledged[rng.random_range(0..count)].clone())
        };
        let (Some((id, values)), Some(repo)) = (chosen, way(&memory, &mut rng).await) else { continue };
        match read(&repo, id).await {
            Ok(there) => {
                assert_eq!(there, values);
                world.lock().done[1] += 1;
            }
            Err(error) => assert!(error.is_transient(), "an old version of main: {error}"),
        }
    }
}

/// Deletes the other branch, reads on with a hold, and names old commits again.
async fn deleter(memory: MemStore, world: Shared, seed: u64) {
    let mut rng = StdRng::seed_from_u64(seed);
    let (name, side): (_, BranchName) = (image("a"), "side".parse().unwrap());
    for _ in 0..5 {
        tokio::time::sleep(Duration::from_millis(rng.random_range(0..20))).await;
        let Some(repo) = way(&memory, &mut rng).await else { continue };
        let Ok(Some(tip)) = repo.branch(&name, &side).await else {
            let chosen = {
                let world = world.lock();
                let count = world.commits.len();
                (count > 0).then(|| *world.commits.iter().nth(rng.random_range(0..count)).unwrap())
            };
            let Some(id) = chosen else { continue };
            match naming::create_branch(&repo, &name, &side, id, hold()).await {
                Ok(_) => world.lock().done[2] += 1,
                // It may be gone, or half gone: then it is not named.
                Err(RepoError::Missing { .. }) => {}
                Err(error) => assert!(harmless(&error), "naming {id}: {error}"),
            }
            continue;
        };
        let held = Hold::read(&repo, &name, vec![tip.commit], hold()).await;
        let truth = match &held {
            Ok(_) => read(&repo, tip.commit).await.ok(),
            Err(_) => None,
        };
        match naming::delete_branch(&repo, &name, &side, true).await {
            Ok(_) => world.lock().done[3] += 1,
            Err(error) => assert!(harmless(&error), "deleting: {error}"),
        }
        if let (Ok(held), Some(truth)) = (held, truth) {
            for _ in 0..3 {
                tokio::time::sleep(Duration::from_millis(rng.random_range(0..10))).await;
                match read(&repo, tip.commit).await {
                    Ok(there) => assert_eq!(there, truth),
                    Err(error) => assert!(error.is_transient(), "a version that is held: {error}"),
                }
            }
            held.release().await;
        }
    }
}

async fn collector(memory: MemStore, world: Shared, seed: u64) {
    let mut rng = StdRng::seed_from_u64(seed);
    for _ in 0..8 {
        tokio::time::sleep(Duration::from_millis(rng.random_range(0..12))).await;
        let Some(repo) = way(&memory, &mut rng).await else { continue };
        let options = GcOptions { grace: Duration::ZERO, dry_run: false, holder: "collector".into() };
        let work = gc(&repo, None, &options);
        match perhaps_killed(&mut rng, work).await {
            None => {}
            Some(Ok(report)) => world.lock().done[4] += report.deleted.objects as usize,
            Some(Err(error)) => assert!(harmless(&error), "gc: {error}"),
        }
    }
}

/// Rounds of everybody at once; after each, all that is named is whole. Between them time passes, so that what the dead left does not count any more.
pub async fn schedule(seed: u64) {
    let mut rng = StdRng::seed_from_u64(seed);
    let memory = MemStore::new();
    let repo = Repository::create(Arc::new(memory.clone()), [7; 16]).await.unwrap();
    let world = Shared::default();
    for round in 0..3 {
        let mut next = || (memory.clone(), world.clone(), rng.random::<u64>());
        let mut actors = Vec::new();
        for branch in ["main", "side", "side"] {
            let (memory, world, seed) = next();
            actors.push(tokio::spawn(pusher(memory, world, seed, branch)));
        }
        for _ in 0..2 {
            let (memory, world, seed) = next();
            actors.push(tokio::spawn(reader(memory, world, seed)));
            let (memory, world, seed) = next();
            actors.push(tokio::spawn(collector(memory, world, seed)));
        }
        let (memory_, world_, seed_) = next();
        actors.push(tokio::spawn(deleter(memory_, world_, seed_)));
        for actor in actors {
            actor.await.unwrap_or_else(|error| panic!("seed {seed}, round {round}: {error}"));
        }
        check(&repo, &world, &format!("seed {seed}, round {round}")).await;
        memory.pass(Duration::from_secs(24 * 3600));
    }
    // When all are gone, so is what they left.
    let options = GcOptions { grace: Duration::ZERO, dry_run: false, holder: "the last".into() };
    for _ in 0..3 {
        gc(&repo, None, &options).await.unwrap();
    }
    check(&repo, &world, &format!("seed {seed}, in the end")).await;
    let report = horcrux::repo::fsck::fsck(&repo, None).await.unwrap();
    assert_eq!((report.unnamed, report.problems.len()), (0, 0), "seed {seed}: {report:?}");
    println!("seed {seed}: {:?}", world.lock().done);
}

async fn check(repo: &Repository, world: &Shared, when: &str) {
    let name = image("a");
    let (tips, problems) = roots(repo, &name).await.unwrap();
    assert!(problems.is_empty(), "{when}: {problems:?}");
    let report = verify(repo, &name, tips, true, &|_| {}).await.unwrap();
    assert!(report.problems.is_empty(), "{when}: {:?}", report.problems);
    let Some(main) = repo.branch(&name, &BranchName::default()).await.unwrap() else { return };
    let mut history = History::new(repo, &name, [main.commit], no_cache());
    let mut there = BTreeSet::new();
    while let Some(entry) = history.next().await.unwrap() {
        there.insert(entry.id);
    }
    for (id, values) in world.lock().acknowledged.clone() {
        assert!(there.contains(&id), "{when}: an acknowledged push is not in the history");
        assert_eq!(read(repo, id).await.unwrap(), values, "{when}");
    }
}
