//! The few file operations a layer is built on, so that tests can put a disk under it that forgets what was not synced.
//!
//! Enters: names inside one directory, offsets, bytes. Leaves: bytes. Invariant: none of its own; what is durable when is the
//! caller's argument (FORMAT.md), made with [`File::sync`] and [`Dir::sync`] alone.

use std::fs;
use std::io::{self, IoSlice};
use std::os::fd::AsFd;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::OnceLock;
use std::sync::atomic::{AtomicBool, Ordering};

use smallvec::SmallVec;

/// Parts that one system call writes.
const SLICES: usize = 64;

/// An open file.
pub trait File: Send + Sync {
    /// Fills `buf` from `at`; fewer bytes are `UnexpectedEof`.
    fn read_at(&self, buf: &mut [u8], at: u64) -> io::Result<()>;
    /// Like [`File::read_at`] where that needs no disk; `false`, with `buf` in any state, where it would have to wait.
    fn read_at_nowait(&self, buf: &mut [u8], at: u64) -> io::Result<bool>;
    /// Writes all of `bytes` at `at`. On `Err` any part of it may have been written.
    fn write_at(&self, bytes: &[u8], at: u64) -> io::Result<()>;
    /// Writes the parts one after the other from `at` on, as [`File::write_at`] would: how many of them are there whole, and what became of the next.
    fn write_parts_at(&self, parts: &[&[u8]], at: u64) -> (usize, io::Result<()>) {
        let mut at = at;
        for (whole, part) in parts.iter().enumerate() {
            if let Err(error) = self.write_at(part, at) {
                return (whole, Err(error));
            }
            at += part.len() as u64;
        }
        (parts.len(), Ok(()))
    }
    /// Makes everything written so far durable, and the length. After an `Err` nothing is known of any of it.
    fn sync(&self) -> io::Result<()>;
    /// Length in bytes.
    fn len(&self) -> io::Result<u64>;
    /// Cuts or extends (with zeros).
    fn set_len(&self, len: u64) -> io::Result<()>;
    /// Gives the space of a range back; it reads as zeros from then on. A disk that can't may do nothing.
    fn punch(&self, at: u64, len: u64) -> io::Result<()>;
}

/// A directory and the files in it.
pub trait Dir: Send + Sync {
    /// Makes an empty file, or empties the one that is there.
    fn create(&self, name: &str) -> io::Result<Box<dyn File>>;
    /// Opens a file for reading and writing.
    fn open(&self, name: &str) -> io::Result<Box<dyn File>>;
    /// Renames, replacing atomically.
    fn rename(&self, from: &str, to: &str) -> io::Result<()>;
    /// Removes a file.
    fn remove(&self, name: &str) -> io::Result<()>;
    /// Makes all creations, renames and removals so far durable.
    fn sync(&self) -> io::Result<()>;
    /// Names the run of the kernel that has in memory what is not synced: with the next one that is lost.
    fn boot(&self) -> [u8; 16];
    /// The file's path, for messages.
    fn describe(&self, name: &str) -> PathBuf;
}

/// A directory of the real file system.
pub struct OsDir {
    path: PathBuf,
}

impl OsDir {
    /// The directory at `path`, which must be there.
    pub fn new(path: &Path) -> OsDir {
        OsDir { path: path.to_owned() }
    }
}

impl Dir for OsDir {
    fn create(&self, name: &str) -> io::Result<Box<dyn File>> {
        let mut options = fs::OpenOptions::new();
        // What is in the image may be nobody else's to read, and here its owners and modes guard nothing.
        options.read(true).write(true).create(true).truncate(true).mode(0o600);
        let file = options.open(self.path.join(name))?;
        Ok(Box::new(OsFile::new(file)))
    }

    fn open(&self, name: &str) -> io::Result<Box<dyn File>> {
        let file = fs::OpenOptions::new().read(true).write(true).open(self.path.join(name))?;
        Ok(Box::new(OsFile::new(file)))
    }

    fn rename(&self, from: &str, to: &str) -> io::Result<()> {
        fs::rename(self.path.join(from), self.path.join(to))
    }

    fn remove(&self, name: &str) -> io::Result<()> {
        fs::remove_file(self.path.join(name))
    }

    fn sync(&self) -> io::Result<()> {
        crate::durable::sync_dir(&self.path)
    }

    fn boot(&self) -> [u8; 16] {
        *BOOT.get_or_init(this_boot)
    }

    fn describe(&self, name: &str) -> PathBuf {
        self.path.join(name)
    }
}

static BOOT: OnceLock<[u8; 16]> = OnceLock::new();

/// The kernel's name for its own run. Where it does not say, no other server's is the same.
fn this_boot() -> [u8; 16] {
    let told = fs::read_to_string("/proc/sys/kernel/random/boot_id").ok();
    let told = told.and_then(|told| crate::format::ids::parse_hex(&told.trim().replace('-', "")));
    told.unwrap_or_else(|| *uuid::Uuid::new_v4().as_bytes())
}

struct OsFile {
    file: fs::File,
    /// Set once the file system said it has no RWF_NOWAIT (tmpfs on some kernels): its reads do not wait for a disk anyway.
    nowait_unknown: AtomicBool,
}

impl OsFile {
    fn new(file: fs::File) -> OsFile {
        OsFile { file, nowait_unknown: AtomicBool::new(false) }
    }
}

impl File for OsFile {
    fn read_at(&self, buf: &mut [u8], at: u64) -> io::Result<()> {
        self.file.read_exact_at(buf, at)
    }

