//! What changed between two versions, as files: compared with a walk over all of both, for changes made by the kernel, by a new image of a changed directory, and behind the filesystem's back.
#![allow(clippy::unwrap_used)]

mod files_support;
mod harness;
#[path = "image_support/mod.rs"]
mod support;

use std::fs;
use std::os::unix::fs::{FileExt, PermissionsExt, symlink};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;
use std::time::Instant;

use files_support::{Repo, brute_force, letters, path_of, readable, walk};
use harness::{need, soak};
use horcrux::files::changes::Ranges;
use horcrux::files::diff::{Change, Comparison, DiffOptions};
use horcrux::files::ext4::Ext4;
use horcrux::files::{ChunkMemory, Outlet, VersionSource};
use horcrux::repo::{MetaCache, NoMetaCache, RefSpec, Repository, Version, VersionOptions};
use horcrux::store::{CountingStore, DirStore};
use horcrux::units::ByteLen;
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};
use support::{Mount, noise, root};

fn mke2fs(image: &Path, source: &Path, size: &str, options: &[&str]) {
    let mut mke2fs = Command::new("mke2fs");
    mke2fs.args(["-q", "-F", "-t", "ext4"]).args(options).arg("-d").arg(source).arg(image).arg(size);
    support::run(mke2fs.env("PATH", "/usr/sbin:/sbin:/usr/bin:/bin"));
}

/// Makes a tree of directories and files.
fn grow(dir: &Path, rng: &mut StdRng, files: usize) {
    for number in 0..files {
        let sub = dir.join(format!("d{}/e{}", number % 7, number % 3));
        fs::create_dir_all(&sub).unwrap();
        let len = rng.random_range(0..20_000);
        fs::write(sub.join(format!("f{number}")), noise(len, rng.random())).unwrap();
    }
}

fn everything(dir: &Path) -> Vec<PathBuf> {
    let mut found: Vec<PathBuf> = walk(dir)
        .into_keys()
        .filter(|path| !path.is_empty() && !path.starts_with(b"lost+found"))
        .map(|path| dir.join(String::from_utf8(path).unwrap()))
        .collect();
    found.sort();
    found
}

/// One random change.
fn meddle(dir: &Path, rng: &mut StdRng, serial: usize) {
    let all = everything(dir);
    let one = all[rng.random_range(0..all.len())].clone();
    let meta = fs::symlink_metadata(&one).unwrap();
    let new = dir.join(format!("new {serial}"));
    match rng.random_range(0..12) {
        0 => fs::write(&new, noise(rng.random_range(0..200_000), rng.random())).unwrap(),
        1 if !meta.is_dir() => fs::remove_file(&one).unwrap(),
        2 if meta.is_file() => {
            let file = fs::OpenOptions::new().write(true).open(&one).unwrap();
            file.write_all_at(&noise(rng.random_range(1..5000), rng.random()), rng.random_range(0..30_000))
                .unwrap();
        }
        3 if !meta.is_symlink() => {
            fs::set_permissions(&one, fs::Permissions::from_mode(rng.random_range(0..0o1000) | 0o700))
                .unwrap();
        }
        4 => std::os::unix::fs::lchown(&one, Some(rng.random_range(0..3)), Some(rng.random_range(0..70_000)))
            .unwrap(),
        5 => {
            let _ = fs::rename(&one, &new);
        }
        6 => fs::create_dir(&new).unwrap(),
        7 if meta.is_dir() => fs::remove_dir_all(&one).unwrap(),
        8 if meta.is_file() => fs::hard_link(&one, &new).unwrap(),
        9 => symlink(
            noise(rng.random_range(1..40), rng.random())
                .iter()
                .map(|byte| char::from(b'a' + byte % 26))
                .collect::<String>(),
            &new,
        )
        .unwrap(),
        10 if meta.is_file() => {
            xattr::set(&one, "user.test", &noise(rng.random_range(0..300), rng.random())).unwrap();
        }
        // Another kind in its place.
        11 if meta.is_file() => {
            fs::remove_file(&one).unwrap();
            symlink("elsewhere", &one).unwrap();
        }
        _ => fs::write(&new, b"small").unwrap(),
    }
}

fn assert_told(repo: &Repo, image: &str, before: &Path, after: &Path, seed: u64) {
    let (old, new) = (walk(before), walk(after));
    let want = brute_force(&old, &new);
    let told = letters(&repo.json("diff", image, &["main~1", "main", "--no-renames"]));
    assert_eq!(readable(&told), readable(&want), "seed {seed}");
    // A rename is one that went and one that came.
    let joined = repo.json("diff", image, &[]);
    let mut apart = Vec::new();
    for change in &joined {
        if change["status"] == "renamed" {
            apart.push(('D', path_of(&change["old_path"])));
            apart.push(('A', path_of(&change["path"])));
        } else {
            apart.extend(letters(std::slice::from_ref(change)));
        }
    }
    apart.sort_by(|one, other| (&one.1, one.0).cmp(&(&other.1, other.0)));
    assert_eq!(readable(&apart), readable(&want), "seed {seed}, with renames");
    // The other way round.
    let told = letters(&repo.json("diff", image, &["main", "main~1", "--no-renames"]));
    assert_eq!(readable(&told), readable(&brute_force(&new, &old)), "seed {seed}, backwards");
}

