//! Many at once on one device: writers of one page, fetches against writes, readers against slots that are used again, FLUSH against the writes of others,
//! and requests of connections that are gone.
#![allow(clippy::unwrap_used, reason = "a test that can't go on fails")]

mod common;
mod device_common;

use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use bytes::Bytes;
use device_common::{
    BLOCK, CHUNK, Image, PAGE, cache, create_layer, device, from_env, identity, joined, open_layer, range,
    read, stamp_of, stamped,
};
use horcrux::cache::Cache;
use horcrux::delta::disk::{Dir, File, OsDir};
use horcrux::delta::simulated::{Dice, SimulatedDisk};
use horcrux::device::{Device, DeviceError, Fence, Now};
use horcrux::store::counting::Method;
use horcrux::store::fault::Fault;
use horcrux::units::ByteOffset;
use rand::SeedableRng;
use rand::rngs::StdRng;
use tokio::runtime::Runtime;

struct World {
    runtime: Runtime,
    image: Image,
    cache: Arc<Cache>,
    _dir: tempfile::TempDir,
}

impl World {
    fn new(len: u64) -> World {
        let runtime = common::runtime();
        let image = Image::new(&runtime, common::noise(&mut StdRng::seed_from_u64(1), len as usize));
        let dir = tempfile::tempdir().unwrap();
        let cache = cache(&dir.path().join("cache"), 64);
        World { runtime, image, cache, _dir: dir }
    }

    fn device(&self, dir: Box<dyn Dir>) -> Arc<Device> {
        self.runtime.block_on(async {
            let size = self.image.bytes.len() as u64;
            let base = self.image.base(&self.cache).await;
            let layer = create_layer(dir, &identity(base.version(), size), 1).unwrap();
            device(base, vec![layer], size)
        })
    }

    fn reopen(&self, dir: Box<dyn Dir>) -> Arc<Device> {
        self.runtime.block_on(async {
            let size = self.image.bytes.len() as u64;
            let base = self.image.base(&self.cache).await;
            let layer = open_layer(dir, &identity(base.version(), size)).unwrap();
            device(base, vec![layer], size)
        })
    }

    /// From now on everything from the repository takes so long.
    fn slow(&self, delay: Duration) {
        self.image.store.always(Method::GetRange, "blocks", Fault::Slow(delay));
    }
}

fn os_dir(path: &Path) -> Box<dyn Dir> {
    Box::new(OsDir::new(path))
}

/// Writes at once if that can be, else waits: what a connection does.
async fn write(device: &Arc<Device>, fence: &Fence, at: u64, bytes: &[u8]) -> Result<(), DeviceError> {
    match device.write_now(fence, ByteOffset(at), bytes)? {
        Now::Done => Ok(()),
        Now::Wait => device.write(fence, ByteOffset(at), Bytes::copy_from_slice(bytes)).await,
    }
}

#[test]
fn parallel_writes_to_parts_of_one_page_lose_nothing() {
    const WRITERS: u64 = 24;
    const PART: u64 = 160;
    let world = World::new(BLOCK);
    world.slow(Duration::from_millis(20));
    // Each reads the page, changes it and writes it back: the slower the reads, the more of them at once.
    let device = world.device(Box::new(SlowReads(SimulatedDisk::new().dir())));
    // On a page border, so that some parts lie in two pages; nothing of it is here yet.
    let first = 5 * PAGE - WRITERS / 2 * PART - 3;
    let all = std::sync::Barrier::new(WRITERS as usize);
    let write_part = async |device: &Arc<Device>, writer: u64, round: u8| {
        let bytes = [round ^ writer as u8; PART as usize];
        let (fence, at) = (Fence::new(), first + writer * PART);
        if round < 50 {
            write(device, &fence, at, &bytes).await.unwrap();
        } else {
            // Those who wait would keep each other waiting, and nothing would be done at once.
            while device.write_now(&fence, ByteOffset(at), &bytes).unwrap() == Now::Wait {
                std::thread::yield_now();
            }
        }
        let found = read(device, at, PART).await;
        assert!(found == bytes, "writer {writer} does not read its own write of round {round}");
    };
    std::thread::scope(|scope| {
        for writer in 0..WRITERS {
            let (device, world, write_part, all) = (device.clone(), &world, &write_part, &all);
            scope.spawn(move || {
                (0..50).for_each(|round| world.runtime.block_on(write_part(&device, writer, round)));
                all.wait();
                (50..100).for_each(|round| world.runtime.block_on(write_part(&device, writer, round)));
            });
        }
    });
    let mut expected = world.image.bytes.clone();
    for writer in 0..WRITERS {
        expected[(first + writer * PART) as usize..][..PART as usize].fill(99 ^ writer as u8);
    }
    assert!(world.runtime.block_on(read(&device, 0, BLOCK)) == expected);
}

