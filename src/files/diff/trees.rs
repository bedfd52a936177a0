//! The walk through the directories of both filesystems at once.
//!
//! Enters: the suspects. Leaves: what is not the same, each with its path. Invariant: a name is passed over only if both directories name the same inode and that is no suspect; each directory of either
//! side is visited once; [`MAX_KEPT`] and [`MAX_KEPT_BYTES`] bound what is kept.

use super::super::ext4::{DirEntry, Ext4, Inode, Kind, ROOT};
use super::super::tree::{MAX_PATH_BYTES, Visited};
use super::{Comparison, FilePath, FilesError, Found, Known};

/// Changes of one comparison, and directories that wait.
const MAX_KEPT: usize = 4 << 20;
/// What their paths may take.
const MAX_KEPT_BYTES: usize = 512 << 20;

/// A directory to be looked at: in the old, the new, or both.
struct Dir {
    path: FilePath,
    old: Option<u32>,
    new: Option<u32>,
}

/// The state of a walk.
#[derive(Default)]
struct Walked {
    open: Vec<Dir>,
    found: Vec<Found>,
    bytes: usize,
    old: Visited,
    new: Visited,
}

impl Walked {
    fn keep(&mut self, path: &FilePath) -> Result<(), FilesError> {
        self.bytes += path.as_bytes().len();
        if self.found.len() + self.open.len() >= MAX_KEPT || self.bytes > MAX_KEPT_BYTES {
            return Err(FilesError::TooMany { what: "changed files", most: MAX_KEPT });
        }
        Ok(())
    }

    fn found(&mut self, found: Found) -> Result<(), FilesError> {
        self.keep(&found.path)?;
        self.found.push(found);
        Ok(())
    }

    /// Has a directory looked at later. It counts as visited now: a million names for one must not make a million of it.
    fn open(&mut self, path: &FilePath, old: Option<u32>, new: Option<u32>) -> Result<(), FilesError> {
        if let Some(old) = old {
            self.old.visit(old)?;
        }
        if let Some(new) = new {
            self.new.visit(new)?;
        }
        self.keep(path)?;
        self.open.push(Dir { path: path.clone(), old, new });
        Ok(())
    }

    /// A name that only one side has; what is below comes too.
    fn alone(&mut self, path: FilePath, old: Option<Inode>, new: Option<Inode>) -> Result<(), FilesError> {
        let (old, new) = (old.as_ref().map(Known::of), new.as_ref().map(Known::of));
        let directory = |side: Option<Known>| side.filter(|known| known.kind == Kind::Directory);
        let number = |side: Option<Known>| directory(side).map(|known| known.number);
        if directory(old).is_some() || directory(new).is_some() {
            self.open(&path, number(old), number(new))?;
        }
        // Directories and special files have no content that could be another.
        let has =
            |side: Option<Known>| side.is_some_and(|known| matches!(known.kind, Kind::File | Kind::Link));
        let content = has(old) || has(new);
        self.found(Found { path, old_path: None, old, new, content, attributes: Vec::new() })
    }
}

impl Comparison {
    /// Everything that is not the same, in no order.
    pub(super) async fn walk(&self) -> Result<Vec<Found>, FilesError> {
        let mut walked = Walked::default();
        let (old, new) = (self.old.inode(ROOT).await?, self.new.inode(ROOT).await?);
        self.both(&mut walked, FilePath::default(), old, new).await?;
        while let Some(dir) = walked.open.pop() {
            walked.bytes -= dir.path.as_bytes().len();
            if dir.path.as_bytes().len() > MAX_PATH_BYTES {
                return Err(FilesError::damaged("the tree of directories", "it is too deep"));
            }
            self.directory(&mut walked, dir).await?;
        }
        Ok(walked.found)
    }

    /// Whether inode `number` is the same in both.
    pub(super) fn is_untouched(&self, number: u32) -> bool {
        self.aligned && !self.suspects.contains(&number)
    }

