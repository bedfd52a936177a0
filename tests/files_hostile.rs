//! Filesystems that lie: bytes flipped and cut at random, directories that hold themselves, extents that point to themselves. Nothing panics, goes on for ever or takes all memory.
#![allow(clippy::unwrap_used)]

mod harness;
#[path = "image_support/mod.rs"]
mod support;

use std::fs;
use std::ops::Range;
use std::path::Path;
use std::process::Command;
use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use bytes::Bytes;
use harness::{need, soak};
use horcrux::files::changes::Ranges;
use horcrux::files::diff::DiffOptions;
use horcrux::files::ext4::Ext4;
use horcrux::files::list::ListOptions;
use horcrux::files::request::{Request, answer, compare};
use horcrux::files::{FilePath, FilesError, Source, Stream};
use horcrux::units::{ByteLen, ByteOffset, ByteRange};
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};
use support::noise;

/// What one request may take; each is done in milliseconds.
const LIMIT: Duration = Duration::from_secs(30);
/// A stream is read so far: a file may say that it has terabytes of zeros.
const READ: usize = 64 << 20;

#[derive(Debug)]
struct Memory(Bytes);

#[async_trait]
impl Source for Memory {
    fn size(&self) -> ByteLen {
        ByteLen(self.0.len() as u64)
    }

    async fn read(&self, range: ByteRange) -> Result<Bytes, FilesError> {
        if range.end.0 > self.size().0 || range.start > range.end {
            return Err(FilesError::OutOfRange { end: range.end, size: self.size() });
        }
        assert!(range.len().0 <= 4 << 20, "no read is longer");
        Ok(self.0.slice(range.start.0 as usize..range.end.0 as usize))
    }
}

async fn drained(mut stream: Stream) -> Result<Vec<u8>, FilesError> {
    let mut all = Vec::new();
    while let Some(piece) = stream.recv().await {
        all.extend_from_slice(&piece?);
        if all.len() > READ {
            break;
        }
    }
    Ok(all)
}

async fn open(image: &Bytes) -> Result<Ext4, FilesError> {
    Ext4::open(Arc::new(Memory(image.clone()))).await
}

/// Everything that can be asked, and how much of it was answered.
async fn ask_all(image: &Bytes, original: &Bytes) -> usize {
    let Ok(filesystem) = open(image).await else { return 0 };
    let mut done = 1;
    let options = ListOptions { long: true, recursive: true, directory: false };
    let root = FilePath::default;
    for request in [
        Request::List { path: root(), options },
        Request::Archive { path: root() },
        Request::Content { path: FilePath::new(b"big") },
    ] {
        done += usize::from(drained(answer(filesystem.clone(), request)).await.is_ok());
    }
    let all =
        |size: usize| Ranges::new(vec![ByteRange { start: ByteOffset(0), end: ByteOffset(size as u64) }]);
    let how = DiffOptions { lines: true, patch: true, ..DiffOptions::default() };
    for (old, new) in [(original, image), (image, original)] {
        let (old, new) = (open(old).await.unwrap(), open(new).await.unwrap());
        let ranges = all(original.len().max(image.len()));
        done += usize::from(drained(compare(old, new, ranges, how)).await.is_ok());
    }
    done
}

fn within_limit<T>(runtime: &tokio::runtime::Runtime, what: &str, work: impl Future<Output = T>) -> T {
    runtime.block_on(async {
        tokio::time::timeout(LIMIT, work).await.unwrap_or_else(|_| panic!("{what}: no end within {LIMIT:?}"))
    })
}

fn runtime() -> tokio::runtime::Runtime {
    tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap()
}

