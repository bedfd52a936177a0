//! The store on one of its sessions: where objects are, how they are read, what failures mean.
//!
//! Enters: keys and ranges. Leaves: exactly the bytes asked for, or an error. Invariant: the layout is byte for byte that of a directory store; an open file that
//! is kept serves nothing that its name no longer shows.

use std::ops::Range;

use bytes::Bytes;

use super::super::dir::{check_range, etag_of};
use super::super::{Etag, Key, MAX_WHOLE_OBJECT, StoreError};
use super::Inner;
use super::connect::Link;
use super::error::{Failed, failed};
use super::sftp::{Handle, SftpError};
use super::wire::{Code, FOR_READING};
use crate::durable::TEMP_PREFIX;

/// Result of work on a session.
pub(super) type Done<T> = Result<T, Failed>;

/// Open files a session keeps. Objects that are read by range are written once, so an open one stays what it is.
const MAX_HANDLES: usize = 16;
/// Bytes read in the same flight in which a file's length is asked for.
const READ_AHEAD_OF_LEN: usize = 64 * 1024;
/// Ranges up to this are read in the flight that asks for the length: their buffer is made on a table's word.
const SMALL_RANGE: u64 = 4 << 20;

/// Open files of a session, most recently used last.
#[derive(Default)]
pub(super) struct Handles(Vec<(Key, Handle, u64)>);

impl Handles {
    pub fn take(&mut self, key: &Key) -> Option<(Handle, u64)> {
        let at = self.0.iter().position(|(open, ..)| open == key)?;
        let (_, handle, len) = self.0.remove(at);
        Some((handle, len))
    }

    /// Keeps one; the one to close for it.
    fn keep(&mut self, key: &Key, handle: Handle, len: u64) -> Option<Handle> {
        let evicted = (self.0.len() >= MAX_HANDLES).then(|| self.0.remove(0).1);
        self.0.push((key.clone(), handle, len));
        evicted
    }
}

/// A store on one of its sessions.
pub(super) struct At<'a> {
    pub inner: &'a Inner,
    pub link: &'a mut Link,
}

/// The directory a path lies in.
pub(super) fn parent_of(path: &[u8]) -> &[u8] {
    match path.iter().rposition(|byte| *byte == b'/') {
        Some(0) => b"/",
        Some(at) => &path[..at],
        None => b".",
    }
}

/// A name below a directory.
pub(super) fn join(dir: &[u8], name: &str) -> Vec<u8> {
    let slash: &[u8] = if dir.ends_with(b"/") { b"" } else { b"/" };
    [dir, slash, name.as_bytes()].concat()
}

/// The name of a write in flight.
pub(super) fn temp_name() -> String {
    format!("{TEMP_PREFIX}{}", uuid::Uuid::new_v4().simple())
}

