//! Directories become ext4 images: judged by e2fsck and by the kernel.

// Helpers of tests may unwrap as tests do.
#![allow(clippy::unwrap_used)]

mod harness;
#[path = "image_support/mod.rs"]
mod support;

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::process::Command;

use harness::need;
use horcrux::image::{
    FileSink, ImageError, ImageOptions, ImageSink, Mke2fsReason, NoteKind, Progress, SinkError, Summary,
    image_from_dir,
};
use horcrux::units::ByteLen;
use support::{Fixture, Listing, Mount, assert_same, fsck_ext4, image_hash, noise, root, run};

fn options() -> ImageOptions {
    ImageOptions::new("AMCC", std::env::temp_dir())
}

fn make(dir: &Path, image: &Path, options: &ImageOptions) -> Result<Summary, ImageError> {
    let mut sink = FileSink::create(image).unwrap();
    let summary = image_from_dir(dir, options, &mut sink, &Progress::new())?;
    let file = sink.finish().unwrap();
    assert_eq!(ByteLen(file.metadata().unwrap().len()), summary.device_size, "the sink got the whole device");
    Ok(summary)
}

#[test]
fn one_of_everything_comes_out_the_same() {
    let temp = tempfile::tempdir().unwrap();
    let (source, image) = (temp.path().join("source"), temp.path().join("image"));
    fs::create_dir(&source).unwrap();
    Fixture::default().build(&source);
    let summary = make(&source, &image, &options()).unwrap();
    assert_eq!(summary.notes, [], "nothing is lost");
    fsck_ext4(&image);
    let features = run(Command::new("/sbin/dumpe2fs").arg("-h").arg(&image));
    assert!(features.contains("has_journal"), "{features}");
    if !root("for comparing through a mount") {
        return;
    }
    {
        let mount = Mount::new(&image, "ro");
        assert_same(Listing::default(), &source, mount.path());
        let caps = run(Command::new("/sbin/getcap").arg(mount.path().join("block and one")));
        assert!(caps.contains("cap_net_bind_service=ep"), "{caps}");
    }
    {
        let mount = Mount::new(&image, "rw");
        for number in 0..5000 {
            fs::write(mount.path().join(format!("many/new-{number}")), [1; 100]).unwrap();
        }
        fs::remove_file(mount.path().join("five GiB")).unwrap();
        fs::write(mount.path().join("big"), vec![3; 20_000_000]).unwrap();
    }
    fsck_ext4(&image);
}

#[test]
fn the_same_directory_gives_the_same_bytes_and_so_does_its_copy() {
    let temp = tempfile::tempdir().unwrap();
    let (source, copy) = (temp.path().join("source"), temp.path().join("copy"));
    fs::create_dir(&source).unwrap();
    Fixture::default().build(&source);
    let [first, second, third] = ["first", "second", "third"].map(|name| temp.path().join(name));
    make(&source, &first, &options()).unwrap();
    run(Command::new("cp").arg("-a").arg("--sparse=auto").arg(&source).arg(&copy));
    make(&source, &second, &options()).unwrap();
    assert_eq!(image_hash(&first), image_hash(&second));
    make(&copy, &third, &options()).unwrap();
    assert_eq!(image_hash(&first), image_hash(&third));
    let other = ImageOptions::new("another name", std::env::temp_dir());
    make(&source, &second, &other).unwrap();
    assert_ne!(image_hash(&first), image_hash(&second), "the identity comes from the name");
}

#[test]
fn names_that_are_not_utf_8_go_through_mke2fs_and_come_out_the_same() {
    if !need(&["mke2fs"]) {
        return;
    }
    let temp = tempfile::tempdir().unwrap();
    let (source, image) = (temp.path().join("source"), temp.path().join("image"));
    fs::create_dir(&source).unwrap();
    Fixture { not_for_streaming: true }.build(&source);
    let summary = make(&source, &image, &options()).unwrap();
    let kinds: Vec<_> = summary.notes.iter().map(|note| note.kind.clone()).collect();
    assert_eq!(
        kinds,
        [NoteKind::ThroughMke2fs(Mke2fsReason::Name), NoteKind::LinkSplit],
        "{:?}",
        summary.notes
    );
    assert_eq!(summary.notes[0].examples.len(), 1);
    fsck_ext4(&image);
    let again = temp.path().join("again");
    make(&source, &again, &options()).unwrap();
    assert_eq!(image_hash(&image), image_hash(&again));
    if !root("for comparing through a mount") {
        return;
    }
    {
        let mount = Mount::new(&image, "ro");
        assert_same(Listing { linked_symlinks: false, ..Listing::default() }, &source, mount.path());
    }
    {
        let mount = Mount::new(&image, "rw");
        for number in 0..1000 {
            fs::write(mount.path().join(format!("many/new-{number}")), [1; 100]).unwrap();
        }
    }
    fsck_ext4(&image);
}

