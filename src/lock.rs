//! Locks between processes: a file that is flock'ed for as long as its holder lives.
//!
//! Enters: the path of a lock file. Leaves: a [`FileLock`], or who holds it. Invariant: the lock ends with its holder's last descriptor, so also with a
//! kill -9; the pid inside is for messages only.

use std::fs::{File, OpenOptions};
use std::io::{self, Read, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;

use rustix::fs::FlockOperation;

/// A held lock.
#[derive(Debug)]
pub struct FileLock {
    _file: File,
}

/// Why a lock could not be taken.
#[derive(Debug, thiserror::Error)]
pub enum LockError {
    /// Someone has it.
    #[error("in use{}", holder.map(|pid| format!(" by process {pid}")).unwrap_or_default())]
    InUse {
        /// The process that says it holds the lock.
        holder: Option<u32>,
    },
    /// The file could not be opened or locked.
    #[error(transparent)]
    Io(#[from] io::Error),
}

impl FileLock {
    /// Takes the lock, without waiting; makes the file if need be.
    pub fn take(path: &Path) -> Result<FileLock, LockError> {
        let mut file =
            OpenOptions::new().read(true).write(true).create(true).truncate(false).mode(0o600).open(path)?;
        match rustix::fs::flock(&file, FlockOperation::NonBlockingLockExclusive) {
            Ok(()) => {}
            Err(rustix::io::Errno::WOULDBLOCK) => {
                let mut text = String::new();
                // No pid is longer than 20 digits.
                let _ = file.take(20).read_to_string(&mut text);
                return Err(LockError::InUse { holder: text.trim().parse().ok() });
            }
            Err(errno) => return Err(LockError::Io(errno.into())),
        }
        // On a full disk the lock holds all the same, without a name to it.
        let _ = file.set_len(0).and_then(|()| writeln!(file, "{}", std::process::id()));
        Ok(FileLock { _file: file })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_second_taker_is_told_who_holds_it_until_it_is_free() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("lock");
        let held = FileLock::take(&path).unwrap();
        let error = FileLock::take(&path).unwrap_err().to_string();
        assert_eq!(error, format!("in use by process {}", std::process::id()));
        drop(held);
        FileLock::take(&path).unwrap();
    }
}
