//! A writer that is stopped anywhere leaves the old version; of two that race, one wins and the other is told.
#![allow(clippy::unwrap_used, reason = "a test that can't go on fails")]

mod common;

use std::path::Path;
use std::process::Command;
use std::sync::Arc;

use common::*;
use horcrux::repo::{ImageWriter, RepoError, Repository};
use horcrux::store::counting::Method;
use horcrux::store::fault::{Fault, Rule};
use horcrux::store::{CountingStore, DirStore, FaultStore, MemStore, Store, StoreError};
use horcrux::units::ByteLen;

#[test]
fn a_writer_that_is_dropped_midway_leaves_the_old_version() {
    let runtime = runtime();
    let dir = tempfile::tempdir().unwrap();
    let repo = create(&runtime, Arc::new(DirStore::new(dir.path())));
    let old = random_image(1, 5 << 20);
    write(&runtime, &repo, &image("a"), &old, small_params(old.len())).unwrap();
    let new = random_image(2, 9 << 20);
    for name in ["a", "b"] {
        for part in [0, 1, 70_000, 3 << 20, 9 << 20] {
            let mut writer =
                ImageWriter::new(runtime.handle(), &repo, &image(name), small_params(new.len())).unwrap();
            writer.data(&new[..part]).unwrap();
            drop(writer);
        }
    }
    let version = runtime.block_on(open(&repo, &image("a"), "main")).unwrap();
    assert!(runtime.block_on(read_all(&version)).unwrap() == old);
    assert_eq!(runtime.block_on(repo.images()).unwrap(), [image("a")], "an image without a ref is none");
    let left = std::fs::read_dir(dir.path()).unwrap().map(|entry| entry.unwrap().file_name());
    assert_eq!(left.filter(|name| name.to_string_lossy().starts_with('.')).count(), 0);
}

#[test]
fn a_store_that_fails_at_any_write_leaves_old_or_new_and_the_next_try_succeeds() {
    let runtime = runtime();
    let old = random_image(1, 3 << 20);
    let mut new = random_image(2, 4 << 20);
    new[..1 << 20].copy_from_slice(&old[..1 << 20]);
    let writes = [Method::PutNew, Method::Begin, Method::Write, Method::Finish, Method::CompareAndSwap];
    let mut failures = 0;
    for method in writes {
        for fault in [Fault::FailBefore, Fault::FailAfter, Fault::NoSpace] {
            for skip in 0.. {
                let faults = FaultStore::new(Arc::new(MemStore::new()));
                let repo = create(&runtime, Arc::new(faults.clone()));
                write(&runtime, &repo, &image("a"), &old, small_params(old.len())).unwrap();
                let start = faults.injected();
                faults.add(Rule { method, key_contains: String::new(), skip, times: 1, fault });
                let written = write(&runtime, &repo, &image("a"), &new, small_params(new.len()));
                let hit = faults.injected() > start;
                faults.heal();
                let version = runtime.block_on(open(&repo, &image("a"), "main")).unwrap();
                let there = runtime.block_on(read_all(&version)).unwrap();
                match &written {
                    Ok(_) => assert!(there == new),
                    Err(error) => {
                        assert!(there == old, "{method:?} {fault:?} after {skip}");
                        assert!(matches!(error, RepoError::Store(_)), "{error}");
                        failures += 1;
                    }
                }
                if (method, fault) == (Method::CompareAndSwap, Fault::FailAfter) {
                    assert!(written.is_ok(), "a swap that was done is seen to be done");
                }
                write(&runtime, &repo, &image("a"), &new, small_params(new.len())).unwrap();
                let version = runtime.block_on(open(&repo, &image("a"), "main")).unwrap();
                assert!(runtime.block_on(read_all(&version)).unwrap() == new);
                if !hit {
                    break;
                }
            }
        }
    }
    assert!(failures > 10, "{failures}");
}