#[test]
fn attributes_too_big_for_a_block_go_through_mke2fs() {
    if !need(&["mke2fs"]) || !root("for trusted attributes") {
        return;
    }
    let temp = tempfile::tempdir().unwrap();
    // tmpfs has no limit of a block for attributes; ext4 without ea_inode has.
    let tmpfs = temp.path().join("tmpfs");
    fs::create_dir(&tmpfs).unwrap();
    run(Command::new("mount").args(["-t", "tmpfs", "none"]).arg(&tmpfs));
    let unmount = Unmount(tmpfs.clone());
    fs::create_dir(tmpfs.join("source")).unwrap();
    fs::write(tmpfs.join("source/file"), "content").unwrap();
    xattr::set(tmpfs.join("source/file"), "trusted.large", &[5; 9000]).unwrap();
    xattr::set(tmpfs.join("source/file"), "trusted.large too", &[6; 3900]).unwrap();
    let image = temp.path().join("image");
    let summary = make(&tmpfs.join("source"), &image, &options()).unwrap();
    assert_eq!(summary.notes[0].kind, NoteKind::ThroughMke2fs(Mke2fsReason::XattrSize));
    fsck_ext4(&image);
    let mount = Mount::new(&image, "ro");
    let listing = Listing { allocation: false, ..Listing::default() };
    assert_same(listing, &tmpfs.join("source"), mount.path());
    drop(unmount);
}

/// Unmounts at the end of a test, however it ends.
struct Unmount(std::path::PathBuf);

impl Drop for Unmount {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg(&self.0).status();
    }
}

#[test]
fn a_lost_and_found_with_something_in_it_is_kept_and_an_empty_one_replaced() {
    let temp = tempfile::tempdir().unwrap();
    let (source, image) = (temp.path().join("source"), temp.path().join("image"));
    fs::create_dir_all(source.join("lost+found")).unwrap();
    fs::write(source.join("file"), "content").unwrap();
    let summary = make(&source, &image, &options()).unwrap();
    assert_eq!(summary.notes.len(), 1);
    assert_eq!(summary.notes[0].kind, NoteKind::LostFound);
    fsck_ext4(&image);
    if need(&["mke2fs"]) {
        fs::write(source.join("lost+found/#1234"), "found").unwrap();
        let summary = make(&source, &image, &options()).unwrap();
        assert_eq!(summary.notes[0].kind, NoteKind::ThroughMke2fs(Mke2fsReason::LostFound));
        fsck_ext4(&image);
        if root("for comparing through a mount") {
            let mount = Mount::new(&image, "ro");
            assert_eq!(fs::read(mount.path().join("lost+found/#1234")).unwrap(), b"found");
        }
    }
    fs::remove_dir_all(source.join("lost+found")).unwrap();
    fs::write(source.join("lost+found"), "a file").unwrap();
    assert!(matches!(make(&source, &image, &options()), Err(ImageError::LostFound { .. })));
}

#[test]
fn sixteen_tib_are_thin() {
    let temp = tempfile::tempdir().unwrap();
    let source = temp.path().join("source");
    fs::create_dir(&source).unwrap();
    fs::write(source.join("file"), "content").unwrap();
    let mut sink = Counting::default();
    let size = 1u64 << 44;
    let options = ImageOptions { size: Some(ByteLen(size)), ..options() };
    let summary = image_from_dir(&source, &options, &mut sink, &Progress::new()).unwrap();
    assert_eq!((summary.device_size.value(), sink.data + sink.holes), (size, size));
    assert!(matches!(summary.notes[0].kind, NoteKind::FilesystemSmaller { .. }), "{:?}", summary.notes);
    // Group descriptors, their backups, one bitmap block for each group that holds metadata.
    assert!(sink.data < 256 << 20, "{} bytes of data", sink.data);
    assert!(sink.hole_calls < 20_000, "{} holes", sink.hole_calls);
}

