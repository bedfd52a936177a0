//! The lock of a cache directory: one server at a time.
//!
//! Enters: a directory. Leaves: a [`DirLock`], or who holds it. The lock ends with the file's last descriptor, so
//! also with a kill -9.

use std::fs::{File, OpenOptions};
use std::io::{Read, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;

use rustix::fs::FlockOperation;

use super::error::CacheError;

/// A held lock.
pub(super) struct DirLock {
    _file: File,
}

impl DirLock {
    /// Takes the lock of `dir`, without waiting.
    pub(super) fn take(dir: &Path) -> Result<DirLock, CacheError> {
        let path = dir.join("lock");
        let mut file = OpenOptions::new()
            .read(true)
            .write(true)
            .create(true)
            .truncate(false)
            .mode(0o600)
            .open(&path)
            .map_err(CacheError::io("open the lock", &path))?;
        match rustix::fs::flock(&file, FlockOperation::NonBlockingLockExclusive) {
            Ok(()) => {}
            Err(rustix::io::Errno::WOULDBLOCK) => {
                // The pid is for the message only. 20 digits are more than any.
                let mut text = String::new();
                let _ = file.take(20).read_to_string(&mut text);
                return Err(CacheError::InUse { dir: dir.to_owned(), holder: text.trim().parse().ok() });
            }
            Err(errno) => return Err(CacheError::io("lock", &path)(errno.into())),
        }
        // On a full disk the lock holds all the same, without a name to it.
        let _ = file.set_len(0).and_then(|()| writeln!(file, "{}", std::process::id()));
        Ok(DirLock { _file: file })
    }
}
