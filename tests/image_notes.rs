//! What a filesystem can't keep, or keeps in another way, is named; and everything that sends a directory through mke2fs does, and comes out right.

// Helpers of tests may unwrap as tests do.
#![allow(clippy::unwrap_used)]

mod harness;
#[path = "image_support/mod.rs"]
mod support;

use std::fs;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{FileExt, symlink};
use std::path::{Path, PathBuf};
use std::process::Command;

use harness::{Tmpfs, need, soak};
use horcrux::image::{
    FileSink, ImageError, ImageOptions, Mke2fsReason, NoteKind, Phase, Progress, Summary, image_from_dir,
};
use horcrux::units::ByteLen;
use support::{Listing, Mount, assert_same, fsck_ext4, meddled_with, root, run};

fn options() -> ImageOptions {
    ImageOptions::new("AMCC", std::env::temp_dir())
}

fn make(dir: &Path, image: &Path, options: &ImageOptions) -> Result<Summary, ImageError> {
    let mut sink = FileSink::create(image).unwrap();
    let summary = image_from_dir(dir, options, &mut sink, &Progress::new())?;
    sink.finish().unwrap();
    Ok(summary)
}

/// The first file a note of this kind names.
fn named(summary: &Summary, kind: &NoteKind) -> PathBuf {
    let note = summary.notes.iter().find(|note| note.kind == *kind);
    note.unwrap_or_else(|| panic!("no note {kind:?} in {:?}", summary.notes)).examples[0].clone()
}

fn times(path: &Path) -> (i64, i64) {
    use std::os::unix::fs::MetadataExt;
    let found = fs::symlink_metadata(path).unwrap();
    (found.mtime(), found.mtime_nsec())
}

#[test]
fn times_flags_and_mount_points_that_do_not_fit_are_named() {
    let Some(tmpfs) = Tmpfs::mount(64) else { return };
    let temp = tempfile::tempdir().unwrap();
    let (source, image) = (tmpfs.path().join("source"), temp.path().join("image"));
    fs::create_dir_all(source.join("mounted")).unwrap();
    for (name, date) in [("future", "2600-01-01"), ("past", "1800-01-01"), ("now", "2026-01-01")] {
        fs::write(source.join(name), name).unwrap();
        run(Command::new("touch").args(["-d", date]).arg(source.join(name)));
    }
    let inner = Command::new("mount").args(["-t", "tmpfs", "none"]).arg(source.join("mounted")).status();
    assert!(inner.unwrap().success());
    let unmount = Unmount(source.join("mounted"));
    fs::write(source.join("mounted/inside"), "of it").unwrap();
    let made = make(&source, &image, &options()).unwrap();
    let clamped = made.notes.iter().find(|note| note.kind == NoteKind::TimeClamped).unwrap();
    assert_eq!((clamped.count, clamped.examples.clone()), (2, vec!["future".into(), "past".into()]));
    assert_eq!(clamped.to_string(), "times moved into the filesystem's range: future, past");
    assert_eq!(named(&made, &NoteKind::MountPoint), Path::new("mounted"));
    fsck_ext4(&image);
    {
        let mount = Mount::new(&image, "ro");
        // The nearest ext4 can hold: 34 bits of seconds from 1901 on.
        assert_eq!(times(&mount.path().join("future")), ((1 << 34) - (1 << 31) - 1, 0));
        assert_eq!(times(&mount.path().join("past")), (-(1 << 31), 0));
        assert_eq!(times(&mount.path().join("now")), times(&source.join("now")));
        assert_eq!(fs::read(mount.path().join("mounted/inside")).unwrap(), b"of it");
    }
    drop(unmount);

    // Flags are a matter of the source's filesystem; this one has them.
    let disk = temp.path().join("disk");
    fs::File::create(&disk).unwrap().set_len(32 << 20).unwrap();
    run(Command::new("/sbin/mke2fs").args(["-q", "-t", "ext4"]).arg(&disk));
    let mount = Mount::new(&disk, "rw");
    fs::write(mount.path().join("kept"), "as it is").unwrap();
    run(Command::new("chattr").arg("+i").arg(mount.path().join("kept")));
    let made = make(mount.path(), &image, &options()).unwrap();
    run(Command::new("chattr").arg("-i").arg(mount.path().join("kept")));
    assert_eq!(named(&made, &NoteKind::InodeFlag("immutable")), Path::new("kept"));
}

#[test]
fn what_no_ext4_can_hold_is_refused_by_name() {
    let Some(tmpfs) = Tmpfs::mount(256) else { return };
    let temp = tempfile::tempdir().unwrap();
    let (source, image) = (tmpfs.path().join("source"), temp.path().join("image"));
    fs::create_dir(&source).unwrap();
    let big = source.join("big");
    fs::File::create(&big).unwrap().set_len(1 << 44).unwrap();
    match make(&source, &image, &options()) {
        Err(ImageError::FileTooLarge { path, size, fs: "ext4", .. }) => {
            assert_eq!((path, size), (big.clone(), ByteLen(1 << 44)));
        }
        other => panic!("{other:?}"),
    }
    fs::remove_file(&big).unwrap();

    fs::write(source.join("first"), "one of many").unwrap();
    for number in 1..=65_000 {
        fs::hard_link(source.join("first"), source.join(format!("name {number}"))).unwrap();
    }
    match make(&source, &image, &options()) {
        Err(ImageError::TooManyLinks { max: 65_000, .. }) => {}
        other => panic!("{other:?}"),
    }
    fs::remove_file(source.join("name 1")).unwrap();
    make(&source, &image, &options()).unwrap();
    fsck_ext4(&image);
}

