//! How a device fetches: everything once, kept, however many ask at once; a store that fails is an error for those who asked then.
#![allow(clippy::unwrap_used, reason = "a test that can't go on fails")]

mod common;
mod device_common;

use std::sync::Arc;
use std::time::Duration;

use device_common::{BLOCK, CHUNK, Image, cache, joined, range};
use futures_util::{StreamExt, stream};
use horcrux::device::{Device, DeviceError, Now};
use horcrux::store::counting::Method;
use horcrux::store::fault::{Fault, Rule};
use horcrux::units::ByteLen;
use rand::SeedableRng;
use rand::rngs::StdRng;

fn noise(len: usize) -> Vec<u8> {
    common::noise(&mut StdRng::seed_from_u64(1), len)
}

/// Reads all of a device in pieces, so many at a time, and compares.
async fn read_all(device: &Arc<Device>, expected: &[u8], piece: usize, at_once: usize) {
    let reads = (0..expected.len().div_ceil(piece)).map(|number| {
        let (device, start) = (device.clone(), number * piece);
        let part = &expected[start..expected.len().min(start + piece)];
        let found =
            async move { joined(&device.read(range(start as u64, part.len() as u64)).await.unwrap()) };
        async move { assert!(found.await == part, "piece {number}") }
    });
    stream::iter(reads).buffer_unordered(at_once).for_each(|()| async {}).await;
}

/// nbdcopy with 4 connections of 64 requests each fetched an image 1.7 times over and kept a third of it: all found room in the write queue
/// before any had brought anything.
#[test]
fn an_image_read_by_hundreds_at_once_is_fetched_once_and_kept_whole() {
    let runtime = common::runtime();
    let image = Image::new(&runtime, noise(96 << 20));
    let len = image.bytes.len() as u64;
    let dir = tempfile::tempdir().unwrap();
    runtime.block_on(async {
        let cache = cache(dir.path(), 256);
        let device = Arc::new(Device::new(image.base(&cache).await, None, ByteLen(len)));
        read_all(&device, &image.bytes, 256 << 10, 256).await;
        cache.written().await;
        let stats = cache.stats();
        assert_eq!(stats.heap_fallbacks, 0);
        assert_eq!(stats.fetched, ByteLen(len));
        assert_eq!(stats.used, ByteLen(len), "all of it is on the disk");
    });
}

#[test]
fn a_slow_disk_makes_those_who_fetch_wait_and_nothing_is_let_go() {
    let runtime = common::runtime();
    let image = Image::new(&runtime, noise(48 << 20));
    let len = image.bytes.len() as u64;
    let dir = tempfile::tempdir().unwrap();
    runtime.block_on(async {
        let cache = cache(dir.path(), 64);
        // What is queued for a disk that takes nothing. It leaves the readers room for 256 KiB.
        let mut queued = vec![cache.room(ByteLen(768 << 10)).await];
        for _ in 0..63 {
            queued.push(cache.room(ByteLen(1 << 20)).await);
        }
        // All answers come at once.
        image.store.always(Method::GetRange, "blocks", Fault::Slow(Duration::from_millis(100)));
        let device = Arc::new(Device::new(image.base(&cache).await, None, ByteLen(len)));
        // Reads of more than that must wait for the disk to get on, and so must as many small ones.
        let reading = async {
            read_all(&device, &image.bytes, 12 << 20, 4).await;
            read_all(&device, &image.bytes, 256 << 10, 200).await;
        };
        let disk = async {
            while queued.pop().is_some() {
                tokio::time::sleep(Duration::from_millis(20)).await;
            }
        };
        tokio::join!(reading, disk);
        cache.written().await;
        let stats = cache.stats();
        assert_eq!((stats.heap_fallbacks, stats.fetched), (0, ByteLen(len)));
    });
}

#[test]
fn a_store_that_hangs_does_not_hold_up_the_reads_of_other_images_for_long() {
    let runtime = common::runtime();
    let hung = Image::new(&runtime, noise(80 << 20));
    let well = Image::new(&runtime, common::random_image(2, 3 << 20));
    let dir = tempfile::tempdir().unwrap();
    runtime.block_on(async {
        let cache = cache(dir.path(), 256);
        let first = Arc::new(Device::new(hung.base(&cache).await, None, ByteLen(80 << 20)));
        // Its tables are here; then it hangs, with more under way than the write queue has room for.
        for block in 0..80 {
            first.allocation(range(block * BLOCK, 1), 1).await.unwrap();
        }
        hung.store.always(Method::GetRange, "blocks", Fault::Slow(Duration::from_secs(3600)));
        let waiting: Vec<_> = (0..80)
            .map(|block| {
                let first = first.clone();
                tokio::spawn(async move { first.read(range(block * BLOCK, BLOCK)).await })
            })
            .collect();
        tokio::time::sleep(Duration::from_millis(100)).await;
        let second = Arc::new(Device::new(well.base(&cache).await, None, ByteLen(3 << 20)));
        let read = tokio::time::timeout(Duration::from_secs(30), second.read(range(0, 3 << 20)));
        let pieces = read.await.expect("held up by another image's store").unwrap();
        assert!(joined(&pieces) == well.bytes);
        waiting.iter().for_each(tokio::task::JoinHandle::abort);
    });
}