#[test]
fn changes_the_kernel_made_are_those_a_walk_over_both_finds() {
    if !need(&["mke2fs"]) || !root("for a mount") {
        return;
    }
    let base = harness::seed();
    for round in 0..if soak() { 60 } else { 6 } {
        let seed = base.wrapping_add(round);
        let mut rng = StdRng::seed_from_u64(seed);
        let repo = Repo::new();
        let (source, image, before) = (repo.dir("source"), repo.path("image"), repo.path("before"));
        grow(&source, &mut rng, 200);
        let small = round % 3 == 2;
        mke2fs(&image, &source, "96M", if small { &["-b", "1024"] } else { &[] });
        repo.add_file("AMCC", &image);
        support::run(Command::new("cp").arg(&image).arg(&before));
        {
            let mount = Mount::new(&image, "rw");
            for serial in 0..rng.random_range(1..60) {
                meddle(mount.path(), &mut rng, serial);
            }
        }
        repo.add_file("AMCC", &image);
        let (before, after) = (Mount::new(&before, "ro"), Mount::new(&image, "ro"));
        assert_told(&repo, "AMCC", before.path(), after.path(), seed);
    }
}

#[test]
fn changes_between_images_made_anew_are_those_a_walk_over_both_finds() {
    if !root("for giving files away") {
        return;
    }
    let base = harness::seed();
    for round in 0..if soak() { 40 } else { 4 } {
        let seed = base.wrapping_add(round);
        let mut rng = StdRng::seed_from_u64(seed);
        let repo = Repo::new();
        let (before, after) = (repo.dir("before"), repo.path("after"));
        grow(&before, &mut rng, 150);
        repo.add_dir("AMCC", &before);
        support::run(Command::new("cp").arg("-a").arg(&before).arg(&after));
        for serial in 0..rng.random_range(1..40) {
            meddle(&after, &mut rng, serial);
        }
        repo.add_dir("AMCC", &after);
        assert_told(&repo, "AMCC", &before, &after, seed);
    }
}

#[test]
fn bytes_changed_in_place_are_found_though_no_inode_says_so() {
    let repo = Repo::new();
    let source = repo.dir("source");
    for number in 0..300 {
        fs::write(source.join(format!("f{number}")), noise(5000, number)).unwrap();
    }
    let image = repo.path("image");
    mke2fs(&image, &source, "64M", &["-b", "4096"]);
    repo.add_file("AMCC", &image);
    let mut raw = fs::read(&image).unwrap();
    let wanted = noise(5000, 123);
    let at = raw.chunks(4096).position(|block| block == &wanted[..4096]).unwrap();
    raw[at * 4096 + 99] ^= 1;
    fs::write(&image, &raw).unwrap();
    repo.add_file("AMCC", &image);
    assert_eq!(repo.run("diff", "AMCC", &["--name-status"]).ok(), "M\tf123\n");
    let changes = repo.json("diff", "AMCC", &[]);
    assert_eq!(changes[0]["content"], true);
    assert_eq!(changes[0].get("attributes"), None);
}

#[test]
fn a_file_that_took_the_inode_of_one_that_went_is_no_rename() {
    if !need(&["mke2fs"]) || !root("for a mount") {
        return;
    }
    let repo = Repo::new();
    let (source, image) = (repo.dir("source"), repo.path("image"));
    fs::write(source.join("old"), noise(5000, 1)).unwrap();
    mke2fs(&image, &source, "64M", &[]);
    repo.add_file("AMCC", &image);
    {
        let mount = Mount::new(&image, "rw");
        fs::remove_file(mount.path().join("old")).unwrap();
        fs::write(mount.path().join("new"), noise(5000, 2)).unwrap();
    }
    repo.add_file("AMCC", &image);
    let changes = repo.json("diff", "AMCC", &[]);
    assert_eq!(readable(&letters(&changes)), ["A new", "D old"]);
    assert_eq!(changes[0]["new"]["inode"], changes[1]["old"]["inode"], "the test is of what it says");
}

