//! Files that appear whole or not at all, and stay after a power cut.
//!
//! Enters: a path and the bytes it shall hold. Leaves: the file, durable under its name, or an error and the old state.
//! Invariant: data is fsynced before the name points to it, and the directory is fsynced before anyone is told. All of the project's small
//! metadata files and all objects of a directory store are written through here. Every function blocks; async callers go through a
//! blocking thread.

use std::ffi::OsStr;
use std::fs::{File, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use rustix::fs::{CWD, RenameFlags};

/// How the name of a write in flight starts. No object and no other file has such a name.
pub const TEMP_PREFIX: &str = ".tmp-";

/// How often and how soon what met a stale handle is done again.
const STALE_TRIES: u32 = 10;
const STALE_PAUSE: Duration = Duration::from_millis(5);

/// How often another name is tried where a temporary one is taken.
const TEMP_NAME_TRIES: u32 = 16;

/// Does something with a name that others may be giving to something else, again where that just happened: on NFS, whoever still looks at what had the name is told
/// that its handle is stale, once or a few times. Not for what may be done only once and can't be told to have been done.
pub fn unless_stale<T>(mut what: impl FnMut() -> io::Result<T>) -> io::Result<T> {
    for _ in 0..STALE_TRIES {
        match what() {
            Err(error) if error.kind() == io::ErrorKind::StaleNetworkFileHandle => {
                std::thread::sleep(STALE_PAUSE);
            }
            other => return other,
        }
    }
    what()
}

/// A file without its final name; removed on drop unless it was published.
#[derive(Debug)]
pub struct TempFile {
    file: File,
    /// `None` once the file has its final name.
    path: Option<PathBuf>,
}

impl TempFile {
    /// Makes an empty one in `dir`, with mode 0666 less the umask.
    pub fn create(dir: &Path) -> io::Result<TempFile> {
        static COUNTER: AtomicU64 = AtomicU64::new(0);
        let mut tries = 0;
        loop {
            // Process id and counter alone would meet on a directory shared by two hosts; create_new finds whatever meets anyway.
            let nanos = std::time::SystemTime::UNIX_EPOCH.elapsed().map_or(0, |age| age.subsec_nanos());
            let count = COUNTER.fetch_add(1, Ordering::Relaxed);
            let path = dir.join(format!("{TEMP_PREFIX}{:x}-{nanos:x}-{count:x}", std::process::id()));
            let opened = OpenOptions::new().read(true).write(true).create_new(true).mode(0o666).open(&path);
            match opened {
                Ok(file) => return Ok(TempFile { file, path: Some(path) }),
                Err(error) if error.kind() == io::ErrorKind::AlreadyExists && tries < TEMP_NAME_TRIES => {
                    tries += 1;
                }
                Err(error) => return Err(error),
            }
        }
    }

    /// The open file.
    pub fn file(&self) -> &File {
        &self.file
    }

    /// The open file, to write to.
    pub fn file_mut(&mut self) -> &mut File {
        &mut self.file
    }

    /// The temporary name, for messages.
    pub fn path(&self) -> &Path {
        self.path.as_deref().unwrap_or(Path::new("."))
    }

    /// Fsyncs the file and gives it the name `target` (same filesystem), unless that is taken: then `AlreadyExists`, and this stays temporary.
    ///
    /// On `Ok` the name is durable. On another error the name may or may not be there, and is whole if it is.
    pub fn publish_new(&mut self, target: &Path) -> io::Result<()> {
        let Some(path) = self.path.as_deref() else {
            return Err(io::Error::new(io::ErrorKind::InvalidInput, "the file has its final name already"));
        };
        self.file.sync_all()?;
        match rustix::fs::renameat_with(CWD, path, CWD, target, RenameFlags::NOREPLACE) {
            Ok(()) => {}
            Err(rustix::io::Errno::INVAL | rustix::io::Errno::NOSYS | rustix::io::Errno::OPNOTSUPP) => {
                // Filesystems without RENAME_NOREPLACE (NFS): a link is as atomic and refuses to replace too.
                std::fs::hard_link(path, target)?;
                std::fs::remove_file(path)?;
            }
            Err(error) => return Err(error.into()),
        }
        self.path = None;
        sync_dir(parent_of(target))
    }

    /// Fsyncs the file and puts it in the place of `target` (same filesystem), if that exists.
    ///
    /// On `Ok` the new content is durable. On `Err` the name holds the old or the new content, whole.
    pub fn publish_over(mut self, target: &Path) -> io::Result<()> {
        let Some(path) = self.path.as_deref() else {
            return Err(io::Error::new(io::ErrorKind::InvalidInput, "the file has its final name already"));
        };
        self.file.sync_all()?;
        std::fs::rename(path, target)?;
        self.path = None;
        sync_dir(parent_of(target))
    }
}

impl Drop for TempFile {
    fn drop(&mut self) {
        if let Some(path) = &self.path {
            // An abandoned temporary file is garbage by its name; failing to remove it harms nobody.
            let _ = std::fs::remove_file(path);
        }
    }
}

/// Puts `bytes` in the place of the file `target`, which may exist or not. Durable on `Ok`; on `Err` old or new, whole.
pub fn replace_file(target: &Path, bytes: &[u8]) -> io::Result<()> {
    let mut temp = TempFile::create(parent_of(target))?;
    temp.file_mut().write_all(bytes)?;
    temp.publish_over(target)
}

/// Makes the names in a directory durable.
pub fn sync_dir(dir: &Path) -> io::Result<()> {
    match File::open(dir)?.sync_all() {
        // Some network and FUSE filesystems have no fsync for directories: they send each change of a name to their server at once.
        Err(error) if error.kind() == io::ErrorKind::InvalidInput => Ok(()),
        other => other,
    }
}

/// Makes `dir` and what is missing above it, and makes each name durable, whoever made it: a directory that another process
/// has just made may not be durable yet. `known` tells which directories need no second look.
pub fn create_dirs(dir: &Path, known: &mut dyn FnMut(&Path) -> bool) -> io::Result<()> {
    let mut missing: Vec<&Path> = Vec::new();
    let mut at = dir;
    while !known(at) {
        missing.push(at);
        match at.parent() {
            Some(parent) if !parent.as_os_str().is_empty() => at = parent,
            _ => break,
        }
    }
    for dir in missing.into_iter().rev() {
        match std::fs::create_dir(dir) {
            Ok(()) => {}
            Err(_) if dir.is_dir() => {}
            // "File exists" is true of it and no answer to why there is no directory.
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {
                return Err(rustix::io::Errno::NOTDIR.into());
            }
            Err(error) => return Err(error),
        }
        match sync_dir(parent_of(dir)) {
            // A parent we may pass through but not open was there before us.
            Err(error) if error.kind() == io::ErrorKind::PermissionDenied => {}
            other => other?,
        }
    }
    Ok(())
}

/// The directory a path lies in; `.` for a bare name.
pub fn parent_of(path: &Path) -> &Path {
    match path.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent,
        Some(_) => Path::new("."),
        None => path,
    }
}