/// Counts what a sink is given.
#[derive(Default)]
struct Counting {
    data: u64,
    holes: u64,
    hole_calls: u64,
}

impl ImageSink for Counting {
    fn begin(&mut self, _device: ByteLen) -> Result<(), SinkError> {
        Ok(())
    }

    fn data(&mut self, bytes: &[u8]) -> Result<(), SinkError> {
        self.data += bytes.len() as u64;
        Ok(())
    }

    fn hole(&mut self, len: ByteLen) -> Result<(), SinkError> {
        self.holes += len.value();
        self.hole_calls += 1;
        Ok(())
    }
}

#[test]
fn a_terabyte_image_mounts_and_checks() {
    if !root("for mounting") {
        return;
    }
    let temp = tempfile::tempdir().unwrap();
    let (source, image) = (temp.path().join("source"), temp.path().join("image"));
    fs::create_dir(&source).unwrap();
    fs::write(source.join("file"), "content").unwrap();
    make(&source, &image, &ImageOptions { size: Some(ByteLen(1 << 40)), ..options() }).unwrap();
    fsck_ext4(&image);
    let mount = Mount::new(&image, "rw");
    assert_eq!(fs::read(mount.path().join("file")).unwrap(), b"content");
    fs::write(mount.path().join("new"), "new").unwrap();
}

#[test]
fn every_size_that_is_accepted_gives_a_clean_filesystem() {
    let temp = tempfile::tempdir().unwrap();
    let (source, image) = (temp.path().join("source"), temp.path().join("image"));
    fs::create_dir(&source).unwrap();
    for number in 0..200 {
        fs::write(source.join(format!("{number}")), noise(20_000, number)).unwrap();
    }
    const GROUP: u64 = 128 << 20;
    let sizes = [
        16 << 20,
        17 << 20,
        GROUP - 4096,
        GROUP,
        GROUP + 4096,
        GROUP + 5 * 4096,
        3 * GROUP + 4096,
        3 * GROUP + (1 << 20),
        16 * GROUP + 4096,
        16 * GROUP + (2 << 20),
        16 * GROUP + (8 << 20),
        17 * GROUP + 4096,
        25 * GROUP + 3 * 4096,
        33 * GROUP - 4096,
    ];
    for size in sizes {
        let options = ImageOptions { size: Some(ByteLen(size)), ..options() };
        let summary = make(&source, &image, &options).unwrap_or_else(|error| panic!("{size}: {error}"));
        assert_eq!(summary.device_size.value(), size);
        fsck_ext4(&image);
    }
}

#[test]
fn a_directory_too_big_for_the_size_is_refused_with_a_size_that_is_enough() {
    let temp = tempfile::tempdir().unwrap();
    let (source, image) = (temp.path().join("source"), temp.path().join("image"));
    fs::create_dir(&source).unwrap();
    fs::write(source.join("file"), noise(100_000_000, 5)).unwrap();
    let given = ImageOptions { size: Some(ByteLen(64 << 20)), ..options() };
    let Err(error) = make(&source, &image, &given) else { panic!("100 MB do not fit 64 MiB") };
    let ImageError::TooBig { needed, given } = error else { panic!("{error}") };
    assert_eq!(given.value(), 64 << 20);
    assert!(needed.value() < 120 << 20, "{needed}");
    make(&source, &image, &ImageOptions { size: Some(needed), ..options() }).unwrap();
    fsck_ext4(&image);
}

