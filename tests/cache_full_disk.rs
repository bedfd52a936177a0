//! A full disk: no SIGBUS, no error, only more fetches. On a small tmpfs of its own, so it needs root; in CI it must
//! run.

#![allow(clippy::unwrap_used)]

mod cache_common;

use std::fs::{self, File};
use std::io::Write;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::process::Command;

use cache_common::{chunk, content, id, open, read, room, small};
use horcrux::cache::{Cache, CacheOptions};
use horcrux::format::cache_index::SlabGeometry;
use horcrux::units::ByteLen;

/// A mounted tmpfs, unmounted when dropped.
struct Tmpfs(tempfile::TempDir);

impl Tmpfs {
    /// `None`, loudly, where it can't be mounted; in CI that is a failure.
    fn mount(mib: u64) -> Option<Tmpfs> {
        let dir = tempfile::tempdir().unwrap();
        let options = format!("size={mib}m");
        let mounted =
            Command::new("mount").args(["-t", "tmpfs", "-o", &options, "none"]).arg(dir.path()).status();
        if mounted.is_ok_and(|status| status.success()) {
            return Some(Tmpfs(dir));
        }
        assert!(std::env::var("CI").is_err(), "can't mount a tmpfs, and in CI this test must run");
        eprintln!("SKIPPED: mounting a tmpfs needs root");
        None
    }

    fn path(&self) -> &Path {
        self.0.path()
    }
}

impl Drop for Tmpfs {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg("-l").arg(self.0.path()).status();
    }
}

/// Fills the filesystem to its last page.
fn fill_up(path: &Path) -> File {
    let mut file = File::create(path).unwrap();
    let page = [0x5a; 4096];
    while file.write_all(&page).is_ok() {}
    file
}

#[tokio::test]
async fn a_disk_that_is_full_before_the_cache_starts_serves_from_memory() {
    let Some(disk) = Tmpfs::mount(2) else { return };
    let cache = open(disk.path(), 64);
    fill_up(&disk.path().join("filler"));
    for n in 0..50 {
        assert_eq!(*read(&cache, n, small()).await, *content(n, small()));
    }
    cache.put_blob(&[1; 32], &[2; 9000]);
    cache.written().await;
    let stats = cache.stats();
    assert_eq!((stats.heap_fallbacks, stats.used.0, stats.allocated.0), (50, 0, 0));
    assert_eq!(cache.blob(&[1; 32]), None);
}

#[tokio::test]
async fn a_disk_that_fills_up_while_the_cache_grows_keeps_what_is_there() {
    let Some(disk) = Tmpfs::mount(24) else { return };
    // The limit is far above the disk.
    let cache = open(disk.path(), 512);
    for n in 0..1000 {
        room(&cache, small()).await;
        assert_eq!(*read(&cache, n, small()).await, *content(n, small()));
    }
    cache.written().await;
    let grown = cache.stats();
    assert!(grown.used.0 >= 12 << 20 && grown.evicted > 0, "{grown:?}");
    assert_eq!(grown.heap_fallbacks, 0, "it evicts when it can't grow: {grown:?}");

    let filler = disk.path().join("filler");
    fill_up(&filler);
    for n in (0..1000).rev() {
        room(&cache, small()).await;
        let found = read(&cache, n, small()).await;
        assert_eq!(*found, *content(n, small()));
    }
    cache.written().await;
    let full = cache.stats();
    assert_eq!(full.allocated, grown.allocated);
    assert_eq!((full.healed, full.heap_fallbacks), (0, 0), "its space was allocated before: {full:?}");

    // Space comes back, and is used in time.
    fs::remove_file(&filler).unwrap();
    drop(cache);
    let cache = open(disk.path(), 512);
    let here = (0..1000).filter(|n| cache.contains(&id(*n, small()))).count() as u64;
    assert_eq!(here << 16, full.used.0);
    for n in 0..1000 {
        assert_eq!(*read(&cache, n, small()).await, *content(n, small()));
    }
    assert_eq!(cache.stats().healed, 0);
}

#[tokio::test]
async fn the_cache_leaves_to_others_what_it_was_told_to() {
    let Some(disk) = Tmpfs::mount(40) else { return };
    let options =
        CacheOptions { keep_free: Some(ByteLen(20 << 20)), ..CacheOptions::new(ByteLen(512 << 20)) };
    let cache = Cache::open(disk.path(), options).unwrap();
    for n in 0..600 {
        room(&cache, small()).await;
        cache.insert(chunk(n, small()));
    }
    cache.written().await;
    let free = rustix::fs::statvfs(disk.path()).unwrap();
    assert!(free.f_bavail * free.f_frsize >= 20 << 20, "{} pages free", free.f_bavail);
    assert!(cache.stats().used.0 >= 12 << 20, "{:?}", cache.stats());
}

#[tokio::test]
async fn a_slab_without_its_space_makes_writes_fail_and_never_reads() {
    let Some(disk) = Tmpfs::mount(8) else { return };
    let geometry = SlabGeometry::new(small(), 24).unwrap();
    // Sparse, as on a filesystem that can't allocate ahead: 16 MiB on a disk of 8.
    fs::create_dir(disk.path().join("slabs")).unwrap();
    let slab = File::create(disk.path().join("slabs/00000000.slab")).unwrap();
    slab.set_len(geometry.file_len()).unwrap();
    slab.write_all_at(&geometry.encode(), 0).unwrap();
    let cache = open(disk.path(), 64);
    for n in 0..400 {
        room(&cache, small()).await;
        assert_eq!(*read(&cache, n, small()).await, *content(n, small()));
    }
    cache.written().await;
    let stats = cache.stats();
    assert!(stats.heap_fallbacks > 0 && stats.evicted > 0, "{stats:?}");
    // It goes on with the slots that have their space.
    assert!(stats.used.0 > 4 << 20, "{stats:?}");
    let here: Vec<_> = (0..400).filter(|n| cache.lookup(&id(*n, small())).is_some()).collect();
    assert!(*here.last().unwrap() > 300, "new chunks find no place: {here:?}");
    for n in here {
        assert_eq!(*read(&cache, n, small()).await, *content(n, small()));
    }
    drop(cache);
    let cache = open(disk.path(), 64);
    for n in 0..400 {
        assert_eq!(*read(&cache, n, small()).await, *content(n, small()));
    }
    assert_eq!(cache.stats().healed, 0);
}
