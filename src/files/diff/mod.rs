//! What changed between two filesystems, as files.
//!
//! Enters: two filesystems and the ranges in which their devices may differ. Leaves: one [`Change`] a line of JSON, by path. Invariant: the answer is that of comparing every file of both; the cost is by
//! what differs. How: [`inodes`] finds the inodes whose record or blocks lie in differing ranges, [`trees`] walks the directories of both at once and passes over what is the same inode and not among
//! these, [`renames`] joins what went and what came.

mod inodes;
mod renames;
mod trees;

use std::collections::HashSet;

use serde::{Deserialize, Serialize};

use super::changes::Ranges;
use super::ext4::{Ext4, Inode, Kind, Layout, Time, Xattr};
use super::list::octal;
use super::source::range_at;
use super::text::{self, MAX_TEXT};
use super::{FilePath, FilesError, Outlet, apart};
use crate::units::{ByteLen, ByteRange};

/// Compared at once.
const STEP: u64 = 1 << 20;

/// What became of a file.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Status {
    /// It is new.
    Added,
    /// It is gone.
    Removed,
    /// It has another content, and perhaps another mode and owner.
    Modified,
    /// It has another path, and perhaps another content.
    Renamed,
    /// It is another kind of file.
    TypeChanged,
    /// It has another mode, owner or extended attributes, and the same content.
    Attributes,
}

impl Status {
    /// As git abbreviates it; `P`, permissions, is what git has no letter for.
    pub fn letter(self) -> char {
        match self {
            Status::Added => 'A',
            Status::Removed => 'D',
            Status::Modified => 'M',
            Status::Renamed => 'R',
            Status::TypeChanged => 'T',
            Status::Attributes => 'P',
        }
    }
}

/// What may be another beside the content.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Attribute {
    /// Permissions.
    Mode,
    /// Owner or group.
    Owner,
    /// Extended attributes, ACLs among them.
    Xattrs,
}

/// One side of a change.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Facts {
    /// What it is.
    pub kind: Kind,
    /// Permissions, octal.
    pub mode: String,
    /// Owner.
    pub uid: u32,
    /// Group.
    pub gid: u32,
    /// Bytes.
    pub size: u64,
    /// Its inode's number.
    pub inode: u32,
}

impl Facts {
    fn of(known: &Known) -> Facts {
        Facts {
            kind: known.kind,
            mode: octal(known.permissions),
            uid: known.uid,
            gid: known.gid,
            size: known.size,
            inode: known.number,
        }
    }
}

/// What is remembered of an inode: millions of them may have changed.
#[derive(Clone, Copy, Debug)]
struct Known {
    number: u32,
    kind: Kind,
    permissions: u16,
    uid: u32,
    gid: u32,
    size: u64,
    created: Time,
    generation: u32,
    is_encrypted: bool,
}

impl Known {
    fn of(inode: &Inode) -> Known {
        Known {
            number: inode.number,
            kind: inode.kind,
            permissions: inode.permissions,
            uid: inode.uid,
            gid: inode.gid,
            size: inode.size,
            created: inode.created,
            generation: inode.generation,
            is_encrypted: inode.is_encrypted(),
        }
    }
}

/// A file that is not the same in both.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Change {
    /// What became of it.
    pub status: Status,
    /// Its path, in the newer one where it is there.
    pub path: FilePath,
    /// Its path in the older one, where that is another.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub old_path: Option<FilePath>,
    /// What it was.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub old: Option<Facts>,
    /// What it is.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub new: Option<Facts>,
    /// Whether its content is another.
    pub content: bool,
    /// What else is.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub attributes: Vec<Attribute>,
    /// Lines that came and went, of a text.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub lines: Option<(u64, u64)>,
    /// The content was to be compared by lines and is no text, or too long a one.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub binary: bool,
    /// The changed lines with their neighbours, as `diff -u` writes them.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub hunks: Option<String>,
}

/// How changes are told.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DiffOptions {
    /// A file that went and one that came may be one that was renamed.
    #[serde(default = "yes")]
    pub renames: bool,
    /// Count the changed lines of texts.
    #[serde(default)]
    pub lines: bool,
    /// And show them.
    #[serde(default)]
    pub patch: bool,
}