#[test]
fn many_empty_files_get_the_inodes_they_need() {
    let temp = tempfile::tempdir().unwrap();
    let (source, image) = (temp.path().join("source"), temp.path().join("image"));
    fs::create_dir(&source).unwrap();
    for number in 0..50_000 {
        fs::File::create(source.join(format!("an empty file with a longer name {number}"))).unwrap();
    }
    let Err(ImageError::TooBig { needed, .. }) =
        make(&source, &image, &ImageOptions { size: Some(ByteLen(16 << 20)), ..options() })
    else {
        panic!("50,000 inodes do not fit 16 MiB")
    };
    make(&source, &image, &ImageOptions { size: Some(needed), ..options() }).unwrap();
    fsck_ext4(&image);
    make(&source, &image, &options()).unwrap();
    fsck_ext4(&image);
    if root("for mounting") {
        let mount = Mount::new(&image, "rw");
        assert_same(Listing::default(), &source, mount.path());
        for number in 0..20_000 {
            fs::File::create(mount.path().join(format!("new {number}"))).unwrap();
        }
        drop(mount);
        fsck_ext4(&image);
    }
}

#[test]
fn deep_directories_are_walked_without_running_out_of_anything() {
    let temp = tempfile::tempdir().unwrap();
    let (source, image) = (temp.path().join("source"), temp.path().join("image"));
    fs::create_dir(&source).unwrap();
    // Far deeper than a path may be long: made from the inside out.
    let depth = 1500;
    for level in 0..depth {
        let outer = temp.path().join("outer");
        fs::create_dir(&outer).unwrap();
        fs::write(outer.join("file"), format!("{level}")).unwrap();
        if level > 0 {
            fs::rename(temp.path().join("inner"), outer.join("dir with a name")).unwrap();
        }
        fs::rename(&outer, temp.path().join("inner")).unwrap();
    }
    fs::rename(temp.path().join("inner"), source.join("top")).unwrap();
    let summary = make(&source, &image, &options()).unwrap();
    assert_eq!((summary.dirs, summary.files), (depth + 1, depth));
    fsck_ext4(&image);
}

#[test]
fn access_times_are_kept_on_demand() {
    if !root("for comparing through a mount") {
        return;
    }
    let temp = tempfile::tempdir().unwrap();
    let (source, image) = (temp.path().join("source"), temp.path().join("image"));
    fs::create_dir(&source).unwrap();
    fs::write(source.join("file"), "content").unwrap();
    run(Command::new("touch").args(["-a", "-d", "2022-02-22 22:22:22.222222222"]).arg(source.join("file")));
    make(&source, &image, &ImageOptions { keep_atime: true, ..options() }).unwrap();
    let mount = Mount::new(&image, "ro");
    let atime = |dir: &Path| {
        let meta = fs::metadata(dir.join("file")).unwrap();
        (meta.atime(), meta.atime_nsec())
    };
    assert_eq!(atime(mount.path()), atime(&source));
    assert_eq!(atime(&source).1, 222_222_222, "making an image does not count as access");
}

#[test]
fn a_file_of_the_far_future_does_not_age_the_filesystem() {
    let temp = tempfile::tempdir().unwrap();
    let (source, image) = (temp.path().join("source"), temp.path().join("image"));
    fs::create_dir(&source).unwrap();
    fs::write(source.join("file"), "content").unwrap();
    run(Command::new("touch").args(["-m", "-d", "2128-06-11 08:53:20 UTC"]).arg(source.join("file")));
    run(Command::new("touch").args(["-m", "-d", "2021-01-01 01:01:01 UTC"]).arg(&source));
    make(&source, &image, &options()).unwrap();
    fsck_ext4(&image);
    let inode =
        run(Command::new("/sbin/debugfs").args(["-R", "stat lost+found"]).arg(&image).env("TZ", "UTC"));
    assert!(inode.lines().any(|line| line.contains("mtime: ") && line.contains("2021")), "{inode}");
    let superblock = run(Command::new("/sbin/dumpe2fs").arg("-h").arg(&image).env("TZ", "UTC"));
    let made = superblock.lines().find(|line| line.starts_with("Filesystem created:")).unwrap();
    assert!(made.ends_with("Jan  1 01:01:01 2021"), "{made}");
    let file = run(Command::new("/sbin/debugfs").args(["-R", "stat file"]).arg(&image).env("TZ", "UTC"));
    assert!(file.lines().any(|line| line.contains("mtime: ") && line.contains("2128")), "{file}");
}