#[test]
fn of_two_writers_of_one_branch_one_wins_and_the_other_is_told() {
    let runtime = runtime();
    let dir = tempfile::tempdir().unwrap();
    create(&runtime, Arc::new(DirStore::new(dir.path())));
    let open_again = || runtime.block_on(Repository::open(Arc::new(DirStore::new(dir.path())))).unwrap();
    for round in 0..4u64 {
        let images = [random_image(10 + round, 2 << 20), random_image(20 + round, 2 << 20)];
        let writers = images.each_ref().map(|bytes| {
            let mut writer =
                ImageWriter::new(runtime.handle(), &open_again(), &image("a"), small_params(bytes.len()))
                    .unwrap();
            writer.data(bytes).unwrap();
            writer
        });
        let done = std::thread::scope(|scope| {
            writers.map(|writer| scope.spawn(|| writer.finish(meta()))).map(|thread| thread.join().unwrap())
        });
        let winner = done.iter().position(Result::is_ok).expect("one wins");
        let lost = done[1 - winner].as_ref().unwrap_err();
        assert!(matches!(lost, RepoError::NotFastForward { actual: Some(_), .. }), "{lost}");
        assert!(lost.to_string().starts_with("not a fast-forward: a@main"), "{lost}");
        let version = runtime.block_on(open(&open_again(), &image("a"), "main")).unwrap();
        assert!(runtime.block_on(read_all(&version)).unwrap() == images[winner]);
    }
}

#[test]
fn a_writer_reads_little_of_what_it_writes_again() {
    let runtime = runtime();
    let counting = CountingStore::new(Arc::new(MemStore::new()));
    let repo = create(&runtime, Arc::new(counting.clone()));
    let bytes = random_image(8, 20 << 20);
    write(&runtime, &repo, &image("a"), &bytes, small_params(bytes.len())).unwrap();
    counting.reset();
    write(&runtime, &repo, &image("a"), &bytes, small_params(bytes.len())).unwrap();
    assert!(counting.bytes_written() < 300, "a hold and nothing else: {}", counting.bytes_written());
    assert!(counting.bytes_read() < 200_000, "{}", counting.bytes_read());
}

/// A small filesystem, unmounted when dropped.
struct Tmpfs<'a>(&'a Path);

impl Tmpfs<'_> {
    fn mount<'a>(at: &'a Path, options: &str) -> Option<Tmpfs<'a>> {
        let done = Command::new("mount").args(["-t", "tmpfs", "-o", options, "none"]).arg(at).status();
        done.is_ok_and(|status| status.success()).then_some(Tmpfs(at))
    }
}

impl Drop for Tmpfs<'_> {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg(self.0).status();
    }
}

#[test]
fn a_full_disk_is_said_plainly_and_leaves_no_ref() {
    let dir = tempfile::tempdir().unwrap();
    let Some(_mounted) = Tmpfs::mount(dir.path(), "size=6m") else {
        assert!(std::env::var_os("CI").is_none(), "CI runs this as root");
        eprintln!("SKIPPED: a full disk needs root to mount a small tmpfs");
        return;
    };
    let runtime = runtime();
    let store: Arc<dyn Store> = Arc::new(DirStore::new(dir.path().join("repo")));
    let repo = create(&runtime, store);
    let old = random_image(1, 1 << 20);
    write(&runtime, &repo, &image("a"), &old, small_params(old.len())).unwrap();
    let mut state = 1u64;
    let noise: Vec<u8> = std::iter::repeat_with(|| {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
        (state >> 56) as u8
    })
    .take(12 << 20)
    .collect();
    for (name, block_log2) in [("a", 20), ("b", 20), ("b", 26)] {
        let mut params = small_params(noise.len());
        params.block_size = horcrux::format::BlockSize::from_log2(block_log2).unwrap();
        let mut writer = ImageWriter::new(runtime.handle(), &repo, &image(name), params).unwrap();
        let failed = noise.chunks(100_000).find_map(|piece| writer.data(piece).err());
        let error = failed.unwrap_or_else(|| writer.finish(meta()).unwrap_err());
        assert!(matches!(error, RepoError::Store(StoreError::NoSpace { .. })), "{error}");
        assert!(error.to_string().contains("no space left"), "{error}");
    }
    assert_eq!(runtime.block_on(repo.images()).unwrap(), [image("a")]);
    let version = runtime.block_on(open(&repo, &image("a"), "main")).unwrap();
    assert!(runtime.block_on(read_all(&version)).unwrap() == old);
    let mut temps =
        std::fs::read_dir(dir.path().join("repo")).unwrap().map(|entry| entry.unwrap().file_name());
    assert!(!temps.any(|name| name.to_string_lossy().starts_with(".tmp")), "temporary files are left");
    assert_eq!(version.commit().size, ByteLen(1 << 20));
}
