//! Crashes of a delta that need more than one failure, or two threads, to do harm.
#![allow(clippy::unwrap_used, reason = "a test that can't go on fails")]

use std::collections::HashSet;
use std::io;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use horcrux::delta::disk::{Dir, File};
use horcrux::delta::simulated::{Dice, SimulatedDisk};
use horcrux::delta::{Delta, DeltaError, Identity, Layer, LayerId, Source, VolumeId};
use horcrux::format::CommitId;
use horcrux::units::{ByteLen, PAGE_SIZE, PageIndex};
use parking_lot::Mutex;

const PAGE: usize = PAGE_SIZE as usize;

fn identity() -> Identity {
    Identity {
        base: CommitId::of(b"the base"),
        volume: VolumeId([1; 16]),
        device_size: ByteLen(4096 * PAGE_SIZE),
    }
}

fn create(dir: Box<dyn Dir>) -> Delta {
    Delta::new(vec![Arc::new(Layer::create(dir, &identity(), LayerId([2; 16])).unwrap())])
}

fn open(disk: &SimulatedDisk) -> Delta {
    Delta::new(vec![Arc::new(Layer::open(disk.dir(), &identity()).unwrap())])
}

/// The first byte of a page of equal bytes; 0 for a page that is zeros.
fn read(delta: &Delta, page: u64) -> u8 {
    let run = delta.run(PageIndex(page), 1);
    match run.source {
        Source::Base => panic!("page {page} was written"),
        Source::Zero => 0,
        Source::Data { .. } => {
            let mut bytes = vec![0; PAGE];
            delta.read(&run, 0, &mut bytes).unwrap();
            assert!(bytes.iter().all(|byte| *byte == bytes[0]), "page {page} is torn");
            bytes[0]
        }
    }
}

/// The disk refuses to note what a commit will be: the flush fails, and so does all that comes after. It does not hang.
#[test]
fn a_tail_that_can_t_be_written_fails_the_flush_and_what_comes_after() {
    let disk = SimulatedDisk::new();
    let delta = create(disk.dir());
    delta.write(PageIndex(0), &[1; PAGE]).unwrap();
    disk.fail_write_after(0);
    let (told, flushed) = std::sync::mpsc::channel();
    std::thread::spawn(move || {
        let first = delta.flush().map_err(|error| error.to_string());
        let second = delta.write(PageIndex(1), &[2; PAGE]).map_err(|error| error.to_string());
        told.send((first, second)).unwrap();
    });
    let (first, second) = flushed.recv_timeout(Duration::from_secs(10)).expect("it hangs");
    assert!(first.unwrap_err().starts_with("can't write simulated/tail.0"));
    assert!(second.unwrap_err().contains("read-only since an fsync failed"));
    // Nobody was told that it is flushed.
    let delta = open(&disk);
    assert!(matches!(delta.run(PageIndex(0), 1).source, Source::Base));
}

/// A server is killed after it wrote a commit and before it synced it. The next one finds the commit, because the kernel still has it; then the power goes.
#[test]
fn a_commit_that_only_the_page_cache_has_is_made_durable_before_its_slots_are_used_again() {
    for seed in 0..200 {
        let disk = SimulatedDisk::new();
        let delta = create(disk.dir());
        delta.write(PageIndex(0), &[1; PAGE]).unwrap();
        delta.flush().unwrap();
        delta.zero(PageIndex(0), 1).unwrap();
        // The frame is in the file, the sync does not happen.
        disk.kill_at_next_sync(None);
        delta.flush().unwrap_err();
        drop(delta);

        let delta = open(&disk);
        assert_eq!(read(&delta, 0), 0);
        delta.write(PageIndex(1), &[2; PAGE]).unwrap();
        drop(delta);
        let disk = disk.crash(&mut Dice(seed));
        let found = read(&open(&disk), 0);
        assert!(found <= 1, "seed {seed}: page 0 reads as page 1 did");
    }
}