/// A small image with one of what has a form of its own on the disk.
fn image(options: &[&str]) -> Bytes {
    let temp = tempfile::tempdir().unwrap();
    let (source, image) = (temp.path().join("source"), temp.path().join("image"));
    fs::create_dir_all(source.join("a/b/c")).unwrap();
    fs::create_dir(source.join("many")).unwrap();
    for number in 0..600 {
        fs::write(source.join(format!("many/a rather long name for a file {number:05}")), b"x").unwrap();
    }
    fs::write(source.join("big"), noise(700_000, 1)).unwrap();
    fs::write(source.join("text"), "one\ntwo\n").unwrap();
    let pieces: Vec<_> = (0..50).map(|piece| (piece * 16384, 4096)).collect();
    support::sparse(&source.join("pieces"), 50 * 16384, &pieces);
    std::os::unix::fs::symlink("l".repeat(500), source.join("slow")).unwrap();
    std::os::unix::fs::symlink("a/b", source.join("fast")).unwrap();
    fs::hard_link(source.join("text"), source.join("a/again")).unwrap();
    xattr::set(source.join("big"), "user.large", &[7; 800]).unwrap();
    let mut mke2fs = Command::new("mke2fs");
    mke2fs
        .args(["-q", "-F", "-t", "ext4", "-N", "1024"])
        .args(options)
        .arg("-d")
        .arg(&source)
        .arg(&image)
        .arg("8M");
    support::run(mke2fs.env("PATH", "/usr/sbin:/sbin:/usr/bin:/bin"));
    fs::read(&image).unwrap().into()
}

/// Where an image has anything.
fn filled(image: &[u8]) -> Vec<Range<usize>> {
    let used = |at: &usize| image[*at..*at + 1024].iter().any(|byte| *byte != 0);
    (0..image.len()).step_by(1024).filter(used).map(|at| at..at + 1024).collect()
}

#[test]
fn images_flipped_and_cut_at_random_end_in_answers_or_errors() {
    if !need(&["mke2fs"]) {
        return;
    }
    let runtime = runtime();
    let base = harness::seed();
    for (kind, options) in [
        ("4k", &["-b", "4096"][..]),
        ("1k", &["-b", "1024"]),
        ("ext3", &["-O", "^extents,^64bit,^metadata_csum", "-b", "1024"]),
        ("inline", &["-O", "inline_data", "-I", "256"]),
    ] {
        let original = image(options);
        assert_eq!(
            within_limit(&runtime, kind, ask_all(&original, &original)),
            6,
            "{kind}: it reads as it is"
        );
        let (filled, len) = (filled(&original), original.len());
        // Without file contents: what is there is pointers and names.
        let dense: Vec<_> = filled
            .iter()
            .filter(|range| original[(*range).clone()].iter().filter(|byte| **byte == 0).count() > 100)
            .collect();
        let mut answered = 0;
        for round in 0..if soak() { 4000 } else { 150 } {
            let seed = base.wrapping_add(round);
            let mut rng = StdRng::seed_from_u64(seed);
            let mut bytes = original.to_vec();
            for _ in 0..rng.random_range(1..40) {
                let range = dense[rng.random_range(0..dense.len())].clone();
                let at = rng.random_range(range);
                match rng.random_range(0..4) {
                    0 => bytes[at] ^= 1 << rng.random_range(0..8),
                    1 => bytes[at] = rng.random(),
                    2 => bytes[at] = 0xff,
                    // A pointer to somewhere else.
                    _ => {
                        let at = at / 4 * 4;
                        let block: u32 = rng.random_range(0..len as u32 / 1024);
                        bytes[at..at + 4].copy_from_slice(&block.to_le_bytes());
                    }
                }
            }
            if rng.random_bool(0.1) {
                bytes.truncate(rng.random_range(0..len));
            }
            answered +=
                within_limit(&runtime, &format!("{kind} seed {seed}"), ask_all(&bytes.into(), &original));
        }
        assert!(answered > 0, "{kind}: some damage does not matter");
    }
}

/// Does something to an image with debugfs.
fn debugfs(image: &Path, requests: &str) {
    let mut debugfs = Command::new("/sbin/debugfs");
    support::run(debugfs.args(["-w", "-R", requests]).arg(image));
}

fn meddled(requests: &[&str]) -> Bytes {
    let temp = tempfile::tempdir().unwrap();
    let path = temp.path().join("image");
    fs::write(&path, image(&["-b", "4096", "-O", "^metadata_csum"])).unwrap();
    for request in requests {
        debugfs(&path, request);
    }
    fs::read(&path).unwrap().into()
}

async fn refused(image: &Bytes, request: Request) -> String {
    drained(answer(open(image).await.unwrap(), request)).await.unwrap_err().to_string()
}