/// Whether a directory entry of this name is a write in flight or an abandoned one.
pub fn is_temp_name(name: &OsStr) -> bool {
    name.as_encoded_bytes().starts_with(TEMP_PREFIX.as_bytes())
}

#[cfg(test)]
mod tests {
    use std::ffi::OsString;

    use super::*;

    fn names(dir: &Path) -> Vec<OsString> {
        std::fs::read_dir(dir).unwrap().map(|entry| entry.unwrap().file_name()).collect()
    }

    #[test]
    fn a_replaced_file_is_the_old_or_the_new_and_nothing_is_left_beside_it() {
        let dir = tempfile::tempdir().unwrap();
        let target = dir.path().join("volume.json");
        replace_file(&target, b"one").unwrap();
        replace_file(&target, b"two, longer").unwrap();
        assert_eq!(std::fs::read(&target).unwrap(), b"two, longer");
        assert_eq!(names(dir.path()), ["volume.json"]);
    }

    #[test]
    fn a_dropped_temporary_file_leaves_nothing() {
        let dir = tempfile::tempdir().unwrap();
        let temp = TempFile::create(dir.path()).unwrap();
        assert!(is_temp_name(&names(dir.path())[0]));
        drop(temp);
        assert!(names(dir.path()).is_empty());
    }

    #[test]
    fn publishing_a_new_file_never_replaces_one() {
        let dir = tempfile::tempdir().unwrap();
        let target = dir.path().join("object");
        TempFile::create(dir.path()).unwrap().publish_new(&target).unwrap();
        let mut second = TempFile::create(dir.path()).unwrap();
        second.file_mut().write_all(b"other").unwrap();
        assert_eq!(second.publish_new(&target).unwrap_err().kind(), io::ErrorKind::AlreadyExists);
        drop(second);
        assert_eq!(std::fs::read(&target).unwrap(), b"");
        assert_eq!(names(dir.path()), ["object"]);
    }

    #[test]
    fn directories_are_made_down_to_the_last_and_a_file_in_the_way_is_an_error() {
        let dir = tempfile::tempdir().unwrap();
        let deep = dir.path().join("a/b/c");
        create_dirs(&deep, &mut |known| known == dir.path()).unwrap();
        create_dirs(&deep, &mut |_| false).unwrap();
        assert!(deep.is_dir());
        std::fs::write(dir.path().join("file"), b"").unwrap();
        assert!(create_dirs(&dir.path().join("file/x"), &mut |known| known == dir.path()).is_err());
    }
}
