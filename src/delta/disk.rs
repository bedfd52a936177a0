//! The few file operations a layer is built on, so that tests can put a disk under it that forgets what was not synced.
//!
//! Enters: names inside one directory, offsets, bytes. Leaves: bytes. Invariant: none of its own; what is durable when is the
//! caller's argument (FORMAT.md), made with [`File::sync`] and [`Dir::sync`] alone.

use std::fs;
use std::io;
use std::os::fd::AsFd;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::OnceLock;
use std::sync::atomic::{AtomicBool, Ordering};

/// An open file.
pub trait File: Send + Sync {
    /// Fills `buf` from `at`; fewer bytes are `UnexpectedEof`.
    fn read_at(&self, buf: &mut [u8], at: u64) -> io::Result<()>;
    /// Like [`File::read_at`] where that needs no disk; `false`, with `buf` in any state, where it would have to wait.
    fn read_at_nowait(&self, buf: &mut [u8], at: u64) -> io::Result<bool>;
    /// Writes all of `bytes` at `at`. On `Err` any part of it may have been written.
    fn write_at(&self, bytes: &[u8], at: u64) -> io::Result<()>;
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