fn everything() -> Request {
    let options = ListOptions { long: true, recursive: true, directory: false };
    Request::List { path: FilePath::default(), options }
}

#[test]
fn a_directory_that_holds_itself_is_damage() {
    if !need(&["mke2fs", "debugfs"]) {
        return;
    }
    let runtime = runtime();
    let image = meddled(&["link a a/b/c/up"]);
    let said = within_limit(&runtime, "list", refused(&image, everything()));
    assert!(said.contains("it is in more than one place"), "{said}");
    let said =
        within_limit(&runtime, "export", refused(&image, Request::Archive { path: FilePath::default() }));
    assert!(said.contains("it is in more than one place"), "{said}");
    let ended = within_limit(&runtime, "diff", ask_all(&image, &image));
    assert!(ended < 6, "{ended}");
    // Two names side by side: the second is refused before either is entered.
    let image = meddled(&["link a twin"]);
    let said = within_limit(&runtime, "list", refused(&image, everything()));
    assert!(said.contains("it is in more than one place"), "{said}");
}

#[test]
fn an_extent_tree_that_points_to_itself_is_damage() {
    if !need(&["mke2fs", "debugfs"]) {
        return;
    }
    let runtime = runtime();
    let image = meddled(&[]);
    // The node below the root of `pieces`, whose extents don't fit the inode: a node of level 1 that names itself.
    let mut bytes = image.to_vec();
    let nodes: Vec<usize> =
        (0..bytes.len()).step_by(4096).filter(|at| bytes[*at..*at + 4] == [0x0a, 0xf3, 50, 0]).collect();
    assert_eq!(nodes.len(), 1, "{nodes:?}");
    let (node, block) = (nodes[0], (nodes[0] / 4096) as u32);
    bytes[node + 6] = 1;
    for entry in 0..50 {
        let at = node + 12 + entry * 12;
        bytes[at + 4..at + 8].copy_from_slice(&block.to_le_bytes());
        bytes[at + 8..at + 12].fill(0);
    }
    let said = within_limit(
        &runtime,
        "cat",
        refused(&bytes.into(), Request::Content { path: FilePath::new(b"pieces") }),
    );
    assert!(said.contains("its extent tree has a node of the wrong level"), "{said}");
}

#[test]
fn a_file_outside_the_device_and_one_too_large_are_damage() {
    if !need(&["mke2fs", "debugfs"]) {
        return;
    }
    let runtime = runtime();
    let image = meddled(&["sif text size 0x7fffffffffffffff"]);
    let said =
        within_limit(&runtime, "cat", refused(&image, Request::Content { path: FilePath::new(b"text") }));
    assert!(said.contains("it is larger than a file can be"), "{said}");
    let image = meddled(&["sif text block[0] 999999", "sif text flags 0"]);
    let said =
        within_limit(&runtime, "cat", refused(&image, Request::Content { path: FilePath::new(b"text") }));
    assert!(said.contains("outside the filesystem"), "{said}");
}

#[test]
fn a_name_that_is_there_twice_is_damage() {
    if !need(&["mke2fs", "debugfs"]) {
        return;
    }
    let runtime = runtime();
    let mut bytes = meddled(&[]).to_vec();
    let name = b"a rather long name for a file 00001";
    let at: Vec<usize> = (0..bytes.len() - name.len()).filter(|at| bytes[*at..].starts_with(name)).collect();
    assert_eq!(at.len(), 1, "{at:?}");
    bytes[at[0] + name.len() - 1] = b'2';
    let image = bytes.into();
    for request in [everything(), Request::Archive { path: FilePath::default() }] {
        let said = within_limit(&runtime, "list and export", refused(&image, request));
        assert!(said.contains("it has a name twice"), "{said}");
    }
}

#[test]
fn groups_without_number_are_damage() {
    if !need(&["mke2fs", "debugfs"]) {
        return;
    }
    let runtime = runtime();
    let mut bytes = meddled(&[]).to_vec();
    bytes[1024 + 0x20..1024 + 0x24].copy_from_slice(&256u32.to_le_bytes());
    let said = within_limit(&runtime, "open", open(&bytes.into())).unwrap_err().to_string();
    assert!(said.contains("another number of inodes than its groups hold"), "{said}");
}
