//! The device's hot paths, without a socket: `cargo bench --bench device`.
//!
//! What is read is in the page cache and was verified before; what is written goes into the page cache.

use std::hint::black_box;
use std::sync::Arc;
use std::time::Duration;

use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use horcrux::cache::{Cache, CacheOptions};
use horcrux::delta::disk::OsDir;
use horcrux::delta::{Delta, Identity, Layer, LayerId, VolumeId};
use horcrux::device::{Base, Device, Fence, Now};
use horcrux::format::{Filesystem, Timestamp};
use horcrux::repo::{
    CommitMeta, ImageWriter, MetaCache, Reference, Repository, Version, VersionOptions, WriterParams,
};
use horcrux::store::MemStore;
use horcrux::units::{ByteLen, ByteOffset, ByteRange, PAGE_SIZE};

const MIB: u64 = 1 << 20;
const IMAGE: u64 = 64 * MIB;
/// The first part stays as the commit has it, the second is overwritten in order, the third page by page without order.
const PART: u64 = 16 * MIB;
const PAGES_OF_A_MIB: u64 = MIB / PAGE_SIZE;

/// SplitMix64.
fn random(state: &mut u64) -> u64 {
    *state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
    let mut z = *state;
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

fn noise(seed: u64, len: u64) -> Vec<u8> {
    let mut state = seed;
    (0..len / 8).flat_map(|_| random(&mut state).to_le_bytes()).collect()
}

fn range(at: u64, len: u64) -> ByteRange {
    ByteRange::at(ByteOffset(at), ByteLen(len)).expect("small numbers")
}

fn device(runtime: &tokio::runtime::Runtime, dir: &std::path::Path) -> Arc<Device> {
    let repo =
        runtime.block_on(Repository::create(Arc::new(MemStore::new()), [7; 16])).expect("a repository");
    let name = "bench".parse().expect("a good name");
    let params = WriterParams::new(ByteLen(IMAGE));
    let mut writer = ImageWriter::new(runtime.handle(), &repo, &name, params).expect("a writer");
    (0..IMAGE / MIB).for_each(|n| writer.data(&noise(n, MIB)).expect("memory"));
    let meta = CommitMeta {
        filesystem: Filesystem::None,
        author: "bench".into(),
        time: Timestamp { secs: 1_750_000_000, nanos: 0 },
        message: String::new(),
    };
    writer.finish(meta).expect("a commit");
    let cache = Cache::open(&dir.join("cache"), CacheOptions::new(ByteLen(1 << 30))).expect("a cache");
    let meta: Arc<dyn MetaCache> = cache.clone();
    let version = runtime.block_on(async {
        let resolved = repo.resolve(&name, &Reference::default(), &meta).await.expect("main is there");
        Version::open(&repo, &name, resolved.commit, meta, VersionOptions::default())
            .await
            .expect("a version")
    });
    let identity = Identity { base: version.id(), volume: VolumeId([1; 16]), device_size: ByteLen(IMAGE) };
    let path = dir.join("layer");
    std::fs::create_dir(&path).expect("a directory");
    let layer = Layer::create(Box::new(OsDir::new(&path)), &identity, LayerId([2; 16])).expect("a layer");
    let base = Base::new(version, cache.clone());
    let device = Arc::new(Device::new(base, Some(Delta::new(vec![Arc::new(layer)])), ByteLen(IMAGE)));
    runtime.block_on(async {
        for at in (0..IMAGE).step_by(MIB as usize) {
            device.read(range(at, MIB)).await.expect("the image reads");
        }
        cache.written().await;
    });
    let fence = Fence::new();
    let write = |at: u64, len: u64| {
        let done = device.write_now(&fence, ByteOffset(at), &noise(at, len)).expect("space");
        assert_eq!(done, Now::Done);
    };
    (PART..2 * PART).step_by(MIB as usize).for_each(|at| write(at, MIB));
    let mut order: Vec<u64> = (2 * PART / PAGE_SIZE..3 * PART / PAGE_SIZE).collect();
    let mut state = 1;
    for last in (1..order.len()).rev() {
        order.swap(last, (random(&mut state) % (last as u64 + 1)) as usize);
    }
    order.into_iter().for_each(|page| write(page * PAGE_SIZE, PAGE_SIZE));
    device.flush().expect("a disk");
    device
}

fn paths(criterion: &mut Criterion) {
    let dir = tempfile::tempdir().expect("a temporary directory");
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build();
    let runtime = runtime.expect("a runtime");
    let device = device(&runtime, dir.path());
    let mut group = criterion.benchmark_group("device");
    group.measurement_time(Duration::from_secs(3));
    let read = |at: u64, len: u64| {
        let mut pieces = Vec::with_capacity(1);
        let done = device.read_now(black_box(range(at, len)), &mut pieces).expect("it reads");
        assert_eq!(done, Now::Done);
        pieces
    };
    let mut state = 1;
    let parts = [("the commit", 0), ("the delta, in order", PART), ("the delta, scattered", 2 * PART)];
    for (what, part) in parts {
        group.throughput(Throughput::Bytes(PAGE_SIZE));
        group.bench_function(format!("read_now 4 KiB of {what}"), |bencher| {
            bencher.iter(|| read(part + random(&mut state) % (PART / PAGE_SIZE) * PAGE_SIZE, PAGE_SIZE));
        });
        group.throughput(Throughput::Bytes(MIB));
        group.bench_function(format!("read_now 1 MiB of {what}"), |bencher| {
            bencher.iter(|| read(part + random(&mut state) % (PART / MIB) * MIB, MIB));
        });
    }
    let fence = Fence::new();
    let page = noise(5, PAGE_SIZE);
    group.throughput(Throughput::Bytes(PAGE_SIZE));
    group.bench_function("write_now 4 KiB", |bencher| {
        bencher.iter(|| {
            let at = 3 * PART + random(&mut state) % (PART / PAGE_SIZE) * PAGE_SIZE;
            device.write_now(&fence, ByteOffset(at), black_box(&page)).expect("space")
        });
    });
    group.bench_function("write_now 512 bytes", |bencher| {
        bencher.iter(|| {
            let at = 3 * PART + random(&mut state) % (PART / 512) * 512;
            device.write_now(&fence, ByteOffset(at), black_box(&page[..512])).expect("space")
        });
    });
    // A page in two is the delta's: what a database leaves behind.
    (0..PAGES_OF_A_MIB).step_by(2).for_each(|n| {
        device.write_now(&fence, ByteOffset(n * PAGE_SIZE), &page).expect("space");
    });
    group.throughput(Throughput::Bytes(MIB));
    group.bench_function("read_now 1 MiB, every other page in the delta", |bencher| {
        bencher.iter(|| read(0, MIB));
    });
    group.finish();
}

criterion_group!(benches, paths);
criterion_main!(benches);