#[test]
fn a_filesystem_that_grew_has_the_same_files() {
    if !need(&["mke2fs", "resize2fs"]) || !root("for a mount") {
        return;
    }
    let repo = Repo::new();
    let (source, image) = (repo.dir("source"), repo.path("image"));
    grow(&source, &mut StdRng::seed_from_u64(1), 50);
    mke2fs(&image, &source, "100M", &["-b", "4096"]);
    repo.add_file("AMCC", &image);
    support::run(Command::new("/sbin/resize2fs").arg(&image).arg("600M"));
    repo.add_file("AMCC", &image);
    assert_eq!(repo.run("diff", "AMCC", &["--name-status"]).ok(), "");
    {
        let mount = Mount::new(&image, "rw");
        // Some of them in the groups that are new.
        for number in 0..40_000 {
            fs::write(mount.path().join(format!("d0/new{number}")), b"").unwrap();
        }
    }
    repo.add_file("AMCC", &image);
    let status = repo.run("diff", "AMCC", &["main~2", "main", "--name-status"]).ok();
    assert_eq!(status.lines().filter(|line| line.starts_with("A\td0/new")).count(), 40_000);
    assert_eq!(status.lines().count(), 40_000);
}

#[test]
fn a_diff_reads_like_gits() {
    let repo = Repo::new();
    let (before, after) = (repo.dir("before"), repo.dir("after"));
    for dir in [&before, &after] {
        fs::create_dir(dir.join("conf")).unwrap();
        fs::set_permissions(dir.join("conf"), fs::Permissions::from_mode(0o755)).unwrap();
        fs::write(dir.join("data"), noise(100_000, 1)).unwrap();
    }
    fs::write(before.join("conf/main"), "a\nb\nc\n").unwrap();
    fs::write(after.join("conf/main"), "a\nB\nc\nd\n").unwrap();
    fs::write(before.join("old name"), noise(5000, 2)).unwrap();
    fs::write(after.join("name"), noise(5000, 2)).unwrap();
    fs::write(before.join("mode"), "x").unwrap();
    fs::write(after.join("mode"), "x").unwrap();
    fs::write(after.join("data"), noise(100_000, 3)).unwrap();
    fs::write(after.join("new\x1b"), "one\n").unwrap();
    for (file, mode) in [("conf/main", 0o644), ("mode", 0o644), ("data", 0o644)] {
        fs::set_permissions(before.join(file), fs::Permissions::from_mode(mode)).unwrap();
        fs::set_permissions(after.join(file), fs::Permissions::from_mode(mode)).unwrap();
    }
    fs::set_permissions(before.join("old name"), fs::Permissions::from_mode(0o644)).unwrap();
    for file in ["name", "new\x1b"] {
        fs::set_permissions(after.join(file), fs::Permissions::from_mode(0o644)).unwrap();
    }
    fs::set_permissions(after.join("mode"), fs::Permissions::from_mode(0o600)).unwrap();
    repo.add_dir("AMCC", &before);
    repo.add_dir("AMCC", &after);
    let names = repo.run("diff", "AMCC", &["main~1", "main", "--name-status"]).ok();
    assert_eq!(names, "M\tconf/main\nM\tdata\nP\tmode\nR\told name\tname\nA\t\"new\\033\"\n");
    let patch = repo.run("diff", "AMCC", &[]).ok();
    assert!(
        patch.starts_with("diff --git a/conf/main b/conf/main\n--- a/conf/main\n+++ b/conf/main\n@@ -1,3 +1,4 @@\n a\n-b\n+B\n c\n+d\n"),
        "{patch}"
    );
    assert!(patch.contains("Binary files a/data and b/data differ (97.7 KiB changed)\n"), "{patch}");
    assert!(patch.contains("diff --git a/mode b/mode\nmode 0644 -> 0600\n"), "{patch}");
    assert!(patch.contains("rename from old name\nrename to name\n"), "{patch}");
    assert!(
        patch.contains("new file mode 0644\n--- /dev/null\n+++ \"b/new\\033\"\n@@ -0,0 +1 @@\n+one\n"),
        "{patch}"
    );
    let stat = repo.run("diff", "AMCC", &["--stat"]).ok();
    assert!(stat.contains(" M conf/main | 3 ++-\n"), "{stat}");
    assert!(stat.ends_with(" 5 files: 1 added, 2 modified, 1 renamed, 1 with other attributes; 3 insertions(+), 1 deletions(-)\n"), "{stat}");
    let both = repo.run("diff", "AMCC", &["--stat", "--patch"]).ok();
    assert!(both.starts_with(&format!("{stat}\ndiff --git a/conf/main b/conf/main\n")), "{both}");
    assert!(both.ends_with("@@ -0,0 +1 @@\n+one\n"), "{both}");
    let show = repo.run("show", "AMCC", &[]).ok();
    assert!(
        show.starts_with("commit ") && show.contains("\nImage:  AMCC, ") && show.ends_with(&stat),
        "{show}"
    );
    let first = repo.run("show", "AMCC@main~1", &[]).ok();
    assert!(!first.contains("parent "), "{first}");
    let refused = repo.run("diff", "AMCC@main~1", &[]).refused();
    assert_eq!(
        refused,
        "error: AMCC@main~1 is the first version: there is none before it to compare with\nhint: name two versions, or 'ls' it\n"
    );
    let blocks = repo.run("diff", "AMCC", &["--blocks"]).ok();
    assert!(blocks.lines().count() > 1, "{blocks}");
    assert_eq!(repo.run("diff", "AMCC", &["main", "main"]).ok(), "");
}

