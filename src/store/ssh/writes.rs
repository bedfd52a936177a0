//! What changes something at the server: objects, their names, directories.
//!
//! Enters: keys and bytes. Leaves: the promises of [`super::super::Store`], kept with requests of SFTP. Invariant: an object gets its name after its fsync, by a
//! step that refuses to replace, and the directory is fsynced before anyone is told.

use std::sync::atomic::Ordering;

use super::super::{Key, StoreError};
use super::error::Failed;
use super::files::{At, Done, join, parent_of, temp_name};
use super::requests::FSYNC;
use super::sftp::{Handle, SftpError};
use super::wire::{Code, FOR_READING, NEW};

/// Directories remembered as durable. Forgetting them costs a few requests each.
const MAX_KNOWN_DIRS: usize = 4096;

impl At<'_> {
    pub fn put_new(&mut self, key: &Key, body: &[u8]) -> Done<()> {
        match self.read_if_there(key) {
            Ok(Some(there)) => return self.settle_existing(key, there == body),
            Err(Failed { error: StoreError::TooLong { .. }, .. }) => return self.settle_existing(key, false),
            Ok(None) => {}
            Err(failed) => return Err(failed),
        }
        let path = self.path(key);
        let temp = join(parent_of(&path), &temp_name());
        self.write_new(&temp, key, body)?;
        self.publish(&temp, key, |at| match at.read_whole(key) {
            Ok(there) => Ok(there == body),
            Err(Failed { error: StoreError::TooLong { .. }, .. }) => Ok(false),
            Err(failed) => Err(failed),
        })
    }

    /// Makes a file of these bytes, durable but for its name; where that fails it is removed.
    pub fn write_new(&mut self, temp: &[u8], key: &Key, body: &[u8]) -> Done<()> {
        let handle = self.create(temp, key)?;
        self.write_open(temp, handle, key, body)
    }

    /// The same in a directory that was just made.
    pub fn write_bare(&mut self, temp: &[u8], key: &Key, body: &[u8]) -> Done<()> {
        self.link.sftp.allow(0);
        let handle = self.link.sftp.open(temp, NEW);
        let handle = handle.map_err(|error| self.write_error("write", key, error))?;
        self.write_open(temp, handle, key, body)
    }

    fn write_open(&mut self, temp: &[u8], handle: Handle, key: &Key, body: &[u8]) -> Done<()> {
        let written = self.link.sftp.write(&handle, 0, body);
        let written = written.and_then(|()| self.link.sftp.fsync(&handle));
        match written {
            Ok(synced) => {
                self.warn_unless(synced);
                self.link.sftp.close(handle).map_err(|error| self.fail("write", key, error))
            }
            Err(error) => {
                let failed = self.write_error("write", key, error);
                if !failed.lost {
                    let _ = self.link.sftp.close(handle);
                    self.discard(temp);
                }
                Err(failed)
            }
        }
    }

    /// Makes an empty file for a write that will become `key`, and the directory it lies in.
    pub fn create(&mut self, temp: &[u8], key: impl ToString) -> Done<Handle> {
        let dir = parent_of(temp);
        self.make_dirs(dir)?;
        self.link.sftp.allow(0);
        let mut opened = self.link.sftp.open(temp, NEW);
        if opened.as_ref().is_err_and(|error| error.is(Code::NoSuchFile)) {
            // Someone removed the directory; what was known of any may be as old.
            self.inner.known_dirs.lock().clear();
            self.make_dirs(dir)?;
            opened = self.link.sftp.open(temp, NEW);
        }
        opened.map_err(|error| self.write_error("write", key, error))
    }

    /// Gives a written file its key; the same content under it already is as good. Either way the temporary name goes, if the session lives.
    pub fn publish(
        &mut self,
        temp: &[u8],
        key: &Key,
        same: impl FnOnce(&mut Self) -> Done<bool>,
    ) -> Done<()> {
        let path = self.path(key);
        let dir = parent_of(&path);
        let refused = match self.make_dirs(dir) {
            Err(failed) => failed,
            Ok(()) => {
                self.link.sftp.allow(0);
                let published = self.link.sftp.publish(temp, &path);
                match published {
                    Ok(()) => return self.sync_dir(dir),
                    Err(error) if error.is_answer() && self.link.sftp.lstat(&path).is_ok() => {
                        match same(self).and_then(|same| self.settle_existing(key, same)) {
                            Ok(()) => {
                                self.discard(temp);
                                return Ok(());
                            }
                            Err(failed) => failed,
                        }
                    }
                    Err(error) => self.write_error("write", key, error),
                }
            }
        };
        if !refused.lost {
            self.discard(temp);
        }
        Err(refused)
    }

    /// Removes a file that is garbage by its name: nothing depends on it, and nobody waits.
    pub fn discard(&mut self, temp: &[u8]) {
        let _ = self.link.sftp.remove_later(temp);
    }

    /// The answer to a put where the key exists.
    fn settle_existing(&mut self, key: &Key, same: bool) -> Done<()> {
        if !same {
            return Err(StoreError::AlreadyExists { store: self.inner.name.clone(), key: key.clone() }.into());
        }
        // Whoever made it may not have come to fsync the directory yet, and we answer that it is durable.
        let path = self.path(key);
        self.sync_dir(parent_of(&path))
    }

    /// Makes the names in a directory durable: OpenSSH opens a directory like a file and fsyncs it.
    pub fn sync_dir(&mut self, dir: &[u8]) -> Done<()> {
        if !self.link.sftp.has(FSYNC) {
            self.warn_unless(false);
            return Ok(());
        }
        self.link.sftp.allow(0);
        let shown = String::from_utf8_lossy(dir).into_owned();
        let handle = match self.link.sftp.open(dir, FOR_READING) {
            Ok(handle) => handle,
            // A directory we may pass through but not open was there before us.
            Err(error) if error.is(Code::PermissionDenied) => return Ok(()),
            Err(error) if error.is_answer() => {
                self.warn_unless(false);
                return Ok(());
            }
            Err(error) => return Err(self.fail("sync", shown, error)),
        };
        let synced = self.link.sftp.fsync(&handle);
        self.link.sftp.close(handle).map_err(|error| self.fail("sync", &shown, error))?;
        match synced {
            // 5 is how OpenSSH says EINVAL: a filesystem that has no fsync for directories, and sends each change of a name at once.
            Err(error) if error.is(Code::Other(5)) => Ok(()),
            Err(error) => Err(self.write_error("sync", shown, error)),
            Ok(_) => Ok(()),
        }
    }

    pub fn warn_unless(&self, durable: bool) {
        if !durable && !self.inner.warned.swap(true, Ordering::Relaxed) {
            tracing::warn!(store = %self.inner.name,
                "the server can't fsync what it is sent: what it answered as written may be lost if its power fails");
        }
    }

    /// Makes a directory of the place and what is missing above it, each name durable, whoever made it.
    pub fn make_dirs(&mut self, dir: &[u8]) -> Done<()> {
        if self.inner.known_dirs.lock().contains(dir) {
            return Ok(());
        }
        let root = self.inner.place.path.as_slice();
        let below_root = dir.len() > root.len();
        if below_root {
            self.make_dirs(parent_of(dir))?;
        }
        self.link.sftp.allow(0);
        let mut made = self.link.sftp.mkdir(dir);
        if !below_root
            && dir != parent_of(dir)
            && made.as_ref().is_err_and(|error| error.is(Code::NoSuchFile))
        {
            self.make_dirs(parent_of(dir))?;
            made = self.link.sftp.mkdir(dir);
        }
        let shown = || String::from_utf8_lossy(dir).into_owned();
        let existed = made.is_err();
        match made {
            Ok(()) => {}
            Err(error) if !error.is_answer() => return Err(self.fail("make the directory", shown(), error)),
            Err(error) => match self.link.sftp.stat(dir) {
                Ok(attrs) if attrs.is_dir() != Some(false) => {}
                Ok(_) => {
                    let message = "a file is in the way".to_owned();
                    let in_the_way = SftpError::Status { code: Code::Failure, message };
                    return Err(self.fail("make the directory", shown(), in_the_way));
                }
                Err(_) => return Err(self.write_error("make the directory", shown(), error)),
            },
        }
        // What is above the place and was there is not ours to vouch for.
        if !existed || below_root || dir == root {
            self.sync_dir(parent_of(dir))?;
        }
        let mut known = self.inner.known_dirs.lock();
        if known.len() >= MAX_KNOWN_DIRS {
            known.clear();
        }
        known.insert(dir.to_owned());
        Ok(())
    }

    pub fn delete(&mut self, key: &Key) -> Done<()> {
        if let Some((handle, _)) = self.link.handles.take(key) {
            self.link.sftp.close(handle).map_err(|error| self.fail("delete", key, error))?;
        }
        let path = self.path(key);
        self.link.sftp.allow(0);
        match self.link.sftp.remove(&path) {
            Ok(()) => self.sync_dir(parent_of(&path)),
            Err(error) if error.is(Code::NoSuchFile) => Ok(()),
            Err(error) => Err(self.write_error("delete", key, error)),
        }
    }
}
