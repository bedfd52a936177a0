//! Devices of terabytes: what costs by extents must not cost by bytes, and no request takes the server long.
#![allow(clippy::unwrap_used, reason = "a test that can't go on fails")]

mod common;
mod device_common;

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use device_common::{
    BLOCK, CHUNK, Image, PAGE, cache, create_layer, device, identity, open_layer, range, read, stamped,
};
use horcrux::delta::disk::OsDir;
use horcrux::device::{Allocation, Base, Device, Dirty, Extent, Fence, Now};
use horcrux::repo::{ImageWriter, MetaCache, Reference, Version, VersionOptions, WriterParams};
use horcrux::store::{CountingStore, MemStore};
use horcrux::units::{ByteLen, ByteOffset};
use rand::SeedableRng;
use rand::rngs::StdRng;

const TIB: u64 = 1 << 40;
const MIB: u64 = 1 << 20;
/// What a request that moves no data may take, on a busy machine.
const SOON: Duration = Duration::from_secs(1);

fn noise(len: u64) -> Vec<u8> {
    common::noise(&mut StdRng::seed_from_u64(3), len as usize)
}

fn soon<T>(what: &str, work: impl FnOnce() -> T) -> T {
    let start = Instant::now();
    let done = work();
    assert!(start.elapsed() < SOON, "{what} took {:?}", start.elapsed());
    done
}

/// All extents of a range, asked for piece by piece as a client does; each answer must be one.
fn walk<T: PartialEq + Copy + std::fmt::Debug>(
    size: u64,
    most: usize,
    ask: impl Fn(u64) -> Vec<Extent<T>>,
) -> Vec<Extent<T>> {
    let mut all: Vec<Extent<T>> = Vec::new();
    let mut at = 0;
    while at < size {
        let found = ask(at);
        assert!((1..=most).contains(&found.len()), "{} extents, asked for 1 to {most}", found.len());
        assert!(found.iter().all(|extent| extent.len.0 > 0), "an empty extent at {at}");
        assert!(found.windows(2).all(|two| two[0].state != two[1].state), "neighbours alike at {at}");
        for extent in found {
            at += extent.len.0;
            match all.last_mut() {
                Some(last) if last.state == extent.state => last.len.0 += extent.len.0,
                _ => all.push(extent),
            }
        }
    }
    assert_eq!(at, size, "extents past the end");
    all
}

fn extents<T: Copy>(parts: &[(u64, T)]) -> Vec<Extent<T>> {
    parts.iter().map(|&(len, state)| Extent { len: ByteLen(len), state }).collect()
}