    async fn directory(&self, walked: &mut Walked, dir: Dir) -> Result<(), FilesError> {
        if let (Some(old), Some(new)) = (dir.old, dir.new)
            && old == new
            && self.is_untouched(new)
        {
            // The same directory: one look at it is enough.
            for entry in self.new.sorted_dir(&self.new.inode(new).await?).await? {
                let path = dir.path.join(&entry.name);
                self.same_entry(walked, path, &entry).await?;
            }
            return Ok(());
        }
        let mut old = entries(&self.old, dir.old).await?.into_iter().peekable();
        let mut new = entries(&self.new, dir.new).await?.into_iter().peekable();
        loop {
            let name = match (old.peek(), new.peek()) {
                (Some(one), Some(other)) => (&one.name).min(&other.name).clone(),
                (Some(only), None) | (None, Some(only)) => only.name.clone(),
                (None, None) => return Ok(()),
            };
            let path = dir.path.join(&name);
            let one = old.next_if(|entry| entry.name == name);
            let other = new.next_if(|entry| entry.name == name);
            match (one, other) {
                (Some(one), Some(other)) if one.inode == other.inode && self.is_untouched(one.inode) => {
                    self.same_entry(walked, path, &other).await?;
                }
                (Some(one), Some(other)) => {
                    let (old, new) = (self.old.inode(one.inode).await?, self.new.inode(other.inode).await?);
                    self.both(walked, path, old, new).await?;
                }
                (one, other) => {
                    let old = match one {
                        Some(entry) => Some(self.old.inode(entry.inode).await?),
                        None => None,
                    };
                    let new = match other {
                        Some(entry) => Some(self.new.inode(entry.inode).await?),
                        None => None,
                    };
                    walked.alone(path, old, new)?;
                }
            }
        }
    }

    /// The same name for the same inode number on both sides.
    async fn same_entry(
        &self,
        walked: &mut Walked,
        path: FilePath,
        entry: &DirEntry,
    ) -> Result<(), FilesError> {
        let may_be_dir = entry.kind.is_none_or(|kind| kind == Kind::Directory);
        if self.is_untouched(entry.inode) {
            if may_be_dir {
                let inode = self.new.inode(entry.inode).await?;
                if inode.kind == Kind::Directory {
                    walked.open(&path, Some(inode.number), Some(inode.number))?;
                }
            }
            return Ok(());
        }
        let (old, new) = (self.old.inode(entry.inode).await?, self.new.inode(entry.inode).await?);
        self.both(walked, path, old, new).await
    }

    /// A name that both sides have.
    async fn both(
        &self,
        walked: &mut Walked,
        path: FilePath,
        old: Inode,
        new: Inode,
    ) -> Result<(), FilesError> {
        if old.kind != new.kind {
            if old.kind == Kind::Directory || new.kind == Kind::Directory {
                walked.alone(path.clone(), Some(old), None)?;
                return walked.alone(path, None, Some(new));
            }
            let (old, new) = (Some(Known::of(&old)), Some(Known::of(&new)));
            let attributes = Vec::new();
            return walked.found(Found { path, old_path: None, old, new, content: true, attributes });
        }
        let (content, attributes) = self.differences(&old, &new).await?;
        if new.kind == Kind::Directory {
            walked.open(&path, Some(old.number), Some(new.number))?;
        }
        if !content && attributes.is_empty() {
            return Ok(());
        }
        let (old, new) = (Some(Known::of(&old)), Some(Known::of(&new)));
        walked.found(Found { path, old_path: None, old, new, content, attributes })
    }
}

async fn entries(filesystem: &Ext4, dir: Option<u32>) -> Result<Vec<DirEntry>, FilesError> {
    match dir {
        Some(dir) => filesystem.sorted_dir(&filesystem.inode(dir).await?).await,
        None => Ok(Vec::new()),
    }
}
