//! Directories become XFS images: judged by xfs_repair and by the kernel.

// Helpers of tests may unwrap as tests do.
#![allow(clippy::unwrap_used)]

mod harness;
#[path = "image_support/mod.rs"]
mod support;

use std::fs;
use std::path::Path;
use std::process::Command;

use harness::{Tmpfs, cli, need};
use horcrux::image::{
    FileSink, FsKind, ImageError, ImageOptions, Phase, Progress, Summary, image_from_dir, image_from_file,
};
use horcrux::units::ByteLen;
use support::{Fixture, Listing, Mount, assert_same, fsck_xfs, meddled_with, noise, root, run};

fn options(scratch: &Path) -> ImageOptions {
    ImageOptions { fs: FsKind::Xfs, ..ImageOptions::new("AMCC", scratch) }
}

fn make(dir: &Path, image: &Path, options: &ImageOptions) -> Result<Summary, ImageError> {
    let mut sink = FileSink::create(image).unwrap();
    let summary = image_from_dir(dir, options, &mut sink, &Progress::new())?;
    assert_eq!(ByteLen(sink.finish().unwrap().metadata().unwrap().len()), summary.device_size);
    Ok(summary)
}

/// Nothing mounted, no loop device on a deleted file, nothing in the scratch directory.
fn assert_nothing_left(scratch: &Path) {
    let mounts = fs::read_to_string("/proc/self/mounts").unwrap();
    assert!(!mounts.contains(scratch.to_str().unwrap()), "{mounts}");
    assert_eq!(fs::read_dir(scratch).unwrap().count(), 0);
    let loops = run(Command::new("/sbin/losetup").arg("-a").arg("-l"));
    assert!(!loops.contains(scratch.to_str().unwrap()), "{loops}");
}

#[test]
fn one_of_everything_comes_out_the_same() {
    if !root("for an XFS image") || !need(&["mkfs.xfs"]) {
        return;
    }
    let temp = tempfile::tempdir().unwrap();
    let [source, image, scratch] = ["source", "image", "scratch"].map(|name| temp.path().join(name));
    fs::create_dir(&source).unwrap();
    fs::create_dir(&scratch).unwrap();
    Fixture { not_for_streaming: true }.build(&source);
    let long = source.join("very slow link");
    match make(&source, &image, &options(&scratch)) {
        Err(ImageError::LinkTooLong { path, .. }) => assert_eq!(path, long),
        other => panic!("XFS holds targets of 1023 bytes: {other:?}"),
    }
    fs::remove_file(&long).unwrap();
    let summary = make(&source, &image, &options(&scratch)).unwrap();
    assert_eq!(summary.notes, []);
    assert_nothing_left(&scratch);
    fsck_xfs(&image);
    {
        let mount = Mount::new(&image, "ro,nouuid");
        assert_same(Listing::default(), &source, mount.path());
        // A new image of the same name while the old one is in use: the same UUID twice.
        make(&source, &temp.path().join("again"), &options(&scratch)).unwrap();
    }
    // And the image as a raw image is what it was, holes included.
    let copy = temp.path().join("copy");
    let mut sink = FileSink::create(&copy).unwrap();
    let summary = image_from_file(&image, &mut sink, &Progress::new()).unwrap();
    sink.finish().unwrap();
    assert_eq!(summary.fs, Some(FsKind::Xfs));
    assert_eq!(support::image_hash(&image), support::image_hash(&copy));
    assert!(summary.bytes_read.value() < summary.device_size.value() / 2, "holes are not read");
}

#[test]
fn a_directory_too_big_for_the_size_is_refused_and_leaves_nothing_mounted() {
    if !root("for an XFS image") || !need(&["mkfs.xfs"]) {
        return;
    }
    let temp = tempfile::tempdir().unwrap();
    let [source, image, scratch] = ["source", "image", "scratch"].map(|name| temp.path().join(name));
    fs::create_dir(&source).unwrap();
    fs::create_dir(&scratch).unwrap();
    fs::write(source.join("file"), noise(350 << 20, 1)).unwrap();
    for size in [200u64 << 20, 300 << 20] {
        let given = ImageOptions { size: Some(ByteLen(size)), ..options(&scratch) };
        let error = make(&source, &image, &given).expect_err("350 MiB do not fit");
        assert!(matches!(error, ImageError::TooBig { .. }), "{size}: {error}");
        assert_nothing_left(&scratch);
    }
}