/// A layer is sealed, and can't be made durable: no FLUSH will do well any more, so no write may be taken either.
#[test]
fn a_sealed_layer_whose_fsync_failed_ends_the_writes_to_the_one_above_it() {
    let (below, above) = (SimulatedDisk::new(), SimulatedDisk::new());
    let delta = create(below.dir());
    delta.write(PageIndex(0), &[1; PAGE]).unwrap();
    let top = Layer::create(above.dir(), &identity(), LayerId([3; 16])).unwrap();
    let stacked = delta.with_top(Arc::new(top));
    delta.seal_top(|| ());
    stacked.write(PageIndex(1), &[2; PAGE]).unwrap();
    below.fail_next_sync(&mut Dice(1));
    stacked.flush().unwrap_err();
    stacked.write(PageIndex(2), &[3; PAGE]).unwrap_err();
    stacked.zero(PageIndex(3), 1).unwrap_err();
    stacked.flush().unwrap_err();
}

/// A layer that is settled may be shared: nothing that comes late writes to its files, not even what would leave them saying the same.
#[test]
fn a_flush_over_an_old_view_leaves_a_settled_layer_alone() {
    let disk = SimulatedDisk::new();
    let layer = Layer::create(disk.dir(), &identity(), LayerId([2; 16])).unwrap();
    let delta = Delta::new(vec![Arc::new(layer.rewrite_log_above(ByteLen(1)))]);
    for round in 0..64 {
        delta.write(PageIndex(0), &[round; PAGE]).unwrap();
        delta.flush().unwrap();
    }
    delta.seal_top(|| ());
    delta.layers()[0].settle().unwrap();
    let (len, syncs) = (disk.file_len("map"), disk.syncs());
    for _ in 0..8 {
        delta.flush().unwrap();
    }
    assert_eq!((disk.file_len("map"), disk.syncs()), (len, syncs));
}

/// The log's fsync fails: the kernel calls its pages clean although they may not be on the disk, and says so to nobody else. The next server
/// reads them from memory; then the power goes.
#[test]
fn a_commit_whose_fsync_failed_is_not_believed_by_the_next_server() {
    for seed in 0..400 {
        let mut dice = Dice(seed);
        let disk = SimulatedDisk::new();
        let delta = create(disk.dir());
        delta.write(PageIndex(0), &[1; PAGE]).unwrap();
        delta.flush().unwrap();
        delta.zero(PageIndex(0), 1).unwrap();
        if seed % 2 == 0 {
            disk.fail_next_sync(&mut dice);
        } else {
            // And the server is killed before it hears of it.
            disk.kill_at_next_sync(Some(&mut dice));
        }
        delta.flush().unwrap_err();
        drop(delta);

        if seed % 3 == 0 {
            // The first server that opens it meets a failure too, the second does not.
            disk.fail_next_sync(&mut dice);
            assert!(Layer::open(disk.dir(), &identity()).is_err(), "seed {seed}");
        }
        let delta = open(&disk);
        // Takes the slot of page 0, if the server believes that page 0 is zero.
        delta.write(PageIndex(1), &[2; PAGE]).unwrap();
        delta.flush().unwrap();
        let seen = read(&delta, 0);
        delta.write(PageIndex(2), &[3; PAGE]).unwrap();
        drop(delta);
        let delta = open(&disk.crash(&mut dice));
        assert_eq!((read(&delta, 0), read(&delta, 1)), (seen, 2), "seed {seed}");
    }
}

/// With the disk full, trims go on being acknowledged while no commit succeeds.
#[test]
fn records_that_no_commit_takes_are_bounded_however_often_a_flush_fails() {
    let disk = SimulatedDisk::new();
    let delta = create(disk.dir());
    disk.limit_space(Some(0));
    let mut refused = false;
    for round in 0..200 {
        for page in 0..50_000u64 {
            // Every other page, so that no two records join.
            match delta.zero(PageIndex((2 * page + round % 2) % 4096), 1) {
                Ok(()) => {}
                Err(DeltaError::Full { .. }) => refused = true,
                Err(other) => panic!("{other}"),
            }
        }
        if refused {
            break;
        }
        assert!(matches!(delta.flush(), Err(DeltaError::Full { .. })), "round {round}");
    }
    assert!(refused, "10 million records were taken");
    disk.limit_space(None);
    delta.flush().unwrap();
    delta.zero(PageIndex(0), 1).unwrap();
}

