//! What must not become an image says so, by name; and raw images.

// Helpers of tests may unwrap as tests do.
#![allow(clippy::unwrap_used)]

mod harness;
#[path = "image_support/mod.rs"]
mod support;

use std::fs;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::Command;

use horcrux::image::{
    FileSink, FsKind, ImageError, ImageOptions, ImageSink, NoteKind, Progress, SinkError, Summary,
    image_from_dir, image_from_file,
};
use horcrux::units::ByteLen;
use support::{image_hash, noise, root, run, sparse};

/// A sink that does something when the first byte arrives: after the scan, before any file is read.
struct Meddler<F: FnMut() + Send> {
    meddle: F,
    done: bool,
}

impl<F: FnMut() + Send> ImageSink for Meddler<F> {
    fn begin(&mut self, _device: ByteLen) -> Result<(), SinkError> {
        Ok(())
    }

    fn data(&mut self, _: &[u8]) -> Result<(), SinkError> {
        if !std::mem::replace(&mut self.done, true) {
            (self.meddle)();
        }
        Ok(())
    }

    fn hole(&mut self, _: ByteLen) -> Result<(), SinkError> {
        Ok(())
    }
}

/// A sink that tells of every piece of data.
struct Tap<F: FnMut(usize) + Send>(F);

impl<F: FnMut(usize) + Send> ImageSink for Tap<F> {
    fn begin(&mut self, _device: ByteLen) -> Result<(), SinkError> {
        Ok(())
    }

    fn data(&mut self, bytes: &[u8]) -> Result<(), SinkError> {
        (self.0)(bytes.len());
        Ok(())
    }

    fn hole(&mut self, _: ByteLen) -> Result<(), SinkError> {
        Ok(())
    }
}

fn options() -> ImageOptions {
    ImageOptions::new("AMCC", std::env::temp_dir())
}

fn meddled(dir: &Path, meddle: impl FnMut() + Send) -> Result<Summary, ImageError> {
    image_from_dir(dir, &options(), &mut Meddler { meddle, done: false }, &Progress::new())
}

fn three_files() -> (tempfile::TempDir, PathBuf) {
    let temp = tempfile::tempdir().unwrap();
    for name in ["a", "b", "empty"] {
        fs::write(temp.path().join(name), if name == "empty" { vec![] } else { noise(3_000_000, 1) })
            .unwrap();
    }
    fs::create_dir(temp.path().join("dir")).unwrap();
    let victim = temp.path().join("b");
    (temp, victim)
}

#[test]
fn a_file_that_grows_shrinks_is_written_or_replaced_is_named() {
    type Change = fn(&Path);
    let changes: [(&str, Change); 5] = [
        ("it grew", |file| fs::File::options().append(true).open(file).unwrap().write_all(b"more").unwrap()),
        ("it shrank", |file| fs::File::options().write(true).open(file).unwrap().set_len(5).unwrap()),
        ("it was written", |file| {
            // Older kernels' file times move in steps of some milliseconds.
            std::thread::sleep(std::time::Duration::from_millis(20));
            let mut file = fs::File::options().write(true).open(file).unwrap();
            file.write_all(b"new").unwrap();
        }),
        ("another file has its name", |file| {
            fs::write(file.with_extension("new"), noise(3_000_000, 1)).unwrap();
            fs::rename(file.with_extension("new"), file).unwrap();
        }),
        ("something else has its name", |file| {
            fs::remove_file(file).unwrap();
            std::os::unix::fs::symlink("/etc/passwd", file).unwrap();
        }),
    ];
    for (want, change) in changes {
        let (temp, victim) = three_files();
        match meddled(temp.path(), || change(&victim)) {
            Err(ImageError::Changed { path, what }) => assert_eq!((path, what), (victim, want)),
            other => panic!("{want}: {other:?}"),
        }
    }
}