impl At<'_> {
    pub fn path(&self, key: &Key) -> Vec<u8> {
        join(&self.inner.place.path, key.as_str())
    }

    pub fn fail(&self, operation: &'static str, what: impl ToString, error: SftpError) -> Failed {
        failed(&self.inner.name, operation, &what.to_string(), error)
    }

    /// The error of a write. "Failure" is all that SFTP says of a full or a read-only disk, so the disk is asked.
    pub fn write_error(&mut self, operation: &'static str, what: impl ToString, error: SftpError) -> Failed {
        let what = what.to_string();
        if error.is(Code::Failure) {
            let mut room = self.link.sftp.room(&self.inner.place.path);
            if matches!(room, Ok(None)) {
                room = self.link.sftp.room(parent_of(&self.inner.place.path));
            }
            let store = self.inner.name.clone();
            match room {
                Ok(Some(room)) if room.read_only => {
                    return StoreError::PermissionDenied { store, operation, path: what.into() }.into();
                }
                Ok(Some(room)) if room.full => return StoreError::NoSpace { store, what }.into(),
                _ => {}
            }
        }
        self.fail(operation, what, error)
    }

    /// The error of a read, where "not there" can mean the object or the whole place.
    fn read_error(&mut self, key: &Key, error: SftpError) -> Failed {
        match error.is(Code::NoSuchFile) {
            true => self.absent(key),
            false => self.fail("read", key, error),
        }
    }

    /// That an object is not there, or that the whole place is not.
    fn absent(&mut self, key: &Key) -> Failed {
        match self.link.sftp.stat(&self.inner.place.path) {
            Ok(attrs) if attrs.is_dir() != Some(false) => self.not_found(key),
            Err(error) if !error.is(Code::NoSuchFile) => self.fail("read", key, error),
            _ => StoreError::NoPlace { store: self.inner.name.clone() }.into(),
        }
    }

    fn not_found(&self, key: &Key) -> Failed {
        StoreError::NotFound { store: self.inner.name.clone(), key: key.clone() }.into()
    }

    fn no_length(&self, key: &Key) -> Failed {
        self.fail("read", key, SftpError::Nonsense("the server does not tell a file's length"))
    }

    fn short(&self, key: &Key, expected: u64, actual: u64) -> Failed {
        StoreError::ShortBody { store: self.inner.name.clone(), key: key.clone(), expected, actual }.into()
    }

    pub fn read_whole(&mut self, key: &Key) -> Done<Bytes> {
        match self.read_if_there(key)? {
            Some(body) => Ok(body),
            None => Err(self.absent(key)),
        }
    }

    /// Reads a small object; `None` where there is none, or no place.
    pub fn read_if_there(&mut self, key: &Key) -> Done<Option<Bytes>> {
        let path = self.path(key);
        self.link.sftp.allow(0);
        let handle = match self.link.sftp.open(&path, FOR_READING) {
            Ok(handle) => handle,
            Err(error) if error.is(Code::NoSuchFile) => return Ok(None),
            Err(error) => return Err(self.fail("read", key, error)),
        };
        let body = self.read_open(key, &handle);
        // After a refusal the session goes on, so the file is closed.
        if body.as_ref().is_ok() || body.as_ref().is_err_and(|failed| !failed.lost) {
            self.link.sftp.close(handle).map_err(|error| self.fail("read", key, error))?;
        }
        match body {
            Ok(body) => Ok(Some(body)),
            // A directory is there.
            Err(Failed { error: StoreError::NotFound { .. }, .. }) => Ok(None),
            Err(failed) => Err(failed),
        }
    }

    fn read_open(&mut self, key: &Key, handle: &Handle) -> Done<Bytes> {
        let sftp = &mut self.link.sftp;
        let stat =
            sftp.ask_fstat(handle).map_err(|error| failed(&self.inner.name, "read", key.as_str(), error))?;
        let first = sftp.read_at_once(handle, 0, READ_AHEAD_OF_LEN);
        let attrs = match first {
            Err(ref error) if !error.is_answer() => {
                return first.map(Bytes::from).map_err(|e| self.fail("read", key, e));
            }
            _ => self.link.sftp.take_stat(stat).map_err(|error| self.fail("read", key, error))?,
        };
        if attrs.is_file() == Some(false) {
            return Err(self.not_found(key));
        }
        let mut body = first.map_err(|error| self.fail("read", key, error))?;
        let len = attrs.len.ok_or_else(|| self.no_length(key))?;
        if len > MAX_WHOLE_OBJECT {
            let (store, key) = (self.inner.name.clone(), key.clone());
            return Err(StoreError::TooLong { store, key, len, max: MAX_WHOLE_OBJECT }.into());
        }
        if len > body.len() as u64 {
            let rest = self.link.sftp.read(handle, body.len() as u64, len as usize - body.len());
            body.extend_from_slice(&rest.map_err(|error| self.fail("read", key, error))?);
        }
        match body.len() as u64 == len {
            true => Ok(body.into()),
            false => Err(self.short(key, len, body.len() as u64)),
        }
    }

    pub fn read_range(&mut self, key: &Key, range: &Range<u64>) -> Done<Bytes> {
        check_range(&self.inner.name, key, range, u64::MAX)?;
        let path = self.path(key);
        let wanted = range.end - range.start;
        if let Some((handle, len)) = self.link.handles.take(key) {
            // One flight. The name is asked for beside the bytes: an object that was deleted since must not be found.
            self.link.sftp.allow(wanted);
            let stat = self.link.sftp.ask_stat(&path).map_err(|error| self.fail("read", key, error))?;
            let body = match range.end <= len {
                true => self.link.sftp.read(&handle, range.start, wanted as usize),
                false => Ok(Vec::new()),
            };
            if let Err(error) = &body
                && !error.is_answer()
            {
                return Err(self.fail("read", key, error.clone()));
            }
            match self.link.sftp.take_stat(stat) {
                Err(error) if !error.is_answer() => return Err(self.fail("read", key, error)),
                Ok(attrs) if attrs.len == Some(len) => {
                    self.keep(key, handle, len)?;
                    check_range(&self.inner.name, key, range, len)?;
                    let body = body.map_err(|error| self.fail("read", key, error))?;
                    return self.exactly(key, range, body);
                }
                // Gone, or another one: the open file is of no use.
                _ => self.link.sftp.close(handle).map_err(|error| self.fail("read", key, error))?,
            }
        }
        self.link.sftp.allow(wanted.min(SMALL_RANGE));
        let handle = self.link.sftp.open(&path, FOR_READING).map_err(|error| self.read_error(key, error))?;
        let read = self.read_range_open(key, &handle, range);
        match read {
            Ok((body, len)) => {
                self.keep(key, handle, len)?;
                self.exactly(key, range, body)
            }
            Err(failed) => {
                if !failed.lost {
                    self.link.sftp.close(handle).map_err(|error| self.fail("read", key, error))?;
                }
                Err(failed)
            }
        }
    }

    /// The bytes, or those that are there, and the file's length.
    fn read_range_open(&mut self, key: &Key, handle: &Handle, range: &Range<u64>) -> Done<(Vec<u8>, u64)> {
        let wanted = range.end - range.start;
        let sftp = &mut self.link.sftp;
        let stat =
            sftp.ask_fstat(handle).map_err(|error| failed(&self.inner.name, "read", key.as_str(), error))?;
        // A range at the far end of numbers is no request a server need take well.
        let at_once = wanted <= SMALL_RANGE && range.end < 1 << 62;
        let first = at_once.then(|| sftp.read(handle, range.start, wanted as usize));
        if let Some(Err(error)) = &first
            && !error.is_answer()
        {
            return Err(self.fail("read", key, error.clone()));
        }
        let attrs = self.link.sftp.take_stat(stat).map_err(|error| self.fail("read", key, error))?;
        if attrs.is_file() == Some(false) {
            return Err(self.not_found(key));
        }
        let len = attrs.len.ok_or_else(|| self.no_length(key))?;
        // Before the buffer is made: a damaged table must not make us allocate what no object has.
        check_range(&self.inner.name, key, range, len)?;
        let body = first.unwrap_or_else(|| self.link.sftp.read(handle, range.start, wanted as usize));
        Ok((body.map_err(|error| self.fail("read", key, error))?, len))
    }

    fn exactly(&self, key: &Key, range: &Range<u64>, body: Vec<u8>) -> Done<Bytes> {
        let wanted = range.end - range.start;
        match body.len() as u64 == wanted {
            true => Ok(body.into()),
            false => Err(self.short(key, wanted, body.len() as u64)),
        }
    }

    fn keep(&mut self, key: &Key, handle: Handle, len: u64) -> Done<()> {
        match self.link.handles.keep(key, handle, len) {
            Some(evicted) => self.link.sftp.close(evicted).map_err(|error| self.fail("read", key, error)),
            None => Ok(()),
        }
    }

    /// The tag of a small object, or that there is none.
    pub fn current(&mut self, key: &Key) -> Done<Option<Etag>> {
        Ok(self.read_if_there(key)?.map(|body| etag_of(&body)))
    }
}
