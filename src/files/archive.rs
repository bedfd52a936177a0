//! What `export` sends: a tar archive of a file, or of a directory and everything in it.
//!
//! Enters: a path. Leaves: an archive with owners, modes, times, attributes, ACLs, hard links, holes. Sockets are left out, as tar does.

use std::collections::HashMap;

use super::content::STEP;
use super::ext4::{Ext4, Inode, Kind};
use super::tar::{BLOCK, Facts, Member, header, sparse_map};
use super::tree::Walk;
use super::{FilePath, FilesError, Outlet};
use crate::units::ByteLen;

/// A file with holes of less than this is stored with its zeros.
const WORTH_A_MAP: u64 = 64 << 10;

/// The most files of several names: each is remembered by its first.
const MAX_LINKED: usize = 8 << 20;
/// What these names may take.
const MAX_LINKED_BYTES: usize = 512 << 20;

/// Sends the archive of what is at `path`. Names in it are from there on; a directory itself is `./`.
pub async fn export(filesystem: &Ext4, path: &FilePath, out: &mut Outlet) -> Result<(), FilesError> {
    let start = filesystem.find(path, true).await?;
    let mut archive = Archive { filesystem, linked: HashMap::new(), linked_bytes: 0 };
    if start.kind == Kind::Directory {
        archive.add(b"./", path, &start, out).await?;
        let mut walk = Walk::new(filesystem, path.clone(), &start).await?;
        while let Some((found, inode)) = walk.next().await? {
            let mut name = found.below(path).to_vec();
            if inode.kind == Kind::Directory {
                name.push(b'/');
            }
            archive.add(&name, &found, &inode, out).await?;
        }
    } else {
        archive.add(path.name(), path, &start, out).await?;
    }
    out.send(&[0; 2 * BLOCK]).await
}

struct Archive<'f> {
    filesystem: &'f Ext4,
    /// Names of files that have more than one.
    linked: HashMap<u32, Vec<u8>>,
    linked_bytes: usize,
}

impl Archive<'_> {
    async fn add(
        &mut self,
        name: &[u8],
        path: &FilePath,
        inode: &Inode,
        out: &mut Outlet,
    ) -> Result<(), FilesError> {
        if inode.is_encrypted() && inode.kind != Kind::Directory {
            return Err(FilesError::Encrypted { path: path.clone() });
        }
        let device = inode.device().unwrap_or_default();
        let target;
        let member = match inode.kind {
            Kind::File => Member::File,
            Kind::Directory => Member::Directory,
            Kind::Link => {
                target = self.filesystem.link_target(inode).await?;
                Member::Link { to: &target }
            }
            Kind::CharDevice => Member::CharDevice(device),
            Kind::BlockDevice => Member::BlockDevice(device),
            Kind::Fifo => Member::Fifo,
            Kind::Socket => return Ok(()),
        };
        let xattrs = self.filesystem.xattrs(inode).await?;
        let facts = Facts {
            name,
            member,
            mode: inode.permissions,
            uid: inode.uid,
            gid: inode.gid,
            len: 0,
            modified: inode.modified,
            xattrs: &xattrs,
        };
        if inode.links > 1 && inode.kind != Kind::Directory {
            if let Some(of) = self.linked.get(&inode.number) {
                return out
                    .send(&header(&Facts { member: Member::HardLink { of }, xattrs: &[], ..facts }))
                    .await;
            }
            self.linked_bytes += name.len();
            if self.linked.len() == MAX_LINKED || self.linked_bytes > MAX_LINKED_BYTES {
                return Err(FilesError::TooMany { what: "files of more than one name", most: MAX_LINKED });
            }
            self.linked.insert(inode.number, name.to_vec());
        }
        if inode.kind == Kind::File {
            self.file(inode, facts, out).await
        } else {
            out.send(&header(&facts)).await
        }
    }

    async fn file(&self, inode: &Inode, facts: Facts<'_>, out: &mut Outlet) -> Result<(), FilesError> {
        let layout = self.filesystem.layout(inode).await?;
        let mut pieces = layout.data(inode.size, self.filesystem.block_len());
        let held: u64 = pieces.iter().map(|piece| piece.end - piece.start).sum();
        let len = if inode.size - held >= WORTH_A_MAP {
            let map = sparse_map(&pieces, inode.size);
            let len = map.len() as u64 + held;
            out.send(&header(&Facts { member: Member::Sparse { size: inode.size }, len, ..facts })).await?;
            out.send(&map).await?;
            len
        } else {
            pieces = vec![std::ops::Range { start: 0, end: inode.size }];
            out.send(&header(&Facts { len: inode.size, ..facts })).await?;
            inode.size
        };
        for piece in pieces {
            let mut at = piece.start;
            while at < piece.end {
                let step = ByteLen(STEP.0.min(piece.end - at));
                let bytes = self.filesystem.read_file(inode, &layout, at, step).await?;
                out.send(&bytes).await?;
                at += bytes.len() as u64;
            }
        }
        let rest = (BLOCK - (len % BLOCK as u64) as usize) % BLOCK;
        out.send(&[0; BLOCK][..rest]).await
    }
}
