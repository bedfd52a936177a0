//! What the image tests share: a tree with one of everything, commands, mounts, and a listing to compare.
//!
//! A test that needs root or a tool skips with a line that says so; with CI=true it fails instead.
// Each test binary uses a part of this; unwrap is how a test says that something must work.
#![allow(dead_code, clippy::unwrap_used)]

use std::collections::BTreeMap;
use std::ffi::OsStr;
use std::fmt::Write as _;
use std::fs::{self, File};
use std::io::{Read, Seek, SeekFrom, Write as _};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{FileExt, FileTypeExt, MetadataExt, PermissionsExt, symlink};
use std::path::{Path, PathBuf};
use std::process::Command;

use horcrux::image::{ImageError, Phase, Progress, Summary};

use crate::harness;

/// Runs a command and returns what it printed; its failure is the test's.
pub fn run(command: &mut Command) -> String {
    harness::run(command.env("LC_ALL", "C")).ok()
}

/// Whether this is root, with mounts and loop devices.
pub fn root(what: &str) -> bool {
    harness::need_root(what)
        && harness::can(Path::new("/dev/loop-control").exists(), &format!("loop devices are needed {what}"))
}

/// A mount that ends with the value.
pub struct Mount {
    at: tempfile::TempDir,
}

impl Mount {
    pub fn new(image: &Path, options: &str) -> Mount {
        let at = tempfile::tempdir().unwrap();
        run(Command::new("mount").arg("-o").arg(format!("loop,{options}")).arg(image).arg(at.path()));
        Mount { at }
    }

    pub fn path(&self) -> &Path {
        self.at.path()
    }
}

impl Drop for Mount {
    fn drop(&mut self) {
        let done = Command::new("umount").arg(self.at.path()).status();
        if !done.is_ok_and(|status| status.success()) {
            eprintln!("could not unmount {}", self.at.path().display());
        }
    }
}

/// e2fsck finds nothing to say.
pub fn fsck_ext4(image: &Path) {
    run(Command::new("/sbin/e2fsck").arg("-fn").arg(image));
}

/// xfs_repair finds nothing to say.
pub fn fsck_xfs(image: &Path) {
    run(Command::new("/sbin/xfs_repair").arg("-n").arg("-f").arg(image));
}

/// What a fixture leaves out.
#[derive(Clone, Copy, Default)]
pub struct Fixture {
    /// Names, targets and attributes that only mke2fs can take to ext4.
    pub not_for_streaming: bool,
}

