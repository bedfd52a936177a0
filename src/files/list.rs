//! What `ls` shows: a directory's entries, or everything below it.
//!
//! Enters: a path. Leaves: one [`Entry`] a line of JSON, in the order of names.

use serde::{Deserialize, Serialize};

use super::ext4::{Ext4, Inode, Kind};
use super::tree::Walk;
use super::{FilePath, FilesError, Outlet};

/// A file as it is listed.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Entry {
    /// Its path from the root; text, or `{"hex": ...}` where it is none.
    pub path: FilePath,
    /// Its inode's number.
    pub inode: u32,
    /// What it is; absent where the directory does not say and nobody looked.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub kind: Option<Kind>,
    /// What its inode says, where that was asked for.
    #[serde(flatten)]
    pub details: Option<Details>,
}

/// What an inode says.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Details {
    /// Permissions, octal.
    pub mode: String,
    /// Names it has.
    pub links: u16,
    /// Owner.
    pub uid: u32,
    /// Group.
    pub gid: u32,
    /// Bytes.
    pub size: u64,
    /// When its content was changed last, in seconds since 1970.
    pub modified_s: i64,
    /// And so many billionths.
    pub modified_ns: u32,
    /// Where a symbolic link leads.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub target: Option<FilePath>,
    /// Major and minor number of a device.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub device: Option<(u32, u32)>,
}

/// What to list.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ListOptions {
    /// With what the inodes say.
    #[serde(default)]
    pub long: bool,
    /// Everything below.
    #[serde(default)]
    pub recursive: bool,
    /// The directory itself, not what is in it.
    #[serde(default)]
    pub directory: bool,
}

/// Permissions as they are written.
pub fn octal(permissions: u16) -> String {
    format!("{permissions:04o}")
}

async fn details(filesystem: &Ext4, inode: &Inode) -> Result<Details, FilesError> {
    let target = match inode.kind {
        Kind::Link if !inode.is_encrypted() => {
            Some(FilePath::verbatim(&filesystem.link_target(inode).await?))
        }
        _ => None,
    };
    Ok(Details {
        mode: octal(inode.permissions),
        links: inode.links,
        uid: inode.uid,
        gid: inode.gid,
        size: inode.size,
        modified_s: inode.modified.seconds,
        modified_ns: inode.modified.nanoseconds,
        target,
        device: inode.device(),
    })
}

async fn entry(
    filesystem: &Ext4,
    path: FilePath,
    inode: &Inode,
    options: ListOptions,
) -> Result<Entry, FilesError> {
    let details = if options.long { Some(details(filesystem, inode).await?) } else { None };
    Ok(Entry { path, inode: inode.number, kind: Some(inode.kind), details })
}

/// Lists what is at `path`.
pub async fn list(
    filesystem: &Ext4,
    path: &FilePath,
    options: ListOptions,
    out: &mut Outlet,
) -> Result<(), FilesError> {
    // As ls: a link to a directory is that directory, unless it is asked about itself.
    let mut start = filesystem.find(path, false).await?;
    if start.kind == Kind::Link && !options.long && !options.directory {
        start = filesystem.find(path, true).await.unwrap_or(start);
    }
    if start.kind != Kind::Directory || options.directory {
        return out.send_line(&entry(filesystem, path.clone(), &start, options).await?).await;
    }
    if options.recursive {
        let mut walk = Walk::new(filesystem, path.clone(), &start).await?;
        while let Some((path, inode)) = walk.next().await? {
            out.send_line(&entry(filesystem, path, &inode, options).await?).await?;
        }
        return Ok(());
    }
    for found in filesystem.sorted_dir(&start).await? {
        let path = path.join(&found.name);
        let line = if options.long || found.kind.is_none() {
            entry(filesystem, path, &filesystem.inode(found.inode).await?, options).await?
        } else {
            Entry { path, inode: found.inode, kind: found.kind, details: None }
        };
        out.send_line(&line).await?;
    }
    Ok(())
}
