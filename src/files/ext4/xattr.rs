//! Extended attributes: those in the inode's record, those in a block of their own, and values in an inode of their own.
//!
//! Enters: an inode. Leaves: names with their prefix and values, ACLs as the kernel hands them out. Invariant: at most what one record, one block and [`MAX_VALUES`] hold.

use bytes::Bytes;

use super::bytes::{u16_at, u32_at};
use super::{Ext4, Inode};
use crate::files::FilesError;
use crate::units::ByteLen;

const MAGIC: u32 = 0xea02_0000;
/// The longest value in an inode of its own: what the kernel takes.
const MAX_VALUE: u32 = 64 << 10;
/// What all of them may take together.
const MAX_VALUES: usize = 1 << 20;

/// An extended attribute.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Xattr {
    /// As in `user.name`; bytes, for nothing says that it is text.
    pub name: Vec<u8>,
    /// Its value.
    pub value: Bytes,
}

/// An entry whose value is still to be found.
struct Found {
    index: u8,
    name: Vec<u8>,
    value_inode: u32,
    value_at: usize,
    value_len: u32,
}

fn prefix(index: u8) -> Option<&'static [u8]> {
    Some(match index {
        0 => b"",
        1 => b"user.",
        2 => b"system.posix_acl_access",
        3 => b"system.posix_acl_default",
        4 => b"trusted.",
        6 => b"security.",
        7 => b"system.",
        8 => b"system.richacl",
        _ => return None,
    })
}

impl Ext4 {
    /// The attributes of a file, by name.
    pub async fn xattrs(&self, inode: &Inode) -> Result<Vec<Xattr>, FilesError> {
        let damaged = |why| FilesError::damaged(format!("attributes of inode {}", inode.number), why);
        let mut xattrs = Vec::new();
        let mut taken = 0;
        if u32_at(&inode.tail, 0) == MAGIC {
            // Values are told from after the magic number.
            let area = inode.tail.slice(4..);
            for found in entries(&area).map_err(damaged)? {
                self.add(inode, found, &area, &mut taken, &mut xattrs).await?;
            }
        }
        if inode.xattr_block != 0 {
            const HEADER: usize = 32;
            if inode.xattr_block >= self.superblock.blocks() {
                return Err(damaged("they are outside the filesystem"));
            }
            let block = self.read_blocks(inode.xattr_block, 1).await?;
            if u32_at(&block, 0) != MAGIC {
                return Err(damaged("their block has none"));
            }
            for found in entries(&block[HEADER..]).map_err(damaged)? {
                // Here values are told from the block's start.
                self.add(inode, found, &block, &mut taken, &mut xattrs).await?;
            }
        }
        xattrs.sort();
        Ok(xattrs)
    }

    async fn add(
        &self,
        inode: &Inode,
        found: Found,
        area: &Bytes,
        taken: &mut usize,
        xattrs: &mut Vec<Xattr>,
    ) -> Result<(), FilesError> {
        let damaged = |why| FilesError::damaged(format!("attributes of inode {}", inode.number), why);
        // Of a kind no kernel shows.
        let Some(prefix) = prefix(found.index) else { return Ok(()) };
        let name = [prefix, &found.name[..]].concat();
        let len = found.value_len as usize;
        *taken += len + name.len();
        if *taken > MAX_VALUES {
            return Err(damaged("there are too many"));
        }
        let value = if found.value_inode == 0 {
            let end = found.value_at.checked_add(len).filter(|end| *end <= area.len());
            let end = end.ok_or_else(|| damaged("a value is outside its place"))?;
            Bytes::copy_from_slice(&area[found.value_at..end])
        } else {
            if found.value_len > MAX_VALUE {
                return Err(damaged("a value is too long"));
            }
            let holder = self.inode(found.value_inode).await?;
            // An inline one would ask for its attributes in turn.
            if holder.is_inline() {
                return Err(damaged("a value is in an inode that has none"));
            }
            let layout =
                if holder.has_extents() { self.tree(&holder).await? } else { self.pointers(&holder).await? };
            self.read_file(&holder, &layout, 0, ByteLen(len as u64)).await?
        };
        // The kernel hands out its own form of ACLs, which archives hold too.
        let value = match found.index {
            2 | 3 => acl(&value).ok_or_else(|| damaged("an ACL is none"))?,
            _ => value,
        };
        xattrs.push(Xattr { name, value });
        Ok(())
    }
}

fn entries(bytes: &[u8]) -> Result<Vec<Found>, &'static str> {
    const HEADER: usize = 16;
    let mut found = Vec::new();
    let mut at = 0;
    while u32_at(bytes, at) != 0 {
        let Some(entry) = bytes.get(at..).filter(|entry| entry.len() >= HEADER) else {
            return Err("an entry is cut short");
        };
        let name_len = usize::from(entry[0]);
        let name = entry.get(HEADER..HEADER + name_len).ok_or("a name is cut short")?;
        found.push(Found {
            index: entry[1],
            name: name.to_vec(),
            value_at: u16_at(entry, 2).into(),
            value_inode: u32_at(entry, 4),
            value_len: u32_at(entry, 8),
        });
        at += HEADER + name_len.next_multiple_of(4);
    }
    Ok(found)
}

/// The kernel's form of an ACL from ext4's, which leaves out the ids nobody needs.
fn acl(on_disk: &[u8]) -> Option<Bytes> {
    const DISK_VERSION: u32 = 1;
    const VERSION: u32 = 2;
    const UNDEFINED: u32 = u32::MAX;
    const USER: u16 = 0x02;
    const GROUP: u16 = 0x08;
    if u32_at(on_disk, 0) != DISK_VERSION {
        return None;
    }
    let mut acl = VERSION.to_le_bytes().to_vec();
    let mut rest = &on_disk[4..];
    while !rest.is_empty() {
        let (tag, permissions) = (u16_at(rest, 0), u16_at(rest, 2));
        let len = if matches!(tag, USER | GROUP) { 8 } else { 4 };
        let id = if len == 8 { u32_at(rest, 4) } else { UNDEFINED };
        acl.extend_from_slice(&tag.to_le_bytes());
        acl.extend_from_slice(&permissions.to_le_bytes());
        acl.extend_from_slice(&id.to_le_bytes());
        rest = rest.get(len..)?;
    }
    Some(acl.into())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_acl_gets_the_ids_that_the_disk_leaves_out() {
        let disk =
            [&1u32.to_le_bytes()[..], &[1, 0, 7, 0], &[2, 0, 6, 0, 0xe8, 3, 0, 0], &[0x20, 0, 4, 0]].concat();
        let expected = [
            &2u32.to_le_bytes()[..],
            &[1, 0, 7, 0, 255, 255, 255, 255],
            &[2, 0, 6, 0, 0xe8, 3, 0, 0],
            &[0x20, 0, 4, 0, 255, 255, 255, 255],
        ]
        .concat();
        assert_eq!(acl(&disk).as_deref(), Some(&expected[..]));
        assert_eq!(acl(&[1, 0, 0, 0, 1]), None);
    }
}