#[test]
fn a_fetch_never_hides_a_write_that_was_acknowledged_while_it_was_under_way() {
    let world = World::new(4 * BLOCK);
    let device = world.device(SimulatedDisk::new().dir());
    world.slow(Duration::from_millis(40));
    world.runtime.block_on(async {
        for chunk in 0..20 {
            let start = chunk * CHUNK;
            let reading = {
                let device = device.clone();
                tokio::spawn(async move { read(&device, start, CHUNK).await })
            };
            tokio::time::sleep(Duration::from_millis(5)).await;
            // A whole page needs nothing of what is on its way.
            let page = start / PAGE + 3;
            let done = device.write_now(&Fence::new(), ByteOffset(page * PAGE), &stamped(page, 1)).unwrap();
            assert_eq!(done, Now::Done);
            // A part of another does, and shares the fetch.
            write(&device, &Fence::new(), start + 7 * PAGE + 100, &[7; 50]).await.unwrap();
            let mut expected = world.image.bytes[start as usize..(start + CHUNK) as usize].to_vec();
            let old = expected.clone();
            expected[3 * PAGE as usize..4 * PAGE as usize].copy_from_slice(&stamped(page, 1));
            expected[7 * PAGE as usize + 100..][..50].fill(7);
            assert!(read(&device, start, CHUNK).await == expected, "chunk {chunk}");
            let raced = reading.await.unwrap();
            for (number, found) in raced.chunks(PAGE as usize).enumerate() {
                let place = number * PAGE as usize..(number + 1) * PAGE as usize;
                assert!(
                    *found == old[place.clone()] || *found == expected[place],
                    "chunk {chunk} page {number}"
                );
            }
        }
    });
}

#[test]
fn a_whole_page_written_while_a_part_of_it_waits_for_a_fetch_comes_after_it() {
    let world = World::new(2 * BLOCK);
    let device = world.device(SimulatedDisk::new().dir());
    world.slow(Duration::from_millis(60));
    world.runtime.block_on(async {
        for chunk in 0..10 {
            let page = chunk * CHUNK / PAGE + 2;
            let slow = {
                let device = device.clone();
                let write = async move {
                    device
                        .write(&Fence::new(), ByteOffset(page * PAGE + 10), Bytes::from_static(&[9; 9]))
                        .await
                };
                tokio::spawn(write)
            };
            tokio::time::sleep(Duration::from_millis(10)).await;
            let bytes = stamped(page, 5);
            let tried = device.write_now(&Fence::new(), ByteOffset(page * PAGE), &bytes).unwrap();
            assert_eq!(tried, Now::Wait, "the page is being read, changed and written back");
            write(&device, &Fence::new(), page * PAGE, &bytes).await.unwrap();
            // It was there first: what it wrote is gone.
            assert!(read(&device, page * PAGE, PAGE).await == bytes);
            slow.await.unwrap().unwrap();
        }
    });
}

#[test]
fn overlapping_writes_come_one_after_the_other() {
    const PAGES: u64 = 200;
    let world = World::new(BLOCK);
    let device = world.device(SimulatedDisk::new().dir());
    for round in 0..30 {
        std::thread::scope(|scope| {
            for writer in 1..=4 {
                let (device, world) = (device.clone(), &world);
                let bytes: Vec<u8> = (0..PAGES).flat_map(|page| stamped(page, round * 10 + writer)).collect();
                scope.spawn(move || {
                    world.runtime.block_on(write(&device, &Fence::new(), 0, &bytes)).unwrap();
                });
            }
        });
        let found = world.runtime.block_on(read(&device, 0, PAGES * PAGE));
        let stamps: Vec<_> = found
            .chunks(PAGE as usize)
            .zip(0..)
            .map(|(bytes, page)| stamp_of(page, bytes).unwrap())
            .collect();
        assert!(stamps.iter().all(|stamp| *stamp == stamps[0]), "round {round}: {stamps:?}");
    }
}

/// Pages that several threads overwrite, each page by one of them, with rising stamps.
struct Stamps {
    /// What was told to be written, by page; a failed write may count too.
    begun: Vec<AtomicU64>,
    /// What was acknowledged.
    done: Vec<AtomicU64>,
    stop: AtomicBool,
}