#[test]
fn a_thin_image_of_16_tib_opens_reads_writes_and_tells_its_status_at_once() {
    const SIZE: u64 = 16 * TIB;
    let runtime = common::runtime();
    let store = Arc::new(CountingStore::new(Arc::new(MemStore::new())));
    let repository = common::create(&runtime, store.clone());
    let name = common::image("thin");
    let mut writer =
        ImageWriter::new(runtime.handle(), &repository, &name, WriterParams::new(ByteLen(SIZE))).unwrap();
    let bytes = noise(MIB);
    for hole in [7 * TIB, SIZE - 7 * TIB - 3 * MIB, 0] {
        writer.data(&bytes).unwrap();
        writer.hole(ByteLen(hole)).unwrap();
    }
    writer.finish(common::meta()).unwrap();

    let dir = tempfile::tempdir().unwrap();
    let cache = cache(&dir.path().join("cache"), 64);
    let before = store.bytes_read();
    let meta: Arc<dyn MetaCache> = cache.clone();
    let device = soon("opening", || {
        runtime.block_on(async {
            let resolved = repository.resolve(&name, &Reference::default(), &meta).await.unwrap();
            let version =
                Version::open(&repository, &name, resolved.commit, meta, VersionOptions::default()).await;
            let base = Base::new(version.unwrap(), cache.clone());
            let layer = create_layer(Box::new(OsDir::new(dir.path())), &identity(base.version(), SIZE), 1);
            device(base, vec![layer.unwrap()], SIZE)
        })
    });
    let places = [0, 7 * TIB + MIB, SIZE - MIB];
    for at in places {
        let found = soon("a first read", || runtime.block_on(read(&device, at + 100, 4096)));
        assert!(found == bytes[100..4196], "at {at}");
    }
    let moved = store.bytes_read() - before;
    assert!(moved < MIB, "{moved} bytes were fetched for 12 KiB");
    let found = soon("a read of a hole", || runtime.block_on(read(&device, 9 * TIB + 5, 8192)));
    assert!(found.iter().all(|byte| *byte == 0));

    let fence = Fence::new();
    let end = SIZE - 2 * PAGE;
    soon("a write at the end", || {
        assert_eq!(device.write_now(&fence, ByteOffset(end), &stamped(1, 1)).unwrap(), Now::Done);
        assert_eq!(device.write_now(&fence, ByteOffset(12 * TIB), &stamped(2, 1)).unwrap(), Now::Done);
        assert_eq!(device.zero_now(&fence, range(3 * TIB, TIB)).unwrap(), Now::Done);
        device.flush().unwrap();
    });
    assert!(runtime.block_on(read(&device, end, PAGE)) == stamped(1, 1));
    let whole = |at: u64| range(at, SIZE - at);
    let dirty = soon("dirty", || walk(SIZE, 100, |at| device.dirty(whole(at), 100).unwrap()));
    let (clean, data) = (Dirty::Clean, Dirty::Data);
    assert_eq!(
        dirty,
        extents(&[
            (3 * TIB, clean),
            (TIB, Dirty::Zero),
            (8 * TIB, clean),
            (PAGE, data),
            (4 * TIB - 3 * PAGE, clean),
            (PAGE, data),
            (PAGE, clean),
        ])
    );
    let allocation = soon("allocation", || {
        walk(SIZE, 100, |at| runtime.block_on(device.allocation(whole(at), 100)).unwrap())
    });
    let (data, hole) = (Allocation::Data, Allocation::Hole);
    assert_eq!(
        allocation,
        extents(&[
            (MIB, data),
            (7 * TIB, hole),
            (MIB, data),
            (5 * TIB - 2 * MIB, hole),
            (PAGE, data),
            (4 * TIB - MIB - PAGE, hole),
            (MIB, data),
        ])
    );
    let cached =
        soon("cached", || walk(SIZE, 100, |at| runtime.block_on(device.cached(whole(at), 100)).unwrap()));
    assert!(cached.iter().any(|extent| !extent.state) && cached.len() <= 8, "{cached:?}");

    let base = runtime.block_on(async {
        let resolved = repository.resolve(&name, &Reference::default(), &(cache.clone() as _)).await.unwrap();
        let options = VersionOptions::default();
        Version::open(&repository, &name, resolved.commit, cache.clone(), options).await.unwrap()
    });
    drop(device);
    soon("opening again", || {
        open_layer(Box::new(OsDir::new(dir.path())), &identity(&base, SIZE)).unwrap();
    });
}

/// A device of 4 TiB over a commit of 1 MiB, with some pages written all over it.
fn wide_device(runtime: &tokio::runtime::Runtime, dir: &std::path::Path) -> Arc<Device> {
    let image = Image::new(runtime, noise(MIB));
    let cache = cache(&dir.join("cache"), 64);
    let base = runtime.block_on(image.base(&cache));
    let layer = create_layer(Box::new(OsDir::new(dir)), &identity(base.version(), 4 * TIB), 1).unwrap();
    let device = device(base, vec![layer], 4 * TIB);
    let fence = Fence::new();
    for n in 0..5_000u64 {
        let at = n * 7_919 * 65_537 % (2 * TIB / PAGE) * PAGE;
        device.write_now(&fence, ByteOffset(at), &stamped(n, 1)).unwrap();
    }
    device.flush().unwrap();
    device
}

#[test]
fn trims_and_zeroes_of_2_tib_take_no_time_while_writes_go_on() {
    let runtime = common::runtime();
    let dir = tempfile::tempdir().unwrap();
    let device = wide_device(&runtime, dir.path());
    let (stop, written) = (AtomicBool::new(false), AtomicU64::new(0));
    let fence = Fence::new();
    std::thread::scope(|scope| {
        for writer in 0..2u64 {
            let (device, runtime, stop, written, fence) = (device.clone(), &runtime, &stop, &written, &fence);
            scope.spawn(move || {
                while !stop.load(Ordering::SeqCst) {
                    let n = written.fetch_add(1, Ordering::SeqCst);
                    // Of both halves, and parts of pages too.
                    let at = (n * 7_919 % 4096) * (TIB / 1024) + writer * 512;
                    runtime.block_on(device.write(fence, ByteOffset(at), vec![1; 512].into())).unwrap();
                }
            });
        }
        for round in 0..6u64 {
            let (at, len) = (round * 12_345, 2 * TIB);
            soon("a trim", || runtime.block_on(device.trim(&fence, range(at, len))).unwrap());
            soon("zeroes", || runtime.block_on(device.zero(&fence, range(at, len))).unwrap());
            soon("a flush", || device.flush().unwrap());
        }
        stop.store(true, Ordering::SeqCst);
    });
    assert!(written.into_inner() > 20, "writes went on meanwhile");
    soon("a last trim", || runtime.block_on(device.trim(&fence, range(0, 4 * TIB))).unwrap());
    device.flush().unwrap();
    assert_eq!(device.delta().unwrap().data_pages(), 0);
    let dirty = soon("dirty", || walk(4 * TIB, 10, |at| device.dirty(range(at, 4 * TIB - at), 10).unwrap()));
    assert_eq!(dirty, extents(&[(4 * TIB, Dirty::Zero)]));
    assert!(std::fs::metadata(dir.path().join("map")).unwrap().len() < 8 << 20);
}