/// The kernel takes what is written and finds out later that the scratch file's disk is full: that must not become zeros in an image.
#[test]
fn a_full_scratch_disk_is_an_error_and_no_image() {
    let Some(scratch) = Tmpfs::mount(160) else { return };
    if !need(&["mkfs.xfs"]) {
        return;
    }
    let temp = tempfile::tempdir().unwrap();
    let [source, image] = ["source", "image"].map(|name| temp.path().join(name));
    fs::create_dir(&source).unwrap();
    // Far over it; over it by what the kernel writes last; and by the filesystem's own blocks alone.
    for mib in [250, 150, 120] {
        fs::write(source.join("file"), noise(mib << 20, 1)).unwrap();
        match make(&source, &image, &options(scratch.path())) {
            Err(ImageError::Scratch { source, .. }) => {
                assert_eq!(source.kind(), std::io::ErrorKind::StorageFull, "{mib} MiB");
            }
            other => panic!("{mib} MiB: {other:?}"),
        }
        assert_eq!(fs::read_dir(scratch.path()).unwrap().count(), 0);
    }
    // A filesystem that keeps space back from everybody says that there is some.
    let disk = temp.path().join("disk");
    fs::File::create(&disk).unwrap().set_len(160 << 20).unwrap();
    run(Command::new("/sbin/mke2fs").args(["-q", "-t", "ext4"]).arg(&disk));
    {
        let mount = Mount::new(&disk, "rw");
        match make(&source, &image, &options(mount.path())) {
            Err(ImageError::Scratch { source, .. }) => {
                assert_eq!(source.kind(), std::io::ErrorKind::StorageFull)
            }
            other => panic!("on ext4: {other:?}"),
        }
    }
    // And through the command: what to do about it, and nothing is stored.
    let repo = temp.path().join("repo");
    let mut command = cli();
    command.args(["image-from-dir", "--fs", "xfs", "--scratch-dir"]).arg(scratch.path());
    let said = harness::run(command.arg("disk").arg(&source).arg(&repo)).refused();
    let expected =
        format!("error: scratch file in {}: cannot write it: No space left", scratch.path().display());
    assert!(said.starts_with(&expected), "{said}");
    assert!(
        said.contains("\nhint: --scratch-dir names a place with more space; nothing was stored"),
        "{said}"
    );
    assert!(!repo.join("images").exists());
    // With enough of it, all of it is there.
    fs::write(source.join("file"), noise(40 << 20, 1)).unwrap();
    make(&source, &image, &options(scratch.path())).unwrap();
    fsck_xfs(&image);
    let mount = Mount::new(&image, "ro,nouuid");
    assert_same(Listing::default(), &source, mount.path());
}

/// "." and "/" are not stepped onto when they are mounted over: what was meant for the image would land in the directory itself.
#[test]
fn the_scratch_directory_may_be_the_current_one_but_not_the_root() {
    if !root("for an XFS image") || !need(&["mkfs.xfs", "nbdcopy"]) {
        return;
    }
    let temp = tempfile::tempdir().unwrap();
    let [source, repo, scratch] = ["source", "repo", "scratch"].map(|name| temp.path().join(name));
    fs::create_dir(&source).unwrap();
    fs::create_dir(&scratch).unwrap();
    fs::write(source.join("file"), "content").unwrap();
    let make = |scratch_dir: &str| {
        let mut command = cli();
        command.args(["image-from-dir", "--fs", "xfs", "--scratch-dir", scratch_dir, "disk"]);
        harness::run(command.arg(&source).arg(&repo).current_dir(&scratch))
    };
    let said = make("/").refused();
    assert!(said.contains("nothing can be mounted on the root; choose a directory below it"), "{said}");
    assert!(!Path::new("/file").exists());
    make(".").ok();
    assert_nothing_left(&scratch);
    let server = harness::Serve::new(&repo, &temp.path().join("state")).name("disk").start();
    let copy = temp.path().join("copy");
    run(Command::new("nbdcopy").arg(server.uri("disk")).arg(&copy));
    server.stop();
    let mount = Mount::new(&copy, "ro,nouuid,norecovery");
    assert_same(Listing::default(), &source, mount.path());
}