impl Fixture {
    /// Fills `dir` with one of everything a data directory can hold. Root only things are left out for others.
    pub fn build(self, dir: &Path) {
        let root = rustix::process::geteuid().is_root();
        let file = |name: &str, content: &[u8]| fs::write(dir.join(name), content).unwrap();
        file("empty", b"");
        file("one byte", b"1");
        file("block", &[7; 4096]);
        file("block and one", &[8; 4097]);
        file("big", &noise(5_000_003, 1));
        fs::create_dir_all(dir.join("empty dir")).unwrap();
        fs::create_dir_all(dir.join("a/b/c/d")).unwrap();
        file("a/b/c/d/deep", b"deep");
        file("-rf", b"a name that looks like an option");
        file("new\nline\ttab \"quote' \\ back", b"odd");
        file("trailing space ", b"odd");
        file("日本語 ü", b"utf-8");
        file(&"x".repeat(255), b"255 bytes");
        file(".hidden", b"hidden");
        fs::create_dir(dir.join("many")).unwrap();
        for number in 0..3000 {
            file(&format!("many/file-{number:05}"), format!("{number}").as_bytes());
        }
        // Links.
        symlink("one byte", dir.join("fast link")).unwrap();
        symlink("x/".repeat(60), dir.join("slow link")).unwrap();
        symlink("l".repeat(4000), dir.join("very slow link")).unwrap();
        symlink("/nowhere", dir.join("a/dangling")).unwrap();
        fs::hard_link(dir.join("big"), dir.join("a/big again")).unwrap();
        fs::hard_link(dir.join("big"), dir.join("z big")).unwrap();
        fs::hard_link(dir.join("fast link"), dir.join("a/fast link again")).unwrap();
        // Holes: in front, in the middle, at the end, everywhere, not on block boundaries.
        sparse(&dir.join("hole in front"), 1 << 20, &[(1 << 19, 5000)]);
        sparse(&dir.join("hole at the end"), 3_000_001, &[(0, 10)]);
        sparse(&dir.join("all hole"), 10_000_000, &[]);
        sparse(&dir.join("five GiB"), 5 << 30, &[(0, 4096), (3 << 30, 70_000), ((5 << 30) - 3, 3)]);
        let pieces: Vec<_> = (0..800).map(|piece| (piece * 16384, 4096)).collect();
        sparse(&dir.join("pieces"), 800 * 16384, &pieces);
        // Special files.
        run(Command::new("mkfifo").arg(dir.join("fifo")));
        drop(std::os::unix::net::UnixListener::bind(dir.join("socket")).unwrap());
        // Modes.
        for (name, mode) in [
            ("one byte", 0o4755),
            ("block", 0o2711),
            ("block and one", 0o400),
            ("empty", 0o777),
            (".hidden", 0o640),
        ] {
            fs::set_permissions(dir.join(name), fs::Permissions::from_mode(mode)).unwrap();
        }
        fs::set_permissions(dir.join("empty dir"), fs::Permissions::from_mode(0o1777)).unwrap();
        // Attributes.
        xattr::set(dir.join("big"), "user.comment", b"a comment").unwrap();
        xattr::set(dir.join("empty"), "user.empty", b"").unwrap();
        xattr::set(dir.join("block"), "user.large", &[9; 3000]).unwrap();
        xattr::set(dir.join("block"), "user.small", b"small").unwrap();
        xattr::set(dir.join("a"), "user.on.a.directory", b"yes").unwrap();
        run(Command::new("setfacl").args(["-m", "u:1000:rw,g:2000:r,m::rw"]).arg(dir.join("one byte")));
        run(Command::new("setfacl").args(["-d", "-m", "u:1001:rwx,g::rx"]).arg(dir.join("a/b")));
        if root {
            run(Command::new("mknod").arg(dir.join("char device")).args(["c", "1", "3"]));
            run(Command::new("mknod").arg(dir.join("block device")).args(["b", "259", "70000"]));
            for (name, uid, gid) in
                [(".hidden", 999, 999), ("a/b", 100_000, 4_000_000_000), ("fast link", 7, 8)]
            {
                std::os::unix::fs::lchown(dir.join(name), Some(uid), Some(gid)).unwrap();
            }
            run(Command::new("/sbin/setcap").arg("cap_net_bind_service=+ep").arg(dir.join("block and one")));
            xattr::set(dir.join("fast link"), "trusted.on.a.link", b"yes").unwrap();
            xattr::set(dir.join("fifo"), "trusted.on.a.fifo", b"yes").unwrap();
        }
        if self.not_for_streaming {
            fs::write(dir.join(OsStr::from_bytes(b"latin-1 \xfc")), b"not UTF-8").unwrap();
            fs::create_dir(dir.join(OsStr::from_bytes(b"dir \xff"))).unwrap();
            fs::write(dir.join(OsStr::from_bytes(b"dir \xff/inside \xfe")), b"not UTF-8 either").unwrap();
            symlink(OsStr::from_bytes(b"to \xfc"), dir.join("odd target")).unwrap();
        }
        // Times, from the leaves up: past, future, before 1970, to the nanosecond.
        for (name, time) in [
            ("one byte", "2001-02-03 04:05:06.123456789"),
            ("empty", "1960-01-01 00:00:00.000000001"),
            ("block", "2100-12-31 23:59:59.999999999"),
            ("fast link", "2011-11-11 11:11:11.111111111"),
            ("fifo", "1999-12-31 23:59:59.5"),
            ("a/b", "2005-05-05 05:05:05.050505050"),
            ("empty dir", "2020-02-02 20:20:20.202020202"),
        ] {
            run(Command::new("touch").args(["-h", "-m", "-d", time]).arg(dir.join(name)));
        }
        run(Command::new("touch").args(["-m", "-d", "2021-01-01 01:01:01.010101010"]).arg(dir));
    }
}