impl Stamps {
    fn new(pages: u64) -> Stamps {
        let zeros = || (0..pages).map(|_| AtomicU64::new(0)).collect();
        Stamps { begun: zeros(), done: zeros(), stop: AtomicBool::new(false) }
    }

    fn values(of: &[AtomicU64]) -> Vec<u64> {
        of.iter().map(|stamp| stamp.load(Ordering::SeqCst)).collect()
    }

    /// Writes runs of pages among `pages` until told to stop, or until the device fails.
    fn write(&self, world: &World, device: &Arc<Device>, pages: std::ops::Range<u64>, seed: u64) {
        let mut dice = Dice(seed);
        let mut stamp = 0;
        while !self.stop.load(Ordering::SeqCst) {
            stamp += 1;
            let first = pages.start + dice.below(pages.end - pages.start);
            let run = first..(first + 1 + dice.below(8)).min(pages.end);
            let bytes: Vec<u8> = run.clone().flat_map(|page| stamped(page, stamp)).collect();
            run.clone().for_each(|page| self.begun[page as usize].store(stamp, Ordering::SeqCst));
            if world.runtime.block_on(write(device, &Fence::new(), run.start * PAGE, &bytes)).is_err() {
                return;
            }
            run.for_each(|page| self.done[page as usize].store(stamp, Ordering::SeqCst));
        }
    }
}

/// Ends the writers however the test ends.
struct Stop<'a>(&'a Stamps);

impl Drop for Stop<'_> {
    fn drop(&mut self) {
        self.0.stop.store(true, Ordering::SeqCst);
    }
}

/// A disk whose reads take their time, so that much happens between the look at the map and the read.
struct SlowReads<T>(T);

impl Dir for SlowReads<Box<dyn Dir>> {
    fn create(&self, name: &str) -> io::Result<Box<dyn File>> {
        Ok(Box::new(SlowReads(self.0.create(name)?)))
    }

    fn open(&self, name: &str) -> io::Result<Box<dyn File>> {
        Ok(Box::new(SlowReads(self.0.open(name)?)))
    }

    fn rename(&self, from: &str, to: &str) -> io::Result<()> {
        self.0.rename(from, to)
    }

    fn remove(&self, name: &str) -> io::Result<()> {
        self.0.remove(name)
    }

    fn sync(&self) -> io::Result<()> {
        self.0.sync()
    }

    fn boot(&self) -> [u8; 16] {
        self.0.boot()
    }

    fn describe(&self, name: &str) -> PathBuf {
        self.0.describe(name)
    }
}

impl File for SlowReads<Box<dyn File>> {
    fn read_at(&self, buf: &mut [u8], at: u64) -> io::Result<()> {
        std::thread::sleep(Duration::from_micros(100));
        self.0.read_at(buf, at)
    }

    fn read_at_nowait(&self, buf: &mut [u8], at: u64) -> io::Result<bool> {
        std::thread::sleep(Duration::from_micros(100));
        self.0.read_at_nowait(buf, at)
    }

    fn write_at(&self, bytes: &[u8], at: u64) -> io::Result<()> {
        self.0.write_at(bytes, at)
    }

    fn sync(&self) -> io::Result<()> {
        self.0.sync()
    }

    fn len(&self) -> io::Result<u64> {
        self.0.len()
    }

    fn set_len(&self, len: u64) -> io::Result<()> {
        self.0.set_len(len)
    }

    fn punch(&self, at: u64, len: u64) -> io::Result<()> {
        self.0.punch(at, len)
    }
}

/// Pages that are read while others overwrite and flush them: enough for slots to be used again all the time.
const READ_PAGES: u64 = 240;