/// Data files read first and a log read later must be of one moment, or a database finds itself inconsistent.
#[test]
fn a_file_written_after_it_was_read_is_named_before_the_image_ends() {
    let (temp, _) = three_files();
    let first = temp.path().join("a");
    fs::write(temp.path().join("z"), noise(24_000_000, 2)).unwrap();
    let mut seen = 0;
    let mut sink = Tap(|len| {
        let before = seen;
        seen += len;
        // The reader is a few MiB ahead at most, and far from the end.
        if before < 12_000_000 && seen >= 12_000_000 {
            let mut file = fs::File::options().write(true).open(&first).unwrap();
            file.write_all(b"new").unwrap();
        }
    });
    let result = image_from_dir(temp.path(), &options(), &mut sink, &Progress::new());
    assert!(
        matches!(&result, Err(ImageError::Changed { path, what: "it was written" }) if *path == first),
        "{result:?}"
    );
}

#[test]
fn a_file_that_vanishes_is_named() {
    let (temp, victim) = three_files();
    match meddled(temp.path(), || fs::remove_file(&victim).unwrap()) {
        Err(ImageError::Vanished { path }) => assert_eq!(path, victim),
        other => panic!("{other:?}"),
    }
}

#[test]
fn a_fifo_in_the_place_of_a_file_does_not_stop_the_world() {
    let (temp, victim) = three_files();
    let result = meddled(temp.path(), || {
        fs::remove_file(&victim).unwrap();
        run(Command::new("mkfifo").arg(&victim));
    });
    assert!(matches!(&result, Err(ImageError::Changed { path, .. }) if *path == victim), "{result:?}");
}

#[test]
fn names_that_come_or_go_and_empty_files_that_fill_are_noticed() {
    let (temp, _) = three_files();
    let dir = temp.path().join("dir");
    let result = meddled(temp.path(), || fs::write(dir.join("new"), "new").unwrap());
    assert!(matches!(&result, Err(ImageError::Changed { path, .. }) if *path == dir), "{result:?}");
    let (temp, _) = three_files();
    let empty = temp.path().join("empty");
    let result = meddled(temp.path(), || fs::write(&empty, "no more").unwrap());
    assert!(matches!(&result, Err(ImageError::Changed { path, .. }) if *path == empty), "{result:?}");
}

#[test]
fn a_directory_swapped_for_a_link_leads_nowhere() {
    let temp = tempfile::tempdir().unwrap();
    let (dir, elsewhere) = (temp.path().join("dir"), tempfile::tempdir().unwrap());
    fs::create_dir(&dir).unwrap();
    fs::write(dir.join("file"), "content").unwrap();
    fs::write(elsewhere.path().join("file"), "content").unwrap();
    let result = meddled(temp.path(), || {
        fs::rename(&dir, elsewhere.path().join("moved")).unwrap();
        std::os::unix::fs::symlink(elsewhere.path(), &dir).unwrap();
    });
    assert!(matches!(&result, Err(ImageError::Changed { path, .. }) if *path == dir), "{result:?}");
}

#[test]
fn unreadable_files_are_all_named_before_anything_is_emitted() {
    if !root("for becoming nobody") {
        return;
    }
    let temp = tempfile::tempdir().unwrap();
    fs::create_dir(temp.path().join("source")).unwrap();
    for name in ["secret 1", "secret 2", "open"] {
        fs::write(temp.path().join("source").join(name), "content").unwrap();
    }
    fs::create_dir(temp.path().join("source/closed")).unwrap();
    run(Command::new("chown").args(["-R", "nobody"]).arg(temp.path()));
    run(Command::new("chmod")
        .args(["000"])
        .args(["secret 1", "secret 2", "closed"].map(|name| temp.path().join("source").join(name))));
    let text = support::as_nobody("unreadable_files_helper", temp.path());
    for name in ["secret 1", "secret 2", "closed"] {
        assert!(text.contains(name), "{text}");
    }
    assert!(!text.contains("open"), "{text}");
    assert!(text.contains("sink was not called"), "{text}");
}