/// Makes a sparse file with noise in some places.
pub fn sparse(path: &Path, len: u64, data: &[(u64, usize)]) {
    let file = File::create(path).unwrap();
    file.set_len(len).unwrap();
    for &(at, len) in data {
        file.write_all_at(&noise(len, at), at).unwrap();
    }
    // Delayed allocation would let st_blocks lag behind.
    file.sync_all().unwrap();
}

/// Bytes that look random and depend on `seed` alone.
pub fn noise(len: usize, seed: u64) -> Vec<u8> {
    let mut out = vec![0; len];
    blake3::Hasher::new().update(&seed.to_le_bytes()).finalize_xof().fill(&mut out);
    out
}

/// Makes an image of a directory with a long file and then `z`, which `meddle` gets as soon as the image is in `phase`; the error that must come of it.
pub fn meddled_with(
    source: &Path,
    phase: Phase,
    meddle: impl Fn(&Path),
    make: impl Fn(&Progress) -> Result<Summary, ImageError> + Sync,
) -> ImageError {
    let _ = fs::remove_dir_all(source);
    fs::create_dir(source).unwrap();
    // Long enough to be at it still when the meddler comes.
    fs::write(source.join("a"), noise(300 << 20, 1)).unwrap();
    let victim = source.join("z");
    fs::write(&victim, "short").unwrap();
    let progress = Progress::new();
    std::thread::scope(|scope| {
        let making = scope.spawn(|| make(&progress));
        while progress.phase() != phase {
            assert!(!making.is_finished(), "it ended before {phase:?}");
            std::hint::spin_loop();
        }
        meddle(&victim);
        making.join().unwrap().unwrap_err()
    })
}

/// How to list a tree.
#[derive(Clone, Copy)]
pub struct Listing {
    /// Access times too.
    pub atime: bool,
    /// Where files have data and where holes.
    pub allocation: bool,
    /// Which names of symbolic links are one inode.
    pub linked_symlinks: bool,
}

impl Default for Listing {
    fn default() -> Self {
        Listing { atime: false, allocation: true, linked_symlinks: true }
    }
}

impl Listing {
    /// Everything about a tree that an image must keep, a line for each name. Inode numbers become the first name.
    pub fn of(self, dir: &Path) -> BTreeMap<PathBuf, String> {
        let mut lines = BTreeMap::new();
        let mut first_names = BTreeMap::new();
        let mut todo = vec![PathBuf::new()];
        while let Some(relative) = todo.pop() {
            let path = dir.join(&relative);
            if relative == Path::new("lost+found") {
                continue;
            }
            let meta = fs::symlink_metadata(&path).unwrap();
            let mut line = String::new();
            let kind = meta.file_type();
            write!(line, "{:o} {}:{} ", meta.mode(), meta.uid(), meta.gid()).unwrap();
            write!(line, "{}.{:09} ", meta.mtime(), meta.mtime_nsec()).unwrap();
            if self.atime {
                write!(line, "atime {}.{:09} ", meta.atime(), meta.atime_nsec()).unwrap();
            }
            if kind.is_char_device() || kind.is_block_device() {
                write!(line, "rdev {} ", meta.rdev()).unwrap();
            }
            if kind.is_symlink() {
                write!(line, "-> {:?} ", fs::read_link(&path).unwrap()).unwrap();
            }
            if !kind.is_dir() && meta.nlink() > 1 && (self.linked_symlinks || !kind.is_symlink()) {
                let names: &mut Vec<PathBuf> = first_names.entry(meta.ino()).or_default();
                names.push(relative.clone());
                write!(line, "links {} ", meta.nlink()).unwrap();
            }
            if kind.is_file() {
                write!(line, "size {} content {} ", meta.len(), content(&path)).unwrap();
                if self.allocation {
                    let pages = data_pages(&path);
                    write!(line, "data {pages} ").unwrap();
                }
            }
            let mut names: Vec<_> = xattr::list(&path).unwrap().collect();
            names.sort();
            // XFS shows an ACL a second time under this name.
            names.retain(|name| !name.as_bytes().starts_with(b"trusted.SGI_ACL_"));
            for name in names {
                write!(line, "{name:?}={:?} ", xattr::get(&path, &name).unwrap()).unwrap();
            }
            if kind.is_dir() {
                let entries = fs::read_dir(&path).unwrap();
                todo.extend(entries.map(|entry| relative.join(entry.unwrap().file_name())));
            }
            lines.insert(relative, line);
        }
        for mut names in first_names.into_values() {
            names.sort();
            for name in &names {
                write!(lines.get_mut(name).unwrap(), "same as {:?}", names[0]).unwrap();
            }
        }
        lines
    }
}