#[test]
fn a_file_that_vanishes_or_changes_while_the_kernel_is_given_it_is_named() {
    if !root("for an XFS image") || !need(&["mkfs.xfs"]) {
        return;
    }
    let temp = tempfile::tempdir().unwrap();
    let [source, image, scratch] = ["source", "image", "scratch"].map(|name| temp.path().join(name));
    fs::create_dir(&scratch).unwrap();
    let error = meddled_with(
        &source,
        Phase::Read,
        |victim| fs::remove_file(victim).unwrap(),
        |progress| {
            image_from_dir(&source, &options(&scratch), &mut FileSink::create(&image).unwrap(), progress)
        },
    );
    assert!(matches!(&error, ImageError::Vanished { path } if path.ends_with("z")), "{error}");
    let error = meddled_with(
        &source,
        Phase::Read,
        |victim| fs::write(victim, "longer").unwrap(),
        |progress| {
            image_from_dir(&source, &options(&scratch), &mut FileSink::create(&image).unwrap(), progress)
        },
    );
    assert!(
        matches!(&error, ImageError::Changed { path, what: "it grew" } if path.ends_with("z")),
        "{error}"
    );
    assert_nothing_left(&scratch);
}

#[test]
fn without_root_an_xfs_image_says_that_it_needs_root() {
    if !root("for becoming nobody") || !need(&["mkfs.xfs"]) {
        return;
    }
    let temp = tempfile::tempdir().unwrap();
    std::os::unix::fs::chown(temp.path(), Some(65534), Some(65534)).unwrap();
    let text = support::as_nobody("without_root_an_xfs_image_helper", temp.path());
    assert!(text.contains("needs root"), "{text}");
}

/// Run as nobody by the test above; on its own it has nothing to do.
#[test]
fn without_root_an_xfs_image_helper() {
    let Ok(dir) = std::env::var("HORCRUX_TEST_AS_NOBODY") else { return };
    let dir = Path::new(&dir);
    fs::create_dir(dir.join("source")).unwrap();
    fs::create_dir(dir.join("scratch")).unwrap();
    let error = make(&dir.join("source"), &dir.join("image"), &options(&dir.join("scratch"))).unwrap_err();
    println!("{error}");
    assert_eq!(fs::read_dir(dir.join("scratch")).unwrap().count(), 0);
}

#[test]
fn a_kill_in_the_middle_leaves_no_mount_no_loop_device_and_no_file() {
    if !root("for an XFS image") || !need(&["mkfs.xfs"]) {
        return;
    }
    let temp = tempfile::tempdir().unwrap();
    let [source, scratch] = ["source", "scratch"].map(|name| temp.path().join(name));
    fs::create_dir(&source).unwrap();
    fs::create_dir(&scratch).unwrap();
    fs::write(source.join("file"), noise(200 << 20, 1)).unwrap();
    let mut command = Command::new(std::env::current_exe().unwrap());
    command.args(["--exact", "a_kill_helper"]).env("HORCRUX_TEST_KILL", temp.path());
    let mut child = command.spawn().unwrap();
    let loops = || run(&mut Command::new("/sbin/losetup"));
    let marker = scratch.to_str().unwrap();
    let patience = |what: &str, done: &dyn Fn() -> bool| {
        let start = std::time::Instant::now();
        while !done() {
            assert!(start.elapsed().as_secs() < 60, "{what}: {}", loops());
            std::thread::sleep(std::time::Duration::from_millis(10));
        }
    };
    patience("the loop device appears", &|| loops().contains(marker));
    child.kill().unwrap();
    child.wait().unwrap();
    // The kernel writes back what was copied before it lets go.
    patience("the loop device goes", &|| !loops().contains(marker));
    assert_nothing_left(&scratch);
}

/// Killed by the test above; on its own it has nothing to do.
#[test]
fn a_kill_helper() {
    let Ok(dir) = std::env::var("HORCRUX_TEST_KILL") else { return };
    let dir = Path::new(&dir);
    make(&dir.join("source"), &dir.join("image"), &options(&dir.join("scratch"))).unwrap();
}