/// Makes it through mke2fs, for this reason, and compares it.
fn through_mke2fs(source: &Path, reason: Mke2fsReason, options: &ImageOptions) {
    let temp = tempfile::tempdir_in(&options.scratch_dir).unwrap();
    let image = temp.path().join("image");
    let made = make(source, &image, options).unwrap();
    assert_eq!(made.notes[0].kind, NoteKind::ThroughMke2fs(reason), "{:?}", made.notes);
    fsck_ext4(&image);
    let mount = Mount::new(&image, "ro");
    assert_same(Listing { allocation: false, ..Listing::default() }, source, mount.path());
}

#[test]
fn targets_and_attribute_names_that_are_not_utf_8_go_through_mke2fs() {
    if !need(&["mke2fs"]) || !root("for comparing through a mount") {
        return;
    }
    let odd = std::ffi::OsStr::from_bytes(b"odd \xff name");
    let temp = tempfile::tempdir().unwrap();
    let source = temp.path().join("source");
    fs::create_dir(&source).unwrap();
    fs::write(source.join("file"), "content").unwrap();
    symlink(odd, source.join("link")).unwrap();
    through_mke2fs(&source, Mke2fsReason::Target, &options());
    fs::remove_file(source.join("link")).unwrap();
    let name = std::ffi::OsStr::from_bytes(b"trusted.odd \xff");
    xattr::set(source.join("file"), name, b"value").unwrap();
    through_mke2fs(&source, Mke2fsReason::XattrName, &options());
}

#[test]
fn a_file_that_vanishes_or_changes_under_mke2fs_is_named() {
    if !need(&["mke2fs"]) {
        return;
    }
    let temp = tempfile::tempdir().unwrap();
    let (source, image) = (temp.path().join("source"), temp.path().join("image"));
    let odd = source.join(std::ffi::OsStr::from_bytes(b"odd \xff name"));
    let made = |progress: &Progress| {
        fs::write(&odd, "for mke2fs").unwrap();
        image_from_dir(&source, &options(), &mut FileSink::create(&image).unwrap(), progress)
    };
    let error = meddled_with(&source, Phase::Layout, |victim| fs::remove_file(victim).unwrap(), made);
    assert!(matches!(&error, ImageError::Vanished { path } if path.ends_with("z")), "{error}");
    let expected = "z: vanished while the image was made; stop its writers or copy a snapshot";
    assert!(error.to_string().ends_with(expected), "{error}");
    let error = meddled_with(&source, Phase::Layout, |victim| fs::write(victim, "longer").unwrap(), made);
    assert!(
        matches!(&error, ImageError::Changed { path, what: "it grew" } if path.ends_with("z")),
        "{error}"
    );
}

#[test]
fn a_full_scratch_disk_under_mke2fs_is_named() {
    let Some(scratch) = Tmpfs::mount(32) else { return };
    if !need(&["mke2fs"]) {
        return;
    }
    let temp = tempfile::tempdir().unwrap();
    let (source, image) = (temp.path().join("source"), temp.path().join("image"));
    fs::create_dir(&source).unwrap();
    fs::write(source.join(std::ffi::OsStr::from_bytes(b"odd \xff name")), support::noise(64 << 20, 1))
        .unwrap();
    let options = ImageOptions::new("AMCC", scratch.path());
    match make(&source, &image, &options) {
        Err(ImageError::Scratch { source, .. }) => {
            assert_eq!(source.kind(), std::io::ErrorKind::StorageFull);
        }
        other => panic!("{other:?}"),
    }
}

/// Half a million pieces, and devices as big as they come: checked by e2fsck. Takes gigabytes and minutes.
#[test]
fn very_many_pieces_and_the_largest_devices_are_clean() {
    if !soak() {
        eprintln!("skipped: only in the soak");
        return;
    }
    let Some(tmpfs) = Tmpfs::mount(12 << 10) else { return };
    let source = tmpfs.path().join("source");
    fs::create_dir(&source).unwrap();
    fs::write(source.join("file"), "content").unwrap();
    let scratch = ImageOptions::new("AMCC", tmpfs.path());
    // The largest that is streamed.
    let largest = ImageOptions { size: Some(ByteLen(1 << 44)), ..scratch.clone() };
    let image = tmpfs.path().join("image");
    make(&source, &image, &largest).unwrap();
    fsck_ext4(&image);
    assert_eq!(fs::read(Mount::new(&image, "ro").path().join("file")).unwrap(), b"content");
    fs::remove_file(&image).unwrap();
    let larger = ImageOptions { size: Some(ByteLen(17 << 40)), ..scratch.clone() };
    through_mke2fs(&source, Mke2fsReason::DeviceSize, &larger);

    let file = fs::File::create(source.join("pieces")).unwrap();
    for piece in 0..470_000u64 {
        file.write_all_at(b"x", piece * 8192).unwrap();
    }
    through_mke2fs(&source, Mke2fsReason::Segments, &scratch);
}

/// Unmounts at the end of a test, however it ends.
struct Unmount(PathBuf);

impl Drop for Unmount {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg(&self.0).status();
    }
}