/// Two versions of an image of `size` that differ in `changed` of its `files` files: what comparing them reads, and how long it takes.
fn measure(size: u64, files: usize, file_len: usize, changed: usize) -> (u64, std::time::Duration, usize) {
    let repo = Repo::new();
    let (empty, image) = (repo.dir("empty"), repo.path("image"));
    mke2fs(&image, &empty, &format!("{}M", size >> 20), &[]);
    let path = |number: usize| format!("d{}/f{number}", number / 100);
    {
        let mount = Mount::new(&image, "rw");
        for number in 0..files {
            let path = mount.path().join(path(number));
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, noise(file_len, number as u64)).unwrap();
        }
    }
    repo.add_file("AMCC", &image);
    {
        let mount = Mount::new(&image, "rw");
        for number in (0..files).step_by(files / changed).take(changed) {
            let file = fs::OpenOptions::new().write(true).open(mount.path().join(path(number))).unwrap();
            file.write_all_at(&noise(4096, u64::MAX - number as u64), (file_len / 2) as u64).unwrap();
        }
    }
    repo.add_file("AMCC", &image);
    fs::remove_file(&image).unwrap();
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build().unwrap();
    let url = repo.url();
    let store = Arc::new(CountingStore::new(Arc::new(DirStore::new(&url))));
    let compare = async |store: Arc<CountingStore>| {
        let repository = Repository::open(store).await.unwrap();
        let spec: RefSpec = "AMCC".parse().unwrap();
        let meta: Arc<dyn MetaCache> = Arc::new(NoMetaCache);
        let mut versions = Vec::new();
        for reference in ["main~1", "main"] {
            let resolved = repository.resolve(&spec.image, &reference.parse().unwrap(), &meta).await.unwrap();
            let options = VersionOptions::default();
            versions.push(
                Version::open(&repository, &spec.image, resolved.commit, meta.clone(), options)
                    .await
                    .unwrap(),
            );
        }
        let ranges = Ranges::between(&versions[0], &versions[1]).await.unwrap();
        let memory = ChunkMemory::new(ByteLen(64 << 20));
        let mut sides = Vec::new();
        for version in versions {
            sides.push(Ext4::open(Arc::new(VersionSource::new(version, memory.clone()))).await.unwrap());
        }
        let new = sides.pop().unwrap();
        let comparison = Comparison::new(sides.pop().unwrap(), new, ranges).await.unwrap();
        let (mut out, mut stream) = Outlet::new();
        let telling = tokio::spawn(async move {
            let done = comparison.run(DiffOptions::default(), &mut out).await;
            out.end(done).await;
        });
        let mut lines = Vec::new();
        while let Some(piece) = stream.recv().await {
            lines.extend_from_slice(&piece.unwrap());
        }
        telling.await.unwrap();
        let changes: Vec<Change> = lines
            .split(|byte| *byte == b'\n')
            .filter(|line| !line.is_empty())
            .map(|line| serde_json::from_slice(line).unwrap())
            .collect();
        (changes.len(), memory.fetched().0)
    };
    // Once to have it warm.
    runtime.block_on(compare(store.clone()));
    store.reset();
    let started = Instant::now();
    let (found, unpacked) = runtime.block_on(compare(store.clone()));
    let took = started.elapsed();
    println!(
        "{found} changes: {} bytes read of the repository, {unpacked} unpacked, {took:?}",
        store.bytes_read()
    );
    (store.bytes_read().max(unpacked), took, found)
}

#[test]
fn comparing_reads_less_than_a_hundredth_of_the_image() {
    if !need(&["mke2fs"]) || !root("for a mount") {
        return;
    }
    let (size, files, len, changed) =
        if soak() { (10 << 30, 25_000, 300_000, 100) } else { (1 << 30, 2_500, 300_000, 10) };
    let (read, took, found) = measure(size, files, len, changed);
    assert_eq!(found, changed);
    assert!(read < size / 100, "{read} bytes of {size}");
    // The promise is two seconds for 10 GiB in a release build.
    assert!(took.as_secs() < 20, "{took:?}");
}