/// Run as nobody by the test above; on its own it has nothing to do.
#[test]
fn unreadable_files_helper() {
    let Ok(dir) = std::env::var("HORCRUX_TEST_AS_NOBODY") else { return };
    let mut called = Meddler { meddle: || (), done: false };
    let dir = Path::new(&dir).join("source");
    let error = image_from_dir(&dir, &options(), &mut called, &Progress::new()).unwrap_err();
    println!("{error}");
    if !called.done {
        println!("the sink was not called");
    }
}

#[test]
fn nobody_makes_the_same_image_as_root() {
    if !root("for becoming nobody") {
        return;
    }
    let temp = tempfile::tempdir().unwrap();
    let source = temp.path().join("source");
    fs::create_dir(&source).unwrap();
    fs::write(source.join("file"), noise(100_000, 2)).unwrap();
    run(Command::new("chmod").arg("755").arg(temp.path()));
    fs::create_dir(temp.path().join("out")).unwrap();
    run(Command::new("chown").arg("nobody").arg(temp.path().join("out")));
    support::as_nobody("nobody_makes_an_image_helper", temp.path());
    let mut sink = FileSink::create(&temp.path().join("by root")).unwrap();
    image_from_dir(&source, &options(), &mut sink, &Progress::new()).unwrap();
    sink.finish().unwrap();
    assert_eq!(image_hash(&temp.path().join("by root")), image_hash(&temp.path().join("out/image")));
}

/// Run as nobody by the test above; on its own it has nothing to do.
#[test]
fn nobody_makes_an_image_helper() {
    let Ok(dir) = std::env::var("HORCRUX_TEST_AS_NOBODY") else { return };
    let mut sink = FileSink::create(&Path::new(&dir).join("out/image")).unwrap();
    image_from_dir(&Path::new(&dir).join("source"), &options(), &mut sink, &Progress::new()).unwrap();
    sink.finish().unwrap();
}

#[test]
fn what_is_no_directory_and_what_holds_the_output_is_refused() {
    let (temp, file) = three_files();
    for path in [file, temp.path().join("absent")] {
        let result = meddled(&path, || ());
        assert!(
            matches!(&result, Err(ImageError::Source { path: named, .. }) if *named == path),
            "{result:?}"
        );
    }
    let dir = temp.path().join("dir");
    let inside = ImageOptions { forbidden: vec![temp.path().join("absent"), dir.clone()], ..options() };
    let mut sink = Meddler { meddle: || (), done: false };
    let result = image_from_dir(temp.path(), &inside, &mut sink, &Progress::new());
    assert!(matches!(&result, Err(ImageError::OutputInside { path }) if *path == dir), "{result:?}");
}

#[test]
fn a_failing_sink_and_a_cancel_end_the_image() {
    struct Full(u64);
    impl ImageSink for Full {
        fn begin(&mut self, _device: ByteLen) -> Result<(), SinkError> {
            Ok(())
        }

        fn data(&mut self, bytes: &[u8]) -> Result<(), SinkError> {
            self.0 += bytes.len() as u64;
            if self.0 > 2_000_000 {
                return Err(std::io::Error::from_raw_os_error(libc::ENOSPC).into());
            }
            Ok(())
        }
        fn hole(&mut self, _: ByteLen) -> Result<(), SinkError> {
            Ok(())
        }
    }
    let (temp, _) = three_files();
    let result = image_from_dir(temp.path(), &options(), &mut Full(0), &Progress::new());
    assert!(matches!(result, Err(ImageError::Sink(_))), "{result:?}");
    let progress = Progress::new();
    let mut sink = Meddler { meddle: || progress.cancel(), done: false };
    let result = image_from_dir(temp.path(), &options(), &mut sink, &progress);
    assert!(matches!(result, Err(ImageError::Cancelled)), "{result:?}");
}

#[test]
fn progress_ends_where_the_totals_are() {
    let (temp, _) = three_files();
    sparse(&temp.path().join("sparse"), 1 << 30, &[(1 << 20, 4096)]);
    let progress = Progress::new();
    let mut sink = Meddler { meddle: || (), done: false };
    let summary = image_from_dir(temp.path(), &options(), &mut sink, &progress).unwrap();
    assert_eq!((progress.files_total(), progress.files_done()), (3, 3));
    assert_eq!(progress.bytes_total(), ByteLen(6_000_000 + 4096));
    assert_eq!((progress.bytes_done(), summary.bytes_read), (progress.bytes_total(), progress.bytes_total()));
    assert_eq!((summary.files, summary.dirs), (4, 2));
}