#[test]
fn status_of_many_blocks_comes_in_bounded_pieces_that_make_a_whole() {
    const BLOCKS: u64 = 150;
    let runtime = common::runtime();
    // One chunk of data in each block but every seventh.
    let mut bytes = vec![0; (BLOCKS * BLOCK) as usize];
    let chunk = noise(CHUNK);
    let mut expected: Vec<(u64, Allocation)> = Vec::new();
    let mut push = |len, state| match expected.last_mut() {
        Some((last, kind)) if *kind == state => *last += len,
        _ => expected.push((len, state)),
    };
    for block in 0..BLOCKS {
        if block % 7 == 3 {
            push(BLOCK, Allocation::Hole);
            continue;
        }
        let at = block * BLOCK + block % 16 * CHUNK;
        bytes[at as usize..(at + CHUNK) as usize].copy_from_slice(&chunk);
        if block % 16 > 0 {
            push(block % 16 * CHUNK, Allocation::Hole);
        }
        push(CHUNK, Allocation::Data);
        if block % 16 < 15 {
            push(BLOCK - (block % 16 + 1) * CHUNK, Allocation::Hole);
        }
    }
    let image = Image::new(&runtime, bytes);
    let dir = tempfile::tempdir().unwrap();
    let cache = cache(dir.path(), 64);
    let size = BLOCKS * BLOCK;
    let device = runtime.block_on(async { Device::new(image.base(&cache).await, None, ByteLen(size)) });
    let device = Arc::new(device);
    for most in [1, 2, 7, 4096] {
        let ask = |at: u64| runtime.block_on(device.allocation(range(at, size - at), most)).unwrap();
        assert_eq!(walk(size, most, ask), extents(&expected), "at most {most}");
    }
    let first = runtime.block_on(device.allocation(range(0, size), 4096)).unwrap();
    let told: u64 = first.iter().map(|extent| extent.len.0).sum();
    assert!(told < size / 3 * 2, "one answer loads a bounded number of tables");
}

#[test]
fn status_of_a_delta_in_single_pages_is_as_long_as_asked_for() {
    let runtime = common::runtime();
    let image = Image::new(&runtime, noise(2 * BLOCK));
    let dir = tempfile::tempdir().unwrap();
    let cache = cache(&dir.path().join("cache"), 64);
    let base = runtime.block_on(image.base(&cache));
    let layer =
        create_layer(Box::new(OsDir::new(dir.path())), &identity(base.version(), 2 * BLOCK), 1).unwrap();
    let device = device(base, vec![layer], 2 * BLOCK);
    let fence = Fence::new();
    for page in (0..2 * BLOCK / PAGE).step_by(2) {
        device.zero_now(&fence, range(page * PAGE, PAGE)).unwrap();
    }
    let found = runtime.block_on(device.allocation(range(0, 2 * BLOCK), 4096)).unwrap();
    let (hole, data) = ((PAGE, Allocation::Hole), (PAGE, Allocation::Data));
    let expected = extents(&[hole, data].repeat((BLOCK / PAGE) as usize));
    assert!(found == expected, "{} extents: two tables are not many", found.len());
}

#[test]
fn status_looks_at_a_bounded_number_of_runs() {
    const PAGES: u64 = 40_000;
    let runtime = common::runtime();
    let dir = tempfile::tempdir().unwrap();
    let device = wide_device(&runtime, dir.path());
    let fence = Fence::new();
    device.trim_now(&fence, range(0, 4 * TIB)).unwrap();
    // Downwards: every page is a run of its own, and all of them are one extent.
    for page in (0..PAGES).rev() {
        device.write_now(&fence, ByteOffset(page * PAGE), &stamped(page, 1)).unwrap();
    }
    let size = PAGES * PAGE;
    let found = device.dirty(range(0, size), 10).unwrap();
    assert_eq!(found.len(), 1);
    assert!(found[0].len.0 < size, "{} runs were looked at for one answer", found[0].len.0 / PAGE);
    let dirty = walk(size, 10, |at| device.dirty(range(at, size - at), 10).unwrap());
    assert_eq!(dirty, extents(&[(size, Dirty::Data)]));
    let ask = |at: u64| runtime.block_on(device.allocation(range(at, size - at), 10)).unwrap();
    assert_eq!(walk(size, 10, ask), extents(&[(size, Allocation::Data)]));
}