fn read_while_others_write(world: &World, device: &Arc<Device>) {
    for page in 0..READ_PAGES {
        device.write_now(&Fence::new(), ByteOffset(page * PAGE), &stamped(page, 0)).unwrap();
    }
    let stamps = Stamps::new(READ_PAGES);
    let end = std::time::Instant::now() + Duration::from_secs(3);
    std::thread::scope(|scope| {
        let _stop = Stop(&stamps);
        for writer in 0..2 {
            let (device, stamps) = (device.clone(), &stamps);
            let pages = writer * READ_PAGES / 2..(writer + 1) * READ_PAGES / 2;
            scope.spawn(move || stamps.write(world, &device, pages, writer + 1));
        }
        let (flushed, stamps_of_flusher) = (device.clone(), &stamps);
        scope.spawn(move || {
            while !stamps_of_flusher.stop.load(Ordering::SeqCst) {
                flushed.flush().unwrap();
            }
        });
        let mut dice = Dice(3);
        let mut reads = 0u64;
        while std::time::Instant::now() < end {
            let first = dice.below(READ_PAGES);
            let count = 1 + dice.below(READ_PAGES - first);
            let wanted = range(first * PAGE, count * PAGE);
            let floor = Stamps::values(&stamps.done);
            let mut pieces = Vec::new();
            if device.read_now(wanted, &mut pieces).unwrap() == Now::Wait {
                pieces = world.runtime.block_on(device.read(wanted)).unwrap();
            }
            let ceiling = Stamps::values(&stamps.begun);
            for (bytes, page) in joined(&pieces).chunks(PAGE as usize).zip(first..) {
                let stamp = stamp_of(page, bytes).unwrap();
                let allowed = floor[page as usize]..=ceiling[page as usize];
                assert!(allowed.contains(&stamp), "page {page}: stamp {stamp}, not in {allowed:?}");
            }
            reads += 1;
        }
        assert!(reads > 20, "{reads} reads are no test");
    });
}

#[test]
fn readers_see_whole_versions_no_older_than_acknowledged_while_pages_are_written_in_place() {
    let world = World::new(BLOCK);
    let dir = tempfile::tempdir().unwrap();
    let device = world.device(os_dir(dir.path()));
    read_while_others_write(&world, &device);
    let len = std::fs::metadata(dir.path().join("data")).unwrap().len();
    assert!(len < 40 * READ_PAGES * PAGE, "slots were not used again: {len} bytes for {READ_PAGES} pages");
}

#[test]
fn slow_readers_see_whole_versions_while_slots_are_used_again() {
    let world = World::new(BLOCK);
    let device = world.device(Box::new(SlowReads(SimulatedDisk::new().dir())));
    read_while_others_write(&world, &device);
}

#[test]
fn a_flush_covers_what_was_acknowledged_to_others_before_it() {
    const PAGES: u64 = 60;
    const WRITERS: u64 = 3;
    let world = World::new(BLOCK);
    for seed in 1..=from_env("HORCRUX_SEQUENCES", 60).min(2000) {
        let disk = SimulatedDisk::new();
        let device = world.device(disk.dir());
        (0..PAGES).for_each(|page| {
            device.write_now(&Fence::new(), ByteOffset(page * PAGE), &stamped(page, 0)).unwrap();
        });
        device.flush().unwrap();
        let mut dice = Dice(seed);
        disk.cut_power_after(dice.below(40));
        let stamps = Stamps::new(PAGES);
        let floor = parking_lot::Mutex::new(vec![0; PAGES as usize]);
        std::thread::scope(|scope| {
            let _stop = Stop(&stamps);
            for writer in 0..WRITERS {
                let (device, world, stamps) = (device.clone(), &world, &stamps);
                let pages = writer * PAGES / WRITERS..(writer + 1) * PAGES / WRITERS;
                scope.spawn(move || stamps.write(world, &device, pages, seed * 10 + writer));
            }
            // Two who flush: the commit of one may serve the other.
            let flushers: Vec<_> = (0..2)
                .map(|_| {
                    let (device, stamps, floor) = (device.clone(), &stamps, &floor);
                    scope.spawn(move || {
                        loop {
                            let acknowledged = Stamps::values(&stamps.done);
                            if device.flush().is_err() {
                                break;
                            }
                            let mut floor = floor.lock();
                            floor
                                .iter_mut()
                                .zip(acknowledged)
                                .for_each(|(floor, done)| *floor = done.max(*floor));
                        }
                    })
                })
                .collect();
            flushers.into_iter().for_each(|flusher| flusher.join().unwrap());
        });
        drop(device);
        let device = world.reopen(disk.crash(&mut dice).dir());
        let found = world.runtime.block_on(read(&device, 0, PAGES * PAGE));
        let (floor, begun) = (floor.into_inner(), Stamps::values(&stamps.begun));
        for (page, bytes) in found.chunks(PAGE as usize).enumerate() {
            let stamp = stamp_of(page as u64, bytes).unwrap_or_else(|error| panic!("seed {seed}: {error}"));
            let allowed = floor[page]..=begun[page];
            assert!(allowed.contains(&stamp), "seed {seed} page {page}: stamp {stamp}, not in {allowed:?}");
        }
    }
}