fn yes() -> bool {
    true
}

impl Default for DiffOptions {
    fn default() -> DiffOptions {
        DiffOptions { renames: true, lines: false, patch: false }
    }
}

/// A change, while it is being found.
#[derive(Clone, Debug)]
struct Found {
    path: FilePath,
    old_path: Option<FilePath>,
    old: Option<Known>,
    new: Option<Known>,
    content: bool,
    attributes: Vec<Attribute>,
}

impl Found {
    fn status(&self) -> Status {
        match (&self.old, &self.new) {
            (None, _) => Status::Added,
            (_, None) => Status::Removed,
            _ if self.old_path.is_some() => Status::Renamed,
            (Some(old), Some(new)) if old.kind != new.kind => Status::TypeChanged,
            _ if self.content => Status::Modified,
            _ => Status::Attributes,
        }
    }
}

/// Two filesystems that are compared.
#[derive(Debug)]
pub struct Comparison {
    old: Ext4,
    new: Ext4,
    /// Outside of these both devices read the same.
    ranges: Ranges,
    /// Inodes of the same number can be compared by their records.
    aligned: bool,
    /// Where that is so: the inodes that may not be the same, as they or their blocks lie in a differing range.
    suspects: HashSet<u32>,
}

impl Comparison {
    /// Two filesystems whose devices read the same outside of `ranges`.
    pub async fn new(old: Ext4, new: Ext4, ranges: Ranges) -> Result<Comparison, FilesError> {
        let in_journals = |filesystem: &Ext4| {
            let blocks = filesystem.replayed_blocks();
            blocks.map(|block| filesystem.superblock().blocks_range(block, 1)).collect::<Vec<_>>()
        };
        let played = Ranges::new([in_journals(&old), in_journals(&new)].concat());
        let ranges = ranges.with(played);
        let mut comparison = Comparison { old, new, ranges, aligned: false, suspects: HashSet::new() };
        comparison.find_suspects().await?;
        Ok(comparison)
    }

    /// Sends every change, by path.
    pub async fn run(&self, options: DiffOptions, out: &mut Outlet) -> Result<(), FilesError> {
        let mut found = self.walk().await?;
        if options.renames {
            found = self.join_renames(found).await?;
        }
        let sorting = move || {
            found.sort_by(|one, other| one.path.cmp(&other.path));
            found
        };
        for found in apart(sorting).await? {
            let change = self.told(found, options).await?;
            out.send_line(&change).await?;
        }
        Ok(())
    }

    async fn told(&self, found: Found, options: DiffOptions) -> Result<Change, FilesError> {
        let mut change = Change {
            status: found.status(),
            old: found.old.as_ref().map(Facts::of),
            new: found.new.as_ref().map(Facts::of),
            path: found.path,
            old_path: found.old_path,
            content: found.content,
            attributes: found.attributes,
            lines: None,
            binary: false,
            hunks: None,
        };
        let kind = |known: &Option<Known>| known.map(|known| known.kind);
        let (one, other) = (kind(&found.old), kind(&found.new));
        // A link's text is where it leads.
        let has_text = |kind: &Option<Kind>| matches!(kind, None | Some(Kind::File | Kind::Link));
        let alike = one == other || one.is_none() || other.is_none();
        let texts = alike && has_text(&one) && has_text(&other);
        if !(options.lines || options.patch) || !texts || !change.content {
            return Ok(change);
        }
        let (old, new) = (whole(&self.old, found.old).await?, whole(&self.new, found.new).await?);
        let lines = match (old, new) {
            (Some(old), Some(new)) => apart(move || text::compare(&old, &new)).await?,
            _ => None,
        };
        match lines {
            Some(lines) => {
                change.lines = Some((lines.insertions, lines.deletions));
                change.hunks = options.patch.then_some(lines.hunks);
            }
            None => change.binary = true,
        }
        Ok(change)
    }

    /// Whether both devices hold the same in `range`.
    async fn is_same(&self, range: ByteRange) -> Result<bool, FilesError> {
        for part in self.ranges.within(range) {
            let mut at = part.start.0;
            while at < part.end.0 {
                let step = range_at(at, STEP.min(part.end.0 - at));
                if self.old.read(step).await? != self.new.read(step).await? {
                    return Ok(false);
                }
                at = step.end.0;
            }
        }
        Ok(true)
    }