#[test]
fn a_raw_image_is_padded_and_told_by_its_filesystem() {
    let temp = tempfile::tempdir().unwrap();
    let (raw, copy) = (temp.path().join("raw"), temp.path().join("copy"));
    sparse(&raw, (64 << 20) + 5, &[(1 << 20, 100_000), (64 << 20, 5)]);
    let mut sink = FileSink::create(&copy).unwrap();
    let summary = image_from_file(&raw, &mut sink, &Progress::new()).unwrap();
    sink.finish().unwrap();
    assert_eq!((summary.device_size.value(), summary.fs), ((64 << 20) + 4096, None));
    assert_eq!(summary.notes[0].kind, NoteKind::Padded { from: ByteLen((64 << 20) + 5) });
    assert!(summary.bytes_read.value() < 200_000);
    fs::File::options().write(true).open(&copy).unwrap().set_len((64 << 20) + 5).unwrap();
    assert_eq!(fs::read(&raw).unwrap(), fs::read(&copy).unwrap());
    // A filesystem of another maker.
    run(Command::new("/sbin/mke2fs").args(["-q", "-t", "ext4"]).arg(&copy).arg("32M"));
    let mut sink = Meddler { meddle: || (), done: false };
    assert_eq!(image_from_file(&copy, &mut sink, &Progress::new()).unwrap().fs, Some(FsKind::Ext4));
    for bad in [temp.path().to_path_buf(), temp.path().join("absent"), "/dev/null".into()] {
        assert!(matches!(image_from_file(&bad, &mut sink, &Progress::new()), Err(ImageError::Source { .. })));
    }
    fs::write(&raw, "").unwrap();
    assert!(matches!(image_from_file(&raw, &mut sink, &Progress::new()), Err(ImageError::Source { .. })));
}

#[test]
fn a_raw_image_written_meanwhile_is_named() {
    let temp = tempfile::tempdir().unwrap();
    let raw = temp.path().join("raw");
    fs::write(&raw, noise(5_000_000, 3)).unwrap();
    let meddle = || fs::File::options().append(true).open(&raw).unwrap().write_all(b"more").unwrap();
    let result = image_from_file(&raw, &mut Meddler { meddle, done: false }, &Progress::new());
    assert!(matches!(&result, Err(ImageError::Changed { path, .. }) if *path == raw), "{result:?}");
}

#[test]
fn a_block_device_is_read_whole_and_refused_while_mounted() {
    if !root("for loop devices") {
        return;
    }
    let temp = tempfile::tempdir().unwrap();
    let (raw, copy) = (temp.path().join("raw"), temp.path().join("copy"));
    sparse(&raw, 32 << 20, &[]);
    run(Command::new("/sbin/mke2fs").args(["-q", "-t", "ext4"]).arg(&raw));
    let device = run(Command::new("/sbin/losetup").args(["--find", "--show"]).arg(&raw));
    let device = Path::new(device.trim());
    let mut sink = FileSink::create(&copy).unwrap();
    let whole = image_from_file(device, &mut sink, &Progress::new());
    sink.finish().unwrap();
    let at = temp.path().join("at");
    fs::create_dir(&at).unwrap();
    run(Command::new("mount").args(["-o", "ro"]).arg(device).arg(&at));
    let mut sink = Meddler { meddle: || (), done: false };
    let mounted = image_from_file(device, &mut sink, &Progress::new());
    run(Command::new("umount").arg(&at));
    run(Command::new("/sbin/losetup").arg("-d").arg(device));
    assert_eq!(whole.unwrap().device_size.value(), 32 << 20);
    assert_eq!(image_hash(&raw), image_hash(&copy));
    assert!(matches!(&mounted, Err(ImageError::Source { path, .. }) if path == device), "{mounted:?}");
}
