//! Fetching before anyone asks: reading ahead, by a list, and everything; and that those who wait come first.
#![allow(clippy::unwrap_used, reason = "a test that can't go on fails")]

mod common;
mod device_common;

use std::sync::Arc;
use std::time::{Duration, Instant};

use device_common::{CHUNK, Image, cache, joined, range};
use horcrux::device::Device;
use horcrux::store::counting::Method;
use horcrux::store::fault::Fault;
use horcrux::units::{ByteLen, ChunkIndex};
use rand::SeedableRng;
use rand::rngs::StdRng;

const LEN: u64 = 24 << 20;

fn image(runtime: &tokio::runtime::Runtime) -> Image {
    Image::new(runtime, common::noise(&mut StdRng::seed_from_u64(7), LEN as usize))
}

#[test]
fn a_reader_in_order_waits_for_few_answers_of_a_store_that_is_far_away() {
    let runtime = common::runtime();
    let image = image(&runtime);
    let dir = tempfile::tempdir().unwrap();
    runtime.block_on(async {
        let cache = cache(dir.path(), 64);
        let base = image.base(&cache).await.reading_ahead();
        let device = Arc::new(Device::new(base, None, ByteLen(LEN)));
        // The map and the tables are small and not what this is about.
        device.allocation(range(0, LEN), 10_000).await.unwrap();
        image.store.always(Method::GetRange, "blocks", Fault::Slow(Duration::from_millis(20)));
        let began = Instant::now();
        for at in (0..LEN).step_by(CHUNK as usize) {
            let found = joined(&device.read(range(at, CHUNK)).await.unwrap());
            assert!(found == image.bytes[at as usize..(at + CHUNK) as usize], "at {at}");
        }
        // One after the other they would take 384 times 20 ms.
        let took = began.elapsed();
        assert!(took < Duration::from_millis(384 * 20 / 4), "{took:?}");
        assert_eq!(cache.stats().fetched, ByteLen(LEN), "each chunk once");
    });
}

#[test]
fn scattered_reads_fetch_what_they_need_and_nothing_else() {
    let runtime = common::runtime();
    let image = image(&runtime);
    let dir = tempfile::tempdir().unwrap();
    runtime.block_on(async {
        let cache = cache(dir.path(), 64);
        let base = image.base(&cache).await.reading_ahead();
        let device = Arc::new(Device::new(base, None, ByteLen(LEN)));
        for n in [300u64, 17, 120, 250, 60, 200] {
            device.read(range(n * CHUNK, 4096)).await.unwrap();
        }
        tokio::time::sleep(Duration::from_millis(50)).await;
        assert_eq!(cache.stats().fetched, ByteLen(6 * CHUNK));
    });
}

#[test]
fn a_list_brings_what_it_names_and_is_what_reads_used_in_order() {
    let runtime = common::runtime();
    let image = image(&runtime);
    let (dir, other) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    runtime.block_on(async {
        let recorded = {
            let cache = cache(dir.path(), 64);
            let device = Arc::new(Device::new(image.base(&cache).await, None, ByteLen(LEN)));
            device.base().start_list();
            for n in [300u64, 17, 18, 300, 120] {
                // Waited for the first time, at once the second.
                device.read(range(n * CHUNK + 5, 100)).await.unwrap();
                device.read_now(range(n * CHUNK, 4096), &mut Vec::new()).unwrap();
            }
            device.base().end_list().unwrap()
        };
        assert_eq!(recorded, [300, 17, 18, 120].map(ChunkIndex));
        let cache = cache(other.path(), 64);
        let device = Arc::new(Device::new(image.base(&cache).await, None, ByteLen(LEN)));
        // What is past the end does no harm.
        let listed = recorded.into_iter().chain([ChunkIndex(u64::MAX / CHUNK)]);
        assert_eq!(device.base().fetch_early(listed.clone()).await.unwrap(), ByteLen(4 * CHUNK));
        assert_eq!(device.base().fetch_early(listed).await.unwrap(), ByteLen(0), "all of it is here");
        image.store.always(Method::GetRange, "", Fault::FailBefore);
        for n in [300u64, 17, 18, 120] {
            let found = joined(&device.read(range(n * CHUNK, CHUNK)).await.unwrap());
            assert!(found == image.bytes[(n * CHUNK) as usize..((n + 1) * CHUNK) as usize]);
        }
    });
}

#[test]
fn who_waits_is_served_while_much_is_fetched_early() {
    let runtime = common::runtime();
    let image = image(&runtime);
    let dir = tempfile::tempdir().unwrap();
    runtime.block_on(async {
        let cache = cache(dir.path(), 64);
        let device = Arc::new(Device::new(image.base(&cache).await, None, ByteLen(LEN)));
        device.allocation(range(0, LEN), 10_000).await.unwrap();
        image.store.always(Method::GetRange, "blocks", Fault::Slow(Duration::from_millis(400)));
        let early = {
            let base = device.base().clone();
            tokio::spawn(async move { base.fetch_early((0..300).map(ChunkIndex)).await })
        };
        tokio::time::sleep(Duration::from_millis(50)).await;
        let began = Instant::now();
        device.read(range(370 * CHUNK, 4096)).await.unwrap();
        assert!(began.elapsed() < Duration::from_millis(700), "{:?}", began.elapsed());
        assert!(tokio::time::timeout(Duration::from_secs(60), early).await.is_ok());
    });
}