/// Compares two trees, and names what differs.
pub fn assert_same(listing: Listing, source: &Path, image: &Path) {
    let (want, got) = (listing.of(source), listing.of(image));
    let mut differences = String::new();
    for path in want.keys().chain(got.keys().filter(|path| !want.contains_key(*path))) {
        let side =
            |lines: &BTreeMap<PathBuf, String>| lines.get(path).cloned().unwrap_or_else(|| "absent".into());
        if want.get(path) != got.get(path) {
            writeln!(differences, "{path:?}\n  source {:.600}\n  image  {:.600}", side(&want), side(&got))
                .unwrap();
        }
    }
    assert!(differences.is_empty(), "{differences}");
    assert!(want.len() > 1, "there was something to compare");
}

/// The hash of a file's data and where it lies; holes are not read.
fn content(path: &Path) -> String {
    let mut file = File::open(path).unwrap();
    let mut hash = blake3::Hasher::new();
    let mut buffer = vec![0; 1 << 16];
    let len = file.metadata().unwrap().len();
    let mut at = 0;
    while let Ok(start) = rustix::fs::seek(&file, rustix::fs::SeekFrom::Data(at)) {
        let end = rustix::fs::seek(&file, rustix::fs::SeekFrom::Hole(start)).unwrap();
        file.seek(SeekFrom::Start(start)).unwrap();
        let mut left = end - start;
        let mut place = start;
        while left > 0 {
            let want = buffer.len().min(left as usize);
            file.read_exact(&mut buffer[..want]).unwrap();
            // By pages: the two filesystems may see different holes where there are only zeros.
            for page in buffer[..want].chunks(4096) {
                if page.iter().any(|&byte| byte != 0) {
                    hash.update(&place.to_le_bytes()).update(page);
                }
                place += page.len() as u64;
            }
            left -= want as u64;
        }
        at = end;
        if at >= len {
            break;
        }
    }
    hash.finalize().to_hex()[..16].to_string()
}

/// How many pages of a file are data: what SEEK_DATA says.
fn data_pages(path: &Path) -> u64 {
    let file = File::open(path).unwrap();
    let (mut at, mut pages) = (0, 0);
    while let Ok(start) = rustix::fs::seek(&file, rustix::fs::SeekFrom::Data(at)) {
        at = rustix::fs::seek(&file, rustix::fs::SeekFrom::Hole(start)).unwrap();
        pages += at.div_ceil(4096) - start / 4096;
    }
    pages
}

/// The hash of a whole file, holes read as zeros but skipped where that can be seen.
pub fn image_hash(path: &Path) -> String {
    let len = fs::metadata(path).unwrap().len();
    format!("{len} {}", content(path))
}

/// Writes all of a small file.
pub fn write(path: &Path, content: &[u8]) {
    File::create(path).unwrap().write_all(content).unwrap();
}

/// Runs one test of the same binary as the user nobody, with `dir` handed to it; returns what it printed.
pub fn as_nobody(test: &str, dir: &Path) -> String {
    // Nobody may not reach the build directory.
    let exe = tempfile::Builder::new().prefix("test-").tempdir_in("/tmp").unwrap();
    fs::set_permissions(exe.path(), fs::Permissions::from_mode(0o755)).unwrap();
    fs::copy(std::env::current_exe().unwrap(), exe.path().join("test")).unwrap();
    let mut command = Command::new("setpriv");
    command.args(["--reuid=65534", "--regid=65534", "--clear-groups"]).arg(exe.path().join("test"));
    command.args(["--exact", "--nocapture", test]).env("HORCRUX_TEST_AS_NOBODY", dir).current_dir("/");
    run(&mut command)
}