/// A file `data` that knows which writes were not synced since, and can be told to be slow. It keeps no bytes.
#[derive(Default)]
struct Watched {
    unsynced: Mutex<HashSet<u64>>,
    syncs: AtomicU64,
    slow: AtomicBool,
}

struct WatchedDir(SimulatedDisk, Arc<Watched>);
struct WatchedData(Arc<Watched>);

impl Dir for WatchedDir {
    fn create(&self, name: &str) -> io::Result<Box<dyn File>> {
        let file = self.0.create(name)?;
        Ok(if name == "data" { Box::new(WatchedData(self.1.clone())) } else { file })
    }
    fn open(&self, name: &str) -> io::Result<Box<dyn File>> {
        self.0.open(name)
    }
    fn rename(&self, from: &str, to: &str) -> io::Result<()> {
        self.0.rename(from, to)
    }
    fn remove(&self, name: &str) -> io::Result<()> {
        self.0.remove(name)
    }
    fn sync(&self) -> io::Result<()> {
        Dir::sync(&self.0)
    }
    fn boot(&self) -> [u8; 16] {
        self.0.boot()
    }
    fn describe(&self, name: &str) -> PathBuf {
        self.0.describe(name)
    }
}

impl File for WatchedData {
    fn read_at(&self, _buf: &mut [u8], _at: u64) -> io::Result<()> {
        Ok(())
    }
    fn read_at_nowait(&self, _buf: &mut [u8], _at: u64) -> io::Result<bool> {
        Ok(true)
    }
    fn write_at(&self, _bytes: &[u8], at: u64) -> io::Result<()> {
        if self.0.slow.load(Ordering::Relaxed) {
            std::thread::sleep(Duration::from_millis(30));
        }
        self.0.unsynced.lock().insert(at);
        Ok(())
    }
    fn sync(&self) -> io::Result<()> {
        self.0.unsynced.lock().clear();
        self.0.syncs.fetch_add(1, Ordering::SeqCst);
        Ok(())
    }
    fn len(&self) -> io::Result<u64> {
        Ok(0)
    }
    fn set_len(&self, _len: u64) -> io::Result<()> {
        Ok(())
    }
    fn punch(&self, _at: u64, _len: u64) -> io::Result<()> {
        Ok(())
    }
}

/// One thread flushes; another is in the middle of a write when that flush syncs. What it wrote must be synced by its own flush.
#[test]
fn a_write_that_lands_after_the_sync_of_another_flush_is_synced_by_its_own() {
    const PAGES: u64 = 1 << 20;
    let watched = Arc::new(Watched::default());
    let identity = Identity { device_size: ByteLen(PAGES * PAGE_SIZE), ..identity() };
    let dir = Box::new(WatchedDir(SimulatedDisk::new(), watched.clone()));
    let delta = Delta::new(vec![Arc::new(Layer::create(dir, &identity, LayerId([2; 16])).unwrap())]);
    // A million slots that are let go one by one: moving their list keeps the flush busy between its capture and its sync.
    for page in (0..PAGES).step_by(2).chain((1..PAGES).step_by(2)) {
        delta.write(PageIndex(page), &[1; PAGE]).unwrap();
    }
    delta.flush().unwrap();
    delta.zero(PageIndex(0), PAGES).unwrap();
    delta.write(PageIndex(1), &[1; PAGE]).unwrap();
    watched.slow.store(true, Ordering::Relaxed);
    let before = watched.syncs.load(Ordering::SeqCst);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            std::thread::sleep(Duration::from_millis(10));
            delta.flush().unwrap();
        });
        while watched.syncs.load(Ordering::SeqCst) == before {
            delta.write(PageIndex(0), &[1; PAGE]).unwrap();
        }
    });
    delta.flush().unwrap();
    assert!(watched.unsynced.lock().is_empty(), "a durable commit names a page that was never synced");
}
