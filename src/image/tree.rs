//! A directory tree as the scan found it: everything but the contents of its files.
//!
//! Enters: entries in walk order, from the scan. Leaves: the same, with parents, names and paths, to whoever
//! lays out a filesystem or reads the files. Invariant: a parent comes before its children, and the entries of one
//! directory are consecutive, sorted by their bytes; so the order depends on names alone.

use std::collections::BTreeMap;
use std::ffi::{CStr, OsStr};
use std::os::unix::ffi::OsStrExt;
use std::path::PathBuf;

use rustix::fs::{Statx, StatxTimestamp};

/// The size of a filesystem block, and what data segments are aligned to.
pub(crate) const BLOCK: u64 = 4096;

/// The index of an entry in its tree. The root is 0.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(crate) struct EntryId(pub(crate) u32);

/// The directory itself.
pub(crate) const ROOT: EntryId = EntryId(0);

/// A point in time: seconds and nanoseconds since the epoch.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Time {
    pub(crate) sec: i64,
    pub(crate) nsec: u32,
}

impl From<StatxTimestamp> for Time {
    fn from(time: StatxTimestamp) -> Time {
        Time { sec: time.tv_sec, nsec: time.tv_nsec }
    }
}

/// What must be the same before and after a file is read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Stamp {
    pub(crate) dev: u64,
    pub(crate) ino: u64,
    /// The file type's bits of the mode: a freed inode number is soon another file's.
    file_type: u16,
    pub(crate) size: u64,
    pub(crate) mtime: Time,
    pub(crate) ctime: Time,
}

impl Stamp {
    pub(crate) fn of(stat: &Statx) -> Stamp {
        Stamp {
            dev: rustix::fs::makedev(stat.stx_dev_major, stat.stx_dev_minor),
            ino: stat.stx_ino,
            file_type: stat.stx_mode & 0o170_000,
            size: stat.stx_size,
            mtime: stat.stx_mtime.into(),
            ctime: stat.stx_ctime.into(),
        }
    }

    /// What differs, in a user's words.
    pub(crate) fn difference(&self, now: &Stamp) -> Option<&'static str> {
        if self.file_type != now.file_type {
            Some("something else has its name")
        } else if (self.dev, self.ino) != (now.dev, now.ino) {
            Some("another file has its name")
        } else if self.size > now.size {
            Some("it shrank")
        } else if self.size < now.size {
            Some("it grew")
        } else if self.mtime != now.mtime {
            Some("it was written")
        } else if self.ctime != now.ctime {
            Some("its metadata was changed")
        } else {
            None
        }
    }
}

/// A part of a file that has data. Starts on a block; only the last of a file may end inside one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Segment {
    pub(crate) start: u64,
    pub(crate) len: u64,
}

/// What an entry is.
#[derive(Debug)]
pub(crate) enum Kind {
    Dir,
    /// A regular file. `segments` is `None` for one without holes.
    File {
        segments: Option<Box<[Segment]>>,
    },
    /// One more name of an entry seen before, which is no directory.
    HardLink {
        to: EntryId,
    },
    Symlink {
        target: Box<[u8]>,
    },
    Fifo,
    Socket,
    CharDevice {
        major: u32,
        minor: u32,
    },
    BlockDevice {
        major: u32,
        minor: u32,
    },
}

/// One name in the tree.
#[derive(Debug)]
pub(crate) struct Entry {
    pub(crate) parent: EntryId,
    name_at: u32,
    name_len: u8,
    /// Permission bits with setuid, setgid and sticky.
    pub(crate) mode: u16,
    pub(crate) uid: u32,
    pub(crate) gid: u32,
    pub(crate) atime: Time,
    pub(crate) stamp: Stamp,
    pub(crate) kind: Kind,
}

impl Entry {
    pub(crate) fn new(parent: EntryId, stat: &Statx, kind: Kind) -> Entry {
        Entry {
            parent,
            name_at: 0,
            name_len: 0,
            mode: stat.stx_mode & 0o7777,
            uid: stat.stx_uid,
            gid: stat.stx_gid,
            atime: stat.stx_atime.into(),
            stamp: Stamp::of(stat),
            kind,
        }
    }

    /// The segments of a regular file's data; none for anything else.
    pub(crate) fn segments(&self) -> impl Iterator<Item = Segment> + '_ {
        let (dense, sparse) = match &self.kind {
            Kind::File { segments: None } if self.stamp.size > 0 => {
                (Some(Segment { start: 0, len: self.stamp.size }), &[][..])
            }
            Kind::File { segments: Some(segments) } => (None, &segments[..]),
            _ => (None, &[][..]),
        };
        dense.into_iter().chain(sparse.iter().copied())
    }

    /// Whether there is anything to read.
    pub(crate) fn has_data(&self) -> bool {
        self.segments().next().is_some()
    }
}

/// An extended attribute as the system call gives it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Xattr {
    pub(crate) name: Box<[u8]>,
    pub(crate) value: Box<[u8]>,
}

/// A scanned directory.
#[derive(Debug)]
pub(crate) struct Tree {
    pub(crate) entries: Vec<Entry>,
    /// Attributes of the few entries that have any, sorted by name.
    pub(crate) xattrs: BTreeMap<EntryId, Vec<Xattr>>,
    /// Names, each with a NUL after it.
    names: Vec<u8>,
    /// Where the directory is, for messages.
    pub(crate) at: PathBuf,
}

impl Tree {
    /// The tree of a directory at `at`, still empty.
    pub(crate) fn new(at: PathBuf) -> Tree {
        Tree { entries: Vec::new(), xattrs: BTreeMap::new(), names: Vec::new(), at }
    }

    /// Adds an entry; `None` where entries or names pass what 32 bits can index.
    pub(crate) fn push(&mut self, mut entry: Entry, name: &CStr) -> Option<EntryId> {
        let id = EntryId(u32::try_from(self.entries.len()).ok()?);
        let bytes = name.to_bytes_with_nul();
        entry.name_at = u32::try_from(self.names.len()).ok()?;
        entry.name_len = u8::try_from(bytes.len() - 1).ok()?;
        self.names.extend_from_slice(bytes);
        self.entries.push(entry);
        Some(id)
    }

    pub(crate) fn entry(&self, id: EntryId) -> &Entry {
        &self.entries[id.0 as usize]
    }

    /// The last part of an entry's path, NUL-terminated for system calls.
    pub(crate) fn name(&self, id: EntryId) -> &CStr {
        let entry = self.entry(id);
        let start = entry.name_at as usize;
        let with_nul = &self.names[start..=start + usize::from(entry.name_len)];
        CStr::from_bytes_with_nul(with_nul).expect("names are stored with one NUL, at their end")
    }

    /// All entries with their ids, in walk order.
    pub(crate) fn iter(&self) -> impl Iterator<Item = (EntryId, &Entry)> {
        self.entries.iter().enumerate().map(|(index, entry)| (EntryId(index as u32), entry))
    }

    /// An entry's path below the directory.
    pub(crate) fn relative_path(&self, id: EntryId) -> PathBuf {
        let mut ids = Vec::new();
        let mut at = id;
        while at != ROOT {
            ids.push(at);
            at = self.entry(at).parent;
        }
        ids.iter().rev().map(|&id| OsStr::from_bytes(self.name(id).to_bytes())).collect()
    }

    /// An entry's whole path, for messages.
    pub(crate) fn path(&self, id: EntryId) -> PathBuf {
        let relative = self.relative_path(id);
        if relative.as_os_str().is_empty() { self.at.clone() } else { self.at.join(relative) }
    }
}