    /// Whether two files hold the same bytes. What is at the same place in both is looked at only where the devices differ.
    async fn is_same_content(&self, old: &Inode, new: &Inode) -> Result<bool, FilesError> {
        if old.size != new.size {
            return Ok(false);
        }
        let (one, other) = (self.old.layout(old).await?, self.new.layout(new).await?);
        let mut at = 0;
        while at < old.size {
            let (end, places) =
                places(&one, &other, at, old.size, (self.old.block_len(), self.new.block_len()));
            let same = match places {
                Some((None, None)) => true,
                Some((Some(one), Some(other))) if one == other => {
                    self.is_same(range_at(one, end - at)).await?
                }
                _ => {
                    let step = ByteLen(end - at);
                    let (one, other) = (
                        self.old.read_file(old, &one, at, step).await?,
                        self.new.read_file(new, &other, at, step).await?,
                    );
                    one == other
                }
            };
            if !same {
                return Ok(false);
            }
            at = end;
        }
        Ok(true)
    }

    /// What of two files of one kind is not the same: the content, and what else.
    async fn differences(&self, old: &Inode, new: &Inode) -> Result<(bool, Vec<Attribute>), FilesError> {
        let attributes = self.attributes(old, new).await?;
        let content = match old.kind {
            Kind::File => !self.is_same_content(old, new).await?,
            Kind::Link => self.old.link_target(old).await? != self.new.link_target(new).await?,
            Kind::CharDevice | Kind::BlockDevice => old.device() != new.device(),
            Kind::Directory | Kind::Fifo | Kind::Socket => false,
        };
        Ok((content, attributes))
    }

    /// What beside the content is not the same.
    async fn attributes(&self, old: &Inode, new: &Inode) -> Result<Vec<Attribute>, FilesError> {
        let mut attributes = Vec::new();
        if old.permissions != new.permissions {
            attributes.push(Attribute::Mode);
        }
        if (old.uid, old.gid) != (new.uid, new.gid) {
            attributes.push(Attribute::Owner);
        }
        if xattrs(&self.old, old).await? != xattrs(&self.new, new).await? {
            attributes.push(Attribute::Xattrs);
        }
        Ok(attributes)
    }
}

/// The attributes of a file, but for the content of one that is in its inode.
async fn xattrs(filesystem: &Ext4, inode: &Inode) -> Result<Vec<Xattr>, FilesError> {
    let mut xattrs = filesystem.xattrs(inode).await?;
    xattrs.retain(|xattr| xattr.name != b"system.data");
    Ok(xattrs)
}

type Places = (Option<u64>, Option<u64>);

/// Where the bytes from `at` on are on both devices, and up to where that goes on; `None` where they are in an inode. What has to be read ends after a step.
fn places(
    old: &Layout,
    new: &Layout,
    at: u64,
    size: u64,
    (old_block, new_block): (u64, u64),
) -> (u64, Option<Places>) {
    let step = size.min(at + STEP);
    if old.inline.is_some() || new.inline.is_some() {
        return (step, None);
    }
    let (one, one_end) = old.piece_at(at, size, old_block);
    let (other, other_end) = new.piece_at(at, size, new_block);
    let end = one_end.min(other_end);
    match (one, other) {
        (None, None) => (end, Some((None, None))),
        (one, other) if one == other => (end, Some((one, other))),
        (one, other) => (end.min(step), Some((one, other))),
    }
}

/// All of a file, if it is short enough to be compared by lines; of no file nothing.
async fn whole(filesystem: &Ext4, known: Option<Known>) -> Result<Option<bytes::Bytes>, FilesError> {
    let Some(known) = known else { return Ok(Some(bytes::Bytes::new())) };
    if known.is_encrypted || known.kind != Kind::Link && known.size > MAX_TEXT {
        return Ok(None);
    }
    let inode = filesystem.inode(known.number).await?;
    if inode.kind == Kind::Link {
        return filesystem.link_target(&inode).await.map(Some);
    }
    let layout = filesystem.layout(&inode).await?;
    Ok(Some(filesystem.read_file(&inode, &layout, 0, ByteLen(MAX_TEXT)).await?))
}