    fn read_at_nowait(&self, buf: &mut [u8], at: u64) -> io::Result<bool> {
        use rustix::io::{Errno, ReadWriteFlags, preadv2};
        if self.nowait_unknown.load(Ordering::Relaxed) {
            return self.read_at(buf, at).map(|()| true);
        }
        let want = buf.len();
        let mut slices = [io::IoSliceMut::new(buf)];
        match preadv2(self.file.as_fd(), &mut slices, at, ReadWriteFlags::NOWAIT) {
            // A short read: the rest is not in memory, or is past the end; the waiting call tells which.
            Ok(read) => Ok(read == want),
            Err(Errno::AGAIN | Errno::INTR) => Ok(false),
            Err(Errno::OPNOTSUPP | Errno::NOSYS | Errno::INVAL) => {
                self.nowait_unknown.store(true, Ordering::Relaxed);
                self.read_at(buf, at).map(|()| true)
            }
            Err(error) => Err(error.into()),
        }
    }

    fn write_at(&self, bytes: &[u8], at: u64) -> io::Result<()> {
        self.file.write_all_at(bytes, at)
    }

    fn write_parts_at(&self, parts: &[&[u8]], at: u64) -> (usize, io::Result<()>) {
        let (mut written, mut whole) = (0, 0);
        while whole < parts.len() {
            // What the last call left of the first of these.
            let (mut skip, some) = (written, &parts[whole..parts.len().min(whole + SLICES)]);
            let slices: SmallVec<[IoSlice<'_>; SLICES]> =
                some.iter().map(|part| IoSlice::new(&part[std::mem::take(&mut skip)..])).collect();
            let offset = at + parts[..whole].iter().map(|part| part.len() as u64).sum::<u64>();
            match rustix::io::pwritev(&self.file, &slices, offset + written as u64) {
                Ok(0) if slices.iter().any(|slice| !slice.is_empty()) => {
                    return (whole, Err(io::ErrorKind::WriteZero.into()));
                }
                Ok(more) => {
                    written += more;
                    while let Some(part) = parts.get(whole)
                        && written >= part.len()
                    {
                        written -= part.len();
                        whole += 1;
                    }
                }
                Err(rustix::io::Errno::INTR) => {}
                Err(error) => return (whole, Err(error.into())),
            }
        }
        (whole, Ok(()))
    }

    fn sync(&self) -> io::Result<()> {
        self.file.sync_data()
    }

    fn len(&self) -> io::Result<u64> {
        self.file.metadata().map(|metadata| metadata.len())
    }

    fn set_len(&self, len: u64) -> io::Result<()> {
        self.file.set_len(len)
    }

    fn punch(&self, at: u64, len: u64) -> io::Result<()> {
        use rustix::fs::{FallocateFlags, fallocate};
        use rustix::io::Errno;
        let flags = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
        match fallocate(&self.file, flags, at, len) {
            // Without holes the space is kept for the next writes, which is all that is lost.
            Ok(()) | Err(Errno::OPNOTSUPP | Errno::NOSYS) => Ok(()),
            Err(error) => Err(error.into()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parts_lie_one_after_the_other_however_many_there_are() {
        let dir = tempfile::tempdir().unwrap();
        let file = OsDir::new(dir.path()).create("f").unwrap();
        let bytes: Vec<u8> = (0..100_000u32).map(|n| (n * 7 + n / 251) as u8).collect();
        // Of every length, none among them.
        let mut cuts: Vec<usize> = (0..200).map(|n| n * n * 5 / 2).collect();
        cuts.extend([0, 100, 100, 90_000, 90_000, bytes.len()]);
        cuts.sort_unstable();
        let parts: Vec<&[u8]> = cuts.windows(2).map(|ends| &bytes[ends[0]..ends[1]]).collect();
        assert!(parts.len() > 3 * SLICES);
        let (whole, done) = file.write_parts_at(&parts, 4000);
        done.unwrap();
        assert_eq!(whole, parts.len());
        let mut found = vec![0; bytes.len()];
        file.read_at(&mut found, 4000).unwrap();
        assert!(found == bytes);
        assert_eq!(file.len().unwrap(), 4000 + bytes.len() as u64);
    }

    #[test]
    fn a_file_that_takes_no_more_says_how_many_parts_it_has() {
        let dir = tempfile::tempdir().unwrap();
        let file = OsDir::new(dir.path()).create("f").unwrap();
        // As long as the file system lets a file be: what is written over that end is taken as far as it goes.
        let (mut longest, mut too_long) = (0, i64::MAX as u64);
        while too_long - longest > 1 {
            let middle = longest + (too_long - longest) / 2;
            *(if file.set_len(middle).is_ok() { &mut longest } else { &mut too_long }) = middle;
        }
        file.set_len(0).unwrap();
        let parts: [&[u8]; 5] = [&[1; 3000], &[2; 3000], &[3; 3000], &[4; 3000], &[5; 3000]];
        let (whole, done) = file.write_parts_at(&parts, longest - 10_000);
        assert_eq!((whole, done.unwrap_err().kind()), (3, io::ErrorKind::FileTooLarge));
        let mut found = vec![0; 10_000];
        file.read_at(&mut found, longest - 10_000).unwrap();
        assert!(found == parts.concat()[..10_000]);

        let full = OsFile::new(fs::OpenOptions::new().write(true).open("/dev/full").unwrap());
        let (whole, done) = full.write_parts_at(&[&[], &[1; 10], &[2; 10]], 0);
        assert_eq!((whole, done.unwrap_err().kind()), (0, io::ErrorKind::StorageFull));
    }
}