/// The kernel sends a write again over a new connection when one dies: what the old one still has must not come after it.
#[test]
fn a_write_of_a_fenced_connection_that_waits_for_a_fetch_never_lands() {
    let world = World::new(2 * BLOCK);
    let device = world.device(SimulatedDisk::new().dir());
    world.slow(Duration::from_millis(60));
    world.runtime.block_on(async {
        for chunk in 0..10 {
            let at = chunk * CHUNK + 2 * PAGE + 10;
            let dead = Arc::new(Fence::new());
            let stale = {
                let (device, dead) = (device.clone(), dead.clone());
                tokio::spawn(async move {
                    device.write(&dead, ByteOffset(at), Bytes::from_static(&[1; 100])).await
                })
            };
            tokio::time::sleep(Duration::from_millis(10)).await;
            dead.close();
            let alive = Fence::new();
            write(&device, &alive, at, &[2; 50]).await.unwrap();
            write(&device, &alive, at, &[3; 50]).await.unwrap();
            assert!(matches!(stale.await.unwrap(), Err(DeviceError::Fenced)));
            let mut expected = world.image.bytes[at as usize..][..100].to_vec();
            expected[..50].fill(3);
            assert!(read(&device, at, 100).await == expected, "chunk {chunk}");
            assert!(matches!(device.write_now(&dead, ByteOffset(at), &[1; 8]), Err(DeviceError::Fenced)));
            assert!(matches!(
                device.trim_now(&dead, range(at / PAGE * PAGE, PAGE)),
                Err(DeviceError::Fenced)
            ));
            assert!(matches!(device.zero(&dead, range(at, 8)).await, Err(DeviceError::Fenced)));
        }
    });
}

#[test]
fn nothing_of_a_connection_changes_a_page_once_its_fence_is_closed() {
    const PAGES: u64 = 16;
    let world = World::new(BLOCK);
    let device = world.device(SimulatedDisk::new().dir());
    for round in 1..=200 {
        let dead = Arc::new(Fence::new());
        std::thread::scope(|scope| {
            for writer in 0..3 {
                let (device, world, dead) = (device.clone(), &world, dead.clone());
                scope.spawn(move || {
                    let mut dice = Dice(round * 10 + writer);
                    loop {
                        let page = dice.below(PAGES);
                        let at = page * PAGE + dice.below(2) * 512;
                        match world.runtime.block_on(write(&device, &dead, at, &stamped(page, 1)[..512])) {
                            Ok(()) => {}
                            Err(DeviceError::Fenced) => return,
                            Err(error) => panic!("{error}"),
                        }
                    }
                });
            }
            std::thread::sleep(Duration::from_micros(200));
            dead.close();
            let newer: Vec<u8> = (0..PAGES).flat_map(|page| stamped(page, 1 + round)).collect();
            world.runtime.block_on(write(&device, &Fence::new(), 0, &newer)).unwrap();
            let found = world.runtime.block_on(read(&device, 0, PAGES * PAGE));
            assert!(found == newer, "round {round}");
        });
        let found = world.runtime.block_on(read(&device, 0, PAGES * PAGE));
        for (page, bytes) in (0..).zip(found.chunks(PAGE as usize)) {
            assert_eq!(stamp_of(page, bytes), Ok(1 + round), "after round {round}");
        }
    }
}

#[test]
fn reads_that_span_blocks_find_the_delta_where_it_is() {
    let world = World::new(4 * BLOCK);
    let device = world.device(SimulatedDisk::new().dir());
    let mut expected = world.image.bytes.clone();
    world.runtime.block_on(async {
        let writes = [
            (BLOCK + 12_345, 300_000),
            (BLOCK - 5, 10),
            (3 * BLOCK - PAGE, 2 * PAGE),
            (4 * BLOCK - 1, 1),
            (7, 1),
        ];
        for (at, len) in writes {
            let bytes: Vec<u8> = (0..len).map(|n| (at + n) as u8 ^ 0x55).collect();
            write(&device, &Fence::new(), at, &bytes).await.unwrap();
            expected[at as usize..(at + len) as usize].copy_from_slice(&bytes);
        }
        for (at, len) in
            [(0, 4 * BLOCK), (BLOCK - 100, 2 * BLOCK + 200), (12_345, 3 * BLOCK), (4 * BLOCK - 9, 9)]
        {
            assert!(
                read(&device, at, len).await == expected[at as usize..(at + len) as usize],
                "{len} from {at}"
            );
        }
    });
}