#[test]
fn a_thousand_readers_of_one_cold_chunk_share_one_request() {
    let runtime = common::runtime();
    let image = Image::new(&runtime, noise(2 * BLOCK as usize));
    let dir = tempfile::tempdir().unwrap();
    runtime.block_on(async {
        let cache = cache(dir.path(), 64);
        let device = Arc::new(Device::new(image.base(&cache).await, None, ByteLen(2 * BLOCK)));
        image.store.always(Method::GetRange, "", Fault::Slow(Duration::from_millis(30)));
        let before = image.store.injected();
        let readers: Vec<_> = (0..1000u64)
            .map(|n| {
                let device = device.clone();
                let (at, len) = (3 * CHUNK + n * 61 % (CHUNK - 512), 512);
                tokio::spawn(async move { (at, device.read(range(at, len)).await.unwrap()) })
            })
            .collect();
        for reader in readers {
            let (at, pieces) = reader.await.unwrap();
            assert!(joined(&pieces) == image.bytes[at as usize..at as usize + 512]);
        }
        assert_eq!(image.store.injected() - before, 2, "one for the chunk table, one for the chunk");
        assert_eq!(cache.stats().fetched, ByteLen(CHUNK));
    });
}

#[test]
fn a_store_that_fails_is_an_error_for_that_read_and_a_later_one_succeeds() {
    let runtime = common::runtime();
    let image = Image::new(&runtime, noise(3 * BLOCK as usize));
    let dir = tempfile::tempdir().unwrap();
    runtime.block_on(async {
        let cache = cache(dir.path(), 64);
        let device = Arc::new(Device::new(image.base(&cache).await, None, ByteLen(3 * BLOCK)));
        let whole = range(0, 3 * BLOCK);
        for fault in [Fault::FailBefore, Fault::FailAfter, Fault::ShortBody(1), Fault::Zeros] {
            image.store.always(Method::GetRange, "blocks", fault);
            let waiting: Vec<_> = (0..20)
                .map(|n| {
                    let device = device.clone();
                    tokio::spawn(async move { device.read(range(n % 16 * CHUNK, 2 * BLOCK)).await })
                })
                .collect();
            for read in waiting {
                let error = read.await.unwrap().expect_err("the store fails");
                assert!(matches!(error, DeviceError::Base(_)), "{fault:?}: {error}");
            }
            assert_eq!(device.read_now(whole, &mut Vec::new()).unwrap(), Now::Wait);
            image.store.heal();
        }
        // A fault in the middle of a range.
        let rule = Rule {
            method: Method::GetRange,
            key_contains: "blocks".into(),
            skip: 4,
            times: 1,
            fault: Fault::FailBefore,
        };
        image.store.add(rule);
        assert!(device.read(whole).await.is_err());
        image.store.heal();
        assert!(joined(&device.read(whole).await.unwrap()) == image.bytes);
        let mut pieces = Vec::new();
        assert_eq!(device.read_now(whole, &mut pieces).unwrap(), Now::Done);
        assert!(joined(&pieces) == image.bytes);
        assert_eq!(cache.stats().fetched, ByteLen(3 * BLOCK), "what came before the fault was kept");
    });
}

#[test]
fn a_corrupt_chunk_in_the_repository_is_an_error_that_names_it_and_never_data() {
    let runtime = common::runtime();
    let image = Image::new(&runtime, noise(BLOCK as usize));
    let dir = tempfile::tempdir().unwrap();
    runtime.block_on(async {
        let cache = cache(dir.path(), 64);
        let device = Arc::new(Device::new(image.base(&cache).await, None, ByteLen(BLOCK)));
        device.allocation(range(0, 1), 1).await.unwrap();
        image.store.always(Method::GetRange, "blocks", Fault::FlippedBit);
        for _ in 0..3 {
            let error = device.read(range(5 * CHUNK + 100, 512)).await.unwrap_err();
            let message = error.to_string();
            assert!(message.contains("blocks/") && message.contains("chunk"), "{message}");
        }
        assert_eq!(cache.stats().fetched, ByteLen(0), "nothing of it was kept");
        image.store.heal();
        assert!(joined(&device.read(range(0, BLOCK)).await.unwrap()) == image.bytes);
    });
}
